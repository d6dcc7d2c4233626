"""What a model's predictions lose when one scale of its blocks is perturbed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, interval, named
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.partition import Segments, as_segments
from mspgt_lens.perturbation.batches import Batch, make_batches
from mspgt_lens.perturbation.block_sets import BlockSets
from mspgt_lens.perturbation.kinds import Perturbation, described
from mspgt_lens.perturbation.residuals import ResidualStatistics, residual_statistics
from mspgt_lens.perturbation.responding import MEASURES, Condition, agree, respond
from mspgt_lens.perturbation.rounding import NEGLIGIBLE, beyond_rounding, rounding
from mspgt_lens.processes import joined
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.statistics import SIGNIFICANCE, holm, mean_interval, sign_flip_p_values
from mspgt_lens.storage import package_versions

DEFAULT_PERTURBATIONS = (
    Perturbation("noise"),
    Perturbation("noise", shape="isotropic"),
    Perturbation("scaling"),
    Perturbation("mean"),
    Perturbation("resample"),
    Perturbation("temperature"),
    Perturbation("skip"),
)


@dataclass(frozen=True, eq=False, repr=False)
class PerturbationEffects(Result):
    """Effects of perturbing each segment, with intervals, tests, and random block sets beside them.

    Measures, in the order of the last axis: ``"kl"``, divergence from the clean prediction to the
    perturbed one (nats per token); ``"cross_entropy"``, rise of the next token's loss (nats);
    ``"agreement"``, share of positions that keep their most likely token. Groups (documents) count
    alike.

    Attributes:
        model_name: The model's name.
        perturbations: Label of each perturbation.
        segments: Segment name to its blocks.
        values: The effects, ``[perturbation, segment, measure]``.
        low: Lower ends of their 95% intervals over groups.
        high: Upper ends.
        p_values: Of no rise in cross-entropy beyond that of rounding, by flipping signs of whole
            groups, after Holm's correction over all entries, ``[perturbation, segment]``. KL and
            agreement can move one way only, so zero is no null for them; the controls are.
        controls: The same measures for random block sets as large as the segment,
            ``[perturbation, segment, draw, measure]``. Segments of one size share their sets.
        p_controls: How often a set among the segment and its controls lies as far from their mean
            as the segment, ``[perturbation, segment, measure]``; uncorrected, and never below
            ``1 / (draws + 1)``.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        floor: The same measures where the segment's activations were changed by no more than
            rounding, ``[segment, measure]``: what every entry of ``values`` holds of it. None in
            results of versions before 0.4.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    perturbations: tuple[str, ...]
    segments: Mapping[str, tuple[int, ...]]
    values: Float[np.ndarray, "perturbation segment measure"]
    low: Float[np.ndarray, "perturbation segment measure"]
    high: Float[np.ndarray, "perturbation segment measure"]
    p_values: Float[np.ndarray, "perturbation segment"]
    controls: Float[np.ndarray, "perturbation segment draw measure"]
    p_controls: Float[np.ndarray, "perturbation segment measure"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    floor: Float[np.ndarray, "segment measure"] | None = None
    warnings: tuple[str, ...] = ()

    def heading(self) -> str:
        """The model and how many perturbations and controls."""
        return (
            f"PerturbationEffects{named(self.model_name)}: "
            f"{counted(len(self.perturbations), 'perturbation')} of "
            f"{counted(len(self.segments), 'segment')}, "
            f"{counted(self.controls.shape[2], 'control')} each"
        )

    def rows(self) -> Rows:
        """KL under every perturbation of every segment."""
        k = MEASURES.index("kl")
        ends = (self.values, self.low, self.high)
        return [
            ("KL, nats per token", *self.segments),
            *(
                (name, *(interval(*(x[i, j, k] for x in ends)) for j in range(len(self.segments))))
                for i, name in enumerate(self.perturbations)
            ),
        ]

    def findings(self) -> list[str]:
        """How many effects differ from those of random block sets."""
        k = MEASURES.index("kl")
        least = 1 / (self.controls.shape[2] + 1)
        apart = int((self.p_controls[..., k] <= max(least, SIGNIFICANCE)).sum())
        return [
            f"{apart} of {self.p_controls[..., k].size} differ from random block sets of the same "
            f"size (rank p at most {max(least, SIGNIFICANCE):.2g}, uncorrected)."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per perturbation, segment and measure.

        Returns:
            Columns ``model, quantity, segment, perturbation, value, low, high, unit, p_value,
            control, control_low, control_high, p_control``; ``quantity`` is the measure; the
            control's are the mean and the 2.5% and 97.5% quantiles over its block sets.
            ``p_value`` is missing where it is not defined.
        """
        rows = []
        for i, perturbation in enumerate(self.perturbations):
            for j, segment in enumerate(self.segments):
                for k, measure in enumerate(MEASURES):
                    control = self.controls[i, j, :, k]
                    tested = measure == "cross_entropy"
                    rows.append(
                        {
                            "model": self.model_name,
                            "quantity": measure,
                            "segment": segment,
                            "perturbation": perturbation,
                            "value": self.values[i, j, k],
                            "low": self.low[i, j, k],
                            "high": self.high[i, j, k],
                            "unit": "share" if measure == "agreement" else "nats",
                            "p_value": self.p_values[i, j] if tested else None,
                            "control": control.mean(),
                            "control_low": np.quantile(control, 0.025),
                            "control_high": np.quantile(control, 0.975),
                            "p_control": self.p_controls[i, j, k],
                        }
                    )
        return pd.DataFrame(rows).astype({"p_value": "float64"})


@in_own_state
def perturb_scales(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    partition: Segments,
    *,
    perturbations: Sequence[Perturbation] = DEFAULT_PERTURBATIONS,
    statistics: ResidualStatistics | None = None,
    n_controls: int = 20,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> PerturbationEffects:
    """Perturb every segment of blocks in every way, and measure how far predictions move.

    A segment is perturbed at all of its blocks at once, each with the perturbation's full strength,
    so a longer segment gets more of it: read each effect against the random block sets of the same
    size, or use :func:`~mspgt_lens.measure_brittleness`, which also shares one strength out. Only
    valid positions are changed and measured: not padding, not special tokens, not a prompt's first
    ``skip_first`` tokens. All conditions of one perturbation use the same draws.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        partition: A :class:`ScalePartition`, a mapping from segment names to blocks, or boundaries.
        perturbations: What to do; by default noise of two shapes, scaling, mean and resample
            ablation, attention temperature, and skipping.
        statistics: Of the residual stream, from :func:`~mspgt_lens.residual_statistics`; by default
            gathered from these prompts in one pass.
        n_controls: Random block sets for each size of segment.
        skip_first: Tokens at the beginning of each prompt that are left alone and not measured.
        batch_size: Prompts per forward pass; by default a fixed number of tokens, or what fits.
        seed: Decides the control sets, and the positions that ablation resamples from; every
            perturbation's own seed decides its draws.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        KL, rise of the loss (nats per token) and agreement, ``[perturbation, segment, measure]``,
        with 95% intervals over groups and the same of the random block sets.

    Raises:
        ValueError: If the partition does not fit the model, there is nothing to do, or processes
            were given different arguments.
        CannotMeasure: If the model is an encoder, or there are fewer than 3 groups.
        FloatingPointError: If activations or logits are NaN or infinite.
        RuntimeError: If the model does not compute what is to be changed under its hook, or another
            process of the group failed; says which one, and why.

    Example:
        >>> skip = ml.Perturbation("skip")
        >>> effects = ml.perturb_scales(model, prompts, (3, 6), perturbations=[skip], n_controls=5)
        >>> effects.values.shape  # perturbation, segment, measure
        (1, 3, 3)
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        segments = as_segments(partition, adapter.n_layers)
        labels = tuple(kind.label for kind in perturbations)
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"perturbations must all differ, got {list(labels)}")
        if n_controls < 1:
            raise ValueError(f"n_controls must be at least 1 block set, got {n_controls}")
        batches = make_batches(adapter, prompts, skip_first=skip_first, batch_size=batch_size)
        arguments = {
            "segments": list(segments.items()),
            "perturbations": [described(kind) for kind in perturbations],
            "n_controls": n_controls,
            "skip_first": skip_first,
            "batch_size": batch_size,
            "seed": seed,
        }
        agree(processes, adapter, batches, statistics, arguments)
        if statistics is None:
            statistics = residual_statistics(adapter, batches, seed=seed)
        sets = BlockSets(segments, adapter.n_layers, n_controls, np.random.default_rng([seed, 2]))
        conditions = [
            *(perturbed(kind, statistics, blocks) for kind in perturbations for blocks in sets.all),
            *(rounding(blocks) for blocks in segments.values()),
        ]
        measured = respond(
            adapter,
            batches,
            conditions,
            description="perturbing",
            progress=progress,
            processes=processes,
        )
    floor = measured[-len(segments) :]
    by_group = sets.arranged(measured[: -len(segments)])
    own = sets.segments(by_group)
    values, low, high = mean_interval(np.moveaxis(own, 2, 0))
    rises = beyond_rounding(own, floor)[..., MEASURES.index("cross_entropy")]
    raw = sign_flip_p_values(np.moveaxis(rises, 2, 0).reshape(len(batches.groups), -1), seed=seed)
    controls = sets.controls(by_group.mean(axis=2))
    return PerturbationEffects(
        model_name=adapter.name,
        perturbations=labels,
        segments=segments,
        values=values,
        low=low,
        high=high,
        p_values=holm(raw).reshape(len(perturbations), len(segments)),
        controls=controls,
        p_controls=_rank_p_values(values, controls),
        settings={
            "n_controls": n_controls,
            "n_groups": len(batches.groups),
            "n_positions": batches.n_positions,
            "skip_first": skip_first,
            "seed": seed,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": batches.fingerprint,
        },
        versions=package_versions(),
        floor=floor.mean(axis=1),
        warnings=tuple(_mostly_rounding(values, floor.mean(axis=1), labels, segments, adapter)),
    )


def _mostly_rounding(
    values: Float[np.ndarray, "perturbation segment measure"],
    floor: Float[np.ndarray, "segment measure"],
    labels: Sequence[str],
    segments: Mapping[str, tuple[int, ...]],
    adapter: ModelAdapter,
) -> Iterator[str]:
    """Which effects are not far above what rounding does."""
    for i, j in itertools.product(range(len(labels)), range(len(segments))):
        kl, rounded = float(values[i, j, 0]), float(floor[j, 0])
        if kl > 0 and rounded > NEGLIGIBLE * kl:
            yield (
                f"{labels[i]}, {list(segments)[j]}: rounding in {adapter.dtype} alone gives "
                f"{rounded:.2g} of the {kl:.2g} nats of KL: load the model in float32, or use a "
                "stronger perturbation"
            )


def perturbed(
    kind: Perturbation, statistics: ResidualStatistics, blocks: Iterable[int]
) -> Condition:
    """A perturbation of some blocks as a condition of ``respond``."""
    chosen = tuple(int(block) for block in blocks)

    def edits(batch: Batch) -> Sequence[Any]:
        return kind.edits(
            statistics, chosen, where=batch.valid, keys=batch.keys, groups=batch.group_hashes
        )

    return edits


def _rank_p_values(
    values: Float[np.ndarray, "perturbation segment measure"],
    controls: Float[np.ndarray, "perturbation segment draw measure"],
) -> Float[np.ndarray, "perturbation segment measure"]:
    everything = np.concatenate([values[:, :, None], controls], axis=2)
    distance = np.abs(everything - everything.mean(axis=2, keepdims=True))
    # Rounding must not make a set less far than itself.
    p_values: np.ndarray = (distance >= distance[:, :, :1] * (1 - 1e-9)).mean(axis=2)
    return p_values
