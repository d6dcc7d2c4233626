"""Prompts run clean and under edits, and how far the predictions move, document by document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.folds import stable_hash
from mspgt_lens.models import (
    Edit,
    ModelAdapter,
    RecordedRun,
    edited,
    provenance,
    require_acted,
)
from mspgt_lens.perturbation.batches import Batch, Batches
from mspgt_lens.perturbation.residuals import ResidualStatistics
from mspgt_lens.processes import ALONE, Processes

MEASURES = ("kl", "cross_entropy", "agreement")
# Rows that fit the cache together.
_ROWS = 8
# From a batch to the edits of one condition.
Condition = Callable[[Batch], Sequence[Edit]]


def respond(
    adapter: ModelAdapter,
    batches: Batches,
    conditions: Sequence[Condition],
    *,
    description: str = "",
    progress: bool = False,
    processes: Processes = ALONE,
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
        progress: Show one; of several processes, the first does.
        processes: Those that share the conditions: each runs every batch clean, and its own
            conditions of it, so that sums are those of one process to the bit.

    Raises:
        FloatingPointError: If logits are NaN or infinite.
        PeerError: If another process failed.
        ValueError: If the model's blocks cannot be run one by one.
        RuntimeError: If the model does not compute what is to be changed under its hook.
    """
    sums = np.zeros((len(conditions), len(batches.groups), len(MEASURES)))
    counts = np.zeros((len(batches.groups), len(MEASURES)))
    own = range(processes.rank, len(conditions), processes.size)
    total = batches.n_prompts * (len(own) + 1)
    is_shown = progress and processes.rank == 0
    with adapter.inference(), tqdm(total=total, desc=description, disable=not is_shown) as bar:
        check_resuming(adapter, batches)

        def run(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
            found, found_counts = np.zeros_like(sums), np.zeros_like(counts)
            owner = batch.groups[torch.nonzero(batch.valid)[:, 0].numpy()]
            known = batch.next_known[batch.valid].numpy()
            np.add.at(found_counts, owner, np.stack([known | True, known, known | True], axis=1))
            clean = CleanRun(adapter, batch)
            bar.update(batch.n_rows)
            for index in own:
                processes.check()
                changed = clean.changed(conditions[index](batch))
                np.add.at(found[index], owner, _compare(clean.scores, changed, batch))
                bar.update(batch.n_rows)
            return found, found_counts

        for found, found_counts in batches.each(run, bar):
            sums += found
            counts += found_counts
    processes.sum_(sums)
    sums /= counts
    return sums


def agree(
    processes: Processes,
    adapter: ModelAdapter,
    batches: Batches,
    statistics: ResidualStatistics | None,
    arguments: Mapping[str, Any],
) -> None:
    """See that all processes were given the same model, prompts and arguments.

    Args:
        processes: All of them; one alone agrees with itself.
        adapter: The model.
        batches: The prompts.
        statistics: Those that were given, if any.
        arguments: All others that decide the numbers, as JSON would hold them.

    Raises:
        ValueError: If this process was given something else than the first.
    """
    if processes.size == 1:
        return
    rows = [(batch.keys, batch.numbers, batch.group_hashes.tolist()) for batch in batches]
    given = () if statistics is None else vars(statistics).values()
    processes.agree(
        {
            **provenance(adapter),
            "prompts": stable_hash(rows),
            "statistics": stable_hash(*(np.asarray(one).tobytes() for one in given)),
            **arguments,
        }
    )


class CleanRun:
    """One batch run clean; changed runs resume at the first block that is changed.

    Use it inside ``adapter.inference()``, after :func:`check_resuming`.

    Attributes:
        scores: Log-probabilities of the next token at the batch's valid positions.
    """

    def __init__(self, adapter: ModelAdapter, batch: Batch) -> None:
        self.adapter, self.batch = adapter, batch
        self._run = RecordedRun(adapter, batch.tokens, batch.mask)
        self._prompts = torch.arange(len(batch.tokens))
        self._valid = batch.valid
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
        losses: np.ndarray = -scores.gather(1, target[:, None])[known, 0].cpu().double().numpy()
        return losses

    def _scores(
        self, residual: Float[Tensor, "prompt pos d_model"], what: str
    ) -> Float[Tensor, "position vocab"]:
        return log_probabilities(self.adapter, residual[self._valid], what)


def log_probabilities(
    adapter: ModelAdapter, rows: Float[Tensor, "position d_model"], what: str
) -> Float[Tensor, "position vocab"]:
    """Log-probabilities of the next token from rows of the residual stream at the last site.

    Args:
        adapter: The model, in :meth:`ModelAdapter.inference`.
        rows: As the model leaves them, before the final norm.
        what: Which run they are of, for the message.

    Raises:
        FloatingPointError: If a logit is NaN or infinite.
    """
    scores = adapter.decode(adapter.normalize(rows))
    for part in torch.split(scores, _ROWS):
        part -= part.logsumexp(dim=1, keepdim=True)
        if not bool(torch.isfinite(part.sum())):
            raise FloatingPointError(
                f"logits of {what} of {adapter.name} are NaN or infinite; load the model in "
                "float32, or change it less"
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


def divergences(
    clean: Float[Tensor, "position vocab"], changed: Float[Tensor, "position vocab"]
) -> Float[Tensor, " position"]:
    """KL divergence from clean to changed log-probabilities, row by row, in nats.

    Every term ``q - p - p log(q / p)`` is at least 0, and its parts do not cancel where both are
    nearly the same, so that small divergences keep their digits.
    """
    found = []
    for p, q in zip(torch.split(clean, _ROWS), torch.split(changed, _ROWS), strict=True):
        share, change = p.exp(), q - p
        grown = torch.where(change < 1.0, share * torch.expm1(change), q.exp() - share)
        found.append((grown - share * change).sum(dim=1))
    return torch.cat(found)


def _compare(
    clean: Float[Tensor, "position vocab"], changed: Float[Tensor, "position vocab"], batch: Batch
) -> Float[np.ndarray, "position measure"]:
    target = batch.tokens.roll(-1, dims=1)[batch.valid].to(clean.device)[:, None]
    known = batch.next_known[batch.valid].to(clean.device)
    rise = (clean.gather(1, target) - changed.gather(1, target))[:, 0]
    same_choice = [
        p.argmax(dim=1) == q.argmax(dim=1)
        for p, q in zip(torch.split(clean, _ROWS), torch.split(changed, _ROWS), strict=True)
    ]
    columns = (divergences(clean, changed), torch.where(known, rise, 0.0), torch.cat(same_choice))
    table: np.ndarray = torch.stack([c.cpu().double() for c in columns], dim=1).numpy()
    return table
