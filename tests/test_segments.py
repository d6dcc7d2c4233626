"""The boundary test: against brute force, on planted boundaries, and on gradual change alone."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

import mspgt_lens as ml
from mspgt_lens.scales.evidence import Change, change_curves, evidence_for_change, votes
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.scales.normalizing import rank_normalize
from mspgt_lens.scales.regenerating import Regenerator, regenerator
from mspgt_lens.scales.seeking import _judged, seek_changes, standardized
from mspgt_lens.scales.segments import _described

pytestmark = pytest.mark.simulation

FAST = {"n_bootstraps": 20}


def every_kind(n_rows):
    return np.arange(len(gradual_kinds(n_rows).words))


def log_likelihood(series, covariance, fitted, added=None):
    """Restricted likelihood beside fitted curves, its size of noise and added curves fitted."""
    beyond = np.linalg.svd(fitted)[0][:, fitted.shape[1] :]
    inside = beyond.T @ covariance @ beyond
    inverse = np.linalg.inv(inside)
    left = beyond.T @ series
    price = 0.0
    if added is not None:
        curves = beyond.T @ added
        inner = curves.T @ inverse @ curves
        left = left - curves @ np.linalg.solve(inner, curves.T @ inverse @ left)
        price = -0.5 * np.linalg.slogdet(np.eye(len(inner)) + 4 * inner)[1]
    freedom = beyond.shape[1]
    squares = left @ inverse @ left
    return -0.5 * np.linalg.slogdet(inside)[1] - freedom / 2 * np.log(squares) + price


def under_common_kind(likelihoods):
    """Of every signal, ``[kind][signal]``: most are of one kind, a fifth of any other."""
    spread = logsumexp(likelihoods, axis=0) - np.log(len(likelihoods))
    each = np.logaddexp(np.log(0.8) + likelihoods, np.log(0.2) + spread)
    return each[each.sum(axis=1).argmax()]


@pytest.mark.parametrize("given_changes", [(), (Change("jump", 4),), (Change("bend", 5),)])
def test_evidence_is_the_likelihood_ratio_under_the_likeliest_common_kind(given_changes):
    """Every change and kind of noise, from its covariance, the long way."""
    n, kinds = 9, np.arange(0, len(gradual_kinds(9).words), 17)
    series = np.random.default_rng(0).standard_normal((n, 3))
    evidence = evidence_for_change(n, given_changes)
    gains = evidence.gains(series[None], kinds)[..., 0]
    line = np.column_stack([np.ones(n), np.arange(n), change_curves(n, given_changes)])
    covariances = gradual_kinds(n).covariances[kinds]

    def likelihood(added=None):
        return under_common_kind(
            np.array([[log_likelihood(x, c, line, added) for x in series.T] for c in covariances])
        )

    def new(added):
        together = np.column_stack([line, added])
        return np.linalg.matrix_rank(together) == together.shape[1]

    for at, change in enumerate(evidence.candidates):
        curve = change_curves(n, [change])
        if new(curve):
            assert gains[at] == pytest.approx(likelihood(curve) - likelihood(), abs=2e-3)


def test_changes_bear_the_first_row_that_is_new():
    jump, bend = change_curves(6, [Change("jump", 2), Change("bend", 3)]).T
    assert jump.tolist() == [0, 0, 1, 1, 1, 1]
    # The step onto row 3 is the first at the new rate.
    assert bend.tolist() == [0, 0, 0, 1, 2, 3]
    spread = change_curves(7, [Change("jump", 2, 3)])[:, 0]
    assert spread == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize("n_rows", [5, 8, 30])
def test_every_change_that_may_be_has_its_chance(n_rows):
    evidence = evidence_for_change(n_rows)
    chances = {}
    for change, chance in zip(evidence.candidates, np.exp(evidence.prior), strict=True):
        sort = (change.kind, change.width)
        chances[sort] = chances.get(sort, 0.0) + chance
        # A jump over several rows, and a bend, leave a change from row to row on either side.
        if change.width > 1:
            assert change.row >= 2
            assert change.end <= n_rows - 1
    assert chances[("jump", 1)] == pytest.approx(0.4)
    assert chances[("bend", 1)] == pytest.approx(0.5)
    assert sum(chances.values()) == pytest.approx(1.0 if n_rows > 5 else 0.95)


def test_gradual_kinds_are_what_they_are_called():
    kinds = gradual_kinds(12)
    assert len(kinds.words) == len(kinds.covariances)
    assert np.allclose(kinds.covariances[0], np.eye(12), atol=1e-5)
    rows = np.arange(12)
    walk = 1.0 + np.minimum.outer(rows, rows)
    slope = np.cumsum(np.cumsum(walk, axis=0), axis=1)
    for covariance in (walk, slope):
        assert min(np.abs(kinds.covariances - covariance).max(axis=(1, 2))) < 1e-5
    at_ends = np.diag(np.where(np.isin(rows, [0, 11]), 16.0, 1.0))
    assert min(np.abs(kinds.covariances - at_ends).max(axis=(1, 2))) < 1e-5
    assert kinds.autocorrelation(0) == pytest.approx(-1 / 6, abs=0.08)
    found = [np.abs(c - walk).max() < 1e-5 for c in kinds.covariances].index(True)
    assert kinds.autocorrelation(found) > 0.3


def test_votes_grow_without_end_and_no_signal_decides_alone():
    gains = np.array([-50.0, 0.0, 2.0, 10.0, 100.0, 1e4])
    counted = votes(gains)
    assert (np.diff(counted) > 0).all()
    assert counted[0] == pytest.approx(-np.log(2))
    # Five signals with four nats each outweigh one with a thousand.
    assert 5 * votes(np.array(4.0)) > votes(np.array(1e3)) + 4 * votes(np.array(0.0))


@pytest.mark.parametrize("kind", ["jump", "bend"])
def test_evidence_never_falls_as_a_change_grows(kind):
    rng = np.random.default_rng(1)
    noise = {
        "white": rng.standard_normal((20, 14, 4)),
        "walk": np.cumsum(rng.standard_normal((20, 14, 4)), axis=1),
    }
    change = Change(kind, 6)
    curve, evidence = change_curves(14, [change]), evidence_for_change(14)
    at = evidence.candidates.index(change)
    for series in noise.values():
        found = [
            votes(evidence.gains(series + size * curve, every_kind(14))[at]).sum(axis=0).mean()
            for size in (0, 2, 4, 8, 16, 32, 64, 128, 1000)
        ]
        assert (np.diff(found) > 0).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 30), st.integers(2, 6))
def test_order_units_and_straight_drift_do_not_matter(seed, n_rows, n_signals):
    rng = np.random.default_rng(seed)
    series = rng.standard_normal((n_rows, n_signals))
    order = rng.permutation(n_signals)
    changed = standardized(5 - 1e3 * series[:, order] + 70 * np.arange(n_rows)[:, None])
    evidence = evidence_for_change(n_rows)
    first, second = (
        votes(evidence.gains(s[None], every_kind(n_rows))).sum(axis=1) for s in (series, changed)
    )
    assert np.allclose(first, second, rtol=1e-3, atol=1e-2)


def test_regenerated_series_have_the_covariance_and_correlation_they_are_drawn_with():
    kinds = gradual_kinds(8)
    walk = kinds.words.index("wandering") + 2
    weights = np.zeros((len(kinds.words), 2))
    weights[walk] = 1.0
    correlation = np.array([[1.0, 0.7], [0.7, 1.0]])
    like = Regenerator(8, weights, np.full_like(weights, 2.0), correlation, walk)
    rng = np.random.default_rng(0)
    drawn = like.draw(20_000, rng)
    steps = np.diff(drawn, axis=1).reshape(-1, 2)
    found = np.cov(drawn[..., 0].T)
    assert np.allclose(found, 4 * kinds.covariances[walk], rtol=0.1, atol=0.2)
    assert np.corrcoef(steps.T)[0, 1] == pytest.approx(0.7, abs=0.02)


def test_kinds_and_correlations_are_read_off_the_signals_jump_or_not():
    rng = np.random.default_rng(2)
    shared = rng.standard_normal((28, 1))
    white = np.sqrt(0.7) * shared + np.sqrt(0.3) * rng.standard_normal((28, 8))
    evidence = evidence_for_change(28)
    between = ~np.eye(8, dtype=bool)
    alone = regenerator(evidence, rng.standard_normal((28, 8)))
    assert np.abs(alone.correlation[between]).mean() < 0.15
    for size in (0.0, 100.0):
        jump = size * change_curves(28, [Change("jump", 12)])
        like = regenerator(evidence_for_change(28, (Change("jump", 12),)), white + jump)
        assert like.correlation[between].mean() == pytest.approx(0.7, abs=0.15)
    walk = regenerator(evidence, np.cumsum(rng.standard_normal((28, 8)), axis=0))
    words = gradual_kinds(28).words
    assert "wandering" in words[walk.common]


@pytest.mark.parametrize("effect", [10.0, 100.0])
@pytest.mark.parametrize("noise", ["white", "random_walk"])
def test_sharp_jumps_are_found_whatever_their_size(effect, noise):
    made = ml.synthetic.synthetic_signals(24, 6, effect=effect, noise=noise, seed=3)
    found = ml.segment_blocks(made.signals, **FAST)
    assert found.boundaries == made.boundaries
    assert found.supported
    assert [one.kind for one in found.found] == ["jump", "jump"]
    assert [one.block for one in found.found] == list(made.boundaries)
    assert all(len(one.signals) == 6 for one in found.found)
    assert found.p_value < 0.05
    assert list(found.segments) == ["local", "intermediate", "global"]
    assert sum(s.weight for s in found.by_signal.values()) == pytest.approx(1)
    assert found.probability.sum() == pytest.approx(2)
    text = found.summary()
    assert "Two boundaries" in text
    assert f"A sharp change at block {made.boundaries[0]}, shared by 6 of 6 signals" in text


def test_sizes_are_told_in_units_of_a_typical_blocks_change():
    steps = np.resize([1.0, -1.0, 2.0, -2.0, 0.5], 40)
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.permuted(np.tile(steps[:, None], 5), axis=0), axis=0)
    walk[20:] += 60.0
    found = ml.segment_blocks(walk, **FAST)
    assert [one.block for one in found.found] == [20]
    assert found.found[0].size == pytest.approx(60, rel=0.15)


def test_bends_are_found_and_called_bends():
    made = ml.synthetic.synthetic_signals(30, 8, n_boundaries=1, kind="bends", effect=3.0, seed=5)
    found = ml.segment_blocks(made.signals, n_boundaries=1, **FAST)
    assert found.found[0].kind == "bend"
    assert abs(found.found[0].block - made.boundaries[0]) <= 1
    assert "A bend at block" in found.summary()


def test_a_change_of_one_signal_alone_is_listed_and_not_counted():
    signals = np.random.default_rng(7).standard_normal((30, 6))
    signals[11:, 2] += 40.0
    found = ml.segment_blocks(signals, names=list("abcdef"), **FAST)
    assert found.n_boundaries == 0
    assert [(one.block, one.signals) for one in found.alone] == [(11, ("c",))]
    assert "of c alone at block 11" in found.summary()
    assert not found.supported


def transitions_apart(seed, sizes, rows, widths):
    """Curves that wander together, each with a transition of its own size, row and width."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((24, 1))
    curves = np.cumsum(common + 0.8 * rng.standard_normal((24, len(sizes))), axis=0)
    blocks = np.arange(24)[:, None]
    return curves + np.multiply(sizes, np.clip((blocks - rows + 1) / widths, 0, 1))


