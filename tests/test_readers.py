"""Readers against data whose information is known, and against an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import N_FOLDS, draw, moments_of

from mspgt_lens.information.channel import site_statistics
from mspgt_lens.information.readers import read_targets
from mspgt_lens.information.ridge import ROUGH_FROM, FoldSums
from mspgt_lens.statistics import jackknife_interval


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("n", "width", "n_features", "power", "group_size"),
    [
        pytest.param(2000, 16, 4, 1.0, 1, id="well sampled"),
        pytest.param(1500, 48, 8, 0.3, 1, id="wide"),
        pytest.param(1500, 48, 8, 0.02, 1, id="nearly silent"),
        pytest.param(3000, 16, 4, 0.1, 10, id="positions of a group alike"),
    ],
)
def test_intervals_cover_the_truth(n, width, n_features, power, group_size):
    rng = np.random.default_rng(1)
    told, rated = [], []
    for _ in range(40):
        sites, targets, fold, information, rate = draw(rng, n, width, n_features, power, group_size)
        moments = moments_of(sites, targets, fold)
        reading = read_targets(moments, "standardized").targets
        told.append((reading.low <= information) & (information <= reading.high))
        value = site_statistics(moments, range(N_FOLDS), 0.1, "standardized").compression
        without = [
            site_statistics(
                moments, [k for k in range(N_FOLDS) if k != left], 0.1, "standardized"
            ).compression
            for left in range(N_FOLDS)
        ]
        low, high = jackknife_interval(value, np.stack(without))
        rated.append((low <= rate) & (rate <= high))
    assert np.mean(told) >= 0.9
    assert np.mean(rated) >= 0.9


def test_gaussian_information_is_reached_with_many_positions():
    sites, targets, fold, information, _ = draw(np.random.default_rng(0), 60_000, 16, 8, 1.0)
    reading = read_targets(moments_of(sites, targets, fold), "standardized").targets
    np.testing.assert_allclose(reading.values, information, rtol=0.02)


def test_unrelated_targets_read_nothing():
    rng = np.random.default_rng(2)
    for n, width in ((600, 64), (5000, 16)):
        sites = [rng.standard_normal((n, width)) for _ in range(2)]
        targets = rng.standard_normal((n, 8))
        reading = read_targets(
            moments_of(sites, targets, np.arange(n) % N_FOLDS), "standardized"
        ).targets
        assert (np.abs(reading.values) < 0.02).all()
        assert (reading.low <= 0).all()
        assert (reading.high >= 0).all()


@pytest.mark.simulation
def test_small_samples_never_read_far_below_zero():
    rng = np.random.default_rng(3)
    for _ in range(10):
        # 20 groups of 30 positions that share their targets: an effective sample of 20.
        sites = [rng.standard_normal((600, 64)) for _ in range(2)]
        targets = np.repeat(rng.standard_normal((20, 8)), 30, axis=0)
        fold = np.repeat(np.arange(20), 30) % N_FOLDS
        reading = read_targets(moments_of(sites, targets, fold), "standardized").targets
        assert reading.values.min() > -0.1


def test_values_do_not_depend_on_the_scale_of_coordinates():
    sites, targets, fold, _, _ = draw(np.random.default_rng(4), 2000, 16, 4, 1.0)
    stretch = np.geomspace(1e-3, 1e3, 16)
    plain = read_targets(moments_of(sites, targets, fold), "standardized").targets
    stretched = read_targets(
        moments_of([s * stretch for s in sites], targets, fold), "standardized"
    ).targets
    np.testing.assert_allclose(stretched.values, plain.values, rtol=1e-6)
    raw = read_targets(moments_of([s * stretch for s in sites], targets, fold), "raw").targets
    assert np.abs(raw.values - plain.values).max() > 0.05


def test_a_retained_target_beyond_resolution_stays_finite():
    rng = np.random.default_rng(5)
    z = rng.standard_normal((2000, 16))
    targets = np.concatenate([z[:, :4], z[:, 4:8]], axis=1)
    reading = read_targets(
        moments_of([z, z], targets, np.arange(2000) % N_FOLDS), "standardized"
    ).targets
    assert np.isfinite(reading.high).all()
    # Four features at a resolution of 1e-6 of their variance: log(1e6) / 2 nats each, and 1/2 more
    # for residuals that vanish against that resolution.
    assert (reading.values <= 2 * np.log(1e6) + 2.1).all()
    assert (reading.values > 10).all()


def test_fits_equal_ridge_regression_on_the_rows():
    rng = np.random.default_rng(6)
    z, t = rng.standard_normal((300, 7)) + 3.0, rng.standard_normal((300, 4))
    fold = np.arange(300) % N_FOLDS
    rows = [np.flatnonzero(fold == k) for k in range(N_FOLDS)]

    def sums(a, b):
        return torch.from_numpy(np.stack([a[r].T @ b[r] for r in rows]))

    fits = FoldSums(
        np.array([float(len(r)) for r in rows]),
        torch.from_numpy(np.stack([z[r].sum(0) for r in rows])),
        sums(z, z),
        torch.from_numpy(np.stack([t[r].sum(0) for r in rows])),
        sums(z, t),
    )
    left_out = (1, 3)
    fit = fits.fit(left_out)
    kept = ~np.isin(fold, left_out)
    centered, mean = z[kept] - z[kept].mean(0), t[kept].mean(0)
    n = kept.sum()
    expected = np.linalg.solve(
        centered.T @ centered + n * 0.3 * np.eye(7), centered.T @ (t[kept] - mean)
    )
    np.testing.assert_allclose(fit.weights(0.3), expected, rtol=1e-10)
    np.testing.assert_allclose(fit.weights(0.3, (0, 2)), expected[:, [0, 2]], rtol=1e-10)
    np.testing.assert_allclose(
        fit.predict(0.3, torch.from_numpy(z[:5])), mean + (z[:5] - z[kept].mean(0)) @ expected
    )
    blocks = fit.block_weights([0.3, np.inf, 0.3], [0, 1, 1], 2)
    np.testing.assert_allclose(torch.cat(blocks, dim=1)[:, [0, 1, 4, 5]], expected, rtol=1e-10)
    assert not blocks[1].any()
    np.testing.assert_allclose(
        torch.cat(fit.block_weights([0.3, 0.1], [1, 1], 2), dim=1),
        np.hstack([fit.weights(0.3)[:, 2:], fit.weights(0.1)[:, 2:]]),
        rtol=1e-10,
    )
    tested = z[rows[3]] - z[kept].mean(0)
    about = fit.about(3)
    zz = about.zz_times(torch.eye(7, dtype=torch.float64))
    np.testing.assert_allclose(zz, tested.T @ tested / len(tested), rtol=1e-9)
    np.testing.assert_allclose(about.zt, tested.T @ (t[rows[3]] - mean) / len(tested), rtol=1e-9)


def test_readers_in_float32_read_what_those_in_float64_do():
    """Collinear coordinates, weak and strong penalties, and a target that is read without error."""
    rng = np.random.default_rng(8)
    clean, targets, fold, _, _ = draw(rng, 800, 24, 4, 0.2)
    sites = [np.hstack([site, site @ rng.standard_normal((24, 24)) / 5]) for site in clean]
    targets[:, :2] = sites[0][:, :2]
    moments = moments_of(sites, targets, fold)
    exact = read_targets(moments, "standardized")
    moments.z_next = moments.z_next.float()
    rough = read_targets(moments, "standardized")
    assert (rough.ridge == exact.ridge).all()
    assert (exact.ridge < ROUGH_FROM).any()
    assert (exact.ridge >= ROUGH_FROM).any()
    for name in ("values", "low", "high"):
        mine, theirs = getattr(rough.targets, name), getattr(exact.targets, name)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rough.correlations, exact.correlations, atol=1e-5)


@pytest.mark.parametrize("distinct", [3, 40])
def test_few_distinct_targets_and_perfect_fits_in_float32_do_not_stop_a_reader(distinct):
    """Fewer positions than directions: readers interpolate, and rounding goes below zero."""
    rng = np.random.default_rng(7)
    n, width = 300, 256
    token = rng.integers(distinct, size=n)
    features = rng.standard_normal((distinct, 16)).astype(np.float32)
    z = rng.standard_normal((distinct, width)).astype(np.float32)[token]
    targets = np.concatenate([features[token], features[rng.permutation(token)]], axis=1)
    moments = moments_of([z, z], targets, np.arange(n) % N_FOLDS)
    for name in ("zz_read", "zy", "yy"):
        setattr(moments, name, getattr(moments, name).float().double())
    reading = read_targets(moments, "standardized").targets
    assert np.isfinite(reading.high).all()
    # Two directions, or sixteen, each read down to the resolution of float32.
    assert (reading.values[0] > 8).all()
    assert (reading.values[1] > -0.5).all()
