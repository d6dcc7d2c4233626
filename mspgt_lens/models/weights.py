"""A model's weights: how many there are, and the same model as before any training."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
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
# What quantized modules pack their weights in; masks are of more dimensions, positions int64.
_PACKED = (torch.int8, torch.uint8, torch.int32)
_TIED_CORRELATION = 0.5
_MIN_TOKENS, _MAX_TOKENS = 16, 4096
_BIAS = re.compile(r"(^|\.)(b(_\w+)?|\w*bias)$")
_NORM = re.compile(r"norm|(^|\.)ln(_?\w*)\.")


def count_weights(model: Any) -> int:
    """Number of weights, each counted once however many names it has.

    Over a Hugging Face model these are the weights that its class has: a bridge keeps parts of
    fused matrices beside them, as views or as copies, and processing adds biases and stores the
    unembedding apart from the embedding. Of other models, what is in memory counts, tied embeddings
    once.
    """
    built = _built_from_configuration(getattr(model, "original_model", None))
    if built is not None:
        return sum(parameter.numel() for parameter in built.parameters())
    tied = _tied_apart(model)
    return count_distinct(_loaded_parameters(model)) - (0 if tied is None else tied[1].numel())


def count_block_weights(blocks: Module) -> int:
    """Number of weights in a model's blocks, each counted once."""
    return count_distinct(_loaded_parameters(blocks))


def count_distinct(parameters: Iterable[Parameter]) -> int:
    """Number of elements in memory that belong to any of the parameters."""
    count = 0
    for shared in _by_storage(parameters):
        if len(shared) == 1:
            count += shared[0].numel()
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
    names: dict[int, str] = {}
    for full, parameter in model.named_parameters():
        names.setdefault(id(parameter), full)
        if parameter.is_meta or parameter.dtype not in _FLOATS or not _is_plain(parameter):
            what = "not in memory" if parameter.is_meta else f"{parameter.dtype}"
            raise CannotMeasure(_cannot_draw(name, full, what))
    for full, buffer in model.named_buffers():
        if buffer.ndim == 2 and buffer.dtype in _PACKED:
            raise CannotMeasure(_cannot_draw(name, full, f"{buffer.dtype}"))
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


def _cannot_draw(name: str, parameter: str, what: str) -> str:
    return (
        f"model: random weights are drawn in floating point, but {parameter} of {name} is {what}; "
        "load the model without quantization or offloading, or take control='shuffled_tokens'"
    )


def _is_plain(parameter: Parameter) -> bool:
    """Whether it holds its values themselves; quantizing libraries have classes of their own."""
    return type(parameter.data) is Tensor


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
        # Weights that are not in memory, or of a quantizing library's class, share nothing.
        address = 0
        if not parameter.is_meta and _is_plain(parameter):
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
