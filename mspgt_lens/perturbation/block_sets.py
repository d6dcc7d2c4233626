"""Segments of blocks, and the random sets of blocks that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float


class BlockSets:
    """The segments' blocks, then random sets of each of their sizes."""

    def __init__(
        self,
        segments: Mapping[str, tuple[int, ...]],
        n_layers: int,
        n_draws: int,
        rng: np.random.Generator,
    ) -> None:
        sizes = sorted({len(blocks) for blocks in segments.values()})
        drawn = [
            tuple(sorted(rng.choice(n_layers, size, replace=False).tolist()))
            for size in sizes
            for _ in range(n_draws)
        ]
        self.all = [*segments.values(), *drawn]
        self.n_segments = len(segments)
        self._places = [
            [len(segments) + sizes.index(len(blocks)) * n_draws + draw for draw in range(n_draws)]
            for blocks in segments.values()
        ]

    def arranged(
        self, values: Float[np.ndarray, "job *rest"]
    ) -> Float[np.ndarray, "perturbation set *rest"]:
        """Values of every perturbation of every set, one after the other, as a table."""
        return values.reshape(-1, len(self.all), *values.shape[1:])

    def segments(
        self, values: Float[np.ndarray, "perturbation set *rest"]
    ) -> Float[np.ndarray, "perturbation segment *rest"]:
        """Of values for all sets, those of the segments."""
        return values[:, : self.n_segments]

    def controls(
        self, values: Float[np.ndarray, "perturbation set *rest"]
    ) -> Float[np.ndarray, "perturbation segment draw *rest"]:
        """Of values for all sets, those of each segment's controls."""
        return np.stack([values[:, places] for places in self._places], axis=1)
