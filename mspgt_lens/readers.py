"""What linear-Gaussian readers of a site find about the past and the future, held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.information import pooled_scale
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.ridge import FoldSums, RidgeFit, moment_about, ring, spread_sites
from mspgt_lens.statistics import fold_interval

# From nearly unpenalized to nearly silent; infinity is the null reader, which predicts the mean.
RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0, np.inf)
SELECTION_SITES = 4
# The upper end uses fits whose optimism (training minus held-out score) is at most this per
# feature: then a third of the directions fitted are noise, and the correction still holds.
MAX_OPTIMISM = 0.5
# Share of a variance that sums of float32 products resolve.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Reading:
    """Held-out information that linear-Gaussian readers find about every target at every site.

    Attributes:
        values: Mean held-out log-likelihood ratio (nats per token), shape ``[target, site]``.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        by_fold: The score on each fold, shape ``[fold, target, site]``.
        ridge: The ridge strength chosen for each fold and target, shape ``[fold, target]``.
    """

    values: Float[np.ndarray, "target site"]
    low: Float[np.ndarray, "target site"]
    high: Float[np.ndarray, "target site"]
    by_fold: Float[np.ndarray, "fold target site"]
    ridge: Float[np.ndarray, "fold target"]


def read_targets(moments: Moments, coordinates: Coordinates) -> Reading:
    """What a linear-Gaussian reader of each site can use about each target.

    ``E_test[log N(y; W z + b, S) - log N(y; m, S_0)]``, with W by ridge, cross-fitted over folds of
    groups. For outer fold k, strengths and residual covariances come from inner fits that leave out
    k and one neighbor, tested on the neighbor; one strength per target serves all sites. The null
    reader is in the grid and reads exactly 0.

    The value is conservative: a reader fitted on a finite sample is worse than the best one. The
    interval reaches from the held-out score down by its sampling error, and up to what the best
    reader may reach: the training score less its optimism. For Gaussian data fitted with x
    directions per position, training exceeds held-out scores by ``R x / (1 - x)`` and the truth by
    ``-R/2 log(1 - x)``, so the gap between the two tells the optimism, whatever the dependence
    between neighboring positions. It is taken at the weakest strength whose gap is small enough.

    Returns:
        Targets in the order of the plan: the past of every band, then the future of every band.
    """
    n_folds, n_sites = moments.z_read.shape[:2]
    strengths = _choose_strengths(
        [_SiteReader(moments, s, coordinates) for s in spread_sites(n_sites, SELECTION_SITES)]
    )
    scores = [_SiteReader(moments, site, coordinates).score(strengths) for site in range(n_sites)]
    held_out, light, corrected = (
        np.stack(parts, axis=-1).reshape(n_folds, -1) for parts in zip(*scores, strict=True)
    )
    weights = moments.n_read.astype(float)
    value, low, high = fold_interval(held_out, weights)
    mean_light, _, high_light = fold_interval(light, weights)
    best = weights @ corrected / weights.sum()
    shape = (-1, n_sites)
    return Reading(
        values=value.reshape(shape),
        low=low.reshape(shape),
        high=np.maximum(high, best + high_light - mean_light).reshape(shape),
        by_fold=held_out.reshape(n_folds, *shape),
        ridge=strengths.chosen,
    )


@dataclass(frozen=True)
class _Strengths:
    """Ridge strengths: the chosen one, and the weakest whose optimism the sample can bear."""

    chosen: Float[np.ndarray, "fold target"]
    weakest: Float[np.ndarray, " target"]


@dataclass(frozen=True)
class _Residuals:
    """Second moments per target of what a reader, and the null reader, leave unexplained.

    The floors are variances per target, the least that either may claim to leave in any direction:
    what float32 products do not resolve. Where a reader is the null reader, both are the same, so
    that it reads exactly 0.
    """

    reader: Float[Tensor, "target f f"]
    null: Float[Tensor, "target f f"]
    reader_floor: Float[Tensor, " target"]
    null_floor: Float[Tensor, " target"]

    @property
    def reader_spread(self) -> Float[Tensor, "target f f"]:
        """The reader's residual covariance, no narrower than it may claim."""
        return self.reader + _isotropic(self.reader_floor, self.reader)

    @property
    def null_spread(self) -> Float[Tensor, "target f f"]:
        """The same of the null reader."""
        return self.null + _isotropic(self.null_floor, self.null)

    def plus(self, other: _Residuals, share: float) -> _Residuals:
        mixed = (
            mine * (1 - share) + theirs * share
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )
        return _Residuals(*mixed)


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

    def tested(
        self, fit: RidgeFit, fold: int, strengths: Float[np.ndarray, " target"]
    ) -> _Residuals:
        """Residuals of readers of the given strengths on a fold that they were not fitted on."""
        count = self.count[fold]
        mean = self.sums.t[fold] / count
        yy = moment_about(self.yy[fold] / count, mean, mean, fit.mean_t, fit.mean_t)
        return self._residuals(fit, strengths, yy, *fit.about(fold))

    def trained(self, fit: RidgeFit, strengths: Float[np.ndarray, " target"]) -> _Residuals:
        """Residuals of readers of the given strengths on the folds that they were fitted on."""
        yy = self.yy[fit.folds].sum(0) / self.count[fit.folds].sum()
        return self._residuals(
            fit, strengths, yy - torch.outer(fit.mean_t, fit.mean_t), fit.zz, fit.zt
        )

    def score(self, strengths: _Strengths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-likelihood ratios on each fold, shape ``[fold, target]`` each.

        Returns:
            Held out at the chosen strength; held out at the weakest; and the training score at the
            weakest less its optimism.
        """
        n_folds = len(self.count)
        spread: dict[int, _Residuals] = {}
        for pair in ring(n_folds):
            fit = self.sums.fit(pair)
            for outer, inner in (pair, pair[::-1]):
                left = self.tested(fit, inner, strengths.chosen[outer])
                neighbors = self.count[(outer + 1) % n_folds] + self.count[(outer - 1) % n_folds]
                so_far = spread.get(outer, left)
                spread[outer] = so_far.plus(left, self.count[inner] / neighbors)
        held_out, light, corrected = np.zeros((3, n_folds, self.n_targets))
        for k in range(n_folds):
            fit = self.sums.fit([k])
            held_out[k] = _log_ratio(self.tested(fit, k, strengths.chosen[k]), spread[k])
            trained = self.trained(fit, strengths.weakest)
            light[k] = _log_ratio(self.tested(fit, k, strengths.weakest), trained)
            training = _log_ratio(trained, trained)
            # A fold that happens to score above training shows no optimism.
            gap = np.maximum(training - light[k], 0.0) / self.n_features
            corrected[k] = training - self.n_features / 2 * np.log1p(gap)
        return held_out, light, corrected

    def _residuals(
        self,
        fit: RidgeFit,
        strengths: Float[np.ndarray, " target"],
        yy: Float[Tensor, "column column"],
        zz: Float[Tensor, "width width"],
        zt: Float[Tensor, "width column"],
    ) -> _Residuals:
        null = self._blocks(yy)
        null_floor = RESOLUTION * _largest_variance(null)
        if np.isinf(strengths).all():
            return _Residuals(null, null, null_floor, null_floor)
        weights = self._weights(fit, strengths)
        # E (y - W z)(y - W z)^T = yy - W^T zy - (W^T zy)^T + W^T zz W, target by target. The null
        # reader has no weights, and is left exactly as it is.
        by_target = "d (t f) -> t d f"
        w = rearrange(weights, by_target, f=self.n_features)
        change = w.mT @ rearrange(zz @ weights / 2 - zt, by_target, f=self.n_features)
        residual = null + change + change.mT
        reader_floor = null_floor + RESOLUTION * _largest_variance(w.mT @ w)
        if torch.linalg.cholesky_ex(residual + _isotropic(reader_floor, residual)).info.any():
            # Variances below zero are rounding, and show its size.
            lowest = torch.linalg.eigvalsh(residual)[:, 0]
            reader_floor = reader_floor + 2 * (-lowest).clamp(min=0.0)
        return _Residuals(residual, null, reader_floor, null_floor)

    def _weights(
        self, fit: RidgeFit, strengths: Float[np.ndarray, " target"]
    ) -> Float[Tensor, "width column"]:
        """Every target's weights at its own strength; zeros for the null reader."""
        weights = torch.zeros_like(fit.zt)
        for strength in set(strengths.tolist()) - {np.inf}:
            targets = np.flatnonzero(strengths == strength)
            columns = (targets[:, None] * self.n_features + np.arange(self.n_features)).ravel()
            chosen = tuple(columns.tolist())
            weights[:, list(chosen)] = fit.weights(strength, chosen)
        return weights

    def _blocks(self, matrix: Float[Tensor, "c c"]) -> Float[Tensor, "target f f"]:
        """The diagonal block of every target."""
        split = rearrange(matrix, "(t f) (u g) -> t u f g", f=self.n_features, g=self.n_features)
        index = torch.arange(self.n_targets)
        return split[index, index]


def _choose_strengths(readers: Sequence[_SiteReader]) -> _Strengths:
    """Strengths from inner fits at a few sites: the least held-out log-determinant decides."""
    n_folds, n_targets = len(readers[0].count), readers[0].n_targets
    cost = np.zeros((n_folds, len(RIDGE_GRID), n_targets))
    optimism = np.zeros((len(RIDGE_GRID), n_targets))
    for reader in readers:
        for pair in ring(n_folds):
            fit = reader.sums.fit(pair)
            for index, strength in enumerate(RIDGE_GRID):
                everywhere = np.full(n_targets, strength)
                trained = reader.trained(fit, everywhere)
                training = _log_ratio(trained, trained)
                for outer, inner in (pair, pair[::-1]):
                    left = reader.tested(fit, inner, everywhere)
                    log_det = _log_det(left.reader_spread).cpu().numpy()
                    cost[outer, index] += reader.count[inner] * log_det
                    optimism[index] += training - _log_ratio(left, trained)
    grid = np.array(RIDGE_GRID)
    bearable = optimism / (2 * n_folds * len(readers)) <= MAX_OPTIMISM * readers[0].n_features
    # The null reader shows no optimism, so there always is a first bearable strength.
    return _Strengths(chosen=grid[cost.argmin(axis=1)], weakest=grid[bearable.argmax(axis=0)])


def _log_ratio(tested: _Residuals, expected: _Residuals) -> Float[np.ndarray, " target"]:
    """Mean log-likelihood ratio of the reader against the null reader, nats per token."""
    root = torch.linalg.cholesky(expected.reader_spread)
    root_null = torch.linalg.cholesky(expected.null_spread)
    trace = torch.cholesky_solve(tested.reader, root).diagonal(dim1=-2, dim2=-1).sum(-1)
    trace_null = torch.cholesky_solve(tested.null, root_null).diagonal(dim1=-2, dim2=-1).sum(-1)
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det_null = 2 * root_null.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    ratio: np.ndarray = (0.5 * (log_det_null - log_det + trace_null - trace)).cpu().numpy()
    return ratio


def _log_det(matrix: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    root: Tensor = torch.linalg.cholesky(matrix)
    return 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _largest_variance(matrix: Float[Tensor, "target f f"]) -> Float[Tensor, " target"]:
    return matrix.diagonal(dim1=-2, dim2=-1).amax(dim=-1)


def _isotropic(floor: Float[Tensor, " target"], like: Tensor) -> Float[Tensor, "target f f"]:
    return floor[:, None, None] * torch.eye(like.shape[-1]).to(like)
