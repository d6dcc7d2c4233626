"""Ridge regression from summed second moments, cross-fitted over folds of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.products import product

# Of a standardized coordinate's variance: from this penalty on, weights are small enough that
# float32 solves for them and measures what they leave within the resolution of readers, and the
# rounding of its factors moves weights in directions that hardly matter.
ROUGH_FROM = 1e-2


def ring(n_folds: int) -> list[tuple[int, int]]:
    """Pairs of neighboring folds; each fold has two neighbors, which serve as its inner folds."""
    return [(k, (k + 1) % n_folds) for k in range(n_folds)]


def matching(n_folds: int) -> list[tuple[int, int]]:
    """The fewest such pairs in which every fold has a neighbor."""
    return [(k, (k + 1) % n_folds) for k in range(0, n_folds, 2)]


def spread_sites(n_sites: int, count: int) -> list[int]:
    """At most ``count`` sites, evenly spread from the first to the last."""
    return sorted({int(s) for s in np.linspace(0, n_sites - 1, count).round()})


class FoldSums:
    """Sums over positions of a site's coordinates z and of targets t, one row per fold.

    Attributes:
        count: Positions, shape ``[fold]``.
        z: Sums of z, shape ``[fold, width]``.
        zz: Sums of ``z z^T``, shape ``[fold, width, width]``.
        t: Sums of t, shape ``[fold, column]``.
        zt: Sums of ``z t^T``, shape ``[fold, width, column]``.
        rough: Whether the sums hold float32 products, so that float32 suffices for readers where
            the penalty bounds its error.
    """

    def __init__(
        self,
        count: Float[np.ndarray, " fold"],
        z: Float[Tensor, "fold width"],
        zz: Float[Tensor, "fold width width"],
        t: Float[Tensor, "fold column"],
        zt: Float[Tensor, "fold width column"],
        *,
        rough: bool = False,
    ) -> None:
        self.count, self.z, self.zz, self.t, self.zt = count, z, zz, t, zt
        self.rough = rough
        self._total = z.sum(0), zz.sum(0), t.sum(0), zt.sum(0)
        self._covariances: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def fit(self, left_out: Sequence[int]) -> RidgeFit:
        """Ridge readers fitted on all folds but those left out."""
        parts = (self.z, self.zz, self.t, self.zt)
        # A copy without the first: these are large, and made for every fit.
        totals = [
            total - part[left_out[0]] if left_out else total.clone()
            for total, part in zip(self._total, parts, strict=True)
        ]
        for k in left_out[1:]:
            for sums, part in zip(totals, parts, strict=True):
                sums -= part[k]
        count = self.count.sum() - self.count[list(left_out)].sum()
        z, zz, t, zt = (sums.div_(count) for sums in totals)
        folds = [k for k in range(len(self.count)) if k not in left_out]
        return RidgeFit(self, folds, z, zz.addr_(z, z, alpha=-1), t, zt.addr_(z, t, alpha=-1))

    def covariances(
        self, fold: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "width width"], Float[Tensor, "width column"]]:
        """Of z, and of z with t, within one fold."""
        if (fold, dtype) not in self._covariances:
            count = self.count[fold]
            z, t = self.z[fold] / count, self.t[fold] / count
            self._covariances[fold, dtype] = (
                (self.zz[fold] / count).addr_(z, z, alpha=-1).to(dtype),
                (self.zt[fold] / count).addr_(z, t, alpha=-1).to(dtype),
            )
        return self._covariances[fold, dtype]


class RidgeFit:
    """Affine readers ``t ~ mean_t + (z - mean_z) W`` of every column of t.

    Attributes:
        mean_z: Training mean of z, shape ``[width]``.
        mean_t: Training mean of t, shape ``[column]``.
        zz: Training covariance of z, shape ``[width, width]``.
        zt: Training cross-covariance of z and t, shape ``[width, column]``.
        folds: The folds it was fitted on.
    """

    def __init__(
        self, sums: FoldSums, folds: list[int], z: Tensor, zz: Tensor, t: Tensor, zt: Tensor
    ) -> None:
        self.mean_z, self.mean_t, self.folds = z, t, folds
        self.zz, self.zt = zz, zt
        self._sums = sums
        self._low: Tensor | None = None
        self._roots: dict[float, tuple[Tensor, float]] = {}
        self._weights: dict[tuple[float, tuple[int, ...] | None], Tensor] = {}
        self._blocks: dict[tuple[float, int], Tensor] = {}
        self._tests: dict[tuple[int, torch.dtype], FoldAbout] = {}

    def weights(
        self, strength: float, columns: tuple[int, ...] | None = None
    ) -> Float[Tensor, "width column"]:
        """Weights of some columns (all by default); the penalty is in units of the z used."""
        key = (strength, columns)
        if key not in self._weights:
            wanted = self.zt if columns is None else self.zt[:, list(columns)]
            root, _ = self._root(strength)
            self._weights[key] = _solve(root, wanted.to(root))
        return self._weights[key]

    def block_weights(
        self, strengths: Sequence[float], blocks: Sequence[int], size: int
    ) -> list[Float[Tensor, "width size"]]:
        """Weights of blocks of so many columns, each at its own strength; zeros at infinity.

        Whatever was solved for before is not solved for again.
        """
        wanted = list(zip(strengths, blocks, strict=True))
        for strength in set(strengths):
            new = [b for s, b in wanted if s == strength and (s, b) not in self._blocks]
            if new and np.isinf(strength):
                zeros = self.zt.new_zeros(len(self.zt), size, dtype=torch.float32)
                self._blocks |= {(strength, b): zeros for b in new}
            elif new:
                root, _ = self._root(strength)
                columns = torch.cat([self.zt[:, b * size : (b + 1) * size] for b in new], dim=1)
                solved = torch.split(_solve(root, columns.to(root)), size, dim=1)
                self._blocks |= {(strength, b): one for b, one in zip(new, solved, strict=True)}
        return [self._blocks[key] for key in wanted]

    def predict(
        self, strength: float, rows: Float[Tensor, "row width"]
    ) -> Float[Tensor, "row column"]:
        """All columns of t at some rows of z; cheaper than weights where rows are few."""
        root, _ = self._root(strength)
        solved = _solve(root, (rows - self.mean_z).T.to(root)).to(self.zt)
        return self.mean_t + solved.T @ self.zt

    def penalty(self, strength: float) -> float:
        """The penalty that a strength stands for.

        A strength below the rounding of the sums cannot be told from 0; it is raised until it can.
        """
        return self._root(strength)[1]

    def _root(self, strength: float) -> tuple[Float[Tensor, "width width"], float]:
        """Cholesky factor of the penalized covariance, and the penalty."""
        if strength not in self._roots:
            self._roots[strength] = self._factor(strength)
        return self._roots[strength]

    def _factor(self, strength: float) -> tuple[Float[Tensor, "width width"], float]:
        if not torch.isfinite(self.zz.sum()):
            raise FloatingPointError(
                "second moments of a site are not finite; nothing can be fitted"
            )
        if self._sums.rough and strength >= ROUGH_FROM:
            if self._low is None:
                self._low = self.zz.float()
            root, failed = torch.linalg.cholesky_ex(plus_diagonal(self._low, strength))
            if not failed:
                return root, strength
        root, failed = torch.linalg.cholesky_ex(plus_diagonal(self.zz, strength))
        while failed:
            strength *= 10
            root, failed = torch.linalg.cholesky_ex(plus_diagonal(self.zz, strength))
        return root, strength

    def about(self, fold: int, dtype: torch.dtype = torch.float64) -> FoldAbout:
        """Second moments of one fold about the training means."""
        if (fold, dtype) not in self._tests:
            sums, count = self._sums, self._sums.count[fold]
            zz, zt = sums.covariances(fold, dtype)
            off_z = (sums.z[fold] / count - self.mean_z).to(dtype)
            off_t = (sums.t[fold] / count - self.mean_t).to(dtype)
            self._tests[fold, dtype] = FoldAbout(zz, off_z, torch.addr(zt, off_z, off_t))
        return self._tests[fold, dtype]


@dataclass(frozen=True)
class FoldAbout:
    """Second moments of one fold about means that are not its own.

    Attributes:
        covariance: Of z within the fold, shape ``[width, width]``.
        offset: The fold's mean of z less the mean taken, shape ``[width]``.
        zt: Of z with t about the means taken, shape ``[width, column]``.
    """

    covariance: Float[Tensor, "width width"]
    offset: Float[Tensor, " width"]
    zt: Float[Tensor, "width column"]

    def zz_times(self, weights: Float[Tensor, "width column"]) -> Float[Tensor, "width column"]:
        """Second moment of z about the mean taken, times weights; the moment is never formed."""
        return product(self.covariance, weights).addr_(self.offset, self.offset @ weights)


def _solve(
    root: Float[Tensor, "width width"], wanted: Float[Tensor, "width column"]
) -> Float[Tensor, "width column"]:
    """``(root root^T)^-1 wanted``; faster than ``cholesky_solve``, which copies both."""
    half = torch.linalg.solve_triangular(root, wanted, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(root.mT, half, upper=True)
    return solved


def plus_diagonal(matrix: Float[Tensor, "d d"], value: float) -> Float[Tensor, "d d"]:
    """``matrix + value * identity``."""
    total = matrix.clone()
    total.diagonal().add_(value)
    return total


def moment_about(
    outer: Float[Tensor, "a b"],
    mean_a: Float[Tensor, " a"],
    mean_b: Float[Tensor, " b"],
    about_a: Float[Tensor, " a"],
    about_b: Float[Tensor, " b"],
) -> Float[Tensor, "a b"]:
    """The mean of ``(a - about_a) (b - about_b)^T``, given that of ``a b^T`` and the means."""
    off_a, off_b = mean_a - about_a, mean_b - about_b
    return outer - torch.outer(mean_a, mean_b) + torch.outer(off_a, off_b)
