"""The model's own attention: what it computes where nobody looks at attention patterns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.models.adapter import ModelAdapter
from mspgt_lens.models.probes import probe_tokens, without_hooks

# How far residuals may differ, as a share of their length. In half precision every step rounds.
_SAME, _SAME_IN_HALF = 1e-4, 0.05


@contextmanager
def own_attention(adapter: ModelAdapter) -> Iterator[bool]:
    """Without attention patterns, at any context, where the model can.

    For its hooks TransformerLens computes attention step by step, each step a tensor that grows
    with the square of the context. Inside, a model of transformers attends as it does without
    TransformerLens, by PyTorch's ``scaled_dot_product_attention``. Before that, a short run with
    padding proves that it gives the same residual stream. The model is left as it is where it does
    not, where it is none of transformers' (``HookedTransformer``), and where somebody has a hook
    inside of attention, which would not be reached. On leaving, everything is as before.

    Args:
        adapter: The model, in :meth:`ModelAdapter.inference`.

    Yields:
        Whether no attention pattern is made.
    """
    inner = getattr(adapter.model, "original_model", None)
    parts = _attentions(adapter.model)
    known = inner is not None and getattr(inner, "_supports_sdpa", False)
    is_own = bool(known and parts and not _watched(parts) and _proven(adapter, inner, parts))
    with ExitStack() as stack:
        if is_own:
            stack.enter_context(_attending(inner, parts))
        yield is_own


def _attentions(model: Any) -> list[Any]:
    """TransformerLens's attention around that of transformers; none in a HookedTransformer."""
    needed = {"hook_pattern", "_original_component"}
    return [module for module in model.modules() if needed <= set(module._modules)]


def _watched(parts: list[Any]) -> bool:
    """Whether there is a hook inside of attention."""
    points = (point for part in parts for point in part.modules() if hasattr(point, "fwd_hooks"))
    return any(point.fwd_hooks or point.bwd_hooks for point in points)


def _proven(adapter: ModelAdapter, inner: Any, parts: list[Any]) -> bool:
    """Whether the residuals are the same at every site of a short run."""
    prompt = probe_tokens(adapter.d_vocab, adapter.n_ctx, adapter.special_ids)
    tokens = torch.stack([prompt, prompt.roll(1)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, -1] = False
    with without_hooks(adapter.model):
        expected = _residuals(adapter, tokens, mask)
        try:
            with _attending(inner, parts):
                found = _residuals(adapter, tokens, mask)
        except Exception:
            # Whatever it is, the model cannot be run in this way.
            return False
    half = adapter.dtype.itemsize < 4
    # NaN is not the same: whoever runs the model as it is says where it comes from.
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool((apart <= (_SAME_IN_HALF if half else _SAME)).all())


def _residuals(
    adapter: ModelAdapter, tokens: Int[Tensor, "prompt pos"], mask: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "site row d_model"]:
    sites: list[Tensor] = []
    adapter.run(tokens, mask, lambda _, residual: sites.append(residual[mask].double().cpu()))
    return torch.stack(sites)


@contextmanager
def _attending(inner: Any, parts: list[Any]) -> Iterator[None]:
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    configs = {id(config): config for config in map(_config, inner.modules()) if config is not None}
    with ExitStack() as stack:
        for config in configs.values():
            before = config._attn_implementation_internal
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            if before == "eager":
                config._attn_implementation_internal = "sdpa"
        for part in parts:
            # Past its __setattr__, which would hand the method on to the part inside.
            stack.callback(_put_back, part, part.__dict__.get("forward"))
            part.__dict__["forward"] = partial(GeneralizedComponent.forward, part)
        yield


def _config(module: Any) -> Any:
    """The configuration by which a module of transformers chooses its attention."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation_internal") else None


def _put_back(part: Any, forward: Any) -> None:
    if forward is None:
        del part.__dict__["forward"]
    else:
        part.__dict__["forward"] = forward
