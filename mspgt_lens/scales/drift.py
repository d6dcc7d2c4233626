"""Gradual drift with depth, jumps on top of it, and series regenerated from either.

A model of the rows of a matrix (one row per block): ``row = drift + jumps + noise``. Drift is
smooth in depth and free for every column: a Legendre polynomial, or one logistic transition that
all columns share in place and width. Jumps are steps that all columns share in place. Noise is
autoregressive of order one along depth and correlated across columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

# Lag-one autocorrelations tried.
CORRELATIONS = (-0.3, 0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
MAX_ORDER = 5
# The steepest logistic that still counts as gradual: 10 to 90% takes 4.4 times this many blocks.
LOGISTIC_SCALES = (1.25, 1.6, 2.0, 2.7, 3.6, 5.0, 7.0, 10.0)
_MAX_CENTERS = 24
MAX_JUMPS = 3
_TRIPLES_PER_CHUNK = 20_000_000


def rank_normalize(signals: Float[np.ndarray, "*draw block signal"]) -> np.ndarray:
    """Ranks within each column, with mean 0 and variance 1; ties share their mean rank.

    A monotone column becomes a straight line, whatever its shape, and no outlier outweighs the
    rest.
    """
    n_blocks = signals.shape[-2]
    ranks = rankdata(signals, axis=-2)
    normalized: np.ndarray = (ranks - (n_blocks + 1) / 2) / np.sqrt((n_blocks**2 - 1) / 12)
    return normalized


def legendre(n_blocks: int, order: int) -> Float[np.ndarray, "block order"]:
    """Legendre polynomials 0 ... order at evenly spaced depths."""
    depth = np.linspace(-1.0, 1.0, n_blocks)
    basis: np.ndarray = np.polynomial.legendre.legvander(depth, order)
    return basis


def logistic(n_blocks: int, center: float, scale: float) -> Float[np.ndarray, " block"]:
    """One gradual transition around block ``center``; 10 to 90% takes ``4.4 * scale`` blocks."""
    curve: np.ndarray = 1.0 / (1.0 + np.exp(-(np.arange(n_blocks) - center) / scale))
    return curve


def steps(n_blocks: int, boundaries: Iterable[int]) -> Float[np.ndarray, "block boundary"]:
    """One column per boundary: 0 before it, 1 from it on."""
    return (np.arange(n_blocks)[:, None] >= np.array(list(boundaries), dtype=int)).astype(float)


def whiten(rows: Float[np.ndarray, "*draw block c"], correlation: float) -> np.ndarray:
    """Rows made independent, if their lag-one autocorrelation is as given."""
    white = rows.copy()
    white[..., 1:, :] -= correlation * rows[..., :-1, :]
    white[..., 0, :] *= np.sqrt(1.0 - correlation**2)
    return white


@dataclass(frozen=True)
class Fit:
    """One description of a matrix: drift, jumps, and the noise that is left.

    Attributes:
        basis: Columns that drift and jumps are made of, shape ``[block, column]``.
        boundaries: Where the jumps are.
        correlation: Lag-one autocorrelation of the noise.
        drift: In words.
    """

    basis: Float[np.ndarray, "block column"]
    boundaries: tuple[int, ...]
    correlation: float
    drift: str

    def fitted(self, matrix: Float[np.ndarray, "block signal"]) -> Float[np.ndarray, "block s"]:
        """What drift and jumps explain, by generalized least squares."""
        white = whiten(self.basis, self.correlation)
        solution = np.linalg.lstsq(white, whiten(matrix, self.correlation), rcond=None)[0]
        explained: np.ndarray = self.basis @ solution
        return explained

    def regenerate(
        self, matrix: Float[np.ndarray, "block signal"], n_draws: int, rng: np.random.Generator
    ) -> Float[np.ndarray, "draw block signal"]:
        """Matrices with the same drift and jumps and new noise, as large at every block."""
        innovations = whiten(matrix - self.fitted(matrix), self.correlation)
        root = _covariance_root(innovations, len(matrix) - self.basis.shape[1])
        return self._with(matrix, rng.standard_normal((n_draws, *matrix.shape)) @ root)

    def flip(
        self, matrix: Float[np.ndarray, "block signal"], n_draws: int, rng: np.random.Generator
    ) -> Float[np.ndarray, "draw block signal"]:
        """The same with each block's own noise, its sign drawn (the wild bootstrap: Wu 1986).

        Blocks keep the size of their noise and the correlations between columns that it has.
        """
        white, _ = np.linalg.qr(whiten(self.basis, self.correlation))
        rows = whiten(matrix, self.correlation)
        left = rows - white @ (white.T @ rows)
        # What the fit took from a block's noise is given back, up to where nothing else is left.
        left /= np.sqrt((1.0 - (white**2).sum(axis=1)).clip(min=0.1))[:, None]
        return self._with(matrix, rng.choice([-1.0, 1.0], (n_draws, len(matrix), 1)) * left)

    def _with(
        self,
        matrix: Float[np.ndarray, "block signal"],
        innovations: Float[np.ndarray, "draw block signal"],
    ) -> Float[np.ndarray, "draw block signal"]:
        noise = innovations.copy()
        noise[:, 0] /= np.sqrt(1.0 - self.correlation**2)
        for block in range(1, len(matrix)):
            noise[:, block] += self.correlation * noise[:, block - 1]
        drawn: np.ndarray = self.fitted(matrix) + noise
        return drawn


def _covariance_root(
    innovations: Float[np.ndarray, "block signal"], freedom: int
) -> Float[np.ndarray, "signal signal"]:
    """Symmetric root of the innovations' covariance, without correlations that chance alone gives.

    Between few blocks, chance correlates columns; correlations within two of its standard
    deviations are taken for nothing, larger ones as they are (Bickel and Levina 2008).
    """
    covariance = innovations.T @ innovations / max(freedom, 1)
    deviation = np.sqrt(np.diag(covariance))
    unit = np.where(deviation > 0, deviation, 1.0)
    correlation = covariance / np.outer(unit, unit)
    kept = np.abs(correlation) > 2 / np.sqrt(max(freedom, 1))
    thresholded = np.where(kept | np.eye(len(kept), dtype=bool), correlation, 0.0)
    values, vectors = np.linalg.eigh(thresholded)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T * deviation
    return root


@dataclass(frozen=True)
class Search:
    """Penalized log-likelihoods of many matrices at once, and where each is best.

    ``scores[K]`` has shape ``[order, correlation, draw]`` for K = 0 ... 3 jumps beyond a polynomial
    drift; ``places[K]`` indexes the placements of K jumps. ``gradual`` has shape
    ``[shape, correlation, draw]`` for logistic drift without jumps, and ``shapes`` the logistic.
    """

    plan: SearchPlan
    scores: dict[int, np.ndarray]
    places: dict[int, np.ndarray]
    gradual: np.ndarray
    shapes: np.ndarray

    def best(self, n_jumps: int) -> Float[np.ndarray, " draw"]:
        """The best description's score with this many jumps; without any, drift of every kind."""
        score: np.ndarray = self.scores[n_jumps].max(axis=(0, 1))
        if n_jumps == 0 and self.gradual.size:
            score = np.maximum(score, self.gradual.max(axis=(0, 1)))
        return score

    def boundaries(self, n_jumps: int) -> Int[np.ndarray, "draw jump"]:
        """The best placement of so many jumps for every matrix."""
        scores, places = self.scores[n_jumps], self.places[n_jumps]
        flat = scores.reshape(-1, scores.shape[-1]).argmax(axis=0)
        chosen = places.reshape(-1, scores.shape[-1])[flat, np.arange(scores.shape[-1])]
        found: np.ndarray = self.plan.candidates[self.plan.placements[n_jumps][chosen]]
        return found


