"""How far a matrix speaks for jumps: likelihoods summed over all drifts, noises and placements.

The best of many descriptions is a poor judge where several explain the data about as well; the sum
over them is what a Bayesian would compare, each free parameter charged by the Bayesian information
criterion.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from mspgt_lens.scales.drift import NOISES, Noise, legendre, logistic, steps

MAX_JUMPS = 3
MAX_ORDER = 5
# Blocks per order of the drift, alone and beneath jumps: drift that could follow every jump would
# leave nothing to tell them by.
_BLOCKS_PER_ORDER = 4
_BLOCKS_PER_ORDER_AND_JUMPS = 12
# The steepest logistic that still counts as gradual: 10 to 90% takes 4.4 times this many blocks.
LOGISTIC_SCALES = (1.25, 1.6, 2.0, 2.7, 3.6, 5.0, 7.0, 10.0)
# Centers so close, in scales, that the next one differs by less than a tenth of the rise.
_CENTER_SPACING = 0.5
# Draws times placements at once, so that the arrays stay in the processor's cache.
_PLACEMENTS_PER_CHUNK = 50_000
_TRIPLES_PER_CHUNK = 250_000
# Some residual is left even where everything is explained.
_LEAST_LEFT = 1e-5


@dataclass(frozen=True)
class Search:
    """Log evidence of many matrices at once, and where their jumps are.

    Attributes:
        evidence: Number of jumps to the log evidence of every matrix, up to a constant.
        places: Number of jumps to their likeliest places, to within a block, where asked for.
    """

    evidence: dict[int, Float[np.ndarray, " draw"]]
    places: dict[int, Int[np.ndarray, "draw jump"]]


@dataclass(frozen=True)
class _Design:
    """One noise and order of drift, whitened: orthonormal drift, unit curves orthogonal to it."""

    noise: Noise
    order: int
    drift: Float[np.ndarray, "block order"]
    steps: Float[np.ndarray, "block place"]
    logistics: Float[np.ndarray, "block shape"]
    # Per number of jumps, weights of the products of steps; those of three come when needed.
    weights: dict[int, Float[np.ndarray, "pair placement"]]


class SearchPlan:
    """Everything about the search that does not depend on the data; see :func:`search_plan`."""

    def __init__(self, n_layers: int, min_size: int) -> None:
        self.n_layers, self.min_size = n_layers, min_size
        self.candidates = np.arange(min_size, n_layers - min_size + 1)
        self.max_jumps = min(MAX_JUMPS, n_layers // min_size - 1)
        self.orders = tuple(range(min(MAX_ORDER, n_layers // _BLOCKS_PER_ORDER) + 1))
        self.orders_beneath = self.orders[: n_layers // _BLOCKS_PER_ORDER_AND_JUMPS + 1]
        index = range(len(self.candidates))
        self.placements = {
            k: np.array(
                [c for c in combinations(index, k) if all(np.diff(c) >= min_size)], dtype=int
            ).reshape(-1, k)
            for k in range(1, self.max_jumps + 1)
        }
        # Where the products of a placement's steps lie among those of all steps.
        self._at = {
            k: [
                places[:, row] * len(self.candidates) + places[:, column]
                for row, column in zip(*np.triu_indices(k), strict=True)
            ]
            for k, places in self.placements.items()
        }
        self.logistic_shapes = [
            (float(center), scale)
            for scale in LOGISTIC_SCALES
            if scale <= n_layers / 4
            for center in _centers(n_layers, scale)
        ]
        # Logistic drift stands alone, or beside a straight line where there are blocks for it.
        self.logistic_degrees = range(2 if n_layers >= 8 else 1)
        self._designs = [self._design(noise, order) for noise in NOISES for order in self.orders]

    def logistic_basis(self, degree: int) -> Float[np.ndarray, "shape block column"]:
        """Polynomial of the degree beside every logistic."""
        n = self.n_layers
        polynomial = legendre(n, degree)
        return np.stack(
            [np.column_stack([polynomial, logistic(n, *s)]) for s in self.logistic_shapes]
        )

    def _design(self, noise: Noise, order: int) -> _Design:
        n = self.n_layers
        whitener = noise.whitener(n)
        drift, _ = np.linalg.qr(whitener @ legendre(n, order))

        def beyond(curves: np.ndarray) -> np.ndarray:
            white = whitener @ curves
            white -= drift @ (drift.T @ white)
            unit: np.ndarray = (white / np.linalg.norm(white, axis=0)).astype(np.float32)
            return unit

        jumps, curves = np.zeros((n, 0), np.float32), np.zeros((n, 0), np.float32)
        weights: dict[int, np.ndarray] = {}
        if order in self.orders_beneath:
            jumps = beyond(steps(n, self.candidates))
            weights = {k: self._weights(jumps, k) for k in (1, 2) if k in self.placements}
        if order in self.logistic_degrees and self.logistic_shapes:
            curves = beyond(np.column_stack([logistic(n, *s) for s in self.logistic_shapes]))
        return _Design(noise, order, drift.astype(np.float32), jumps, curves, weights)

    def _weights(
        self, jumps: Float[np.ndarray, "block place"], n_jumps: int
    ) -> Float[np.ndarray, "pair placement"]:
        """Weight of each product of two steps in what a placement explains."""
        placements = self.placements[n_jumps]
        overlap = jumps.T.astype(float) @ jumps
        inverse = np.linalg.inv(overlap[placements[:, :, None], placements[:, None, :]])
        rows, columns = np.triu_indices(n_jumps)
        weights: np.ndarray = inverse[:, rows, columns].T * np.where(rows == columns, 1, 2)[:, None]
        return weights.astype(np.float32)

    def _gains(
        self,
        products: Float[np.ndarray, "draw place place"],
        weights: Float[np.ndarray, "pair placement"],
        n_jumps: int,
    ) -> Float[np.ndarray, "draw placement"]:
        """Sum of squares that each placement explains beyond drift."""
        flat = products.reshape(len(products), -1)
        gains = np.zeros((len(flat), weights.shape[1]), dtype=np.float32)
        for weight, at in zip(weights, self._at[n_jumps], strict=True):
            one = flat.take(at, axis=1)
            one *= weight
            gains += one
        return gains

    def search(
        self,
        matrices: Float[np.ndarray, "draw block signal"],
        max_jumps: int | None = None,
        place: Collection[int] = (),
    ) -> Search:
        """Weigh every description of every matrix.

        Each counts with its Gaussian likelihood, less half the logarithm of the number of blocks
        per free parameter; all columns share one variance. Placements of equally many jumps share
        the weight of one, as do logistics. Three jumps are weighed at the noise and order that are
        best for two.

        Args:
            matrices: From :mod:`~mspgt_lens.scales.normalizing`.
            max_jumps: The most jumps to weigh.
            place: The numbers of jumps to find places for.
        """
        most = self.max_jumps if max_jumps is None else max_jumps
        together = max(1, _PLACEMENTS_PER_CHUNK // len(self.placements[min(2, self.max_jumps)]))
        n_chunks = -(-len(matrices) // together)
        parts = [
            self._search(np.asarray(chunk, dtype=np.float32), most, place)
            for chunk in np.array_split(matrices, n_chunks)
        ]
        return Search(
            {k: np.concatenate([p.evidence[k] for p in parts]) for k in parts[0].evidence},
            {k: np.concatenate([p.places[k] for p in parts]) for k in parts[0].places},
        )

    def _search(
        self,
        matrices: Float[np.ndarray, "draw block signal"],
        max_jumps: int,
        place: Collection[int],
    ) -> Search:
        n_draws, n, m = matrices.shape
        likelihood = _Likelihood(n, m)
        # Draws last: sums over signals then run along memory.
        flat = np.ascontiguousarray(matrices.transpose(1, 2, 0)).reshape(n, m * n_draws)
        # What ranks could not resolve is noise too: as much as normalizing adds.
        floor = (matrices.astype(float) ** 2).sum(axis=(1, 2)) / n**2
        gradual = _LogSum(n_draws, 1)
        sums = {
            k: _LogSum(n_draws, len(self.placements[k])) for k in range(1, min(max_jumps, 2) + 1)
        }
        best = np.full(n_draws, -np.inf)
        best_design = np.zeros(n_draws, dtype=int)
        noise = None
        for number, design in enumerate(self._designs):
            if design.noise is not noise:
                noise = design.noise
                white = noise.whitener(n).astype(np.float32) @ flat
                total = _squares(white, n * m) + floor
            taken = _squares(design.drift.T @ white, (design.order + 1) * m)
            left = np.maximum(total - taken, floor)
            base = likelihood.base(noise, left, design.order + 1)
            gradual.add(np.zeros((n_draws, 1), dtype=np.float32), base)
            if design.logistics.size:
                along = (design.logistics.T @ white).reshape(-1, m, n_draws)
                along *= along
                more = likelihood.more(along.sum(axis=1).T, left)
                gradual.add(_log_mean(more), base - likelihood.price)
            if not design.weights:
                continue
            products = _products(design.steps, white, n_draws)
            for k, terms in sums.items():
                more = likelihood.more(self._gains(products, design.weights[k], k), left)
                top = terms.add(more, base - k * likelihood.price)
                if k == 2:
                    best_design[top > best] = number
                    best = np.maximum(best, top)
        if max_jumps >= 3:
            sums[3] = self._triples(matrices, floor, best_design, likelihood)
        evidence = {k: terms.log_mean() for k, terms in sums.items()} | {0: gradual.log_mean()}
        return Search(evidence, {k: self._places(sums[k].terms, k) for k in place})

    def _triples(
        self,
        matrices: Float[np.ndarray, "draw block signal"],
        floor: Float[np.ndarray, " draw"],
        best_design: Int[np.ndarray, " draw"],
        likelihood: _Likelihood,
    ) -> _LogSum:
        n_draws, n, _ = matrices.shape
        found = _LogSum(n_draws, len(self.placements[3]))
        most = max(1, _TRIPLES_PER_CHUNK // len(self.placements[3]))
        for number in np.unique(best_design):
            design = self._designs[number]
            if 3 not in design.weights:
                design.weights[3] = self._weights(design.steps, 3)
            every = np.flatnonzero(best_design == number)
            for mine in np.array_split(every, -(-len(every) // most)):
                white = np.matmul(design.noise.whitener(n).astype(np.float32), matrices[mine])
                total = (white.astype(float) ** 2).sum(axis=(1, 2)) + floor[mine]
                taken = (np.matmul(design.drift.T, white) ** 2).sum(axis=(1, 2))
                left = np.maximum(total - taken, floor[mine])
                along = np.matmul(design.steps.T, white)
                gains = self._gains(
                    np.matmul(along, along.transpose(0, 2, 1)), design.weights[3], 3
                )
                base = likelihood.base(design.noise, left, design.order + 4)
                one = _LogSum(len(mine), len(self.placements[3]))
                one.add(likelihood.more(gains, left), base)
                found.peak[mine], found.terms[mine] = one.peak, one.terms
        return found

    def _places(
        self, terms: Float[np.ndarray, "draw placement"], n_jumps: int
    ) -> Int[np.ndarray, "draw jump"]:
        """The placement with most weight in and around it, half as much one block away per jump."""
        placements = self.placements[n_jumps]
        found = np.zeros((len(terms), n_jumps), dtype=int)
        for draw, weights in enumerate(terms):
            around = np.zeros((len(self.candidates) + 2,) * n_jumps, dtype=np.float32)
            around[tuple(placements.T + 1)] = weights
            for axis in range(n_jumps):
                around = np.moveaxis(around, axis, 0)
                around = np.moveaxis(around[:-2] + 2 * around[1:-1] + around[2:], 0, axis)
            found[draw] = self.candidates[placements[around[tuple(placements.T)].argmax()]]
        return found


@lru_cache(maxsize=16)
def search_plan(n_layers: int, min_size: int) -> SearchPlan:
    """The plan for matrices of so many blocks and segments of at least ``min_size`` blocks."""
    return SearchPlan(n_layers, min_size)


class _Likelihood:
    """Charged log-likelihoods, for matrices of so many blocks and columns."""

    def __init__(self, n_layers: int, n_signals: int) -> None:
        self.n_layers, self.n_signals = n_layers, n_signals
        # Of one basis column, free for every signal.
        self.price = n_signals * np.log(n_layers) / 2

    def base(
        self, noise: Noise, left: Float[np.ndarray, " draw"], n_columns: int
    ) -> Float[np.ndarray, " draw"]:
        """Of drift that leaves so much."""
        scale = self.n_signals * np.log(np.diag(noise.whitener(self.n_layers))).sum()
        value: np.ndarray = (
            scale - self.n_layers * self.n_signals / 2 * np.log(left) - self.price * n_columns
        )
        return value

    def more(
        self, gains: Float[np.ndarray, "draw curve"], left: Float[np.ndarray, " draw"]
    ) -> Float[np.ndarray, "draw curve"]:
        """What curves that explain so much of it add, before they are charged."""
        rest = np.maximum(1 - gains / left[:, None].astype(np.float32), np.float32(_LEAST_LEFT))
        # In place: these are the largest arrays there are.
        added: np.ndarray = np.log(rest, out=rest)
        added *= np.float32(-self.n_layers * self.n_signals / 2)
        return added


class _LogSum:
    """Sums of exponentials of large numbers, per draw and term: ``terms * exp(peak)``."""

    def __init__(self, n_draws: int, n_terms: int) -> None:
        self.peak = np.full(n_draws, -np.inf)
        self.terms = np.zeros((n_draws, n_terms), dtype=np.float32)

    def add(
        self, values: Float[np.ndarray, "draw term"], base: Float[np.ndarray, " draw"]
    ) -> Float[np.ndarray, " draw"]:
        """Add ``exp(values + base)``; the largest exponent of every draw."""
        top: np.ndarray = base + values.max(axis=1)
        peak = np.maximum(self.peak, top)
        self.terms *= np.exp(self.peak - peak)[:, None].astype(np.float32)
        values = values + (base - peak)[:, None].astype(np.float32)
        self.terms += np.exp(values, out=values)
        self.peak = peak
        return top

    def log_mean(self) -> Float[np.ndarray, " draw"]:
        """Logarithm of the mean over terms."""
        value: np.ndarray = self.peak + np.log(self.terms.mean(axis=1))
        return value


def _log_mean(values: Float[np.ndarray, "draw term"]) -> Float[np.ndarray, "draw 1"]:
    top = values.max(axis=1, keepdims=True)
    mean: np.ndarray = top + np.log(np.exp(values - top).mean(axis=1, keepdims=True))
    return mean


def _squares(rows: Float[np.ndarray, "row column"], n_rows: int) -> Float[np.ndarray, " draw"]:
    """Sum of squares per draw, in double precision."""
    total: np.ndarray = (rows.reshape(n_rows, -1).astype(float) ** 2).sum(axis=0)
    return total


def _products(
    jumps: Float[np.ndarray, "block place"], white: Float[np.ndarray, "block column"], n_draws: int
) -> Float[np.ndarray, "draw place place"]:
    along = (jumps.T @ white).reshape(jumps.shape[1], -1, n_draws).transpose(2, 0, 1)
    along = np.ascontiguousarray(along)
    products: np.ndarray = np.matmul(along, along.transpose(0, 2, 1))
    return products


def _centers(n_layers: int, scale: float) -> Float[np.ndarray, " center"]:
    number = int(np.ceil((n_layers - 5) / (_CENTER_SPACING * scale))) + 1
    return np.linspace(2, n_layers - 3, number)
