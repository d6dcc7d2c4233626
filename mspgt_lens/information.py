"""Information in closed form from second moments: compression, readers, and block signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.moments import Moments
from mspgt_lens.ridge import FoldSums, RidgeFit, moment_about, ring, spread_sites
from mspgt_lens.statistics import fold_interval

Coordinates = Literal["standardized", "raw"]

# From nearly unpenalized to nearly silent; infinity is the null reader, which predicts the mean.
RIDGE_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0, np.inf)
SELECTION_SITES = 4


def channel_rate(covariance: Float[np.ndarray, "d d"], noise: float = 0.1) -> float:
    """Rate of a Gaussian-noise channel fed with this covariance, in nats per use.

    ``1/2 log det(I + covariance / noise)``. For every distribution with this covariance it is an
    upper bound on ``I(X; X + sqrt(noise) * eps)``, met by the Gaussian; and it is exactly the rate
    that a variational information bottleneck encoder with that noise pays against the best
    Gaussian prior.

    Args:
        covariance: Symmetric, positive semi-definite, shape ``[d, d]``.
        noise: Variance of the channel's noise, > 0.

    Returns:
        Nats, >= 0.

    Raises:
        ValueError: If the covariance is not a covariance, or the noise is not positive.
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"covariance must be square, got shape {matrix.shape}")
    if not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T):
        raise ValueError("covariance must be finite and symmetric")
    check_noise(noise)
    power = np.linalg.eigvalsh(matrix)
    if power.min(initial=0.0) < -1e-8 * max(power.max(initial=0.0), 1.0):
        raise ValueError(
            f"covariance must be positive semi-definite, got an eigenvalue of {power.min():.3g}"
        )
    return float(np.log1p(power.clip(min=0.0) / noise).sum() / 2)


