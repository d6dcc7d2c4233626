"""Half precision: what rounding does is measured, taken off, and never passes for an effect."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, ENCODERS, as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.models import as_adapter, unembedding_rows
from mspgt_lens.perturbation import brittleness as module
from mspgt_lens.perturbation.batches import make_batches
from mspgt_lens.perturbation.matching import match_strengths
from mspgt_lens.perturbation.residuals import residual_statistics
from mspgt_lens.perturbation.responding import respond
from mspgt_lens.perturbation.rounding import rounding

HALVES = (torch.bfloat16, torch.float16)
QUIET = {"progress": False}
LEVELS = (0.02, 0.2)
PART = {"first": (0,), "rest": (1, 2, 3)}


def prompts(n_prompts=24, n_pos=24):
    return ml.PromptDataset.from_tokens(random_tokens(n_prompts, n_pos))


def both(architecture, dtype, **sizes):
    """The same weights in float32 and in half precision: the truth, and what rounds."""
    half = tiny_model(architecture, **sizes)
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.copy_(parameter.to(dtype))
    whole = copy.deepcopy(half)
    return whole, half.to(dtype)


def measured(model, levels=LEVELS, shapes=("covariance",)):
    return ml.measure_brittleness(model, prompts(), PART, levels=levels, shapes=shapes, **QUIET)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("level", [0.01, 0.02])
def test_slopes_in_half_precision_are_those_of_float32(architecture, level):
    whole, half = both(architecture, torch.bfloat16)
    truth, found = measured(whole, (level,)), measured(half, (level,))
    raw = replace(found, floor=None)
    for segment in PART:
        for mode in ("per_block", "equal_energy"):
            true, slope, with_floor = (
                one.slope(segment, "covariance", mode) for one in (truth, found, raw)
            )
            assert slope.low < true.value < slope.high
            # Most of what rounding adds is taken off.
            assert abs(slope.value - true.value) < 0.45 * (with_floor.value - true.value)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", [1e-4, 1e-3])
def test_below_the_floor_nothing_is_claimed(dtype, level):
    whole, half = both("llama", dtype)
    truth, found = measured(whole), measured(half, levels=(level, 0.3))
    rounded = [note for note in found.warnings if "rounding in" in note]
    assert len(rounded) == 4
    assert all(str(dtype) in note and "load the model in float32" in note for note in rounded)
    assert not [note for note in found.warnings if "add lower levels" in note]
    for segment in PART:
        slope = found.slope(segment, "covariance")
        assert slope.low < truth.slope(segment, "covariance").value < slope.high


def test_advice_leads_above_the_floor():
    _, half = both("llama", torch.bfloat16)
    (note,) = [n for n in measured(half, levels=(0.02,)).warnings if "first, per_block" in n]
    advised = float(note.split("measure from level ")[1].split(" ")[0])
    again = measured(half, levels=(advised * 1.1,))
    assert not [n for n in again.warnings if "first, per_block: rounding" in n]


def test_float32_has_a_floor_too_and_it_is_far_below():
    whole, _ = both("llama", torch.bfloat16)
    found = measured(whole, levels=(1e-4, 2e-4))
    assert found.warnings == ()
    assert (np.abs(found.floor[..., 0]) < 1e-10).all()
    for segment in PART:
        few = found.slope(segment, "covariance").value
        assert few == pytest.approx(
            measured(whole, levels=(0.01,)).slope(segment, "covariance").value, rel=0.05
        )
    loaded = replace(found, floor=None)
    assert loaded.slope("first", "covariance").value == pytest.approx(
        found.slope("first", "covariance").value, rel=1e-2
    )


def test_advice_depends_on_the_floor():
    levels = np.array([0.1, 0.2])
    kl = np.array([1.0, 8.0])[None, :, None, None] * np.ones((1, 2, 3, 4))
    by_group = np.stack([kl, kl, np.ones_like(kl)], axis=-1)
    one = ml.results.Brittleness(
        "made", 2, {"all": (0, 1)}, ("covariance",), tuple(levels), by_group
    )
    for floor, words in (
        (1e-6, "add lower levels"),
        (2e-3, "add lower levels, down to 0.01"),
        (0.05, "lower levels need the model in float32"),
    ):
        rounded = np.full((3, 4, 3), floor)
        notes = list(module._not_quadratic(replace(one, floor=rounded)))
        assert len(notes) == 2
        assert all(words in note for note in notes)
    assert not list(module._not_quadratic(replace(one, floor=np.full((3, 4, 3), 0.9))))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_floor_is_one_step_in_one_coordinate_of_twelve(dtype):
    model = tiny_model("llama").to(dtype)
    adapter = as_adapter(model)
    (batch,) = make_batches(adapter, prompts(), skip_first=4, batch_size=24)
    (edit,) = rounding([1])(batch)
    residual = torch.randn(*batch.tokens.shape, 32, generator=torch.Generator().manual_seed(0))
    residual = residual.to(dtype)
    moved = edit.change(residual)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, residual, rtol=2 * torch.finfo(dtype).eps, atol=0)
    changed = (moved != residual)[batch.valid].double().mean()
    assert changed == pytest.approx(1 / 12, rel=0.05)
    assert torch.equal(moved[~batch.valid], residual[~batch.valid])
    assert torch.equal(edit.change(residual), moved)


def test_small_divergences_keep_their_digits():
    model = tiny_model("llama")
    adapter = as_adapter(model)
    batches = make_batches(adapter, prompts(), skip_first=4, batch_size=None)
    statistics = residual_statistics(adapter, batches)
    levels = (1e-5, 1e-3)
    kinds = [ml.Perturbation("noise", level) for level in levels]
    conditions = [module.perturbed(kind, statistics, [0]) for kind in kinds]
    small, large = respond(adapter, batches, conditions)[..., 0].mean(axis=1)
    assert small * 1e4 == pytest.approx(large, rel=0.05)


def test_rounding_is_no_effect_on_the_loss():
    """Of thirty effects below the floor none is significant, and all are said to be rounding."""
    _, half = both("llama", torch.bfloat16)
    kinds = [ml.Perturbation("noise", 1e-4, seed=seed) for seed in range(10)]
    kinds = [replace(kind, strength=1e-4 * (1 + i / 100)) for i, kind in enumerate(kinds)]
    found = ml.perturb_scales(half, prompts(12), [1, 2], perturbations=kinds, n_controls=1, **QUIET)
    assert (found.p_values > 0.05).all()
    assert len(found.warnings) == 30
    assert found.floor.shape == (3, 3)
    assert (found.values[..., 0] < 1.5 * found.floor[:, 0]).all()
    strong = ml.perturb_scales(
        half, prompts(12), [1, 2], perturbations=[ml.Perturbation("skip")], n_controls=1, **QUIET
    )
    assert strong.warnings == ()
    again = ml.perturb_scales(
        half,
        prompts(12),
        [1],
        perturbations=[ml.Perturbation("scaling", 1.0)],
        n_controls=1,
        **QUIET,
    )
    assert (again.values[..., 0] == 0).all()
    assert again.warnings == ()


def test_doses_below_rounding_are_refused_and_others_are_met_without_it():
    whole, half = both("llama", torch.bfloat16)
    jobs = [(ml.Perturbation("noise"), (0,)), (ml.Perturbation("scaling"), (1, 2))]
    found = []
    for model in (whole, half):
        adapter = as_adapter(model)
        batches = make_batches(adapter, prompts(), skip_first=4, batch_size=None)
        statistics = residual_statistics(adapter, batches)
        found.append(match_strengths(adapter, batches, statistics, jobs, 0.01))
    for true, one in zip(*found, strict=True):
        assert one.perturbation.amount == pytest.approx(true.perturbation.amount, rel=0.1)
    with pytest.raises(
        ValueError, match=r"target_kl must be above what rounding in torch\.bfloat16"
    ):
        match_strengths(adapter, batches, statistics, jobs, 1e-5)
    half.tokenizer = tiny_tokenizer()
    texts = [as_text(row) for row in random_tokens(4, 16)]
    with pytest.raises(ValueError, match=r"ask for at least .* or load the model in float32"):
        ml.generation_effects(half, texts, [2], target_kl=1e-5, n_new=2, n_controls=0, **QUIET)


@pytest.mark.parametrize("architecture", ARCHITECTURES + ENCODERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_logits_are_decoded_in_float32(architecture, dtype):
    whole, half = both(architecture, dtype)
    for model in (whole, half):
        model.tokenizer = tiny_tokenizer()
    one, other = as_adapter(whole), as_adapter(half)
    residual = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    exact = one.decode(one.normalize(residual))
    # Only the final norm's scale is read through the dtype.
    error = (other.decode(other.normalize(residual)) - exact).norm() / exact.norm()
    assert error < (2e-2 if dtype is torch.bfloat16 else 2e-3) / 4
    ids = torch.arange(4, 40)
    if architecture not in ENCODERS:
        rows, true = unembedding_rows(other, ids), unembedding_rows(one, ids)
        assert (rows - true).norm() / true.norm() < 3e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_curves_in_half_precision_are_those_of_float32(dtype):
    """Compression within 1%, and information within its interval."""
    given = ml.PromptDataset.from_tokens(random_tokens(40, 64))
    whole, half = (
        ml.profile_layers(model, given, bands={"local": (2, 4)}, **QUIET)
        for model in both("llama", dtype)
    )
    np.testing.assert_allclose(half.compression.values, whole.compression.values, rtol=0.01)
    curves = [(whole.relevance, half.relevance)]
    curves += [
        (getattr(whole, name)["local"], getattr(half, name)["local"])
        for name in ("retained", "predicted", "added")
    ]
    for expected, found in curves:
        assert (found.values >= expected.low).all()
        assert (found.values <= expected.high).all()
