"""The adapter of any TransformerLens model, and what a cache must hold for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.models.adapter import ModelAdapter, Part
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
    adapter: ModelAdapter,
    cache: Mapping[str, Any],
    *,
    patterns: bool = True,
    updates: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[dict[Part, Tensor]]]:
    """Residuals of every site, and patterns and updates of every block, from a cache.

    Arrays become tensors; a cache made with ``remove_batch_dim=True`` holds one prompt.

    Returns:
        ``(sites, patterns, updates)``: ``L + 1`` tensors ``[prompt, pos, d_model]``; ``L`` tensors
        ``[prompt, head, query, key]``, none where ``patterns`` is False; what the parts of the
        ``L`` blocks add, each ``[prompt, pos, d_model]``, none where ``updates`` is False.

    Raises:
        KeyError: If the cache lacks a needed hook; the message gives the ``names_filter`` to use.
        TypeError: If an entry holds no real numbers.
        ValueError: If an entry's shape is not that of whole prompts, all positions and all heads.
    """
    pattern_hooks = adapter.pattern_hooks if patterns else []
    part_hooks = adapter.part_hooks if updates else []
    needed = adapter.site_hooks + pattern_hooks + [name for *_, name in part_hooks]
    absent = [name for name in needed if name not in cache]
    if absent:
        raise KeyError(
            f"cache lacks {len(absent)} of {len(needed)} hooks, the first being {absent[0]!r}; "
            "make it with model.run_with_cache(tokens, names_filter=mspgt_lens.needed_hooks(model"
            f"{', updates=True' * updates}))"
        )
    entries = {name: _entry(name, cache[name]) for name in needed}
    first = entries[needed[0]]
    if first.ndim == 2:
        entries = {name: entry[None] for name, entry in entries.items()}
        first = first[None]
    n_prompts, n_pos = first.shape[:2] if first.ndim == 3 else ("prompt", "pos")
    site_shape = (n_prompts, n_pos, adapter.d_model)
    pattern_shape = (n_prompts, adapter.n_heads, n_pos, n_pos)
    for name, entry in entries.items():
        shape = pattern_shape if name in pattern_hooks else site_shape
        if tuple(entry.shape) != shape:
            raise ValueError(
                f"cache[{name!r}] must have shape {shape}, with all prompts, heads and positions "
                f"of {needed[0]!r}, got {tuple(entry.shape)}; make the cache by "
                "model.run_with_cache(tokens, "
                "names_filter=mspgt_lens.needed_hooks(model)) without pos_slice"
            )
    parts: list[dict[Part, Tensor]] = [{} for _ in range(adapter.n_layers if updates else 0)]
    for block, part, name in part_hooks:
        parts[block][part] = entries[name]
    return (
        [entries[name] for name in adapter.site_hooks],
        [entries[name] for name in pattern_hooks],
        parts,
    )


def _entry(name: str, value: Any) -> Tensor:
    entry = torch.as_tensor(value)
    if not entry.is_floating_point():
        raise TypeError(f"cache[{name!r}] must hold floating-point numbers, got {entry.dtype}")
    return entry


@in_own_state
def needed_hooks(model: Any, *, patterns: bool = True, updates: bool = False) -> list[str]:
    """Hook names that :func:`~mspgt_lens.profile_cache` reads, for ``names_filter``.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        patterns: Also those of attention patterns, which signals of attention are computed from.
        updates: Also those of what attention and MLP add, which signals of updates
            (``attention_ratio`` and its like) are computed from.

    Returns:
        Names of the residual stream at the L + 1 sites, then of the attention patterns of the L
        blocks, then of what their parts add.

    Raises:
        TypeError: If the model is none of TransformerLens's, or lacks a hook.
        CannotMeasure: If updates are asked for and the model has no hooks for them.

    Example:
        >>> hooks = ml.needed_hooks(model)
        >>> hooks[0], hooks[-1]
        ('blocks.0.hook_resid_pre', 'blocks.7.attn.hook_pattern')
    """
    adapter = as_adapter(model)
    parts = [name for *_, name in adapter.part_hooks] if updates else []
    return adapter.site_hooks + (adapter.pattern_hooks if patterns else []) + parts
