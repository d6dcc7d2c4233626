"""What a curve over depth may be without any sharp change.

Every kind is a straight line, free in level and slope, and what varies about it with some
covariance: noise that is new at every block or remembers the last one's, random walks, walks whose
steps wander themselves, smooth curves of several lengths, exponentials, logistics and polynomials
beneath noise. Noise and walks come in several sizes over depth: even, growing, shrinking, larger at
both ends or in a part of it. A series' own kind is weighed by its likelihood, so that none has to
be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

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
_RATES = (-6.0, -3.0, -1.5, 1.5, 3.0, 6.0)
_CENTERS = (0.2, 0.35, 0.5, 0.65, 0.8)
_WIDTHS = (0.06, 0.12)
# The variance of a curve of known shape, from no more than the noise's to as large as it may be.
_SHAPE_VARIANCES = (1.0, 30.0, 1e3, 1e8)
# How the size of noise goes over depth: rates of growth, the rows at both ends and the parts of the
# depth where it is larger, and by how much.
_GROWTHS = (0.0, 1.5, -1.5, 3.0, -3.0, 5.0, -5.0)
_ENDS = (1, 2, 3)
_PARTS = (0.25, 0.33, 0.5)
_MIDDLE = 0.3
_MIDDLES = (-0.2, 0.0, 0.2)
_LARGER = (4.0, 16.0)
# Sums of what every block adds settle like powers of depth, so sizes may, too.
_POWERS = (1.0, 2.0, 3.0)
# The variance of a walk of the curvature, whose noise is the least.
_SMOOTHEST = 1e5
# Keeps covariances of walks regular.
_LEAST = 1e-6


@dataclass(frozen=True)
class Gradual:
    """All kinds for series of so many rows.

    Attributes:
        covariances: Of each kind, shape ``[kind, row, row]``.
        roots: Lower triangles that turn independent draws into them.
        words: What each kind is.
        n_even: The first so many have noise and steps as large at every depth.
    """

    covariances: Float[np.ndarray, "kind row row"]
    roots: Float[np.ndarray, "kind row row"]
    words: tuple[str, ...]
    n_even: int

    def autocorrelation(self, kind: int) -> float:
        """Lag-one autocorrelation about a straight line, between neighboring rows."""
        n = len(self.covariances[kind])
        line, _ = np.linalg.qr(_line(n))
        about = np.eye(n) - line @ line.T
        left = about @ self.covariances[kind] @ about
        return float(np.diag(left, 1).sum() / (n - 1) / (np.trace(left) / n))


@lru_cache(maxsize=64)
def gradual_kinds(n_rows: int) -> Gradual:
    """All kinds for series of ``n_rows`` rows; see the module."""
    rows = np.arange(n_rows)
    summed = np.tril(np.ones((n_rows, n_rows)))
    even: list[tuple[str, np.ndarray]] = []
    uneven: list[tuple[str, np.ndarray]] = []
    for size in _sizes(n_rows):
        made = even if np.ptp(size) == 0 else uneven
        noise = np.diag(size**2)
        for word, shares in _WANDERING.items():
            for level, walk, slope in shares:
                covariance = level * noise + walk * summed @ noise @ summed.T
                covariance += slope * summed @ summed @ noise @ summed.T @ summed.T
                made.append((word, covariance))
        persistent = _PERSISTENCE ** np.abs(np.subtract.outer(rows, rows))
        steps = np.outer(size, size) * persistent
        made.append(("smoothly wandering", summed @ steps @ summed.T))
        thrice = summed @ summed @ summed
        bent = thrice @ noise @ thrice.T
        made.append(("smooth", bent * (_SMOOTHEST / bent.max())))
    apart = np.abs(np.subtract.outer(rows, rows))
    even += [("wandering", np.eye(n_rows) + walk * summed @ summed.T) for walk in _WALKS]
    even += [("wandering", memory**apart) for memory in _MEMORIES]
    # Noise beneath curves is new at every block, remembers the last one's, or is a walk.
    beneath = (np.eye(n_rows), _REMEMBERED**apart, summed @ summed.T)
    # Depth itself, and its logarithm: what settles early is smooth in that.
    for depth in (rows, n_rows * np.log1p(rows) / np.log1p(n_rows)):
        between = np.subtract.outer(depth, depth)
        for part in _LENGTHS:
            smooth = np.exp(-(between**2) / 2 / (n_rows / part) ** 2)
            even += [_on("smooth", v * smooth, noise) for noise in beneath for v in _VARIANCES]
    for word, shape in _shapes(n_rows):
        outer = np.outer(shape, shape)
        even += [_on(word, v * outer, noise) for noise in beneath for v in _SHAPE_VARIANCES]
    # Curves whose noise and course grow or shrink together.
    smooth = np.exp(-(apart**2) / 2 / (n_rows / _LENGTHS[0]) ** 2)
    for rate in _GROWTHS[1:]:
        size = np.exp(rate * np.linspace(-0.5, 0.5, n_rows))
        uneven += [
            ("smooth", np.outer(size, size) * (np.eye(n_rows) + v * smooth)) for v in _VARIANCES
        ]
    kinds = [*even, *uneven]
    covariances = np.stack([c for _, c in kinds]) + _LEAST * np.eye(n_rows)
    words = tuple(word for word, _ in kinds)
    return Gradual(covariances, np.linalg.cholesky(covariances), words, len(even))


def _on(word: str, curve: np.ndarray, noise: np.ndarray) -> tuple[str, np.ndarray]:
    """A curve on noise, named for what varies more about a line; new noise has no course."""
    line, _ = np.linalg.qr(_line(len(curve)))
    of_curve, of_noise = (np.trace(c) - np.trace(line.T @ c @ line) for c in (curve, noise))
    wanders = bool(noise[0, 1]) and of_noise > of_curve
    return "wandering" if wanders else word, noise + curve


def _sizes(n_rows: int) -> list[np.ndarray]:
    """Standard deviations over depth: even, growing or shrinking, larger in some part."""
    depth = np.linspace(-0.5, 0.5, n_rows)
    sizes = [np.exp(rate * depth) for rate in _GROWTHS]
    sizes += [(1.0 + np.arange(n_rows)) ** -power for power in _POWERS]
    at_end = np.minimum(np.arange(n_rows), np.arange(n_rows)[::-1])
    sizes += [np.where(at_end < width, _LARGER[0], 1.0) for width in _ENDS]
    for part in _PARTS:
        for larger in _LARGER:
            sizes += [np.where(side <= part - 0.5, larger, 1.0) for side in (depth, -depth)]
    sizes += [np.where(np.abs(depth - c) < _MIDDLE / 2, _LARGER[0], 1.0) for c in _MIDDLES]
    return list({size.tobytes(): size for size in sizes}.values())


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
