"""The boundary test: against brute force, on planted boundaries, and on drift without any."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp

import mspgt_lens as ml
from mspgt_lens.scales.drift import NOISES, Fit, Noise, legendre, logistic, steps
from mspgt_lens.scales.evidence import search_plan
from mspgt_lens.scales.mixture import describe
from mspgt_lens.scales.normalizing import has_even_noise, noise_normalize, rank_normalize
from mspgt_lens.scales.segments import compare_with_drift, summarize_places
from mspgt_lens.scales.synthetic import DRIFTS

pytestmark = pytest.mark.simulation

FAST = {"n_draws": 199, "n_bootstraps": 50}


def covariance(noise, n):
    """Of noise along depth, by its definition."""
    t = np.arange(n)
    if noise.kind == "autoregressive":
        # Innovations of variance 1.
        return noise.size ** np.abs(np.subtract.outer(t, t)) / (1 - noise.size**2)
    walk = np.array([[min(a, b) + 1 for b in t] for a in t]) * noise.size
    return walk + np.eye(n) if noise.kind == "local level" else walk + 10 * n


def residual(matrix, basis, noise):
    """Sum of squares that generalized least squares leaves, the long way."""
    inverse = np.linalg.inv(covariance(noise, len(matrix)))
    solution = np.linalg.solve(basis.T @ inverse @ basis, basis.T @ inverse @ matrix)
    left = matrix - basis @ solution
    return np.trace(left.T @ inverse @ left)


def score(matrix, basis, noise):
    """Log-likelihood charged by the Bayesian criterion; noise has what ranks cannot resolve."""
    n, m = matrix.shape
    left = residual(matrix, basis, noise) + (matrix**2).sum() / n**2
    return (
        -m / 2 * np.linalg.slogdet(covariance(noise, n))[1]
        - n * m / 2 * np.log(left)
        - m * basis.shape[1] * np.log(n) / 2
    )


def placements(n_layers, n_jumps):
    return [
        places
        for places in itertools.combinations(range(2, n_layers - 1), n_jumps)
        if all(b - a >= 2 for a, b in itertools.pairwise(places))
    ]


@pytest.mark.parametrize("n_jumps", [1, 2, 3])
@pytest.mark.parametrize("n_layers", [9, 14])
def test_the_evidence_is_the_sum_over_everything(n_jumps, n_layers):
    """Every placement, order and noise, by brute force from the noise's covariance."""
    matrix = noise_normalize(ml.synthetic.synthetic_signals(n_layers, 4, seed=3).signals)
    plan = search_plan(n_layers, 2)
    search = plan.search(matrix[None], place=(n_jumps,))

    def scores(noise, order, count):
        return [
            score(matrix, np.column_stack([legendre(n_layers, order), steps(n_layers, p)]), noise)
            for p in placements(n_layers, count)
        ]

    cells = list(itertools.product(NOISES, plan.orders_beneath))
    if n_jumps == 3:
        # Three jumps are weighed at the noise and order that are best for two.
        cells = [max(cells, key=lambda cell: max(scores(*cell, 2)))]
    by_place = logsumexp([scores(*cell, n_jumps) for cell in cells], axis=0)
    expected = logsumexp(by_place) - np.log(len(by_place))
    assert search.evidence[n_jumps][0] == pytest.approx(expected, rel=1e-4)
    every = np.array(placements(n_layers, n_jumps))
    # A neighbor counts half for every jump that lies one block away.
    near = (1 - np.abs(every[:, None] - every[None]) / 2).clip(min=0)
    near = np.where(near < 0.5, 0, near).prod(axis=2)
    around = near @ np.exp(by_place - by_place.max())
    assert tuple(search.places[n_jumps][0]) == tuple(every[around.argmax()])


