"""Signals of different units side by side: by their ranks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata


def rank_normalize(signals: Float[np.ndarray, "*draw block signal"]) -> np.ndarray:
    """Ranks within each column, with mean 0 and variance 1; ties share their mean rank.

    A monotone column becomes a straight line, whatever its shape, and no outlier outweighs the
    rest.
    """
    n_layers = signals.shape[-2]
    ranks = rankdata(signals, axis=-2)
    normalized: np.ndarray = (ranks - (n_layers + 1) / 2) / np.sqrt((n_layers**2 - 1) / 12)
    return normalized
