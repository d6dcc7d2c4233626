"""The predictions about effects and information: brittleness, dissociation and order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from mspgt_lens.partition import SCALES
from mspgt_lens.statistics import LEVEL
from mspgt_lens.theory.dominance import MIN_FAMILY
from mspgt_lens.theory.judging import (
    MIN_MODELS,
    MOST_NEEDED,
    MSPGT,
    PUBLISHED,
    WIDE_CONTEXT,
    Finding,
    Interval,
    Prediction,
    by_family,
    over_models,
    too_few,
)
from mspgt_lens.theory.verdicts import ModelResults

SHAPES = ("covariance", "isotropic")


def brittleness_between_families(shape: str, *, ratio: float = 10.0) -> Prediction:
    """P4: the local segment's brittleness differs widely between families.

    The statistic is the largest ratio of two families' mean brittleness (geometric over models);
    its interval holds for all pairs at once (Bonferroni), with the spread of models within
    families as the error.

    Args:
        shape: Noise shape, ``"covariance"`` or ``"isotropic"``.
        ratio: The ratio that must be reached.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        measured = [r for r in results if "local" in r.brittleness.get(shape, {})]
        families = {f: m for f, m in by_family(measured).items() if len(m) >= MIN_FAMILY}
        estimate: Interval | None = None
        words = f"{len(families)} families have {MIN_FAMILY} models with brittleness"
        short: str | None = f"at least 2 families of {MIN_FAMILY} models are needed"
        if len(families) >= 2:
            short = None
            logs = {
                f: np.array([r.brittleness[shape]["local"].value for r in m])
                for f, m in families.items()
            }
            most, least, estimate = _largest_ratio(logs)
            factor = f"by a factor of {estimate[0]:.3g}"
            words = f"{most} is the most brittle and {least} the least, {factor}"
        n_models = sum(len(m) for m in families.values()) or len(measured)
        return Finding(estimate, words, n_models, short)

    return Prediction(
        name=f"P4 brittleness between families, {shape} noise",
        statement=(
            f"The local segment's brittleness under {shape} noise differs at least {ratio:g} times "
            "between families."
        ),
        quantity="largest ratio between two families",
        threshold=ratio,
        published=PUBLISHED["P4"],
        find=find,
        needs=("brittleness",),
        theory=MSPGT,
    )


def brittleness_between_segments(shape: str, *, ratio: float = 2.0) -> Prediction:
    """P4: the local segment is the most brittle.

    The statistic is the local segment's brittleness over the geometric mean of the other two,
    averaged over models in logarithms.

    Args:
        shape: Noise shape, ``"covariance"`` or ``"isotropic"``.
        ratio: The ratio that must be reached.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        measured = [
            r.brittleness[shape]
            for r in results
            if set(SCALES) <= set(r.brittleness.get(shape, {}))
        ]
        logs = np.array([[b[s].value for s in SCALES] for b in measured]).reshape(-1, len(SCALES))
        estimate: Interval | float | None = None
        words = "no interval over models"
        short = too_few(len(logs), MIN_MODELS, "models with brittleness")
        apart = logs[:, 0] - logs[:, 1:].mean(axis=1)
        if not short:
            mean, low, high = np.exp(over_models(apart))
            estimate = float(mean), float(low), float(high)
            words = f"the local segment is {mean:.3g} times as brittle as the others"
        elif len(logs):
            estimate = float(np.exp(apart.mean()))
        return Finding(estimate, words, len(logs), short)

    return Prediction(
        name=f"P4 brittleness between segments, {shape} noise",
        statement=(
            f"The local segment is at least {ratio:g} times as brittle under {shape} noise as the "
            "others."
        ),
        quantity="ratio of the local segment to the others",
        threshold=ratio,
        published=PUBLISHED["P4 segments"],
        find=find,
        needs=("brittleness",),
        theory=MSPGT,
        claims={MOST_NEEDED: "those of the local segment"},
    )


def dissociation(*, excess: float = 0.1) -> Prediction:
    """P5: perturbing a segment hurts most the tokens that depend on its own scale.

    The statistic is the interaction of segments and token classes: how much more the diagonal of
    the 3 x 3 table of loss increases holds, once segments and classes differ as a whole, as a share
    of the mean increase; averaged over models.

    Args:
        excess: What it must exceed.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        values = np.array([r.dissociation.value for r in results if r.dissociation is not None])
        estimate: Interval | float | None = None
        words = "no interval over models"
        short = too_few(len(values), MIN_MODELS, "models with a table of token classes")
        if not short:
            estimate = over_models(values)
            words = (
                f"the diagonal holds {100 * estimate[0]:.0f}% of the mean increase more than "
                "segments and token classes on their own explain"
            )
        elif len(values):
            estimate = float(values.mean())
        return Finding(estimate, words, len(values), short)

    return Prediction(
        name="P5 dissociation",
        statement=(
            "Perturbing a segment raises the loss most for tokens that depend on its own scale."
        ),
        quantity="excess of the diagonal, share of the mean increase",
        threshold=excess,
        published=PUBLISHED["P5"],
        find=find,
        needs=("dissociation",),
        theory=MSPGT,
    )


