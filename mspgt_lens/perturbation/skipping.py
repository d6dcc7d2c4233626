"""What each block is needed for: skipped, or swapped with the next, here or at earlier tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.contract import Result, Rows, counted, interval, named, tidy
from mspgt_lens.estimates import CannotMeasure, Curve
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.perturbation.batches import Batch, make_batches
from mspgt_lens.perturbation.block_runs import (
    BLOCK_CHANGES,
    REACHES,
    SHIFTS,
    BlockChange,
    BlockRuns,
    Reach,
    Shift,
)
from mspgt_lens.perturbation.responding import agree, check_resuming
from mspgt_lens.processes import Processes, joined
from mspgt_lens.prompts import PromptDataset, as_dataset
from mspgt_lens.statistics import mean_interval
from mspgt_lens.storage import package_versions

_UNITS = {"kl": "nats", "top1_kept": "share", "entropy": "nats"}
_DONE = {
    "skip": "The block is skipped: it hands on what it was given",
    "swap": "The block and the next act in each other's place",
}
_WHERE = {
    "all": "everywhere, and every prediction is read.",
    "same": "at the position that is read only; earlier positions are as in the clean run.",
    "future": "up to a random position, and later predictions are read, which meet the change from "
    "the next block on.",
}
_READ = {
    "kl": "KL divergence of the changed prediction from the clean one",
    "top1_kept": "Share of positions that keep their most likely token",
    "entropy": "Rise of the prediction's entropy",
}


@dataclass(frozen=True, eq=False, repr=False)
class BlockEffects(Result):
    """What becomes of predictions where one block is skipped, or swapped with the next.

    ``reach`` is where the block is changed and which predictions are read: ``"all"`` positions and
    predictions; ``"same"``, the position that is read only; ``"future"``, the positions up to a
    random one, while later predictions are read. ``measure`` is ``"kl"`` (from the clean prediction
    to the changed one, nats), ``"top1_kept"`` (share of positions that keep their most likely
    token) or ``"entropy"`` (of the changed prediction less that of the clean one, nats).

    Attributes:
        model_name: The model's name.
        n_layers: Number of blocks, L.
        skip: Of each block skipped, per group (document), ``[reach, measure, block, group]``.
        swap: Of each block swapped with the next, ``[reach, measure, pair, group]``; there are
            L - 1 pairs, and pair l is of the blocks l and l + 1.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    n_layers: int
    skip: Float[np.ndarray, "reach measure block group"]
    swap: Float[np.ndarray, "reach measure pair group"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def curve(self, change: BlockChange, reach: Reach = "all", measure: Shift = "kl") -> Curve:
        """One measure along depth, with its interval over groups.

        Args:
            change: ``"skip"`` or ``"swap"``.
            reach: ``"all"``, ``"same"`` or ``"future"``.
            measure: ``"kl"``, ``"top1_kept"`` or ``"entropy"``.

        Returns:
            One point per block (per pair of blocks for ``"swap"``), in nats or as a share; its
            ``by_fold`` holds every group, and groups count alike.

        Raises:
            ValueError: If there is no such change, reach or measure.
        """
        for name, value, known in (
            ("change", change, BLOCK_CHANGES),
            ("reach", reach, REACHES),
            ("measure", measure, SHIFTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        table = self.skip if change == "skip" else self.swap
        by_group = table[REACHES.index(reach), SHIFTS.index(measure)].T
        guarantee = f"{_READ[measure]}. {_DONE[change]} {_WHERE[reach]}"
        return Curve(*mean_interval(by_group), _UNITS[measure], guarantee, by_group)

    def heading(self) -> str:
        """The model and how much text."""
        return (
            f"BlockEffects{named(self.model_name)}: {counted(self.n_layers, 'block')}, "
            f"{counted(self.skip.shape[3], 'document')}"
        )

    def rows(self) -> Rows:
        """KL and top-1 of every change and reach: the first block, those between, the last."""
        rows: Rows = [("change", "measure", "first block", "between, median", "last block")]
        for change in BLOCK_CHANGES:
            for reach in REACHES:
                for measure in ("kl", "top1_kept"):
                    curve = self.curve(change, reach, measure)
                    first, last = (
                        interval(curve.values[i], curve.low[i], curve.high[i]) for i in (0, -1)
                    )
                    middle = curve.values[1:-1]
                    between = f"{np.median(middle):.3g}" if len(middle) else ""
                    rows.append((f"{change}, {reach}", measure, first, between, last))
        return rows

    def findings(self) -> list[str]:
        """Which blocks predictions need most, and what blocks of each half are for the future."""
        worst = np.argsort(-self.curve("skip").values, kind="stable")[:2]
        kept = self.curve("skip", "all", "top1_kept").values
        future, same = (self.curve("skip", reach).values for reach in ("future", "same"))
        half = self.n_layers // 2
        lines = [
            f"Predictions need blocks {' and '.join(str(b) for b in sorted(worst.tolist()))} most; "
            f"skipping a block keeps {kept.min():.0%} to {kept.max():.0%} of the most likely "
            "tokens."
        ]
        if half:
            early, late = (float(future[part].mean()) for part in (slice(half), slice(half, None)))
            now = [float(same[part].mean()) for part in (slice(half), slice(half, None))]
            lines.append(
                f"Skipped at earlier tokens, blocks before half depth move a prediction by "
                f"{early:.3g} nats on average, those after it by {late:.3g}; at its own token by "
                f"{now[0]:.3g} and {now[1]:.3g}."
            )
        return lines

    def to_dataframe(self) -> pd.DataFrame:
        """One row per change, reach, measure and block.

        Returns:
            Columns ``model, quantity, perturbation, mode, block, value, low, high, unit``;
            ``perturbation`` is the change, ``mode`` the reach, ``quantity`` the measure.
        """
        tables = []
        for change in BLOCK_CHANGES:
            for reach in REACHES:
                for measure in SHIFTS:
                    curve = self.curve(change, reach, measure)
                    columns = {
                        "model": self.model_name,
                        "quantity": measure,
                        "perturbation": change,
                        "mode": reach,
                        "block": np.arange(len(curve)),
                        "value": curve.values,
                        "low": curve.low,
                        "high": curve.high,
                        "unit": curve.unit,
                    }
                    tables.append(tidy(columns))
        return pd.concat(tables, ignore_index=True)


@in_own_state
def block_effects(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    *,
    n_places: int = 2,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> BlockEffects:
    """Skip each block, and swap it with the next, and see which predictions move.

    Three times: everywhere, as in studies that delete layers (Lad et al. 2024, arXiv 2406.19384);
    at the position that is read only, so that no other token knows of it; and at the positions up
    to a random one, while later predictions are read (Csordas et al. 2025, arXiv 2505.13898), so
    that only what later tokens take from earlier ones is changed. Later tokens meet that change
    from the next block on: the changed block itself treats them as ever. So the last block has no
    effect on the future, whatever it does.

    Runs are taken up again where they are changed, with the keys and values of the clean run.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        n_places: Random positions of each prompt up to which blocks are changed, for ``"future"``.
        skip_first: Tokens at the beginning of each prompt whose predictions are not read. Blocks
            are changed there, too, where they are changed everywhere or up to a position.
        batch_size: Prompts per forward pass; by default a fixed number of tokens, or what fits.
        seed: Decides the random positions, together with each prompt's tokens.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        KL, top-1 kept and change of entropy for every block, change and reach, group by group.

    Raises:
        CannotMeasure: If the model is an encoder, has fewer than 2 blocks, or cannot be resumed at
            a block; or there are fewer than 3 groups.
        FloatingPointError: If activations or logits are NaN or infinite.
        RuntimeError: If another process of the group failed; says which one, and why.
        ValueError: If an argument is out of range, a prompt does not fit the model, or processes
            were given different arguments.

    Example:
        >>> effects = ml.studies.block_effects(model, prompts)
        >>> len(effects.curve("skip", "future", "kl"))  # one point per block
        8
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        if n_places < 1:
            raise ValueError(f"n_places must be at least 1 position, got {n_places}")
        if adapter.n_layers < 2:
            raise CannotMeasure(
                f"model: {adapter.name} has 1 block; swapping neighboring blocks needs at least 2"
            )
        batches = make_batches(
            adapter,
            _with_a_future(adapter, prompts, skip_first),
            skip_first=skip_first,
            batch_size=batch_size,
        )
        sums = _nothing(adapter.n_layers, len(batches.groups))
        arguments = {
            "n_places": n_places,
            "skip_first": skip_first,
            "batch_size": batch_size,
            "seed": seed,
        }
        agree(processes, adapter, batches, None, arguments)
        n_blocks = sum(total.n_blocks for total in sums.values())
        steps = sum(
            batch.n_rows * (len(sums) * len(_columns(batch)) + n_blocks) for batch in batches
        )
        n_steps, is_shown = steps // processes.size, progress and processes.rank == 0
        with adapter.inference(), tqdm(total=n_steps, desc="skipping", disable=not is_shown) as bar:
            check_resuming(adapter, batches)

            def run(batch: Batch) -> dict[BlockChange, _Sums]:
                own = _nothing(adapter.n_layers, len(batches.groups))
                runs = BlockRuns(adapter, batch, _places(batch, n_places, seed))
                for change, total in own.items():
                    for block in range(processes.rank, total.n_blocks, processes.size):
                        processes.check()
                        for reach, shifts, groups in runs.widely(change, block):
                            total.add(reach, block, shifts, groups)
                        bar.update(batch.n_rows)
                    for column in _columns(batch):
                        if column % processes.size != processes.rank:
                            continue
                        processes.check()
                        for block, shifts, groups in runs.at_one(change, column):
                            total.add("same", block, shifts, groups)
                        bar.update(batch.n_rows)
                return own

            for own in batches.each(run, bar):
                for change, total in sums.items():
                    total.take(own[change])
        for total in sums.values():
            total.add_up(processes)
    return BlockEffects(
        model_name=adapter.name,
        n_layers=adapter.n_layers,
        skip=sums["skip"].means(),
        swap=sums["swap"].means(),
        settings={
            "n_places": n_places,
            "n_groups": len(batches.groups),
            "n_positions": batches.n_positions,
            "skip_first": skip_first,
            "seed": seed,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": batches.fingerprint,
        },
        versions=package_versions(),
    )


class _Sums:
    """Sums of shifts per reach, block and group."""

    def __init__(self, n_blocks: int, n_groups: int) -> None:
        self.n_blocks = n_blocks
        self._sums = np.zeros((len(REACHES), n_blocks, n_groups, len(SHIFTS)))
        self._counts = np.zeros((len(REACHES), n_blocks, n_groups, 1))

    def add(
        self,
        reach: Reach,
        block: int,
        shifts: Float[np.ndarray, "read shift"],
        groups: Int[np.ndarray, " read"],
    ) -> None:
        where = REACHES.index(reach), block
        np.add.at(self._sums[where], groups, shifts)
        np.add.at(self._counts[where], groups, 1.0)

    def take(self, others: _Sums) -> None:
        self._sums += others._sums
        self._counts += others._counts

    def add_up(self, processes: Processes) -> None:
        """Put the sums of all processes in the place of those of each."""
        processes.sum_(self._sums)
        processes.sum_(self._counts)

    def means(self) -> Float[np.ndarray, "reach shift block group"]:
        """Of every group."""
        return np.moveaxis(self._sums / self._counts, 3, 1)


def _nothing(n_layers: int, n_groups: int) -> dict[BlockChange, _Sums]:
    """Sums of nothing yet."""
    return {change: _Sums(n_layers - (change == "swap"), n_groups) for change in BLOCK_CHANGES}


def _with_a_future(
    adapter: ModelAdapter, prompts: PromptDataset | Iterable[str], skip_first: int
) -> PromptDataset:
    """The prompts with two predictions to read: one to change, and one after it."""
    rows = list(as_dataset(prompts, adapter))
    special = sorted(adapter.special_ids)
    first = max(skip_first, 0)
    kept = [p for p in rows if (~np.isin(p.tokens[first:], special)).sum() > 1]
    if len(kept) < len(rows):
        tell(
            f"{len(rows) - len(kept)} of {len(rows)} prompts were left out: beyond their first "
            f"{skip_first} tokens (skip_first) they hold no two positions of ordinary text"
        )
    return PromptDataset(kept)


def _columns(batch: Batch) -> list[int]:
    """Positions at which some prompt has a prediction to read."""
    columns: list[int] = torch.nonzero(batch.valid.any(dim=0))[:, 0].tolist()
    return columns


def _places(batch: Batch, n_places: int, seed: int) -> Int[np.ndarray, "place prompt"]:
    """Random valid positions of each prompt, all before its last one; again where they are few."""
    chosen = []
    for valid, key in zip(batch.valid.numpy(), batch.keys, strict=True):
        before_last = np.flatnonzero(valid)[:-1]
        drawn = np.random.default_rng([seed, 3, key]).permutation(before_last)
        chosen.append(np.resize(drawn, n_places))
    return np.stack(chosen, axis=1)