def check_noise(noise: float) -> None:
    """Raise ``ValueError`` unless ``noise`` is positive and finite."""
    if not (np.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be a positive variance, got {noise!r}")


@dataclass(frozen=True)
class SiteStatistics:
    """What the moments alone say of sites and blocks, from one set of folds.

    Attributes:
        compression: Channel rate at each site (nats), shape ``[site]``.
        novelty: ``1 - linear CKA`` of the sites around each block, shape ``[block]``.
        inter_layer: Information between the noisy sites around each block (nats), ``[block]``.
        effective_rank: Participation ratio of the spectrum after each block, ``[block]``.
    """

    compression: Float[np.ndarray, " site"]
    novelty: Float[np.ndarray, " block"]
    inter_layer: Float[np.ndarray, " block"]
    effective_rank: Float[np.ndarray, " block"]


def site_statistics(
    moments: Moments, folds: Sequence[int], noise: float, coordinates: Coordinates
) -> SiteStatistics:
    """Compression and moment-based block signals from the valid positions of some folds.

    Compression is :func:`channel_rate` of the site's correlation matrix (of its covariance with
    ``coordinates="raw"``). Inter-layer information is that between the two sites when both are seen
    through that channel, ``C_l + C_{l+1} - C_joint``. The effective rank is
    ``tr(S)^2 / tr(S^2)``, the exponential of the spectrum's Renyi entropy of order 2.
    """
    chosen = list(folds)
    count = float(moments.n_valid[chosen].sum())
    n_sites = moments.z_read.shape[1]
    rates, norms, ranks, novelty, shared = [], [], [], [], []
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for site in range(n_sites):
        total = (moments.z_read[chosen, site] + moments.z_rest[chosen, site]).sum(dim=0)
        outer = (moments.zz_read[chosen, site] + moments.zz_rest[chosen, site]).sum(dim=0)
        covariance = outer / count - torch.outer(total, total) / count**2
        scale = _scales(covariance, coordinates)
        covariance = covariance / torch.outer(scale, scale)
        root = torch.linalg.cholesky(_plus_identity(covariance / noise))
        rates.append(float(root.diagonal().log().sum()))
        norms.append(float(covariance.norm()))
        ranks.append(float(covariance.trace() ** 2 / covariance.pow(2).sum()))
        if before is not None:
            total_before, scale_before, root_before = before
            cross = moments.z_next[chosen, site - 1].double().sum(dim=0) / count
            cross = cross - torch.outer(total_before, total) / count**2
            cross = cross / torch.outer(scale_before, scale)
            novelty.append(1.0 - float(cross.pow(2).sum()) / (norms[-2] * norms[-1]))
            explained = torch.linalg.solve_triangular(root_before, cross / noise, upper=False)
            rest = _plus_identity(covariance / noise) - explained.T @ explained
            shared.append(rates[-1] - float(_log_det(rest)) / 2)
        before = (total, scale, root)
    return SiteStatistics(
        compression=np.array(rates),
        novelty=np.array(novelty),
        inter_layer=np.array(shared),
        effective_rank=np.array(ranks[1:]),
    )


@dataclass(frozen=True)
class Reading:
    """Held-out information that linear-Gaussian readers find about every target at every site.

    Attributes:
        values: Mean held-out log-likelihood ratio (nats per token), shape ``[target, site]``.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        ridge: The ridge strength chosen for each fold and target, shape ``[fold, target]``.
    """

    values: Float[np.ndarray, "target site"]
    low: Float[np.ndarray, "target site"]
    high: Float[np.ndarray, "target site"]
    ridge: Float[np.ndarray, "fold target"]


def read_targets(moments: Moments, coordinates: Coordinates) -> Reading:
    """What a linear-Gaussian reader of each site can use about each target.

    ``E_test[log N(y; W z + b, S) - log N(y; m, S_0)]``, with W by ridge, cross-fitted over folds of
    groups. For outer fold k, strengths and residual covariances come from inner fits that leave out
    k and one neighbor, tested on the neighbor; one strength per target serves all sites. The null
    reader is in the grid and reads exactly 0.

    The value is conservative: W is fitted on a finite sample, which costs about c / n. Fits on
    ``K - 1`` and ``K - 2`` folds tell c, and the interval reaches up to what is found without it.

    Returns:
        Targets in the order of the plan: the past of every band, then the future of every band.
    """
    n_folds, n_sites = moments.z_read.shape[:2]
    readers = [
        _SiteReader(moments, site, coordinates) for site in spread_sites(n_sites, SELECTION_SITES)
    ]
    ridge = _choose_ridge(readers, n_folds)
    scores, smaller = [], []
    for site in range(n_sites):
        reader = _SiteReader(moments, site, coordinates)
        full, fewer = reader.score(ridge)
        scores.append(full)
        smaller.append(fewer)
    held_out, fewer_folds = np.stack(scores, axis=-1), np.stack(smaller, axis=-1)
    # Bias c / n_train: n_train grows by 1 / (K - 2) from K - 2 to K - 1 folds.
    unbiased = held_out + (n_folds - 2) * (held_out - fewer_folds)
    weights = moments.n_read.astype(float)
    shape = held_out.shape[1:]
    value, low, high = fold_interval(held_out.reshape(n_folds, -1), weights)
    _, low_unbiased, high_unbiased = fold_interval(unbiased.reshape(n_folds, -1), weights)
    return Reading(
        values=value.reshape(shape),
        low=np.minimum(low, np.minimum(low_unbiased, value)).reshape(shape),
        high=np.maximum(high, high_unbiased).reshape(shape),
        ridge=ridge,
    )


def pooled_scale(moments: Moments, site: int, coordinates: Coordinates) -> Float[Tensor, " width"]:
    """What a reader divides each coordinate by: its own deviation, or one deviation for all."""
    count = float(moments.n_valid.sum())
    total = (moments.z_read[:, site] + moments.z_rest[:, site]).sum(dim=0)
    outer = (moments.zz_read[:, site] + moments.zz_rest[:, site]).sum(dim=0)
    covariance = outer / count - torch.outer(total, total) / count**2
    if coordinates == "raw":
        return covariance.diagonal().mean().sqrt().expand(len(covariance))
    return _scales(covariance, coordinates)


class _SiteReader:
    """The readable positions of one site, in the reader's coordinates."""

    def __init__(self, moments: Moments, site: int, coordinates: Coordinates) -> None:
        scale = pooled_scale(moments, site, coordinates)
        self.count = moments.n_read.astype(float)
        self.sums = FoldSums(
            self.count,
            moments.z_read[:, site] / scale,
            moments.zz_read[:, site] / torch.outer(scale, scale),
            moments.y,
            moments.zy[:, site] / scale[:, None],
        )
        self.yy = moments.yy
        self.n_targets = 2 * len(moments.plan.bands)
        self.n_features = moments.plan.features.shape[1]

    def residuals(
        self, fit: RidgeFit, fold: int, strengths: Float[np.ndarray, " target"]
    ) -> _Residuals:
        """What readers of the given strengths leave unexplained on one fold."""
        count = self.count[fold]
        mean = self.sums.t[fold] / count
        null = self._blocks(moment_about(self.yy[fold] / count, mean, mean, fit.mean_t, fit.mean_t))
        residual = null.clone()
        zz, zt = fit.about(fold)
        for strength in set(strengths.tolist()) - {np.inf}:
            targets = np.flatnonzero(strengths == strength)
            columns = tuple(
                (targets[:, None] * self.n_features + np.arange(self.n_features)).ravel().tolist()
            )
            weights = fit.weights(strength, columns)
            # E (y - W z)(y - W z)^T = yy - W^T zy - (W^T zy)^T + W^T zz W, target by target.
            mixed = zz @ weights / 2 - zt[:, list(columns)]
            by_target = "d (t f) -> t d f"
            w = rearrange(weights, by_target, f=self.n_features)
            change = w.mT @ rearrange(mixed, by_target, f=self.n_features)
            residual[targets] += change + change.mT
        return _Residuals(residual, null)

    def score(
        self, ridge: Float[np.ndarray, "fold target"]
    ) -> tuple[Float[np.ndarray, "fold target"], Float[np.ndarray, "fold target"]]:
        """Held-out log-likelihood ratios on each fold: of the outer fits, and of the inner fits."""
        n_folds = len(self.count)
        expected: list[_Residuals | None] = [None] * n_folds
        by_inner_fit: list[list[_Residuals]] = [[] for _ in range(n_folds)]
        for pair in ring(n_folds):
            fit = self.sums.fit(pair)
            for outer, inner in (pair, pair[::-1]):
                n_neighbors = sum(self.count[(outer + step) % n_folds] for step in (1, -1))
                share = self.residuals(fit, inner, ridge[outer]).times(
                    self.count[inner] / n_neighbors
                )
                so_far = expected[outer]
                expected[outer] = share if so_far is None else so_far.plus(share)
                by_inner_fit[outer].append(self.residuals(fit, outer, ridge[outer]))
        full, fewer = np.zeros((2, n_folds, self.n_targets))
        for k, spread in enumerate(expected):
            assert spread is not None
            full[k] = _log_ratio(self.residuals(self.sums.fit([k]), k, ridge[k]), spread)
            fewer[k] = np.mean([_log_ratio(left, spread) for left in by_inner_fit[k]], axis=0)
        return full, fewer

    def _blocks(self, matrix: Float[Tensor, "c c"]) -> Float[Tensor, "target f f"]:
        """The diagonal block of every target."""
        split = rearrange(matrix, "(t f) (u g) -> t u f g", f=self.n_features, g=self.n_features)
        index = torch.arange(self.n_targets)
        return split[index, index]


@dataclass(frozen=True)
class _Residuals:
    """Second moments per target of what a reader, and the null reader, leave unexplained."""

    reader: Float[Tensor, "target f f"]
    null: Float[Tensor, "target f f"]

    def plus(self, other: _Residuals) -> _Residuals:
        return _Residuals(self.reader + other.reader, self.null + other.null)

    def times(self, factor: float) -> _Residuals:
        return _Residuals(self.reader * factor, self.null * factor)


def _choose_ridge(readers: Sequence[_SiteReader], n_folds: int) -> Float[np.ndarray, "fold target"]:
    """Per outer fold and target, the strength with the least inner held-out log-determinant."""
    n_targets = readers[0].n_targets
    cost = np.zeros((n_folds, len(RIDGE_GRID), n_targets))
    for reader in readers:
        for pair in ring(n_folds):
            fit = reader.sums.fit(pair)
            for index, strength in enumerate(RIDGE_GRID):
                for outer, inner in (pair, pair[::-1]):
                    left = reader.residuals(fit, inner, np.full(n_targets, strength))
                    log_det = _log_det(_resolved(left)).cpu().numpy()
                    cost[outer, index] += reader.count[inner] * log_det
    chosen: np.ndarray = np.array(RIDGE_GRID)[cost.argmin(axis=1)]
    return chosen


def _log_ratio(tested: _Residuals, expected: _Residuals) -> Float[np.ndarray, " target"]:
    """Mean log-likelihood ratio of the reader against the null reader, nats per token."""
    spread = _resolved(expected)
    root, root_null = torch.linalg.cholesky(spread), torch.linalg.cholesky(expected.null)
    trace = torch.cholesky_solve(tested.reader, root).diagonal(dim1=-2, dim2=-1).sum(-1)
    trace_null = torch.cholesky_solve(tested.null, root_null).diagonal(dim1=-2, dim2=-1).sum(-1)
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det_null = 2 * root_null.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    ratio: np.ndarray = (0.5 * (log_det_null - log_det + trace_null - trace)).cpu().numpy()
    return ratio


def _resolved(residuals: _Residuals) -> Float[Tensor, "target f f"]:
    """Residual covariances a reader may claim: float32 products resolve no less than 1e-6.

    The null reader's is left as it is, so that it reads exactly 0.
    """
    silent = (residuals.reader == residuals.null).flatten(1).all(dim=1)
    floor = torch.where(silent, 0.0, 1e-6).to(residuals.null)
    return residuals.reader + floor[:, None, None] * residuals.null


def _scales(covariance: Float[Tensor, "d d"], coordinates: Coordinates) -> Float[Tensor, " d"]:
    variance = covariance.diagonal()
    if coordinates == "raw":
        return torch.ones_like(variance)
    # A coordinate that never moves has nothing to standardize; it stays at zero.
    return torch.where(variance > 1e-10 * variance.mean(), variance, 1.0).sqrt()


def _plus_identity(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return matrix + torch.eye(len(matrix)).to(matrix)


def _log_det(matrix: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    root: Tensor = torch.linalg.cholesky(matrix)
    return 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
