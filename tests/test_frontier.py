"""The Gaussian bottleneck and the hierarchy of scales against closed forms and optimization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import N_FOLDS, draw, moments_of
from scipy import optimize, stats

import mspgt_lens as ml
from mspgt_lens.information.frontier import gaussian_frontier, relevance_at_rate
from mspgt_lens.information.readers import read_targets
from mspgt_lens.information.site_reader import Residuals, chain_log_ratio, log_ratio

CORRELATIONS = np.array([0.9, 0.6, 0.35, 0.0])


def components(rho: float, log_gain: float) -> tuple[float, float]:
    """I(T;Z) and I(T;Y) in nats of T = gain Z + noise; Z and Y are standard and correlated."""
    gain = np.exp(2 * log_gain)
    rate = 0.5 * np.log1p(gain)
    return rate, rate - 0.5 * np.log1p(gain * (1 - rho**2))


@pytest.mark.parametrize("beta", [1.0, 1.2, 3.0, 10.0, 400.0])
def test_the_closed_form_is_what_minimization_finds(beta):
    rates, relevances = [], []
    for rho in CORRELATIONS:

        def objective(log_gain, rho=rho):
            rate, relevance = components(rho, log_gain)
            return rate - beta * relevance

        best = optimize.minimize_scalar(objective, bounds=(-12, 12), options={"xatol": 1e-9})
        rate, relevance = components(rho, best.x)
        rates.append(rate)
        relevances.append(relevance)
    rate, relevance = gaussian_frontier(CORRELATIONS, np.array([beta]))
    np.testing.assert_allclose(rate[0], sum(rates), atol=1e-5)
    np.testing.assert_allclose(relevance[0], sum(relevances), atol=1e-5)


def test_relevance_at_a_rate_lies_on_the_frontier():
    betas = np.geomspace(1.0, 1e4, 200)
    rate, relevance = gaussian_frontier(CORRELATIONS, betas)
    again = [relevance_at_rate(CORRELATIONS, r) for r in rate]
    np.testing.assert_allclose(again, relevance, atol=1e-10)
    assert relevance_at_rate(np.array([-0.3, 0.0]), 2.0) == 0.0
    whole = -0.5 * np.log1p(-(CORRELATIONS**2)).sum()
    np.testing.assert_allclose(relevance_at_rate(CORRELATIONS, 60.0), whole)


def gaussian_rows(n: int, correlations: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of z and y with these canonical correlations, both mixed."""
    rng = np.random.default_rng(seed)
    d = len(correlations)
    x = rng.standard_normal((n, d))
    y = correlations * x + np.sqrt(1 - correlations**2) * rng.standard_normal((n, d))
    return x @ rng.standard_normal((d, d)) + 3.0, y @ rng.standard_normal((d, d)) - 1.0


