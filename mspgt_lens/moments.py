"""Second moments of every site, gathered per fold of groups while the forward pass runs.

Nothing per token is kept but a fixed number of sampled positions, so memory does not grow with the
number of prompts, and the moments of several shards add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.models import ModelAdapter
from mspgt_lens.prompts import Prompt, stable_hash, stack_rows
from mspgt_lens.targets import BatchTargets, batch_targets, token_features

Coordinates = Literal["standardized", "raw"]

MAX_RANK = 896
N_FEATURES = 32
SAMPLE_CAPACITY = 1024
LOOKAHEAD = 10_000
# A head whose non-sink keys share less than this carries no distribution that float32 resolves.
MIN_KEY_MASS = 1e-6


@dataclass(frozen=True)
class MomentPlan:
    """What is gathered, fixed before the pass.

    Attributes:
        bands: Scale name to offsets.
        n_folds: Folds of groups.
        skip_first: Tokens at a prompt's beginning that are left out.
        seed: Seed of the folds, the projection and the sampled positions.
        max_rank: Residuals wider than this are projected to so many directions.
        coordinates: Whether wide residuals are standardized before they are projected.
        features: Features of every token, shape ``[vocab, feature]``.
    """

    bands: Mapping[str, tuple[int, int]]
    n_folds: int
    skip_first: int
    seed: int
    max_rank: int
    coordinates: Coordinates
    features: Float[Tensor, "vocab feature"]

    @property
    def n_columns(self) -> int:
        """Target columns: past and future of every band."""
        return 2 * len(self.bands) * self.features.shape[1]


@dataclass(frozen=True)
class Reference:
    """The origin and axes in which moments are gathered, one row per site.

    Moments are sums about ``center``, a rough mean from the first batch, so that a large mean costs
    no digits. Where the residual is wider than ``max_rank``, each coordinate is divided by
    ``spread`` and the vector projected on the orthonormal columns of ``axes``.
    """

    center: Float[Tensor, "site d_model"]
    spread: Float[Tensor, "site d_model"] | None
    axes: Float[Tensor, "d_model width"] | None

    def apply(self, site: int, normalized: Float[Tensor, "row d_model"]) -> Tensor:
        """Rows in this reference's coordinates, shape ``[row, width]``."""
        rows = normalized - self.center[site]
        if self.axes is None or self.spread is None:
            return rows
        return (rows / self.spread[site]) @ self.axes


@dataclass(frozen=True)
class Sample:
    """A fixed number of positions, drawn evenly from all valid ones with a known next token.

    Attributes:
        priority: Positions with the lowest priorities are kept, so samples merge.
        rows: Normalized residual at every site, shape ``[position, site, d_model]``.
        next_token: The token to be predicted.
        fold: The fold of each position's group.
        group: A hash of each position's group.
    """

    priority: Int[np.ndarray, " position"]
    rows: Float[Tensor, "position site d_model"]
    next_token: Int[np.ndarray, " position"]
    fold: Int[np.ndarray, " position"]
    group: Int[np.ndarray, " position"]


