"""What a curve over depth may be without any sharp change.

Every kind is a straight line, free in level and slope, and what varies about it with some
covariance: noise that is new at every block or remembers the last one's, random walks, walks whose
steps wander themselves, smooth curves of several lengths, exponentials, logistics and polynomials
beneath noise. Noise and walks come in several sizes over depth: even, growing, shrinking, larger at
both ends or in a part of it. A series' own kind is weighed by its likelihood, so that none has to
be chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Shares of noise, of its random walk, and of a walk of its slope.
_WANDERING = {
    "even": ((1, 0, 0),),
    "smooth": ((1, 0, 2e-3), (1, 0, 0.05)),
    "wandering": ((1, 0.1, 0), (1, 0.6, 0), (0, 1, 0), (0, 1, 0.1)),
    "smoothly wandering": ((0, 0, 1),),
}
# More of them where sizes are even, the likeliest case: many blocks tell fine differences, and a
# kind that is missing would be made up for by changes. Shares of the walk, and what noise remembers
# of the last row's.
_WALKS = (0.02, 0.05, 0.2, 0.35, 1.0, 1.7, 3.0)
_MEMORIES = (0.2, 0.4, 0.6, 0.8)
_REMEMBERED = 0.6
# A walk whose steps remember the last one.
_PERSISTENCE = 0.6
# Smooth curves: their length as a part of the depth, and their variance in units of the noise's.
_LENGTHS = (2.0, 3.0, 5.0)
_VARIANCES = (1.0, 10.0, 1e3, 1e5)
# Of two such curves together, in the logarithm of depth and in depth itself: what settles early may
# go on to bend slowly.
_SETTLING_LENGTHS = (2.0, 3.0)
_SETTLING_VARIANCES = (1e3, 1e5, 1e7)
_SLOW_LENGTH = 2.0
_SLOW_VARIANCES = (10.0, 1e3)
# How noise beneath them may shrink: like these powers of depth.
_SHRINKING = (0.5, 1.0, 2.0)
_RATES = (-6.0, -3.0, -1.5, 1.5, 3.0, 6.0)
_CENTERS = (0.2, 0.35, 0.5, 0.65, 0.8)
_WIDTHS = (0.06, 0.12)
# The variance of a curve of known shape, from no more than the noise's to as large as it may be.
_SHAPE_VARIANCES = (1.0, 30.0, 1e3, 1e8)
# How the size of noise goes over depth: rates of growth, the rows at both ends and the parts of the
# depth where it is larger, and by how much.
_GROWTHS = (1.5, -1.5, 3.0, -3.0, 5.0, -5.0)
_ENDS = (1, 2, 3)
_PARTS = (0.25, 0.33, 0.5)
_MIDDLE = 0.3
_MIDDLES = (-0.2, 0.0, 0.2)
_LARGER = (4.0, 16.0)
# Sums of what every block adds settle like powers of depth, so sizes may, too.
_POWERS = (1.0, 2.0, 3.0)
# The variance of a walk of the curvature, whose noise is the least.
_SMOOTHEST = 1e5
_EVEN = ("even", "smooth", "exponential", "logistic", "polynomial")
# Keeps covariances of walks regular.
_LEAST = 1e-6
# How likely a series is of each family beforehand, its members alike.
_CHANCES = {
    "even": 0.3,
    "smooth": 0.2,
    "exponential": 0.06,
    "logistic": 0.06,
    "polynomial": 0.06,
    "growing": 0.08,
    "settling": 0.08,
    "ends": 0.14,
    "part": 0.1,
}


@dataclass(frozen=True)
class Gradual:
    """All kinds for series of so many rows.

    Attributes:
        covariances: Of each kind, shape ``[kind, row, row]``.
        roots: Lower triangles that turn independent draws into them.
        words: What each kind is.
        chances: How likely a series is of each kind beforehand.
        jagged: Kinds whose tails may be heavy: noise and walks whose sizes are even over depth, and
            curves of known shape on these. A single large step of what is smooth would be a sharp
            change, and sizes that vary over depth account for some large ones.
    """

    covariances: Float[np.ndarray, "kind row row"]
    roots: Float[np.ndarray, "kind row row"]
    words: tuple[str, ...]
    chances: Float[np.ndarray, " kind"]
    jagged: Int[np.ndarray, " jagged"]

    def autocorrelation(self, kind: int) -> float:
        """Lag-one autocorrelation about a straight line, between neighboring rows."""
        n = len(self.covariances[kind])
        line, _ = np.linalg.qr(_line(n))
        about = np.eye(n) - line @ line.T
        left = about @ self.covariances[kind] @ about
        return float(np.diag(left, 1).sum() / (n - 1) / (np.trace(left) / n))


class _Kind(NamedTuple):
    family: str
    word: str
    covariance: Float[np.ndarray, "row row"]


@lru_cache(maxsize=64)
def gradual_kinds(n_rows: int) -> Gradual:
    """All kinds for series of ``n_rows`` rows; see the module."""
    kinds = [*_even(n_rows), *_uneven(n_rows)]
    covariances = np.stack([kind.covariance for kind in kinds]) + _LEAST * np.eye(n_rows)
    families = [kind.family for kind in kinds]
    chances = np.array([_CHANCES[family] / families.count(family) for family in families])
    smooth = [kind.word in ("smooth", "smoothly wandering") for kind in kinds]
    even = [kind.family in _EVEN for kind in kinds]
    return Gradual(
        covariances=covariances,
        roots=np.linalg.cholesky(covariances),
        words=tuple(kind.word for kind in kinds),
        chances=chances / chances.sum(),
        jagged=np.flatnonzero(np.array(even) & ~np.array(smooth)),
    )


def _even(n_rows: int) -> Iterator[_Kind]:
    """Kinds with noise and steps as large at every depth."""
    rows, white = np.arange(n_rows), np.eye(n_rows)
    summed = np.tril(np.ones((n_rows, n_rows)))
    apart = np.abs(np.subtract.outer(rows, rows))
    yield from _varying("even", np.ones(n_rows))
    for walk in _WALKS:
        yield _Kind("even", "wandering", white + walk * summed @ summed.T)
    for memory in _MEMORIES:
        yield _Kind("even", "wandering", memory**apart)
    # Noise beneath curves is new at every block, remembers the last one's, or is a walk.
    beneath = (white, _REMEMBERED**apart, summed @ summed.T)
    # Depth itself, and its logarithm: what settles early is smooth in that.
    for curve_in in (_curve, _settling_curve):
        for part in _LENGTHS:
            for noise in beneath:
                for variance in _VARIANCES:
                    curve = variance * curve_in(n_rows, part)
                    yield _Kind("smooth", *_on("smooth", curve, noise))
    slow = _curve(n_rows, _SLOW_LENGTH)
    for part in _SETTLING_LENGTHS:
        for variance in _SETTLING_VARIANCES:
            settling = variance * _settling_curve(n_rows, part)
            for slowly in _SLOW_VARIANCES:
                for noise in beneath:
                    yield _Kind("smooth", "smooth", noise + settling + slowly * slow)
            for power in _SHRINKING:
                shrinking = np.diag((1.0 + rows) ** (-2 * power))
                for slowly in (0.0, _SLOW_VARIANCES[0]):
                    yield _Kind("smooth", "smooth", shrinking + settling + slowly * slow)
    for word, shape in _shapes(n_rows):
        for noise in beneath:
            for variance in _SHAPE_VARIANCES:
                yield _Kind(word, *_on(word, variance * np.outer(shape, shape), noise))


def _uneven(n_rows: int) -> Iterator[_Kind]:
    """Kinds with noise and steps that are larger at some depths."""
    for family, size in _sizes(n_rows):
        yield from _varying(family, size)
    # Curves whose noise and course grow or shrink together.
    smooth = _curve(n_rows, _LENGTHS[0])
    for rate in _GROWTHS:
        size = np.exp(rate * np.linspace(-0.5, 0.5, n_rows))
        for variance in _VARIANCES:
            covariance = np.outer(size, size) * (np.eye(n_rows) + variance * smooth)
            yield _Kind("growing", "smooth", covariance)


def _varying(family: str, size: Float[np.ndarray, " row"]) -> Iterator[_Kind]:
    """Noise and walks with such standard deviations over depth."""
    n_rows = len(size)
    noise, rows = np.diag(size**2), np.arange(n_rows)
    summed = np.tril(np.ones((n_rows, n_rows)))
    for word, shares in _WANDERING.items():
        for level, walk, slope in shares:
            covariance = level * noise + walk * summed @ noise @ summed.T
            covariance += slope * summed @ summed @ noise @ summed.T @ summed.T
            yield _Kind(family, word, covariance)
    persistent = _PERSISTENCE ** np.abs(np.subtract.outer(rows, rows))
    steps = np.outer(size, size) * persistent
    yield _Kind(family, "smoothly wandering", summed @ steps @ summed.T)
    thrice = summed @ summed @ summed
    bent = thrice @ noise @ thrice.T
    yield _Kind(family, "smooth", bent * (_SMOOTHEST / bent.max()))


def _curve(n_rows: int, part: float) -> Float[np.ndarray, "row row"]:
    """Covariance of smooth curves, their length such a part of the depth."""
    return _smooth(np.arange(n_rows), n_rows / part)


def _settling_curve(n_rows: int, part: float) -> Float[np.ndarray, "row row"]:
    """The same in the logarithm of depth."""
    depth = n_rows * np.log1p(np.arange(n_rows)) / np.log1p(n_rows)
    return _smooth(depth, n_rows / part)


def _smooth(depth: np.ndarray, length: float) -> Float[np.ndarray, "row row"]:
    value: np.ndarray = np.exp(-(np.subtract.outer(depth, depth) ** 2) / 2 / length**2)
    return value


def _on(word: str, curve: np.ndarray, noise: np.ndarray) -> tuple[str, np.ndarray]:
    """A curve on noise, named for what varies more about a line; new noise has no course."""
    line, _ = np.linalg.qr(_line(len(curve)))
    of_curve, of_noise = (np.trace(c) - np.trace(line.T @ c @ line) for c in (curve, noise))
    wanders = bool(noise[0, 1]) and of_noise > of_curve
    return "wandering" if wanders else word, noise + curve


def _sizes(n_rows: int) -> Iterator[tuple[str, Float[np.ndarray, " row"]]]:
    """Standard deviations over depth: growing or shrinking, larger in some part; with families."""
    depth = np.linspace(-0.5, 0.5, n_rows)
    sizes = [("growing", np.exp(rate * depth)) for rate in _GROWTHS]
    sizes += [("settling", (1.0 + np.arange(n_rows)) ** -power) for power in _POWERS]
    at_end = np.minimum(np.arange(n_rows), np.arange(n_rows)[::-1])
    sizes += [("ends", np.where(at_end < width, _LARGER[0], 1.0)) for width in _ENDS]
    for part in _PARTS:
        for larger in _LARGER:
            for side in (depth, -depth):
                sizes.append(("part", np.where(side <= part - 0.5, larger, 1.0)))
    for center in _MIDDLES:
        middle = np.abs(depth - center) < _MIDDLE / 2
        sizes.append(("part", np.where(middle, _LARGER[0], 1.0)))
    seen = set()
    for family, size in sizes:
        # Few rows leave some no different from others, or even.
        if np.ptp(size) > 0 and size.tobytes() not in seen:
            seen.add(size.tobytes())
            yield family, size


def _shapes(n_rows: int) -> list[tuple[str, np.ndarray]]:
    """Curves of known shape, beyond a straight line, with variance 1."""
    depth = np.linspace(0.0, 1.0, n_rows)
    curves = [("exponential", np.exp(rate * depth)) for rate in _RATES]
    curves += [
        ("logistic", 1 / (1 + np.exp(-(depth - center) / width)))
        for center in _CENTERS
        for width in _WIDTHS
    ]
    curves += [("polynomial", (depth - 0.5) ** order) for order in (2, 3)]
    line, _ = np.linalg.qr(_line(n_rows))
    beyond = [(word, curve - line @ (line.T @ curve)) for word, curve in curves]
    return [(word, curve / curve.std()) for word, curve in beyond]


def _line(n_rows: int) -> Float[np.ndarray, "row 2"]:
    return np.column_stack([np.ones(n_rows), np.arange(n_rows)])
