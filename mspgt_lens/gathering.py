"""Gathering moments while the forward pass runs: batches, hooks, and what they reduce to.

Nothing per token outlives its batch but a fixed number of sampled positions, so memory does not
grow with the number of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import (
    ModelAdapter,
    Part,
    PatternBlocks,
    in_float64,
    own_attention,
    unembedding_rows,
)
from mspgt_lens.moments import (
    SAMPLE_CAPACITY,
    MomentPlan,
    Moments,
    Reference,
    Sample,
    merge_samples,
)
from mspgt_lens.products import product
from mspgt_lens.prompts import Prompt, stack_rows
from mspgt_lens.signals import SignalSums
from mspgt_lens.targets import BatchTargets, batch_targets, masked_targets

# Share of an encoder's ordinary tokens that are hidden from it, as in its training.
HIDDEN_SHARE = 0.15
# A head whose non-sink keys share less than this carries no distribution that float32 resolves.
MIN_KEY_MASS = 1e-6
# Few enough that an attention pattern's intermediate results stay in the processor's cache.
_QUERIES_AT_ONCE = 32
_GRAM_BLOCKS = 4
# Of one block's attention patterns in a batch: a gigabyte in float32.
_PATTERN_ENTRIES = 2**28


@dataclass(frozen=True)
class FoldBatch:
    """Prompts of one fold, padded on the right."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    groups: UInt[np.ndarray, " prompt"]
    fold: int
    numbers: tuple[int, ...]


def make_batch(prompts: Sequence[Prompt], fold: int, numbers: Sequence[int]) -> FoldBatch:
    """One batch; ``numbers`` tell errors which prompts of the data set these are."""
    tokens, mask = stack_rows([prompt.tokens for prompt in prompts])
    groups = np.array([stable_hash(prompt.group) for prompt in prompts], dtype=np.uint64)
    return FoldBatch(tokens, mask, groups, fold, tuple(numbers))


