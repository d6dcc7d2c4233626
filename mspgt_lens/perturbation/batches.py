"""Prompts in batches, with the positions that are changed and measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64
from torch import Tensor

from mspgt_lens.ambient import tell
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.halving import Found, Halving
from mspgt_lens.models import ModelAdapter
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset, check_prompt, stack_rows

# Clean log-probabilities are kept for one batch at a time: a quarter of a gigabyte at most.
_BATCH_ENTRIES = 2**26
_BATCH_TOKENS = 2048


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

    @property
    def n_rows(self) -> int:
        """How many prompts there are."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of each, padding included."""
        return int(self.tokens.shape[1])

    def parts(self, n_tokens: int) -> list[Batch]:
        """The same prompts in batches of at most so many tokens each, or of one prompt."""
        size = max(1, n_tokens // self.tokens.shape[1])
        if size >= len(self.tokens):
            return [self]
        parts, first = [], self.first
        for start in range(0, len(self.tokens), size):
            own = slice(start, start + size)
            length = int(self.mask[own].sum(dim=1).max())
            part = replace(
                self,
                tokens=self.tokens[own, :length],
                mask=self.mask[own, :length],
                valid=self.valid[own, :length],
                next_known=self.next_known[own, :length],
                keys=self.keys[own],
                groups=self.groups[own],
                group_hashes=self.group_hashes[own],
                numbers=self.numbers[own],
                first=first,
            )
            parts.append(part)
            first += int(part.valid.sum())
        return parts


@dataclass(frozen=True)
class Batches:
    """A data set in batches.

    Attributes:
        batches: All of them.
        groups: Label of every group, in the order of appearance.
        n_positions: Valid positions in all.
        fingerprint: Hash of all prompts, whatever their order.
        batch_size: Prompts per batch, where somebody chose it; None lets batches be halved.
    """

    batches: tuple[Batch, ...]
    groups: tuple[Hashable, ...]
    n_positions: int
    fingerprint: str
    batch_size: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def n_prompts(self) -> int:
        """Prompts in all."""
        return sum(batch.n_rows for batch in self.batches)

    def each(self, run: Callable[[Batch], Found], bar: Any = None) -> Iterator[Found]:
        """What is found in every batch, halved from where memory runs out on.

        Args:
            run: From a batch to what is found in it. It may be stopped anywhere, and its batch come
                again in parts: it must keep nothing beyond what it returns.
            bar: The progress bar that it moves on, by as much for the parts of a batch as for the
                whole; what a batch did before memory ran out is taken back.

        Raises:
            RuntimeError: Torch's own, if a batch does not fit into memory and cannot be halved.
        """
        halving = Halving(self.batch_size, can_choose=True, bar=bar)
        for batch in self.batches:
            yield from halving.each(batch, run)


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
    return Batches(tuple(batches), tuple(labels), first, f"{total:016x}", batch_size)


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
