"""Texts written under interventions on each scale, against those of the same prompts without."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state
from mspgt_lens.folds import stable_hash
from mspgt_lens.generation.metrics import Embed, TextMetric, text_metrics
from mspgt_lens.generation.results import GenerationEffects, compare_texts, text_deltas
from mspgt_lens.models import (
    Edit,
    ModelAdapter,
    Rows,
    as_adapter,
    check_generation,
    decode_text,
    generate,
)
from mspgt_lens.partition import Segments, as_segments
from mspgt_lens.perturbation.batches import Batches, make_batches
from mspgt_lens.perturbation.block_sets import BlockSets
from mspgt_lens.perturbation.kinds import Perturbation
from mspgt_lens.perturbation.matching import TOLERANCE, Matched, match_strengths
from mspgt_lens.perturbation.residuals import ResidualStatistics, residual_statistics
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset, count_tokens
from mspgt_lens.storage import package_versions
from mspgt_lens.targets import token_features

DEFAULT_PERTURBATIONS = (
    Perturbation("noise"),
    Perturbation("scaling"),
    Perturbation("temperature"),
)
_CALIBRATION_PROMPTS = 16
_BATCH_SIZE = 64
_N_FEATURES = 32


@in_own_state
def generation_effects(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    partition: Segments,
    *,
    perturbations: Sequence[Perturbation] = DEFAULT_PERTURBATIONS,
    n_new: int = 48,
    temperature: float = 1.0,
    target_kl: float | None = 0.5,
    n_controls: int = 4,
    statistics: ResidualStatistics | None = None,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GenerationEffects:
    """Continue every prompt with and without interventions on each segment, and compare the texts.

    The texts of a pair share the prompt and the random numbers, and all have ``n_new`` tokens.
    Intervals and tests count each group of prompts as one draw: bootstrap intervals of differences
    (BCa, Efron 1987), Cliff's delta with the interval of Feng and Cliff (2004), sign flips.

    A stronger intervention changes every property more, so segments are compared at one effect:
    each kind gets, on each segment, the strength at which predictions on the first 16 prompts
    move by ``target_kl`` nats of KL divergence per token. Random block sets of the segments'
    sizes, at the same KL, tell what any blocks would do. Each set costs as much as a segment: the
    default of four per size shows how large such effects are, and is too few for a p-value.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge`` with a tokenizer.
        prompts: A :class:`PromptDataset`, or texts; each window is continued as it is.
        partition: A :class:`ScalePartition`, a mapping from segment names to blocks, or boundaries.
        perturbations: What to do; by default noise on the residual stream, weaker updates, and
            flatter attention.
        n_new: Tokens to generate. Special tokens are never chosen.
        temperature: Of sampling; 0 takes the most probable token, which drives small models into
            loops.
        target_kl: KL divergence at which all are compared, in nats per token; None takes every
            perturbation at its own strength.
        n_controls: Random block sets for each size of segment.
        statistics: Of the residual stream, from :func:`~mspgt_lens.residual_statistics`; by default
            gathered from these prompts in one pass.
        skip_first: Tokens at the beginning of each prompt that are left alone.
        batch_size: Prompts generated together; by default 64.
        seed: Decides the sampled tokens, the control sets, and what ablation resamples from; every
            perturbation's own seed decides its draws.
        progress: Show a progress bar.

    Returns:
        Differences and Cliff's deltas, ``[perturbation, segment, metric]``, with 95% intervals over
        groups, those of the random block sets, and all texts.

    Raises:
        ValueError: If an argument is out of range, the model has no tokenizer, a prompt and its
            continuation do not fit the context, there are fewer than 3 groups, or rounding in the
            model's dtype moves predictions as far as ``target_kl``.
        FloatingPointError: If activations or logits are NaN or infinite.
        RuntimeError: If the model does not compute what is to be changed under its hook.

    Example:
        >>> noise = ml.Perturbation("noise")
        >>> effects = ml.generation_effects(
        ...     model, prompts, (3, 6), perturbations=[noise], n_new=4, target_kl=None, n_controls=0
        ... )
        >>> effects.deltas.shape == (1, 3, len(effects.metrics))
        True
    """
    adapter = as_adapter(model)
    segments = as_segments(partition, adapter.n_layers)
    labels = _labels(perturbations, target_kl)
    _check_numbers(target_kl, n_controls)
    rows = list(as_dataset(prompts, adapter))
    before = tuple(decode_text(adapter, row.tokens) for row in rows)
    batches, first = _batches(adapter, rows, skip_first)
    together = _BATCH_SIZE if batch_size is None else batch_size
    writer = _Writer(adapter, rows, n_new, temperature, skip_first, together, seed)
    metrics, left_out = text_metrics(_token_embedding(adapter, rows))
    if statistics is None:
        statistics = residual_statistics(adapter, batches, seed=seed)
    sets = BlockSets(segments, adapter.n_layers, n_controls, np.random.default_rng([seed, 3]))
    jobs = list(itertools.product(perturbations, sets.all))
    matched = match_strengths(adapter, first, statistics, jobs, target_kl)
    texts = [
        writer.texts(condition, statistics)
        for condition in tqdm([None, *matched], desc="generating", disable=not progress)
    ]
    measured = _measure(texts, metrics)
    own = sets.segments(sets.arranged(measured[1:]))
    groups = np.unique([stable_hash(row.group) for row in rows], return_inverse=True)[1]
    compared = compare_texts(measured[0], own.reshape(-1, *own.shape[2:]), groups, seed=seed)
    deltas = sets.arranged(text_deltas(measured[0], measured[1:]))
    strengths = sets.arranged(np.array([match.perturbation.amount for match in matched]))
    kl = sets.arranged(np.array([match.kl for match in matched]))
    return GenerationEffects(
        model_name=adapter.name,
        perturbations=labels,
        segments=segments,
        metrics={metric.name: metric.scale for metric in metrics},
        left_out=left_out,
        clean=_defined_means(measured[0]),
        **{name: values.reshape(*own.shape[:2], -1) for name, values in compared.items()},
        controls=sets.controls(deltas),
        strengths=sets.segments(strengths),
        kl=sets.segments(kl),
        control_kl=sets.controls(kl),
        prompts=before,
        groups=groups,
        clean_texts=texts[0],
        texts=tuple(
            tuple(texts[1 + i * len(sets.all) + j] for j in range(len(segments)))
            for i in range(len(perturbations))
        ),
        clean_measured=measured[0],
        measured=own,
        settings={
            "n_new": n_new,
            "temperature": temperature,
            "target_kl": target_kl,
            "n_controls": n_controls,
            "n_prompts": len(rows),
            "n_groups": len(batches.groups),
            "skip_first": skip_first,
            "seed": seed,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": batches.fingerprint,
        },
        versions=package_versions(),
        warnings=_warnings(matched, target_kl, compared["n_pairs"], len(rows)),
    )


class _Writer:
    """Continues the prompts, under one perturbation or none."""

    def __init__(
        self,
        adapter: ModelAdapter,
        rows: Sequence[Prompt],
        n_new: int,
        temperature: float,
        skip_first: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.adapter, self.n_new, self.temperature = adapter, n_new, temperature
        self.skip_first, self.batch_size = skip_first, batch_size
        self.tokens = [row.tokens for row in rows]
        check_generation(adapter, self.tokens, n_new, temperature, batch_size)
        # A prompt's own tokens decide its draws, not its place among the others.
        self.keys = [stable_hash(row.tokens.tobytes()) for row in rows]
        self.seeds = [stable_hash(key, seed) % 2**63 for key in self.keys]
        self.groups = np.array([stable_hash(row.group) for row in rows], dtype=np.uint64)

    def texts(self, condition: Matched | None, statistics: ResidualStatistics) -> tuple[str, ...]:
        def edits(batch: Rows) -> Sequence[Edit]:
            if condition is None:
                return ()
            special = torch.tensor(sorted(self.adapter.special_ids), dtype=torch.long)
            position = batch.mask.long().cumsum(dim=1) - 1
            where = batch.mask & (position >= self.skip_first) & ~torch.isin(batch.tokens, special)
            return condition.perturbation.edits(
                statistics,
                condition.blocks,
                where=where,
                keys=[self.keys[number] for number in batch.prompts],
                groups=self.groups[batch.prompts.start : batch.prompts.stop],
            )

        new = generate(
            self.adapter,
            self.tokens,
            n_new=self.n_new,
            temperature=self.temperature,
            seeds=self.seeds,
            edits=edits,
            batch_size=self.batch_size,
        )
        return tuple(decode_text(self.adapter, row) for row in new)


def _labels(perturbations: Sequence[Perturbation], target_kl: float | None) -> tuple[str, ...]:
    """What is done, without the strength where every segment has its own."""
    labels = tuple(
        perturbation.label if target_kl is None else perturbation.title
        for perturbation in perturbations
    )
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(
            f"perturbations must all differ (with target_kl, in more than their "
            f"strength), got {list(labels)}"
        )
    return labels


def _check_numbers(target_kl: float | None, n_controls: int) -> None:
    if target_kl is not None and not 0 < target_kl < np.inf:
        raise ValueError(
            f"target_kl must be a KL divergence above 0, in nats, or None, got {target_kl!r}"
        )
    if n_controls < 0 or n_controls != int(n_controls):
        raise ValueError(f"n_controls must be a whole number, 0 or more, got {n_controls!r}")


def _batches(
    adapter: ModelAdapter, rows: Sequence[Prompt], skip_first: int
) -> tuple[Batches, Batches]:
    """All prompts, and the first of them, on which strengths are matched."""
    first = rows[:_CALIBRATION_PROMPTS]
    return (
        make_batches(adapter, PromptDataset(rows), skip_first=skip_first, batch_size=None),
        make_batches(
            adapter, PromptDataset(first), skip_first=skip_first, batch_size=None, min_groups=1
        ),
    )


def _token_embedding(adapter: ModelAdapter, rows: Sequence[Prompt]) -> Embed:
    """Sentences as the mean of their tokens' features (the model's own input embedding)."""
    counts = count_tokens(adapter, rows)
    features = token_features(adapter.embedding(), counts, _N_FEATURES).numpy()

    def embed(sentences: Sequence[str]) -> Float[np.ndarray, "sentence feature"]:
        tokens = [adapter.tokenize(sentence) for sentence in sentences]
        return np.stack([features[row].mean(axis=0) for row in tokens])

    return embed


def _measure(
    texts: Sequence[Sequence[str]], metrics: Sequence[TextMetric]
) -> Float[np.ndarray, "job prompt metric"]:
    values = [[[metric.measure(text) for metric in metrics] for text in job] for job in texts]
    # None becomes NaN, which the result says to mean undefined.
    return np.array(values, dtype=np.float64)


def _defined_means(
    measured: Float[np.ndarray, "prompt metric"],
) -> Float[np.ndarray, " metric"]:
    columns = [column[np.isfinite(column)] for column in measured.T]
    return np.array([column.mean() if len(column) else np.nan for column in columns])


def _warnings(
    matched: Sequence[Matched],
    target_kl: float | None,
    n_pairs: Int[np.ndarray, "condition metric"],
    n: int,
) -> tuple[str, ...]:
    warnings = []
    if target_kl is not None:
        missed = sorted(
            {
                match.perturbation.kind
                for match in matched
                if not np.exp(-2 * TOLERANCE) <= match.kl / target_kl <= np.exp(2 * TOLERANCE)
            }
        )
        if missed:
            warnings.append(
                f"The target of {target_kl:g} nats was not met everywhere by {', '.join(missed)}: "
                "see kl and control_kl."
            )
    undefined = n - n_pairs
    if (undefined > n / 5).any():
        warnings.append(
            "Some properties are undefined in more than a fifth of the pairs, which were left out: "
            "see n_pairs; longer texts (n_new) have fewer such."
        )
    return tuple(warnings)
