"""A model's weights: how many there are, and the same model as before any training."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, Parameter

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.placing import in_float64

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What quantized modules pack their weights in; masks have four axes, positions are int64.
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)
_PACKED_AXES = (2, 3)
# Of blocks and other lists of modules.
_NUMBERED = re.compile(r"\.\d+\.")
_TIED_CORRELATION = 0.5
_MIN_TOKENS, _MAX_TOKENS = 16, 4096
_BIAS = re.compile(r"(^|\.)(b(_\w+)?|\w*bias)$")
_NORM = re.compile(r"norm|(^|\.)ln(_?\w*)\.")


def count_weights(model: Any) -> int | None:
    """Number of weights, each counted once however many names it has.

    None where some are packed and nothing says how many they are.

    Over a Hugging Face model these are the weights that its class has: a bridge keeps parts of
    fused matrices beside them, as views or as copies, and processing adds biases and stores the
    unembedding apart from the embedding. Of other models, what is in memory counts, tied embeddings
    once.
    """
    built = _built_from_configuration(getattr(model, "original_model", None))
    if built is not None:
        return sum(parameter.numel() for parameter in built.parameters())
    if any(_n_packed(weights) is None for _, weights in packed_weights(model)):
        return None
    tied = _tied_apart(model)
    return count_distinct(_loaded_parameters(model)) - (0 if tied is None else tied[1].numel())


def count_block_weights(model: Any) -> int:
    """Number of weights in a model's blocks, each counted once.

    Where they are packed, those that the model's class has; of other models' packed weights, what
    the parameters themselves say, else the numbers that they are packed in.
    """
    built = None
    if is_packed(model):
        built = _built_from_configuration(getattr(model, "original_model", None))
    if built is None:
        return count_distinct(_loaded_parameters(model.blocks))
    named = built.named_parameters()
    return sum(parameter.numel() for name, parameter in named if _NUMBERED.search(name))


def first_float(model: Any) -> torch.dtype:
    """The precision of a model's first weights in floating point; float32 where there are none."""
    dtypes = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype in _FLOATS), torch.float32)


def is_packed(model: Any) -> bool:
    """Whether any weights are quantized: not in memory as the numbers that they stand for."""
    return next(packed_weights(model), None) is not None or _lacks_weights(model)


def packed_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that quantized weights are packed in, by name."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not _is_ordinary(parameter):
            yield name, parameter
    for name, buffer in model.named_buffers():
        if buffer.ndim in _PACKED_AXES and (
            buffer.dtype in _PACKED or (buffer.is_floating_point() and not _is_ordinary(buffer))
        ):
            yield name, buffer
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            # Beside what a module registers, some libraries keep tensors of their own.
            if isinstance(value, Tensor) and value.dtype in _PACKED and value.ndim in _PACKED_AXES:
                yield f"{path}.{name}", value


def unpacked(weights: Tensor) -> Tensor | None:
    """The numbers that a parameter stands for; None where only its module knows."""
    if _is_ordinary(weights):
        return weights
    # Classes of quantizing libraries tell; plain tensors of integers have lost it.
    known = getattr(weights, "dequantize", None) if not _is_plain(weights) else None
    if known is None:
        return None
    found: Tensor = known()
    return found


def count_distinct(parameters: Iterable[Parameter]) -> int:
    """Number of elements in memory that belong to any of the parameters."""
    count = 0
    for shared in _by_storage(parameters):
        if len(shared) == 1:
            count += _n_packed(shared[0]) or shared[0].numel()
        else:
            covered = _elements(shared[0])
            for parameter in shared:
                _part(covered, parameter).fill_(True)
            count += int(covered.sum())
    return count