def test_frontier_of_rows_is_the_true_one():
    correlations = np.array([0.95, 0.8, 0.5, 0.3])
    betas = np.array([1.0, 1.5, 3.0, 10.0, 100.0])
    frontier = ml.arrays.bottleneck_frontier(*gaussian_rows(10_000, correlations, 0), betas)
    rate, relevance = gaussian_frontier(correlations, betas)
    np.testing.assert_allclose(frontier.relevance.values, relevance, rtol=0.05, atol=0.005)
    np.testing.assert_allclose(frontier.rate.values, rate, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(frontier.critical_betas, 1 / correlations**2, rtol=0.15)
    estimate = frontier.critical_beta
    value, low, high = estimate.value, estimate.low, estimate.high
    assert low < 1 / 0.95**2 < high
    assert low < value < high
    at_one = frontier.relevance_at(1.0)
    assert at_one.low <= relevance_at_rate(correlations, 1.0) <= at_one.high


@pytest.mark.simulation
def test_intervals_of_the_frontier_cover():
    correlations, betas = np.array([0.8, 0.5, 0.2]), np.array([2.0, 6.0, 50.0])
    _, relevance = gaussian_frontier(correlations, betas)
    told = []
    for seed in range(40):
        curve = ml.arrays.bottleneck_frontier(
            *gaussian_rows(3000, correlations, seed), betas
        ).relevance
        told.append((curve.low <= relevance) & (relevance <= curve.high))
    assert np.mean(told) >= 0.9


def test_unrelated_rows_have_nothing_to_keep():
    rng = np.random.default_rng(3)
    frontier = ml.arrays.bottleneck_frontier(
        rng.standard_normal((2000, 8)), rng.standard_normal((2000, 4)), [1.0, 10.0, 1000.0]
    )
    assert frontier.relevance.low[-1] <= 0.0
    assert frontier.relevance.values[-1] < 0.01


def test_directions_that_fit_by_chance_keep_nothing():
    """One true component among many: training correlations would claim several times as much."""
    rng = np.random.default_rng(8)
    z, y = rng.standard_normal((400, 60)), rng.standard_normal((400, 8))
    y[:, 0] = 0.95 * z[:, 0] + np.sqrt(1 - 0.95**2) * y[:, 0]
    truth = -0.5 * np.log1p(-(0.95**2))
    frontier = ml.arrays.bottleneck_frontier(z, y, [1e4])
    assert 0.7 * truth < frontier.relevance.values[0] < 1.1 * truth


@pytest.mark.parametrize(
    ("z", "y", "options", "message"),
    [
        (np.zeros((50, 2)), np.ones((50, 1)), {}, "must vary"),
        (np.full((50, 2), np.nan), np.ones((50, 1)), {}, "z must be finite"),
        (np.ones((50, 2)), np.ones((49, 1)), {}, "as many rows"),
        (np.eye(50), np.eye(50), {"groups": [0, 1] * 25}, "at least 20 samples in 5 groups"),
        (np.eye(50), np.eye(50), {"groups": [0]}, "one label per sample"),
        (np.ones((5, 2, 2)), np.ones((5, 1)), {}, "shape"),
        (np.arange(60.0), np.arange(60.0), {}, "infinite"),
        (np.arange(60.0), np.random.default_rng(0).random(60), {"betas": [0.5]}, "at least 1"),
    ],
)
def test_wrong_arrays_are_named(z, y, options, message):
    with pytest.raises(ValueError, match=message):
        ml.arrays.bottleneck_frontier(z, y, **options)


def test_what_scales_add_sums_to_what_they_tell_together():
    """On population moments, against conditional covariances by plain log-determinants."""
    rng = np.random.default_rng(4)
    mixing = rng.standard_normal((12 + 9, 30))
    covariance = mixing @ mixing.T
    zz, zy, yy = covariance[:12, :12], covariance[:12, 12:], covariance[12:, 12:]
    left = yy - zy.T @ np.linalg.solve(zz, zy)
    none = torch.zeros(3, dtype=torch.float64)
    population = Residuals(torch.from_numpy(left), torch.from_numpy(yy), none, none)
    order = (2, 0, 1)
    parts = chain_log_ratio(population, population, order)

    def information(targets: list[int]) -> float:
        rows = [3 * t + f for t in targets for f in range(3)]
        if not rows:
            return 0.0
        pick = np.ix_(rows, rows)
        return 0.5 * (np.linalg.slogdet(yy[pick])[1] - np.linalg.slogdet(left[pick])[1])

    for position, target in enumerate(order):
        before = list(order[:position])
        expected = information([*before, target]) - information(before)
        np.testing.assert_allclose(parts[position], expected, rtol=1e-9)
    np.testing.assert_allclose(parts.sum(), information([0, 1, 2]), rtol=1e-6)


def test_log_ratios_are_mean_log_likelihoods_of_the_rows():
    """Covariances claimed, against rows with others: Gaussian densities row by row."""
    rng = np.random.default_rng(7)
    rows, null_rows = rng.standard_normal((2, 50, 6)) * np.array([[[0.7]], [[1.3]]])
    spreads = [a @ a.T + np.eye(6) for a in rng.standard_normal((2, 6, 6))]

    def residuals(first: np.ndarray, second: np.ndarray) -> Residuals:
        none = torch.zeros(2, dtype=torch.float64)
        return Residuals(torch.from_numpy(first), torch.from_numpy(second), none, none)

    tested = residuals(rows.T @ rows / 50, null_rows.T @ null_rows / 50)
    expected = residuals(*spreads)

    def gain(columns: slice) -> float:
        reader, null = (
            stats.multivariate_normal(cov=spread[columns, columns]).logpdf(r[:, columns])
            for r, spread in zip((rows, null_rows), spreads, strict=True)
        )
        return float((reader - null).mean())

    np.testing.assert_allclose(chain_log_ratio(tested, expected, (0, 1)).sum(), gain(slice(0, 6)))
    each = [gain(slice(0, 3)), gain(slice(3, 6))]
    np.testing.assert_allclose(log_ratio(tested, expected), each)


def two_bands(n: int, seed: int):
    """Moments of two bands: their pasts and futures, of which the last repeats half of another."""
    sites, targets, fold, _, _ = draw(np.random.default_rng(seed), n, 16, 8, 1.0)
    moments = moments_of(sites, targets, fold)
    moments.plan.bands = {"near": (1, 1), "far": (2, 9)}
    moments.plan.features = torch.zeros(1, 4)
    return moments, sites, targets, fold


def test_held_out_parts_sum_to_the_held_out_whole():
    moments, sites, targets, fold = two_bands(3000, 5)
    reading = read_targets(moments, "standardized")
    # The same columns as one band: its future is both futures together.
    whole = moments_of(sites, np.concatenate([targets[:, :8], targets[:, 8:]], axis=1), fold)
    together = read_targets(whole, "standardized").targets
    np.testing.assert_allclose(reading.added.values.sum(axis=0), together.values[1], rtol=2e-3)
    # The far band comes first, so it adds all it tells.
    np.testing.assert_allclose(reading.added.values[1], reading.targets.values[3], rtol=1e-9)


def test_the_frontier_ends_at_the_predicted_information():
    moments, *_ = two_bands(20_000, 6)
    reading = read_targets(moments, "standardized")
    for band in range(2):
        for site in range(2):
            by_fold = reading.correlations[:, band, site]
            frontier = ml.results.Frontier(np.array([1e6]), by_fold, moments.n_read.astype(float))
            predicted = reading.targets.values[2 + band, site]
            np.testing.assert_allclose(frontier.relevance.values, predicted, rtol=0.02)
    assert len(reading.correlations) == N_FOLDS


def test_a_frontier_of_one_token_says_what_it_is_not():
    by_fold = np.full((3, 2), 0.5)
    for of_token in (False, True):
        made = ml.results.Frontier(np.array([9.0]), by_fold, np.ones(3), of_token=of_token)
        for told in (made.relevance.guarantee, made.relevance_at(0.1).guarantee, made.summary()):
            assert ("may be more than a token carries" in told) is of_token
