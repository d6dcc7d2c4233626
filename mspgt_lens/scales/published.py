"""Boundary detectors by the formulas of the theory's first version (arXiv 2505.18244v1).

Each takes curves over depth and gives the blocks at which a segment begins: none, or however many
there are. What the source leaves open is chosen here, and said with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.signal import find_peaks

DEVIATIONS = 2.0
EQUAL_WEIGHTS = (1 / 3, 1 / 3, 1 / 3)
# Differences below this share of a curve's size are rounding.
_ROUNDING = 1e-9


def information_drops(information: Float[np.ndarray, " block"]) -> tuple[int, ...]:
    """Where the information between neighboring sites falls at once.

    A boundary is where the first difference of ``I(h_l; h_{l+1})`` is more than two standard
    deviations below its mean. The source leaves open how the information is estimated (here: the
    profile's), which of the two blocks the boundary is (here: the one whose own information is the
    lower, so that it begins the segment) and which standard deviation is meant (here: that of all
    differences, divided by their number).

    Args:
        information: Between the sites around each block, shape ``[block]``.
    """
    return _beyond(-_differences(information))


def distance_rises(distance: Float[np.ndarray, " block"]) -> tuple[int, ...]:
    """Where the attention distance rises at once.

    The distance is as published: ``(1/T) sum_t sum_i A_ti |t - i|``, mean over heads, attention to
    the first token kept. The source gives no rule from distances to boundaries; here it is the
    source's rule for information, upward, as the distance is said to grow from scale to scale.

    Args:
        distance: Of each block, shape ``[block]``.
    """
    return _beyond(_differences(distance))


def fused(
    probes: Sequence[Float[np.ndarray, " site"]],
    distance: Float[np.ndarray, " block"],
    information: Float[np.ndarray, " block"],
    weights: Sequence[float],
) -> tuple[int, ...]:
    """Where the weighted score of all three is high.

    ``S = alpha S_probe + beta S_attn + gamma S_MI``, the weights adding up to 1. The source says
    that ``S_probe`` are peaks of scale-specific probes, and leaves open the rest: here ``S_probe``
    is the largest prominence of a peak that any probe has at the site where a block begins, as a
    share of that probe's range; ``S_attn`` is the rise of the attention distance and ``S_MI`` the
    fall of the information, each as a share of its largest. A boundary is where ``S`` is more than
    two standard deviations above its mean.

    Args:
        probes: What each scale's probe reads at every site, each of shape ``[site]``.
        distance: Attention distance of each block, shape ``[block]``.
        information: Between the sites around each block, shape ``[block]``.
        weights: Of probes, attention and information.
    """
    terms = (
        _peaks(probes),
        _shares(_differences(distance)),
        _shares(-_differences(information)),
    )
    return _beyond(np.asarray(weights, dtype=float) @ np.stack(terms))


def check_weights(weights: Iterable[float]) -> tuple[float, float, float]:
    """The three weights of the fusion.

    Args:
        weights: Of probes, attention and information.

    Raises:
        ValueError: If they are not three shares that add up to 1.
    """
    given = tuple(float(w) for w in weights)
    if len(given) != 3 or min(given) < 0 or not np.isclose(sum(given), 1.0):
        raise ValueError(
            "fusion_weights must be three numbers from 0 on (of probes, attention and "
            f"information) that add up to 1, got {given}"
        )
    return given[0], given[1], given[2]


def _differences(curve: Float[np.ndarray, " block"]) -> Float[np.ndarray, " step"]:
    """Of every block but the first, from the one before."""
    steps = np.diff(curve)
    steps[np.abs(steps) <= _ROUNDING * np.abs(curve).max()] = 0.0
    return steps


def _beyond(scores: Float[np.ndarray, " step"]) -> tuple[int, ...]:
    """Blocks whose score is more than two standard deviations above the mean."""
    high = scores > scores.mean() + DEVIATIONS * scores.std()
    return tuple(int(step) + 1 for step in np.flatnonzero(high))


def _shares(changes: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
    risen = changes.clip(min=0)
    return risen / risen.max() if risen.any() else risen


def _peaks(probes: Sequence[Float[np.ndarray, " site"]]) -> Float[np.ndarray, " step"]:
    scores = np.zeros(len(probes[0]) - 2)
    for probe in probes:
        span = float(np.ptp(probe))
        if span > _ROUNDING * np.abs(probe).max():
            sites, properties = find_peaks(probe, prominence=0)
            scores[sites - 1] = np.maximum(scores[sites - 1], properties["prominences"] / span)
    return scores
