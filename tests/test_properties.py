"""What holds for any input: sums over any shards, windows of any text, masks, targets, folds."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import SMALL, TOKENS, gather
from tiny import SPECIAL, as_text, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.folds import balanced_folds, stable_hash
from mspgt_lens.gathering import add_batch, make_batches, plan_batches
from mspgt_lens.models import as_adapter
from mspgt_lens.moments import Moments
from mspgt_lens.padding import real_spans
from mspgt_lens.prompts import Prompt, stack_rows
from mspgt_lens.targets import batch_targets

pytestmark = pytest.mark.simulation

# The same examples in every run, however long they take on a busy machine.
checked = settings(derandomize=True, deadline=None, max_examples=25)
often = settings(checked, max_examples=100)

PROMPTS = [(Prompt(row.numpy(), int(row[0])), int(row[-1]) % 3) for row in TOKENS]
ORDINARY = st.integers(len(SPECIAL), 100)
ROWS = st.lists(st.lists(ORDINARY, min_size=1, max_size=12), min_size=1, max_size=8)


@cache
def told() -> Any:
    model = tiny_model("llama", **SMALL)
    model.tokenizer = tiny_tokenizer()
    return model


@cache
def first() -> Moments:
    return gather(told(), TOKENS[:4])


def gathered(prompts: list[tuple[Prompt, int]], batch_size: int | None = None) -> Moments:
    """Moments by the plan and about the reference of the first prompts."""
    adapter = as_adapter(told())
    moments = Moments(first().plan, adapter)
    moments.reference = first().reference
    with adapter.inference():
        for batch in make_batches(prompts, batch_size, 100):
            add_batch(moments, adapter, batch)
    return moments


@cache
def whole() -> Moments:
    return gathered(PROMPTS)


def assert_same_moments(found: Moments, expected: Moments) -> None:
    """Counts and the sample to the bit; sums but for the order in which they were added."""
    for name, value in expected.sums().items():
        own, other = np.asarray(found.sums()[name]), np.asarray(value)
        if own.dtype.kind in "iu":
            np.testing.assert_array_equal(own, other, err_msg=name)
        else:
            atol = 2e-5 * np.abs(other).max()
            np.testing.assert_allclose(own, other, rtol=0, atol=atol, err_msg=name)
    assert (found.n_prompts, found.fingerprint) == (expected.n_prompts, expected.fingerprint)
    for name in ("priority", "group", "fold", "next_token", "single", "read"):
        np.testing.assert_array_equal(
            getattr(found.sample, name), getattr(expected.sample, name), err_msg=name
        )


@given(order=st.permutations(range(len(PROMPTS))), cuts=st.sets(st.integers(1, 23), max_size=4))
@checked
def test_shards_of_any_prompts_add_up_in_any_order(order: list[int], cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(order)]
    shards = [gathered([PROMPTS[i] for i in order[a:b]]) for a, b in itertools.pairwise(edges)]
    merged = shards.pop(order[0] % len(shards))
    for shard in shards:
        merged.merge_(shard)
    assert_same_moments(merged, whole())


@given(batch_size=st.one_of(st.none(), st.integers(1, 30)), order=st.permutations(PROMPTS))
@checked
def test_batches_of_any_size_give_the_same_sums(
    batch_size: int | None, order: list[tuple[Prompt, int]]
) -> None:
    assert_same_moments(gathered(order, batch_size), whole())


@given(
    shift=st.floats(-30, 30),
    site=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
@checked
def test_covariances_do_not_depend_on_the_center(shift: float, site: int, seed: int) -> None:
    """Sums are about a rough mean; another one changes the sums, and no covariance."""
    center = first().reference.center.clone()
    direction = torch.from_numpy(np.random.default_rng(seed).standard_normal(center.shape[1]))
    center[site] += shift * direction.to(center)
    moved = Moments(first().plan, as_adapter(told()))
    moved.reference = replace(first().reference, center=center)
    with as_adapter(told()).inference():
        for batch in make_batches(PROMPTS[:8], None, 100):
            add_batch(moved, as_adapter(told()), batch)
    here = gathered(PROMPTS[:8])
    # What float32 leaves of a square of this size.
    atol = 1e-6 * (1 + float(center[site].abs().max()) ** 2)
    for sums in ("read", "rest"):
        for own, other in zip(covariances(here, sums), covariances(moved, sums), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=atol)


def covariances(moments: Moments, of: str) -> list[torch.Tensor]:
    """Of every fold that holds any, shape ``[site, width, width]``."""
    zz, z = getattr(moments, f"zz_{of}"), getattr(moments, f"z_{of}")
    counts = getattr(moments, f"n_{of}")
    return [
        zz[k] / n - torch.einsum("sa,sb->sab", z[k] / n, z[k] / n)
        for k, n in enumerate(counts.tolist())
        if n
    ]


@given(
    scales=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    shifts=st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@checked
def test_units_and_origins_change_no_correlation(
    scales: list[float], shifts: list[float], seed: int
) -> None:
    """Shifts in units of the spread; three columns of z, two of y."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((120, 3))
    y = z[:, :2] + rng.standard_normal((120, 2))
    factor, origin = np.array(scales), np.array(scales) * np.array(shifts)
    groups = np.arange(120) // 6
    plain = ml.arrays.bottleneck_frontier(z, y, groups=groups)
    moved = ml.arrays.bottleneck_frontier(
        z * factor[:3] + origin[:3], y * factor[3:] + origin[3:], groups=groups
    )
    np.testing.assert_allclose(moved.correlations, plain.correlations, atol=1e-6)


