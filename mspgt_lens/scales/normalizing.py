"""Signals of different units side by side: in units of their noise, or by their ranks.

In units of their noise, signals tell most; but where noise is larger at some depths, large noise
looks like jumps. Ranks bound what any block can do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

# Second differences of white noise have six times its variance, and this is a normal's median.
_SECOND_DIFFERENCE = np.sqrt(6.0)
_NORMAL_MEDIAN = 0.6745
# Second differences beyond this many deviations of the noise count as so many.
_OUTLIER = 2.5
# Noise of the same size throughout is called uneven in one matrix of twenty.
_EVEN_QUANTILE = 0.975
_EVEN_DRAWS = 2000

Normalizer = Callable[[np.ndarray], np.ndarray]


def choose_normalizer(signals: Float[np.ndarray, "block signal"]) -> Normalizer:
    """:func:`noise_normalize` if noise looks as large at every depth, or :func:`rank_normalize`."""
    return noise_normalize if has_even_noise(signals) else rank_normalize


def rank_normalize(signals: Float[np.ndarray, "*draw block signal"]) -> np.ndarray:
    """Ranks within each column, with mean 0 and variance 1; ties share their mean rank.

    A monotone column becomes a straight line, whatever its shape, and no outlier outweighs the
    rest.
    """
    n_layers = signals.shape[-2]
    ranks = rankdata(signals, axis=-2)
    normalized: np.ndarray = (ranks - (n_layers + 1) / 2) / np.sqrt((n_layers**2 - 1) / 12)
    return normalized


def noise_normalize(signals: Float[np.ndarray, "*draw block signal"]) -> np.ndarray:
    """Columns with mean 0, in units of their own noise.

    The noise is what second differences show, which hold little of drift and of a few jumps. To it
    comes a share of the column's deviation, one in the number of blocks, so that no column counts
    as known more finely than its ranks would tell.
    """
    n_layers = signals.shape[-2]
    centered = signals - signals.mean(axis=-2, keepdims=True)
    bend = np.abs(np.diff(centered, n=2, axis=-2)) / _SECOND_DIFFERENCE
    typical = np.median(bend, axis=-2, keepdims=True) / _NORMAL_MEDIAN
    noise = (np.minimum(bend, _OUTLIER * typical) ** 2).mean(axis=-2, keepdims=True)
    resolution = centered.var(axis=-2, keepdims=True) / n_layers**2
    normalized: np.ndarray = centered / np.sqrt(noise + resolution)
    return normalized


def has_even_noise(signals: Float[np.ndarray, "block signal"]) -> bool:
    """Whether second differences are as large at every depth, as far as these blocks can tell.

    Two tests at 2.5% each: that they grow, shrink or bend with depth in any column, and that they
    do, or are different in the first or last two, in all columns together.
    """
    n_layers, n_signals = signals.shape
    bend = np.abs(np.diff(signals, n=2, axis=0))
    if (np.median(bend, axis=0) <= 1e-9 * np.ptp(signals, axis=0)).any():
        return False
    limits = _even_limits(n_layers, n_signals)
    return all(found[0] <= limit for found, limit in zip(_trends(bend[None]), limits, strict=True))


@lru_cache(maxsize=64)
def _even_limits(n_layers: int, n_signals: int) -> tuple[float, ...]:
    noise = np.random.default_rng(0).standard_normal((_EVEN_DRAWS, n_layers, n_signals))
    trends = _trends(np.abs(np.diff(noise, n=2, axis=1)))
    return tuple(float(np.quantile(trend, _EVEN_QUANTILE)) for trend in trends)


def _trends(bend: Float[np.ndarray, "draw block signal"]) -> tuple[np.ndarray, np.ndarray]:
    """Squared trends of log size with depth: of every column, and of all together with the ends."""
    # A tenth of the typical size, so that differences that happen to be tiny do not dominate.
    size = np.log(bend / np.median(bend, axis=1, keepdims=True) + 0.1)
    n, m = size.shape[1:]
    depth = np.polynomial.legendre.legvander(np.linspace(-1.0, 1.0, n), 2)
    ends = np.stack([np.arange(n) < 2, np.arange(n) >= n - 2], axis=1)
    basis, _ = np.linalg.qr(np.column_stack([depth, ends]))
    trends = np.einsum("bt,dbs->dts", basis[:, 1:], size)
    return (trends[:, :2] ** 2).sum(axis=(1, 2)), (trends.sum(axis=2) ** 2).sum(axis=1) / m