@pytest.mark.parametrize("n_layers", [7, 14])
def test_the_evidence_for_drift_is_the_sum_over_polynomials_and_logistics(n_layers):
    matrix = rank_normalize(
        ml.synthetic.synthetic_signals(n_layers, 4, drift="sigmoid", seed=3).signals
    )
    plan = search_plan(n_layers, 2)
    terms = [score(matrix, legendre(n_layers, o), noise) for noise in NOISES for o in plan.orders]
    for noise, degree in itertools.product(NOISES, plan.logistic_degrees):
        curves = [logistic(n_layers, *shape) for shape in plan.logistic_shapes]
        mine = [
            score(matrix, np.column_stack([legendre(n_layers, degree), c]), noise) for c in curves
        ]
        if mine:
            terms.append(logsumexp(mine) - np.log(len(mine)))
    found = plan.search(matrix[None], max_jumps=1).evidence[0][0]
    assert found == pytest.approx(logsumexp(terms), rel=1e-4)


def test_descriptions_weigh_by_restricted_likelihood():
    """Against the determinants and the residual of the long way, in any units of the basis."""
    matrix = noise_normalize(ml.synthetic.synthetic_signals(10, 3, seed=1).signals)
    n, m = matrix.shape
    mixture = describe(search_plan(n, 2), matrix, (4, 7))
    logs = []
    for fit in mixture.fits:
        basis = fit.basis * 3.0
        inverse = np.linalg.inv(covariance(fit.noise, n))
        freedom = (n - basis.shape[1]) * m / 2
        left = residual(matrix, basis, fit.noise) + (matrix**2).sum() / n**2
        logs.append(
            -m / 2 * np.linalg.slogdet(covariance(fit.noise, n))[1]
            - m / 2 * np.linalg.slogdet(basis.T @ inverse @ basis)[1]
            + m / 2 * np.linalg.slogdet(basis.T @ basis)[1]
            + gammaln(freedom)
            - freedom * np.log(left / 2)
            - m * basis.shape[1] * np.log(n) / 2
        )
    assert len(logs) == len(NOISES)
    assert np.allclose(mixture.weights, np.exp(logs - logsumexp(logs)), rtol=1e-6)


