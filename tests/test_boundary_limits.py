"""The bound on any boundary test: its likelihoods the long way, and a power in closed form."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

FOLDER = Path(__file__).parents[1]


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from benchmarks import boundary_limits

    return boundary_limits


def one_case(limits, places, size=2.0, n_rows=7, n_signals=3):
    line = np.column_stack([np.ones(n_rows), np.arange(n_rows)])
    beyond = np.linalg.svd(line)[0][:, 2:]
    curves = beyond.T @ np.tril(np.ones((n_rows, n_rows)))
    chances = np.full(len(places), 1 / len(places))
    return limits.Planted(beyond, curves, np.array(places), chances, size, n_signals)


def log_density(series, mean, covariance):
    return multivariate_normal(mean.ravel(), covariance).logpdf(series.reshape(len(series), -1))


def test_what_is_planted_is_a_mixture_of_normal_densities(limits):
    """Every placement and sign in turn, as densities of all rows and signals together."""
    planted = one_case(limits, [(2, 4), (3, 5)])
    series = planted.draw(4, np.random.default_rng(0))
    free, n = series.shape[2], series[0].size
    each = []
    for rows in planted.places:
        for signs in itertools.product([-2.0, 2.0], repeat=2 * 3):
            mean = np.array(signs).reshape(3, 2) @ planted.curves[:, rows].T
            each.append(log_density(series, mean, np.eye(n)))
    wanted = logsumexp(each, axis=0) - np.log(len(each))
    white = log_density(series, np.zeros((3, free)), np.eye(n))
    np.testing.assert_allclose(planted.log_ratio(series), wanted - white, atol=1e-9)


@pytest.mark.parametrize("shares", [False, True])
def test_nulls_are_normal_with_their_covariance(limits, shares):
    """The likelihood from the covariance of all rows and signals, and the draws' own."""
    planted = one_case(limits, [(2,)])
    summed = np.tril(np.ones((7, 7)))
    own, shared = np.eye(7) + 0.3 * summed @ summed.T, 0.8 * summed @ summed.T
    null = limits.Null(planted, own, shared if shares else None)
    inside, along = (planted.beyond.T @ c @ planted.beyond for c in (own, shared))
    rng = np.random.default_rng(1)
    series = null.draw(5, rng)
    patterns = list(itertools.product([-1.0, 1.0], repeat=3)) if shares else [(0.0,) * 3]
    covariances = [np.kron(np.eye(3), inside) + np.kron(np.outer(a, a), along) for a in patterns]
    nothing = np.zeros((3, 5))
    each = [log_density(series, nothing, c) for c in covariances]
    wanted = logsumexp(each, axis=0) - np.log(len(each))
    white = log_density(series, nothing, np.eye(15))
    np.testing.assert_allclose(null.log_ratio(series), wanted - white, atol=1e-9)
    drawn = null.draw(40_000, rng)
    np.testing.assert_allclose(
        np.einsum("dsa,dsb->ab", drawn, drawn) / 120_000,
        inside + (along if shares else 0),
        atol=0.15,
    )
    # Signals are as often up as down: products of two have mean 0, and squares tell what is shared.
    products = (drawn[:, 0] * drawn[:, 1]).sum(axis=1)
    wanted = 2 * np.trace(along @ along) * shares + np.trace(inside @ inside)
    wanted += (np.trace(along) ** 2 + 2 * np.trace(inside @ along)) * shares
    np.testing.assert_allclose((products**2).mean(), wanted, rtol=0.1)


def test_the_bound_is_the_power_of_the_best_test(limits):
    """One change at a known row of one signal, up or down: two-sided, in closed form."""
    planted = one_case(limits, [(3,)], size=2.5, n_signals=1)
    length = 2.5 * np.linalg.norm(planted.curves[:, 3])
    found = limits.limit(planted, [limits.Null(planted, np.eye(7))], 2000)
    assert found.mixture == pytest.approx([1.0])
    assert found.held == pytest.approx(found.power, abs=0.03)
    assert found.power == pytest.approx(
        norm.cdf(length - 1.96) + norm.cdf(-length - 1.96), abs=0.015
    )


def test_more_nulls_lower_the_bound(limits):
    """What a null can look like is not found: one that is the planted change itself leaves 5%."""
    planted = one_case(limits, [(3,)], size=2.5, n_signals=1)
    jump = np.tril(np.ones((7, 7)))[:, [3]]
    nulls = [limits.Null(planted, np.eye(7) + v * jump @ jump.T) for v in (0.0, 6.0)]
    alone, both = limits.limit(planted, nulls[:1]), limits.limit(planted, nulls)
    assert both.power < alone.power - 0.1
    assert both.mixture[1] > 0.1
    # Wrong in 5% of a mixture is more under some kind, unless it is the least favorable one.
    assert both.held == pytest.approx(both.power, abs=0.05)


def test_what_is_not_told_is_a_mixture_over_it(limits):
    """Sizes of changes are normal, noise of three sizes, places and numbers as they are likely."""
    planted = one_case(limits, [(2,)])
    curves = np.tril(np.ones((7, 7)))
    untold = limits.Untold(planted, curves, {(2,): 0.5, (2, 4): 1.5})
    series = planted.draw(3, np.random.default_rng(0))
    each, chances = [], []
    for rows, chance in (([2], 0.25), ([2, 4], 0.75)):
        for size in (0.8, 1.0, 1.25):
            signal = np.eye(7) + 4 * curves[:, rows] @ curves[:, rows].T
            inside = size**2 * planted.beyond.T @ signal @ planted.beyond
            each.append(log_density(series, np.zeros((3, 5)), np.kron(np.eye(3), inside)))
            chances.append(chance / 3)
    wanted = logsumexp(np.array(each) + np.log(chances)[:, None], axis=0)
    white = log_density(series, np.zeros((3, 5)), np.eye(15))
    np.testing.assert_allclose(untold.log_ratio(series), wanted - white, atol=1e-9)


def test_changes_are_planted_as_the_calibration_plants_them(limits):
    """Without noise, rows less their line are those of the package's own planted signals."""
    planted = limits.planted_case(12, 2, 1, "bends", 3.0)
    made = [
        limits.ml.synthetic.synthetic_signals(12, 1, n_boundaries=1, effect=e, kind="bends", seed=1)
        for e in (0.0, 3.0)
    ]
    row = made[1].boundaries[0] - 1
    change = (made[1].signals - made[0].signals)[1:-1, 0]
    inside = planted.beyond.T @ change
    np.testing.assert_allclose(inside, np.sign(change[-1]) * 3 * planted.curves[:, row], atol=1e-9)
    # Blocks 2 to 10, of which the first is row 1.
    assert set(limits.placements(12, 1)) == {(row,) for row in range(1, 10)}
