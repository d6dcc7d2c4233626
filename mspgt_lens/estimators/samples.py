"""Plain arrays checked for estimating information: rows, columns, labels, groups and folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from scipy import stats

from mspgt_lens.prompts import group_label
from mspgt_lens.statistics import cluster_interval

N_FOLDS = 5
MIN_SAMPLES = 40
MIN_GROUPS = 10
MIN_PER_LABEL = 10
# A continuous quantity does not take one value this often.
ATOM = 0.05
# Share of variance that data stored in float32 cannot tell from none (its rounding is 1e-15).
EXACT = 1e-12


@dataclass(frozen=True, eq=False)
class Samples:
    """Pairs of z and y, and the groups that belong together.

    Attributes:
        z: Columns of zero mean and unit variance, shape ``[sample, d_z]``.
        y: The same of a continuous target, shape ``[sample, d_y]``, or None.
        labels: Index of a categorical target, shape ``[sample]``, or None.
        groups: Index of each sample's group, shape ``[sample]``.
        fold: Fold of each sample's group, shape ``[sample]``.
        copies: Samples that repeat an earlier one of another group in numbers that are no integers.
        seed: Seed of everything that is drawn.
    """

    z: Float[np.ndarray, "sample d_z"]
    y: Float[np.ndarray, "sample d_y"] | None
    labels: Integer[np.ndarray, " sample"] | None
    groups: Integer[np.ndarray, " sample"]
    fold: Integer[np.ndarray, " sample"]
    copies: int
    seed: int

    def __len__(self) -> int:
        return len(self.z)

    @property
    def width(self) -> int:
        """Columns of z and of y together; labels count as one."""
        return int(self.z.shape[1] + (1 if self.y is None else self.y.shape[1]))


def as_samples(z: Any, y: Any, groups: Any, seed: int) -> Samples:
    """Check and standardize; see :func:`mspgt_lens.mutual_information` for what is refused."""
    z_rows, y_rows = _as_array("z", z), _as_array("y", y)
    n = len(z_rows)
    if len(y_rows) != n:
        raise ValueError(
            f"z and y must hold one row per sample: z has shape {z_rows.shape}, y {y_rows.shape}; "
            "transpose, or select the same samples"
        )
    if n < MIN_SAMPLES:
        raise ValueError(f"information needs at least {MIN_SAMPLES} samples, got {n}")
    group = _as_groups(groups, n)
    labels, numbers = None, None
    if y_rows.ndim == 1 and y_rows.dtype.kind in "iub":
        labels = _as_labels(y_rows)
    else:
        numbers = _standardized("y", y_rows)
        _check_continuous(numbers)
    return Samples(
        z=_standardized("z", z_rows),
        y=numbers,
        labels=labels,
        groups=group,
        fold=_folds(group, np.random.default_rng(seed)),
        copies=_copies_across_groups(z_rows, y_rows, group),
        seed=seed,
    )


def check_finite_information(samples: Samples) -> None:
    """Raise ``ValueError`` where some direction of y is an affine function of z."""
    z, y = samples.z, samples.y
    if y is None or len(z) <= 2 * samples.width:
        return
    left, _, _ = np.linalg.svd(y, full_matrices=False)
    gram = z.T @ z
    gram[np.diag_indices_from(gram)] += 1e-10 * len(z)
    rest = left
    for _ in range(3):  # The later rounds take what the small penalty left behind.
        rest = rest - z @ np.linalg.solve(gram, z.T @ rest)
    if np.linalg.svd(rest, compute_uv=False).min() ** 2 < EXACT:
        raise ValueError(
            "y holds a direction that is an affine function of z up to rounding, so their mutual "
            "information is infinite; leave shared columns out, or send z through a noisy channel "
            "(z + sigma * noise), whose rate channel_rate bounds"
        )


def normal_scores(columns: Float[np.ndarray, "sample d"]) -> Float[np.ndarray, "sample d"]:
    """Each column mapped to a standard normal by its ranks; ties share their mean rank.

    A strictly monotone map of single columns leaves mutual information as it is.
    """
    ranks = stats.rankdata(columns, axis=0)
    scores = stats.norm.ppf((ranks - 0.5) / len(columns))
    scores = scores - scores.mean(axis=0)
    standard: np.ndarray = scores / scores.std(axis=0)
    return standard


def score_interval(
    scores: Float[np.ndarray, " sample"], groups: Integer[np.ndarray, " sample"]
) -> tuple[float, float]:
    """Mean of one score per sample, and how far its 95% interval over groups reaches."""
    mean, _, high = cluster_interval(scores[:, None], groups)
    return float(mean[0]), float(high[0] - mean[0])


def _copies_across_groups(z: np.ndarray, y: np.ndarray, groups: np.ndarray) -> int:
    """Samples that repeat an earlier one of another group; of integers, many rightly do."""
    rows = np.column_stack([z, y]).astype(np.float64)
    _, first, index = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    elsewhere = groups[first[index.ravel()]] != groups
    return int((elsewhere & (rows != rows.round()).any(axis=1)).sum())


def _as_array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        value = (value.double() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} must hold real numbers, got dtype {array.dtype}; for names of classes pass "
            "np.unique(names, return_inverse=True)[1]"
        )
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{name} must have shape [sample] or [sample, column], got {array.shape}; "
            "flatten prompts and positions into samples first"
        )
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be finite, got {array[where]} at {where} and {int(bad.sum())} such "
            "values in all; leave those samples out"
        )
    return array


def _as_groups(groups: Any, n: int) -> Integer[np.ndarray, " sample"]:
    if groups is None:
        return np.arange(n)
    given = groups.detach().cpu().numpy() if isinstance(groups, torch.Tensor) else groups
    array = np.asarray(given)
    if array.shape != (n,):
        raise ValueError(f"groups must have shape [{n}], one per sample, got {array.shape}")
    for number, label in enumerate(array.tolist()):
        group_label(label, number)
    labels, index = np.unique(array, return_inverse=True)
    if len(labels) < MIN_GROUPS:
        raise ValueError(
            f"intervals over groups need at least {MIN_GROUPS} of them, got {len(labels)}; "
            "use finer groups that are still independent of one another"
        )
    return np.asarray(index)


def _as_labels(y: np.ndarray) -> Integer[np.ndarray, " sample"]:
    names, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError(f"y has the one label {names[0]}, so there is nothing to know about it")
    if counts.min() < MIN_PER_LABEL:
        raise ValueError(
            f"every label of y needs at least {MIN_PER_LABEL} samples; label "
            f"{names[counts.argmin()]} has {counts.min()} ({len(names)} labels, {len(y)} samples); "
            "merge or leave out rare labels, or pass floats if y holds numbers"
        )
    return np.asarray(index)


def _standardized(name: str, array: np.ndarray) -> Float[np.ndarray, "sample d"]:
    columns = array.reshape(len(array), -1).astype(np.float64)
    # Divided by its largest first, so that squares of huge numbers stay finite.
    largest = np.abs(columns).max(axis=0)
    columns = columns / np.where(largest > 0, largest, 1.0)
    centered = columns - columns.mean(axis=0)
    deviation = centered.std(axis=0)
    constant = np.flatnonzero(deviation <= 1e-14)
    if len(constant):
        raise ValueError(
            f"{name} has {len(constant)} constant columns, the first is {constant[0]}; "
            "leave them out, they carry no information"
        )
    standard: np.ndarray = centered / deviation
    return standard


def _check_continuous(y: Float[np.ndarray, "sample d_y"]) -> None:
    for column, values in enumerate(y.T):
        share = np.unique(values, return_counts=True)[1].max() / len(values)
        if share > ATOM:
            raise ValueError(
                f"column {column} of y takes one value in {share:.0%} of the samples, so it has "
                "no density; pass classes as integer labels of shape [sample]"
            )
    if y.shape[1] < len(y):
        power = np.linalg.svd(y, compute_uv=False) ** 2
        rank = int((power > EXACT * power.max()).sum())
        if rank < y.shape[1]:
            raise ValueError(
                f"the {y.shape[1]} columns of y span only {rank} dimensions, so y has no density; "
                "leave redundant columns out, project on principal directions, or pass classes as "
                "integer labels of shape [sample]"
            )


def _folds(
    groups: Integer[np.ndarray, " sample"], rng: np.random.Generator
) -> Integer[np.ndarray, " sample"]:
    """Whole groups to folds of nearly equal size: in random order, each to the emptiest fold."""
    sizes = np.bincount(groups)
    if sizes.max() == 1:
        fold_of = rng.permutation(len(sizes)) % N_FOLDS
        return np.asarray(fold_of[groups])
    filled = np.zeros(N_FOLDS)
    fold_of = np.empty(len(sizes), dtype=int)
    order = rng.permutation(len(sizes))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return np.asarray(fold_of[groups])
