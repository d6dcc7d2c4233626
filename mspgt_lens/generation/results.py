"""What interventions do to generated text: the result, and the statistics of paired texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mspgt_lens.contract import Result, Rows, counted, named
from mspgt_lens.statistics import (
    SIGNIFICANCE,
    bootstrap_interval,
    cliffs_delta,
    holm,
    sign_flip_p_values,
)

MIN_GROUPS = 3


@dataclass(frozen=True, eq=False, repr=False)
class GenerationEffects(Result):
    """Properties of texts written under interventions, against those of the same prompts without.

    A text's property may be undefined (the mean length of no sentence). Pairs with such a text are
    left out of that property, and counted; an effect with fewer than 3 groups left is undefined,
    and all its numbers are NaN.

    Attributes:
        model_name: The model's name.
        perturbations: Label of each perturbation.
        segments: Segment name to its blocks.
        metrics: Name of each property to the scale whose interventions move it, as MSPGT's first
            version predicts: ``"local"`` lexical diversity, ``"intermediate"`` sentence structure
            and length, ``"global"`` discourse coherence.
        left_out: Properties that could not be measured here, and the command that mends it.
        clean: Mean of each property without intervention, ``[metric]``.
        differences: Mean of perturbed minus clean, ``[perturbation, segment, metric]``.
        low: Lower ends of their 95% bootstrap intervals over groups.
        high: Upper ends.
        deltas: Cliff's delta, the chance that a perturbed text has more of the property than a
            clean one less the chance that it has less, ``[perturbation, segment, metric]``.
        delta_low: Lower ends of their 95% intervals over groups.
        delta_high: Upper ends.
        p_values: Of no difference, by flipping the signs of whole groups, after Holm's correction
            over all defined entries, ``[perturbation, segment, metric]``.
        n_pairs: Pairs with the property defined in both texts, of ``len(prompts)``.
        controls: Cliff's delta under random block sets as large as the segment,
            ``[perturbation, segment, draw, metric]``. Segments of one size share their sets.
        strengths: Strength of each perturbation on each segment, ``[perturbation, segment]``.
        kl: How far it moves predictions there, nats per token, ``[perturbation, segment]``.
        control_kl: The same of the controls, ``[perturbation, segment, draw]``.
        prompts: The prompts.
        groups: Number of each prompt's group, ``[prompt]``.
        clean_texts: Their continuations without intervention.
        texts: Their continuations under each perturbation (outer) of each segment (inner).
        clean_measured: Properties of ``clean_texts``, ``[prompt, metric]``; NaN: undefined.
        measured: Properties of ``texts``, ``[perturbation, segment, prompt, metric]``; NaN:
            undefined.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    nan_is_undefined = True

    model_name: str
    perturbations: tuple[str, ...]
    segments: Mapping[str, tuple[int, ...]]
    metrics: Mapping[str, str]
    left_out: Mapping[str, str]
    clean: Float[np.ndarray, " metric"]
    differences: Float[np.ndarray, "perturbation segment metric"]
    low: Float[np.ndarray, "perturbation segment metric"]
    high: Float[np.ndarray, "perturbation segment metric"]
    deltas: Float[np.ndarray, "perturbation segment metric"]
    delta_low: Float[np.ndarray, "perturbation segment metric"]
    delta_high: Float[np.ndarray, "perturbation segment metric"]
    p_values: Float[np.ndarray, "perturbation segment metric"]
    n_pairs: Int[np.ndarray, "perturbation segment metric"]
    controls: Float[np.ndarray, "perturbation segment draw metric"]
    strengths: Float[np.ndarray, "perturbation segment"]
    kl: Float[np.ndarray, "perturbation segment"]
    control_kl: Float[np.ndarray, "perturbation segment draw"]
    prompts: tuple[str, ...]
    groups: Int[np.ndarray, " prompt"]
    clean_texts: tuple[str, ...]
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    clean_measured: Float[np.ndarray, "prompt metric"]
    measured: Float[np.ndarray, "perturbation segment prompt metric"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per perturbation, segment and property.

        Returns:
            Columns ``model, quantity, segment, perturbation, predicted, clean, value, low, high,
            unit, p_value, delta, delta_low, delta_high, n_pairs, n_undefined, control, control_low,
            control_high, strength, kl``. ``quantity`` is the property and ``value`` its difference;
            ``predicted`` says whether MSPGT's first version expects an effect here; ``control`` is
            the mean delta of the random block sets, ``control_low`` and ``control_high`` their
            least and greatest (missing without controls).
        """
        rows = []
        for i, perturbation in enumerate(self.perturbations):
            for j, segment in enumerate(self.segments):
                for k, (metric, scale) in enumerate(self.metrics.items()):
                    drawn = self.controls[i, j, :, k]
                    drawn = drawn[np.isfinite(drawn)]
                    any_drawn = len(drawn) > 0
                    rows.append(
                        {
                            "model": self.model_name,
                            "quantity": metric,
                            "segment": segment,
                            "perturbation": perturbation,
                            "predicted": scale == segment,
                            "clean": self.clean[k],
                            "value": self.differences[i, j, k],
                            "low": self.low[i, j, k],
                            "high": self.high[i, j, k],
                            "unit": "the property's own",
                            "p_value": self.p_values[i, j, k],
                            "delta": self.deltas[i, j, k],
                            "delta_low": self.delta_low[i, j, k],
                            "delta_high": self.delta_high[i, j, k],
                            "n_pairs": self.n_pairs[i, j, k],
                            "n_undefined": len(self.prompts) - self.n_pairs[i, j, k],
                            "control": drawn.mean() if any_drawn else np.nan,
                            "control_low": drawn.min() if any_drawn else np.nan,
                            "control_high": drawn.max() if any_drawn else np.nan,
                            "strength": self.strengths[i, j],
                            "kl": self.kl[i, j],
                        }
                    )
        return pd.DataFrame(rows)

    def heading(self) -> str:
        """The model, how many texts, and what was done."""
        return (
            f"GenerationEffects{named(self.model_name)}: {counted(len(self.prompts), 'text')} "
            f"under {counted(len(self.perturbations), 'perturbation')} of "
            f"{counted(len(self.segments), 'segment')}"
        )

    def rows(self) -> Rows:
        """The largest effect of each property."""
        rows: Rows = [("property", "predicted for", "largest delta", "under", "p (Holm)")]
        table = self.to_dataframe().dropna(subset="delta")
        for metric, scale in self.metrics.items():
            own = table[table["quantity"] == metric]
            if own.empty:
                rows.append((metric, scale, "undefined", "", ""))
                continue
            top = own.iloc[int(own["delta"].abs().argmax())]
            under = f"{top['perturbation']}, {top['segment']}"
            rows.append((metric, scale, f"{top['delta']:.2f}", under, f"{top['p_value']:.3g}"))
        return rows

    def findings(self) -> list[str]:
        """How many of the predicted effects show, and how many of those not predicted."""
        table = self.to_dataframe()
        tested = table[table["p_value"].notna()]
        lines = []
        for predicted, words in (
            (True, "Effects predicted by MSPGT's first version"),
            (False, "Other effects"),
        ):
            part = tested[tested["predicted"] == predicted]
            shown = int((part["p_value"] < SIGNIFICANCE).sum())
            size = f"; mean |delta| {part['delta'].abs().mean():.2f}" if len(part) else ""
            lines.append(
                f"{words}: {shown} of {len(part)} significant (p < 0.05 after Holm){size}."
            )
        return lines


def compare_texts(
    clean: Float[np.ndarray, "prompt metric"],
    changed: Float[np.ndarray, "condition prompt metric"],
    groups: Int[np.ndarray, " prompt"],
    *,
    n_draws: int = 2000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Effects of every condition on every property, from paired texts.

    Args:
        clean: Properties without intervention; NaN where undefined.
        changed: Properties of the same prompts under each condition.
        groups: The group of each prompt.
        n_draws: Bootstrap draws of each interval.
        seed: Of bootstrap draws and sign flips.

    Returns:
        ``differences, low, high, deltas, delta_low, delta_high, p_values`` (Holm-corrected over all
        defined entries) and ``n_pairs``, each ``[condition, metric]``.
    """
    shape = len(changed), clean.shape[1]
    names = ("differences", "low", "high", "deltas", "delta_low", "delta_high", "p_values")
    tables = {name: np.full(shape, np.nan) for name in names}
    n_pairs = np.zeros(shape, dtype=np.int64)
    for entry in np.ndindex(shape):
        after, before, inside = _defined_pairs(changed[entry[0], :, entry[1]], clean[:, entry[1]])
        n_pairs[entry] = len(after)
        own = groups[inside]
        if len(np.unique(own)) < MIN_GROUPS:
            continue
        difference = (after - before)[:, None]
        interval = bootstrap_interval(difference, own, n_draws=n_draws, seed=seed)
        numbers = [float(end[0]) for end in interval] + list(cliffs_delta(after, before, own))
        numbers.append(float(sign_flip_p_values(difference, own, seed=seed)[0]))
        for name, number in zip(names, numbers, strict=True):
            tables[name][entry] = number
    tested = np.isfinite(tables["p_values"])
    if tested.any():
        tables["p_values"][tested] = holm(tables["p_values"][tested])
    return tables | {"n_pairs": n_pairs}


def text_deltas(
    clean: Float[np.ndarray, "prompt metric"],
    changed: Float[np.ndarray, "condition prompt metric"],
) -> Float[np.ndarray, "condition metric"]:
    """Cliff's delta alone, for controls; NaN where no pair is defined."""
    deltas = np.full((len(changed), clean.shape[1]), np.nan)
    for condition, metric in np.ndindex(deltas.shape):
        after, before, _ = _defined_pairs(changed[condition, :, metric], clean[:, metric])
        if len(after):
            deltas[condition, metric] = np.sign(after[:, None] - before[None, :]).mean()
    return deltas


def _defined_pairs(
    after: Float[np.ndarray, " prompt"], before: Float[np.ndarray, " prompt"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inside = np.isfinite(after) & np.isfinite(before)
    return after[inside], before[inside], inside