def test_noise_normalize_counts_in_units_of_the_noise():
    """Whatever drift and jumps lie above it; units and shifts do not matter."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, 5))
    gradual = np.linspace(0, 9, 400)[:, None] ** 2 + 5 * steps(400, [100, 300]).sum(1)[:, None]
    for signals in (noise, noise + gradual):
        assert np.diff(noise_normalize(signals), axis=0).var() == pytest.approx(2, rel=0.15)
    assert np.allclose(noise_normalize(3 - 7 * noise), -noise_normalize(noise))
    # A column without noise is known as finely as its ranks would tell.
    assert noise_normalize(np.linspace(0, 1, 40)[:, None]).std() == pytest.approx(40)


def test_uneven_noise_is_seen_and_even_noise_is_not():
    """At most 5% of even draws are called uneven; more than 18 of 200 have a probability of 1%."""
    depth = np.linspace(-1, 1, 30)[:, None]
    ends = np.where(np.minimum(np.arange(30), np.arange(30)[::-1]) < 2, 4.0, 1.0)[:, None]
    called = np.zeros(4)
    for seed in range(200):
        made = ml.synthetic.synthetic_signals(30, 8, seed=seed, drift="quadratic").signals
        noise = ml.synthetic.synthetic_signals(30, 8, n_boundaries=0, seed=seed).signals
        signs = np.resize([1, -1], 8)
        each = (noise, made, noise * ends, noise * np.exp(1.5 * signs * depth))
        called += [not has_even_noise(signals) for signals in each]
    assert called[0] <= 18
    assert called[1] <= 30
    assert called[2] >= 180
    assert called[3] >= 190
    # Nothing can be told of noise that is mostly nothing.
    assert not has_even_noise(np.repeat([0.0, 1.0, 3.0], 5)[:, None])


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
    fit = Fit(legendre(n, 1), (), Noise("autoregressive", rho, 1), "linear")
    drawn = fit.regenerate(noise, 200, rng) - fit.fitted(noise)
    lagged = (drawn[:, 1:] * drawn[:, :-1]).mean() / (drawn**2).mean()
    innovations = drawn[:, 1:] - rho * drawn[:, :-1]
    between = np.mean([np.corrcoef(one.T)[0, 1] for one in innovations])
    assert lagged == pytest.approx(rho, abs=0.03)
    assert between == pytest.approx(0.8, abs=0.04)


def test_regenerated_noise_wanders_as_the_fit_does():
    rng = np.random.default_rng(1)
    n, size = 300, 0.5
    noise = rng.standard_normal((n, 4)) + np.cumsum(np.sqrt(size) * rng.standard_normal((n, 4)), 0)
    local_level = Noise("local level", size, 1)
    fit = Fit(legendre(n, 0), (), local_level, "none")
    for drawn in (fit.regenerate(noise, 100, rng), fit.flip(noise, 100, rng)):
        for lag in (1, 20):
            change = drawn[:, lag:] - drawn[:, :-lag]
            assert change.var() == pytest.approx(2 + lag * size, rel=0.15)
    walks = np.cumsum(np.sqrt(size) * rng.standard_normal((4000, 30)), axis=1)
    walks = walks + rng.standard_normal(walks.shape)
    walks -= walks.mean(axis=1, keepdims=True)
    expected = 1 - (np.diff(walks) ** 2).mean() / (2 * (walks**2).sum(axis=1).mean() / 29)
    assert local_level.autocorrelation(30) == pytest.approx(expected, abs=0.03)
    assert Noise("autoregressive", 0.4, 2).autocorrelation(30) == 0.4


def test_planted_boundaries_are_found():
    made = ml.synthetic.synthetic_signals(30, 8, seed=2)
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
    made = ml.synthetic.synthetic_signals(30, 10, n_boundaries=n_boundaries, effect=4.0, seed=5)
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
    seen = ml.synthetic.power(20, 6, n_boundaries=0, **null, n_simulations=60, n_draws=99)
    assert seen.rejected <= 7 / 60
    assert seen.chosen[0] >= 53 / 60


@pytest.mark.parametrize("made", [{"effect": 4.0}, {"n_boundaries": 0}], ids=["jumps", "flat"])
def test_deciding_early_decides_the_same(made):
    signals = ml.synthetic.synthetic_signals(24, 6, seed=1, **made).signals
    full, early = (
        compare_with_drift(signals, 2, 399, np.random.default_rng(0), decide_only=only)
        for only in (False, True)
    )
    assert early.n_boundaries == full.n_boundaries == made.get("n_boundaries", 2)
    for k, p_value in early.p_values.items():
        assert (p_value < 0.05) == (full.p_values[k] < 0.05)
        # Of some of the draws: at least significant, and otherwise no larger than of all.
        assert p_value <= full.p_values[k] + 0.05
    if not early.n_boundaries:
        assert max(early.p_values.values()) < 0.7 * max(full.p_values.values())


def test_smooth_curves_without_noise_hold_no_boundary():
    """A network without any sharp change has curves that are exact to many digits."""
    depth = np.linspace(0, 1, 30)[:, None]
    rates = np.linspace(1, 5, 8)
    for smooth in (np.exp(rates * depth), np.sin(rates * depth), 1 / (1 + rates * depth)):
        found = ml.segment_blocks(smooth, **FAST)
        assert found.n_boundaries == 0
        assert found.p_value > 0.05


def test_power_where_noise_is_half_the_jump():
    """At 24 blocks and 8 signals: about 0.93 and 1 (docs/boundaries.md)."""
    seen = ml.synthetic.power(24, 8, n_simulations=30, n_draws=99)
    assert seen.rejected >= 25 / 30
    assert seen.located >= 25 / 30


def test_power_with_drift_beneath_the_jumps():
    """At 30 blocks and 8 signals, about 0.93 and 0.90; the best description alone: 0.72."""
    seen = ml.synthetic.power(30, 8, drift="quadratic", n_simulations=30, n_draws=99)
    assert seen.rejected >= 25 / 30
    assert seen.located >= 24 / 30


def test_intervals_hold_planted_boundaries():
    """40 draws, 80 intervals: fewer than 67 hits have a probability below 2% if 90% cover."""
    hits = 0
    plan = search_plan(24, 2)
    for seed in range(40):
        made = ml.synthetic.synthetic_signals(24, 6, seed=seed)
        matrix = noise_normalize(made.signals)
        found = tuple(plan.search(matrix[None], 2, place=(2,)).places[2][0])
        drawn = describe(plan, matrix, found).regenerate(99, np.random.default_rng(seed))
        places = plan.search(noise_normalize(drawn), 2, place=(2,)).places[2]
        hits += sum(
            min(low, b) <= true <= max(high, b)
            for true, b, (low, high) in zip(
                made.boundaries, found, summarize_places(places, 24)[0], strict=True
            )
        )
    assert hits >= 67


def test_replicates_widen_the_intervals():
    made = ml.synthetic.synthetic_signals(24, 8, effect=3.0, seed=1)
    noise = np.random.default_rng(0).standard_normal((50, *made.signals.shape)) * 2.5
    alone = ml.segment_blocks(made.signals, **FAST)
    wider = ml.segment_blocks(made.signals, replicates=made.signals + noise, **FAST)
    assert np.ptp(wider.intervals, axis=1).sum() > np.ptp(alone.intervals, axis=1).sum()
    assert wider.p_values == alone.p_values


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 30), st.integers(2, 6))
def test_order_and_units_of_signals_do_not_matter(seed, n_layers, n_signals):
    rng = np.random.default_rng(seed)
    signals = rng.standard_normal((n_layers, n_signals))
    order = rng.permutation(n_signals)
    plan = search_plan(n_layers, 2)

    def evidence(normalize, changed):
        return plan.search(normalize(changed)[None], max_jumps=2).evidence[2][0]

    for normalize, changed in (
        (noise_normalize, 5 - 1e3 * signals[:, order]),
        (rank_normalize, np.exp(signals[:, order]) * 1e3),
        (rank_normalize, -signals),
    ):
        assert evidence(normalize, changed) == pytest.approx(
            evidence(normalize, signals), rel=1e-4, abs=1e-2
        )


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
    wandering = ml.synthetic.synthetic_signals(40, 8, n_boundaries=0, autocorrelation=0.7, seed=0)
    assert any("wander" in n for n in ml.segment_blocks(wandering.signals, **FAST).warnings)
    assert not ml.segment_blocks(
        ml.synthetic.synthetic_signals(30, 8, seed=2).signals, **FAST
    ).warnings


def test_drift_that_bends_is_warned_of_where_blocks_are_few():
    bent = ml.synthetic.synthetic_signals(30, 8, n_boundaries=0, drift="quadratic", seed=0)
    (note,) = ml.segment_blocks(bent.signals, **FAST).warnings
    assert "bend gradually with depth (quadratic)" in note
    many = ml.synthetic.synthetic_signals(48, 8, n_boundaries=0, drift="quadratic", seed=0)
    assert not ml.segment_blocks(many.signals, **FAST).warnings


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
    signals = ml.synthetic.synthetic_signals(12, 3, seed=0).signals
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
    signals = ml.synthetic.synthetic_signals(12, 3, seed=0).signals
    with pytest.raises(ValueError, match=message):
        ml.segment_blocks(signals, **(FAST | settings_))


def test_six_blocks_and_one_signal_are_enough_to_say_that_nothing_can_be_told():
    found = ml.segment_blocks(np.random.default_rng(0).standard_normal(6), **FAST)
    assert found.n_boundaries == 0
    assert found.by_signal["signal 0"].p_value is None


def test_a_jump_in_the_reference_does_not_count_twice():
    """Two planted jumps: one more than the data hold is not chosen."""
    made = ml.synthetic.synthetic_signals(40, 8, effect=3.0, seed=8)
    tested = compare_with_drift(made.signals, 2, 199, np.random.default_rng(0))
    assert tested.n_boundaries == 2
    assert tested.p_values[3] < 0.05


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
    slopes = ml.synthetic.synthetic_signals(60, 5, kind="slopes", effect=1e6, seed=2)
    bend = np.abs(np.diff(slopes.signals, n=2, axis=0)).sum(axis=1)
    # A slope that changes at block b moves that block first.
    assert sorted(np.argsort(bend)[-2:] + 2) == list(slopes.boundaries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 3), "n_layers"),
        ((12, 0), "n_signals"),
        ((12, 3, {"n_boundaries": 6}), "n_boundaries"),
        ((12, 3, {"correlation": 1.0}), "correlation"),
        ((12, 3, {"drift": "steep"}), "drift must be one of"),
    ],
)
def test_impossible_synthetic_signals_are_refused(arguments, message):
    *sizes, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        ml.synthetic.synthetic_signals(*sizes, **options)