@pytest.mark.parametrize("seed", [2, 4, 5, 6])
def test_signals_that_wander_together_may_change_a_block_apart(seed):
    """All together, they are held against walks that repeat one another; one of them is not."""
    rows, widths = np.array([8, 9, 8, 8, 9]), np.array([1, 1, 2, 3, 2])
    names = list("abcde")
    curves = transitions_apart(seed, [40, 15, -15, 12, 0], rows, widths)
    found = ml.segment_blocks(curves, names=names, **FAST)
    assert [one.block for one in found.found] == [8]
    assert {"a", "c"} <= set(found.found[0].signals)
    assert found.found[0].p_value < 0.05
    assert found.alone == ()
    assert _judged(evidence_for_change(22), standardized(curves[1:-1]))[1] > 0.05
    # With one signal's change alone, or another's elsewhere, they are listed and not counted.
    elsewhere = rows + np.array([0, 0, 8, 0, 0])
    for sizes in ([40, 0, 0, 0, 0], [40, 0, 15, 0, 0]):
        curves = transitions_apart(seed, sizes, elsewhere, widths)
        apart = ml.segment_blocks(curves, names=names, **FAST)
        assert apart.n_boundaries == 0
        assert apart.p_value > 0.05
        assert (8, ("a",)) in [(one.block, one.signals) for one in apart.alone]


