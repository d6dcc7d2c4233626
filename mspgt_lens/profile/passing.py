"""The pass over the prompts: which process runs which batch, and where a stopped pass goes on."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from tqdm.auto import tqdm

from mspgt_lens.gathering import (
    BatchPlan,
    BatchReader,
    begin_batch,
    calibrate,
    finish_batch,
    make_batch,
    make_reference,
    plan_batches,
)
from mspgt_lens.halving import Halving
from mspgt_lens.models import PatternBlocks, own_attention, pattern_blocks
from mspgt_lens.processes import ALONE, Processes
from mspgt_lens.products import faster_layers
from mspgt_lens.profile.checkpoint import Checkpoint, kept_in
from mspgt_lens.profile.memory import kept_memory
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.prompts import Prompt, PromptDataset

_CHUNK = 1024
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192, "mps": 4096}
# Of one prompt's attention patterns in a block, from which on they are taken in parts: 64 MB.
LARGE_PATTERN = 2**24
_REMEDY = "shorter prompts, signals= without those of attention, or more devices"


def pass_over(
    run: ProfileRun,
    prompts: PromptDataset,
    batch_size: int | None,
    progress: bool,
    processes: Processes = ALONE,
    checkpoint: str | os.PathLike[str] | None = None,
) -> None:
    """One pass over the prompts; after it, every process has the moments of all of them.

    The batches are those of one process: each runs in one of the processes, and the same numbers
    come out up to the order in which they are added.

    Args:
        run: The profile, not yet begun.
        prompts: The same prompts in every process.
        batch_size: Prompts per batch; None fills batches up to a number of tokens, and halves them
            from where memory runs out on.
        progress: Whether to show how far it is; of several processes only the first does.
        processes: Those that share the work.
        checkpoint: A folder where sums are written down from time to time, and from where a pass
            that was stopped goes on.

    Raises:
        ValueError: If prompts or settings are wrong, processes were given different ones, or the
            folder holds another pass.
        PeerError: If another process failed.
    """
    adapter, stream = run.adapter, iter(prompts)
    first = run.first_prompts(stream)
    run.begin(first)
    per_batch = TOKENS_PER_BATCH.get(adapter.device.type, TOKENS_PER_BATCH["cuda"])
    described = run.described(first) | {"batch_size": batch_size, "tokens_per_batch": per_batch}
    processes.agree(described)
    n_tokens = sum(len(prompt.tokens) for prompt in first)
    with ExitStack() as stack:
        kept = stack.enter_context(kept_in(checkpoint, described, processes))
        stack.enter_context(adapter.inference())
        stack.enter_context(kept_memory())
        stack.enter_context(faster_layers())
        blocks = _pattern_blocks(run, first)
        is_own = not run.moments.plan.needs_patterns and stack.enter_context(own_attention(adapter))
        n_heads = 0 if is_own or blocks is not None else adapter.n_heads
        halving = Halving(batch_size, can_choose=True, remedy=_REMEDY)
        bar = stack.enter_context(
            tqdm(
                total=n_tokens // processes.size if run.has_all(first) else None,
                unit="tok",
                unit_scale=True,
                desc=adapter.name,
                disable=not progress or processes.rank > 0,
            )
        )
        _begin_alike(run, first, kept, processes)
        chunks = itertools.chain([first], _chunks(stream))
        for planned in _own_batches(run, chunks, batch_size, per_batch, n_heads, processes):
            if not kept.is_done(planned):
                processes.check()
                _add(run, planned, processes, halving, blocks)
                kept.write_if_due(run.moments)
            bar.update(sum(len(prompt.tokens) for prompt in planned.prompts))
        if run.moments.reference is None:
            _share_reference(run, None, processes)
        kept.close(run.moments)
        run.moments.merge_over_(processes)


def _begin_alike(
    run: ProfileRun, first: Sequence[Prompt], kept: Checkpoint, processes: Processes
) -> None:
    """Take up what was kept; features and reference are those of one process in all of them."""
    moments = run.moments
    is_taken_up = processes.texts(json.dumps(kept.take_up(moments)))
    source = is_taken_up.index("true") if "true" in is_taken_up else 0
    if run.projects and processes.rank == source and moments.reference is None:
        batch = make_batch(run.first_tokens(first), 0, range(len(first)))
        moments.reference = calibrate(moments.plan, run.adapter, batch)
    if processes.size > 1:
        moments.adopt(processes.give(moments.basis(), source))


def _own_batches(
    run: ProfileRun,
    chunks: Iterator[list[Prompt]],
    batch_size: int | None,
    per_batch: int,
    n_heads: int,
    processes: Processes,
) -> Iterator[BatchPlan]:
    """The batches of this process: each goes to the one with the fewest tokens so far.

    All up to the first with a valid position go to process 0, which makes the reference of it.
    """
    n_tokens = [0] * processes.size
    is_started = processes.size == 1
    for chunk in chunks:
        number = run.n_seen
        for planned in plan_batches(run.assign(chunk), batch_size, per_batch, number, n_heads):
            rank = n_tokens.index(min(n_tokens)) if is_started else 0
            n_tokens[rank] += planned.n_padded
            if not is_started:
                reader = BatchReader(run.moments.plan, run.adapter, planned.batch(), None)
                is_started = reader.n_valid > 0
            if rank == processes.rank:
                yield planned


def _pattern_blocks(run: ProfileRun, first: Sequence[Prompt]) -> PatternBlocks | None:
    """How to run the model where patterns of long prompts are looked at, but not whole."""
    plan, n_heads = run.moments.plan, run.adapter.n_heads
    longest = max(len(prompt.tokens) for prompt in first)
    is_large = n_heads * longest**2 > LARGE_PATTERN
    is_whole = any(signal.patterns for signal in plan.signals)
    return pattern_blocks(run.adapter) if plan.needs_spans and is_large and not is_whole else None


def _add(
    run: ProfileRun,
    planned: BatchPlan,
    processes: Processes,
    halving: Halving,
    blocks: PatternBlocks | None,
) -> None:
    """Run one batch and add its moments.

    Args:
        run: The profile.
        planned: The batch.
        processes: Those that share the work.
        halving: What fits into memory.
        blocks: How to run the model where its patterns come a few queries at a time.
    """
    moments = run.moments

    def read(part: BatchPlan) -> BatchReader:
        reader = begin_batch(moments, run.adapter, part.batch())
        reader.run(blocks)
        return reader

    for reader in halving.each(planned, read):
        if moments.reference is None and (processes.rank > 0 or reader.n_valid):
            _share_reference(run, reader, processes)
        finish_batch(moments, run.adapter, reader)
        # What it holds must not outlive it.
        del reader


def _share_reference(run: ProfileRun, reader: BatchReader | None, processes: Processes) -> None:
    """The reference that the first process makes of its first batch, in all of them."""
    if processes.size == 1:
        return
    moments = run.moments
    if processes.rank == 0 and reader is not None:
        moments.reference = make_reference(reader)
    moments.adopt(processes.give(moments.basis(), 0))


def _chunks(stream: Iterator[Prompt]) -> Iterator[list[Prompt]]:
    while chunk := list(itertools.islice(stream, _CHUNK)):
        yield chunk