@contextmanager
def drawn_anew(model: Any, name: str, seed: int) -> Iterator[None]:
    """The context of :meth:`~mspgt_lens.models.ModelAdapter.random_weights`."""
    kinds = _kinds(model, name)
    tied = _tied_apart(model)
    same = tied is not None and torch.equal(tied[0].T.to(tied[1].device), tied[1])
    generator = torch.Generator().manual_seed(seed)
    trained = {kind: [p.detach().cpu().clone() for p in like] for kind, like in kinds.items()}
    before = None if tied is None else [_mean_and_deviation([weights]) for weights in tied]
    try:
        with torch.no_grad():
            for kind, like in kinds.items():
                mean, deviation = _mean_and_deviation(trained[kind])
                for parameter in like:
                    noise = torch.zeros(parameter.shape)
                    if not _is_vector(kind, parameter):
                        noise.normal_(generator=generator)
                    parameter.copy_(mean + deviation * noise)
            if tied is not None and before is not None:
                embedding, unembedding = tied
                (mean, deviation), (mean_out, deviation_out) = before
                noise = (embedding.T.float() - mean) / max(deviation, 1e-30)
                unembedding.copy_(embedding.T if same else mean_out + deviation_out * noise)
        yield
    finally:
        with torch.no_grad():
            for kind, like in kinds.items():
                for parameter, value in zip(like, trained[kind], strict=True):
                    parameter.copy_(value)


def _kinds(model: Any, name: str) -> dict[str, list[Parameter]]:
    """Parameters to draw anew, by what they are whatever their block; every storage once."""
    for full, what in _cannot_be_drawn(model):
        raise CannotMeasure(_cannot_draw(name, full, what))
    names: dict[int, str] = {}
    for full, parameter in model.named_parameters():
        names.setdefault(id(parameter), full)
    kinds: dict[str, list[Parameter]] = {}
    for shared in _by_storage(parameter for _, parameter in model.named_parameters()):
        # The widest first: its views are drawn with it.
        covered = _elements(shared[0]) if len(shared) > 1 else None
        for parameter in sorted(shared, key=lambda p: -p.numel()):
            if covered is not None:
                part = _part(covered, parameter)
                if bool(part.all()):
                    continue
                part.fill_(True)
            full = names[id(parameter)]
            kind = re.sub(r"\.\d+(?=\.)", ".*", full)
            if kind != full or not _is_vector(kind, parameter):
                kinds.setdefault(kind, []).append(parameter)
    return kinds


def _cannot_be_drawn(model: Any) -> Iterator[tuple[str, str]]:
    """Weights that nothing can be drawn for in floating point, each with what it is instead."""
    for full, parameter in model.named_parameters():
        if parameter.is_meta:
            yield full, "not in memory"
        elif _is_ordinary(parameter) and not _is_local(parameter):
            yield full, f"a {type(parameter.data).__name__}"
    for full, weights in packed_weights(model):
        yield full, f"{weights.dtype}"
    if _lacks_weights(model):
        yield "a part", "packed by a quantizing library"


def _cannot_draw(name: str, parameter: str, what: str) -> str:
    return (
        f"model: random weights are drawn in floating point, but {parameter} of {name} is {what}; "
        "load the model without quantization or offloading, or take control='shuffled_tokens'"
    )


def _lacks_weights(model: Any) -> bool:
    """Whether a model that says that it is quantized has fewer weights in memory than its class.

    Some libraries keep theirs where no module shows them; others unpack them while loading.
    """
    loaded = getattr(model, "original_model", None)
    if getattr(getattr(loaded, "config", None), "quantization_config", None) is None:
        return False
    built = _built_from_configuration(loaded)
    if built is None:
        return False
    held = [p for p in _loaded_parameters(model) if _is_ordinary(p)]
    return count_distinct(held) < sum(parameter.numel() for parameter in built.parameters())


def _n_packed(weights: Tensor) -> int | None:
    """How many weights a tensor stands for; None where it is packed and does not say."""
    if _is_ordinary(weights):
        return weights.numel()
    # Where bitsandbytes keeps it.
    shape: Sequence[int] | None = getattr(getattr(weights, "quant_state", None), "shape", None)
    if shape is not None:
        return math.prod(shape)
    # Tensors of libraries' own classes have the shape of what they stand for; one byte is one.
    known = not _is_plain(weights) or weights.dtype == torch.int8 or weights.is_floating_point()
    return weights.numel() if known else None


