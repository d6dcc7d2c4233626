"""Whole segments patched at once, against random sets of as many blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state
from mspgt_lens.models import as_adapter
from mspgt_lens.partition import ScalePartition, Segments, as_segments
from mspgt_lens.patching.layers import agree, check_sweep
from mspgt_lens.patching.metrics import DEFAULT_METRIC, LogitMetric, MetricName
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.results import ScalePatch
from mspgt_lens.patching.significance import summarize_effects
from mspgt_lens.patching.sweeping import Direction, Sweep, SweepPlan, all_columns, mean_over_pairs
from mspgt_lens.patching.walking import rows_per_call
from mspgt_lens.processes import Turns, joined
from mspgt_lens.statistics import SIGNIFICANCE, holm
from mspgt_lens.storage import package_versions

MIN_CONTROLS = 20


@in_own_state
def patch_scales(
    model: Any,
    pairs: PromptPairs,
    partition: Segments,
    metric: MetricName | LogitMetric | None = None,
    *,
    direction: Direction = "denoise",
    n_controls: int = 149,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> ScalePatch:
    """Patch what every block of a segment writes, all positions at once, segment by segment.

    A block's output is what it adds to the residual stream: its attention's and its MLP's output.
    (Were the stream itself replaced, everything after would be the other run's, whatever the
    segment.) The patched run keeps its own stream and takes the other run's updates in the segment.

    The control are random sets of as many blocks, anywhere in the model: a small p-value says that
    it matters *which* blocks these are, more or less than chance. Unlike segments, random sets are
    not contiguous, so a small p-value may also be due to contiguity.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        pairs: Clean and corrupted prompts with their answers.
        partition: The segments: a :class:`ScalePartition`, a mapping from names to blocks that
            follow one another, or boundaries.
        metric: As for :func:`~mspgt_lens.patch_layers`.
        direction: ``"denoise"`` puts clean updates into the corrupted run, ``"noise"`` corrupted
            ones into the clean run.
        n_controls: Random sets per segment, at least 20; where there are fewer other sets of that
            size, all of them are taken.
        batch_size: Patched prompts in one call of a block.
        seed: Decides the random sets.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        Effects per segment, as shares of the gap between clean and corrupted runs, ``[segment]``,
        with those of the random sets, ``[segment, draw]``.

    Raises:
        RuntimeError: If another process of the group failed; says which one, and why.
        ValueError: If the partition is of another depth or has one segment only, an argument is out
            of range, or effects have no scale; or processes were given different arguments.

    Example:
        >>> patched = ml.patch_scales(model, pairs, (3, 6))
        >>> dict(zip(patched.segments, patched.effect.round(2)))
        {'local': ..., 'intermediate': ..., 'global': ...}
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        chosen: MetricName | LogitMetric = DEFAULT_METRIC if metric is None else metric
        check_sweep(adapter, pairs, chosen, direction=direction, batch_size=batch_size)
        pairs = pairs.for_model(adapter)
        by_name = contiguous_segments(partition, adapter.n_layers)
        if n_controls < MIN_CONTROLS:
            raise ValueError(f"n_controls must be at least {MIN_CONTROLS}, got {n_controls}")
        segments = list(by_name.values())
        plan = SweepPlan("resid_pre", all_columns(pairs), direction, batch_size=batch_size)
        drawn = [_other_sets(blocks, adapter.n_layers, n_controls, seed) for blocks in segments]
        arguments = {
            "segments": list(by_name.items()),
            "direction": direction,
            "n_controls": n_controls,
            "batch_size": batch_size,
            "seed": seed,
        }
        agree(processes, adapter, pairs, chosen, arguments)
        with adapter.inference():
            sweep = Sweep(adapter, pairs, chosen, plan, processes)
            sets = list(dict.fromkeys([*segments, *chain.from_iterable(drawn)]))
            values = dict(zip(sets, _patch_sets(sweep, sets, progress), strict=True))
    by_segment = np.stack([values[blocks] for blocks in segments], axis=-1)
    effects = summarize_effects(by_segment, sweep.clean, sweep.corrupted, pairs.groups)
    controls = [[effects.scaled(float(values[blocks].mean())) for blocks in sets] for sets in drawn]
    p_values = [_rank_p(e, np.array(r)) for e, r in zip(effects.effect, controls, strict=True)]
    # Segments of other sizes may have fewer other sets; the figures want equal rows.
    n_draws = min(len(others) for others in drawn)
    return ScalePatch(
        model_name=adapter.name,
        direction=direction,
        metric_name=sweep.metric_name,
        segments=tuple(by_name),
        blocks=np.array([[blocks[0], blocks[-1]] for blocks in segments]),
        metric=mean_over_pairs(by_segment, 1),
        clean=effects.clean,
        corrupted=effects.corrupted,
        effect=effects.effect,
        low=effects.low,
        high=effects.high,
        controls=np.array([scaled[:n_draws] for scaled in controls]),
        p_values=holm(np.array(p_values)),
        settings={
            "n_pairs": len(pairs),
            "n_groups": effects.n_groups,
            "boundaries": [blocks[0] for blocks in segments[1:]],
            "supported": _supported(partition),
            "n_controls": [len(others) for others in drawn],
            "seed": seed,
            "weights": adapter.weight_processing,
        },
        versions=package_versions(),
        warnings=(*effects.warnings, *_too_few(n_draws, len(segments))),
    )


