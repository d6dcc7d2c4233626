"""Small networks, one per fold of groups, trained side by side as one batched computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mspgt_lens.estimators.samples import N_FOLDS, Samples

HIDDEN = 64
BATCH = 256
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-3
CHECK_EVERY = 50
PATIENCE = 5
MAX_STEPS = 3000
AVERAGING = 0.98
VALIDATION = 0.15


class FoldMLP(nn.Module):
    """Two hidden layers beside a linear path, with weights of its own for every fold.

    The output is 0 at the start, so training starts from whatever it is added to.
    """

    def __init__(self, width: int, out: int, generator: torch.Generator) -> None:
        super().__init__()

        def weights(rows: int, columns: int, scale: float) -> nn.Parameter:
            drawn = torch.randn(N_FOLDS, rows, columns, generator=generator)
            return nn.Parameter(drawn * scale / rows**0.5)

        self.weights = nn.ParameterList(
            [
                weights(width, HIDDEN, 1.5),
                weights(HIDDEN, HIDDEN, 1.5),
                weights(HIDDEN, out, 0.0),
                weights(width, out, 0.0),
            ]
        )
        # Spread thresholds, so that even one input column is cut at many places.
        self.biases = nn.ParameterList(
            [nn.Parameter(torch.randn(N_FOLDS, 1, HIDDEN, generator=generator)) for _ in range(2)]
            + [nn.Parameter(torch.zeros(N_FOLDS, 1, out))]
        )

    def forward(self, x: Float[Tensor, "fold row width"]) -> Float[Tensor, "fold row out"]:
        hidden = nn.functional.gelu(torch.baddbmm(self.biases[0], x, self.weights[0]))
        hidden = nn.functional.gelu(torch.baddbmm(self.biases[1], hidden, self.weights[1]))
        out: Tensor = torch.baddbmm(self.biases[2], hidden, self.weights[2])
        out = out + torch.bmm(x, self.weights[3])
        return out


@dataclass(frozen=True)
class FoldSplit:
    """Rows of every fold's training, validation and test: whole groups each."""

    train: list[np.ndarray]
    validation: list[np.ndarray]
    test: list[np.ndarray]


def split_folds(samples: Samples) -> FoldSplit:
    """For every fold its own rows as test, and some groups of the others for validation."""
    rng = np.random.default_rng(samples.seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for k in range(N_FOLDS):
        rest = rng.permutation(np.unique(samples.groups[samples.fold != k]))
        held = np.isin(samples.groups, rest[: max(1, round(VALIDATION * len(rest)))])
        test = samples.fold == k
        for part, rows in zip(parts, (~test & ~held, ~test & held, test), strict=True):
            part.append(np.flatnonzero(rows))
    return FoldSplit(*parts)


def train(
    networks: Sequence[FoldMLP],
    loss: Callable[[Int[Tensor, "fold row"]], Float[Tensor, " fold"]],
    validate: Callable[[], Float[Tensor, " fold"]],
    split: FoldSplit,
    seed: int,
    batch: int = BATCH,
) -> None:
    """Minimize every fold's loss; keep the averaged weights that did best on its validation groups.

    The start counts too: a fold whose validation never improves keeps its network at 0.

    Args:
        networks: Trained in place.
        loss: Mean loss of each fold on rows ``[fold, row]``.
        validate: Mean validation score of each fold, higher is better.
        split: Rows of each fold.
        seed: Of the batches.
        batch: Rows per fold and step.
    """
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rng = np.random.default_rng(seed)
    average = [p.detach().clone() for p in parameters]
    best = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        best_score = validate()
    waited = 0
    for step in range(1, MAX_STEPS + 1):
        rows = torch.from_numpy(np.stack([rng.choice(r, batch) for r in split.train]))
        optimizer.zero_grad()
        torch.autograd.backward(loss(rows).sum())
        optimizer.step()
        with torch.no_grad():
            for slow, now in zip(average, parameters, strict=True):
                slow.lerp_(now, 1 - AVERAGING)
        if step % CHECK_EVERY:
            continue
        current = [p.detach().clone() for p in parameters]
        _set(parameters, average)
        with torch.no_grad():
            score = validate()
        _set(parameters, current)
        better = score > best_score
        best_score = torch.where(better, score, best_score)
        for best_yet, new in zip(best, average, strict=True):
            best_yet[better] = new[better]
        waited = 0 if better.any() else waited + 1
        if waited == PATIENCE:
            break
    _set(parameters, best)


def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
