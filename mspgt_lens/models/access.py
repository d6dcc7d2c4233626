"""The adapter of any TransformerLens model, and what a cache must hold for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mspgt_lens.models.adapter import ModelAdapter
from mspgt_lens.models.encoder import EncoderAdapter


def as_adapter(model: Any) -> ModelAdapter:
    """The adapter of a TransformerLens model; an adapter is returned as it is.

    Raises:
        TypeError: If the model is none of TransformerLens's, or lacks what is needed of it.
    """
    if isinstance(model, ModelAdapter):
        return model
    is_encoder = getattr(model, "mlm_head", None) is not None
    return EncoderAdapter(model) if is_encoder else ModelAdapter(model)


def cache_reader(
    adapter: ModelAdapter, cache: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Residuals of every site and patterns of every block from an ``ActivationCache``.

    Returns:
        ``(sites, patterns)``: ``L + 1`` tensors ``[prompt, pos, d_model]`` and ``L`` tensors
        ``[prompt, head, query, key]``.

    Raises:
        KeyError: If the cache lacks a needed hook; the message gives the ``names_filter`` to use.
    """
    needed = adapter.site_hooks + adapter.pattern_hooks
    absent = [name for name in needed if name not in cache]
    if absent:
        raise KeyError(
            f"cache lacks {len(absent)} of {len(needed)} hooks, the first being {absent[0]!r}; "
            "make it with model.run_with_cache(tokens, names_filter=mspgt_lens.needed_hooks(model))"
        )
    sites = [cache[name] for name in adapter.site_hooks]
    patterns = [cache[name] for name in adapter.pattern_hooks]
    # A cache made with remove_batch_dim=True holds one prompt.
    if sites[0].ndim == 2:
        sites, patterns = [site[None] for site in sites], [pattern[None] for pattern in patterns]
    return sites, patterns


def needed_hooks(model: Any) -> list[str]:
    """Hook names that :func:`~mspgt_lens.profile_cache` reads, for ``names_filter``."""
    adapter = as_adapter(model)
    return adapter.site_hooks + adapter.pattern_hooks