def _is_ordinary(weights: Tensor) -> bool:
    """Whether it holds weights as the floating-point numbers that they are."""
    return weights.dtype in _FLOATS and _is_plain(weights)


def _is_plain(weights: Tensor) -> bool:
    """Whether its class is torch's; quantizing libraries have classes of their own."""
    return type(weights.data).__module__.partition(".")[0] == "torch"


def _is_local(weights: Tensor) -> bool:
    """Whether its values are in this process's memory, as a tensor and nothing more."""
    return type(weights.data) is Tensor


def _is_vector(name: str, parameter: Tensor) -> bool:
    """Whether it is a bias or a norm's scale, which some model classes keep in rows by head."""
    return parameter.ndim < 2 or bool(_BIAS.search(name) or _NORM.search(name))


def _mean_and_deviation(tensors: Iterable[Tensor]) -> tuple[float, float]:
    count, total, square = 0, 0.0, 0.0
    for tensor in tensors:
        values = in_float64(tensor.detach())
        count += values.numel()
        total += float(values.sum())
        square += float(values.pow(2).sum())
    mean = total / count
    return mean, max(square / count - mean**2, 0.0) ** 0.5


def _by_storage(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters that share memory together, each once."""
    groups: dict[Any, list[Parameter]] = {}
    for parameter in {id(p): p for p in parameters}.values():
        # Weights that are not in memory, or of a class of their own, share nothing.
        address = 0
        if not parameter.is_meta and _is_local(parameter):
            address = parameter.untyped_storage().data_ptr()
        key = (parameter.device, address, parameter.dtype) if address else id(parameter)
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def _elements(parameter: Parameter) -> Tensor:
    """One flag for every element of the memory that a parameter is in."""
    size = parameter.untyped_storage().nbytes() // parameter.element_size()
    return torch.zeros(size, dtype=torch.bool)


def _part(flags: Tensor, parameter: Parameter) -> Tensor:
    return flags.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())


def _loaded_parameters(module: Module) -> Iterator[Parameter]:
    """Parameters of what a bridge was built over, without those that it adds beside them."""
    original = module._modules.get("_original_component")
    if original is not None:
        yield from _loaded_parameters(original)
        return
    yield from module.parameters(recurse=False)
    for child in module.children():
        yield from _loaded_parameters(child)


def _built_from_configuration(loaded: Any) -> Module | None:
    """The model that a Hugging Face model's class makes of its configuration, without memory."""
    if not isinstance(loaded, transformers.PreTrainedModel):
        return None
    try:
        with torch.device("meta"):
            built: Module = type(loaded)(copy.deepcopy(loaded.config))
    except Exception:
        # Classes from elsewhere may need more than their configuration.
        return None
    return built


def _tied_apart(
    model: Any,
) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, "d_model vocab"]] | None:
    """Embedding and unembedding where they are one matrix that is stored twice, else None.

    ``HookedTransformer`` stores them apart always, a bridge in compatibility mode; folding and
    centering then scale each coordinate and shift it, so they are compared by correlation.
    """
    embedding, unembedding = model.W_E, getattr(model.unembed, "W_U", None)
    if unembedding is None or embedding.T.shape != unembedding.shape:
        return None
    embedding, unembedding = embedding.detach(), unembedding.detach()
    if embedding.untyped_storage().data_ptr() == unembedding.untyped_storage().data_ptr():
        return None
    step = -(-len(embedding) // _MAX_TOKENS)
    rows, columns = (in_float64(x).cpu() for x in (embedding[::step], unembedding[:, ::step].T))
    if len(rows) < _MIN_TOKENS:
        return None
    rows, columns = rows - rows.mean(dim=0), columns - columns.mean(dim=0)
    lengths = (rows.norm(dim=0) * columns.norm(dim=0)).clamp(min=1e-30)
    correlation = float(((rows * columns).sum(dim=0) / lengths).abs().mean())
    return (embedding, unembedding) if correlation > _TIED_CORRELATION else None
