"""What the H-VIB probe trains on: splits by group, reduced inputs, whitened targets, classes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.folds import balanced_folds

# Three folds of groups to train on, one to stop on, one to report.
N_FOLDS = 5
MIN_GROUPS = 2 * N_FOLDS
# Directions with less than this share of the largest variance hold rounding, not data.
RESOLUTION = 1e-6
# Tokens told apart, all others together being the last class, and directions of their rows.
N_CLASSES = 128
CLASS_RANK = 64


@dataclass(frozen=True)
class Split:
    """Positions by what they are for; no group is in two of them."""

    train: Int[np.ndarray, " train"]
    stop: Int[np.ndarray, " stop"]
    test: Int[np.ndarray, " test"]

    def counts(self) -> dict[str, int]:
        """Positions of each."""
        return {"training": len(self.train), "stopping": len(self.stop), "testing": len(self.test)}

    def group_counts(self, groups: np.ndarray) -> dict[str, int]:
        """Groups of each."""
        parts = {"training": self.train, "stopping": self.stop, "testing": self.test}
        return {name: len(np.unique(groups[index])) for name, index in parts.items()}


def split_groups(groups: np.ndarray, seed: int) -> Split:
    """Deal groups to training, stopping and testing, three to one to one.

    Raises:
        ValueError: If there are too few groups.
    """
    labels, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(labels) < MIN_GROUPS:
        raise ValueError(
            f"groups must be at least {MIN_GROUPS}, so that some are left to stop and to report on,"
            f" got {len(labels)}: give more documents, or labels that tell them apart"
        )
    by_label: dict[Hashable, int] = dict(enumerate(sizes.tolist()))
    folds = balanced_folds(by_label, N_FOLDS, seed)
    fold = np.array([folds[label] for label in range(len(labels))])[index]
    return Split(*(np.flatnonzero(chosen) for chosen in (fold < 3, fold == 3, fold == 4)))


def reduce_inputs(
    read: Callable[[int], Float[np.ndarray, "position d"]],
    n_inputs: int,
    width: int,
    split: Split,
    path: Path | None,
) -> Float[Tensor, "position input width"]:
    """Each input on its leading principal directions, standardized before and whitened after.

    Means, deviations and directions are those of the training positions. Directions that do not
    vary there are 0.

    Args:
        read: Gives one input's rows.
        n_inputs: Number of inputs.
        width: Directions kept at most.
        split: Which positions to fit on.
        path: File to hold the result, or None to hold it in memory.
    """
    out: np.ndarray | None = None
    for number in range(n_inputs):
        rows = read(number).astype(np.float32, copy=False)
        if out is None:
            shape = (len(rows), n_inputs, min(width, rows.shape[1]))
            out = (
                np.zeros(shape, dtype=np.float32)
                if path is None
                else np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
            )
        mean, axes = _whitening(rows[split.train], out.shape[2])
        out[:, number] = ((rows - mean) @ axes).astype(np.float32)
    assert out is not None
    return torch.from_numpy(out)


def whiten_target(
    name: str, values: Float[np.ndarray, "position feature"], split: Split
) -> tuple[Float[Tensor, "position component"], Float[Tensor, " position"]]:
    """A target in units of its best Gaussian on the training positions, and its cost without z.

    Directions in which it does not vary are left out: they tell nothing.

    Returns:
        Whitened values, and their negative log-likelihood under that Gaussian (nats).

    Raises:
        ValueError: If the target does not vary.
    """
    rows = values.astype(np.float64)
    train = rows[split.train]
    mean = train.mean(axis=0)
    variance, axes = np.linalg.eigh(np.cov(train.T, bias=True).reshape(rows.shape[1], -1))
    varies = variance > RESOLUTION * variance[-1]
    if not variance[-1] > 0:
        raise ValueError(f"target {name!r} does not vary over the training positions")
    white = (rows - mean) @ (axes[:, varies] / np.sqrt(variance[varies]))
    constant = 0.5 * (np.log(variance[varies]) + np.log(2 * np.pi)).sum()
    cost = 0.5 * (white**2).sum(axis=1) + constant
    return torch.from_numpy(white).float(), torch.from_numpy(cost)


@dataclass(frozen=True)
class Classes:
    """The next token as one of a few classes.

    Attributes:
        labels: Class of each position.
        log_probability: Of each class, from the training positions.
        rows: How each class is read off a final residual, in a few directions.
        share: Share of the training positions whose token has a class of its own.
    """

    labels: Int[Tensor, " position"]
    log_probability: Float[Tensor, " class"]
    rows: Float[Tensor, "class rank"]
    share: float


def token_labels(
    tokens: Int[np.ndarray, " position"],
    split: Split,
    unembedding: Callable[[Int[Tensor, " token"]], Float[Tensor, "token d"]],
) -> Classes:
    """The most frequent tokens of the training positions, and all others as one class.

    Merging tokens can only lose information, so what is known about the class is at most what is
    known about the token. The class of the others takes their average row.
    """
    ids, counts = np.unique(tokens[split.train], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    ids, counts = ids[order], counts[order]
    n_own = min(N_CLASSES - 1, len(ids) - 1)
    rows = unembedding(torch.from_numpy(ids))
    rest = torch.from_numpy(counts[n_own:] / counts[n_own:].sum()).float()
    rows = torch.cat([rows[:n_own], (rest @ rows[n_own:])[None]])
    # Adding one vector to all rows changes no probability.
    rows = rows - rows.mean(dim=0)
    left, size, _ = torch.linalg.svd(rows, full_matrices=False)
    rows = (left * size)[:, :CLASS_RANK]
    class_of = np.full(int(max(tokens.max(), ids.max())) + 1, n_own)
    class_of[ids[:n_own]] = np.arange(n_own)
    # Half a count for every class (Krichevsky and Trofimov 1981).
    smoothed = np.append(counts[:n_own], counts[n_own:].sum()) + 0.5
    return Classes(
        labels=torch.from_numpy(class_of[tokens]),
        log_probability=torch.from_numpy(np.log(smoothed / smoothed.sum())).float(),
        rows=rows / rows.square().mean().sqrt(),
        share=float(counts[:n_own].sum() / counts.sum()),
    )


def _whitening(
    train: Float[np.ndarray, "train d"], width: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d width"]]:
    mean = train.mean(axis=0, dtype=np.float64)
    covariance = np.cov(train.T, bias=True).reshape(len(mean), -1)
    deviation = np.sqrt(np.diag(covariance))
    spread = np.where(deviation > 0, deviation, 1.0)
    variance, axes = np.linalg.eigh(covariance / np.outer(spread, spread))
    variance, axes = variance[::-1][:width], axes[:, ::-1][:, :width]
    varies = variance > RESOLUTION * variance[0]
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    return mean, axes / spread[:, None] * scale