@pytest.mark.parametrize("seed", [11, 13])
def test_what_part_of_a_transition_made_likely_does_not_outlast_the_whole_of_it(seed):
    """Transitions hundreds of times a step, which several changes make up together."""
    rows, widths = np.array([7, 8, 9, 8, 8, 9, 7, 8]), np.array([1, 2, 3, 3, 1, 2, 3, 2])
    rng = np.random.default_rng(seed + 100)
    sizes = 64 * np.exp(rng.standard_normal(8)) * rng.choice([-1, 1], 8)
    search = seek_changes(standardized(transitions_apart(seed, sizes, rows, widths)[1:-1]))
    assert len(search.places) == 1
    assert len(search.changes) > 3
    assert 5 <= search.places[0].lead.row <= 8
    assert search.last > 0.05


def test_others_that_show_what_is_too_little_for_a_boundary_are_named():
    signals = np.random.default_rng(7).standard_normal((30, 6))
    signals[11:, 2] += 40.0
    inner = standardized(signals[1:-1])
    search = seek_changes(inner)
    (place,) = search.places
    assert place.alone == 2
    few = replace(place, gains=place.gains + np.eye(6)[3] * 50.0)
    assert _described(place, inner, search, "abcdef", 1).signals == ("c",)
    assert _described(few, inner, search, "abcdef", 1).signals == ("c", "d")


