"""Perturbing each scale against the classes of tokens, and whether the diagonal leads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Integer
from scipy import stats
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, interval, named
from mspgt_lens.estimates import CannotMeasure, Estimate
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import as_adapter
from mspgt_lens.partition import Segments, as_segments
from mspgt_lens.perturbation.batches import Batch, Batches, make_batches
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.perturbation.kinds import Perturbation, described
from mspgt_lens.perturbation.perturbing import perturbed
from mspgt_lens.perturbation.residuals import ResidualStatistics, residual_statistics
from mspgt_lens.perturbation.responding import CleanRun, agree, check_resuming
from mspgt_lens.perturbation.rounding import rounding
from mspgt_lens.processes import Turns, joined
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.statistics import LEVEL, cluster_interval, pseudo_values, sign_flip_p_values
from mspgt_lens.storage import package_versions

_INTERACTION = (
    "Mean over the diagonal of the table of loss increases, each row divided by its mean over "
    "classes, then centered by rows and columns: 0 where all classes suffer in the same "
    "proportions under every segment, however strong the segments and sensitive the classes."
)


@dataclass(frozen=True, eq=False, repr=False)
class Dissociation(Result):
    """Loss increase of each class of tokens under perturbation of each segment.

    Attributes:
        model_name: The model's name.
        perturbation: What was done to a segment, in words.
        segments: Segment name to its blocks: the rows.
        classes: Class names: the columns, one per row, from near to far.
        values: Mean loss increase in nats, ``[segment, class]``.
        low: Lower ends of the 95% intervals, which resample groups.
        high: Upper ends.
        relative: ``values`` with each row divided by its mean over classes.
        counts: Tokens per class.
        interaction: The statistic that MSPGT predicts to be above 0, with its jackknife interval
            over groups and the two-sided p-value of 0.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
    """

    model_name: str
    perturbation: str
    segments: Mapping[str, tuple[int, ...]]
    classes: tuple[str, ...]
    values: Float[np.ndarray, "segment class"]
    low: Float[np.ndarray, "segment class"]
    high: Float[np.ndarray, "segment class"]
    relative: Float[np.ndarray, "segment class"]
    counts: Int[np.ndarray, " class"]
    interaction: Estimate
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def heading(self) -> str:
        """The model and what was done."""
        return f"Dissociation{named(self.model_name)}: loss increase under {self.perturbation}"

    def rows(self) -> Rows:
        """Loss increases, segments by classes."""
        ends = (self.values, self.low, self.high)
        return [
            ("nats", *self.classes),
            *(
                (name, *(interval(*(x[i, j] for x in ends)) for j in range(len(self.classes))))
                for i, name in enumerate(self.segments)
            ),
        ]

    def findings(self) -> list[str]:
        """Whether the diagonal leads."""
        e = self.interaction
        words = "leads" if e.low > 0 else "does not lead" if e.high < 0 else "does not clearly lead"
        tested = "" if e.p_value is None else f"; p = {e.p_value:.3f}"
        return [
            f"The diagonal of segments by token classes {words}: interaction {e.value:.2f} "
            f"({e.low:.2f} to {e.high:.2f}{tested})."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell, then the interaction.

        Returns:
            Columns ``model, quantity, segment, class, perturbation, value, low, high, unit,
            p_value, relative, n_tokens``; the last two are missing for the interaction.
        """
        about = {"model": self.model_name, "perturbation": self.perturbation}
        rows = [
            {
                **about,
                "quantity": "cross_entropy",
                "segment": segment,
                "class": name,
                "value": self.values[i, j],
                "low": self.low[i, j],
                "high": self.high[i, j],
                "unit": "nats",
                "p_value": np.nan,
                "relative": self.relative[i, j],
                "n_tokens": int(self.counts[j]),
            }
            for i, segment in enumerate(self.segments)
            for j, name in enumerate(self.classes)
        ]
        e = self.interaction
        last = {"value": e.value, "low": e.low, "high": e.high, "unit": e.unit}
        names = {"quantity": "interaction", "segment": "", "class": ""}
        p_value = np.nan if e.p_value is None else e.p_value
        table = pd.DataFrame([*rows, {**about, **names, **last, "p_value": p_value}])
        first = ["model", "quantity", "segment", "class", "perturbation"]
        table = table[[*first, *(c for c in table.columns if c not in first)]]
        return table.astype({"n_tokens": "Int64"})


