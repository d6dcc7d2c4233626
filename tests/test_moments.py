"""Sums that profiles rest on: shards, samples, memory."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from profiles import SMALL, TOKENS, gather
from tiny import random_tokens, tiny_model
from torch import Tensor

from mspgt_lens import gathering as gathering_module
from mspgt_lens import moments as moments_module
from mspgt_lens.folds import stable_hash
from mspgt_lens.gathering import add_batch, make_batches
from mspgt_lens.models import as_adapter
from mspgt_lens.moments import Moments
from mspgt_lens.prompts import Prompt


def sample_only(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moments_module, gathering_module):
        monkeypatch.setattr(module, "SAMPLE_CAPACITY", capacity)


def sums(moments: Moments) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in moments.sums().items()}


def merged_of(*shards: Moments) -> Moments:
    first = copy.deepcopy(shards[0])
    for other in shards[1:]:
        first.merge_(other)
    return first


def test_shards_add_up_to_the_whole(model: Any) -> None:
    first = gather(model, TOKENS[:5])
    second, third = gather(model, TOKENS[5:9], first), gather(model, TOKENS[9:], first)
    whole = gather(model, TOKENS, first)
    for merged in (merged_of(first, second, third), merged_of(third, merged_of(second, first))):
        assert set(sums(merged)) == set(sums(whole)) != set()
        for name, expected in sums(whole).items():
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                sums(merged)[name], expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name
            )
        assert (merged.n_read == whole.n_read).all()
        assert (merged.token_counts == whole.token_counts).all()
        assert (merged.n_prompts, merged.fingerprint) == (24, whole.fingerprint)
        assert (merged.sample.priority == whole.sample.priority).all()
        assert (merged.sample.next_token == whole.sample.next_token).all()
        assert (merged.sample.fold == whole.sample.fold).all()
        assert (merged.sample.group == whole.sample.group).all()
        torch.testing.assert_close(merged.sample.rows, whole.sample.rows)


def test_adding_takes_no_memory_and_leaves_the_other_shard_alone(model: Any) -> None:
    first = gather(model, TOKENS[:5])
    second = gather(model, TOKENS[5:], first)
    before = copy.deepcopy(sums(second))
    places = {name: value.ctypes.data for name, value in sums(first).items()}
    first.merge_(second)
    assert {name: value.ctypes.data for name, value in sums(first).items()} == places
    assert all((sums(second)[name] == value).all() for name, value in before.items())


def test_moments_are_read_back_to_the_bit(model: Any) -> None:
    """Whatever is a tensor or an array is covered, the sample and signals of one's own included."""
    kept = gather(model, TOKENS[:9])
    again = Moments(gather(model, TOKENS[:3]).plan, as_adapter(model))
    assert "per_row" in kept.sums()
    again.take_(kept.to_arrays())
    assert set(sums(again)) == set(sums(kept)) != set()
    for name, value in sums(kept).items():
        np.testing.assert_array_equal(sums(again)[name], value, err_msg=name)
    for field in dataclasses.fields(moments_module.Sample):
        own, read = getattr(kept.sample, field.name), getattr(again.sample, field.name)
        assert type(own) is type(read)
        torch.testing.assert_close(read, own, rtol=0, atol=0)
    assert (again.n_prompts, again.fingerprint) == (9, kept.fingerprint)
    torch.testing.assert_close(again.plan.features, kept.plan.features, rtol=0, atol=0)
    # What is added to both gives the same: nothing else decides.
    more = gather(model, TOKENS[9:], kept)
    for moments in (kept, again):
        moments.merge_(more)
    assert kept.to_arrays().keys() == again.to_arrays().keys()
    for name, value in kept.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], value, err_msg=name)