def test_a_copy_of_the_one_signal_that_changes_does_not_share_it():
    signals = np.random.default_rng(7).standard_normal((30, 6))
    signals[11:, 2] += 40.0
    signals[:, 3] = 3 * signals[:, 2]
    found = ml.segment_blocks(signals, **FAST)
    assert found.n_boundaries == 0
    assert found.p_value > 0.05


def test_a_transition_over_two_rows_is_one_boundary():
    signals = np.random.default_rng(6).standard_normal((24, 6))
    share = np.random.default_rng(7).uniform(0.3, 0.7, 6)
    signals[10:] += 40 * share
    signals[11:] += 40 * (1 - share)
    found = ml.segment_blocks(signals, **FAST)
    assert found.n_boundaries == 1
    assert found.found[0].block in (10, 11)
    assert found.found[0].size == pytest.approx(40, rel=0.5)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("noise", ["white", "random_walk"])
def test_jumps_over_several_blocks_are_one_boundary(width, noise):
    # The median size of a normal step, of two blocks' noise or of one's.
    right, typical = 0, 0.674 * (2**0.5 if noise == "white" else 1.0)
    for seed in range(8):
        made = ml.synthetic.synthetic_signals(
            26, 7, n_boundaries=1, effect=30.0, width=width, noise=noise, seed=seed
        )
        found = ml.segment_blocks(made.signals, **FAST)
        assert found.p_values[1] < 0.05
        if [(one.block, one.width) for one in found.found] == [(made.boundaries[0], width)]:
            right += 1
            assert found.found[0].size == pytest.approx(30 / typical, rel=0.5)
            assert f", over {width} blocks, shared by 7 of 7" in found.summary()
    # One may be placed a block away, its steps told apart, or a bend, at the end.
    assert right >= 6


