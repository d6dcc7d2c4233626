"""Channel rates and site statistics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import N_FOLDS, moments_of

from mspgt_lens.arrays import channel_rate
from mspgt_lens.information.channel import pooled_scale, site_statistics
from mspgt_lens.information.ridge import FoldSums


def test_channel_rate_of_independent_coordinates_is_the_sum_of_their_capacities():
    power = np.array([0.5, 1.0, 3.0])
    assert channel_rate(np.diag(power), 0.1) == pytest.approx(0.5 * np.log1p(power / 0.1).sum())


def test_channel_rate_bounds_what_any_distribution_sends():
    """A fair sign through Gaussian noise carries at most log 2, less than the Gaussian rate."""
    rng = np.random.default_rng(0)
    for noise in (0.05, 0.3, 2.0):
        received = 1.0 + np.sqrt(noise) * rng.standard_normal(200_000)
        sign = np.log(2) - np.logaddexp(0.0, -2.0 * received / noise).mean()
        assert sign <= channel_rate(np.ones((1, 1)), noise) + 1e-3


def test_channel_rate_does_not_change_under_rotation():
    rng = np.random.default_rng(1)
    root = rng.standard_normal((6, 6))
    turn, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    covariance = root @ root.T
    turned = turn @ covariance @ turn.T
    assert channel_rate((turned + turned.T) / 2) == pytest.approx(channel_rate(covariance))


def test_channel_rate_takes_singular_covariances():
    assert channel_rate(np.zeros((3, 3))) == 0.0
    assert channel_rate(np.ones((4, 4)), 1.0) == pytest.approx(0.5 * np.log(5.0))


@pytest.mark.parametrize(
    ("covariance", "noise", "message"),
    [
        (np.ones(3), 0.1, "square"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), 0.1, "symmetric"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), 0.1, "finite"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), 0.1, "eigenvalue of -1"),
        (np.eye(2), 0.0, "noise"),
        (np.eye(2), np.inf, "noise"),
    ],
)
def test_channel_rate_refuses_what_is_no_channel(covariance, noise, message):
    with pytest.raises(ValueError, match=message):
        channel_rate(covariance, noise)


def test_site_statistics_of_a_copy_and_of_a_fresh_draw():
    rng = np.random.default_rng(2)
    n = 40_000
    z, other = rng.standard_normal((2, n, 6))
    moments = moments_of([z, 2.0 * z + 1.0, other], np.zeros((n, 2)), np.arange(n) % N_FOLDS)
    found = site_statistics(moments, range(N_FOLDS), 0.1, "standardized")
    # A copy at another scale: nothing new, and all that the channel lets through is shared.
    assert found.novelty[0] == pytest.approx(0.0, abs=1e-9)
    per_coordinate = -0.5 * np.log(1 - (1 / 1.1) ** 2)
    assert found.inter_layer[0] == pytest.approx(6 * per_coordinate, rel=1e-3)
    # A fresh draw: all new, nothing shared, up to sampling.
    assert found.novelty[1] == pytest.approx(1.0, abs=1e-3)
    assert found.inter_layer[1] == pytest.approx(0.0, abs=1e-2)
    assert found.effective_rank == pytest.approx([6.0, 6.0], rel=1e-2)


@pytest.mark.parametrize("coordinates", ["standardized", "raw"])
def test_a_site_that_never_changes_is_named(coordinates):
    z = np.random.default_rng(3).standard_normal((200, 4))
    moments = moments_of([z, np.full((200, 4), 0.5)], z[:, :2], np.arange(200) % N_FOLDS)
    with pytest.raises(ValueError, match="site 1 is the same at every valid position"):
        pooled_scale(moments, 1, coordinates)


def test_moments_that_are_not_finite_are_refused_at_once():
    nothing = torch.full((N_FOLDS, 2, 2), torch.nan, dtype=torch.float64)
    sums = FoldSums(np.ones(N_FOLDS), nothing[:, 0], nothing, nothing[:, 0], nothing)
    with pytest.raises(FloatingPointError, match="not finite"):
        sums.fit([0]).weights(1.0)
