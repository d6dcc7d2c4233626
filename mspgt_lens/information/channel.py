"""Compression and block signals in closed form from second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.information.ridge import plus_diagonal
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.products import product


@in_own_state
def channel_rate(covariance: Float[np.ndarray, "d d"], noise: float = 0.1) -> float:
    """Rate of a Gaussian-noise channel fed with this covariance, in nats per use.

    ``1/2 log det(I + covariance / noise)`` (Cover & Thomas 2006, chapter 9). For every distribution
    with this covariance it is an upper bound on ``I(X; X + sqrt(noise) * eps)``, met by the
    Gaussian; and it is exactly the rate that a variational information bottleneck encoder with that
    noise pays against the best Gaussian prior.

    Args:
        covariance: Symmetric, positive semi-definite, shape ``[d, d]``.
        noise: Variance of the channel's noise, > 0.

    Returns:
        Nats, >= 0.

    Raises:
        ValueError: If the covariance is not a covariance, or the noise is not positive.

    Example:
        >>> float(round(ml.arrays.channel_rate(np.eye(2), noise=1.0), 4))  # log 2
        0.6931
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
        total = _over(moments.z_read, chosen, site) + _over(moments.z_rest, chosen, site)
        outer = _over(moments.zz_read, chosen, site) + _over(moments.zz_rest, chosen, site)
        mean = total / count
        covariance = outer.div_(count).addr_(mean, mean, alpha=-1)
        scale = _scales(covariance.diagonal(), coordinates)
        covariance /= torch.outer(scale, scale)
        spread = plus_diagonal(covariance / noise, 1.0)
        root = torch.linalg.cholesky(spread)
        rates.append(float(root.diagonal().log().sum()))
        norms.append(float(covariance.norm()))
        ranks.append(float(covariance.trace() ** 2) / norms[-1] ** 2)
        if before is not None:
            mean_before, scale_before, root_before = before
            cross = _over(moments.z_next, chosen, site - 1).div_(count)
            cross.addr_(mean_before.to(cross), mean.to(cross), alpha=-1)
            cross /= torch.outer(scale_before, scale)
            power = float(cross.pow(2).sum(dtype=torch.float64))
            novelty.append(1.0 - power / (norms[-2] * norms[-1]))
            shared.append(rates[-1] - _rate_left(root_before, spread, cross / noise))
        before = (mean, scale, root)
    return SiteStatistics(
        compression=np.array(rates),
        novelty=np.array(novelty),
        inter_layer=np.array(shared),
        effective_rank=np.array(ranks[1:]),
    )


def _rate_left(
    root: Float[Tensor, "a a"], spread: Float[Tensor, "b b"], cross: Float[Tensor, "a b"]
) -> float:
    """``1/2 log det`` of what the first of two noisy sites leaves of the second's spread."""

    def left(dtype: torch.dtype) -> Tensor:
        explained = torch.linalg.solve_triangular(root.to(dtype), cross.to(dtype), upper=False)
        return spread.to(dtype) - product(explained.T, explained)

    # The noise bounds what these largest products lose in the precision of the cross-moments,
    # unless it is next to nothing itself.
    rest, failed = torch.linalg.cholesky_ex(left(cross.dtype))
    if failed:
        rest = torch.linalg.cholesky(left(torch.float64))
    return float(rest.diagonal().double().log().sum())


def _over(sums: Tensor, folds: Sequence[int], at: int) -> Tensor:
    """The sum over folds at one site; views, since picking folds by index would copy them."""
    total = sums[folds[0], at].clone()
    for fold in folds[1:]:
        total += sums[fold, at]
    return total


def pooled_scale(moments: Moments, site: int, coordinates: Coordinates) -> Float[Tensor, " width"]:
    """What a reader divides each coordinate by: its own deviation, or one deviation for all."""
    count = float(moments.n_valid.sum())
    total = (moments.z_read[:, site] + moments.z_rest[:, site]).sum(dim=0)
    read, rest = (zz[:, site].diagonal(dim1=1, dim2=2) for zz in (moments.zz_read, moments.zz_rest))
    variance = (read + rest).sum(dim=0) / count - (total / count) ** 2
    # Normalized residuals are of size 1, so this is what float32 cannot tell from standing still.
    if variance.max() < 1e-12:
        raise ValueError(
            f"site {site} is the same at every valid position, so nothing can be read from it; "
            "is it ablated by a hook, or is every prompt the same?"
        )
    if coordinates == "raw":
        return variance.mean().sqrt().expand(len(variance))
    return _scales(variance, coordinates)


def _scales(variance: Float[Tensor, " d"], coordinates: Coordinates) -> Float[Tensor, " d"]:
    if coordinates == "raw":
        return torch.ones_like(variance)
    # A coordinate that moves less than float32 resolves has nothing to standardize.
    return torch.where(variance > 1e-14 * variance.mean(), variance, 1.0).sqrt()