def test_the_same_prompt_in_several_groups_is_sampled_alike_in_any_order(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their positions have equal priorities; not all find room."""
    sample_only(2, monkeypatch)
    first, adapter = gather(model, TOKENS[:1]), as_adapter(model)
    found = []
    for order in itertools.permutations((1, 2, 3)):
        prompts = [(Prompt(TOKENS[0].numpy(), group), 0) for group in order]
        for batch_size in (1, 3):
            gathered = Moments(first.plan, adapter)
            gathered.reference = first.reference
            with adapter.inference():
                for batch in make_batches(prompts, batch_size, 100):
                    add_batch(gathered, adapter, batch)
            found.append(gathered.sample)
    assert len(found[0].priority) == 2
    for sample in found[1:]:
        for name in ("priority", "group", "next_token"):
            assert (getattr(sample, name) == getattr(found[0], name)).all()


def test_shards_of_other_processes_add_up(model: Any) -> None:
    first = gather(model, TOKENS[:5])
    second = pickle.loads(pickle.dumps(gather(model, TOKENS[5:], first)))
    merged = merged_of(first, second)
    assert merged.n_prompts == 24
    assert merged.n_valid.sum() == 24 * 20


def test_shards_of_another_plan_or_reference_are_refused(model: Any) -> None:
    first = gather(model, TOKENS[:6])
    with pytest.raises(ValueError, match="one plan and one reference"):
        first.merge_(gather(model, TOKENS[6:]))
    other = gather(model, TOKENS[6:], seed=1)
    other.reference = first.reference
    with pytest.raises(ValueError, match="one plan and one reference"):
        first.merge_(other)


def test_shards_with_scales_in_another_order_are_refused(model: Any) -> None:
    """Their target columns stand in another order too."""
    first, second = gather(model, TOKENS[:6]), gather(model, TOKENS[6:])
    second.reference = first.reference
    assert merged_of(first, second).n_prompts == 24
    backwards = dict(reversed(first.plan.bands.items()))
    second.plan = dataclasses.replace(first.plan, bands=backwards)
    with pytest.raises(ValueError, match="one plan and one reference"):
        first.merge_(second)


def test_memory_does_not_grow_with_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_only(30, monkeypatch)

    def held(moments: Moments) -> dict[str, tuple[int, ...]]:
        sample = {f"sample.{f.name}": getattr(moments.sample, f.name) for f in fields}
        arrays = sums(moments) | {name: np.asarray(value) for name, value in sample.items()}
        other = set(vars(moments)) - set(sums(moments))
        assert other == {"plan", "_device", "reference", "sample", "n_prompts", "fingerprint"}
        return {name: (*array.shape, array.itemsize) for name, array in arrays.items()}

    fields = dataclasses.fields(moments_module.Sample)
    few, many = gather(model, TOKENS[:6]), gather(model, random_tokens(60, 24))
    assert many.n_valid.sum() == 10 * few.n_valid.sum()
    assert held(few) == held(many)
    assert len(pickle.dumps(many)) < 1.01 * len(pickle.dumps(few))


def test_the_sample_does_not_depend_on_the_order_of_prompts(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_only(30, monkeypatch)
    first = gather(model, TOKENS)
    again = gather(model, TOKENS.flip(0), first)
    assert (first.sample.priority == again.sample.priority).all()
    assert (first.sample.next_token == again.sample.next_token).all()
    torch.testing.assert_close(first.sample.rows, again.sample.rows)
    other = gather(model, TOKENS, seed=1)
    assert not (first.sample.next_token == other.sample.next_token).all()


def test_every_sampled_position_knows_its_token_fold_and_group(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual at site 0 tells which token a row is from."""
    sample_only(200, monkeypatch)
    sample = gather(model, TOKENS).sample
    embedding = as_adapter(model).embedding()
    token_of = {
        tuple(as_adapter(model).normalize(row).tolist()): i for i, row in enumerate(embedding)
    }
    allowed = {
        (int(row[t]), int(row[t + 1]), int(row[-1]) % 3, stable_hash(int(row[0])))
        for row in TOKENS
        for t in range(4, 23)
    }
    sampled = {
        (token_of[tuple(rows[0].tolist())], int(following), int(fold), int(group))
        for rows, following, fold, group in zip(
            sample.rows, sample.next_token, sample.fold, sample.group, strict=True
        )
    }
    assert sampled <= allowed
    assert len(sample.priority) == 200
    assert len(sampled) > 150
    assert set(sample.fold.tolist()) == {0, 1, 2}


def test_a_failed_batch_adds_nothing() -> None:
    model = tiny_model("llama", **SMALL)
    first = gather(model, TOKENS[:6])
    before = copy.deepcopy(sums(first))

    def broken(activation: Tensor, hook: Any) -> Tensor:
        return activation * torch.nan

    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(broken)
    (batch,) = make_batches([(Prompt(TOKENS[7].numpy(), 7), 0)], None, 100)
    with as_adapter(model).inference(), pytest.raises(FloatingPointError):
        add_batch(first, as_adapter(model), batch)
    assert all((sums(first)[name] == value).all() for name, value in before.items())
    assert first.n_prompts == 6
