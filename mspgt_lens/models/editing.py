"""Changing a model's activations while it runs, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.adapter import ModelAdapter, Place
from mspgt_lens.models.probes import changes, probe_tokens, without_hooks

EditPlace = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "attn_scores", "skip"]
Change = Callable[[Tensor], Tensor]
# Where a block's input is taken, and where it is put in place of its output.
_ENDS: tuple[Place, Place] = ("resid_pre", "resid_post")
_BLOCKS_PER_PROBE = 32
# What was proven of each model: the way of running it, its weights' processing, place and block.
_PROVEN: WeakKeyDictionary[Any, set[tuple[str, str, str, int]]] = WeakKeyDictionary()


class CannotEdit(CannotMeasure, RuntimeError):  # noqa: N818 - as what it is one of
    """The model does not compute an activation under its hook, or not for its logits."""


@dataclass(frozen=True)
class Edit:
    """One change of one activation.

    Attributes:
        block: The block, 0 ... L - 1.
        place: ``"resid_pre"`` and ``"resid_post"`` (the residual stream before and after the
            block), ``"attn_out"``, ``"mlp_out"`` (what its parts add), all ``[prompt, pos,
            d_model]``; ``"attn_scores"`` (masked, before the softmax; ``[prompt, head, query,
            key]``); or ``"skip"``: the block's output is its input.
        change: From the activation to its replacement, of the same shape; it must not write into
            its argument. While text is generated with a cache, it sees the newly processed
            positions only (as queries, among scores). None for ``"skip"``.
    """

    block: int
    place: EditPlace
    change: Change | None = None

    def __post_init__(self) -> None:
        if self.place not in get_args(EditPlace):
            raise ValueError(
                f"Edit: place must be one of {', '.join(get_args(EditPlace))}, got {self.place!r}"
            )
        if (self.change is None) != (self.place == "skip"):
            needed = "takes no" if self.place == "skip" else "needs a"
            raise ValueError(f"Edit: place {self.place!r} {needed} change")


@contextmanager
def edited(adapter: ModelAdapter, edits: Sequence[Edit]) -> Iterator[list[int]]:
    """Install edits for the time of a ``with`` block; they are removed however it ends.

    Edits of one activation act in the order given. Hooks that were on the model stay, and act
    before the edits. Before a place of a block is edited for the first time, a short run proves
    that changing it moves the logits.

    Args:
        adapter: The model.
        edits: What to change.

    Yields:
        How often each edit has acted so far: an activation that the model never computes under its
        name is not changed, which must not pass for an effect of zero (see
        :func:`require_acted`).

    Raises:
        ValueError: If a block or a hook does not exist.
        CannotEdit: If the model does not take what is put at such a place.
    """
    check_edits(adapter, edits)

    def run(tokens: Tensor, probes: Sequence[Edit]) -> tuple[Tensor, list[int]]:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        with installed(adapter, probes) as counts:
            logits = adapter.model(tokens, **adapter._run_arguments(mask), return_type="logits")
        return logits, counts

    require_effect(adapter, edits, run, "forward")
    with installed(adapter, edits) as counts:
        yield counts


def check_edits(adapter: ModelAdapter, edits: Sequence[Edit]) -> None:
    """Raise ``ValueError`` if a block or a hook that is to be edited does not exist."""
    for index, edit in enumerate(edits):
        if not 0 <= edit.block < adapter.n_layers:
            raise ValueError(
                f"edits[{index}]: block must be 0 to {adapter.n_layers - 1} in {adapter.name}, "
                f"got {edit.block}"
            )
        for name, _ in _changes(adapter, edit, index, []):
            if name not in adapter.model.hook_dict:
                raise CannotMeasure(
                    f"edits[{index}]: {adapter.name} has no hook {name}, so its "
                    f"{edit.place!r} cannot be changed"
                )


@contextmanager
def installed(adapter: ModelAdapter, edits: Sequence[Edit]) -> Iterator[list[int]]:
    """As :func:`edited`, for edits that were checked and whose places were proven."""
    counts = [0] * len(edits)
    with ExitStack() as stack:
        for index, edit in enumerate(edits):
            for name, change in _changes(adapter, edit, index, counts):
                install_hook(stack, adapter.model.hook_dict[name], change)
        yield counts


ProbeRun = Callable[[Tensor, Sequence[Edit]], tuple[Tensor, list[int]]]


def require_effect(adapter: ModelAdapter, edits: Sequence[Edit], run: ProbeRun, way: str) -> None:
    """Prove that changing these places moves the logits, once per model, place and block.

    For some architectures TransformerLens computes an activation for its hook only, and throws away
    what is put there. One run changes one block per row strongly, beside two rows as they are.

    Args:
        adapter: The model.
        edits: Their places and blocks are proven, not what they do there.
        run: From tokens ``[row, pos]`` and edits to logits, and how often each edit acted.
        way: What tells this way of running the model from others.

    Raises:
        CannotEdit: If the logits of a row stay as they are.
    """
    proven = _PROVEN.setdefault(adapter.model, set())
    state = way, adapter.weight_processing
    # Skipping a block is put into effect at its end.
    needed: set[tuple[EditPlace, int]] = {
        ("resid_post" if edit.place == "skip" else edit.place, edit.block) for edit in edits
    }
    places: dict[EditPlace, list[int]] = {}
    for place, block in sorted(needed):
        if (*state, place, block) not in proven:
            places.setdefault(place, []).append(block)
    for place, blocks in places.items():
        for start in range(0, len(blocks), _BLOCKS_PER_PROBE):
            probed = blocks[start : start + _BLOCKS_PER_PROBE]
            _prove(adapter, place, probed, run)
            proven.update((*state, place, block) for block in probed)


def _prove(adapter: ModelAdapter, place: EditPlace, blocks: Sequence[int], run: ProbeRun) -> None:
    prompt = probe_tokens(adapter.d_vocab, adapter.n_ctx, adapter.special_ids)
    tokens = prompt.to(adapter.device).expand(len(blocks) + 2, -1)
    probes = [
        Edit(block, place, _disturbing(row, len(tokens), place, f"{adapter.name}, block {block}"))
        for row, block in enumerate(blocks)
    ]
    with adapter.inference(), without_hooks(adapter.model):
        logits, counts = run(tokens, probes)
    require_acted(adapter, probes, counts)
    moved, rounding = changes(logits)
    # What is NaN has moved; whoever reads the logits says so.
    idle = [block for block, by in zip(blocks, moved.tolist(), strict=True) if by <= rounding]
    if idle:
        raise CannotEdit(
            f"model: {adapter.name} computes {place!r} of block {idle[0]} for its hook only: "
            "whatever is put there, the logits stay the same, so it cannot be changed; choose "
            "another place (another kind of perturbation)"
        )


def _disturbing(row: int, n_rows: int, place: EditPlace, whose: str) -> Change:
    """A strong change of one row, by which hardly anything could stay the same."""

    def scores(x: Tensor) -> Tensor:
        # What was attended most is now attended least, and where all were alike, every other key.
        odd = torch.arange(x.shape[-1], device=x.device) % 2
        return torch.where(x > torch.finfo(x.dtype).min / 2, 4 * odd - x, x)

    def vectors(x: Tensor) -> Tensor:
        sign = 1 - 2 * (torch.arange(x.shape[-1], device=x.device) % 2)
        return x.roll(1, dims=-1) + (1 + x.abs().mean()) * sign

    def change(activation: Tensor) -> Tensor:
        if len(activation) != n_rows:
            raise CannotEdit(
                f"model: {place!r} of {whose}, has shape {tuple(activation.shape)} for {n_rows} "
                "prompts, not one row for each, so it cannot be changed; choose another place"
            )
        changed = activation.clone()
        disturb = scores if place == "attn_scores" else vectors
        changed[row] = disturb(activation[row]).to(activation.dtype)
        return changed

    return change


def edited_logits(
    adapter: ModelAdapter,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    edits: Sequence[Edit] = (),
) -> Float[Tensor, "prompt pos vocab"]:
    """The model's logits under edits, in float32 or wider.

    Args:
        adapter: The model, in :meth:`ModelAdapter.inference`.
        tokens: Token ids, padded on the right.
        mask: True where a token is not padding.
        edits: What to change; nothing by default.

    Raises:
        CannotEdit: If an edit never acted, or cannot.
    """
    with edited(adapter, edits) as counts:
        logits: Tensor = adapter.model(
            tokens.to(adapter.device), **adapter._run_arguments(mask), return_type="logits"
        )
    require_acted(adapter, edits, counts)
    return logits if logits.dtype == torch.float64 else logits.float()


def require_acted(adapter: ModelAdapter, edits: Sequence[Edit], counts: Sequence[int]) -> None:
    """Raise :class:`CannotEdit` if an edit never acted; ``counts`` come from :func:`edited`."""
    idle = [edit for edit, count in zip(edits, counts, strict=True) if not count]
    if idle:
        raise CannotEdit(
            f"model: {adapter.name} never computes {idle[0].place!r} of block {idle[0].block} "
            "under its hook, so it cannot be changed; load the model with "
            "attn_implementation='eager', or choose another place"
        )


def _changes(
    adapter: ModelAdapter, edit: Edit, index: int, counts: list[int]
) -> list[tuple[str, Callable[..., Any]]]:
    """Hook names with what to do there."""
    computed: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        computed[:] = [activation]

    def put_back(activation: Tensor, hook: Any) -> Tensor:
        counts[index] += 1
        return computed.pop().to(activation.device)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        counts[index] += 1
        assert edit.change is not None
        changed = edit.change(activation)
        if changed.shape != activation.shape:
            raise ValueError(
                f"edits[{index}]: change must keep the shape {tuple(activation.shape)}, got "
                f"{tuple(changed.shape)}"
            )
        return changed.to(activation.dtype)

    if edit.place == "skip":
        start, end = (adapter.hook(place, edit.block) for place in _ENDS)
        return [(start, keep), (end, put_back)]
    return [(adapter.hook(edit.place, edit.block), replace)]


def install_hook(stack: ExitStack, point: Any, change: Callable[..., Any]) -> None:
    """Add one hook, to be removed with the stack."""
    # Not through model.hooks(): in compatibility mode that calls a hook once per alias.
    point.add_hook(change)
    handle = point.fwd_hooks[-1]

    def take_away() -> None:
        handle.hook.remove()
        if handle in point.fwd_hooks:
            point.fwd_hooks.remove(handle)

    stack.callback(take_away)
