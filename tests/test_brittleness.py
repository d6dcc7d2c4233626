"""Brittleness: known slopes, half levels and ratios come back, with intervals that cover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_profile import made_profile
from tiny import random_tokens

import mspgt_lens as ml
from mspgt_lens.perturbation import brittleness as module

LEVELS = (0.1, 0.2, 0.5, 1.0)
SEGMENTS = {"local": (0, 1), "intermediate": (2, 3), "global": (4, 5)}
SHAPES = ("covariance", "isotropic")


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch):
    """The correction collects garbage, which takes a second with torch loaded."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def prompts(n_prompts=4, n_pos=14, seed=0):
    return ml.PromptDataset.from_tokens(random_tokens(n_prompts, n_pos, seed=seed))


def made(rng=None, slopes=(1, 1, 2, 2, 6, 6, 0.5, 1, 3), n_groups=16, spread=0.5, levels=LEVELS):
    """KL = slope * level ** 2 times a document's own factor; agreement = 1 / (1 + level ** 2)."""
    rng = np.random.default_rng(0) if rng is None else rng
    slope, level = np.array(slopes, dtype=float), np.array(levels)
    shape = (2, len(level), len(slope), n_groups)
    factor = rng.gamma(1 / spread**2, spread**2, size=(2, 1, len(slope), n_groups))
    kl = slope[:, None] * level[:, None, None] ** 2 * factor
    agreement = np.broadcast_to(1 / (1 + level[:, None, None] ** 2), shape)
    by_group = np.stack([kl, kl, agreement], axis=-1)
    return ml.results.Brittleness("made/up", 6, SEGMENTS, SHAPES, tuple(levels), by_group)


def test_known_slopes_and_ratios_are_recovered_and_covered():
    rng = np.random.default_rng(0)
    found = [made(rng, n_groups=24) for _ in range(60)]
    slopes = [one.slope("intermediate", "covariance") for one in found]
    assert np.mean([s.value for s in slopes]) == pytest.approx(2.0, rel=0.03)
    tables = [one.ratios() for one in found]
    truth = {("local", "intermediate"): 0.5, ("local", "global"): 1 / 6}
    covered = []
    for table in tables:
        inside = table[table["mode"] == "per_block"].set_index(["segment", "against"])
        for pair, ratio in truth.items():
            part = inside.loc[[pair]]
            covered += ((part["low"] <= ratio) & (ratio <= part["high"])).tolist()
    # 240 intervals at 95%, from skewed documents.
    assert 0.90 <= np.mean(covered) <= 0.99
    assert (tables[0].query("mode == 'per_block' and against == 'global'")["p_value"] < 0.05).all()


def test_equal_segments_are_rarely_told_apart():
    rng = np.random.default_rng(1)
    flat = (1,) * 9
    least = [made(rng, flat, n_groups=10).ratios()["p_value"].min() for _ in range(60)]
    # Corrected over the table: 3 expected at most in 60, 8 once in 200.
    assert np.sum(np.array(least) < 0.05) <= 7


