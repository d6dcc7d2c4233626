"""How a statistic becomes a verdict: the published values, the fewest models, the two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def judge(
    name: str,
    statement: str,
    quantity: str,
    estimate: Interval | float | None,
    threshold: float,
    published: str,
    words: str,
    n_models: int,
    short: str | None,
    *,
    below: bool = False,
) -> Verdict:
    """The verdict of an interval against a threshold; ``below``: the prediction lies under it.

    A number alone, of models too few for an interval, is shown and judges nothing.
    """
    judged: Judgment = "inconclusive"
    if short or not isinstance(estimate, tuple):
        reason = f"{words}; {short}"
    else:
        _, low, high = estimate
        sides: dict[Judgment, bool] = {
            "supported": high < threshold if below else low > threshold,
            "refuted": low > threshold if below else high < threshold,
        }
        judged = next((side for side, holds in sides.items() if holds), "inconclusive")
        reason = words
        if judged == "inconclusive":
            reason += f"; the interval holds the threshold of {threshold:g}"
    reason = f"{reason[0].upper()}{reason[1:]}."
    value, interval = (
        (estimate[0], estimate[1:]) if isinstance(estimate, tuple) else (estimate, None)
    )
    return Verdict(
        name, statement, quantity, value, interval, threshold, published, judged, reason, n_models
    )


def too_few(n: int, needed: int, what: str) -> str | None:
    return None if n >= needed else f"at least {needed} {what} are needed (here: {n})"


def by_family(results: Sequence[ModelResults]) -> dict[str, list[ModelResults]]:
    families: dict[str, list[ModelResults]] = {}
    for one in results:
        if one.family is not None:
            families.setdefault(one.family, []).append(one)
    return families


def over_models(values: Float[np.ndarray, " model"]) -> Interval:
    """Mean over models with its 95% t interval."""
    mean = float(values.mean())
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return mean, mean - float(reach), mean + float(reach)