def order(*, gap: float = 0.05) -> Prediction:
    """P6: predicted information reaches half its maximum scale by scale, local first.

    The statistic is the smaller of the two mean gaps between successive scales, in shares of the
    depth; its interval holds for both at once.

    Args:
        gap: How much deeper each scale must come than the one before.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        halves = [
            [r.profile.predicted[scale].half_depth() for scale in SCALES]
            for r in results
            if _bands(r)
        ]
        known = np.array([[e.value for e in row if e] for row in halves if all(row)])
        known = known.reshape(-1, len(SCALES))
        estimate: Interval | float | None = None
        words = f"{len(known)} of {len(results)} models have all three curves above 0"
        short = too_few(len(known), MIN_MODELS, "models with all three curves above 0")
        if not short:
            gaps = np.diff(known, axis=1)
            mean = gaps.mean(axis=0)
            reach = gaps.std(axis=0, ddof=1) / np.sqrt(len(gaps))
            tail = (1 - LEVEL) / 2
            # Below, each end holds by itself; above, the least of two ends has two ways to err.
            down, up = (stats.t.ppf(1 - t, len(gaps) - 1) for t in (tail, tail / 2))
            estimate = (
                float(mean.min()),
                float((mean - down * reach).min()),
                float((mean + up * reach).min()),
            )
            places = ", ".join(
                f"{scale} {100 * depth:.0f}%"
                for scale, depth in zip(SCALES, known.mean(axis=0), strict=True)
            )
            words = f"half of the maximum is reached at {places} of the depth"
        elif len(known):
            estimate = float(np.diff(known, axis=1).mean(axis=0).min())
        return Finding(estimate, words, len(known), short)

    return Prediction(
        name="P6 order",
        statement=(
            "Predicted information reaches half its maximum at the local scale first, then at the "
            "intermediate, then at the global."
        ),
        quantity="smaller gap between successive scales, share of the depth",
        threshold=gap,
        published=PUBLISHED["P6"],
        find=find,
        theory=MSPGT,
        claims={WIDE_CONTEXT: "in the last segment"},
    )


def _largest_ratio(logs: Mapping[str, np.ndarray]) -> tuple[str, str, Interval]:
    """The two families farthest apart, and their ratio with an interval for all pairs at once."""
    freedom = sum(len(v) for v in logs.values()) - len(logs)
    variance = sum(float(((v - v.mean()) ** 2).sum()) for v in logs.values()) / freedom
    pairs = list(itertools.combinations(logs, 2))
    quantile = stats.t.ppf(1 - (1 - LEVEL) / 2 / len(pairs), freedom)
    gaps = []
    for first, second in pairs:
        gap = float(logs[first].mean() - logs[second].mean())
        reach = quantile * np.sqrt(variance * (1 / len(logs[first]) + 1 / len(logs[second])))
        most, least = (first, second) if gap > 0 else (second, first)
        gaps.append((abs(gap), abs(gap) - reach, abs(gap) + reach, most, least))
    widest, *_, most, least = max(gaps)
    low, high = max(gap[1] for gap in gaps), max(gap[2] for gap in gaps)
    value, below, above = (float(np.exp(log)) for log in (widest, max(low, 0.0), high))
    return most, least, (value, below, above)


def _bands(results: ModelResults) -> bool:
    return set(SCALES) <= set(results.profile.predicted)
