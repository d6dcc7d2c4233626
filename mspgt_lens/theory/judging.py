"""Predictions as objects, and how what is found of one becomes a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float
from scipy import stats

from mspgt_lens.statistics import LEVEL
from mspgt_lens.theory.verdicts import Judgment, ModelResults, Verdict

SOURCE = "arXiv 2505.18244"
PUBLISHED: Mapping[str, str] = {
    "P1": f"two prominent boundaries in all of 8 Llama and Qwen models, 7B to 70B ({SOURCE}v3)",
    "P2": f"boundary positions predicted, with partial support; no figure ({SOURCE}v2)",
    "P3": f"CV 0.067 to 0.095 in Llama (strong), 0.465 to 0.726 in Qwen (weak) ({SOURCE}v3)",
    "P3 shares": f"strong architecture-specific variation; no figure ({SOURCE}v2)",
    "P4": f"up to 493 times between families, local segment, same perturbation ({SOURCE}v3)",
    "P4 segments": f"no figure for segments within a model ({SOURCE}v3)",
    "P5": f"local, intermediate and global interventions move lexical diversity, sentences and "
    f"discourse; no figure ({SOURCE}v1)",
    "P6": f"segments in the order local, intermediate, global; no figure ({SOURCE}v1)",
}
# The fewest models for which an interval over models is worth taking.
MIN_MODELS = 4
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Finding:
    """What measured results say about a prediction, before it is held against a threshold.

    Attributes:
        estimate: The statistic with its 95% interval ``(value, low, high)``; a number alone, of
            models too few for an interval, which is shown and judges nothing; or None.
        words: Half a sentence that says what was found.
        n_models: Models that it rests on.
        short: What is missing for a verdict, in half a sentence; None if nothing is.
        part: What it is about, where a prediction is judged part by part ("Llama").
    """

    estimate: Interval | float | None
    words: str
    n_models: int
    short: str | None = None
    part: str = ""


@dataclass(frozen=True)
class Prediction:
    """One prediction of the theory, and how measured results are held against it.

    Attributes:
        name: Short name, such as ``"P1 existence"``.
        statement: The prediction, as it is tested.
        quantity: What the statistic and the threshold are, with their unit.
        threshold: What the whole interval must lie above for support, and below for refutation.
        published: What was published, with its source.
        find: From the results that hold what is needed (there may be none) to what they say; parts
            that are judged one by one come as several findings.
        needs: Fields of :class:`~mspgt_lens.theory.ModelResults` without which a model is left out.
        below: The prediction lies below the threshold instead.
    """

    name: str
    statement: str
    quantity: str
    threshold: float
    published: str
    find: Callable[[Sequence[ModelResults]], Finding | Sequence[Finding]]
    needs: tuple[str, ...] = ()
    below: bool = False

    def __post_init__(self) -> None:
        known = [item.name for item in fields(ModelResults)]
        if not set(self.needs) <= set(known):
            raise ValueError(
                f"Prediction: needs must be fields of ModelResults ({', '.join(known)}), got "
                f"{', '.join(self.needs)} in {self.name!r}"
            )

    def verdicts(self, results: Sequence[ModelResults]) -> tuple[Verdict, ...]:
        """One verdict for every finding.

        Args:
            results: Measured models; those that lack what is needed are left out.

        Returns:
            The verdicts, in the order of the findings.
        """
        measured = [r for r in results if all(_holds(getattr(r, name)) for name in self.needs)]
        findings = self.find(measured)
        parts = (findings,) if isinstance(findings, Finding) else findings
        return tuple(self.judge(finding) for finding in parts)

    def judge(self, finding: Finding) -> Verdict:
        """The verdict of a finding: supported or refuted only by the whole interval.

        Args:
            finding: What was found.

        Returns:
            The verdict.
        """
        judged: Judgment = "inconclusive"
        if finding.short or not isinstance(finding.estimate, tuple):
            reason = f"{finding.words}; {finding.short}" if finding.short else finding.words
        else:
            _, low, high = finding.estimate
            above, under = low > self.threshold, high < self.threshold
            sides: dict[Judgment, bool] = {
                "supported": under if self.below else above,
                "refuted": above if self.below else under,
            }
            judged = next((side for side, holds in sides.items() if holds), "inconclusive")
            reason = finding.words
            if judged == "inconclusive":
                reason += f"; the interval holds the threshold of {self.threshold:g}"
        value, interval = (
            (finding.estimate[0], finding.estimate[1:])
            if isinstance(finding.estimate, tuple)
            else (finding.estimate, None)
        )
        return Verdict(
            ", ".join(filter(None, (self.name, finding.part))),
            self.statement,
            self.quantity,
            value,
            interval,
            self.threshold,
            self.published,
            judged,
            f"{reason[0].upper()}{reason[1:]}.",
            finding.n_models,
        )


def _holds(value: object) -> bool:
    """Whether something was measured: no None, and no empty mapping."""
    return value is not None and value != {}


def too_few(n: int, needed: int, what: str) -> str | None:
    return None if n >= needed else f"at least {needed} {what} are needed (here: {n})"


def by_family(results: Sequence[ModelResults]) -> dict[str, list[ModelResults]]:
    families: dict[str, list[ModelResults]] = {}
    for model in results:
        if model.family is not None:
            families.setdefault(model.family, []).append(model)
    return families


def over_models(values: Float[np.ndarray, " model"]) -> Interval:
    """Mean over models with its 95% t interval.

    Args:
        values: One value per model, shape ``[model]``.

    Returns:
        ``(mean, low, high)``.
    """
    mean = float(values.mean())
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return mean, mean - float(reach), mean + float(reach)