@given(
    numbers=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    max_length=st.integers(2, 128),
)
@often
def test_windows_cover_every_text_once_in_order(numbers: list[int], max_length: int) -> None:
    rows = [[4 + (7 * i + j) % 97 for j in range(n)] for i, n in enumerate(numbers)]
    texts = [as_text(torch.tensor(row)) for row in rows]
    found: dict[Any, list[int]] = {}
    for prompt in ml.PromptDataset.from_texts(told(), texts, max_length=max_length):
        assert prompt.tokens[0] == 1
        assert 2 <= len(prompt.tokens) <= max_length
        found.setdefault(prompt.group, []).extend(prompt.tokens[1:].tolist())
    assert found == dict(enumerate(rows))


@given(rows=ROWS)
@often
def test_masks_tell_rows_from_padding(rows: list[list[int]]) -> None:
    tokens, mask = stack_rows([np.array(row) for row in rows])
    assert [tokens[i][mask[i]].tolist() for i in range(len(rows))] == rows
    # All that is not padding comes first.
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()
    for flipped in (False, True):
        given_tokens, given_mask = (x.flip(1) if flipped else x for x in (tokens, mask))
        dataset = ml.PromptDataset.from_tokens(given_tokens, given_mask)
        expected = [row[::-1] if flipped else row for row in rows]
        assert [prompt.tokens.tolist() for prompt in dataset] == expected


@given(rows=ROWS, on_the_left=st.booleans())
@often
def test_padding_by_the_tokenizer_comes_off(rows: list[list[int]], on_the_left: bool) -> None:
    """Without runs at the ends of rows, which are refused: they may be another padding."""
    rows = [[4 + i, 5 + i, *row, 5 + i, 4 + i] for i, row in enumerate(rows)]
    longest = max(map(len, rows))
    blank = [[0] * (longest - len(row)) for row in rows]
    padded = [b + r if on_the_left else r + b for r, b in zip(rows, blank, strict=True)]
    spans = real_spans(as_adapter(told()), [np.array(row) for row in padded])
    assert [row[span] for row, span in zip(padded, spans, strict=True)] == rows


@given(
    rows=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=14), min_size=1, max_size=4),
    bands=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=3),
    skip_first=st.integers(0, 5),
)
@often
def test_targets_are_means_over_the_tokens_that_are_there(
    rows: list[list[int]], bands: list[tuple[int, int]], skip_first: int
) -> None:
    """Position by position, token by token; ids below 3 are special."""
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((21, 2))).float()
    named = {str(i): (a, a + more) for i, (a, more) in enumerate(bands)}
    tokens, mask = stack_rows([np.array(row) for row in rows])
    found = batch_targets(
        tokens,
        mask,
        features=features,
        special=torch.arange(3),
        bands=named,
        skip_first=skip_first,
    )
    expected = []
    for i, row in enumerate(rows):
        for t in range(tokens.shape[1]):
            valid = skip_first <= t < len(row) and row[t] >= 3
            assert bool(found.valid[i, t]) == valid
            if not valid:
                assert not found.read[i, t]
                continue
            columns = []
            for past in (True, False):
                for a, b in named.values():
                    places = [t - k + 1 if past else t + k for k in range(a, b + 1)]
                    there = [p for p in places if 0 <= p < len(row) and row[p] >= 3]
                    if 2 * len(there) >= b - a + 1:
                        columns.append(features[[row[p] for p in there]].mean(dim=0))
            assert bool(found.read[i, t]) == (len(columns) == 2 * len(named))
            if found.read[i, t]:
                expected.append(torch.cat(columns))
    if expected:
        torch.testing.assert_close(found.values, torch.stack(expected), rtol=0, atol=1e-6)
    assert len(found.values) == len(expected)


@given(
    sizes=st.dictionaries(
        st.one_of(st.text(max_size=5), st.integers()), st.integers(0, 1000), min_size=1, max_size=40
    ),
    n_folds=st.integers(2, 8),
    seed=st.integers(0, 2**32 - 1),
)
@often
def test_every_group_is_in_one_of_folds_that_weigh_alike(
    sizes: dict[Any, int], n_folds: int, seed: int
) -> None:
    folds = balanced_folds(sizes, n_folds, seed)
    assert sorted(map(repr, folds)) == sorted(map(repr, sizes))
    assert set(folds.values()) <= set(range(n_folds))
    held = [[sizes[g] for g in sizes if folds[g] == k] for k in range(n_folds)]
    # The last that was dealt to a fold is its smallest, and went where there was least.
    assert all(sum(fold) - min(fold) <= sum(other) for fold in held if fold for other in held)
    assert balanced_folds(copy.deepcopy(sizes), n_folds, seed) == folds


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    batch_size=st.one_of(st.none(), st.integers(1, 9)),
    tokens_per_batch=st.integers(1, 200),
)
@often
def test_every_prompt_is_in_one_batch_of_its_fold(
    lengths: list[int], batch_size: int | None, tokens_per_batch: int
) -> None:
    prompts = [(Prompt(np.arange(n), i), i % 3) for i, n in enumerate(lengths)]
    planned = list(plan_batches(prompts, batch_size, tokens_per_batch, 100))
    assert sorted(n for one in planned for n in one.numbers) == [
        100 + i for i in range(len(lengths))
    ]
    for one in planned:
        assert {n % 3 for n in one.numbers} == {(one.fold + 100) % 3}
        if batch_size is None:
            assert one.n_padded <= max(tokens_per_batch, len(one.prompts[0].tokens))
        else:
            assert len(one.prompts) <= batch_size


@given(parts=st.lists(st.one_of(st.text(), st.integers(), st.binary()), max_size=4))
@often
def test_hashes_are_of_all_parts(parts: list[Any]) -> None:
    value = stable_hash(*parts)
    assert 0 <= value < 2**64
    assert value == stable_hash(*parts)
    assert value != stable_hash(*parts, "more")
