"""Both runs of a patching sweep, what each patch could change, and the metric after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.models import ModelAdapter, PatchPlace, RecordedRun
from mspgt_lens.patching.metrics import (
    LogitMetric,
    MetricName,
    NamedMetric,
    call_metric,
    metric_label,
    named_metric,
)
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.walking import PatchRows, final_residuals
from mspgt_lens.processes import ALONE, Processes, Turns

Direction = Literal["denoise", "noise"]
CHECKED_CELLS = 48


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """What is patched where, and which way.

    Attributes:
        place: What is patched.
        columns: The column of each pair's prompts that each entry of ``positions`` stands for.
        direction: ``"denoise"`` or ``"noise"``.
        window: Consecutive blocks to patch.
        batch_size: Patched prompts in one call of a block; None for a fixed number of tokens.
    """

    place: PatchPlace
    columns: Int[np.ndarray, "pos pair"]
    direction: Direction
    window: int = 1
    batch_size: int | None = None


class Sweep:
    """Both runs, the metric on each, and the cells with what each could change."""

    def __init__(
        self,
        adapter: ModelAdapter,
        pairs: PromptPairs,
        metric: MetricName | LogitMetric,
        plan: SweepPlan,
        processes: Processes = ALONE,
    ) -> None:
        self.adapter, self.pairs, self.plan, self.processes = adapter, pairs, plan, processes
        clean = RecordedRun(adapter, pairs.clean, pairs.mask, plan.place)
        corrupted = RecordedRun(adapter, pairs.corrupted, pairs.mask, plan.place)
        runs = clean, corrupted
        self.source, self.base = runs if plan.direction == "denoise" else runs[::-1]
        self.base.prepare()
        self.last = pairs.last
        self.every = torch.arange(len(pairs))
        self.named: NamedMetric | None = None
        self.called: LogitMetric | None = None
        self.metric_name = metric_label(metric)
        if callable(metric):
            self.called = metric
        else:
            final = clean.residual[-1][self.every, self.last]
            self.named = named_metric(metric, pairs, self.base.logits(final))
        self.clean, self.corrupted = self._unpatched(clean), self._unpatched(corrupted)
        self.start = self.corrupted if plan.direction == "denoise" else self.clean
        # Of one process: rounding elsewhere may tell other activations apart.
        self.reach = processes.give({"reach": self._reach()}, 0)["reach"]
        self.able: np.ndarray = np.any(self.reach, axis=0)
        self.cells = np.argwhere(np.ones(self.reach.shape[1:]))
        gap = self.clean.mean() - self.corrupted.mean()
        if gap == 0 and self.reach.any():
            raise ValueError(
                f"metric: {self.metric_name} is {self.clean.mean():g} on the clean and on the "
                "corrupted runs, so effects have no scale; choose a metric that tells them apart"
            )

    def _unpatched(self, run: RecordedRun) -> np.ndarray:
        if self.named is not None:
            logits = self.base.logits(run.residual[-1][self.every, self.last])
            return self.named(logits, self.every).cpu().double().numpy()
        return self._call(self._all_logits(run)).cpu().numpy()

    def _all_logits(self, run: RecordedRun) -> Tensor:
        return self._logits_everywhere(run.residual[-1])

    def _logits_everywhere(self, residual: Tensor) -> Tensor:
        return self.base.logits(residual.flatten(0, 1)).reshape(*residual.shape[:2], -1)

    def _call(self, logits: Tensor) -> Tensor:
        assert self.called is not None
        return call_metric(self.called, logits)

    def metric_of(
        self, residual: Float[Tensor, "run pair length d_model"], start: int
    ) -> Iterator[np.ndarray]:
        """The metric of each changed run, given at positions ``start`` and after."""
        everywhere = None if self.called is None else self._all_logits(self.base)
        for changed in residual:
            if everywhere is None:
                assert self.named is not None
                logits = self.base.logits(changed[self.every, self.last - start])
                yield self.named(logits, self.every).cpu().double().numpy()
            else:
                logits = everywhere.clone()
                logits[:, start:] = self._logits_everywhere(changed)
                yield self._call(logits).cpu().numpy()

    def _reach(self) -> np.ndarray:
        """Where a patch could change a pair's metric, shape ``[pair, block, pos (, head)]``."""
        columns = torch.from_numpy(self.plan.columns.T)
        real = self.pairs.mask.gather(1, columns) & (
            columns >= self.pairs.first_difference[:, None]
        )
        if self.named is not None:
            real &= columns <= self.pairs.last[:, None]
        n_rows = self.adapter.n_layers - self.plan.window + 1
        pair = torch.arange(len(self.pairs))[:, None]
        changed = []
        for mine, other in zip(self.base.activations, self.source.activations, strict=True):
            # The same activation, bit for bit, is no patch: "z" by head, other places whole.
            changed.append((mine != other).any(dim=-1).cpu()[pair, columns])
        if self.named is not None and self.plan.place != "resid_pre":
            # What the last block's parts write moves to no other position any more.
            read = columns == self.pairs.last[:, None]
            changed[-1] &= read[..., None] if changed[-1].ndim == 3 else read
        by_block = torch.stack(changed, dim=1)
        windows = by_block.unfold(1, self.plan.window, 1).any(dim=-1)
        assert windows.shape[1] == n_rows
        real = real[:, None, :]
        both: np.ndarray = (windows & (real[..., None] if windows.ndim == 4 else real)).numpy()
        return both

    def exact(self, cells: np.ndarray, progress: bool) -> np.ndarray:
        """The metric after each of these patches, ``[pair, *cell]`` or ``[*cell]``.

        Cells that are not asked for keep the unpatched value. Of several processes, each runs some
        of the batches; of callables, some of the positions. All have all values.
        """
        shape = self.reach.shape[1:]
        wanted = np.zeros(shape, dtype=bool)
        wanted[tuple(cells.T)] = True
        reach = self.reach & wanted
        values = np.zeros(self.start.shape + shape)
        base_logits = None if self.called is None else self._all_logits(self.base)
        turns, n_patches = Turns(self.processes), int(reach.sum())
        is_shown = progress and self.processes.rank == 0
        total = n_patches // self.processes.size
        with tqdm(total=total, unit="patch", disable=not is_shown) as bar:
            for pos in range(shape[1]):
                if not reach[:, :, pos].any():
                    continue
                if base_logits is None:
                    self._read_named(pos, reach, values, bar, turns)
                elif turns.is_mine(float(reach[:, :, pos].sum())):
                    self._read_called(pos, reach, values, base_logits, bar)
        self.processes.sum_(values)
        # A callable is asked for all pairs at once, wherever any of them is changed.
        read = reach if self.called is None else np.any(reach, axis=0)
        start = self.start.reshape(self.start.shape + (1,) * len(shape))
        return np.where(read, values, start)

    def _patched(
        self, pos: int, reach: np.ndarray, turns: Turns
    ) -> Iterator[tuple[PatchRows, int, Float[Tensor, "row length d_model"]]]:
        """Patched runs at one entry of ``positions``, in parts: rows, first position, residuals."""
        for column in np.unique(self.plan.columns[pos]):
            here = (
                reach[:, :, pos]
                & (self.plan.columns[pos] == column)[(slice(None),) + (None,) * (reach.ndim - 2)]
            )
            # Sorted by block first.
            block, pair, *head = np.argwhere(np.moveaxis(here, 0, 1)).T
            if not len(block):
                continue
            rows = PatchRows(
                block=block,
                pair=torch.from_numpy(pair),
                head=torch.from_numpy(head[0]) if head else None,
            )
            stop = self.base.n_pos if self.named is None else int(self.pairs.last[pair].max()) + 1
            yield from final_residuals(
                self.base,
                self.source.activations,
                rows,
                column=int(column),
                stop=stop,
                window=self.plan.window,
                batch_size=self.plan.batch_size,
                turns=turns,
            )

    def _read_named(
        self, pos: int, reach: np.ndarray, values: np.ndarray, bar: Any, turns: Turns
    ) -> None:
        assert self.named is not None
        for rows, start, residual in self._patched(pos, reach, turns):
            every = torch.arange(len(rows))
            read = residual[every, self.last[rows.pair] - start]
            result = self.named(self.base.logits(read), rows.pair)
            cells = tuple(np.array(rows.cells(pos)).T)
            values[(rows.pair.numpy(), *cells)] = result.cpu().double().numpy()
            bar.update(len(rows))

    def _read_called(
        self, pos: int, reach: np.ndarray, values: np.ndarray, base_logits: Tensor, bar: Any
    ) -> None:
        """Callables see all pairs at once, so a cell waits until all its pairs are there."""
        waiting: dict[tuple[int, ...], list[tuple[int, int, Tensor]]] = {}
        for rows, start, residual in self._patched(pos, reach, Turns()):
            for cell, pair, changed in zip(
                rows.cells(pos), rows.pair.tolist(), residual, strict=True
            ):
                waiting.setdefault(cell, []).append((pair, start, changed))
            bar.update(len(rows))
        for cell, changes in waiting.items():
            logits = base_logits.clone()
            new = self.base.logits(torch.cat([changed for _, _, changed in changes]))
            parts = torch.split(new, [len(changed) for _, _, changed in changes])
            for (pair, start, _), scores in zip(changes, parts, strict=True):
                logits[pair, start : start + len(scores)] = scores
            where: Any = (..., *cell)
            values[where] = self._call(logits).cpu().numpy()

    def attribution(self) -> np.ndarray:
        """First-order estimates of what :meth:`exact` gives, from one backward pass."""
        self.adapter.require_ordinary_weights("method='attribution'")
        base = self.base
        activations: list[Tensor] = []

        def keep(activation: Tensor) -> Tensor:
            activations.append(activation)
            return activation

        with torch.enable_grad(), base.editing() as edits:
            residual = base.residual[0].clone().requires_grad_()
            for block in range(self.adapter.n_layers):
                if base.place == "resid_pre":
                    activations.append(residual)
                else:
                    edits[block] = keep
                residual = base.run_block(block, residual, self.every, 0)
            if self.named is not None:
                read = residual[self.every, self.last]
                metric = self.named(base.logits(read), self.every)
            else:
                metric = self._call(self._logits_everywhere(residual))
            if not metric.requires_grad:
                raise ValueError(
                    f"metric: {self.metric_name} has no gradient, so there is nothing to "
                    "attribute; use method='exact' or a metric that torch can differentiate"
                )
            gradients = torch.autograd.grad(metric.sum(), activations)
        moved = [
            ((other - mine) * gradient).sum(dim=-1).cpu().double()
            for mine, other, gradient in zip(
                base.activations, self.source.activations, gradients, strict=True
            )
        ]
        pair, columns = (
            torch.arange(len(self.pairs))[:, None],
            torch.from_numpy(self.plan.columns.T),
        )
        by_block = torch.stack([m[pair, columns] for m in moved], dim=1)
        change = by_block.unfold(1, self.plan.window, 1).sum(dim=-1).numpy() * self.reach
        if self.start.ndim == 0:
            change = change.sum(axis=0)
        start = self.start.reshape(self.start.shape + (1,) * (self.reach.ndim - 1))
        estimate: np.ndarray = start + change
        return estimate

    def check_cells(self, seed: int, progress: bool) -> tuple[np.ndarray, np.ndarray]:
        """Cells drawn at random among those that can change anything, and their exact metric."""
        able = np.argwhere(self.able)
        drawn = np.random.default_rng(seed).permutation(len(able))[:CHECKED_CELLS]
        cells = able[np.sort(drawn)]
        exact = mean_over_pairs(self.exact(cells, progress), self.reach.ndim - 1)
        return cells, exact[tuple(cells.T)]


def mean_over_pairs(values: np.ndarray, n_axes: int) -> np.ndarray:
    """Values of cells with ``n_axes`` axes, averaged over pairs where they are there."""
    mean: np.ndarray = values.mean(axis=0) if values.ndim > n_axes else values
    return mean


def all_columns(pairs: PromptPairs) -> Int[np.ndarray, "pos pair"]:
    """Every position, the same for every pair."""
    n_pairs, n_pos = pairs.clean.shape
    return np.repeat(np.arange(n_pos)[:, None], n_pairs, axis=1)