def test_the_first_and_the_last_block_are_told_apart():
    signals = np.random.default_rng(8).standard_normal((24, 6))
    plain = ml.segment_blocks(signals, **FAST)
    signals[0] += 50.0
    signals[-1, :4] -= 80.0
    found = ml.segment_blocks(signals, names=list("abcdef"), **FAST)
    assert found.n_boundaries == plain.n_boundaries == 0
    assert found.p_values == plain.p_values
    first, last = found.edges
    assert (first.block, first.signals) == (0, tuple("abcdef"))
    assert (last.block, last.signals) == (23, tuple("abcd"))
    assert min(first.size, last.size) > 20
    assert "The first block changes 6 of 6 signals" in found.summary()


def test_tables_keep_their_names_and_sites_bear_their_block():
    rng = np.random.default_rng(9)
    levels = pd.DataFrame(np.cumsum(rng.standard_normal((25, 4)), axis=0), columns=list("wxyz"))
    # Block 9 makes it: site 9 is before that block, site 10 after it.
    levels.iloc[10:] += 50.0
    found = ml.segment_blocks(levels, rows="sites", **FAST)
    assert found.n_layers == 24
    assert list(found.by_signal) == list("wxyz")
    assert [one.block for one in found.found] == [9]
    assert found.found[0].signals == tuple("wxyz")
    assert found.signals.shape == (24, 4)
    after = ml.segment_blocks(levels.iloc[1:], **FAST)
    assert [one.block for one in after.found] == [9]


NULLS = {
    "flat": {},
    "quadratic": {"drift": "quadratic"},
    "exponential": {"drift": "exponential"},
    "sigmoid": {"drift": "sigmoid"},
    "random walk": {"noise": "random_walk"},
    "correlated": {"noise": "random_walk", "correlation": 0.5},
    "heavy": {"tails": "heavy"},
    "heavy walk": {"tails": "heavy", "noise": "random_walk"},
    "ends": {"noise_size": "ends"},
    "growing": {"noise_size": "growing"},
}


@pytest.mark.parametrize("null", NULLS)
def test_no_boundary_is_found_in_gradual_change(null):
    """30 draws; more than 5 rejections at 0.05 have a probability of 0.3%."""
    seen = ml.synthetic.power(16, 5, n_boundaries=0, **NULLS[null], n_simulations=30)
    assert seen.rejected <= 5 / 30
    assert seen.chosen[0] >= 25 / 30


@pytest.mark.parametrize("noise", [{"autocorrelation": 0.6}, {"noise": "random_walk"}])
def test_curves_are_gradual_whatever_the_noise_on_them(noise):
    """20 draws; more than 4 rejections at 0.05 have a probability of 0.3%."""
    rejected = 0
    for seed in range(20):
        made = ml.synthetic.synthetic_signals(
            32, n_boundaries=0, drift="logarithm", drift_size=25.0, seed=seed, **noise
        )
        series = standardized(made.signals[1:-1])
        rejected += seek_changes(series).first.p_value < 0.05
    assert rejected <= 4


def test_six_blocks_are_tested_too():
    seen = ml.synthetic.power(6, 3, n_boundaries=0, n_simulations=60)
    assert seen.rejected <= 8 / 60


@pytest.mark.parametrize(
    "planted",
    [
        {"n_layers": 16, "n_signals": 5, "n_boundaries": 1},
        {"n_layers": 16, "n_signals": 6, "n_boundaries": 1, "noise": "random_walk", "share": 2 / 3},
        {"n_layers": 24, "n_signals": 5, "n_boundaries": 2, "drift": "quadratic"},
        {"n_layers": 24, "n_signals": 5, "n_boundaries": 1, "kind": "bends"},
    ],
    ids=["jump", "walk", "two on quadratic", "bend"],
)
def test_power_never_falls_with_size(planted):
    seen = [
        ml.synthetic.power(effect=e, n_simulations=16, **planted).rejected for e in (1, 4, 16, 100)
    ]
    # Two of 16 draws are within the error.
    assert (np.diff(seen) >= -2 / 16).all()
    assert min(seen[2:]) >= 15 / 16