class Moments:
    """Sums per fold; add two of the same plan and reference to merge their shards.

    Shapes use K folds, S = L + 1 sites, width w, C target columns. ``read`` positions are those at
    which every target is defined; ``rest`` are the other valid ones. Cross-moments with the next
    site and with the final residual run over all valid positions.
    """

    def __init__(self, plan: MomentPlan, adapter: ModelAdapter) -> None:
        self.plan = plan
        n_folds, n_sites = plan.n_folds, adapter.n_layers + 1
        d_model, n_blocks = adapter.d_model, adapter.n_layers
        width = min(d_model, plan.max_rank)
        columns = plan.n_columns
        # MPS has no float64.
        device = torch.device("cpu") if adapter.device.type == "mps" else adapter.device

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
        self.z_next = zeros(n_folds, n_blocks, width, width, dtype=torch.float32)
        self.z_final = zeros(n_folds, n_sites, width, d_model, dtype=torch.float32)
        self.final = zeros(n_folds, d_model)
        self.final_square = zeros(n_folds, d_model)
        self.n_read = np.zeros(n_folds, dtype=np.int64)
        self.n_rest = np.zeros(n_folds, dtype=np.int64)
        self.token_counts = np.zeros((n_folds, adapter.d_vocab), dtype=np.int64)
        self.span = np.zeros((n_folds, n_blocks))
        self.entropy = np.zeros((n_folds, n_blocks))
        self.n_attended = np.zeros((n_folds, n_blocks))
        self.update = np.zeros((n_folds, n_blocks))
        self.sample = Sample(
            priority=np.zeros(0, dtype=np.uint64),
            rows=torch.zeros(0, n_sites, d_model),
            next_token=np.zeros(0, dtype=np.int64),
            fold=np.zeros(0, dtype=np.int64),
            group=np.zeros(0, dtype=np.uint64),
        )
        self.n_prompts = 0
        self.n_groups = 0
        self.fingerprint = 0

    _SUMS = (
        "zz_read",
        "zz_rest",
        "z_read",
        "z_rest",
        "zy",
        "y",
        "yy",
        "z_next",
        "z_final",
        "final",
        "final_square",
        "n_read",
        "n_rest",
        "token_counts",
        "span",
        "entropy",
        "n_attended",
        "update",
    )

    @property
    def n_valid(self) -> Int[np.ndarray, " fold"]:
        """Valid positions per fold."""
        return self.n_read + self.n_rest

    def __add__(self, other: Moments) -> Moments:
        """The moments of both shards together (their groups are taken to be different).

        Raises:
            ValueError: If the shards were gathered by another plan or about another reference.
        """
        if not (_equal(self.plan, other.plan) and _equal(self.reference, other.reference)):
            raise ValueError(
                "moments add up only for one plan and one reference: gather every shard with "
                "the plan and the reference of the first"
            )
        merged = object.__new__(Moments)
        merged.plan, merged.reference = self.plan, self.reference
        for name in self._SUMS:
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        merged.sample = _merge_samples(self.sample, other.sample)
        merged.n_prompts = self.n_prompts + other.n_prompts
        merged.n_groups = self.n_groups + other.n_groups
        merged.fingerprint = (self.fingerprint + other.fingerprint) % 2**64
        return merged


def plan_moments(
    adapter: ModelAdapter,
    counts: Int[np.ndarray, " vocab"],
    *,
    bands: Mapping[str, tuple[int, int]],
    n_folds: int,
    skip_first: int,
    seed: int,
    max_rank: int = MAX_RANK,
    coordinates: Coordinates = "standardized",
) -> MomentPlan:
    """The plan for one model and data set; ``counts`` are the data set's token counts."""
    return MomentPlan(
        bands=dict(bands),
        n_folds=n_folds,
        skip_first=skip_first,
        seed=seed,
        max_rank=max_rank,
        coordinates=coordinates,
        features=token_features(adapter.embedding(), counts, N_FEATURES),
    )


