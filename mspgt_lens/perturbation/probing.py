"""Prompts run clean and under edits, and how far the predictions move, document by document."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.ambient import tell
from mspgt_lens.models import Edit, ModelAdapter, RecordedRun, edited, require_acted
from mspgt_lens.prompts import (
    Prompt,
    PromptDataset,
    as_dataset,
    check_prompt,
    stable_hash,
    stack_rows,
)
from mspgt_lens.results import CannotMeasure
from mspgt_lens.statistics import LEVEL

MEASURES = ("kl", "cross_entropy", "agreement")
# Clean log-probabilities are kept for one batch at a time: a quarter of a gigabyte at most.
_BATCH_ENTRIES = 2**26
_BATCH_TOKENS = 2048
# Rows that fit the cache together.
_ROWS = 8
# From a batch to the edits of one condition.
Condition = Callable[["Batch"], Sequence[Edit]]


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the right.

    Attributes:
        tokens: Token ids.
        mask: True where a token is not padding.
        valid: Positions that are changed and measured: ordinary text beyond ``skip_first``.
        next_known: Valid positions whose next token is ordinary text.
        keys: Seed of each prompt's draws: its tokens decide it, not its place in the data set.
        groups: Index of each prompt's group.
        group_hashes: ``stable_hash`` of each prompt's group.
        numbers: Place of each prompt in the data set.
        first: Number of the batch's first valid position among those of all batches.
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    valid: Bool[Tensor, "prompt pos"]
    next_known: Bool[Tensor, "prompt pos"]
    keys: tuple[int, ...]
    groups: Int[np.ndarray, " prompt"]
    group_hashes: UInt64[np.ndarray, " prompt"]
    numbers: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Batches:
    """A data set in batches.

    Attributes:
        batches: All of them.
        groups: Label of every group, in the order of appearance.
        n_positions: Valid positions in all.
        fingerprint: Hash of all prompts, whatever their order.
    """

    batches: tuple[Batch, ...]
    groups: tuple[Hashable, ...]
    n_positions: int
    fingerprint: str

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def make_batches(
    adapter: ModelAdapter,
    prompts: PromptDataset | Iterable[str],
    *,
    skip_first: int,
    batch_size: int | None,
    min_groups: int = 3,
) -> Batches:
    """Batches of all prompts; equal lengths together. Prompts with nothing to measure are left out.

    Raises:
        ValueError: If a prompt does not fit the model, or fewer than ``min_groups`` groups have a
            position to measure.
    """
    adapter.require_causal("perturbing predictions of the next token")
    adapter.require_every_logit("perturbing predictions of the next token")
    if skip_first < 0:
        raise ValueError(f"skip_first must be 0 or more tokens, got {skip_first}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
    rows = list(as_dataset(prompts, adapter))
    for index, prompt in enumerate(rows):
        check_prompt(adapter, prompt, index)
    numbered = [(i, p) for i, p in enumerate(rows) if _measurable(adapter, p, skip_first)]
    if len(numbered) < len(rows):
        tell(
            f"{len(rows) - len(numbered)} of {len(rows)} prompts were left out: beyond their "
            f"first {skip_first} tokens (skip_first) they hold no position with a next token"
        )
    labels = {
        group: index for index, group in enumerate(dict.fromkeys(p.group for _, p in numbered))
    }
    if len(labels) < min_groups:
        raise CannotMeasure(
            f"prompts need at least {min_groups} groups (documents) with positions to measure, got "
            f"{len(labels)}: give more documents, or groups= that tell them apart"
        )
    numbered.sort(key=lambda row: -len(row[1].tokens))
    per_batch = max(1, min(_BATCH_TOKENS, _BATCH_ENTRIES // adapter.d_vocab))
    batches, first = [], 0
    while numbered:
        size = batch_size or max(1, per_batch // len(numbered[0][1].tokens))
        batches.append(_batch(adapter, numbered[:size], labels, skip_first, first))
        first += int(batches[-1].valid.sum())
        numbered = numbered[size:]
    total = sum(key for batch in batches for key in batch.keys) % 2**64
    return Batches(tuple(batches), tuple(labels), first, f"{total:016x}")


def respond(
    adapter: ModelAdapter,
    batches: Batches,
    conditions: Sequence[Condition],
    *,
    description: str = "",
    progress: bool = False,
) -> Float[np.ndarray, "condition group measure"]:
    """How far each condition moves the predictions from the clean run, per group.

    Measures, in the order of ``MEASURES``, each a mean over the group's valid positions: KL
    divergence from the clean prediction to the changed one (nats), rise of the next token's
    cross-entropy (nats; where the next token is ordinary text), and share of positions that keep
    their most likely token. All three are exact at no change: 0, 0 and 1.

    Args:
        adapter: The model.
        batches: What to run.
        conditions: Each gives the edits of a batch.
        description: Beside the progress bar.
        progress: Show one.

    Raises:
        FloatingPointError: If logits are NaN or infinite.
        ValueError: If the model's blocks cannot be run one by one.
        RuntimeError: If the model does not compute what is to be changed under its hook.
    """
    sums = np.zeros((len(conditions), len(batches.groups), len(MEASURES)))
    counts = np.zeros((len(batches.groups), len(MEASURES)))
    total = len(batches.batches) * (len(conditions) + 1)
    with adapter.inference(), tqdm(total=total, desc=description, disable=not progress) as bar:
        check_resuming(adapter, batches)
        for batch in batches:
            owner = batch.groups[torch.nonzero(batch.valid)[:, 0].numpy()]
            known = batch.next_known[batch.valid].numpy()
            np.add.at(counts, owner, np.stack([known | True, known, known | True], axis=1))
            clean = CleanRun(adapter, batch)
            bar.update()
            for index, condition in enumerate(conditions):
                changed = clean.changed(condition(batch))
                np.add.at(sums[index], owner, _compare(clean.scores, changed, batch))
                bar.update()
    sums /= counts
    return sums


class CleanRun:
    """One batch run clean; changed runs resume at the first block that is changed.

    Use it inside ``adapter.inference()``, after :func:`check_resuming`.

    Attributes:
        scores: Log-probabilities of the next token at the batch's valid positions.
    """

    def __init__(self, adapter: ModelAdapter, batch: Batch) -> None:
        self.adapter, self.batch = adapter, batch
        self._run = RecordedRun(adapter, batch.tokens, batch.mask)
        self._prompts = torch.arange(len(batch.tokens), device=adapter.device)
        self._valid = batch.valid.to(adapter.device)
        self.scores = self._scores(self._run.residual[-1], "the clean run")

    def changed(self, edits: Sequence[Edit]) -> Float[Tensor, "position vocab"]:
        """Log-probabilities under edits."""
        n_layers = self.adapter.n_layers
        first = min((edit.block for edit in edits), default=n_layers)
        residual = self._run.residual[first]
        with edited(self.adapter, edits) as counts:
            for block in range(first, n_layers):
                residual = self._run.run_block(block, residual, self._prompts, 0)
        require_acted(self.adapter, edits, counts)
        return self._scores(residual, "an edited run")

    def losses(self, scores: Float[Tensor, "position vocab"]) -> Float[np.ndarray, " known"]:
        """Cross-entropy of the next token at the ``next_known`` positions, in nats."""
        target = self.batch.tokens.roll(-1, dims=1)[self.batch.valid].to(scores.device)
        known = self.batch.next_known[self.batch.valid].to(scores.device)
        losses: np.ndarray = -scores.gather(1, target[:, None])[known, 0].double().cpu().numpy()
        return losses

    def _scores(
        self, residual: Float[Tensor, "prompt pos d_model"], what: str
    ) -> Float[Tensor, "position vocab"]:
        scores = self.adapter.decode(self.adapter.normalize(residual[self._valid]))
        for rows in torch.split(scores, _ROWS):
            rows -= rows.logsumexp(dim=1, keepdim=True)
            if not bool(torch.isfinite(rows.sum())):
                raise FloatingPointError(
                    f"logits of {what} of {self.adapter.name} are NaN or infinite; load the model "
                    "in float32, or change it less"
                )
        return scores


def check_resuming(adapter: ModelAdapter, batches: Batches) -> None:
    """Prove on a short prompt that blocks and logits called one by one are the model's own.

    Raises:
        ValueError: If they are not.
    """
    batch = batches.batches[0]
    tokens, mask = batch.tokens[:1, :16], batch.mask[:1, :16]
    RecordedRun(adapter, tokens, mask).prepare()
    adapter.check_decoding(tokens[0])


def mean_interval(
    by_group: Float[np.ndarray, " group *point"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over groups, which count alike, with a 95% t interval: ``(mean, low, high)``."""
    mean = by_group.mean(axis=0)
    n_groups = len(by_group)
    error = by_group.std(axis=0, ddof=1) / np.sqrt(n_groups)
    reach = stats.t.ppf(0.5 + LEVEL / 2, n_groups - 1) * error
    return mean, mean - reach, mean + reach


