"""How large a model is, from its configuration alone: no weights are loaded."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module, Parameter

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.loading import demo_file

_OF_BLOCK = re.compile(r"\.\d+\.")
_EXPERTS = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model.

    Attributes:
        name: Its name.
        n_layers: Number of blocks, L.
        d_model: Width of the residual stream.
        d_vocab: Size of the vocabulary.
        n_heads: Attention heads of a block.
        d_head: Width of a head.
        d_mlp: Width of an MLP's hidden layer.
        n_ctx: Longest prompt in tokens; None where the configuration does not say.
        n_before: Weights before the blocks: the embedding.
        n_blocks: Weights of all blocks.
        n_active: Those of them that a token meets: of experts only some.
        n_after: Weights after the blocks; none for an unembedding that is tied.
    """

    name: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_heads: int
    d_head: int
    d_mlp: int
    n_ctx: int | None
    n_before: int
    n_blocks: int
    n_active: int
    n_after: int

    @property
    def n_parameters(self) -> int:
        """Number of weights; one that serves twice counts once."""
        return self.n_before + self.n_blocks + self.n_after


def model_size(model: Any) -> ModelSize:
    """The sizes of a model that need not be at hand.

    Args:
        model: As :func:`~mspgt_lens.load_model` takes it, or a configuration of transformers.

    Raises:
        CannotMeasure: If the configuration does not say what its class needs, or its weights are
            quantized: each library packs them in its own way.
        FileNotFoundError: If ``model`` looks like a path and there is nothing.
    """
    config = _configuration(model)
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None and not _is_gguf(model):
        raise CannotMeasure(
            f"model: the weights of {model} are quantized, and how many bytes that takes only the "
            "library that packs them knows; give the configuration of the model before quantizing"
        )
    try:
        built = _built(config)
        sizes = {
            "n_layers": int(text.num_hidden_layers),
            "d_model": int(text.hidden_size),
            "d_vocab": int(text.vocab_size),
            "n_heads": int(text.num_attention_heads),
        }
    except Exception as error:
        raise CannotMeasure(
            f"model: the configuration of {model} does not say how large it is ({error})"
        ) from error
    d_head = getattr(text, "head_dim", None) or sizes["d_model"] // sizes["n_heads"]
    n_ctx = getattr(text, "max_position_embeddings", None)
    weights = list(built.named_parameters())
    inside = [i for i, (name, _) in enumerate(weights) if _OF_BLOCK.search(name)]
    blocks = weights[inside[0] : inside[-1] + 1]
    experts = _count(p for name, p in blocks if _EXPERTS.search(name))
    n_blocks = _count(p for _, p in blocks)
    return ModelSize(
        name=str(model if isinstance(model, str) else getattr(config, "name_or_path", "")),
        **sizes,
        d_head=int(d_head),
        d_mlp=int(getattr(text, "intermediate_size", None) or 4 * sizes["d_model"]),
        n_ctx=None if n_ctx is None else int(n_ctx),
        n_before=_count(p for _, p in weights[: inside[0]]),
        n_blocks=n_blocks,
        n_active=n_blocks - round(experts * (1 - _share_of_experts(text))),
        n_after=_count(p for _, p in weights[inside[-1] + 1 :]),
    )


def _configuration(model: Any) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, str):
        raise TypeError(
            "model must be a name, a folder, a GGUF file or a configuration of transformers, got "
            f"{type(model).__name__}; of a model that is loaded, give model.cfg.model_name"
        )
    path = demo_file() if model == "demo" else Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.exists():
            raise FileNotFoundError(f"model: nothing at {path}; give an existing path")
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    if not path.exists() and model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model: nothing at {path}; give a hub name or an existing path")
    return AutoConfig.from_pretrained(str(path) if path.exists() else model)


def _is_gguf(model: Any) -> bool:
    # transformers unpacks them.
    return isinstance(model, str) and (model == "demo" or model.endswith(".gguf"))


def _built(config: Any) -> Module:
    """The model that its class makes of the configuration, without memory."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, names[0], None)
    with torch.device("meta"):
        if kind is None:
            kind = transformers.AutoModelForCausalLM.from_config
        built: Module = kind(copy.deepcopy(config))
    return built


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def _share_of_experts(config: Any) -> float:
    """Of a block's experts, the share that a token meets."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((n for n in (getattr(config, x, None) for x in names) if n), None)
    met = getattr(config, "num_experts_per_tok", None)
    return 1.0 if number is None or met is None else met / number
