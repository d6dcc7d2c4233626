"""Activation patching over blocks and positions, faster than one forward pass per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int

from mspgt_lens.ambient import in_own_state
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import ModelAdapter, PatchPlace, as_adapter, provenance
from mspgt_lens.patching.metrics import (
    DEFAULT_METRIC,
    LogitMetric,
    MetricName,
    check_metric,
    metric_label,
)
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.results import PatchSweep
from mspgt_lens.patching.significance import kept_labels, tested_effects
from mspgt_lens.patching.sweeping import Direction, Sweep, SweepPlan, mean_over_pairs
from mspgt_lens.processes import Processes, joined
from mspgt_lens.storage import package_versions

PatchMethod = Literal["exact", "attribution"]
LAST = -1


@in_own_state
def patch_layers(
    model: Any,
    pairs: PromptPairs,
    metric: MetricName | LogitMetric | None = None,
    *,
    place: PatchPlace = "resid_pre",
    positions: Literal["all", "last"] | Sequence[int] = "all",
    direction: Direction = "denoise",
    window: int = 1,
    method: PatchMethod = "exact",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> PatchSweep:
    """Patch every block and position on its own, and read what becomes of the answer.

    An exact sweep gives the numbers of ``transformer_lens.patching``. It resumes the unpatched run
    at the patched block and position, carries all patches of one position through the blocks
    together, and skips a pair's cells that cannot change anything: before clean and corrupted first
    differ, and after the last position that the metric reads.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        pairs: Clean and corrupted prompts with their answers.
        metric: ``"logit_difference"`` (default: answer minus foil), ``"kl"`` (of the run from the
            clean run) or ``"cross_entropy"`` (of the answer), each at every pair's last token; or a
            callable on logits ``[pair, pos, vocab]`` of all pairs, in their order. One that returns
            a value per pair gets intervals and p-values; one that returns a single number gets
            neither, since nothing is known of how pairs differ. Callables cost more: logits are
            computed at every position that a patch reaches.
        place: What is patched: the residual before the block, its attention's or its MLP's output,
            or each attention head's output (``"z"``).
        positions: Where: ``"all"``, ``"last"`` (each pair's last token), or positions as columns
            of ``pairs.clean``.
        direction: ``"denoise"`` puts clean activations into the corrupted run, ``"noise"``
            corrupted ones into the clean run.
        window: Consecutive blocks patched together.
        method: ``"exact"``; or ``"attribution"``, a first-order estimate from one backward pass,
            checked against exact patching on 48 cells at random (``PatchSweep.attribution_error``).
        batch_size: Patched prompts in one call of a block; by default as many as fill a fixed
            number of tokens.
        seed: Decides the sign flips where there are too many to count, and the checked cells.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        The sweep; shape ``[block, pos]``, or ``[block, pos, head]`` for ``"z"``.

    Raises:
        RuntimeError: If another process of the group failed; says which one, and why.
        ValueError: If an argument is out of range, the metric returns another shape, or it is the
            same on clean and corrupted runs, so that effects have no scale; or processes were given
            different arguments.
        TypeError: If the model is none of TransformerLens's, or lacks a hook.

    Example:
        >>> sweep = ml.patch_layers(model, pairs, place="attn_out")
        >>> sweep.effect.shape  # 1 restores the clean run, 0 changes nothing
        (8, 16)
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        chosen: MetricName | LogitMetric = DEFAULT_METRIC if metric is None else metric
        check_sweep(adapter, pairs, chosen, direction=direction, batch_size=batch_size)
        pairs = pairs.for_model(adapter)
        for name, value, allowed in (
            ("place", place, get_args(PatchPlace)),
            ("method", method, get_args(PatchMethod)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 1 <= window <= adapter.n_layers:
            raise ValueError(f"window must be 1 to {adapter.n_layers} blocks, got {window}")
        columns = _columns(pairs, positions)
        plan = SweepPlan(place, columns, direction, window, batch_size)
        arguments = {
            "place": place,
            "positions": positions if isinstance(positions, str) else columns[:, 0].tolist(),
            "direction": direction,
            "window": window,
            "method": method,
            "batch_size": batch_size,
            "seed": seed,
        }
        agree(processes, adapter, pairs, chosen, arguments)
        with adapter.inference():
            sweep = Sweep(adapter, pairs, chosen, plan, processes)
            checked: tuple[np.ndarray, np.ndarray] | None = None
            if method == "exact":
                values = sweep.exact(sweep.cells, progress)
            else:
                values = sweep.attribution()
                checked = sweep.check_cells(seed, progress)
    return _summarize(sweep, values, checked, positions, method, seed)


def _summarize(
    sweep: Sweep,
    values: np.ndarray,
    checked: tuple[np.ndarray, np.ndarray] | None,
    positions: Any,
    method: PatchMethod,
    seed: int,
) -> PatchSweep:
    effects, p_values = tested_effects(
        values,
        sweep.clean,
        sweep.corrupted,
        sweep.pairs.groups,
        direction=sweep.plan.direction,
        able=sweep.able,
        seed=seed,
    )
    by_pair = sweep.start.ndim > 0
    columns = sweep.plan.columns
    adapter = sweep.adapter
    return PatchSweep(
        model_name=adapter.name,
        place=sweep.base.place,
        direction=sweep.plan.direction,
        method=method,
        window=sweep.plan.window,
        metric_name=sweep.metric_name,
        metric=mean_over_pairs(values, sweep.reach.ndim - 1),
        clean=effects.clean,
        corrupted=effects.corrupted,
        effect=effects.effect,
        low=effects.low,
        high=effects.high,
        p_values=p_values,
        by_pair=values if by_pair else None,
        positions=np.array([LAST]) if positions == "last" else columns[:, 0],
        tokens=_labels(adapter, sweep.pairs, columns),
        checked_cells=None if checked is None else checked[0],
        checked_metric=None if checked is None else checked[1],
        settings={
            "n_pairs": len(sweep.pairs),
            "n_groups": effects.n_groups,
            "seed": seed,
            "weights": adapter.weight_processing,
            "resumed_at_position": sweep.base.reuses_prefix,
        },
        versions=package_versions(),
        warnings=effects.warnings,
        clean_by_pair=sweep.clean if by_pair else None,
        corrupted_by_pair=sweep.corrupted if by_pair else None,
        groups=kept_labels(sweep.pairs.groups),
    )


def _labels(
    adapter: ModelAdapter, pairs: PromptPairs, columns: Int[np.ndarray, "pos pair"]
) -> tuple[str, ...]:
    """The clean prompts' token at each position; two examples where they differ."""
    labels = []
    for column in columns:
        index = torch.from_numpy(column)[:, None]
        real = pairs.mask.gather(1, index)[:, 0]
        ids = dict.fromkeys(pairs.clean.gather(1, index)[:, 0][real].tolist())
        texts = adapter.token_texts(list(ids)[:2])
        labels.append(texts[0] if len(texts) == 1 else "/".join(t.strip() for t in texts))
    return tuple(labels)


def _columns(pairs: PromptPairs, positions: Any) -> Int[np.ndarray, "pos pair"]:
    n_pairs, n_pos = pairs.clean.shape
    if isinstance(positions, str):
        if positions == "last":
            return pairs.last[None].numpy()
        if positions != "all":
            raise ValueError(f"positions must be 'all', 'last' or whole numbers, got {positions!r}")
        positions = range(n_pos)
    chosen = [int(p) for p in positions]
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= p < n_pos for p in chosen):
        raise ValueError(
            f"positions must be different columns of the prompts, from 0 to {n_pos - 1}, got "
            f"{chosen}; 'last' is each pair's last token"
        )
    return np.repeat(np.array(chosen)[:, None], n_pairs, axis=1)


def check_sweep(
    adapter: ModelAdapter,
    pairs: PromptPairs,
    metric: Any,
    *,
    direction: Any,
    batch_size: int | None,
) -> None:
    """See that the model can read the pairs, and that what all kinds of patching take is right.

    Raises:
        TypeError: If they are no pairs.
        ValueError: If the pairs are too long or hold other tokens, the model is not causal, or an
            argument is out of range.
    """
    if not isinstance(pairs, PromptPairs):
        raise TypeError(f"pairs must be PromptPairs, got {type(pairs).__name__}")
    if pairs.clean.shape[1] > adapter.n_ctx:
        raise ValueError(
            f"pairs must fit into the model's context of {adapter.n_ctx} tokens, got "
            f"{pairs.clean.shape[1]}"
        )
    ids = torch.cat([x.flatten() for x in (pairs.clean, pairs.corrupted, pairs.answer, pairs.foil)])
    if int(ids.min()) < 0 or int(ids.max()) >= adapter.d_vocab:
        raise ValueError(
            f"pairs must hold tokens from 0 to {adapter.d_vocab - 1}, got "
            f"{int(ids.min())} to {int(ids.max())}"
        )
    asked = max(int(pairs.answer.max()), int(pairs.foil.max()))
    if asked >= adapter.d_vocab_out:
        raise ValueError(
            f"pairs: answer and foil must be tokens that {adapter.name} has logits of, 0 to "
            f"{adapter.d_vocab_out - 1} (d_vocab_out), got {asked}"
        )
    adapter.require_causal("patching")
    check_metric(metric)
    if direction not in get_args(Direction):
        raise ValueError(
            f"direction must be one of {', '.join(get_args(Direction))}, got {direction!r}"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")


def agree(
    processes: Processes,
    adapter: ModelAdapter,
    pairs: PromptPairs,
    metric: MetricName | LogitMetric,
    arguments: Mapping[str, Any],
) -> None:
    """See that all processes were given the same model, pairs and arguments.

    Args:
        processes: All of them; one alone agrees with itself.
        adapter: The model.
        pairs: The prompts.
        metric: Its name, or a callable, which goes by its name.
        arguments: All others that decide the numbers, as JSON would hold them.

    Raises:
        ValueError: If this process was given something else than the first.
    """
    if processes.size == 1:
        return
    tensors = pairs.clean, pairs.corrupted, pairs.mask, pairs.answer, pairs.foil
    processes.agree(
        {
            **provenance(adapter),
            "pairs": stable_hash(pairs.groups, *(one.numpy().tobytes() for one in tensors)),
            "metric": metric_label(metric),
            **arguments,
        }
    )
