"""The pass over the prompts: which process runs which batch, and where a stopped pass goes on."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm.auto import tqdm

from mspgt_lens.ambient import tell
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
from mspgt_lens.models import PatternBlocks, own_attention, pattern_blocks, ran_out_of_memory
from mspgt_lens.processes import ALONE, Processes
from mspgt_lens.products import faster_layers
from mspgt_lens.profile.checkpoint import Checkpoint
from mspgt_lens.profile.memory import kept_memory
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.prompts import Prompt, PromptDataset

_CHUNK = 1024
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192, "mps": 4096}
# Of one prompt's attention patterns in a block, from which on they are taken in parts: 64 MB.
LARGE_PATTERN = 2**24


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
    kept = Checkpoint(checkpoint, described, processes)
    n_tokens = sum(len(prompt.tokens) for prompt in first)
    with ExitStack() as stack:
        stack.enter_context(adapter.inference())
        stack.enter_context(kept_memory())
        stack.enter_context(faster_layers())
        blocks = _pattern_blocks(run, first)
        is_own = not run.moments.plan.needs_patterns and stack.enter_context(own_attention(adapter))
        n_heads = 0 if is_own or blocks is not None else adapter.n_heads
        fitting = _Fitting(batch_size, blocks)
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
                _add(run, planned, processes, fitting)
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


@dataclass
class _Fitting:
    """What fits into memory, as far as this pass has seen.

    Attributes:
        batch_size: Prompts per batch; None lets batches be halved.
        blocks: How to run the model where its patterns come a few queries at a time.
        most: Tokens that a batch may hold, padding included; None until memory runs out.
    """

    batch_size: int | None
    blocks: PatternBlocks | None
    most: int | None = None

    def cut(self, planned: BatchPlan) -> list[BatchPlan]:
        """A batch in parts that may fit."""
        return [planned] if self.most is None else planned.parts(self.most)

    def has_run(self, planned: BatchPlan, reader: BatchReader) -> bool:
        """Whether a batch fitted; else those from here on are to be smaller.

        Raises:
            RuntimeError: Torch's own, if a batch does not fit and cannot be halved.
        """
        try:
            reader.run(self.blocks)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if self.batch_size is not None or len(planned.prompts) == 1:
                # The kind of error stays, for those who catch it.
                raise type(error)(f"{_remedy(planned, self.batch_size)} ({error})") from error
        else:
            return True
        if self.most is None:
            tell(
                f"memory ran out in a batch of {len(planned.prompts)} prompts: from here on "
                "batches are halved until they fit, which changes results by no more than "
                "rounding; batch_size= sets their size"
            )
        self.most = planned.n_padded // 2
        return False


def _remedy(planned: BatchPlan, batch_size: int | None) -> str:
    if batch_size is not None and len(planned.prompts) > 1:
        return f"batch_size={batch_size} does not fit into memory: give fewer, or None"
    return (
        f"one prompt of {len(planned.prompts[0].tokens)} tokens does not fit into memory: give "
        "shorter ones, signals= without those of attention, or more devices"
    )


def _add(run: ProfileRun, planned: BatchPlan, processes: Processes, fitting: _Fitting) -> None:
    moments, waiting = run.moments, fitting.cut(planned)
    while waiting:
        part = waiting.pop(0)
        reader = begin_batch(moments, run.adapter, part.batch())
        if not fitting.has_run(part, reader):
            # Nothing of it was added; what the reader holds must not outlive it.
            del reader
            waiting = [smaller for larger in (part, *waiting) for smaller in fitting.cut(larger)]
            continue
        if moments.reference is None and (processes.rank > 0 or reader.n_valid):
            _share_reference(run, reader, processes)
        finish_batch(moments, run.adapter, reader)


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