def _measurable(adapter: ModelAdapter, prompt: Prompt, skip_first: int) -> bool:
    """Whether a prompt has a valid position whose next token is ordinary text."""
    ordinary = ~np.isin(prompt.tokens, sorted(adapter.special_ids))
    return bool((ordinary[skip_first:-1] & ordinary[skip_first + 1 :]).any())


def _batch(
    adapter: ModelAdapter,
    numbered: Sequence[tuple[int, Prompt]],
    labels: Mapping[Hashable, int],
    skip_first: int,
    first: int,
) -> Batch:
    prompts = [prompt for _, prompt in numbered]
    tokens, mask = stack_rows([prompt.tokens for prompt in prompts])
    special = torch.tensor(sorted(adapter.special_ids), dtype=torch.long)
    ordinary = mask & ~torch.isin(tokens, special)
    valid = ordinary & (torch.arange(tokens.shape[1]) >= skip_first)
    return Batch(
        tokens=tokens,
        mask=mask,
        valid=valid,
        next_known=valid & torch.nn.functional.pad(ordinary[:, 1:], (0, 1)),
        keys=tuple(stable_hash(prompt.tokens.tobytes()) for prompt in prompts),
        groups=np.array([labels[prompt.group] for prompt in prompts]),
        group_hashes=np.array([stable_hash(prompt.group) for prompt in prompts], dtype=np.uint64),
        numbers=tuple(number for number, _ in numbered),
        first=first,
    )


def _compare(
    clean: Float[Tensor, "position vocab"], changed: Float[Tensor, "position vocab"], batch: Batch
) -> Float[np.ndarray, "position measure"]:
    target = batch.tokens.roll(-1, dims=1)[batch.valid].to(clean.device)[:, None]
    known = batch.next_known[batch.valid].to(clean.device)
    rise = (clean.gather(1, target) - changed.gather(1, target))[:, 0]
    divergence, kept = [], []
    for p, q in zip(torch.split(clean, _ROWS), torch.split(changed, _ROWS), strict=True):
        # Every term q - p - p log(q / p) is at least 0, and its parts do not cancel where both are
        # nearly the same, so that small divergences keep their digits.
        share, change = p.exp(), q - p
        grown = torch.where(change < 1.0, share * torch.expm1(change), q.exp() - share)
        divergence.append((grown - share * change).sum(dim=1))
        kept.append(p.argmax(dim=1) == q.argmax(dim=1))
    columns = (torch.cat(divergence), torch.where(known, rise, 0.0), torch.cat(kept))
    table: np.ndarray = torch.stack([c.double() for c in columns], dim=1).cpu().numpy()
    return table