def test_numbers_that_no_test_was_made_of_have_no_small_p_value():
    """Of two jumps in seven blocks, nothing is left that a third could be told by."""
    rng = np.random.default_rng(0)
    signals = rng.standard_normal((7, 3))
    for row in (2, 3):
        signals[row:] += 1e4 * rng.standard_normal(3)
    found = ml.segment_blocks(signals, n_boundaries=1, min_size=1, **FAST)
    assert found.n_boundaries == 1
    assert found.p_values[1] < 0.05
    assert found.p_values[2] == found.p_values[3] == 1


def test_smooth_curves_without_noise_hold_no_boundary():
    """A network without any sharp change has curves that are exact to many digits."""
    depth = np.linspace(0, 1, 30)[:, None]
    rates = np.linspace(1, 5, 8)
    for smooth in (np.sin(rates * depth), 1 / (1 + rates * depth)):
        found = ml.segment_blocks(smooth, **FAST)
        assert found.n_boundaries == 0


def test_power_where_noise_is_half_the_jump():
    """Of four in five at 24 blocks, 13 of 24 draws or fewer have a probability of 0.3%."""
    seen = ml.synthetic.power(24, 8, n_boundaries=1, effect=3.0, n_simulations=24)
    assert seen.rejected >= 22 / 24
    seen = ml.synthetic.power(30, 8, n_simulations=24)
    assert seen.rejected >= 18 / 24


def test_intervals_hold_planted_boundaries_and_replicates_widen_them():
    hits = 0
    for seed in range(12):
        made = ml.synthetic.synthetic_signals(24, 6, effect=4.0, seed=seed)
        found = ml.segment_blocks(made.signals, n_bootstraps=60)
        hits += sum(
            any(low <= true <= high for low, high in found.intervals) for true in made.boundaries
        )
    assert hits >= 21
    noise = np.random.default_rng(0).standard_normal((50, 24, 6)) * 2.5
    wider = ml.segment_blocks(made.signals, replicates=made.signals + noise, **FAST)
    alone = ml.segment_blocks(made.signals, **FAST)
    assert np.ptp(wider.intervals, axis=1).sum() > np.ptp(alone.intervals, axis=1).sum()
    assert wider.p_values == alone.p_values


def test_leaving_out_the_only_signals_that_jump_leaves_nothing():
    signals = np.random.default_rng(11).standard_normal((24, 5))
    signals[12:, :2] += 30.0
    found = ml.segment_blocks(signals, n_boundaries=1, **FAST)
    assert {"signal 0", "signal 1"} <= set(found.found[0].signals)
    assert len(found.found[0].signals) <= 3
    assert found.by_signal["signal 4"].boundaries == (12,)
    assert found.by_signal["signal 4"].p_value < 0.01
    assert found.by_signal["signal 0"].weight > 0.3
    rest = ml.segment_blocks(signals[:, 2:], n_boundaries=1, **FAST)
    assert rest.n_boundaries == 0
    assert rest.p_value > 0.05
    # Nor does any other noise as long hold something, in the mean.
    noise = np.random.default_rng(12).standard_normal((10, 24, 3))
    others = [ml.segment_blocks(one, n_boundaries=1, **FAST).p_value for one in noise]
    assert np.mean(others) > 0.35
    # Of one signal alone, which is no boundary.
    signals[12:, 1] -= 30.0
    found = ml.segment_blocks(signals, n_boundaries=1, **FAST)
    assert found.n_boundaries == 0
    assert [one.signals for one in found.alone] == [("signal 0",)]
    assert found.by_signal["signal 0"].p_value > 0.2


def test_the_same_seed_gives_the_same_partition():
    signals = ml.synthetic.synthetic_signals(16, 6, seed=4).signals
    first, second = (ml.segment_blocks(signals, **FAST, seed=9) for _ in range(2))
    assert first == second
    assert first != ml.segment_blocks(signals, **FAST, seed=10)