@in_own_state
def measure_dissociation(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    partition: Segments,
    classes: TokenClasses,
    *,
    perturbation: Perturbation | None = None,
    statistics: ResidualStatistics | None = None,
    skip_first: int = 4,
    batch_size: int | None = None,
    progress: bool = True,
    process_group: Any = None,
) -> Dissociation:
    """Perturb each segment, and see which class of tokens suffers.

    MSPGT predicts that the diagonal dominates: perturbing the Local blocks hurts the tokens that
    depend on local context most, and so on. The interaction asks just that. Classes were chosen by
    losses from truncated contexts, and here losses rise from the whole prompt's: a class that is
    easy to hurt because its tokens were chosen to be well predicted (regression to the mean) is
    so under every segment, and a stronger segment hurts every class more. Neither moves the
    interaction: rows are divided by their means, then rows and columns are centered.

    Losses rise by rounding too, in half precision most: each token's rise under a change no larger
    than rounding is taken off.

    Noise and translation are shared out: each of a segment's n blocks gets the strength over the
    square root of n, so that long and short segments get the same total variance.

    Args:
        model: The model that ``classes`` were found with.
        prompts: The same prompts, in the same order.
        partition: Segments, as many as classes and in the same order, from near to far.
        classes: From :func:`~mspgt_lens.classify_tokens`.
        perturbation: What to do to a segment; by default covariance noise of strength 1.
        statistics: Of the residual stream; by default gathered from these prompts in one pass.
        skip_first: Tokens at the beginning of each prompt that are left alone.
        batch_size: Prompts per forward pass; by default a fixed number of tokens, or what fits.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        Loss increases in nats, ``[segment, class]``, with 95% intervals over groups, and the
        interaction.

    Raises:
        ValueError: If segments and classes differ in number, prompts are not those of the classes,
            or processes were given different arguments.
        CannotMeasure: If a class has fewer than 2 groups, all have fewer than 3, or a segment's
            perturbation raises no loss.
        RuntimeError: If another process of the group failed; says which one, and why.

    Example:
        >>> classes = ml.classify_tokens(model, prompts, n_tokens=400)
        >>> noise = ml.Perturbation("noise", strength=2.0)
        >>> table = ml.measure_dissociation(model, prompts, (3, 6), classes, perturbation=noise)
        >>> table.values.shape, table.interaction.p_value <= 1
        ((3, 3), True)
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        segments = as_segments(partition, adapter.n_layers)
        if len(segments) != len(classes.bands):
            raise ValueError(
                "partition must have as many segments as classes has bands "
                f"({len(classes.bands)}), got {len(segments)}"
            )
        chosen = Perturbation("noise", 1.0) if perturbation is None else perturbation
        batches = make_batches(adapter, prompts, skip_first=skip_first, batch_size=batch_size)
        arguments = {
            "segments": list(segments.items()),
            "classes": stable_hash(*(x.tobytes() for x in (classes.losses, classes.classes))),
            "perturbation": described(chosen),
            "skip_first": skip_first,
            "batch_size": batch_size,
        }
        agree(processes, adapter, batches, statistics, arguments)
        if statistics is None:
            statistics = residual_statistics(adapter, batches)
        rises = np.zeros((len(classes.classes), len(segments)))
        turns, is_shown = Turns(processes), progress and processes.rank == 0
        total = batches.n_prompts * (2 * len(segments) + 1) // processes.size
        with adapter.inference(), tqdm(total=total, desc="perturbing", disable=not is_shown) as bar:
            numbers = _numbers(batches, classes)
            check_resuming(adapter, batches)
            mine = tuple(batch for batch in batches if turns.is_mine(batch.tokens.numel()))

            def run(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
                index, wanted = _places(batch, classes, numbers)
                found = np.zeros((len(wanted), len(segments)))
                clean = CleanRun(adapter, batch)
                before = clean.losses(clean.scores)
                bar.update(batch.n_rows)
                for number, blocks in enumerate(segments.values()):
                    processes.check()
                    edits = perturbed(_shared(chosen, len(blocks)), statistics, blocks)(batch)
                    rise = clean.losses(clean.changed(edits)) - before
                    bar.update(batch.n_rows)
                    if rise.any():  # Else nothing changed, and no rounding was met.
                        rise -= clean.losses(clean.changed(rounding(blocks)(batch))) - before
                    found[:, number] = rise[index]
                    bar.update(batch.n_rows)
                return wanted, found

            for wanted, found in replace(batches, batches=mine).each(run, bar):
                rises[wanted] = found
        processes.sum_(rises)
    classed = classes.classes >= 0
    return _tabulate(
        rises[classed],
        classes.classes[classed],
        np.unique(classes.groups[classed], return_inverse=True)[1],
        model_name=adapter.name,
        perturbation=chosen.label,
        segments=segments,
        names=tuple(classes.bands),
        settings={
            "skip_first": skip_first,
            "threshold": classes.threshold,
            "seed": chosen.seed,
            "n_positions": batches.n_positions,
            "prompts_fingerprint": batches.fingerprint,
            "weights": adapter.weight_processing,
        },
    )


def _shared(perturbation: Perturbation, n_layers: int) -> Perturbation:
    if not perturbation.behavior.adds_energy:
        return perturbation
    return replace(perturbation, strength=perturbation.amount / n_layers**0.5)


def _numbers(batches: Batches, classes: TokenClasses) -> dict[tuple[int, int], int]:
    """Prompt and position of every classified token to its number; all are in the batches."""
    numbers = {
        (int(p), int(t)): i
        for i, (p, t) in enumerate(zip(classes.prompts, classes.positions, strict=True))
    }
    n_found = sum(len(_places(batch, classes, numbers)[0]) for batch in batches)
    if n_found < len(numbers):
        raise ValueError(
            f"prompts must be those of the classes: {len(numbers) - n_found} of {len(numbers)} "
            "classified tokens are not among the measured positions"
        )
    return numbers


def _places(
    batch: Batch, classes: TokenClasses, numbers: Mapping[tuple[int, int], int]
) -> tuple[Int[np.ndarray, " found"], Int[np.ndarray, " found"]]:
    """Where classified tokens are among a batch's measured positions, and their numbers."""
    index, wanted = [], []
    for i, (row, position) in enumerate(batch.next_known.nonzero().tolist()):
        number = numbers.get((batch.numbers[row], position + 1))
        if number is not None:
            if int(batch.tokens[row, position + 1]) != classes.tokens[number]:
                raise ValueError(_not_same(batch.numbers[row], position + 1))
            index.append(i)
            wanted.append(number)
    return np.array(index, dtype=np.int64), np.array(wanted, dtype=np.int64)


