"""The Gaussian information bottleneck of plain arrays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state
from mspgt_lens.folds import balanced_folds
from mspgt_lens.information.frontier import DEFAULT_BETAS, Frontier
from mspgt_lens.information.readers import choose_strengths
from mspgt_lens.information.ridge import FoldSums
from mspgt_lens.information.site_reader import SiteReader
from mspgt_lens.prompts import group_label

N_FOLDS = 5


@in_own_state
def bottleneck_frontier(
    z: Float[np.ndarray, "sample d_z"],
    y: Float[np.ndarray, "sample d_y"],
    betas: Float[np.ndarray, " beta"] = DEFAULT_BETAS,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Frontier:
    """How much of y a noisy linear summary of z can keep at which rate, in closed form.

    The Gaussian information bottleneck (Chechik et al. 2005) from held-out canonical correlations:
    directions by ridge on four fifths of the groups, correlated on the last.

    Args:
        z: What is summarized; each coordinate is standardized first.
        y: What the summary should tell.
        betas: Weights of relevance against rate, at least 1.
        groups: One label per sample; samples that belong together share one, and are never split
            between fitting and testing. By default every sample is a group of its own.
        seed: Deals the groups to folds.

    Returns:
        The frontier, its rates and relevances in nats per sample, with 95% intervals.

    Raises:
        ValueError: If the arrays do not fit, are not finite or do not vary, if there are fewer than
            five groups, or if z determines y.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> z = rng.standard_normal((500, 2))
        >>> frontier = ml.arrays.bottleneck_frontier(z, z[:, :1] + rng.standard_normal((500, 1)))
        >>> frontier.relevance_at(1.0)  # nats that one nat about z keeps of y
        Estimate: ... nats (... to ...)
        ...
    """
    z, y = _rows("z", z), _rows("y", y)
    if len(z) != len(y):
        raise ValueError(f"z and y must have as many rows, got {len(z)} and {len(y)}")
    labels = list(range(len(z))) if groups is None else list(groups)
    if len(labels) != len(z):
        raise ValueError(f"groups needs one label per sample ({len(z)}), got {len(labels)}")
    labels = [group_label(label, index) for index, label in enumerate(labels)]
    sizes: dict[Hashable, int] = {}
    for label in labels:
        sizes[label] = sizes.get(label, 0) + 1
    if len(sizes) < N_FOLDS or len(z) < 4 * N_FOLDS:
        raise ValueError(
            f"z and y need at least {4 * N_FOLDS} samples in {N_FOLDS} groups, got {len(z)} in "
            f"{len(sizes)}: the bottleneck is fitted on some groups and read on others"
        )
    of_group = balanced_folds(sizes, N_FOLDS, seed)
    fold = np.array([of_group[label] for label in labels])
    reader = _reader(_standardized(z), _standardized(y), fold)
    strengths = choose_strengths(lambda _: reader, 1)
    _, correlations, _ = reader.score(strengths, scored=[0], correlated=[0])
    return Frontier(np.asarray(betas, dtype=float), correlations[:, 0], reader.count)


def _reader(z: np.ndarray, y: np.ndarray, fold: np.ndarray) -> SiteReader:
    rows = [fold == k for k in range(N_FOLDS)]

    def sums(first: np.ndarray, second: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([first[r].T @ second[r] for r in rows]))

    def totals(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([array[r].sum(axis=0) for r in rows]))

    count = np.array([r.sum() for r in rows], dtype=float)
    fold_sums = FoldSums(count, totals(z), sums(z, z), totals(y), sums(z, y))
    return SiteReader(fold_sums, sums(y, y), 1)


def _rows(name: str, array: np.ndarray) -> Float[np.ndarray, "sample d"]:
    rows = np.asarray(array, dtype=np.float64)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} must have shape [sample, dimension], got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} must be finite; it holds NaN or infinity")
    return rows


def _standardized(rows: Float[np.ndarray, "sample d"]) -> Float[np.ndarray, "sample d"]:
    centered = rows - rows.mean(axis=0)
    spread = centered.std(axis=0)
    # What rounding of the mean leaves of a constant column is no variation.
    constant = spread <= 1e-12 * np.abs(rows).max(axis=0)
    if constant.all():
        raise ValueError("z and y must vary; one of them is constant in every column")
    standardized: np.ndarray = np.where(constant, 0.0, centered / np.where(constant, 1.0, spread))
    return standardized