def test_few_blocks_and_wandering_signals_are_warned_of():
    short = ml.segment_blocks(ml.synthetic.synthetic_signals(8, 6, seed=0).signals, **FAST)
    assert any("little power" in note for note in short.warnings)
    narrow = ml.segment_blocks(ml.synthetic.synthetic_signals(30, 4, seed=0).signals, **FAST)
    assert any("30 blocks and 4 signals leave little power" in note for note in narrow.warnings)
    wandering = ml.synthetic.synthetic_signals(40, 8, n_boundaries=0, noise="random_walk", seed=0)
    assert any("wander" in n for n in ml.segment_blocks(wandering.signals, **FAST).warnings)
    for made in ({"effect": 4.0}, {"n_boundaries": 0}):
        plain = ml.synthetic.synthetic_signals(30, 8, seed=2, **made)
        assert not ml.segment_blocks(plain.signals, **FAST).warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:5], "at least 6 blocks, got 5"),
        (lambda s: np.where(s == s[3, 1], np.nan, s), "NaN or infinite in b"),
        (lambda s: np.where(s == s[3, 1], np.inf, s), "NaN or infinite in b"),
        (lambda s: np.column_stack([s[:, :1], np.ones(len(s)), s[:, 2:]]), "constant: b"),
        (lambda s: np.column_stack([s[:, 0], np.arange(12) == 0, s[:, 2]]), "constant: b"),
        (lambda s: s * [1, 1e300, 1], "sizes from 1e-100 to 1e\\+100, .* got others in b"),
        (lambda s: s * [1, 1, 1e-300], "sizes from 1e-100 to 1e\\+100, .* got others in c"),
        (lambda s: s[:, :2], "names must be 2 different names"),
        (lambda s: s[None], "must have shape"),
        (lambda s: pd.DataFrame(s), "names must be left out for a table"),
    ],
)
def test_bad_signals_are_named(change, message):
    signals = ml.synthetic.synthetic_signals(12, 3, seed=0).signals
    with pytest.raises(ValueError, match=message):
        ml.segment_blocks(change(signals), names=["a", "b", "c"], **FAST)


def test_text_in_a_table_is_named():
    table = pd.DataFrame({"a": np.arange(12.0) ** 2, "layer": ["x"] * 12})
    with pytest.raises(ValueError, match="got none in layer"):
        ml.segment_blocks(table, **FAST)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"n_boundaries": 0}, "n_boundaries must be 1 to 3"),
        ({"n_boundaries": 4}, "n_boundaries must be 1 to 3"),
        ({"min_size": 5}, "lower min_size"),
        ({"min_size": 0}, "min_size"),
        ({"n_bootstraps": 10}, "n_bootstraps must be at least 20"),
        ({"rows": "layers"}, "rows must be one of"),
        ({"replicates": np.zeros((4, 3, 3))}, "replicates must have shape"),
    ],
)
def test_bad_settings_are_named(settings_, message):
    signals = ml.synthetic.synthetic_signals(12, 3, seed=0).signals
    with pytest.raises(ValueError, match=message):
        ml.segment_blocks(signals, **(FAST | settings_))


def test_six_blocks_and_one_signal_are_enough_to_say_that_nothing_can_be_told():
    found = ml.segment_blocks(np.random.default_rng(0).standard_normal(6), **FAST)
    assert found.n_boundaries == 0
    assert found.by_signal["signal 0"].p_value is None


