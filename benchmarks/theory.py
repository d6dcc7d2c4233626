"""How often verdicts on made-up models come out right, and what water-filling recovers.

    python -m benchmarks.theory                    # rates of verdicts, as CSV
    python -m benchmarks.theory --only P2          # of one prediction
    python -m benchmarks.theory --recovery         # parameters of water-filling, as CSV

Both tables are in docs/theory.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

import mspgt_lens as ml
from benchmarks.table import Comparison
from mspgt_lens.partition import SCALES
from mspgt_lens.theory import effect_predictions as about_effects
from mspgt_lens.theory import partition_predictions as about_boundaries
from mspgt_lens.theory.evaluation import RIVALS

Judge = Callable[[Sequence[ml.results.ModelResults]], ml.results.Verdict]
_POOL = 100


def first_family(results: Sequence[ml.results.ModelResults]) -> ml.results.Verdict:
    return about_boundaries.dominance().verdicts(results)[0]


def judged_by(prediction: ml.extending.Prediction) -> Judge:
    return lambda results: prediction.verdicts(results)[0]


def cases() -> Iterator[tuple[str, str, str, Judge, dict[str, Any]]]:
    """Prediction, what is true, the right verdict, what judges, and what is made."""
    position = judged_by(about_boundaries.position())
    share = judged_by(about_boundaries.family_share())
    families = judged_by(about_effects.brittleness_between_families(shape="covariance"))
    segments = judged_by(about_effects.brittleness_between_segments(shape="covariance"))
    dissociation, order = judged_by(about_effects.dissociation()), judged_by(about_effects.order())
    tight = {"boundaries": "families", "noise": 0.3}
    yield "P2", "by water-filling", "supported", position, {"boundaries": "water-filling"}
    for kind in ("thirds", "quarters", "random"):
        yield "P2", f"{kind}", "refuted", position, {"boundaries": kind}
    yield "P3 CV", "CV 0.03", "supported", first_family, {**tight, "variation": 0.03}
    yield "P3 CV", "CV 0.3", "refuted", first_family, {**tight, "variation": 0.3}
    yield "P3 share", "family only", "supported", share, {"boundaries": "families"}
    yield "P3 share", "size only", "refuted", share, {"boundaries": "size"}
    yield "P3 share", "neither", "inconclusive", share, {"boundaries": "random"}
    for ratio in (100.0, 30.0, 3.0, 1.0):
        right = "supported" if ratio > 10 else "refuted"
        yield "P4 families", f"ratio {ratio:g}", right, families, {"family_ratio": ratio}
    for ratio, right in ((5.0, "supported"), (1.0, "refuted"), (0.2, "refuted")):
        yield "P4 segments", f"ratio {ratio:g}", right, segments, {"segment_ratio": ratio}
    for excess, right in ((0.5, "supported"), (0.0, "refuted"), (-0.3, "refuted")):
        yield "P5", f"excess {excess:g}", right, dissociation, {"excess": excess}
    for places, right in (
        ((0.1, 0.35, 0.6), "supported"),
        ((0.1, 0.35, 0.35), "refuted"),
        ((0.6, 0.35, 0.1), "refuted"),
    ):
        truth = "half at " + ", ".join(f"{100 * place:.0f}%" for place in places)
        yield "P6", truth, right, order, {"half_depths": places}


def judged_alone_or_together(prediction: ml.extending.Prediction) -> Judge:
    """Of one model where there are too few for an interval over models."""
    return lambda results: prediction.verdicts(results if len(results) > 3 else results[:1])[0]


def rival_cases() -> Iterator[tuple[str, str, str, Judge, dict[str, Any]]]:
    """As :func:`cases`, for the rivals: statistics as predicted, at the threshold, beyond."""
    truths = {
        "R1 future tokens": (0.25, 0.5, 0.8),
        "R1 one transition": (0.5, 1.0, 2.0),
        "R2 massive activations": (0.03, 0.1, 0.2),
        "R3 middle blocks": (0.85, 0.72, 0.6),
        "R3 first and last": (0.2, 0.0, -0.1),
        "R4 entropy valley": (0.3, 0.1, 0.0),
        "R5 early peak": (0.2, 0.0, -0.2),
        "R5 learned peak": (0.4, 0.1, 0.0),
    }
    stated = {prediction.name: prediction for prediction in RIVALS}
    for name, (held, threshold, failed) in truths.items():
        judge = judged_alone_or_together(stated[name])
        for truth, right in ((held, "supported"), (threshold, "inconclusive"), (failed, "refuted")):
            yield name, f"{truth:g}", right, judge, {"rivals": {name: truth}}


@cache
def evidence_pool(effect: float) -> list[dict[str, Any]]:
    """What the boundary test says of synthetic signals: planted stages, or drift only for 0."""
    pool = []
    for seed in range(_POOL):
        made = ml.synthetic.synthetic_signals(
            30,
            10,
            n_boundaries=2 if effect else 0,
            effect=effect,
            drift="flat" if effect else "quadratic",
            seed=seed,
        )
        found = ml.segment_blocks(made.signals, n_bootstraps=20, seed=seed)
        pool.append(
            {name: getattr(found, name) for name in ("p_values", "n_boundaries", "sharpness")}
        )
    return pool


def with_evidence(
    results: Sequence[ml.results.ModelResults],
    trained: list[dict[str, Any]],
    untrained: list[dict[str, Any]],
    rng: np.random.Generator,
) -> list[ml.results.ModelResults]:
    """Models whose partitions, and whose twins', say what the boundary test said of some draw."""

    def tested(
        pool: list[dict[str, Any]], partition: ml.results.ScalePartition
    ) -> ml.results.ScalePartition:
        return replace(partition, **pool[rng.integers(len(pool))])

    return [
        replace(
            r,
            partition=tested(trained, r.partition),
            random_weights=tested(untrained, r.partition),
        )
        for r in results
    ]


