"""Measured results of one model, verdicts on predictions, and the table of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import pandas as pd

from mspgt_lens.contract import Result, Rows, counted, interval, named, tidy
from mspgt_lens.estimates import Estimate
from mspgt_lens.partition import ScalePartition
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.theory.place_comparison import PlaceComparison

Judgment = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True, eq=False, repr=False)
class ModelResults(Result):
    """What was measured on one model, for predictions and comparisons.

    Attributes:
        profile: The model's layer profile.
        partition: Its partition into three segments.
        family: What it shares with other models ("Llama"), or None.
        n_parameters: Its size, or None where it is not known.
        random_weights: The partition of its twin with random weights, or None.
        shuffled_tokens: The partition from shuffled text, or None.
        brittleness: Noise shape (``"covariance"``, ``"isotropic"``) to segment to the logarithm of
            the segment's brittleness with its interval, in the same units for all models (see
            ``Brittleness.log_brittleness``).
        dissociation: How much more the diagonal of its table of segments by token classes holds
            than both on their own explain (``Dissociation.interaction``), or None.
        random_profile: The layer profile of its twin with random weights, or None.
        block_effects: What becomes of predictions without each of its blocks, or None.
    """

    profile: LayerProfile
    partition: ScalePartition
    family: str | None = None
    n_parameters: int | None = None
    random_weights: ScalePartition | None = None
    shuffled_tokens: ScalePartition | None = None
    brittleness: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    dissociation: Estimate | None = None
    random_profile: LayerProfile | None = None
    block_effects: BlockEffects | None = None

    def __post_init__(self) -> None:
        if self.partition.n_layers != self.profile.n_layers:
            raise ValueError(
                f"ModelResults: partition is of {self.partition.n_layers} blocks, but the profile "
                f"of {self.profile.model_name} has {self.profile.n_layers}"
            )
        if len(self.partition.boundaries) != 2:
            raise ValueError(
                "ModelResults: partition must place two boundaries, got "
                f"{self.partition.boundaries} for {self.profile.model_name}; leave n_boundaries of "
                "detect_scales at None"
            )
        if self.n_parameters is not None and self.n_parameters < 1:
            raise ValueError(
                f"ModelResults: n_parameters must be positive or None, got {self.n_parameters}"
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.profile.model_name

    @property
    def depths(self) -> tuple[float, ...]:
        """Boundaries as shares of the depth."""
        return tuple(b / self.partition.n_layers for b in self.partition.boundaries)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the profile and the partition, each once."""
        return tuple(dict.fromkeys((*self.profile.warnings, *self.partition.warnings)))

    def heading(self) -> str:
        """The model, its family and its size."""
        size = "" if self.n_parameters is None else f", {self.n_parameters:,} parameters"
        family = "" if self.family is None else f", family {self.family}"
        return f"ModelResults{named(self.name)}{family}{size}"

    def findings(self) -> list[str]:
        """The partition's finding, and the dissociation's."""
        lines = self.partition.findings()
        if self.dissociation is not None:
            lines.append(f"Interaction of segments and token classes: {self.dissociation}.")
        return lines

    def to_dataframe(self) -> pd.DataFrame:
        """Curves, boundaries and effects: one row per number.

        Returns:
            Columns ``result, model, family, quantity, scale, segment, shape, site, value, low,
            high, unit``.
        """
        curves = self.profile.to_dataframe().assign(result="profile")
        rows = [
            (
                "partition",
                "boundary",
                segment,
                "",
                float(boundary),
                float(low),
                float(high),
                "blocks",
            )
            for segment, boundary, (low, high) in zip(
                list(self.partition.segments)[1:],
                self.partition.boundaries,
                self.partition.intervals,
                strict=True,
            )
        ]
        rows += [
            ("brittleness", "log_brittleness", segment, shape, e.value, e.low, e.high, e.unit)
            for shape, by_segment in self.brittleness.items()
            for segment, e in by_segment.items()
        ]
        if self.dissociation is not None:
            e = self.dissociation
            rows.append(("dissociation", "interaction", "", "", e.value, e.low, e.high, e.unit))
        names = ["result", "quantity", "segment", "shape", "value", "low", "high", "unit"]
        table = pd.concat([curves, pd.DataFrame(rows, columns=names)], ignore_index=True)
        table = table.assign(model=self.name, family=self.family).astype({"site": "Int64"})
        texts = ["scale", "segment", "shape"]
        table[texts] = table[texts].fillna("")
        first = ["result", "model", "family", "quantity", "scale", "segment", "shape", "site"]
        return table[[*first, "value", "low", "high", "unit"]]


