"""Second moments of every site per fold of groups; the moments of several shards add up."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt
from torch import Tensor

from mspgt_lens.models import ModelAdapter, has_float64
from mspgt_lens.processes import Processes
from mspgt_lens.signals import SIGNALS, Signal
from mspgt_lens.targets import far_targets, single_targets, token_features

Coordinates = Literal["standardized", "raw"]

# Residuals up to this width are kept whole; wider ones are projected to so many directions, which
# keeps 33 sites of width 4,096 under 6 GB.
MAX_WIDTH = 1024
PROJECTED_WIDTH = 768
N_FEATURES = 32
SAMPLE_CAPACITY = 1024
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class MomentPlan:
    """What is gathered, fixed before the pass.

    Attributes:
        bands: Scale name to offsets.
        n_folds: Folds of groups.
        skip_first: Tokens at a prompt's beginning that are left out.
        seed: Seed of the folds, the projection and the sampled positions.
        width: Directions kept of each site; where the residual is wider, it is projected.
        coordinates: Whether wide residuals are standardized before they are projected.
        features: Features of every token, shape ``[vocab, feature]``.
        masked: Whether the model predicts hidden tokens, not the next one: then only hidden
            positions are read, and the lens is fitted on them alone.
        signals: The signals of blocks.
    """

    bands: Mapping[str, tuple[int, int]]
    n_folds: int
    skip_first: int
    seed: int
    width: int
    coordinates: Coordinates
    features: Float[Tensor, "vocab feature"]
    masked: bool = False
    signals: tuple[Signal, ...] = tuple(SIGNALS.values())

    @property
    def needs_patterns(self) -> bool:
        """Whether a signal is computed from attention patterns."""
        return any(signal.needs_patterns for signal in self.signals)

    @property
    def needs_spans(self) -> bool:
        """Whether a signal is computed from the sums over attention patterns."""
        return any(signal.needs_spans for signal in self.signals)

    @property
    def needs_updates(self) -> bool:
        """Whether a signal is computed from what attention and MLP add."""
        return any(signal.updates for signal in self.signals)

    @property
    def per_row(self) -> dict[str, Signal]:
        """Signals that are means of a function of rows or of whole prompts, by name."""
        return {signal.name: signal for signal in self.signals if callable(signal.of)}

    @property
    def far(self) -> list[int]:
        """Targets for which the model's own later prediction of the token is read too.

        It says more than the token's features: it is no draw. A model that reads in both directions
        predicts nothing later.
        """
        return [] if self.masked else far_targets(self.bands)

    @property
    def n_columns(self) -> int:
        """Target columns: past and future of every band, then later predictions."""
        return (2 * len(self.bands) + len(self.far)) * self.features.shape[1]


@dataclass(frozen=True)
class Reference:
    """The origin and axes in which moments are gathered, one row per site.

    Moments are sums about ``center``, a rough mean from the first batch, so that a large mean costs
    no digits. Where the residual is wider than the plan's ``width``, each coordinate is divided by
    ``spread`` and the vector projected on the orthonormal columns of ``axes``.

    Where tokens after the next one are read, a final residual less its center is, as far as logits
    of frequent tokens depend on it, ``(final @ logit_axes) @ logit_basis``.
    """

    center: Float[Tensor, "site d_model"]
    spread: Float[Tensor, "site d_model"] | None
    axes: Float[Tensor, "d_model width"] | None
    logit_axes: Float[Tensor, "d_model feature"] | None = None
    logit_basis: Float[Tensor, "feature d_model"] | None = None

    def to(self, device: torch.device) -> Reference:
        """The same reference on a device."""
        moved: dict[str, Any] = {
            name: x if x is None else x.to(device) for name, x in vars(self).items()
        }
        return Reference(**moved)

    def apply(self, site: int, normalized: Float[Tensor, "row d_model"]) -> Tensor:
        """Rows in this reference's coordinates and on its device, shape ``[row, width]``."""
        rows = normalized - self.center[site]
        if self.axes is None or self.spread is None:
            return rows
        return (rows / self.spread[site]) @ self.axes

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What there is of it, by name."""
        return {name: x.numpy(force=True) for name, x in vars(self).items() if x is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: torch.device) -> Reference:
        """What :meth:`to_arrays` gave, on a device."""
        parts: dict[str, Any] = dict.fromkeys(item.name for item in fields(cls))
        for name, array in arrays.items():
            parts[name] = torch.from_numpy(array.copy()).to(device)
        return cls(**parts)


@dataclass(frozen=True)
class Sample:
    """A fixed number of positions, drawn evenly from all valid ones with a known answer.

    Attributes:
        priority: Positions with the lowest priorities are kept, so samples merge.
        rows: Normalized residual at every site, one tensor per position.
        next_token: The token to be predicted (the hidden one where tokens are masked).
        single: The tokens that targets of one offset are, as in
            :class:`~mspgt_lens.targets.BatchTargets`; -1 where there is none.
        read: Whether every target is defined there.
        targets: All targets, shape ``[position, column]``; zeros where not ``read``.
        fold: The fold of each position's group.
        group: A hash of each position's group.
    """

    priority: UInt[np.ndarray, " position"]
    rows: tuple[Float[Tensor, "site d_model"], ...]
    next_token: Int[np.ndarray, " position"]
    single: Int[np.ndarray, "position target side"]
    read: Bool[np.ndarray, " position"]
    targets: Float[np.ndarray, "position column"]
    fold: Int[np.ndarray, " position"]
    group: UInt[np.ndarray, " position"]


class Moments:
    """Sums per fold; those of another shard of the same plan and reference can be added.

    Whatever is a tensor or an array here is a sum: shards are added, written down and read back by
    that rule alone.

    Shapes use K folds, S = L + 1 sites, width w, C target columns. ``read`` positions are those at
    which every target is defined; ``rest`` are the other valid ones. Cross-moments with the next
    site and with the final residual run over all valid positions.
    """

    def __init__(self, plan: MomentPlan, adapter: ModelAdapter) -> None:
        self.plan, self._device = plan, adapter.device
        n_folds, n_sites = plan.n_folds, adapter.n_layers + 1
        d_model, n_layers = adapter.d_model, adapter.n_layers
        width = plan.width
        columns = plan.n_columns
        device = adapter.device if has_float64(adapter.device) else torch.device("cpu")

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.reference: Reference | None = None
        self.zz_read = zeros(n_folds, n_sites, width, width)
        self.zz_rest = zeros(n_folds, n_sites, width, width)
        self.z_read = zeros(n_folds, n_sites, width)
        self.z_rest = zeros(n_folds, n_sites, width)
        self.zy = zeros(n_folds, n_sites, width, columns)
        self.y = zeros(n_folds, columns)
        self.yy = zeros(n_folds, columns, columns)
        # These two feed a regularized map and a ratio of norms: float32 sums about the center do.
        dtype = torch.promote_types(adapter.dtype, torch.float32)
        self.z_next = zeros(n_folds, n_layers, width, width, dtype=dtype)
        self.z_final = zeros(n_folds, n_sites, width, d_model, dtype=dtype)
        self.final = zeros(n_folds, d_model)
        self.final_square = zeros(n_folds, d_model)
        self.n_read = np.zeros(n_folds, dtype=np.int64)
        self.n_rest = np.zeros(n_folds, dtype=np.int64)
        self.token_counts = np.zeros((n_folds, adapter.d_vocab), dtype=np.int64)
        self.span = np.zeros((n_folds, n_layers))
        self.entropy = np.zeros((n_folds, n_layers))
        self.n_attended = np.zeros((n_folds, n_layers))
        self.update = np.zeros((n_folds, n_layers))
        self.per_row = np.zeros((n_folds, len(plan.per_row), n_sites))
        self.n_whole = np.zeros(n_folds, dtype=np.int64)
        self.sample = Sample(
            priority=np.zeros(0, dtype=np.uint64),
            rows=(),
            next_token=np.zeros(0, dtype=np.int64),
            single=np.zeros((0, len(single_targets(plan.bands)), 1 + plan.masked), dtype=np.int64),
            read=np.zeros(0, dtype=bool),
            targets=np.zeros((0, columns), dtype=np.float32),
            fold=np.zeros(0, dtype=np.int64),
            group=np.zeros(0, dtype=np.uint64),
        )
        self.n_prompts = 0
        self.fingerprint = 0

    def on_cpu(self) -> Moments:
        """The same moments in the CPU's memory: reading them takes float64 and many small steps."""
        moved = copy.copy(self)
        cpu = torch.device("cpu")
        for name, value in vars(self).items():
            if isinstance(value, Tensor | Reference):
                setattr(moved, name, value.to(cpu))
        return moved

    @property
    def n_valid(self) -> Int[np.ndarray, " fold"]:
        """Valid positions per fold."""
        return self.n_read + self.n_rest

    def sums(self) -> dict[str, Tensor | np.ndarray]:
        """Every sum, by name."""
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, Tensor | np.ndarray)
        }

    def merge_(self, other: Moments) -> None:
        """Add another shard, in place.

        Raises:
            ValueError: If it was gathered by another plan or about another reference.
        """
        if not (_equal(self.plan, other.plan) and _equal(self.reference, other.reference)):
            raise ValueError(
                "moments add up only for one plan and one reference: gather every shard with "
                "the plan and the reference of the first"
            )
        for name, value in self.sums().items():
            value += getattr(other, name)
        self.sample = merge_samples(self.sample, other.sample, in_place=True)
        self.n_prompts += other.n_prompts
        self.fingerprint = (self.fingerprint + other.fingerprint) % 2**64

    def merge_over_(self, processes: Processes) -> None:
        """Add the shards of all processes, in place: each then has the same moments."""
        shards = [json.loads(x) for x in processes.texts(json.dumps(self._counts()))]
        self.n_prompts = sum(shard["n_prompts"] for shard in shards)
        self.fingerprint = sum(shard["fingerprint"] for shard in shards) % 2**64
        n_sites, d_model = self.z_final.shape[1], self.z_final.shape[3]
        empty = torch.zeros(0, n_sites, d_model, dtype=self.z_final.dtype)
        self.sample = _shared_sample(self.sample, empty, processes)
        for value in self.sums().values():
            processes.sum_(value)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All that was gathered, and :meth:`basis`; without the plan's other settings.

        Sums that are in memory are not copied.
        """
        rows = torch.stack(self.sample.rows) if self.sample.rows else torch.zeros(0, 0, 0)
        parts: dict[str, Mapping[str, Any]] = {
            "sums": self.sums(),
            "counts": {name: np.array(x, dtype=np.uint64) for name, x in self._counts().items()},
            "sample": {**vars(self.sample), "rows": rows},
        }
        named = {
            f"{part}.{k}": value for part, values in parts.items() for k, value in values.items()
        }
        return self.basis() | {
            name: value.numpy(force=True) if isinstance(value, Tensor) else value
            for name, value in named.items()
        }

    def basis(self) -> dict[str, np.ndarray]:
        """What sums of several shards must share: the features, and the reference once there."""
        reference = {} if self.reference is None else self.reference.to_arrays()
        return {
            "plan.features": self.plan.features.numpy(),
            **{f"reference.{name}": value for name, value in reference.items()},
        }

    def take_(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Become what :meth:`to_arrays` gave of moments of the same plan and model."""
        for name, value in self.sums().items():
            if isinstance(value, Tensor):
                value.copy_(torch.from_numpy(arrays[f"sums.{name}"].copy()))
            else:
                value[...] = arrays[f"sums.{name}"]
        for name in self._counts():
            setattr(self, name, int(arrays[f"counts.{name}"]))
        sample: dict[str, Any] = _part(arrays, "sample")
        # Each of its own memory, as merging expects.
        sample["rows"] = tuple(torch.from_numpy(row.copy()) for row in sample["rows"])
        self.sample = Sample(**sample)
        self.adopt(arrays)

    def adopt(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the :meth:`basis` of other moments."""
        features = torch.from_numpy(arrays["plan.features"].copy())
        self.plan = replace(self.plan, features=features)
        reference = _part(arrays, "reference")
        if reference:
            self.reference = Reference.from_arrays(reference, self._device)

    def _counts(self) -> dict[str, int]:
        return {"n_prompts": self.n_prompts, "fingerprint": self.fingerprint}


def plan_moments(
    adapter: ModelAdapter,
    counts: Int[np.ndarray, " vocab"],
    *,
    bands: Mapping[str, tuple[int, int]],
    n_folds: int,
    skip_first: int,
    seed: int,
    max_width: int = MAX_WIDTH,
    coordinates: Coordinates = "standardized",
    signals: Sequence[Signal] = tuple(SIGNALS.values()),
) -> MomentPlan:
    """The plan for one model and data set.

    Args:
        adapter: The model.
        counts: How often each token occurs in the data set as ordinary text.
        bands, n_folds, skip_first, seed, coordinates, signals: See :class:`MomentPlan`.
        max_width: Residuals wider than this are projected.
    """
    return MomentPlan(
        bands=dict(bands),
        n_folds=n_folds,
        skip_first=skip_first,
        seed=seed,
        width=kept_width(adapter.d_model, max_width),
        coordinates=coordinates,
        features=token_features(adapter.embedding(), counts, N_FEATURES).contiguous(),
        masked=adapter.mask_id is not None,
        signals=tuple(signals),
    )


def kept_width(d_model: int, max_width: int = MAX_WIDTH) -> int:
    """Directions that are kept of residuals of a width."""
    return d_model if d_model <= max_width else min(max_width, PROJECTED_WIDTH)


def _equal(first: object, second: object) -> bool:
    """Whether two plans or references hold the same values."""
    if first is None or second is None:
        return first is second

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            # Bands in another order are other columns.
            return list(a.items()) == list(b.items())
        return bool(a == b)

    return all(same(value, vars(second)[name]) for name, value in vars(first).items())


def merge_samples(first: Sample, second: Sample, *, in_place: bool = False) -> Sample:
    """The positions of both with the lowest priorities.

    Rows are the largest arrays that are kept. With ``in_place``, those of ``second`` take the
    memory of those of ``first`` that are left out, and ``first`` must not be used again.
    """
    if not len(second.priority):
        return first
    priority = np.concatenate([first.priority, second.priority])
    keep = _lowest(priority, np.concatenate([first.group, second.group]))
    n_first = len(first.priority)
    left_out = set(range(n_first)).difference(keep.tolist()) if in_place else ()
    free = [first.rows[index] for index in left_out]

    def row(index: int) -> Tensor:
        if index < n_first:
            return first.rows[index] if in_place else first.rows[index].clone()
        new = second.rows[index - n_first]
        return free.pop().copy_(new) if free else new.clone()

    return Sample(
        priority=priority[keep],
        rows=tuple(row(index) for index in keep),
        next_token=np.concatenate([first.next_token, second.next_token])[keep],
        single=np.concatenate([first.single, second.single])[keep],
        read=np.concatenate([first.read, second.read])[keep],
        targets=np.concatenate([first.targets, second.targets])[keep],
        fold=np.concatenate([first.fold, second.fold])[keep],
        group=np.concatenate([first.group, second.group])[keep],
    )


def _lowest(
    priority: UInt[np.ndarray, " position"], group: UInt[np.ndarray, " position"]
) -> Int[np.ndarray, " kept"]:
    """Which positions are kept, in order.

    The same prompt in two groups has the same priorities: the groups decide, not who came first.
    """
    return np.lexsort((group, priority))[:SAMPLE_CAPACITY]


def _shared_sample(
    own: Sample, no_rows: Float[Tensor, "0 site d_model"], processes: Processes
) -> Sample:
    """The positions of all processes with the lowest priorities, in every process."""
    if processes.size == 1:
        return own
    numbers = [int(text) for text in processes.texts(str(len(own.priority)))]
    start = sum(numbers[: processes.rank])
    stop = start + numbers[processes.rank]
    # Each number is one process's alone, so that sums only bring them together.
    keys = np.zeros((2, sum(numbers)), dtype=np.uint64)
    keys[:, start:stop] = own.priority, own.group
    processes.sum_(keys.view(np.int64))
    keep = _lowest(*keys)
    places = np.flatnonzero((keep >= start) & (keep < stop))
    held = keep[places] - start

    def together(values: np.ndarray) -> np.ndarray:
        found = np.zeros((len(keep), *values.shape[1:]), dtype=values.dtype)
        found[places] = values[held]
        processes.sum_(found.view(np.int64) if found.dtype == np.uint64 else found)
        return found

    rows: list[Tensor] = []
    for first in range(0, len(keep), _ROWS_AT_ONCE):
        block = no_rows.new_zeros(min(_ROWS_AT_ONCE, len(keep) - first), *no_rows.shape[1:])
        for place, index in zip(places - first, held, strict=True):
            if 0 <= place < len(block):
                block[place] = own.rows[index]
        processes.sum_(block)
        rows += block.unbind()
    plain = {name: x for name, x in vars(own).items() if name not in ("rows", "read")}
    return Sample(
        **{name: together(values) for name, values in plain.items()},
        read=together(own.read.astype(np.int64)).astype(bool),
        rows=tuple(rows),
    )


def _part(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of one part, by their names in it."""
    return {k[len(name) + 1 :]: x for k, x in arrays.items() if k.startswith(f"{name}.")}