def compare() -> Iterator[Comparison]:
    """How often verdicts on 24 made-up models are right, from 20 draws of every case."""
    for prediction, truth, right, judge, made in [*existence_cases(""), *cases(), *rival_cases()]:
        found = rates(judge, made, 8, 20)[right]
        what = f"right verdicts, {prediction}, {truth}: {right}"
        yield Comparison(what, found, "all", 1.0, "share", "at least 0.8")


def print_verdicts(n_draws: int, wanted: str) -> None:
    print("prediction,truth,models,draws,supported,refuted,inconclusive,right")
    for n_per_family in (1, 4, 8, 16):
        for prediction, truth, right, judge, made in [*existence_cases(wanted), *cases()]:
            if prediction.startswith(wanted):
                print_rates(prediction, truth, right, judge, made, n_per_family, n_draws)
        for prediction, truth, right, judge, made in rival_cases():
            if prediction.startswith(wanted):
                # One model at the threshold is one that does not differ from the mean.
                alone = {"rival_spread": 0.0} if n_per_family == 1 else {}
                given = {**made, **alone}
                print_rates(prediction, truth, right, judge, given, n_per_family, n_draws)


def existence_cases(wanted: str) -> Iterator[tuple[str, str, str, Judge, dict[str, Any]]]:
    """As :func:`cases`, for P1; ``jumps`` are in units of the noise's deviation."""
    if not "P1".startswith(wanted):
        return
    for effect, twin, right in (
        (4.0, 0.0, "supported"),
        (2.0, 0.0, "supported"),
        (0.0, 0.0, "refuted"),
        (4.0, 4.0, "refuted"),
    ):
        truth = f"jumps of {effect:g}" if effect else "drift only"
        truth += ", random weights too" if twin else ""
        yield "P1", truth, right, partial(tested_existence, effect=effect, twin=twin), {}


def tested_existence(
    results: Sequence[ml.results.ModelResults], effect: float, twin: float
) -> ml.results.Verdict:
    rng = np.random.default_rng(results[0].n_parameters)
    trained, untrained = evidence_pool(effect), evidence_pool(twin)
    return judged_by(about_boundaries.existence())(with_evidence(results, trained, untrained, rng))


def rates(judge: Judge, made: dict[str, Any], n_per_family: int, n_draws: int) -> dict[str, float]:
    """Share of the draws that got each verdict."""
    found = Counter(
        judge(ml.synthetic.synthetic_models(3, n_per_family, **made, seed=seed)).verdict
        for seed in range(n_draws)
    )
    return {kind: found[kind] / n_draws for kind in ("supported", "refuted", "inconclusive")}


def print_rates(
    prediction: str,
    truth: str,
    right: str,
    judge: Judge,
    made: dict[str, Any],
    n_per_family: int,
    n_draws: int,
) -> None:
    shares = rates(judge, made, n_per_family, n_draws)
    n_models = n_per_family if judge is first_family else 3 * n_per_family
    if "rivals" in made and n_models < 4:
        n_models = 1
    told = ",".join(f"{share:.3f}" for share in shares.values())
    print(f"{prediction},{truth.replace(',', ' ')},{n_models},{n_draws},{told},{right}", flush=True)


def print_recovery(n_draws: int) -> None:
    """Parameters of water-filling from 8 models whose boundaries are off by about one block."""
    print("depths,parameter,true,mean,relative error (RMS),within 10%,covered,draws")
    for depths in ((16, 24, 28, 32, 40, 48, 64, 80), (12, 16, 24, 32, 48, 64, 80, 126)):
        shares, offsets = np.array([0.22, 0.33, 0.45]), np.array([3.0, 2.0, -5.0])
        middle = shares * np.mean(depths) + offsets
        true = {
            "share": ("shares", shares),
            "length": ("middle lengths", middle),
            "offset": ("offsets", offsets),
        }
        lengths = offsets + np.outer(depths, shares)
        exact = np.cumsum(lengths, axis=1)[:, :-1]
        rng = np.random.default_rng(0)
        fits = []
        for _ in range(n_draws):
            placed = np.rint(np.sort(exact + rng.standard_normal(exact.shape)))
            placed = placed.clip(0, np.array(depths)[:, None])
            fits.append(ml.theory.fit_water_filling(placed, np.array(depths)).to_dataframe())
        for quantity, (name, values) in true.items():
            own = [f[f["quantity"] == quantity] for f in fits]
            found, low, high = (np.array([f[end] for f in own]) for end in ("value", "low", "high"))
            for i, value in enumerate(values):
                error = found[:, i] / value - 1
                inside = (low[:, i] <= value) & (value <= high[:, i])
                print(
                    f"{min(depths)} to {max(depths)},{name} "
                    f"{SCALES[i]},{value:.2f},{found[:, i].mean():.2f},"
                    f"{np.sqrt((error**2).mean()):.3f},{(abs(error) <= 0.1).mean():.3f},"
                    f"{inside.mean():.3f},{n_draws}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200, help="draws of each case")
    parser.add_argument("--only", default="", help="rows of one prediction, such as P3")
    parser.add_argument("--recovery", action="store_true", help="the second table")
    options = parser.parse_args()
    if options.recovery:
        print_recovery(5 * options.draws)
    else:
        print_verdicts(options.draws, options.only)


if __name__ == "__main__":
    main()
