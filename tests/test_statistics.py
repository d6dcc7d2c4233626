"""Intervals against closed forms and plain twins."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mspgt_lens.estimates import Estimate
from mspgt_lens.statistics import (
    bootstrap_interval,
    cliffs_delta,
    cluster_interval,
    fold_interval,
    holm,
    jackknife_interval,
    sign_flip_p_values,
)


def test_fold_interval_of_equal_folds_is_the_t_interval_of_their_scores():
    scores = np.random.default_rng(0).standard_normal((6, 3))
    mean, low, high = fold_interval(scores, np.full(6, 10.0))
    for point in range(3):
        expected = stats.t.interval(
            0.95, 5, loc=scores[:, point].mean(), scale=stats.sem(scores[:, point])
        )
        np.testing.assert_allclose([low[point], high[point]], expected)
        np.testing.assert_allclose(mean[point], scores[:, point].mean())


def test_fold_interval_weighs_folds_by_their_size():
    mean, _, _ = fold_interval(np.array([[0.0], [1.0]]), np.array([1.0, 3.0]))
    assert mean[0] == 0.75


def test_jackknife_of_a_mean_is_its_t_interval():
    scores = np.random.default_rng(1).standard_normal(8)
    without = np.array([[np.delete(scores, k).mean()] for k in range(8)])
    low, high = jackknife_interval(np.array([scores.mean()]), without)
    expected = stats.t.interval(0.95, 7, loc=scores.mean(), scale=stats.sem(scores))
    np.testing.assert_allclose([low[0], high[0]], expected)


def test_jackknife_interval_reaches_the_bias_corrected_value():
    """The plug-in variance is low by (n - 1) / n, which the jackknife corrects exactly."""
    scores = np.random.default_rng(2).standard_normal(12)
    without = np.array([[np.delete(scores, k).var()] for k in range(12)])
    low, high = jackknife_interval(np.array([scores.var()]), without)
    spread = without[:, 0]
    reach = stats.t.ppf(0.975, 11) * np.sqrt(11 / 12 * ((spread - spread.mean()) ** 2).sum())
    np.testing.assert_allclose(high[0], scores.var(ddof=1) + reach)
    np.testing.assert_allclose(low[0], scores.var() - reach)


def test_cluster_interval_of_single_positions_is_the_t_interval():
    scores = np.random.default_rng(3).standard_normal((20, 2))
    mean, low, high = cluster_interval(scores, np.arange(20))
    for point in range(2):
        expected = stats.t.interval(0.95, 19, loc=mean[point], scale=stats.sem(scores[:, point]))
        np.testing.assert_allclose([low[point], high[point]], expected)


@pytest.mark.simulation
def test_cluster_interval_covers_when_positions_of_a_group_are_alike():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(40), 25)
    hits = plain = 0
    for _ in range(300):
        scores = rng.standard_normal(40)[groups] + rng.standard_normal(1000)
        _, low, high = cluster_interval(scores[:, None], groups)
        hits += low[0] <= 0 <= high[0]
        _, low, high = cluster_interval(scores[:, None], np.arange(1000))
        plain += low[0] <= 0 <= high[0]
    assert hits >= 0.91 * 300
    # Without groups it would be far too sure of itself.
    assert plain < 0.6 * 300


@pytest.mark.parametrize("n_draws", [10_000, 400], ids=["every pattern", "drawn"])
def test_sign_flips_agree_with_scipy(n_draws):
    differences = np.random.default_rng(2).normal(0.4, 1.0, (10, 3))
    ours = sign_flip_p_values(differences, n_draws=n_draws)
    theirs = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
        axis=0,
    ).pvalue
    np.testing.assert_allclose(ours, theirs, atol=1e-12 if n_draws == 10_000 else 0.05)


def test_pairs_of_one_group_flip_together():
    differences = np.repeat(np.random.default_rng(3).normal(0.5, 1.0, (6, 2)), 4, axis=0)
    grouped = sign_flip_p_values(differences, np.repeat(np.arange(6), 4))
    np.testing.assert_allclose(grouped, sign_flip_p_values(differences[::4]))
    assert (grouped >= 2.0**-5).all()


def test_no_difference_is_no_evidence():
    np.testing.assert_array_equal(sign_flip_p_values(np.zeros((30, 2))), 1.0)


def test_holm_by_hand():
    np.testing.assert_allclose(
        holm(np.array([[0.01, 0.04], [0.03, 0.9]])), [[0.04, 0.09], [0.09, 0.9]]
    )


@pytest.mark.parametrize(("low", "high"), [(0.6, 1.0), (0.0, 0.4), (float("nan"), 1.0)])
def test_an_interval_holds_its_estimate(low, high):
    with pytest.raises(ValueError, match="must hold the value"):
        Estimate(0.5, low, high, "nats", "a number")
    assert str(Estimate(0.5, 0.25, 1.0, "nats", "a number")) == "0.5 nats (0.25 to 1)"


def test_cliffs_delta_by_counting():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 15), rng.integers(1, 7, 15)
    above = sum(a > b for a in x for b in y) - sum(a < b for a in x for b in y)
    delta, low, high = cliffs_delta(x, y)
    assert delta == above / 15**2
    assert -1 <= low <= delta <= high <= 1
    mirrored = cliffs_delta(y, x)
    np.testing.assert_allclose(mirrored, [-delta, -high, -low])


def test_variance_of_cliffs_delta_is_the_jackknifes():
    """Leaving one pair out at a time is an independent way to the same spread."""
    rng = np.random.default_rng(1)
    y = rng.standard_normal(200)
    x = 0.6 * y + rng.standard_normal(200) + 0.5
    _, low, high = cliffs_delta(x, y)
    without = [cliffs_delta(np.delete(x, i), np.delete(y, i))[0] for i in range(200)]
    reach = stats.t.ppf(0.975, 199) * np.sqrt(199 * np.var(without))
    assert high - low == pytest.approx(2 * reach, rel=0.03)


def test_no_change_has_a_delta_of_exactly_zero_and_full_separation_is_no_certainty():
    x = np.random.default_rng(2).standard_normal(30)
    assert cliffs_delta(x, x) == (0.0, 0.0, 0.0)
    delta, low, high = cliffs_delta(x + 100, x)
    assert (delta, high) == (1.0, 1.0)
    assert 0.5 < low < 1
    assert cliffs_delta(x, x + 100) == (-1.0, -1.0, -low)


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("shift", "shared", "per_group"), [(0, 0, 1), (0.7, 0.8, 1), (0.7, 0.5, 4)]
)
def test_interval_of_cliffs_delta_covers(shift, shared, per_group):
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), per_group)

    def draw():
        return np.sqrt(0.5) * (rng.standard_normal(40)[groups] + rng.standard_normal(len(groups)))

    truth = 2 * stats.norm.cdf(shift / np.sqrt(2)) - 1
    hits = 0
    for _ in range(400):
        both = np.sqrt(shared) * draw()
        x, y = (both + np.sqrt(1 - shared) * draw() for _ in range(2))
        _, low, high = cliffs_delta(x + shift, y, groups)
        hits += low <= truth <= high
    assert 0.92 * 400 <= hits <= 0.985 * 400


def test_bootstrap_of_single_pairs_is_scipys():
    values = np.random.default_rng(4).exponential(size=(25, 1))
    mean, low, high = bootstrap_interval(values)
    theirs = stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=20_000, random_state=np.random.default_rng(9)
    ).confidence_interval
    assert mean[0] == pytest.approx(values.mean())
    np.testing.assert_allclose([low[0], high[0]], theirs, atol=0.03)


def test_bootstrap_resamples_groups():
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(30), 10)
    hits = plain = 0
    for _ in range(60):
        values = (rng.standard_normal(30)[groups] + 0.3 * rng.standard_normal(300))[:, None]
        _, low, high = bootstrap_interval(values, groups, n_draws=400)
        hits += low[0] <= 0 <= high[0]
        _, low, high = bootstrap_interval(values, n_draws=400)
        plain += low[0] <= 0 <= high[0]
    assert hits >= 0.85 * 60
    assert plain < 0.7 * 60


def test_bootstrap_of_a_constant_is_that_constant():
    assert [end.tolist() for end in bootstrap_interval(np.full((9, 2), 3.0))] == [[3.0, 3.0]] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cliffs_delta(np.ones(1), np.ones(1)), "at least two"),
        (lambda: cliffs_delta(np.ones(4), np.ones(4), np.zeros(4, int)), "at least two"),
        (lambda: cliffs_delta(np.array([1.0, np.nan]), np.ones(2)), "finite"),
        (lambda: cliffs_delta(np.ones(3), np.ones(2)), "one length"),
        (lambda: cliffs_delta(np.ones(3), np.ones(3), np.zeros(2, int)), "one label per pair"),
        (lambda: bootstrap_interval(np.full((3, 1), np.nan)), "finite"),
        (lambda: bootstrap_interval(np.ones((0, 1))), "at least two"),
    ],
)
def test_intervals_over_groups_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