def test_half_levels_are_interpolated_or_not_reached():
    one = made()
    value = one.half_level("local", "covariance")
    # 1 / (1 + level ** 2) is one half at level 1, which is one of the levels.
    assert value.value == pytest.approx(1.0)
    assert value.low <= value.value <= value.high
    assert made(levels=(0.1, 0.5)).half_level("local", "covariance") is None
    by_group = np.array(one.by_group)
    by_group[..., 2] = np.array([0.9, 0.7, 0.3, 0.1])[None, :, None, None]
    between = replace(one, by_group=by_group).half_level("global", "isotropic", "equal_energy")
    assert between.value == pytest.approx((0.2 * 0.5) ** 0.5)
    by_group[..., 2] = np.array([0.2, 0.2, 0.1, 0.1])[None, :, None, None]
    below = replace(one, by_group=by_group).half_level("global", "isotropic")
    assert below.value == pytest.approx(0.1 * 0.5 / 0.8)
    by_group[..., 2] = 0.9
    by_group[:, -1, :, :, 2] = np.where(np.arange(16) < 10, 0.2, 0.9)
    unsure = replace(one, by_group=by_group).half_level("global", "isotropic")
    assert np.isinf(unsure.high)
    assert np.isfinite(unsure.value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_run_measures_what_single_perturbations_measure(tiny, architecture):
    model = tiny(architecture)
    found = ml.measure_brittleness(
        model, prompts(), [1, 2], levels=(0.05, 0.1), seed=3, progress=False
    )
    assert found.by_group.shape == (2, 2, 4 + 3, 4, 3)
    kinds = [ml.Perturbation("noise", 0.1, shape, seed=3) for shape in SHAPES]
    one = ml.perturb_scales(
        model, prompts(), {"block 2": [2]}, perturbations=kinds, n_controls=1, progress=False
    )
    np.testing.assert_allclose(found.by_group[:, 1, 2].mean(axis=1), one.values[:, 0], rtol=1e-9)
    # A segment of one block gets the same either way; one of two shares the variance out.
    np.testing.assert_array_equal(found.by_group[:, :, 0], found.by_group[:, :, 4])
    kinds = [ml.Perturbation("noise", 0.1 / 2**0.5, shape, seed=3) for shape in SHAPES]
    both = ml.perturb_scales(
        model, prompts(), {"late": [2, 3]}, perturbations=kinds, n_controls=1, progress=False
    )
    np.testing.assert_allclose(found.by_group[:, 1, 6].mean(axis=1), both.values[:, 0], rtol=1e-9)
    # KL of small noise goes with its square.
    ratio = found.response("global", "covariance").values
    assert ratio[1] / ratio[0] == pytest.approx(4.0, rel=0.35)


def test_it_says_where_kl_does_not_go_with_the_square():
    assert not list(module._not_quadratic(made()))
    one = made()
    by_group = np.array(one.by_group)
    by_group[1, 1, 0] *= 5
    notes = list(module._not_quadratic(replace(one, by_group=by_group)))
    assert len(notes) == 1
    assert "isotropic noise, local, per_block" in notes[0]


def test_slopes_join_the_boundary_signals():
    rng = np.random.default_rng(2)
    profile = made_profile(n_layers=12)
    slopes = [1.0] * 4 + [5.0] * 4 + [20.0] * 4 + [1.0] * 3
    segments = {"local": range(4), "intermediate": range(4, 8), "global": range(8, 12)}
    one = replace(made(rng, slopes), n_layers=12, segments=segments)
    signals = one.signals()
    assert list(signals) == ["brittleness_covariance", "brittleness_isotropic"]
    assert all(len(c) == 12 and c.by_fold.shape == (5, 12) for c in signals.values())
    joined = replace(profile, signals={**profile.signals, **signals})
    found = ml.detect_scales(profile=joined, n_bootstraps=20)
    assert "brittleness covariance" in found.by_signal
    with pytest.raises(ValueError, match="n_folds must be 2 to the number of groups"):
        one.signals(n_folds=17)


def test_brittleness_is_kept_as_it_is(tmp_path):
    one = replace(made(), warnings=("note",))
    loaded = ml.results.Brittleness.load(one.save(tmp_path / "kept"))
    assert loaded.to_dataframe().equals(one.to_dataframe())
    assert (loaded.shapes, loaded.levels, loaded.segments, loaded.warnings) == (
        one.shapes,
        one.levels,
        one.segments,
        one.warnings,
    )
    table = one.to_dataframe()
    assert len(table) == 2 * len(LEVELS) * (6 + 3 + 3) * 3
    row = table.query("block == 2 and quantity == 'kl' and level == 0.5").iloc[0]
    assert row["value"] == pytest.approx(one.by_group[0, 2, 2, :, 0].mean())
    with pytest.raises(ValueError, match="read-only"):
        one.by_group[0] = 0


def test_wrong_arguments_are_named(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="levels must rise from above 0"):
        ml.measure_brittleness(model, prompts(), [2], levels=(0.0, 0.1))
    with pytest.raises(ValueError, match="shapes must be different ones"):
        ml.measure_brittleness(model, prompts(), [2], shapes=("round",))
    with pytest.raises(ValueError, match="segment must be one of local"):
        made().slope("early", "covariance")
    with pytest.raises(ValueError, match="shape must be one of covariance"):
        made().slope("local", "diagonal")
    with pytest.raises(ValueError, match="have no ratio"):
        made(slopes=(0,) * 9).ratios()


def made_known(slopes, n_groups=40, seed=0):
    """Responses whose slopes are known, with noise over groups, for one block per segment."""
    rng = np.random.default_rng(seed)
    by_group = np.zeros((2, 2, 6, n_groups, 3))
    levels = (0.1, 0.2)
    for shape in range(2):
        for target in range(6):
            drawn = slopes[target % 3] * 10**shape * rng.lognormal(-0.045, 0.3, n_groups)
            by_group[shape, :, target, :, 0] = np.outer(np.square(levels), drawn)
    segments = {"local": (0,), "intermediate": (1,), "global": (2,)}
    return ml.results.Brittleness(
        "made", 3, segments, ("covariance", "isotropic"), levels, by_group
    )


@pytest.mark.parametrize("mode", ["per_block", "equal_energy"])
def test_logarithms_of_brittleness_have_their_intervals(mode):
    slopes, inside = (5.0, 2.0, 0.5), 0
    for seed in range(100):
        brittle = made_known(slopes, seed=seed)
        logarithms = brittle.log_brittleness(mode)
        for shape, factor in (("covariance", 1.0), ("isotropic", 10.0)):
            estimate = logarithms[shape]["intermediate"]
            assert estimate.value == pytest.approx(
                np.log(brittle.slope("intermediate", shape, mode).value)
            )
            inside += estimate.low <= np.log(2.0 * factor) <= estimate.high
    assert 0.9 < inside / 200 < 0.99
    silent = made_known((5.0, 0.0, 0.5))
    with pytest.raises(ValueError, match="'intermediate' of made does not respond"):
        silent.log_brittleness(mode)