@dataclass(frozen=True)
class BatchPlan:
    """Which prompts make up a batch; ``numbers`` are theirs in the data set."""

    prompts: tuple[Prompt, ...]
    fold: int
    numbers: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    @property
    def length(self) -> int:
        """Tokens of each, padding included."""
        return max(len(prompt.tokens) for prompt in self.prompts)

    @property
    def n_padded(self) -> int:
        """Tokens, padding included."""
        return self.n_rows * self.length

    def batch(self) -> FoldBatch:
        """The batch itself."""
        return make_batch(self.prompts, self.fold, self.numbers)

    def parts(self, n_tokens: int) -> list[BatchPlan]:
        """The same prompts in batches of at most so many tokens each, or of one prompt.

        They are those that a ``batch_size`` of as many prompts would give.
        """
        size = max(1, n_tokens // self.length)
        return [
            BatchPlan(self.prompts[start:stop], self.fold, self.numbers[start:stop])
            for stop in range(len(self.prompts), 0, -size)
            for start in [max(0, stop - size)]
        ]


def make_batches(
    prompts: Sequence[tuple[Prompt, int]],
    batch_size: int | None,
    tokens_per_batch: int,
    first_number: int = 0,
    n_heads: int = 0,
) -> Iterator[FoldBatch]:
    """The batches of :func:`plan_batches`."""
    for planned in plan_batches(prompts, batch_size, tokens_per_batch, first_number, n_heads):
        yield planned.batch()


def plan_batches(
    prompts: Sequence[tuple[Prompt, int]],
    batch_size: int | None,
    tokens_per_batch: int,
    first_number: int = 0,
    n_heads: int = 0,
) -> Iterator[BatchPlan]:
    """Batches of prompts that belong to one fold each.

    Args:
        prompts: Prompts with their folds.
        batch_size: Prompts per batch; None fills batches up to ``tokens_per_batch``.
        tokens_per_batch: Padded tokens that a batch may hold where ``batch_size`` is None.
        first_number: The number of the first prompt in the data set.
        n_heads: Heads of a block, whose attention patterns grow with the square of the context:
            they too bound a batch where ``batch_size`` is None. 0 where no patterns are made.
    """
    for fold in sorted({fold for _, fold in prompts}):
        # Equal lengths together: little padding, and the same batches in every run.
        rows = [(p, i) for i, (p, f) in enumerate(prompts) if f == fold]
        rows.sort(key=lambda row: len(row[0].tokens))
        while rows:
            length = len(rows[-1][0].tokens)
            size = batch_size or prompts_per_batch(length, tokens_per_batch, n_heads)
            chosen, rows = rows[-size:], rows[:-size]
            numbers = tuple(first_number + i for _, i in chosen)
            yield BatchPlan(tuple(p for p, _ in chosen), fold, numbers)


def prompts_per_batch(length: int, tokens_per_batch: int, n_heads: int) -> int:
    """Prompts of a length that a batch is filled up with; the arguments of :func:`plan_batches`."""
    attended = max(1, n_heads * length**2)
    return max(1, min(tokens_per_batch // length, _PATTERN_ENTRIES // attended))


def add_batch(moments: Moments, adapter: ModelAdapter, batch: FoldBatch) -> None:
    """Run one batch through the model and add its moments.

    Args:
        moments: Where to add; untouched if anything fails before the pass has ended.
        adapter: The model.
        batch: Prompts of one fold.

    Raises:
        FloatingPointError: If an activation is NaN or infinite; names the site and the prompt.
    """
    reader = begin_batch(moments, adapter, batch)
    reader.run()
    finish_batch(moments, adapter, reader)


def begin_batch(moments: Moments, adapter: ModelAdapter, batch: FoldBatch) -> BatchReader:
    """What takes in the activations of one batch, site by site, whoever runs the model."""
    reader = BatchReader(moments.plan, adapter, batch, moments.reference)
    reader.choose_sample(moments.sample)
    return reader


def finish_batch(moments: Moments, adapter: ModelAdapter, reader: BatchReader) -> None:
    """Add what a reader has taken in of a whole pass."""
    if reader.n_valid:
        if moments.reference is None:
            moments.reference = make_reference(reader)
        _reduce(moments, moments.reference, reader)
    _count(moments, adapter, reader.batch)


def calibrate(plan: MomentPlan, adapter: ModelAdapter, batch: FoldBatch) -> Reference:
    """The reference that one batch gives; the same for however the others are batched.

    Raises:
        ValueError: If the batch has no valid position.
    """
    reader = BatchReader(replace(plan, signals=()), adapter, batch, None)
    if not reader.n_valid:
        raise CannotMeasure(
            "the first prompts have no valid position to calibrate on: they are shorter than "
            f"skip_first ({plan.skip_first}) or hold special tokens only"
        )
    with own_attention(adapter):
        reader.run()
    return make_reference(reader)


class BatchReader:
    """Takes what is needed out of one forward pass: valid rows of each site, attention sums."""

    def __init__(
        self,
        plan: MomentPlan,
        adapter: ModelAdapter,
        batch: FoldBatch,
        reference: Reference | None,
    ) -> None:
        self.plan, self.adapter, self.batch, self.reference = plan, adapter, batch, reference
        self.tokens, self.targets = _inputs_and_targets(plan, adapter, batch)
        rest = self.targets.valid & ~self.targets.read
        # Rows in one order everywhere: first those that are read, then the rest.
        self.index = torch.cat([torch.nonzero(self.targets.read), torch.nonzero(rest)])
        self.n_read, self.n_valid = int(self.targets.read.sum()), len(self.index)
        self._places: dict[torch.device, _Places] = {}
        self._references: dict[torch.device, Reference] = {}
        self.rows: list[Tensor] = []
        self.sampled: list[Tensor] = []
        self.chosen = np.zeros(0, dtype=np.int64)
        self.priority = np.zeros(0, dtype=np.uint64)
        self.previous: tuple[Tensor, Tensor] | None = None
        self.span, self.entropy, self.n_attended, self.update = np.zeros((4, adapter.n_layers))
        self.signals = SignalSums(
            list(plan.per_row.values()),
            n_layers=adapter.n_layers,
            mask=batch.mask,
            index=self.index,
            numbers=batch.numbers,
            parallel=plan.needs_updates and adapter.parallel,
            eps=torch.finfo(adapter.dtype).eps,
        )

    def at(self, device: torch.device) -> _Places:
        """Where what is read is, on the device of an activation: there may be several."""
        if device not in self._places:
            special = torch.tensor(sorted(self.adapter.special_ids), dtype=torch.long)
            tokens, mask = self.batch.tokens, self.batch.mask
            prompt, position = self.index.unbind(dim=1)
            places = (
                prompt,
                position,
                prompt * tokens.shape[1] + position,
                self.targets.valid,
                mask & ~torch.isin(tokens, special),
            )
            self._places[device] = _Places(*(place.to(device) for place in places))
        return self._places[device]

    def reference_at(self, device: torch.device) -> Reference | None:
        """The reference on the device of an activation."""
        if self.reference is not None and device not in self._references:
            self._references[device] = self.reference.to(device)
        return self._references.get(device)

    def choose_sample(self, so_far: Sample) -> None:
        """Choose the rows whose priority can still enter the sample."""
        # Priorities depend on the prompt and the seed alone, never on the batches or their order.
        batch = self.batch
        priority = np.zeros(batch.tokens.shape, dtype=np.uint64)
        for index, (row, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
            draw = np.random.default_rng(stable_hash(row[mask].numpy().tobytes(), self.plan.seed))
            priority[index] = draw.integers(2**64, size=len(row), dtype=np.uint64)
        prompt, position = self.index.numpy().T
        candidate = priority[prompt, position]
        usable = self.targets.answered.numpy()[prompt, position]
        if len(so_far.priority) == SAMPLE_CAPACITY:
            # Equal priorities are the same prompt's again, and its group decides.
            usable &= candidate <= so_far.priority.max()
        chosen = np.flatnonzero(usable)
        order = np.lexsort((batch.groups[prompt[chosen]], candidate[chosen]))
        self.chosen = chosen[order][:SAMPLE_CAPACITY]
        self.priority = candidate[self.chosen]

    def run(self, blocks: PatternBlocks | None = None) -> None:
        """Take everything from the model.

        Args:
            blocks: How to run it where its patterns come a few queries at a time.
        """
        if not self.n_valid:
            return
        prompts = self.tokens, self.batch.mask
        on_part = self.on_part if self.plan.needs_updates else None
        if blocks is not None:
            blocks.run(*prompts, self.on_site, self.on_pattern, on_part)
        else:
            on_pattern = self.on_pattern if self.plan.needs_patterns else None
            self.adapter.run(*prompts, self.on_site, on_pattern, on_part)

    def sample(self, values: Float[Tensor, "read column"]) -> Sample:
        """The chosen rows, once they are read, with their targets."""
        prompt, position = self.index.numpy()[self.chosen].T
        read = self.chosen < self.n_read
        targets = np.zeros((len(self.chosen), values.shape[1]), dtype=np.float32)
        targets[read] = values[torch.from_numpy(self.chosen[read])].numpy()
        return Sample(
            priority=self.priority,
            rows=tuple(torch.stack(self.sampled, dim=1)),
            next_token=self.targets.answers.numpy()[prompt, position],
            single=self.targets.single.numpy()[prompt, position],
            read=read,
            targets=targets,
            fold=np.full(len(self.chosen), self.batch.fold),
            group=self.batch.groups[prompt],
        )

    def on_site(self, site: int, residual: Float[Tensor, "prompt pos d_model"]) -> None:
        """Take the valid rows of one site; sites come in order."""
        if not self.n_valid:
            return
        places = self.at(residual.device)
        raw = _at_least_float32(residual.detach().flatten(0, 1).index_select(0, places.flat))
        length = raw.norm(dim=1)
        if not bool(torch.isfinite(length.sum())):
            bad = int(places.prompt[~torch.isfinite(length)][0])
            raise FloatingPointError(
                f"activations at site {site} are NaN or infinite, first in prompt "
                f"{self.batch.numbers[bad]}; load the model in float32 or leave it out"
            )
        if self.previous is not None:
            before, length_before = (there.to(raw.device) for there in self.previous)
            change = (raw - before).norm(dim=1) / length_before
            self.update[site - 1] = float(in_float64(change).sum())
        self.signals.on_site(site, residual, raw)
        self.previous = raw, length
        rows = self.adapter.normalize(raw)
        self.sampled.append(rows[torch.from_numpy(self.chosen).to(rows.device)].cpu())
        if site == self.adapter.n_layers:
            self.final = rows
        # Wide rows are projected at once: keeping them all would cost gigabytes.
        reference = self.reference_at(rows.device)
        self.rows.append(rows if reference is None else reference.apply(site, rows))

    def on_part(self, block: int, part: Part, update: Float[Tensor, "prompt pos d_model"]) -> None:
        """Take what a part of one block adds; before the site after it."""
        if self.n_valid:
            self.signals.on_part(block, part, update)

    def on_pattern(
        self, block: int, pattern: Float[Tensor, "prompt head query key"], first: int = 0
    ) -> None:
        """Add the span and the entropy of queries of one block; before the site after it.

        Args:
            block: The block.
            pattern: What they attend to. Where the model is causal, keys after the last query may
                be left out.
            first: The place of the first of them. All queries come at once where a signal reads
                whole patterns.
        """
        if not self.n_valid:
            return
        pattern = pattern.detach()
        queries = slice(first, first + pattern.shape[2])
        places = self.at(pattern.device)
        self.signals.on_pattern(block, pattern)
        if not self.plan.needs_spans:
            return
        n_keys = self.tokens.shape[1]
        keys = torch.arange(n_keys, device=pattern.device, dtype=torch.float32)
        keys = keys.to(_at_least_float32(pattern[:0]).dtype)
        apart = (keys[queries, None] - keys).abs() if self.plan.masked else None
        parts = []
        for start in range(0, pattern.shape[2], _QUERIES_AT_ONCE):
            at = slice(start, min(start + _QUERIES_AT_ONCE, pattern.shape[2]))
            # Where the model is causal, a query attends to no later key.
            reach = n_keys if self.plan.masked else first + at.stop
            rows = _at_least_float32(pattern[:, :, at, :reach])
            if self.plan.masked:
                # Separators draw attention that is not needed elsewhere, as a first key does.
                rows = rows * places.ordinary[:, None, None, :]
            parts.append(_sums_over_keys(rows, keys[:reach] if apart is None else apart[at]))
        mass, weighted, surprise = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        counted = places.valid[:, None, queries] & (mass > MIN_KEY_MASS)
        # The keys' shares are renormalized to one.
        mass = torch.where(counted, mass, 1.0)
        distance = weighted / mass if self.plan.masked else keys[queries] - weighted / mass
        entropy = surprise / mass + torch.log(mass)
        self.span[block] += float(in_float64(distance[counted]).sum())
        self.entropy[block] += float(in_float64(entropy[counted]).sum())
        self.n_attended[block] += int(counted.sum())


class _Places(NamedTuple):
    """Where the rows of one batch that are read are, on one device."""

    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    flat: Int[Tensor, " row"]
    valid: Bool[Tensor, "prompt pos"]
    ordinary: Bool[Tensor, "prompt pos"]


def _at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it comes so."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sums_over_keys(
    pattern: Float[Tensor, "prompt head query key"], along: Float[Tensor, "*query key"]
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum p``, ``sum p * along`` and ``-sum p log p`` of all keys but the first, the sink.

    Args:
        pattern: Attention patterns.
        along: One value per key, the same for every query or not.

    Returns:
        Three tensors of shape ``[prompt, head, query]``.
    """
    sink = pattern[..., 0]
    if along.ndim == 1:
        moments = pattern @ torch.stack([torch.ones_like(along), along], dim=1)
        mass, weighted = moments.unbind(dim=-1)
    else:
        mass = pattern.sum(dim=-1)
        weighted = torch.einsum("p h q k, q k -> p h q", pattern, along)
    # A key of weight 0 adds 0.
    log_share = pattern.clamp(min=torch.finfo(pattern.dtype).tiny).log_()
    surprise = log_share[..., 0] * sink - torch.linalg.vecdot(log_share, pattern)
    return mass - sink, weighted - sink * along[..., 0], surprise


def _inputs_and_targets(
    plan: MomentPlan, adapter: ModelAdapter, batch: FoldBatch
) -> tuple[Int[Tensor, "prompt pos"], BatchTargets]:
    """What the model is given of a batch, and what is read of it."""
    special = torch.tensor(sorted(adapter.special_ids), dtype=torch.long)
    settings: dict[str, Any] = {
        "features": plan.features,
        "special": special,
        "bands": plan.bands,
        "skip_first": plan.skip_first,
    }
    if adapter.mask_id is None:
        return batch.tokens, batch_targets(batch.tokens, batch.mask, **settings)
    hidden = torch.zeros_like(batch.mask)
    for index, (row, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
        ordinary = torch.nonzero(mask & ~torch.isin(row, special))[:, 0].numpy()
        places = ordinary[ordinary >= plan.skip_first]
        # The prompt itself decides, whatever else is in its batch.
        draw = np.random.default_rng(stable_hash(row[mask].numpy().tobytes(), plan.seed, "hidden"))
        count = round(HIDDEN_SHARE * len(places))
        hidden[index, torch.from_numpy(draw.permutation(places)[:count])] = True
    targets = masked_targets(batch.tokens, batch.mask, hidden, **settings)
    return torch.where(hidden, adapter.mask_id, batch.tokens), targets


def _reduce(moments: Moments, reference: Reference, reader: BatchReader) -> None:
    fold, n_read = reader.batch.fold, reader.n_read
    final = reader.final - reference.center[-1].to(reader.final.device)
    values = _with_predictions(moments.plan, reference, reader, final).to(final.dtype)
    if moments.plan.masked:
        # Hidden tokens are decoded from where they are hidden, so the lens learns from there.
        final = final[:n_read]
    before: Tensor | None = None
    # Products are made where a site's rows are, and go to the sums.
    there: dict[torch.device, tuple[Tensor, Tensor]] = {}
    for site, rows in enumerate(reader.rows):
        # The first batch was read before there was a reference.
        z = reference.to(rows.device).apply(site, rows) if reader.reference is None else rows
        if z.device not in there:
            there[z.device] = values.to(z.device), final.to(z.device)
        targets, last = there[z.device]
        read, rest = z[:n_read], z[n_read:]
        _add(moments.zz_read[fold, site], _gram(read))
        _add(moments.zz_rest[fold, site], _gram(rest))
        _add(moments.z_read[fold, site], read.sum(dim=0))
        _add(moments.z_rest[fold, site], rest.sum(dim=0))
        _add(moments.zy[fold, site], product(read.T, targets))
        _add(moments.z_final[fold, site], product(z[: len(last)].T, last))
        if before is not None:
            _add(moments.z_next[fold, site - 1], product(before.to(z.device).T, z))
        before = z
    values, final = values.to(moments.y.device), final.to(moments.y.device)
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
    moments.per_row[fold] += reader.signals.sums
    moments.n_whole[fold] += len(reader.batch.tokens)
    moments.sample = merge_samples(moments.sample, reader.sample(values.cpu()), in_place=True)


def _add(total: Tensor, part: Tensor) -> None:
    total += part.to(total.device)


def _with_predictions(
    plan: MomentPlan,
    reference: Reference,
    reader: BatchReader,
    final: Float[Tensor, "row d_model"],
) -> Float[Tensor, "read column"]:
    """Targets, then the model's own predictions of tokens after the next one, as leading logits.

    They come from where that token is the next. Where that is no valid position, the prediction is
    taken to be the average one.
    """
    values = reader.targets.values
    if not plan.far:
        return values
    assert reference.logit_axes is not None
    columns = [values]
    predicted = (final @ reference.logit_axes.to(final.device)).cpu()
    n_pos = reader.batch.tokens.shape[1]
    row_of = torch.full((reader.batch.tokens.numel(),), -1)
    row_of[reader.at(row_of.device).flat] = torch.arange(reader.n_valid)
    bands = list(plan.bands.values())
    prompt, position = reader.index[: reader.n_read].unbind(dim=1)
    for target in plan.far:
        row = row_of[prompt * n_pos + position + bands[target - len(bands)][0] - 1]
        columns.append(torch.where(row[:, None] >= 0, predicted[row], 0.0).to(values))
    return torch.cat(columns, dim=1)


def _gram(rows: Float[Tensor, "row width"]) -> Float[Tensor, "width width"]:
    """``rows.T @ rows``, no pair of blocks multiplied twice: a third of the work is saved."""
    width = rows.shape[1]
    gram = rows.new_empty(width, width)
    step = -(-width // _GRAM_BLOCKS)
    for start in range(0, width, step):
        block = slice(start, start + step)
        gram[block, start:] = product(rows[:, block].T, rows[:, start:])
        gram[start + step :, block] = gram[block, start + step :].T
    return gram


def _count(moments: Moments, adapter: ModelAdapter, batch: FoldBatch) -> None:
    counts = np.bincount(batch.tokens[batch.mask].numpy(), minlength=adapter.d_vocab)
    counts[sorted(adapter.special_ids)] = 0
    moments.token_counts[batch.fold] += counts
    moments.n_prompts += len(batch.tokens)
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        # A sum: the fingerprint does not depend on the order of prompts.
        moments.fingerprint += stable_hash(row[mask].numpy().tobytes())
    moments.fingerprint %= 2**64


def make_reference(reader: BatchReader) -> Reference:
    """The reference that the rows of one pass give."""
    plan, rows = reader.plan, reader.rows
    device = reader.adapter.device
    center = torch.stack([r.mean(dim=0).to(device) for r in rows])
    d_model = center.shape[1]
    logit_axes, logit_basis = _logit_axes(reader, center[-1]) if plan.far else (None, None)
    if d_model <= plan.width:
        return Reference(center, None, None, logit_axes, logit_basis)
    generator = torch.Generator().manual_seed(plan.seed)
    axes, _ = torch.linalg.qr(torch.randn(d_model, plan.width, generator=generator))
    # Rows in order, as they are read back: products in another layout round differently.
    axes = axes.to(center).contiguous()
    if plan.coordinates == "raw":
        return Reference(center, torch.ones_like(center), axes, logit_axes, logit_basis)
    spread = torch.stack([r.std(dim=0, correction=0).to(device) for r in rows])
    spread = torch.where(spread > 0, spread, 1.0)
    return Reference(center, spread, axes, logit_axes, logit_basis)


def _logit_axes(
    reader: BatchReader, center: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, "d_model feature"], Float[Tensor, "feature d_model"]]:
    """Directions of the final residual in which the logits of frequent tokens vary most.

    Of final residuals f with covariance C and logits U f of tokens with shares p: the leading
    eigenvectors of ``C^1/2 U^T (diag p - p p^T) U C^1/2``, so that what is left out of f moves the
    logits least.
    """
    n_features = reader.plan.features.shape[1]
    tokens, counts = torch.unique(reader.batch.tokens[reader.batch.mask], return_counts=True)
    share = counts.double() / counts.sum()
    rows = unembedding_rows(reader.adapter, tokens).double()
    rows = (rows - share @ rows) * share.sqrt()[:, None]
    centered = (reader.final.to(center.device) - center).cpu().double()
    power, axes = torch.linalg.eigh(centered.T @ centered / len(centered))
    kept = power > 1e-9 * power[-1]
    root, inverse = (axes[:, kept] * power[kept] ** sign for sign in (0.5, -0.5))
    seen = rows @ root
    directions = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)[:, :n_features]
    # Fewer directions than features where the first batch does not span so many.
    missing = n_features - directions.shape[1]
    directions = torch.nn.functional.pad(directions, (0, missing))
    return (inverse @ directions).to(center), (root @ directions).T.to(center).contiguous()
