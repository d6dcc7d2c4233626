"""What rival theories say of curves over depth, as numbers with intervals over groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import stats

from mspgt_lens.estimates import Curve
from mspgt_lens.statistics import LEVEL, jackknife_interval
from mspgt_lens.theory.judging import Interval

# A residual is massive where its norm is so many times the prompt's median.
MASSIVE = 10.0


def of_curve(
    curve: Curve, statistic: Callable[[Float[np.ndarray, " point"]], float]
) -> Interval | str:
    """A smooth function of a curve, with its jackknife interval over groups.

    Args:
        curve: The curve, with values per fold.
        statistic: From the curve's values to the number.

    Returns:
        The value and its interval; why there is none, in words, without values per fold.
    """
    if curve.by_fold is None:
        return "the curve holds no values per group"
    value = statistic(curve.values)
    without = [[statistic(rest)] for _, rest in _folds(curve)]
    (low,), (high,) = jackknife_interval(np.array([value]), np.array(without))
    return value, float(low), float(high)


def valley(curve: Curve) -> Interval | str:
    """How deep an interior valley is, as a share of its lower shore.

    The lowest interior site and the highest site on either side of it are sought in all folds of
    groups but one, and compared in that one, so that noise makes no valley: where a curve is flat,
    the expectation is 0. The shore is the lower of the two.

    Args:
        curve: Values over sites, all positive.

    Returns:
        The mean over folds; below 0 where no interior site is lower than both shores. Its interval
        is t over folds, and reaches up from the valley as it is in all folds at once, if that is
        deeper.
    """
    return _over_folds(curve, -1.0)


def peak(curve: Curve) -> Interval | str:
    """How high an interior peak is above the higher of its two feet, as a share of the peak.

    Sought and compared as in :func:`valley`.

    Args:
        curve: Values over sites, all positive.
    """
    return _over_folds(curve, 1.0)


def early(curve: Curve) -> Interval | str:
    """By how much the highest site before half depth exceeds the highest from there on.

    As a share of the higher of the two; sites are sought in all folds but one and compared in it.

    Args:
        curve: Values over sites, all positive.
    """
    half = len(curve) // 2

    def one(rest: np.ndarray, own: np.ndarray) -> float:
        first, second = int(rest[:half].argmax()), half + int(rest[half:].argmax())
        return float((own[first] - own[second]) / max(rest[first], rest[second]))

    return _crossed(curve, one)


def difference(one: Interval, other: Interval) -> Interval:
    """Of two independent statistics.

    Args:
        one: With its interval.
        other: What is subtracted.
    """
    value = one[0] - other[0]
    below = np.hypot(one[0] - one[1], other[2] - other[0])
    above = np.hypot(one[2] - one[0], other[0] - other[1])
    return value, value - float(below), value + float(above)


def massive_blocks(norm: Float[np.ndarray, " site"]) -> tuple[int, int] | None:
    """The block that makes the first position's norm massive, and the one that ends it.

    The largest rise of its logarithm, and the largest fall after that.

    Args:
        norm: Of the first position's residual over the prompt's median, shape ``[site]``.

    Returns:
        Both blocks, 0 ... L - 1; None where the norm is nowhere massive.
    """
    if norm.max() < MASSIVE:
        return None
    steps = np.diff(np.log(norm))
    onset = int(steps[:-1].argmax())
    return onset, onset + 1 + int(steps[onset + 1 :].argmin())


def relief(
    sought: Float[np.ndarray, " site"], read: Float[np.ndarray, " site"], sign: float
) -> tuple[int, float]:
    """The interior site of a peak or of a valley, and how far it stands out.

    As a share of the peak over the higher of its two feet, or of the valley under the lower of its
    two shores.

    Args:
        sought: Where the site and what it is held against are sought.
        read: Where they are compared.
        sign: 1 for a peak, -1 for a valley.
    """
    up = sign * sought
    top = 1 + int(up[1:-1].argmax())
    left, right = int(up[:top].argmin()), top + 1 + int(up[top + 1 :].argmin())
    against = left if up[left] > up[right] else right
    whole = sought[top] if sign > 0 else sought[against]
    return top, float(sign * (read[top] - read[against]) / whole)


def step_against_line(effect: Float[np.ndarray, " block"]) -> float:
    """Logarithm of the squared error of one step at half depth over that of a straight line.

    Of the square root of the effects (which for a KL divergence grows like the size of the change),
    without the first and the last block. Both descriptions have two numbers and no place to choose.

    Args:
        effect: Of every block, at least 0, shape ``[block]``.
    """
    n = len(effect)
    blocks = np.arange(1, n - 1)
    root = np.sqrt(effect[1:-1].clip(min=0))

    def left(column: np.ndarray) -> float:
        design = np.column_stack([np.ones(len(blocks)), column])
        return float(((root - design @ np.linalg.lstsq(design, root, rcond=None)[0]) ** 2).sum())

    # So that curves without any spread leave as much either way.
    tiny = 1e-12 * max(float((root**2).sum()), 1e-300)
    return float(np.log((left(blocks >= n / 2) + tiny) / (left(blocks.astype(float)) + tiny)))


def halves(effect: Float[np.ndarray, " block"]) -> float:
    """Mean of the second half of the blocks over that of the first; its logarithm.

    The first and the last block are left out: the last cannot change later tokens.

    Args:
        effect: Of every block, positive, shape ``[block]``.
    """
    half = np.arange(1, len(effect) - 1) >= len(effect) / 2
    return float(np.log(effect[1:-1][half].mean() / effect[1:-1][~half].mean()))


def _folds(curve: Curve) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each fold's own values, and the curve without that fold."""
    assert curve.by_fold is not None
    # Folds shift the curve as a whole, so that their weights do not matter here.
    moved = curve.values - curve.by_fold.mean(axis=0)
    return [
        (own, np.delete(curve.by_fold, k, axis=0).mean(axis=0) + moved)
        for k, own in enumerate(curve.by_fold)
    ]


def _crossed(curve: Curve, one: Callable[[np.ndarray, np.ndarray], float]) -> Interval | str:
    if curve.by_fold is None:
        return "the curve holds no values per group"
    values = np.array([one(rest, own) for own, rest in _folds(curve)])
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    # Sites that are sought elsewhere miss the extremes a little, sites sought here overstate them.
    sought_here = one(curve.values, curve.values)
    return mean, mean - float(reach), max(mean, sought_here) + float(reach)


def _over_folds(curve: Curve, sign: float) -> Interval | str:
    return _crossed(curve, lambda rest, own: relief(rest, own, sign)[1])
