"""How a model attends where nobody looks at attention patterns, or whole ones are too large."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.models.adapter import ModelAdapter, PartHook, SiteHook
from mspgt_lens.models.probes import probe_tokens, without_hooks

QueriesHook = Callable[[int, Float[Tensor, "prompt head query key"], int], None]
_Run = Callable[[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]], list[Tensor]]
# How far rows may differ, as a share of their length. In half precision every step rounds.
_SAME, _SAME_IN_HALF = 1e-4, 0.05
# Of one block's patterns that are there at a time: 64 MB in float32.
_ENTRIES = 2**24
# The name that transformers gives in each of its modules to attention by patterns.
_BY_PATTERNS = "eager_attention_forward"


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

    def as_loaded(tokens: Tensor, mask: Tensor) -> list[Tensor]:
        sites: list[Tensor] = []
        adapter.run(tokens, mask, lambda _, residual: sites.append(residual[mask].double()))
        return sites

    def alone(tokens: Tensor, mask: Tensor) -> list[Tensor]:
        with _attending(adapter, "sdpa"):
            return as_loaded(tokens, mask)

    inner = getattr(adapter.model, "original_model", None)
    is_own = getattr(inner, "_supports_sdpa", False) and _proven(adapter, as_loaded, alone)
    with ExitStack() as stack:
        if is_own:
            stack.enter_context(_attending(adapter, "sdpa"))
        yield is_own


def pattern_blocks(adapter: ModelAdapter) -> PatternBlocks | None:
    """Passes that bring attention patterns a few queries at a time; None where the model cannot.

    That residuals and patterns are the same is proven as in :func:`own_attention`.

    Args:
        adapter: The model, in :meth:`ModelAdapter.inference`.
    """

    def as_loaded(tokens: Tensor, mask: Tensor) -> list[Tensor]:
        found: list[Tensor] = []

        def on_pattern(block: int, pattern: Tensor) -> None:
            found.append(pattern.transpose(1, 2)[mask].double())

        adapter.run(
            tokens, mask, lambda _, residual: found.append(residual[mask].double()), on_pattern
        )
        return found

    def in_blocks(tokens: Tensor, mask: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        parts: list[Tensor] = []

        def on_queries(block: int, pattern: Tensor, first: int) -> None:
            unseen = tokens.shape[1] - pattern.shape[3]
            parts.append(torch.nn.functional.pad(pattern, (0, unseen)))
            if first + pattern.shape[2] == tokens.shape[1]:
                whole = torch.cat(parts, dim=2).transpose(1, 2)
                found.append(whole[mask].double())
                parts.clear()

        two_queries = PatternBlocks(adapter, 2 * adapter.n_heads * tokens.numel())
        two_queries.run(
            tokens, mask, lambda _, residual: found.append(residual[mask].double()), on_queries
        )
        return found

    return PatternBlocks(adapter) if _proven(adapter, as_loaded, in_blocks) else None


class PatternBlocks:
    """Passes of one model, its attention computed and shown a few queries at a time.

    Args:
        adapter: The model.
        n_entries: Of one block's patterns in memory at a time, about.
    """

    def __init__(self, adapter: ModelAdapter, n_entries: int = _ENTRIES) -> None:
        self.adapter, self.n_entries = adapter, n_entries

    def run(
        self,
        tokens: Int[Tensor, "prompt pos"],
        mask: Bool[Tensor, "prompt pos"],
        on_site: SiteHook,
        on_queries: QueriesHook,
        on_part: PartHook | None = None,
    ) -> None:
        """As :meth:`ModelAdapter.run`.

        Args:
            tokens: Token ids, padded on the right.
            mask: True where a token is not padding.
            on_site: Called with each site's number and residual stream, in order.
            on_queries: Called with each block's number, what some queries attend to, and the place
                of the first of them. Of a causal model, keys after the last of them are left out.
            on_part: Called with each block's number, the part, and what it adds.

        Raises:
            RuntimeError: If the pattern of a block is never formed.
        """
        seen: set[int] = set()

        def take(block: int, pattern: Tensor, first: int) -> None:
            seen.add(block)
            on_queries(block, pattern, first)

        with _attending(self.adapter, "eager"), self._shown(take):
            self.adapter.run(tokens, mask, on_site, None, on_part)
        if len(seen) < self.adapter.n_layers:
            raise RuntimeError(
                f"model: {self.adapter.name} formed {len(seen)} of {self.adapter.n_layers} "
                "attention patterns in blocks of queries; leave signals of attention out of "
                "signals="
            )

    @contextmanager
    def _shown(self, take: QueriesHook) -> Iterator[None]:
        """Attention of this model's modules in blocks; that of others is as it was."""
        inside = {
            module: block
            for block, layer in enumerate(self.adapter.model.blocks)
            for part in _attentions(layer)
            for module in part.original_component.modules()
        }
        is_causal = not self.adapter.reads_both_ways

        def in_blocks(
            whole: Callable[..., tuple[Tensor, Tensor]],
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            **settings: Any,
        ) -> tuple[Tensor, Tensor | None]:
            if module not in inside:
                return whole(module, query, key, value, attention_mask, **settings)
            n_queries, outs = query.shape[2], []
            step = max(1, self.n_entries // (query.shape[0] * query.shape[1] * key.shape[2]))
            for first in range(0, n_queries, step):
                at = slice(first, min(first + step, n_queries))
                reach = slice(at.stop if is_causal else key.shape[2])
                seen = None if attention_mask is None else attention_mask[:, :, at, reach]
                out, pattern = whole(
                    module, query[:, :, at], key[:, :, reach], value[:, :, reach], seen, **settings
                )
                take(inside[module], pattern, first)
                outs.append(out)
            return torch.cat(outs, dim=1), None

        spaces = [vars(sys.modules[name]) for name in {type(part).__module__ for part in inside}]
        with ExitStack() as stack:
            for space in spaces:
                if _BY_PATTERNS in space:
                    stack.callback(space.__setitem__, _BY_PATTERNS, space[_BY_PATTERNS])
                    space[_BY_PATTERNS] = partial(in_blocks, space[_BY_PATTERNS])
            yield


def _attentions(model: Any) -> list[Any]:
    """TransformerLens's attention around that of transformers; none in a HookedTransformer."""
    needed = {"hook_pattern", "_original_component"}
    return [module for module in model.modules() if needed <= set(module._modules)]


def _watched(parts: list[Any]) -> bool:
    """Whether there is a hook inside of attention."""
    points = (point for part in parts for point in part.modules() if hasattr(point, "fwd_hooks"))
    return any(point.fwd_hooks or point.bwd_hooks for point in points)


def _proven(adapter: ModelAdapter, as_loaded: _Run, otherwise: _Run) -> bool:
    """Whether two ways of running the model give the same rows on a short run with padding."""
    parts = _attentions(adapter.model)
    if not parts or _watched(parts):
        return False
    prompt = probe_tokens(adapter.d_vocab, adapter.n_ctx, adapter.special_ids)
    tokens = torch.stack([prompt, prompt.roll(1)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, -1] = False
    with without_hooks(adapter.model):
        try:
            expected, found = as_loaded(tokens, mask), otherwise(tokens, mask)
        except Exception:
            # Whatever it is, the model cannot be run in this way.
            return False
    share = _SAME_IN_HALF if adapter.dtype.itemsize < 4 else _SAME
    # NaN is not the same: whoever runs the model as it is says where it comes from.
    return len(found) == len(expected) and all(
        bool(((ours - theirs).norm(dim=-1) <= share * theirs.norm(dim=-1)).all())
        for ours, theirs in zip(found, expected, strict=True)
    )


@contextmanager
def _attending(adapter: ModelAdapter, way: Literal["sdpa", "eager"]) -> Iterator[None]:
    """Attention is computed by the modules of transformers, in one of their ways."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    modules = adapter.model.original_model.modules()
    configs = {id(config): config for config in map(_config, modules) if config is not None}
    with ExitStack() as stack:
        for config in configs.values():
            before = config._attn_implementation_internal
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            # What somebody chose beside the pattern's is a way without patterns too.
            if "eager" in (before, way):
                config._attn_implementation_internal = way
        for part in _attentions(adapter.model):
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
