"""The unigram model that information about tokens is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mspgt_lens.moments import Moments

UNIGRAM_GRID = tuple(10.0 ** np.arange(-4.0, 1.0, 0.5))


def unigram_log_probability(
    moments: Moments, left_out: Sequence[int]
) -> Float[np.ndarray, " vocab"]:
    """Log-probabilities from the counts of all folds but some, over the whole vocabulary.

    They are smoothed by a strength chosen among those folds: without the next one, whose tokens
    score it.
    """
    counts = moments.token_counts.astype(float)
    n_folds, d_vocab = counts.shape
    tested = next(
        k for k in ((left_out[0] + i) % n_folds for i in range(1, n_folds)) if k not in left_out
    )
    outer = counts.sum(0) - counts[list(left_out)].sum(0)
    inner = outer - counts[tested]
    likelihood = [
        counts[tested] @ np.log((inner + a) / (inner.sum() + a * d_vocab)) for a in UNIGRAM_GRID
    ]
    smoothing = UNIGRAM_GRID[int(np.argmax(likelihood))]
    log_probability: np.ndarray = np.log((outer + smoothing) / (outer.sum() + smoothing * d_vocab))
    return log_probability


def unigram_entropy(moments: Moments) -> float:
    """Plug-in entropy of the tokens (nats): lower than the unigram model's cross-entropy."""
    counts = moments.token_counts.sum(axis=0).astype(float)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
