"""Changed runs carried through the blocks together, each from where it was changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.models import Change, RecordedRun
from mspgt_lens.processes import Turns

# Tokens in one call of a block on a CPU: measured; larger calls gain nothing.
_TOKENS_PER_CALL = 2048


@dataclass(frozen=True)
class PatchRows:
    """Changed runs, one per row, sorted by block.

    Attributes:
        block: First patched block of each row, rising.
        pair: The recorded prompt that each row is a change of.
        head: The patched head of each row; None where whole activations are patched.
    """

    block: Int[np.ndarray, " row"]
    pair: Int[Tensor, " row"]
    head: Int[Tensor, " row"] | None

    def __len__(self) -> int:
        return len(self.block)

    def part(self, chosen: slice) -> PatchRows:
        """Some of the rows."""
        return PatchRows(
            self.block[chosen],
            self.pair[chosen],
            None if self.head is None else self.head[chosen],
        )

    def cells(self, pos: int) -> list[tuple[int, ...]]:
        """``(block, pos)`` or ``(block, pos, head)`` of each row."""
        blocks = self.block.tolist()
        if self.head is None:
            return [(block, pos) for block in blocks]
        return [(block, pos, head) for block, head in zip(blocks, self.head.tolist(), strict=True)]


def final_residuals(
    base: RecordedRun,
    source: Sequence[Float[Tensor, "prompt pos *activation"]],
    rows: PatchRows,
    *,
    column: int,
    stop: int,
    window: int,
    batch_size: int | None,
    turns: Turns,
) -> Iterator[tuple[PatchRows, int, Float[Tensor, "row length d_model"]]]:
    """Patched runs at the last site.

    Rows that begin at later blocks join the batch when it gets there, so that every block is called
    on all rows that need it.

    Args:
        base: The run that is changed, prepared for resuming.
        source: Activations to put in, one per block.
        rows: The runs, all patched at one position.
        column: That position, as a column of the prompts.
        stop: One past the last position that is needed.
        window: Consecutive blocks to patch.
        batch_size: Rows in one call of a block; by default as many as fill a fixed number of
            tokens.
        turns: Whose turn it is: of several processes each runs some of the batches, the same that
            one process would run.

    Yields:
        Rows, the first position computed, and their residuals after the last block.
    """
    if base.reuses_prefix:
        start = column
    else:
        start, stop = 0, base.n_pos
    size = batch_size or rows_per_call(stop - start)
    with base.editing() as edits:
        for first in range(0, len(rows), size):
            part = rows.part(slice(first, first + size))
            n_blocks = len(base.residual) - 1 - part.block
            if not turns.is_mine(float(n_blocks.sum()) * (stop - start)):
                continue
            walk = _Walk(base, source, part, column, start, stop, window)
            yield part, start, walk.run(edits)


def rows_per_call(length: int) -> int:
    """Rows of that many tokens that one call of a block takes by default."""
    return max(1, _TOKENS_PER_CALL // length)


class _Walk:
    def __init__(
        self,
        base: RecordedRun,
        source: Sequence[Tensor],
        rows: PatchRows,
        column: int,
        start: int,
        stop: int,
        window: int,
    ) -> None:
        self.base, self.source, self.rows = base, source, rows
        self.column, self.start, self.stop, self.window = column, start, stop, window

    def run(self, edits: dict[int, Change]) -> Tensor:
        base, rows = self.base, self.rows
        residual = base.residual[0][:0, self.start : self.stop]
        carried = 0
        for block in range(int(rows.block[0]), len(base.residual) - 1):
            begun = int(np.searchsorted(rows.block, block, side="right"))
            ended = int(np.searchsorted(rows.block, block - self.window, side="right"))
            new = base.residual[block][rows.pair[carried:begun], self.start : self.stop]
            residual, carried = torch.cat([residual.to(new.device), new]), begun
            edits.clear()
            if base.place == "resid_pre":
                residual = self._patched(block, slice(ended, begun), residual)
            elif ended < begun:
                edits[block] = partial(self._patched, block, slice(ended, begun))
            residual = base.run_block(block, residual, rows.pair[:begun], self.start)
        edits.clear()
        return residual

    def _patched(self, block: int, chosen: slice, activation: Tensor) -> Tensor:
        """The activation with the source's in the chosen rows, at the patched position."""
        activation = activation.clone()
        pair, offset = self.rows.pair[chosen], self.column - self.start
        if self.rows.head is None:
            activation[chosen, offset] = self.source[block][pair, self.column]
        else:
            head = self.rows.head[chosen]
            row = torch.arange(len(activation))[chosen]
            activation[row, offset, head] = self.source[block][pair, self.column, head]
        return activation
