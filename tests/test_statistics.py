"""Intervals against closed forms and plain twins."""

from __future__ import annotations

import numpy as np
from scipy import stats

from mspgt_lens.statistics import cluster_interval, fold_interval, jackknife_interval


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
