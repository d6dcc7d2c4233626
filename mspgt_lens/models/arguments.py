"""What blocks are called with besides the residual, and how to call them for other positions.

Masks, positions, rotary embeddings and ALiBi's biases go with prompts and positions, but in every
architecture along other axes, and sizes alone do not tell which: there may be as many prompts as
positions or heads. So the model runs on two more batches, with other numbers of both, and each
axis is known by how it grows. What grows in no known way is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.adapter import ModelAdapter
from mspgt_lens.models.probes import without_hooks

# How the model classes call the keys and values that a block is given of earlier positions.
_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "past_kv_cache_entry")
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class BlockCall:
    """What a block was called with, once.

    Attributes:
        residual: Its input.
        args: Positional arguments after it.
        kwargs: Keyword arguments.
    """

    residual: Float[Tensor, "prompt pos d_model"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """What a block is to be called for.

    Attributes:
        prompts: The recorded prompt of each row.
        start: First position.
        stop: One past the last position.
        prefix: Keys and values of the positions before; None to keep none.
    """

    prompts: Int[Tensor, " row"]
    start: int
    stop: int
    prefix: Any = None


Take = Callable[[Rows], Any]


@dataclass(frozen=True)
class BlockArguments:
    """How to call one block for any rows: from rows to its arguments besides the residual."""

    args: list[Take] = field(default_factory=list)
    kwargs: dict[str, Take] = field(default_factory=dict)

    def take(self, rows: Rows) -> tuple[list[Any], dict[str, Any]]:
        """The arguments for these rows."""
        return (
            [take(rows) for take in self.args],
            {name: take(rows) for name, take in self.kwargs.items()},
        )


def record_calls(
    adapter: ModelAdapter,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
) -> tuple[list[BlockCall], Float[Tensor, "prompt pos d_model"]]:
    """Every block's call in one run, and the residual after the last block.

    Raises:
        CannotMeasure: If the model does not run every block once and in order, or blocks hand more
            than the residual on.
    """
    calls: list[BlockCall] = []
    seen: list[int] = []
    final: list[Tensor] = []
    held: list[tuple[str, Mapping[Any, Any], int]] = []

    def before(block: int) -> Callable[..., None]:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(block)
            kwargs = dict(kwargs)
            named = [(name, v) for name, v in kwargs.items() if isinstance(v, Mapping)]
            held.extend((name, value, len(value)) for name, value in named)
            residual, *rest = args if args else (kwargs.pop("hidden_states"),)
            calls.append(BlockCall(residual.detach(), tuple(rest), kwargs))

        return keep

    def last(site: int, residual: Tensor) -> None:
        if site == adapter.n_layers:
            final.append(residual.detach())

    with ExitStack() as stack:
        for block, module in enumerate(adapter.model.blocks):
            handle = module.register_forward_pre_hook(before(block), with_kwargs=True)
            stack.callback(handle.remove)
        # Some blocks are given a place for a prefix's keys and values only where a cache is kept.
        adapter.run(tokens, mask, last, cached=True)
    if seen != list(range(adapter.n_layers)):
        raise CannotMeasure(
            f"model: {adapter.name} must run each of its {adapter.n_layers} blocks once and in "
            f"order, but ran {seen[:8]}"
        )
    for name, value, count in held:
        if len(value) != count:
            raise CannotMeasure(
                f"model: blocks of {adapter.name} hand {name} on to later blocks beside the "
                "residual, so a run cannot be resumed between them; patch it by whole forward "
                "passes, as transformer_lens.patching does"
            )
    return calls, final[0]


def learn_arguments(
    adapter: ModelAdapter,
    calls: Sequence[BlockCall],
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
) -> list[BlockArguments]:
    """How to call every block for other rows than it was recorded with.

    Args:
        adapter: The model.
        calls: Of the run on ``tokens`` and ``mask``.
        tokens: The recorded prompts.
        mask: True where a token is not padding.

    Raises:
        CannotMeasure: If an argument changes with the prompts in a way that is not understood.
    """
    n_prompts, n_pos = tokens.shape
    longer = n_pos + 1 if n_pos < adapter.n_ctx else n_pos - 1
    # No axis of whole rows per prompt can grow from one to the other as positions do.
    sizes = [(n_prompts, n_pos), (2, n_pos), (5, longer)]
    # Hooks of users may know no other prompts than theirs.
    with without_hooks(adapter.model):
        runs = [calls, *(_probe(adapter, tokens, mask, *size) for size in sizes[1:])]
    return [
        _Block(adapter.name, block, sizes).learn(like)
        for block, like in enumerate(zip(*runs, strict=True))
    ]


def _probe(
    adapter: ModelAdapter, tokens: Tensor, mask: Tensor, n_prompts: int, n_pos: int
) -> list[BlockCall]:
    """A run of that size, padded at the ends where the recorded prompts are."""
    first = torch.cat([tokens[0], tokens[0, -1:]])[:n_pos]
    real = torch.ones(n_prompts, n_pos, dtype=torch.bool, device=mask.device)
    real[0, 0] = mask[:, 0].all()
    real[0, -1] = mask[:, -1].all()
    return record_calls(adapter, first.expand(n_prompts, -1), real)[0]


class _Block:
    """The arguments of one block in three runs, the recorded one first."""

    def __init__(self, model: str, block: int, sizes: Sequence[tuple[int, int]]) -> None:
        self.model, self.block, self.sizes = model, block, sizes

    def learn(self, calls: Sequence[BlockCall]) -> BlockArguments:
        recorded = calls[0]
        if len({(len(call.args), *sorted(call.kwargs)) for call in calls}) > 1:
            raise self._not_understood("arguments", "other ones from run to run")
        return BlockArguments(
            [
                self._taker(f"argument {number}", [call.args[number] for call in calls])
                for number in range(len(recorded.args))
            ],
            {
                name: self._taker(name, [call.kwargs[name] for call in calls])
                for name in recorded.kwargs
            },
        )

    def _taker(self, name: str, values: Sequence[Any]) -> Take:
        recorded = values[0]
        if name in _CACHE_NAMES or hasattr(recorded, "get_seq_length"):
            # A recorded cache would be appended to.
            return lambda rows: rows.prefix
        if name == "use_cache":
            return lambda rows: rows.prefix is not None
        if len({type(value) for value in values}) > 1:
            raise self._not_understood(name, " or ".join(type(v).__name__ for v in values))
        if isinstance(recorded, Tensor):
            return self._tensor_taker(name, values)
        if isinstance(recorded, (tuple, list)) and len({len(value) for value in values}) == 1:
            items = [self._taker(name, like) for like in zip(*values, strict=True)]
            whole = list if isinstance(recorded, list) else tuple
            return lambda rows: whole(take(rows) for take in items)
        if isinstance(recorded, Mapping) and not any(len(value) for value in values):
            return lambda rows: recorded
        if isinstance(recorded, dict) and len({tuple(value) for value in values}) == 1:
            named = {
                key: self._taker(f"{name}[{key!r}]", [value[key] for value in values])
                for key in recorded
            }
            return lambda rows: {key: take(rows) for key, take in named.items()}
        same = (
            (lambda value: value == recorded)
            if isinstance(recorded, _PLAIN)
            else (lambda value: value is recorded)
        )
        if not all(same(value) for value in values):
            raise self._not_understood(name, " or ".join(repr(value)[:40] for value in values))
        return lambda rows: recorded

    def _tensor_taker(self, name: str, values: Sequence[Tensor]) -> Take:
        recorded = values[0]
        shapes = [tuple(value.shape) for value in values]
        if len({len(shape) for shape in shapes}) > 1:
            raise self._not_understood(name, self._shapes(shapes))
        batches: list[tuple[int, int]] = []
        places: list[int] = []
        for axis, lengths in enumerate(zip(*shapes, strict=True)):
            per_prompt = lengths[0] // self.sizes[0][0]
            if len(set(lengths)) == 1:
                continue
            if all(s == per_prompt * n for s, (n, _) in zip(lengths, self.sizes, strict=True)):
                batches.append((axis, per_prompt))
            elif all(s == n_pos for s, (_, n_pos) in zip(lengths, self.sizes, strict=True)):
                places.append(axis)
            else:
                raise self._not_understood(name, self._shapes(shapes))
        # Of queries and keys, the keys come last; alone, they are those that attention hides or
        # penalizes. Whether that is right is proved before a run resumes at a later position.
        of_keys = len(places) > 1 or "mask" in name or "alibi" in name

        def take(rows: Rows) -> Tensor:
            value = recorded
            for axis, per_prompt in batches:
                within = torch.arange(per_prompt, device=rows.prompts.device)
                chosen = (rows.prompts[:, None] * per_prompt + within).flatten()
                value = value.index_select(axis, chosen.to(value.device))
            for axis in places:
                keys = of_keys and axis == places[-1]
                start = 0 if keys else rows.start
                value = value.narrow(axis, start, rows.stop - start)
            return value

        return take

    def _shapes(self, shapes: Sequence[tuple[int, ...]]) -> str:
        return ", ".join(
            f"{list(shape)} for {n_prompts} prompts of {n_pos} tokens"
            for shape, (n_prompts, n_pos) in zip(shapes, self.sizes, strict=True)
        )

    def _not_understood(self, name: str, why: str) -> CannotMeasure:
        return CannotMeasure(
            f"model: block {self.block} of {self.model} is called with {name} that does not follow "
            f"prompts and positions in a known way ({why}), so a run cannot be resumed there; "
            "patch it by whole forward passes, as transformer_lens.patching does"
        )