@dataclass(frozen=True)
class Batch:
    """Prompts of one fold, padded on the right."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    groups: Int[np.ndarray, " prompt"]
    fold: int
    numbers: tuple[int, ...]


def make_batch(prompts: Sequence[Prompt], fold: int, numbers: Sequence[int]) -> Batch:
    """One batch; ``numbers`` tell errors which prompts of the data set these are."""
    tokens, mask = stack_rows([prompt.tokens for prompt in prompts])
    groups = np.array([stable_hash(prompt.group) for prompt in prompts], dtype=np.uint64)
    return Batch(tokens, mask, groups, fold, tuple(numbers))


def make_batches(
    prompts: Sequence[tuple[Prompt, int]],
    batch_size: int | None,
    tokens_per_batch: int,
    first_number: int = 0,
) -> Iterator[Batch]:
    """Batches of prompts that belong to one fold each.

    Args:
        prompts: Prompts with their folds.
        batch_size: Prompts per batch; None fills batches up to ``tokens_per_batch``.
        tokens_per_batch: Padded tokens that a batch may hold where ``batch_size`` is None.
        first_number: The number of the first prompt in the data set.
    """
    for fold in sorted({fold for _, fold in prompts}):
        # Equal lengths together: little padding, and the same batches in every run.
        rows = [(p, i) for i, (p, f) in enumerate(prompts) if f == fold]
        rows.sort(key=lambda row: len(row[0].tokens))
        while rows:
            size = batch_size or max(1, tokens_per_batch // len(rows[-1][0].tokens))
            chosen, rows = rows[-size:], rows[:-size]
            yield make_batch([p for p, _ in chosen], fold, [first_number + i for _, i in chosen])


def add_batch(
    moments: Moments,
    adapter: ModelAdapter,
    batch: Batch,
    source: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> None:
    """Run one batch through the model and add its moments.

    Args:
        moments: Where to add; untouched if anything fails before the pass has ended.
        adapter: The model.
        batch: Prompts of one fold.
        source: Residuals and patterns read from a cache, instead of running the model.

    Raises:
        FloatingPointError: If an activation is NaN or infinite; names the site and the prompt.
    """
    targets, reader = _read(moments.plan, adapter, batch, source)
    if reader.n_valid:
        if moments.reference is None:
            moments.reference = _make_reference(moments.plan, reader.rows)
        _reduce(moments, moments.reference, batch, targets, reader)
    _count(moments, batch)


def calibrate(
    plan: MomentPlan,
    adapter: ModelAdapter,
    batch: Batch,
    source: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Reference:
    """The reference that one batch gives; the same for however the others are batched."""
    return _make_reference(plan, _read(plan, adapter, batch, source)[1].rows)


def _read(
    plan: MomentPlan,
    adapter: ModelAdapter,
    batch: Batch,
    source: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
) -> tuple[BatchTargets, _BatchReader]:
    targets = batch_targets(
        batch.tokens,
        batch.mask,
        features=plan.features,
        special=torch.tensor(sorted(adapter.special_ids), dtype=torch.long),
        bands=plan.bands,
        skip_first=plan.skip_first,
    )
    reader = _BatchReader(adapter, batch, targets)
    if reader.n_valid and source is None:
        adapter.run(batch.tokens, batch.mask, reader.on_site, reader.on_pattern)
    elif reader.n_valid and source is not None:
        for site, residual in enumerate(source[0]):
            reader.on_site(site, residual)
        for block, pattern in enumerate(source[1]):
            reader.on_pattern(block, pattern)
    return targets, reader


class _BatchReader:
    """Takes what is needed out of one forward pass: valid rows of each site, attention sums."""

    def __init__(self, adapter: ModelAdapter, batch: Batch, targets: BatchTargets) -> None:
        self.adapter, self.batch = adapter, batch
        device = adapter.device
        rest = targets.valid & ~targets.read
        # Rows in one order everywhere: first those that are read, then the rest.
        self.index = torch.cat([torch.nonzero(targets.read), torch.nonzero(rest)])
        self.n_read, self.n_valid = int(targets.read.sum()), len(self.index)
        self.prompt, self.position = self.index.to(device).unbind(dim=1)
        self.valid = targets.valid.to(device)
        self.rows: list[Tensor] = []
        self.previous: Tensor | None = None
        n_blocks = adapter.n_layers
        self.span, self.entropy, self.n_attended, self.update = np.zeros((4, n_blocks))

    def on_site(self, site: int, residual: Tensor) -> None:
        raw = residual.detach()[self.prompt, self.position].float()
        rows = self.adapter.normalize(raw)
        if not bool(torch.isfinite(rows.sum())):
            bad = int(self.prompt[~torch.isfinite(rows).all(dim=1)][0])
            raise FloatingPointError(
                f"activations at site {site} are NaN or infinite, first in prompt "
                f"{self.batch.numbers[bad]}; load the model in float32 or leave it out"
            )
        if self.previous is not None:
            change = (raw - self.previous).norm(dim=1) / self.previous.norm(dim=1)
            self.update[site - 1] = float(change.double().sum())
        self.previous = raw
        self.rows.append(rows)

    def on_pattern(self, block: int, pattern: Tensor) -> None:
        pattern = pattern.detach().float()
        keys = torch.arange(pattern.shape[-1], device=pattern.device, dtype=torch.float32)
        # Key 0 is the attention sink; the others are renormalized to one.
        sink = pattern[..., 0]
        mass = pattern.sum(dim=-1) - sink
        counted = self.valid[:, None, :] & (mass > MIN_KEY_MASS)
        mass = torch.where(counted, mass, 1.0)
        attended = (pattern @ keys) / mass
        distance = keys - attended
        surprise = torch.special.entr(pattern).sum(dim=-1) - torch.special.entr(sink)
        entropy = surprise / mass + torch.log(mass)
        self.span[block] = float(distance[counted].double().sum())
        self.entropy[block] = float(entropy[counted].double().sum())
        self.n_attended[block] = int(counted.sum())


def _reduce(
    moments: Moments,
    reference: Reference,
    batch: Batch,
    targets: BatchTargets,
    reader: _BatchReader,
) -> None:
    fold, n_read = batch.fold, reader.n_read
    device = moments.zz_read.device
    values = targets.values.to(device)
    final = (reader.rows[-1] - reference.center[-1]).to(device)
    rows = [reference.apply(site, r).to(device) for site, r in enumerate(reader.rows)]
    for site, z in enumerate(rows):
        read, rest = z[:n_read], z[n_read:]
        moments.zz_read[fold, site] += read.T @ read
        moments.zz_rest[fold, site] += rest.T @ rest
        moments.z_read[fold, site] += read.double().sum(dim=0)
        moments.z_rest[fold, site] += rest.double().sum(dim=0)
        moments.zy[fold, site] += read.T @ values
        moments.z_final[fold, site] += z.T @ final
        if site:
            moments.z_next[fold, site - 1] += rows[site - 1].T @ z
    moments.y[fold] += values.double().sum(dim=0)
    moments.yy[fold] += values.T @ values
    moments.final[fold] += final.double().sum(dim=0)
    moments.final_square[fold] += final.double().pow(2).sum(dim=0)
    moments.n_read[fold] += n_read
    moments.n_rest[fold] += reader.n_valid - n_read
    moments.span[fold] += reader.span
    moments.entropy[fold] += reader.entropy
    moments.n_attended[fold] += reader.n_attended
    moments.update[fold] += reader.update
    moments.sample = _merge_samples(moments.sample, _draw_sample(moments, batch, targets, reader))


def _count(moments: Moments, batch: Batch) -> None:
    tokens = batch.tokens[batch.mask].numpy()
    moments.token_counts[batch.fold] += np.bincount(tokens, minlength=moments.token_counts.shape[1])
    moments.n_prompts += len(batch.tokens)
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        # A sum: the fingerprint does not depend on the order of prompts.
        moments.fingerprint += stable_hash(row[mask].numpy().tobytes())
    moments.fingerprint %= 2**64


def _make_reference(plan: MomentPlan, rows: Sequence[Tensor]) -> Reference:
    center = torch.stack([r.mean(dim=0) for r in rows])
    d_model = center.shape[1]
    if d_model <= plan.max_rank:
        return Reference(center, None, None)
    generator = torch.Generator().manual_seed(plan.seed)
    axes, _ = torch.linalg.qr(torch.randn(d_model, plan.max_rank, generator=generator))
    if plan.coordinates == "raw":
        return Reference(center, torch.ones_like(center), axes.to(center.device))
    spread = torch.stack([r.std(dim=0, correction=0) for r in rows])
    return Reference(center, torch.where(spread > 0, spread, 1.0), axes.to(center.device))


def _equal(first: object, second: object) -> bool:
    """Whether two plans or references hold the same values."""
    if first is None or second is None:
        return first is second

    def same(a: Any, b: Any) -> bool:
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return torch.equal(a, b) if both else bool(a == b)

    return all(same(value, vars(second)[name]) for name, value in vars(first).items())


def _draw_sample(
    moments: Moments,
    batch: Batch,
    targets: BatchTargets,
    reader: _BatchReader,
) -> Sample:
    """The batch's positions whose priority can still enter the sample."""
    # Priorities depend on the prompt and the seed alone, never on the batches or their order.
    priority = np.zeros(batch.tokens.shape, dtype=np.uint64)
    for index, (row, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
        draw = np.random.default_rng(stable_hash(row[mask].numpy().tobytes(), moments.plan.seed))
        priority[index] = draw.integers(2**64, size=len(row), dtype=np.uint64)
    prompt, position = reader.index.numpy().T
    candidate = priority[prompt, position]
    usable = targets.next_known.numpy()[prompt, position]
    if len(moments.sample.priority) == SAMPLE_CAPACITY:
        usable &= candidate < moments.sample.priority.max()
    chosen = np.flatnonzero(usable)
    chosen = chosen[np.argsort(candidate[chosen], kind="stable")][:SAMPLE_CAPACITY]
    pick = torch.from_numpy(chosen).to(reader.rows[0].device)
    return Sample(
        priority=candidate[chosen],
        rows=torch.stack([rows[pick] for rows in reader.rows], dim=1).cpu(),
        next_token=batch.tokens.numpy()[prompt[chosen], position[chosen] + 1],
        fold=np.full(len(chosen), batch.fold),
        group=batch.groups[prompt[chosen]],
    )


def _merge_samples(first: Sample, second: Sample) -> Sample:
    if not len(second.priority):
        return first
    priority = np.concatenate([first.priority, second.priority])
    keep = np.argsort(priority, kind="stable")[:SAMPLE_CAPACITY]
    index = torch.from_numpy(keep)
    return Sample(
        priority=priority[keep],
        rows=torch.cat([first.rows, second.rows])[index],
        next_token=np.concatenate([first.next_token, second.next_token])[keep],
        fold=np.concatenate([first.fold, second.fold])[keep],
        group=np.concatenate([first.group, second.group])[keep],
    )
