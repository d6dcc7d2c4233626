"""What the package does with one architecture, against torch's own hooks on the plain copy.

Each check gives a word for the table: "exact", or "refused" where the package says that it cannot;
whatever else happens is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from kinds import N_HEADS, N_LAYERS, Kind, Plain, built
from tiny import random_tokens
from torch import Tensor, nn

import mspgt_lens as ml
from mspgt_lens.models import (
    Edit,
    ModelAdapter,
    PatchPlace,
    PatternBlocks,
    as_adapter,
    edited_logits,
    own_attention,
    pattern_blocks,
)
from mspgt_lens.models.editing import EditPlace

HEADER = (
    "Architecture",
    "What it stands for",
    "Sites",
    "Decoding",
    "Patching",
    "Patching resumes at",
    "Edits",
    "Refused, and why",
)
TOLERANCE = 1e-5
EDIT_PLACES, PATCH_PLACES = get_args(EditPlace), get_args(PatchPlace)
OURS = (ValueError, TypeError, RuntimeError)
_WORDS = ("model", "place", "edits")


def row(kind: Kind) -> tuple[str, ...]:
    """The architecture's line of the table; AssertionError if a number is wrong."""
    plain, bridge = built(kind)
    refused: dict[str, list[str]] = {}
    with _refusals(refused, "everything", bridge):
        adapter = as_adapter(bridge)
    if refused:
        return _line(kind, "-", "-", [], "-", [], refused)
    sites = decoding = "refused"
    with _refusals(refused, "sites", bridge):
        check_sites(plain, adapter)
        sites = "exact"
    with _refusals(refused, "decoding", bridge):
        check_decoding(plain, adapter)
        decoding = "exact"
    patched, resumes = [], "-"
    for place in PATCH_PLACES:
        with _refusals(refused, f"patching {place}", bridge):
            resumes = check_patching(plain, bridge, place)
            patched.append(place)
    edited = []
    for place in EDIT_PLACES:
        with _refusals(refused, f"editing {place}", bridge):
            check_edit(plain, adapter, place)
            edited.append(place)
    return _line(kind, sites, decoding, patched, resumes, edited, refused)


def check_sites(plain: Plain, adapter: ModelAdapter) -> None:
    """Residuals are those of the plain blocks, and patterns are attention's, padded or not."""
    for padding in (False, True):
        tokens, mask = random_tokens(3, 6), _mask(padding)
        expected, _ = _plain_sites(plain, tokens, mask)
        found: dict[int, Tensor] = {}
        patterns: dict[int, Tensor] = {}
        with adapter.inference():
            adapter.run(
                tokens,
                mask,
                lambda site, x, found=found: found.__setitem__(site, x.clone()),
                lambda block, x, patterns=patterns: patterns.__setitem__(block, x.clone()),
            )
        assert len(found) == len(expected) == N_LAYERS + 1
        for site, residual in enumerate(expected):
            _assert_equal(found[site][mask], residual[mask])
        for pattern in patterns.values():
            weight = pattern.sum(dim=-1).transpose(1, 2)[mask]
            # The rest goes to an attention sink, which is no position.
            assert bool((weight <= 1 + TOLERANCE).all())
            if not hasattr(plain.part(0, "attn_out"), "sinks"):
                _assert_equal(weight, torch.ones(1))


def check_decoding(plain: Plain, adapter: ModelAdapter) -> None:
    """Normalized and decoded, the last site of the plain copy gives its logits."""
    tokens, mask = random_tokens(3, 6), _mask(True)
    residuals, logits = _plain_sites(plain, tokens, mask)
    adapter.check_decoding(tokens[1])
    with adapter.inference():
        decoded = adapter.decode(adapter.normalize(residuals[-1][mask]))
    _assert_equal(decoded, logits[mask])


def check_own_attention(adapter: ModelAdapter) -> bool:
    """Without patterns, residuals and logits are the same; whether there are none."""
    tokens, padded = random_tokens(3, 24), torch.ones(3, 24, dtype=torch.bool)
    padded[1, -5:] = False
    for mask in (torch.ones_like(padded), padded):
        with adapter.inference():
            expected = _sites_and_logits(adapter, tokens, mask)
            with own_attention(adapter) as is_own:
                found = _sites_and_logits(adapter, tokens, mask)
        for ours, theirs in zip(found, expected, strict=True):
            _assert_equal(ours, theirs)
    return is_own


