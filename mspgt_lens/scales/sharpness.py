"""Do stages or gradual drift describe depth better? By leaving out one block after another."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float

from mspgt_lens.scales.drift import legendre, steps

_MAX_ORDER = 5
# Blocks per order of the drift.
_BLOCKS_PER_ORDER = 4


def sharpness(
    ranks: Float[np.ndarray, "block signal"], n_steps: int, min_size: int
) -> dict[str, float]:
    """Leave-one-block-out error of stages, drift and both, as shares of the mean's own.

    Drift takes the polynomial order with the least such error, which favors it over stages alone.
    """
    n = len(ranks)
    candidates = np.arange(min_size, n - min_size + 1)
    placements = np.array(
        [c for c in combinations(range(len(candidates)), n_steps) if all(np.diff(c) >= min_size)],
        dtype=int,
    ).reshape(-1, n_steps)

    def error(order: int, stepped: bool) -> float:
        return _error(ranks, order, candidates, placements if stepped else None)

    mean = error(0, False)
    orders = range(1, min(_MAX_ORDER, n // _BLOCKS_PER_ORDER) + 1)
    return {
        "stages": error(0, True) / mean,
        "drift": min(error(order, False) for order in orders) / mean,
        "both": min(error(order, True) for order in orders) / mean,
    }


def _error(
    ranks: Float[np.ndarray, "block signal"],
    order: int,
    candidates: np.ndarray,
    placements: np.ndarray | None,
) -> float:
    """Squared error of predicting one block from all others, for every block in turn.

    Drift is a polynomial; steps are placed anew without the block.
    """
    n, total = len(ranks), 0.0
    everything, jumps = legendre(n, order), steps(n, candidates)
    for left_out in range(n):
        keep = np.arange(n) != left_out
        basis = everything
        if placements is not None:
            q, _ = np.linalg.qr(everything[keep])
            beyond = jumps[keep] - q @ (q.T @ jumps[keep])
            along = beyond.T @ ranks[keep]
            placed = _best_placement(placements, beyond.T @ beyond, along @ along.T)
            basis = np.column_stack([everything, jumps[:, placed]])
        solution = np.linalg.lstsq(basis[keep], ranks[keep], rcond=None)[0]
        total += float(((ranks[left_out] - basis[left_out] @ solution) ** 2).sum())
    return total


def _best_placement(placements: np.ndarray, overlap: np.ndarray, product: np.ndarray) -> np.ndarray:
    chosen = overlap[placements[:, :, None], placements[:, None, :]]
    wanted = product[placements[:, :, None], placements[:, None, :]]
    inverse = np.linalg.pinv(chosen, rcond=1e-9, hermitian=True)
    gain = np.einsum("pab,pba->p", inverse, wanted)
    placement: np.ndarray = placements[gain.argmax()]
    return placement