def test_synthetic_signals_are_what_they_say():
    noise = ml.synthetic.synthetic_signals(
        2000, 8, n_boundaries=0, correlation=0.5, autocorrelation=0.6
    )
    between = np.corrcoef(noise.signals.T)[np.triu_indices(8, 1)].mean()
    lagged = (noise.signals[1:] * noise.signals[:-1]).mean() / (noise.signals**2).mean()
    assert between == pytest.approx(0.5, abs=0.06)
    assert lagged == pytest.approx(0.6, abs=0.06)
    assert noise.signals.var() == pytest.approx(1.0, abs=0.1)
    made = ml.synthetic.synthetic_signals(300, 40, effect=50.0, seed=1)
    jumps = [
        made.signals[b : b + 40].mean(0) - made.signals[b - 40 : b].mean(0) for b in made.boundaries
    ]
    assert np.abs(np.abs(jumps) - 50).max() < 3
    assert ml.synthetic.synthetic_signals(12, 3, n_boundaries=0).boundaries == ()
    bends = ml.synthetic.synthetic_signals(60, 5, kind="bends", effect=1e6, seed=2)
    bend = np.abs(np.diff(bends.signals, n=2, axis=0)).sum(axis=1)
    # A rate that changes at block b moves that block first.
    assert sorted(np.argsort(bend)[-2:] + 2) == list(bends.boundaries)
    assert np.abs(np.diff(bends.signals[bends.boundaries[0] - 3 :][:6], n=2, axis=0)).max() > 9e5
    few = ml.synthetic.synthetic_signals(60, 9, effect=1e6, share=1 / 3, n_boundaries=1, seed=3)
    assert (np.abs(np.diff(few.signals, axis=0)).max(axis=0) > 1e5).sum() == 3
    heavy = ml.synthetic.synthetic_signals(4000, 8, n_boundaries=0, tails="heavy").signals
    assert (np.abs(heavy) > 5).mean() > 0.001
    assert np.median(np.abs(heavy)) == pytest.approx(0.765 / np.sqrt(3), rel=0.05)
    ends = ml.synthetic.synthetic_signals(12, 4000, n_boundaries=0, noise_size="ends").signals.std(
        axis=1
    )
    assert np.allclose(ends, [4, 4, *[1] * 8, 4, 4], rtol=0.1)
    growing = ml.synthetic.synthetic_signals(12, 4000, n_boundaries=0, noise_size="growing").signals
    assert growing[-1].std() / growing[0].std() == pytest.approx(np.exp(3), rel=0.1)
    spread = ml.synthetic.synthetic_signals(40, 4, n_boundaries=1, effect=1e6, width=3, seed=4)
    rises = np.abs(np.diff(spread.signals, axis=0)).min(axis=1)
    blocks = spread.boundaries[0] + np.arange(3)
    assert sorted(np.argsort(rises)[-3:] + 1) == blocks.tolist()
    assert rises[blocks - 1] == pytest.approx(1e6 / 3, rel=1e-3)
    walk = ml.synthetic.synthetic_signals(12, 4000, n_boundaries=0, noise="random_walk").signals
    assert walk[-1].var() == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 3), "n_layers"),
        ((12, 0), "n_signals"),
        ((12, 3, {"n_boundaries": 6}), "n_boundaries"),
        ((12, 3, {"correlation": 1.0}), "correlation"),
        ((12, 3, {"drift": "steep"}), "drift must be one of"),
        ((12, 3, {"kind": "slopes"}), "kind must be one of jumps, bends, both"),
        ((12, 3, {"share": 0.0}), "share must be above 0"),
        ((12, 3, {"width": 4}), "width must be 1 to 3 blocks, got 4"),
        ((12, 3, {"tails": "long"}), "tails must be one of"),
    ],
)
def test_impossible_synthetic_signals_are_refused(arguments, message):
    *sizes, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        ml.synthetic.synthetic_signals(*sizes, **options)


def test_ranks_make_monotone_columns_straight_and_ties_equal():
    depth = np.arange(10.0)
    ranks = rank_normalize(np.column_stack([np.exp(depth), -(depth**3), np.repeat([0.0, 1.0], 5)]))
    assert np.allclose(np.diff(ranks[:, 0], n=2), 0)
    assert np.allclose(ranks[:, 0], -ranks[:, 1])
    assert len(set(ranks[:, 2].round(9))) == 2
    assert np.allclose(ranks.mean(axis=0), 0)
    assert np.allclose(ranks[:, :2].var(axis=0), 1)