def check_pattern_blocks(adapter: ModelAdapter) -> bool:
    """In blocks of queries, residuals and patterns are the same; whether there are blocks."""
    tokens, mask = random_tokens(3, 24), torch.ones(3, 24, dtype=torch.bool)
    mask[1, -5:] = False
    whole: list[Tensor] = []
    found: list[Tensor] = []
    patterns: dict[int, Tensor] = {}

    def on_queries(block: int, pattern: Tensor, first: int) -> None:
        n_queries, n_keys = pattern.shape[2:]
        at = slice(first, first + n_queries)
        expected = patterns[block][:, :, at].transpose(1, 2)[mask[:, at]]
        assert not expected[..., n_keys:].any()
        if len(expected):
            _assert_equal(pattern.transpose(1, 2)[mask[:, at]], expected[..., :n_keys])

    with adapter.inference():
        if pattern_blocks(adapter) is None:
            return False
        adapter.run(
            tokens,
            mask,
            lambda _, x: whole.append(x[mask].clone()),
            lambda block, x: patterns.update({block: x.clone()}),
        )
        PatternBlocks(adapter, 5 * adapter.n_heads * tokens.numel()).run(
            tokens, mask, lambda _, x: found.append(x[mask].clone()), on_queries
        )
    for ours, theirs in zip(found, whole, strict=True):
        _assert_equal(ours, theirs)
    return True


def _sites_and_logits(adapter: ModelAdapter, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    adapter.run(tokens, mask, lambda _, x: found.append(x[mask].clone()))
    return [*found, edited_logits(adapter, tokens, mask)[mask]]


def check_patching(plain: Plain, bridge: Any, place: Any) -> str:
    """Every cell is that of a whole run of the plain copy under a hook; where runs resume."""
    resumed = set()
    for mask in _SIZES if place == "resid_pre" else _SIZES[1:]:
        clean, other = (random_tokens(*mask.shape, seed=seed) for seed in (0, 1))
        corrupted = clean.where(torch.arange(mask.shape[1]) < 1, other).where(mask, clean)
        answer, foil = random_tokens(len(clean), 2, seed=2).T
        pairs = ml.PromptPairs.from_tokens(clean, corrupted, answer, foil, mask=mask)
        sweep = ml.patch_layers(bridge, pairs, place=place, progress=False)
        expected = _plain_sweep(plain, pairs, place)
        assert np.ptp(expected) > 1e-3
        np.testing.assert_allclose(sweep.by_pair, expected, atol=2e-5)
        resumed.add("position" if sweep.settings["resumed_at_position"] else "block")
    return "/".join(sorted(resumed))


def check_edit(plain: Plain, adapter: ModelAdapter, place: Any) -> None:
    """In all blocks at once, a place changes the logits as it does in the plain copy."""
    tokens, mask = random_tokens(3, 6), _mask(False)
    change = None if place == "skip" else _CHANGES.get(place, torch.neg)
    with adapter.inference():
        found = edited_logits(
            adapter, tokens, mask, [Edit(block, place, change) for block in range(N_LAYERS)]
        )
    with _plainly_edited(plain, place):
        expected = plain.logits(tokens, mask)
    clean = plain.logits(tokens, mask)
    assert (expected - clean).norm() > 1e-3 * clean.norm()
    _assert_equal(found, expected)


def _halved_scores(scores: Tensor) -> Tensor:
    return torch.where(scores > torch.finfo(scores.dtype).min / 4, scores / 2, scores)


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "attn_scores": _halved_scores,
    "resid_pre": lambda x: x.roll(1, dims=-1) / 2,
    "resid_post": lambda x: x.roll(1, dims=-1) / 2,
}


@contextmanager
def _plainly_edited(plain: Plain, place: str) -> Iterator[None]:
    with ExitStack() as stack:
        for block, layer in enumerate(plain.blocks):
            if place == "attn_scores":
                stack.enter_context(_halved_before_softmax(plain.part(block, "attn_out")))
            elif place == "skip":
                kept: list[Tensor] = []
                stack.enter_context(_reading(layer, kept))
                stack.enter_context(_writing(layer, lambda _, kept=kept: kept.pop()))
            elif place == "resid_pre":
                stack.enter_context(_entering(layer, _CHANGES[place]))
            elif place == "resid_post":
                stack.enter_context(_writing(layer, _CHANGES[place]))
            else:
                stack.enter_context(_writing(plain.part(block, place), torch.neg))
        yield


