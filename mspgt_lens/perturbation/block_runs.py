"""Runs in which one block is skipped or swapped with the next, taken up again from the clean run.

Everything is computed from the residual stream of the clean run: skipped, a block's output is its
input; swapped, two blocks are called in the other order, each with its own arguments. No hooks are
needed, and any architecture whose blocks can be called one by one is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.models import ModelAdapter, RecordedRun
from mspgt_lens.perturbation.batches import Batch
from mspgt_lens.perturbation.responding import divergences, log_probabilities

BlockChange = Literal["skip", "swap"]
Reach = Literal["all", "same", "future"]
Shift = Literal["kl", "top1_kept", "entropy"]
BLOCK_CHANGES: tuple[BlockChange, ...] = get_args(BlockChange)
REACHES: tuple[Reach, ...] = get_args(Reach)
SHIFTS: tuple[Shift, ...] = get_args(Shift)
# Blocks that a change takes the place of.
_LENGTH = {"skip": 1, "swap": 2}
# Keys of earlier positions that are held at once, for all rows of a call.
_PREFIX_TOKENS = 2**16


class BlockRuns:
    """One batch run clean, and taken up again with one block skipped or swapped with the next.

    Use it inside ``adapter.inference()``.

    Args:
        adapter: A causal model.
        batch: Prompts that run together.
        places: Positions of each prompt up to which blocks are changed for ``"future"``, ``[place,
            prompt]``.

    Raises:
        ValueError: If the model cannot be resumed at a block.
    """

    def __init__(
        self, adapter: ModelAdapter, batch: Batch, places: Int[np.ndarray, "place prompt"]
    ) -> None:
        self.adapter, self.batch = adapter, batch
        self._run = RecordedRun(adapter, batch.tokens, batch.mask)
        self._run.prepare()
        self._prompts = torch.arange(len(batch.tokens))
        self._column = torch.arange(batch.tokens.shape[1])
        # Which positions are changed, and which predictions read.
        self._wide: list[tuple[Reach, Tensor, Tensor]] = [
            ("all", torch.ones_like(batch.mask), batch.valid)
        ]
        for place in torch.from_numpy(places):
            early = self._column <= place[:, None]
            self._wide.append(("future", early, batch.valid & ~early))
        self._clean = self._log_probabilities(self._run.residual[-1], batch.valid, "the clean run")
        self._row = batch.valid.flatten().cumsum(0).reshape(batch.valid.shape) - 1

    def widely(
        self, change: BlockChange, block: int
    ) -> Iterator[tuple[Reach, Float[np.ndarray, "read shift"], Int[np.ndarray, " read"]]]:
        """A block changed everywhere, and up to every place.

        Args:
            change: What is done.
            block: The block, or the first of two.

        Yields:
            ``"all"`` or ``"future"``, how far each prediction moves (in the order of ``SHIFTS``),
            and its group.
        """
        site = block + _LENGTH[change]
        changed = self._changed(change, block)
        for reach, where, read in self._wide:
            clean = self._run.residual[site]
            residual = torch.where(
                where.to(clean.device)[..., None], changed.to(clean.device), clean
            )
            for later in range(site, self.adapter.n_layers):
                residual = self._run.run_block(later, residual, self._prompts, 0)
            scores = self._log_probabilities(residual, read, f"the run that changes block {block}")
            yield reach, self._shifts(scores, self._row[read]), self._groups(read)

    def at_one(
        self, change: BlockChange, column: int
    ) -> Iterator[tuple[int, Float[np.ndarray, "read shift"], Int[np.ndarray, " read"]]]:
        """Every block changed at one position, whose prediction is read.

        Args:
            change: What is done.
            column: The position, as a column of the batch.

        Yields:
            The block, how far the prediction of each prompt moves, and its group.
        """
        read = self.batch.valid[:, column]
        n_changes = self.adapter.n_layers + 1 - _LENGTH[change]
        size = max(1, _PREFIX_TOKENS // (n_changes * (column + 1)))
        for prompts in torch.split(torch.nonzero(read)[:, 0], size):
            final = self._walk(change, column, prompts)
            row = self._row[prompts, column]
            for block, rows in enumerate(final):
                scores = log_probabilities(
                    self.adapter, rows, f"the run that changes block {block}"
                )
                yield block, self._shifts(scores, row), self.batch.groups[prompts.numpy()]

    def _changed(self, change: BlockChange, block: int) -> Float[Tensor, "prompt pos d_model"]:
        """The residual stream after the change, everywhere."""
        residual = self._run.residual[block]
        if change == "skip":
            return residual
        for one in (block + 1, block):
            residual = self._run.run_block(one, residual, self._prompts, 0)
        return residual

    def _walk(
        self, change: BlockChange, column: int, prompts: Int[Tensor, " prompt"]
    ) -> Float[Tensor, "change prompt d_model"]:
        """The last residual of every change at one position; they go through blocks together.

        Changes join the walk at the site after them.
        """
        rows = self._run.residual[0][prompts, column][:0]
        for site in range(_LENGTH[change], self.adapter.n_layers + 1):
            new = self._run.residual[site - _LENGTH[change]][prompts, column]
            if change == "swap":
                for block in (site - 1, site - 2):
                    new = self._run_at(block, new, prompts, column)
            rows = torch.cat([rows.to(new.device), new])
            if site < self.adapter.n_layers:
                rows = self._run_at(site, rows, prompts.repeat(len(rows) // len(prompts)), column)
        return rows.reshape(-1, len(prompts), rows.shape[1])

    def _run_at(
        self,
        block: int,
        rows: Float[Tensor, "row d_model"],
        prompts: Int[Tensor, " row"],
        column: int,
    ) -> Float[Tensor, "row d_model"]:
        """One block at one position, while all others are as in the clean run."""
        if self._run.reuses_prefix:
            return self._run.run_block(block, rows[:, None], prompts, column)[:, 0]
        whole = self._run.residual[block][prompts].clone()
        whole[:, column] = rows
        return self._run.run_block(block, whole, prompts, 0)[:, column]

    def _log_probabilities(
        self,
        residual: Float[Tensor, "prompt pos d_model"],
        read: Bool[Tensor, "prompt pos"],
        what: str,
    ) -> Float[Tensor, "read vocab"]:
        return log_probabilities(self.adapter, residual[read.to(residual.device)], what)

    def _shifts(
        self, scores: Float[Tensor, "read vocab"], row: Int[Tensor, " read"]
    ) -> Float[np.ndarray, "read shift"]:
        return prediction_shifts(self._clean[row.to(scores.device)], scores)

    def _groups(self, read: Bool[Tensor, "prompt pos"]) -> Int[np.ndarray, " read"]:
        owner: np.ndarray = self.batch.groups[torch.nonzero(read)[:, 0].numpy()]
        return owner


def prediction_shifts(
    clean: Float[Tensor, "read vocab"], changed: Float[Tensor, "read vocab"]
) -> Float[np.ndarray, "read shift"]:
    """How far predictions move, in the order of ``SHIFTS``; exactly 0, 1 and 0 at no change.

    Args:
        clean: Log-probabilities.
        changed: Log-probabilities of the same positions.
    """
    columns = (
        divergences(clean, changed),
        clean.argmax(dim=1) == changed.argmax(dim=1),
        _entropies(changed) - _entropies(clean),
    )
    table: np.ndarray = torch.stack([c.cpu().double() for c in columns], dim=1).numpy()
    return table


def _entropies(scores: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """Entropy of log-probabilities, row by row, in nats."""
    return torch.cat([-(part.exp() * part).sum(dim=1) for part in torch.split(scores, 8)])