def _not_same(prompt: int, position: int) -> str:
    return (
        "prompts must be those of the classes, in the same order: they differ at position "
        f"{position} of prompt {prompt}"
    )


def _tabulate(
    rises: Float[np.ndarray, "token segment"],
    classes: Integer[np.ndarray, " token"],
    groups: Integer[np.ndarray, " token"],
    *,
    names: tuple[str, ...],
    **described: Any,
) -> Dissociation:
    n_segments = rises.shape[1]
    values, low, high = np.zeros((3, n_segments, len(names)))
    for index, name in enumerate(names):
        chosen = classes == index
        if len(np.unique(groups[chosen])) < 2:
            raise CannotMeasure(
                f"classes: {name!r} has {int(chosen.sum())} tokens, in fewer than 2 groups, so it "
                "has no interval: classify more tokens (n_tokens), or give more documents"
            )
        ends = cluster_interval(rises[chosen], groups[chosen])
        values[:, index], low[:, index], high[:, index] = ends
    return Dissociation(
        classes=names,
        values=values,
        low=low,
        high=high,
        relative=_relative(values),
        counts=np.bincount(classes, minlength=len(names)),
        interaction=interaction(rises, classes, groups),
        versions=package_versions(),
        **described,
    )


def interaction(
    rises: Float[np.ndarray, "token segment"],
    classes: Integer[np.ndarray, " token"],
    groups: Integer[np.ndarray, " token"],
) -> Estimate:
    """Whether each segment's perturbation hurts its own class of tokens in particular.

    The statistic is linearized over groups (jackknife pseudo-values); its interval is their t
    interval, and its p-value flips their signs.

    Args:
        rises: Loss increase of each token under each segment's perturbation, in nats.
        classes: Each token's class, 0 ... segments - 1.
        groups: Each token's group.

    Raises:
        ValueError: If there are fewer than 3 groups, a class is in one group only, or a row's mean
            is not above 0.
    """
    labels, index = np.unique(groups, return_inverse=True)
    n_classes = rises.shape[1]
    sums = np.zeros((len(labels), n_classes, n_classes))
    counts = np.zeros((len(labels), n_classes))
    np.add.at(sums, (index, classes), rises)
    sums = sums.swapaxes(1, 2)
    np.add.at(counts, (index, classes), 1.0)
    if len(labels) < 3:
        raise CannotMeasure(f"an interaction needs at least 3 groups, got {len(labels)}")

    def statistic(total: np.ndarray, n: np.ndarray) -> float:
        if not (n > 0).all():
            raise CannotMeasure("a class of tokens is in one group only: give more documents")
        table = _relative(total / n)
        # Rows have a mean of 1, so that centering rows and columns takes 1 off the diagonal's mean.
        return float(np.trace(table) / n_classes - 1.0)

    all_sums, all_counts = sums.sum(axis=0), counts.sum(axis=0)
    value = statistic(all_sums, all_counts)
    without = [statistic(all_sums - s, all_counts - c) for s, c in zip(sums, counts, strict=True)]
    pseudo = pseudo_values(np.array([value]), np.array(without)[:, None])
    mean = float(pseudo.mean())
    error = float(pseudo.std(ddof=1)) / len(labels) ** 0.5
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, len(labels) - 1)) * error
    return Estimate(
        value,
        min(value, mean - reach),
        max(value, mean + reach),
        "of the mean increase",
        _INTERACTION,
        p_value=float(sign_flip_p_values(pseudo)[0]),
    )


def _relative(table: Float[np.ndarray, "segment class"]) -> Float[np.ndarray, "segment class"]:
    means = table.mean(axis=1, keepdims=True)
    if not (means > 0).all():
        raise CannotMeasure(
            f"perturbing segment {int(np.argmin(means))} does not raise the loss (by "
            f"{float(means.min()):.3g} nats on average), so there are no proportions to compare: "
            "use a stronger perturbation="
        )
    shares: np.ndarray = table / means
    return shares