@contextmanager
def _halved_before_softmax(attention: nn.Module) -> Iterator[None]:
    """Scores are halved in every softmax over four axes, which only attention takes."""
    if hasattr(attention, "sinks"):
        # Its softmax has the sink's score among the others.
        with mock.patch.object(attention, "scaling", attention.scaling / 2):
            yield
        return
    softmax = nn.functional.softmax

    def halved(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return softmax(_halved_scores(x) if x.ndim == 4 else x, *args, **options)

    forward = attention.forward

    def inside(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for where in (nn.functional, torch):
                stack.enter_context(mock.patch.object(where, "softmax", halved))
            return forward(*args, **kwargs)

    with mock.patch.object(attention, "forward", inside):
        yield


def _plain_sites(plain: Plain, tokens: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    sites: list[Tensor] = []
    with ExitStack() as stack:
        for layer in plain.blocks:
            stack.enter_context(_reading(layer, sites))
        stack.enter_context(_writing(plain.blocks[-1], lambda x: sites.append(x.clone()) or x))
        logits = plain.logits(tokens, mask)
    return sites, logits


def _plain_sweep(plain: Plain, pairs: ml.PromptPairs, place: str) -> np.ndarray:
    """The logit difference of each pair after each patch, a row of a whole forward pass each."""

    def module(block: int) -> nn.Module:
        return plain.blocks[block] if place == "resid_pre" else plain.part(block, place)

    hooked = _entering if place in ("resid_pre", "z") else _writing
    n_pairs, n_pos = pairs.clean.shape
    heads = range(N_HEADS) if place == "z" else [None]
    cells = [(pos, head) for pos in range(n_pos) for head in heads]
    last = pairs.last.repeat(len(cells))
    every = torch.arange(len(last))
    values = np.zeros((n_pairs, N_LAYERS, len(cells)))
    for block in range(N_LAYERS):
        source: list[Tensor] = []
        with hooked(module(block), lambda x, kept=source: kept.append(x.clone()) or x):
            plain.logits(pairs.clean, pairs.mask)

        def patch(x: Tensor, source: Any = source) -> Tensor:
            # Some modules see the tokens of all prompts in a row.
            changed = x.clone().reshape(len(cells), n_pairs, n_pos, -1)
            whole = source[0].reshape(changed.shape[1:])
            width = whole.shape[-1] // N_HEADS
            for cell, (pos, head) in enumerate(cells):
                part = slice(None) if head is None else slice(head * width, (head + 1) * width)
                changed[cell, :, pos, part] = whole[:, pos, part]
            return changed.reshape(x.shape)

        with hooked(module(block), patch):
            logits = plain.logits(
                pairs.corrupted.repeat(len(cells), 1), pairs.mask.repeat(len(cells), 1)
            )[every, last]
        answer, foil = (x.repeat(len(cells)) for x in (pairs.answer, pairs.foil))
        effect = logits[every, answer] - logits[every, foil]
        values[:, block] = effect.double().numpy().reshape(len(cells), n_pairs).T
    shape = (n_pairs, N_LAYERS, n_pos, N_HEADS)
    return values.reshape(shape if place == "z" else shape[:-1])


def _reading(module: nn.Module, kept: list[Tensor]) -> Any:
    return _entering(module, lambda x: kept.append(x.clone()) or x)


@contextmanager
def _entering(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module's input, changed."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _writing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module's output, changed; what it adds to, where it adds the residual itself, is not."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        whole, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        # Bloom's and MPT's parts are given the residual and return it with what they add.
        added_to = _residual_argument(module, args, kwargs)
        changed = change(whole) if added_to is None else added_to + change(whole - added_to)
        return changed if rest is None else (changed, *rest)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _residual_argument(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
    if type(module).__name__ not in ("BloomAttention", "BloomMLP", "MptMLP"):
        return None
    return args[1] if len(args) > 1 else kwargs["residual"]


def _mask(padded: bool) -> Tensor:
    """Three prompts of six tokens; padded, one on the left and one on the right."""
    mask = torch.ones(3, 6, dtype=torch.bool)
    if padded:
        mask[0, :2] = mask[1, -1:] = False
    return mask


# As many prompts as positions and heads; and padded at both ends.
_SIZES = (torch.ones(N_HEADS, N_HEADS, dtype=torch.bool), _mask(True))


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).norm() / expected.expand_as(found).norm())
    assert error < TOLERANCE, f"relative error {error:.2g}"


@contextmanager
def _refusals(refused: dict[str, list[str]], what: str, bridge: Any) -> Iterator[None]:
    """Note an error of the package's own; others, and wrong numbers, go on."""
    try:
        yield
    except OURS as error:
        said = str(error)
        if not said.startswith(_WORDS):
            raise
        reason = said.split(";")[0].split(": whatever")[0].removeprefix("model: ")
        reason = reason.replace(str(bridge.cfg.model_name), "it")
        refused.setdefault(reason, []).append(what)


def _line(
    kind: Kind,
    sites: str,
    decoding: str,
    patched: list[str],
    resumes: str,
    edited: list[str],
    refused: dict[str, list[str]],
) -> tuple[str, ...]:
    def named(done: list[str], possible: Sequence[str]) -> str:
        return "all" if len(done) == len(possible) else ", ".join(done) or "-"

    why = "; ".join(f"{_listed(what)}: {reason}" for reason, what in refused.items())
    return (
        kind.name,
        kind.traits,
        sites,
        decoding,
        named(patched, PATCH_PLACES),
        resumes,
        named(edited, EDIT_PLACES),
        why or "-",
    )


def _listed(what: Sequence[str]) -> str:
    """Names that begin alike are listed under their common word."""
    begun = "patching "
    if len(what) == len(PATCH_PLACES) and all(one.startswith(begun) for one in what):
        return "patching"
    return ", ".join(what)