@dataclass(frozen=True, eq=False, repr=False)
class Verdict(Result):
    """What measured results say about one prediction.

    Attributes:
        name: Short name, such as ``"P1 existence"``.
        statement: The prediction, as it was tested.
        quantity: What ``statistic``, ``interval`` and ``threshold`` are, with their unit.
        statistic: The measured value; None where there is none.
        interval: Its 95% interval over models; None where there is none, or too few models for one.
        threshold: What the interval is held against.
        published: What was published, with its source.
        verdict: ``"supported"`` or ``"refuted"`` only if the whole interval lies on that side of
            the threshold; ``"inconclusive"`` otherwise.
        reason: One sentence.
        n_models: Models that it rests on.
        theory: Whose prediction it is.
        claims: Question to the answer that follows if the prediction is true.
    """

    name: str
    statement: str
    quantity: str
    statistic: float | None
    interval: tuple[float, float] | None
    threshold: float
    published: str
    verdict: Judgment
    reason: str
    n_models: int
    theory: str = "MSPGT"
    claims: Mapping[str, str] = field(default_factory=dict)

    def heading(self) -> str:
        """The prediction's name, and what is made of it."""
        return f"Verdict on {self.name}: {self.verdict}"

    def findings(self) -> list[str]:
        """The prediction, what was measured and why it is judged so."""
        measured = "Not measured"
        if self.statistic is not None:
            figure = f"{self.statistic:.3g}"
            if self.interval is not None:
                figure = interval(self.statistic, *self.interval)
            measured = f"Measured: {figure}, {self.quantity}"
        against = f"held against {self.threshold:g}; published: {self.published}"
        return [self.statement, f"{measured}; {against}.", self.reason]

    def to_dataframe(self) -> pd.DataFrame:
        """One row, as in :meth:`Verdicts.to_dataframe`."""
        low, high = self.interval or (np.nan, np.nan)
        return tidy(
            {
                "prediction": self.name,
                "statement": self.statement,
                "quantity": self.quantity,
                "value": np.nan if self.statistic is None else self.statistic,
                "low": low,
                "high": high,
                "threshold": self.threshold,
                "published": self.published,
                "verdict": self.verdict,
                "reason": self.reason,
                "n_models": self.n_models,
                "theory": self.theory,
            },
            1,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Verdicts(Result):
    """Verdicts on all predictions, in their order.

    Attributes:
        verdicts: The verdicts; iterate, or take one by its name.
        models: Names of the models.
        thresholds: The thresholds that were set.
        versions: Package versions that the first model's profile was made with.
        places: Model to how near its boundaries are to the places of every theory.
    """

    verdicts: tuple[Verdict, ...]
    models: tuple[str, ...]
    thresholds: Mapping[str, float]
    versions: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, PlaceComparison] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, name: str) -> Verdict:
        """The verdict of this name.

        Raises:
            KeyError: If there is none; the message lists the names.
        """
        for verdict in self.verdicts:
            if verdict.name == name:
                return verdict
        raise KeyError(f"no verdict {name!r}; there are {', '.join(v.name for v in self.verdicts)}")

    @property
    def theories(self) -> dict[str, tuple[Verdict, ...]]:
        """Theory to its verdicts."""
        names = dict.fromkeys(verdict.theory for verdict in self)
        return {name: tuple(v for v in self if v.theory == name) for name in names}

    def contradictions(self) -> pd.DataFrame:
        """Questions that two theories answer differently, and what became of the answers.

        Returns:
            One row per answer, question by question: ``question, theory, prediction, answer,
            verdict``. No rows where the theories that were judged agree.
        """
        answers = [
            {
                "question": question,
                "theory": verdict.theory,
                "prediction": verdict.name,
                "answer": answer,
                "verdict": verdict.verdict,
            }
            for verdict in self
            for question, answer in verdict.claims.items()
        ]
        columns = ["question", "theory", "prediction", "answer", "verdict"]
        table = pd.DataFrame(answers, columns=columns)
        asked = table.groupby("question")
        contested = (asked["theory"].transform("nunique") > 1) & (
            asked["answer"].transform("nunique") > 1
        )
        return table[contested].sort_values("question", kind="stable", ignore_index=True)

    def heading(self) -> str:
        """How many predictions, and on how many models."""
        return (
            f"Verdicts on {counted(len(self), 'prediction')} from "
            f"{counted(len(self.models), 'model')}"
        )

    def rows(self) -> Rows:
        """How many are judged how."""
        judged: tuple[Judgment, ...] = get_args(Judgment)
        names = {word: [v.name for v in self if v.verdict == word] for word in judged}
        shown = ((word, str(len(n)), ", ".join(n)) for word, n in names.items() if n)
        return [("verdict", "predictions", "which"), *shown]

    def findings(self) -> list[str]:
        """One line per prediction."""
        return [f"{v.name}: {v.verdict}. {v.reason}" for v in self.verdicts]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prediction.

        Returns:
            Columns ``prediction, statement, quantity, value, low, high, threshold, published,
            verdict, reason, n_models, theory``; ``value``, ``low`` and ``high`` are missing where
            nothing was measured, or too few models for an interval.
        """
        return pd.concat([v.to_dataframe() for v in self.verdicts], ignore_index=True)
