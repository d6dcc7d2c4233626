"""Gradual drift with depth, jumps on top of it, noise, and series regenerated from them.

A model of the rows of a matrix (one row per block): ``row = drift + jumps + noise``. Drift is
smooth in depth and free for every column: a Legendre polynomial, or one logistic transition that
all columns share in place and width. Jumps are steps that all columns share in place. Noise may be
correlated along depth, and across columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float


def legendre(n_layers: int, order: int) -> Float[np.ndarray, "block order"]:
    """Legendre polynomials 0 ... order at evenly spaced depths."""
    depth = np.linspace(-1.0, 1.0, n_layers)
    basis: np.ndarray = np.polynomial.legendre.legvander(depth, order)
    return basis


def logistic(n_layers: int, center: float, scale: float) -> Float[np.ndarray, " block"]:
    """One gradual transition around block ``center``; 10 to 90% takes ``4.4 * scale`` blocks."""
    curve: np.ndarray = 1.0 / (1.0 + np.exp(-(np.arange(n_layers) - center) / scale))
    return curve


def steps(n_layers: int, boundaries: Iterable[int]) -> Float[np.ndarray, "block boundary"]:
    """One column per boundary: 0 before it, 1 from it on."""
    return (np.arange(n_layers)[:, None] >= np.array(list(boundaries), dtype=int)).astype(float)


@dataclass(frozen=True)
class Noise:
    """How noise is correlated along depth.

    Attributes:
        kind: ``"autoregressive"``: of order one, with innovations of variance 1. ``"local level"``:
            a random walk beside white noise of variance 1. ``"random walk"``: the walk alone.
        size: The lag-one autocorrelation, or the variance of the walk's steps.
        max_order: The highest order of polynomial drift told apart from such noise: wandering noise
            and flexible drift explain each other, and noise that is taken for drift leaves too
            little noise in the series regenerated.
    """

    kind: Literal["autoregressive", "local level", "random walk"]
    size: float
    max_order: int

    @property
    def white(self) -> bool:
        """No block's noise tells of the next one's, or only in the other direction."""
        return self.kind == "autoregressive" and self.size <= 0

    def root(self, n_layers: int) -> Float[np.ndarray, "block block"]:
        """Lower triangle that turns independent rows into such noise."""
        return _roots(self.kind, self.size, n_layers)[0]

    def whitener(self, n_layers: int) -> Float[np.ndarray, "block block"]:
        """Its inverse, which makes rows independent."""
        return _roots(self.kind, self.size, n_layers)[1]

    def autocorrelation(self, n_layers: int) -> float:
        """Between neighboring blocks, about the mean of so many blocks."""
        if self.kind == "autoregressive":
            return self.size
        root = self.root(n_layers)
        variance = ((root - root.mean(axis=0)) ** 2).sum() / (n_layers - 1)
        step = (np.diff(root, axis=0) ** 2).sum() / (n_layers - 1)
        return float(1 - step / (2 * variance))


NOISES = (
    Noise("autoregressive", -0.3, 5),
    Noise("autoregressive", 0.0, 5),
    Noise("autoregressive", 0.2, 3),
    Noise("autoregressive", 0.4, 2),
    Noise("autoregressive", 0.6, 1),
    Noise("autoregressive", 0.8, 1),
    Noise("autoregressive", 0.95, 1),
    Noise("local level", 0.1, 1),
    Noise("local level", 0.4, 1),
    Noise("local level", 1.5, 1),
    Noise("random walk", 1.0, 1),
)


@lru_cache(maxsize=256)
def _roots(kind: str, size: float, n_layers: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = np.arange(n_layers)
    walk = 1.0 + np.minimum.outer(blocks, blocks)
    covariance = {
        "autoregressive": lambda: size ** np.abs(np.subtract.outer(blocks, blocks)) / (1 - size**2),
        "local level": lambda: np.eye(n_layers) + size * walk,
        # Where the walk begins is anyone's guess.
        "random walk": lambda: size * walk + 10 * n_layers,
    }[kind]()
    root = np.linalg.cholesky(covariance)
    return root, np.linalg.inv(root)


@dataclass(frozen=True)
class Fit:
    """One description of a matrix: drift, jumps, and the noise that is left.

    Attributes:
        basis: Columns that drift and jumps are made of, shape ``[block, column]``.
        boundaries: Where the jumps are.
        noise: How the noise is correlated along depth.
        drift: In words.
    """

    basis: Float[np.ndarray, "block column"]
    boundaries: tuple[int, ...]
    noise: Noise
    drift: str

    def fitted(self, matrix: Float[np.ndarray, "block signal"]) -> Float[np.ndarray, "block s"]:
        """What drift and jumps explain, by generalized least squares."""
        whitener = self.noise.whitener(len(matrix))
        solution = np.linalg.lstsq(whitener @ self.basis, whitener @ matrix, rcond=None)[0]
        explained: np.ndarray = self.basis @ solution
        return explained

    def regenerate(
        self, matrix: Float[np.ndarray, "block signal"], n_draws: int, rng: np.random.Generator
    ) -> Float[np.ndarray, "draw block signal"]:
        """Matrices with the same drift and jumps and new noise, as large at every block."""
        fitted = self.fitted(matrix)
        innovations = self.noise.whitener(len(matrix)) @ (matrix - fitted)
        root = _covariance_root(innovations, len(matrix) - self.basis.shape[1])
        drawn = rng.standard_normal((n_draws, *matrix.shape)) @ root
        regenerated: np.ndarray = fitted + self.noise.root(len(matrix)) @ drawn
        return regenerated

    def flip(
        self, matrix: Float[np.ndarray, "block signal"], n_draws: int, rng: np.random.Generator
    ) -> Float[np.ndarray, "draw block signal"]:
        """The same with each block's own noise, its sign drawn (the wild bootstrap: Wu 1986).

        Blocks keep the size of their noise and the correlations between columns that it has.
        """
        fitted = self.fitted(matrix)
        whitener = self.noise.whitener(len(matrix))
        white, _ = np.linalg.qr(whitener @ self.basis)
        left = whitener @ (matrix - fitted)
        # What the fit took from a block's noise is given back, up to where nothing else is left.
        left /= np.sqrt((1.0 - (white**2).sum(axis=1)).clip(min=0.1))[:, None]
        signs = rng.choice([-1.0, 1.0], (n_draws, len(matrix), 1))
        regenerated: np.ndarray = fitted + self.noise.root(len(matrix)) @ (signs * left)
        return regenerated


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
