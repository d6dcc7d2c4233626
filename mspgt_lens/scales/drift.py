"""Curves over depth: polynomials, steps, bends."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float


def legendre(n_layers: int, order: int) -> Float[np.ndarray, "block order"]:
    """Legendre polynomials 0 ... order at evenly spaced depths."""
    depth = np.linspace(-1.0, 1.0, n_layers)
    basis: np.ndarray = np.polynomial.legendre.legvander(depth, order)
    return basis


def steps(n_layers: int, boundaries: Iterable[int]) -> Float[np.ndarray, "block boundary"]:
    """One column per boundary: 0 before it, 1 from it on."""
    return (np.arange(n_layers)[:, None] >= np.array(list(boundaries), dtype=int)).astype(float)


def hinges(n_layers: int, boundaries: Iterable[int]) -> Float[np.ndarray, "block boundary"]:
    """One column per boundary: 0 before it, then 1, 2, 3 ...: the rate changes at that block."""
    return np.cumsum(steps(n_layers, boundaries), axis=0)
