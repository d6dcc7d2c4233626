"""Predictions as objects, and how what is found of one becomes a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

from mspgt_lens.statistics import LEVEL
from mspgt_lens.theory.verdicts import Judgment, ModelResults, Verdict

MSPGT = "MSPGT"
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
# What several theories answer, each in its own way.
HOW_MANY = "How many boundaries are there, and where?"
WIDE_CONTEXT = "Where is the wide context used?"
MOST_NEEDED = "Which blocks are needed most?"
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
        theory: Whose prediction it is; verdicts are grouped by it.
        signals: Signals of the profile without which a model is left out; the reason then says so.
            Where ``needs`` names ``random_profile``, that must hold them, too.
        claims: Question to the answer that follows if it is true. Theories that answer a question
            differently contradict one another.
    """

    name: str
    statement: str
    quantity: str
    threshold: float
    published: str
    find: Callable[[Sequence[ModelResults]], Finding | Sequence[Finding]]
    needs: tuple[str, ...] = ()
    below: bool = False
    theory: str = "one's own"
    signals: tuple[str, ...] = ()
    claims: Mapping[str, str] = field(default_factory=dict)

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
        measured = self.measured(results)
        findings = self.find(measured)
        parts = (findings,) if isinstance(findings, Finding) else findings
        if self.signals and len(measured) < len(results):
            lacking = len(results) - len(measured)
            missing = " and ".join((*self.needs, *self.signals))
            left_out = f"; {lacking} of {len(results)} models hold no {missing}"
            parts = [replace(one, words=one.words + left_out) for one in parts]
        return tuple(self.judge(finding) for finding in parts)

    def measured(self, results: Sequence[ModelResults]) -> list[ModelResults]:
        """The models that hold what is needed.

        Args:
            results: Measured models.

        Returns:
            Those that are not left out.
        """

        def holds(result: ModelResults) -> bool:
            profiles = [result.profile]
            if "random_profile" in self.needs and result.random_profile is not None:
                profiles.append(result.random_profile)
            return all(_holds(getattr(result, name)) for name in self.needs) and all(
                set(self.signals) <= set(profile.signals) for profile in profiles
            )

        return [result for result in results if holds(result)]

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
            self.theory,
            self.claims,
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


def one_by_one_or_together(
    statistics: Mapping[str, Interval | str], words: Callable[[float], str]
) -> Sequence[Finding]:
    """Findings of a statistic that each model has on its own, with its interval over groups.

    From ``MIN_MODELS`` models on, one finding whose interval is over models; of fewer, one finding
    each, whose interval is over that model's groups of prompts, so that it speaks of it alone.

    Args:
        statistics: Model to its statistic with the interval, or to why it has none.
        words: From the statistic's value to half a sentence.
    """
    known = {name: given for name, given in statistics.items() if not isinstance(given, str)}
    if len(known) >= MIN_MODELS:
        estimate = over_models(np.array([value for value, *_ in known.values()]))
        why = sorted({given for given in statistics.values() if isinstance(given, str)})
        left_out = f"; {len(statistics) - len(known)} models left out: {', '.join(why)}"
        return [Finding(estimate, words(estimate[0]) + left_out * bool(why), len(known))]
    if not statistics:
        return [Finding(None, "no model was measured", 0)]
    alone = len(statistics) == 1
    about = ", by the groups of prompts of this one model" if alone else ""
    return [
        Finding(None, given, 1, part="" if alone else name)
        if isinstance(given, str)
        else Finding(given, f"{words(given[0])}{about}", 1, part="" if alone else name)
        for name, given in statistics.items()
    ]


def share_interval(count: int, n: int) -> tuple[float, float]:
    """Of a share of models (Clopper & Pearson 1934)."""
    ends = stats.binomtest(count, n).proportion_ci(LEVEL)
    return float(ends.low), float(ends.high)


def models_for(share: float) -> int:
    """The fewest models that can support or refute that more than a share of them do something."""
    return int(np.ceil(np.log((1 - LEVEL) / 2) / np.log(max(share, 1 - share))))


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