class SearchPlan:
    """Everything about the search that does not depend on the data; see :func:`search_plan`."""

    def __init__(self, n_blocks: int, min_size: int) -> None:
        self.n_blocks, self.min_size = n_blocks, min_size
        self.candidates = np.arange(min_size, n_blocks - min_size + 1)
        self.max_jumps = min(MAX_JUMPS, n_blocks // min_size - 1)
        # Jumps and drift together leave at least two blocks' worth of freedom.
        self.orders = tuple(range(min(MAX_ORDER, n_blocks // 4) + 1))
        index = range(len(self.candidates))
        self.placements = {
            k: np.array(
                [c for c in combinations(index, k) if all(np.diff(c) >= min_size)], dtype=int
            ).reshape(-1, k)
            for k in range(1, self.max_jumps + 1)
        }
        self.polynomials = [self._polynomial(rho) for rho in CORRELATIONS]

    def _polynomial(self, correlation: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per order, orthonormal drift and unit steps orthogonal to it, whitened, float32."""
        basis, _ = np.linalg.qr(whiten(legendre(self.n_blocks, self.orders[-1]), correlation))
        jumps = whiten(steps(self.n_blocks, self.candidates), correlation)
        designs = []
        for order in self.orders:
            drift = basis[:, : order + 1]
            beyond = jumps - drift @ (drift.T @ jumps)
            beyond /= np.linalg.norm(beyond, axis=0)
            designs.append((drift.astype(np.float32), beyond.astype(np.float32)))
        return designs

    @cached_property
    def logistic_shapes(self) -> list[list[tuple[float, float]]]:
        """Centers and scales of logistic drift, once alone and once beside a straight line."""
        n = self.n_blocks
        centers = np.linspace(2, n - 3, min(n - 4, _MAX_CENTERS))
        scales = [s for s in LOGISTIC_SCALES if s <= n / 4]
        shapes = [(float(c), s) for s in scales for c in centers]
        return [shapes, shapes] if n >= 8 else [shapes]

    def logistic_basis(self, degree: int, index: int) -> Float[np.ndarray, "block column"]:
        """Polynomial of the degree beside one logistic."""
        center, scale = self.logistic_shapes[degree][index]
        curve = logistic(self.n_blocks, center, scale)
        return np.column_stack([legendre(self.n_blocks, degree), curve])

    @cached_property
    def logistics(self) -> list[list[np.ndarray]]:
        """Per correlation and degree, orthonormal rows of every logistic drift, float32."""
        return [
            [
                np.stack(
                    [
                        np.linalg.qr(whiten(self.logistic_basis(degree, i), rho))[0].T
                        for i in range(len(shapes))
                    ]
                ).astype(np.float32)
                for degree, shapes in enumerate(self.logistic_shapes)
            ]
            for rho in CORRELATIONS
        ]

    def search(
        self, matrices: Float[np.ndarray, "draw block signal"], max_jumps: int | None = None
    ) -> Search:
        """Score every description of every matrix.

        The score is the Gaussian log-likelihood less half the logarithm of the number of blocks per
        free parameter (the Bayesian information criterion); all columns share one variance.
        """
        n_draws, n, m = matrices.shape
        jumps = range(1, 1 + (self.max_jumps if max_jumps is None else max_jumps))
        single = np.asarray(matrices, dtype=np.float32)
        price = np.log(n) / 2
        # What ranks cannot resolve is noise too: half a rank either way.
        floor = n * m / (n**2 - 1)
        shape = (len(self.orders), len(CORRELATIONS), n_draws)
        scores = {k: np.full(shape, -np.inf) for k in (0, *jumps)}
        places = {k: np.zeros(shape, dtype=int) for k in jumps}
        n_degrees = len(self.logistic_shapes)
        gradual = np.full((n_degrees, len(CORRELATIONS), n_draws), -np.inf)
        shapes = np.zeros(gradual.shape, dtype=int)
        pairs = self.placements.get(2)
        every = np.arange(n_draws)
        for r, correlation in enumerate(CORRELATIONS):
            white = whiten(single, correlation)
            total = (white.astype(float) ** 2).sum(axis=(1, 2)) + floor
            flat = np.ascontiguousarray(white.transpose(1, 0, 2)).reshape(n, n_draws * m)
            constant = m / 2 * np.log(1.0 - correlation**2)

            def score(left: np.ndarray, n_parameters: float, base: float = constant) -> np.ndarray:
                value: np.ndarray = base - n * m / 2 * np.log(left) - price * n_parameters
                return value

            for i, order in enumerate(self.orders):
                drift, beyond = self.polynomials[r][i]
                taken = ((drift.T @ flat) ** 2).reshape(-1, n_draws, m).sum(axis=(0, 2))
                left = np.maximum(total - taken, floor)
                scores[0][i, r] = score(left, m * (order + 1))
                along = (beyond.T @ flat).reshape(-1, n_draws, m).transpose(1, 0, 2)
                single_gain = (along**2).sum(axis=2)
                gains = {1: single_gain}
                if pairs is not None and 2 in jumps:
                    a, b = pairs.T
                    product = np.matmul(along, along.transpose(0, 2, 1))[:, a, b]
                    overlap = (beyond[:, a] * beyond[:, b]).sum(axis=0)
                    gains[2] = (single_gain[:, a] + single_gain[:, b] - 2 * overlap * product) / (
                        1 - overlap**2
                    )
                for k, gain in gains.items():
                    best = gain.argmax(axis=1)
                    places[k][i, r] = best
                    remaining = np.maximum(left - gain[every, best], floor)
                    scores[k][i, r] = score(remaining, m * (order + 1 + k) + k)
            for degree, rows in enumerate(self.logistics[r]):
                taken = ((rows.reshape(-1, n) @ flat) ** 2).reshape(*rows.shape[:2], n_draws, m)
                gain = taken.sum(axis=(1, 3))
                best = gain.argmax(axis=0)
                shapes[degree, r] = best
                left = np.maximum(total - gain[best, every], floor)
                gradual[degree, r] = score(left, m * (degree + 2) + 2)
        if 3 in jumps:
            self._triples(single, scores, places, floor, price)
        return Search(self, scores, places, gradual, shapes)

    def _triples(
        self,
        matrices: Float[np.ndarray, "draw block signal"],
        scores: dict[int, np.ndarray],
        places: dict[int, np.ndarray],
        floor: float,
        price: float,
    ) -> None:
        """Three jumps, at the drift order and correlation that are best for two."""
        n_draws, n, m = matrices.shape
        flat = scores[2].reshape(-1, n_draws).argmax(axis=0)
        a, b, c = self.placements[3].T
        chunk = max(1, _TRIPLES_PER_CHUNK // len(a))
        for at in np.unique(flat):
            i, r = divmod(int(at), len(CORRELATIONS))
            drift, beyond = self.polynomials[r][i]
            overlap = beyond.T @ beyond
            ab, ac, bc = overlap[a, b], overlap[a, c], overlap[b, c]
            determinant = 1 + 2 * ab * ac * bc - ab**2 - ac**2 - bc**2
            weights = (
                (a, a, (1 - bc**2) / determinant),
                (b, b, (1 - ac**2) / determinant),
                (c, c, (1 - ab**2) / determinant),
                (a, b, 2 * (ac * bc - ab) / determinant),
                (a, c, 2 * (ab * bc - ac) / determinant),
                (b, c, 2 * (ab * ac - bc) / determinant),
            )
            for mine in np.array_split(
                mine_all := np.flatnonzero(flat == at), -(-len(mine_all) // chunk)
            ):
                white = whiten(matrices[mine], CORRELATIONS[r])
                along = np.matmul(beyond.T, white)
                products = np.matmul(along, along.transpose(0, 2, 1))
                gain = np.zeros((len(mine), len(a)), dtype=np.float32)
                for first, second, weight in weights:
                    gain += products[:, first, second] * weight
                best = gain.argmax(axis=1)
                total = (white.astype(float) ** 2).sum(axis=(1, 2)) + floor
                taken = (np.matmul(drift.T, white) ** 2).sum(axis=(1, 2))
                left = total - taken - gain[np.arange(len(mine)), best]
                places[3][i, r, mine] = best
                scores[3][i, r, mine] = (
                    m / 2 * np.log(1 - CORRELATIONS[r] ** 2)
                    - n * m / 2 * np.log(np.maximum(left, floor))
                    - price * (m * (self.orders[i] + 4) + 3)
                )

    def describe(
        self,
        search: Search,
        matrix: Float[np.ndarray, "block signal"],
        n_jumps: int,
        generous: bool = False,
    ) -> Fit:
        """The best description with so many jumps of the first matrix searched.

        Args:
            search: From :meth:`search`.
            matrix: That matrix.
            n_jumps: How many jumps.
            generous: Charge free parameters by Akaike's criterion, corrected for few blocks. Drift
                that is fitted too stiffly would leave its own misfit as evidence for jumps.
        """
        n, m = matrix.shape

        def refund(n_columns: np.ndarray) -> np.ndarray:
            change = np.log(n) / 2 - n / (n - n_columns - 1) if generous else 0.0
            back: np.ndarray = (m * n_columns * change)[:, None]
            return back

        by_order = search.scores[n_jumps][:, :, 0] + refund(np.array(self.orders) + 1)
        i, r = np.unravel_index(by_order.argmax(), by_order.shape)
        if n_jumps:
            place = self.placements[n_jumps][search.places[n_jumps][i, r, 0]]
            boundaries = tuple(int(b) for b in self.candidates[place])
        else:
            boundaries = ()
        basis = legendre(n, self.orders[i])
        words = ("none", "linear", "quadratic", "cubic", "quartic", "quintic")[self.orders[i]]
        if n_jumps == 0 and search.gradual.size:
            degrees = np.arange(search.gradual.shape[0])
            by_shape = search.gradual[:, :, 0] + refund(degrees + 2)
            if by_shape.max() > by_order.max():
                degree, r = np.unravel_index(by_shape.argmax(), by_shape.shape)
                shape = int(search.shapes[degree, r, 0])
                basis = self.logistic_basis(int(degree), shape)
                center, scale = self.logistic_shapes[int(degree)][shape]
                words = f"logistic around block {center:.0f}, 10 to 90% in {4.4 * scale:.0f} blocks"
        basis = np.column_stack([basis, steps(n, boundaries)])
        return Fit(basis, boundaries, _correlation(matrix, basis), words)


@lru_cache(maxsize=16)
def search_plan(n_blocks: int, min_size: int) -> SearchPlan:
    """The plan for matrices of so many blocks and segments of at least ``min_size`` blocks."""
    return SearchPlan(n_blocks, min_size)


def _correlation(
    matrix: Float[np.ndarray, "block signal"], basis: Float[np.ndarray, "block column"]
) -> float:
    """Lag-one autocorrelation by restricted maximum likelihood, pooled over columns.

    The restricted likelihood corrects for the fitted columns, which make noise look less
    correlated than it is.
    """
    n, m = matrix.shape
    best, chosen = -np.inf, 0.0
    for correlation in CORRELATIONS:
        q, r = np.linalg.qr(whiten(basis, correlation))
        white = whiten(matrix, correlation)
        left = ((white - q @ (q.T @ white)) ** 2).sum() + n * m / (n**2 - 1)
        likelihood = (
            m / 2 * np.log(1.0 - correlation**2)
            - m * np.log(np.abs(np.diag(r))).sum()
            - (n - basis.shape[1]) * m / 2 * np.log(left)
        )
        if likelihood > best:
            best, chosen = likelihood, correlation
    return chosen