def contiguous_segments(partition: Segments, n_layers: int) -> dict[str, tuple[int, ...]]:
    """At least two segments, each of blocks that follow one another.

    Args:
        partition: As :func:`patch_scales` takes it.
        n_layers: Blocks of the model.

    Raises:
        TypeError: If it is no partition.
        ValueError: If it does not fit the model.
    """
    by_name = as_segments(partition, n_layers)
    for name, blocks in by_name.items():
        if blocks != tuple(range(blocks[0], blocks[0] + len(blocks))):
            raise ValueError(
                f"partition[{name!r}] must hold blocks that follow one another, got {blocks}"
            )
    if len(by_name) < 2:
        raise ValueError("partition must have at least two segments, got one: the whole model")
    return by_name


def _too_few(n_draws: int, n_segments: int) -> Iterator[str]:
    """What a reader has to know where no p-value can be small."""
    least = 2 * n_segments / (n_draws + 1)
    if least > SIGNIFICANCE:
        yield (
            f"{n_draws} random sets are too few: no p-value can fall below {min(1.0, least):.2g} "
            f"after Holm's correction over {n_segments} segments"
        )


def _supported(partition: Segments) -> bool | None:
    """Whether the data support the boundaries; None where they were given by hand."""
    if not isinstance(partition, ScalePartition):
        return None
    return partition.supported


def _other_sets(
    blocks: tuple[int, ...], n_layers: int, n_controls: int, seed: int
) -> list[tuple[int, ...]]:
    """Different random sets of as many blocks, none of them the segment itself."""
    size = len(blocks)
    if math.comb(n_layers, size) - 1 <= n_controls:
        return [other for other in combinations(range(n_layers), size) if other != blocks]
    rng = np.random.default_rng([seed, *blocks])
    others: dict[tuple[int, ...], None] = {}
    while len(others) < n_controls:
        other = tuple(sorted(rng.choice(n_layers, size, replace=False).tolist()))
        if other != blocks:
            others.setdefault(other)
    return list(others)


def _rank_p(effect: float, others: Float[np.ndarray, " draw"]) -> float:
    """Two-sided rank p-value; the effect itself counts among the draws."""
    sides = (others >= effect).sum(), (others <= effect).sum()
    return min(1.0, 2 * (1 + int(min(sides))) / (len(others) + 1))


def _patch_sets(
    sweep: Sweep, sets: Sequence[tuple[int, ...]], progress: bool
) -> Float[np.ndarray, "set *pair"]:
    """The metric with the updates of each set of blocks patched, per pair or as one number."""
    start = int(sweep.pairs.first_difference.min()) if sweep.base.reuses_prefix else 0
    n_pos = sweep.pairs.clean.shape[1]
    stop = n_pos if sweep.named is None else int(sweep.pairs.last.max()) + 1
    if start >= stop:  # Clean and corrupted prompts are the same.
        return np.stack([sweep.start] * len(sets))
    n_pairs = len(sweep.pairs)
    per_call = max(1, (sweep.plan.batch_size or rows_per_call(stop - start)) // n_pairs)
    values = np.zeros((len(sets), *sweep.start.shape))
    turns = Turns(sweep.processes)
    is_shown = progress and sweep.processes.rank == 0
    for first in tqdm(range(0, len(sets), per_call), disable=not is_shown, unit="batch"):
        batch = sets[first : first + per_call]
        if turns.is_mine(len(batch)):
            for number, value in enumerate(
                sweep.metric_of(_run_sets(sweep, batch, start, stop), start), start=first
            ):
                values[number] = value
    sweep.processes.sum_(values)
    return values


def _run_sets(
    sweep: Sweep, sets: Sequence[tuple[int, ...]], start: int, stop: int
) -> Float[Tensor, "set pair length d_model"]:
    base, source, n_pairs = sweep.base, sweep.source, len(sweep.pairs)
    n_layers = sweep.adapter.n_layers
    patched = torch.zeros(n_layers, len(sets), dtype=torch.bool)
    for index, blocks in enumerate(sets):
        patched[list(blocks), index] = True
    pair = sweep.every.repeat(len(sets))
    first = min(min(blocks) for blocks in sets)
    residual = base.residual[first][pair, start:stop]
    for block in range(first, n_layers):
        rows = patched[block].repeat_interleave(n_pairs)
        after = source.residual[block + 1]
        update = after - source.residual[block].to(after.device)
        residual = residual.to(after.device)
        after = residual + update[pair, start:stop]
        if not bool(rows.all()):
            after[~rows] = base.run_block(block, residual[~rows], pair[~rows], start)
        residual = after
    return residual.reshape(len(sets), n_pairs, *residual.shape[1:])
