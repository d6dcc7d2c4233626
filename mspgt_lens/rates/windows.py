"""Which prompts shape, choose and measure, and which predictions are read in each."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mspgt_lens.ambient import tell
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import balanced_folds, stable_hash
from mspgt_lens.models import ModelAdapter, RecordedRun, ran_out_of_memory
from mspgt_lens.perturbation.batches import Batch, Batches, make_batches
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset

# Folds of groups: three shape the channels, one chooses the shrinkage, two measure.
_N_FOLDS = 6
_PARTS = {"shaping": (0, 1, 2), "choosing": (3,), "measuring": (4, 5)}
MIN_GROUPS = 2 * _N_FOLDS

# Predictions read of each prompt to shape, at the most, for each one that is read to measure.
_MOST_TARGETS = 64
_SHAPING_PER_MEASURED = 8
_KEPT_BYTES = 2**30

Band = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        sites: The sites, rising.
        bands: Scale name to offsets.
        n_targets: Predictions of each prompt that shape the channels of the farthest band.
        skip_first: Tokens at a prompt's beginning that are left alone.
        batch_size: Prompts per forward pass; None for a fixed number of tokens.
        seed: Decides the split, the targets, the sampled tokens and the noise.
    """

    sites: tuple[int, ...]
    bands: Mapping[str, Band]
    n_targets: int
    skip_first: int
    batch_size: int | None
    seed: int

    @property
    def reach(self) -> int:
        """The farthest offset."""
        return max(b for _, b in self.bands.values())

    def shaping_targets(self, scale: str) -> int:
        """Predictions of each prompt that shape; more for near bands, where each tells less."""
        return max(
            self.n_targets, min(_MOST_TARGETS, self.n_targets * self.reach // self.bands[scale][1])
        )

    def measured_targets(self, scale: str) -> int:
        """Predictions of each prompt that are measured."""
        return -(-self.shaping_targets(scale) // _SHAPING_PER_MEASURED)


@dataclass(frozen=True)
class Parts:
    """Prompts by what they are for; no group is in two of them."""

    shaping: Batches
    choosing: Batches
    measuring: Batches

    def group_counts(self) -> dict[str, int]:
        """Groups of each."""
        return {name: len(getattr(self, name).groups) for name in _PARTS}

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts, whatever their order."""
        total = sum(int(getattr(self, name).fingerprint, 16) for name in _PARTS) % 2**64
        return f"{total:016x}"

    @property
    def identity(self) -> int:
        """Hash of all prompts in their batches, and of their groups."""
        every = [batch for name in _PARTS for batch in getattr(self, name)]
        return stable_hash(*((batch.keys, batch.group_hashes.tolist()) for batch in every))


def split_prompts(
    adapter: ModelAdapter,
    prompts: PromptDataset | Iterable[str],
    plan: Plan,
) -> Parts:
    """Prompts that are long enough for every band, dealt by group.

    Raises:
        CannotMeasure: If too few groups have such prompts, or the model is not causal.
        ValueError: If a prompt does not fit the model.
    """
    rows = list(as_dataset(prompts, adapter))
    needed = plan.skip_first + plan.reach
    usable = [row for row in rows if len(row.tokens) >= needed]
    sizes: dict[Hashable, int] = {}
    for row in usable:
        sizes[row.group] = sizes.get(row.group, 0) + len(row.tokens)
    if len(sizes) < MIN_GROUPS:
        raise CannotMeasure(
            f"prompts need at least {MIN_GROUPS} groups (documents) with prompts of {needed} "
            f"tokens, the farthest offset of bands beyond skip_first, got {len(sizes)}: give more "
            "or longer documents, or nearer bands"
        )
    if len(usable) < len(rows):
        tell(
            f"{len(rows) - len(usable)} of {len(rows)} prompts were left out: they hold fewer than "
            f"{needed} tokens, the farthest offset of bands beyond skip_first"
        )
    fold = balanced_folds(sizes, _N_FOLDS, plan.seed)

    def part(name: str) -> Batches:
        mine = [row for row in usable if fold[row.group] in _PARTS[name]]
        return make_batches(
            adapter,
            _of(mine),
            skip_first=plan.skip_first,
            batch_size=plan.batch_size,
            min_groups=1,
        )

    return Parts(**{name: part(name) for name in _PARTS})


def _of(prompts: Sequence[Prompt]) -> PromptDataset:
    return PromptDataset(lambda: iter(prompts))


@dataclass(frozen=True)
class Window:
    """Positions of one batch, from the first that a change may touch to the target.

    Attributes:
        number: Tells apart several windows of one target.
        start: First position that is computed.
        target: The position whose prediction is read.
        touched: Positions from ``start`` to the target that belong to the band: those whose
            offset, ``target + 1`` less the position, lies in it, valid ones only.
    """

    number: int
    start: int
    target: int
    touched: Bool[Tensor, "prompt length"]


def draw_windows(
    run: RecordedRun, batch: Batch, plan: Plan, scale: str, n_targets: int, purpose: str
) -> list[Window]:
    """Windows before targets that are the same for all prompts of a batch.

    Each target has every offset of the band before it in all of these prompts, and every window is
    as short as the run can resume. Where there are fewer targets than asked for, some come several
    times.
    """
    a, b = plan.bands[scale]
    eligible = np.arange(plan.skip_first + b - 1, int(batch.mask.sum(dim=1).min()))
    rng = np.random.default_rng(stable_hash(*batch.keys, scale, purpose, plan.seed))
    rounds = [rng.permutation(eligible) for _ in range(-(-n_targets // len(eligible)))]
    windows = []
    for number, target in enumerate(np.concatenate(rounds)[:n_targets].tolist()):
        start = target + 1 - b if run.reuses_prefix else 0
        position = torch.arange(start, target + 1)
        inside = (position > target - b) & (position <= target + 1 - a)
        touched = batch.valid[:, start : target + 1] & inside
        windows.append(Window(number, start, target, touched))
    return windows


class Recorded:
    """Batches with their runs, ready to be resumed; to be gone over inside ``adapter.inference()``.

    Recording and checking a run costs as much as several channels. What is gone over again keeps
    its runs, up to a gigabyte.
    """

    def __init__(
        self, adapter: ModelAdapter, batches: Iterable[Batch], *, again: bool = False
    ) -> None:
        self.batches = tuple(batches)
        self._adapter = adapter
        self._room = _KEPT_BYTES if again else 0
        self._kept: dict[int, RecordedRun] = {}

    def __iter__(self) -> Iterator[tuple[Batch, RecordedRun]]:
        """Each batch with its run.

        Raises:
            CannotMeasure: If the model's blocks cannot be run one by one.
            FloatingPointError: If activations are NaN or infinite.
        """
        for index, batch in enumerate(self.batches):
            run = self._kept.get(index) or self._record(batch)
            if index not in self._kept and run.n_bytes <= self._room:
                self._kept[index] = run
                self._room -= run.n_bytes
            yield batch, run

    def _record(self, batch: Batch) -> RecordedRun:
        run = RecordedRun(self._adapter, batch.tokens, batch.mask)
        for site, residual in enumerate(run.residual):
            if not bool(torch.isfinite(residual[run.mask].sum())):
                raise FloatingPointError(
                    f"activations at site {site} of {self._adapter.name} are NaN or infinite; load "
                    "the model in float32"
                )
        run.prepare()
        return run


@contextmanager
def fitting(batches: Collection[Batch]) -> Iterator[None]:
    """While batches run: says what to do where one does not fit into memory.

    Raises:
        RuntimeError: Torch's own, if one does not.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        n_prompts, length = (max(batch.tokens.shape[axis] for batch in batches) for axis in (0, 1))
        remedy = f"a batch_size below {n_prompts} (other positions are read then)"
        # The kind of error stays, for those who catch it.
        raise type(error)(
            f"batch_size: {n_prompts} prompts of {length} tokens do not fit into memory together: "
            f"give {remedy if n_prompts > 1 else 'shorter prompts, or more devices'} ({error})"
        ) from error


def log_probabilities(
    run: RecordedRun, residual: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row vocab"]:
    """What final residuals predict, in float32 or wider.

    Raises:
        FloatingPointError: If logits are NaN or infinite.
    """
    adapter = run.adapter
    scores = adapter.decode(adapter.normalize(residual)).log_softmax(dim=-1)
    if not bool(torch.isfinite(scores.detach().sum())):
        raise FloatingPointError(
            f"logits of {adapter.name} are NaN or infinite; load the model in float32"
        )
    return scores
