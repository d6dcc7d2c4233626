"""The boundary test: against brute force, on planted boundaries, and on drift without any."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mspgt_lens as ml
from mspgt_lens.scales.drift import (
    CORRELATIONS,
    Fit,
    legendre,
    rank_normalize,
    search_plan,
    steps,
    whiten,
)
from mspgt_lens.scales.segments import compare_with_drift, summarize_places
from mspgt_lens.scales.synthetic import DRIFTS

FAST = {"n_draws": 199, "n_bootstraps": 50}


def residual(matrix, basis, correlation):
    """Sum of squares that generalized least squares leaves, the long way."""
    n = len(matrix)
    lag = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    # Whitening here has innovations of variance 1, so the noise has variance 1 / (1 - rho^2).
    inverse = np.linalg.inv(correlation**lag / (1 - correlation**2))
    solution = np.linalg.solve(basis.T @ inverse @ basis, basis.T @ inverse @ matrix)
    left = matrix - basis @ solution
    return np.trace(left.T @ inverse @ left)


@pytest.mark.parametrize("n_jumps", [1, 2, 3])
@pytest.mark.parametrize("n_blocks", [9, 14])
def test_the_search_is_exact(n_jumps, n_blocks):
    """Every placement, order and correlation, by brute force from the covariance of AR(1) noise."""
    ranks = rank_normalize(ml.synthetic_signals(n_blocks, 4, seed=3).signals)
    plan = search_plan(n_blocks, 2)
    search = plan.search(ranks[None])
    floor = ranks.size / (n_blocks**2 - 1)
    best = {}
    for r, order in itertools.product(range(len(CORRELATIONS)), plan.orders):
        rho = CORRELATIONS[r]
        for places in itertools.combinations(range(2, n_blocks - 1), n_jumps):
            if any(b - a < 2 for a, b in itertools.pairwise(places)):
                continue
            basis = np.column_stack([legendre(n_blocks, order), steps(n_blocks, places)])
            left = max(residual(ranks, basis, rho) + floor, floor)
            score = (
                4 / 2 * np.log(1 - rho**2)
                - ranks.size / 2 * np.log(left)
                - np.log(n_blocks) / 2 * (4 * (order + 1 + n_jumps) + n_jumps)
            )
            if score > best.get((order, r), (-np.inf,))[0]:
                best[order, r] = score, places
    if n_jumps == 3:
        # Three jumps are searched at the order and correlation that are best for two.
        i, r = np.unravel_index(search.scores[2][:, :, 0].argmax(), search.scores[2].shape[:2])
        best = {(plan.orders[i], r): best[plan.orders[i], r]}
    expected, places = max(best.values())
    assert search.best(n_jumps)[0] == pytest.approx(expected, rel=1e-4)
    assert tuple(search.boundaries(n_jumps)[0]) == places


def test_ranks_make_monotone_columns_straight_and_ties_equal():
    depth = np.arange(10.0)
    ranks = rank_normalize(np.column_stack([np.exp(depth), -(depth**3), np.repeat([0.0, 1.0], 5)]))
    assert np.allclose(np.diff(ranks[:, 0], n=2), 0)
    assert np.allclose(ranks[:, 0], -ranks[:, 1])
    assert len(set(ranks[:, 2].round(9))) == 2
    assert np.allclose(ranks.mean(axis=0), 0)
    assert np.allclose(ranks[:, :2].var(axis=0), 1)


def test_regenerated_noise_has_the_autocorrelation_and_correlation_of_the_fit():
    rng = np.random.default_rng(0)
    n, rho = 400, 0.6
    mixing = np.array([[1.0, 0.8], [0.0, 0.6]])
    noise = rng.standard_normal((n, 2)) @ mixing
    for t in range(1, n):
        noise[t] += rho * noise[t - 1]
    fit = Fit(legendre(n, 1), (), rho, "linear")
    drawn = fit.regenerate(noise, 200, rng) - fit.fitted(noise)
    lagged = (drawn[:, 1:] * drawn[:, :-1]).mean() / (drawn**2).mean()
    between = np.mean([np.corrcoef(one.T)[0, 1] for one in whiten(drawn, rho)])
    assert lagged == pytest.approx(rho, abs=0.03)
    assert between == pytest.approx(0.8, abs=0.04)


def test_planted_boundaries_are_found():
    made = ml.synthetic_signals(30, 8, seed=2)
    found = ml.segment_blocks(made.signals, **FAST, seed=1)
    assert np.abs(np.subtract(found.boundaries, made.boundaries)).max() <= 1
    assert found.p_value < 0.05
    assert found.n_boundaries == 2
    assert found.sharpness["stages"] < found.sharpness["drift"]
    assert list(found.segments) == ["local", "intermediate", "global"]
    assert found.probability.sum() == pytest.approx(2)
    assert sum(s.weight for s in found.by_signal.values()) == pytest.approx(1)
    assert 0 < found.explained < 1
    assert "Two boundaries" in found.summary()


@pytest.mark.parametrize("n_boundaries", [1, 3])
def test_other_numbers_of_boundaries_are_chosen_too(n_boundaries):
    made = ml.synthetic_signals(30, 10, n_boundaries=n_boundaries, effect=4.0, seed=5)
    found = ml.segment_blocks(made.signals, n_boundaries=n_boundaries, **FAST)
    assert found.n_boundaries == n_boundaries
    assert found.boundaries == made.boundaries
    assert list(found.segments) == [f"segment {i + 1}" for i in range(n_boundaries + 1)]


@pytest.mark.parametrize(
    "null",
    [*({"drift": drift} for drift in DRIFTS), {"autocorrelation": 0.4}],
    ids=lambda null: str(next(iter(null.values()))),
)
def test_no_boundary_is_found_in_gradual_drift(null):
    """60 draws; more than 7 rejections at 0.05 have a probability of 1%."""
    seen = ml.power(20, 6, n_boundaries=0, **null, n_simulations=60, n_draws=99)
    assert seen.rejected <= 7 / 60
    assert seen.chosen[0] >= 53 / 60


def test_smooth_curves_without_noise_hold_no_boundary():
    """A network without any sharp change has curves that are exact to many digits."""
    depth = np.linspace(0, 1, 30)[:, None]
    rates = np.linspace(1, 5, 8)
    for smooth in (np.exp(rates * depth), np.sin(rates * depth), 1 / (1 + rates * depth)):
        found = ml.segment_blocks(smooth, **FAST)
        assert found.n_boundaries == 0
        assert found.p_value > 0.05


def test_power_where_noise_is_half_the_jump():
    """At 24 blocks and 8 signals: 0.95 and 0.97 of many draws, of which 30 here."""
    seen = ml.power(24, 8, n_simulations=30, n_draws=99)
    assert seen.rejected >= 25 / 30
    assert seen.located >= 25 / 30


def test_intervals_hold_planted_boundaries():
    """40 draws, 80 intervals: fewer than 67 hits have a probability below 2% if 90% cover."""
    hits = 0
    for seed in range(40):
        made = ml.synthetic_signals(24, 6, seed=seed)
        ranks = rank_normalize(made.signals)
        rng = np.random.default_rng(seed)
        plan = search_plan(24, 2)
        fit = plan.describe(plan.search(ranks[None]), ranks, 2)
        places = plan.search(rank_normalize(fit.regenerate(ranks, 99, rng))).boundaries(2)
        hits += sum(
            min(low, b) <= true <= max(high, b)
            for true, b, (low, high) in zip(
                made.boundaries, fit.boundaries, summarize_places(places, 24)[0], strict=True
            )
        )
    assert hits >= 67


def test_replicates_widen_the_intervals():
    made = ml.synthetic_signals(24, 8, effect=3.0, seed=1)
    noise = np.random.default_rng(0).standard_normal((50, *made.signals.shape)) * 2.5
    alone = ml.segment_blocks(made.signals, **FAST)
    wider = ml.segment_blocks(made.signals, replicates=made.signals + noise, **FAST)
    assert np.ptp(wider.intervals, axis=1).sum() > np.ptp(alone.intervals, axis=1).sum()
    assert wider.p_values == alone.p_values


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 30), st.integers(2, 6))
def test_order_and_units_of_signals_do_not_matter(seed, n_blocks, n_signals):
    rng = np.random.default_rng(seed)
    signals = rng.standard_normal((n_blocks, n_signals))
    order = rng.permutation(n_signals)
    plan = search_plan(n_blocks, 2)
    changed = np.exp(signals[:, order]) * 1e3
    first, second = (plan.search(rank_normalize(s)[None], max_jumps=2) for s in (signals, changed))
    assert second.best(2)[0] == pytest.approx(first.best(2)[0], rel=1e-4)
    turned = plan.search(rank_normalize(-signals)[None], max_jumps=2)
    assert turned.best(2)[0] == pytest.approx(first.best(2)[0], rel=1e-4)


def test_the_same_seed_gives_the_same_partition():
    signals = ml.synthetic_signals(16, 6, seed=4).signals
    first, second = (ml.segment_blocks(signals, **FAST, seed=9) for _ in range(2))
    assert first == second
    assert first != ml.segment_blocks(signals, **FAST, seed=10)


def test_few_blocks_and_wandering_signals_are_warned_of():
    short = ml.segment_blocks(ml.synthetic_signals(8, 6, seed=0).signals, **FAST)
    assert any("little power" in note for note in short.warnings)
    wandering = ml.synthetic_signals(40, 8, n_boundaries=0, autocorrelation=0.7, seed=0)
    assert any("wander" in n for n in ml.segment_blocks(wandering.signals, **FAST).warnings)
    assert not ml.segment_blocks(ml.synthetic_signals(30, 8, seed=2).signals, **FAST).warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:5], "at least 6 blocks, got 5"),
        (lambda s: np.where(s == s[3, 1], np.nan, s), "NaN or infinite in b"),
        (lambda s: np.where(s == s[3, 1], np.inf, s), "NaN or infinite in b"),
        (lambda s: np.column_stack([s[:, :1], np.ones(len(s)), s[:, 2:]]), "constant: b"),
        (lambda s: s[:, :2], "names must be 2 different names"),
        (lambda s: s[None], "must have shape"),
    ],
)
def test_bad_signals_are_named(change, message):
    signals = ml.synthetic_signals(12, 3, seed=0).signals
    with pytest.raises(ValueError, match=message):
        ml.segment_blocks(change(signals), names=["a", "b", "c"], **FAST)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"n_boundaries": 0}, "n_boundaries must be 1 to 3"),
        ({"n_boundaries": 4}, "n_boundaries must be 1 to 3"),
        ({"min_size": 5}, "lower min_size"),
        ({"min_size": 0}, "min_size"),
        ({"n_draws": 10}, "n_draws"),
        ({"replicates": np.zeros((4, 3, 3))}, "replicates must have shape"),
    ],
)
def test_bad_settings_are_named(settings_, message):
    signals = ml.synthetic_signals(12, 3, seed=0).signals
    with pytest.raises(ValueError, match=message):
        ml.segment_blocks(signals, **(FAST | settings_))


def test_six_blocks_and_one_signal_are_enough_to_say_that_nothing_can_be_told():
    found = ml.segment_blocks(np.random.default_rng(0).standard_normal(6), **FAST)
    assert found.n_boundaries == 0
    assert found.by_signal["signal 0"].p_value is None


def test_a_jump_in_the_reference_does_not_count_twice():
    """Two planted jumps: one more than the data hold is not chosen."""
    made = ml.synthetic_signals(40, 8, effect=3.0, seed=8)
    tested = compare_with_drift(rank_normalize(made.signals), 2, 199, np.random.default_rng(0))
    assert tested.n_boundaries == 2
    assert tested.p_values[3] < 0.05


def test_synthetic_signals_are_what_they_say():
    noise = ml.synthetic_signals(2000, 8, n_boundaries=0, correlation=0.5, autocorrelation=0.6)
    between = np.corrcoef(noise.signals.T)[np.triu_indices(8, 1)].mean()
    lagged = (noise.signals[1:] * noise.signals[:-1]).mean() / (noise.signals**2).mean()
    assert between == pytest.approx(0.5, abs=0.06)
    assert lagged == pytest.approx(0.6, abs=0.06)
    assert noise.signals.var() == pytest.approx(1.0, abs=0.1)
    made = ml.synthetic_signals(300, 40, effect=50.0, seed=1)
    jumps = [
        made.signals[b : b + 40].mean(0) - made.signals[b - 40 : b].mean(0) for b in made.boundaries
    ]
    assert np.abs(np.abs(jumps) - 50).max() < 3
    assert ml.synthetic_signals(12, 3, n_boundaries=0).boundaries == ()
    slopes = ml.synthetic_signals(60, 5, kind="slopes", effect=1e6, seed=2)
    bend = np.abs(np.diff(slopes.signals, n=2, axis=0)).sum(axis=1)
    # A slope that changes at block b moves that block first.
    assert sorted(np.argsort(bend)[-2:] + 2) == list(slopes.boundaries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 3), "n_blocks"),
        ((12, 0), "n_signals"),
        ((12, 3, {"n_boundaries": 6}), "n_boundaries"),
        ((12, 3, {"correlation": 1.0}), "correlation"),
        ((12, 3, {"drift": "steep"}), "drift must be one of"),
    ],
)
def test_impossible_synthetic_signals_are_refused(arguments, message):
    *sizes, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        ml.synthetic_signals(*sizes, **options)
