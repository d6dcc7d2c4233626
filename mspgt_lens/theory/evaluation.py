"""The theory tested: every prediction against the measured results of one or many models."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from mspgt_lens.ambient import in_own_state
from mspgt_lens.theory.effect_predictions import (
    SHAPES,
    brittleness_between_families,
    brittleness_between_segments,
    dissociation,
    order,
)
from mspgt_lens.theory.judging import MSPGT, Prediction
from mspgt_lens.theory.partition_predictions import dominance, existence, family_share, position
from mspgt_lens.theory.places import compare_places
from mspgt_lens.theory.rival_predictions import (
    early_dimension,
    entropy_valley,
    first_and_last,
    four_stages,
    future_tokens,
    learned_dimension,
    massive_phases,
    middle_blocks,
    one_transition,
)
from mspgt_lens.theory.verdicts import ModelResults, Verdicts

RIVALS = (
    future_tokens(),
    one_transition(),
    massive_phases(),
    middle_blocks(),
    first_and_last(),
    four_stages(),
    entropy_valley(),
    early_dimension(),
    learned_dimension(),
)
THEORIES = (MSPGT, *dict.fromkeys(prediction.theory for prediction in RIVALS))


@in_own_state
def evaluate_predictions(
    results: ModelResults | Iterable[ModelResults],
    *,
    theories: Iterable[str] | None = None,
    significance: float = 0.05,
    share_of_models: float = 0.5,
    gain: float = 0.2,
    strong: float = 0.1,
    weak: float = 0.4,
    family_minus_size: float = 0.0,
    family_ratio: float = 10.0,
    segment_ratio: float = 2.0,
    diagonal_excess: float = 0.1,
    gap: float = 0.05,
    predictions: Iterable[Prediction] = (),
) -> Verdicts:
    """A verdict on each prediction of the theory, and of its rivals, from one or many models.

    A prediction is supported only if the whole 95% interval of its statistic lies on the right side
    of its threshold, and refuted only if it lies on the other side. Statements about models need
    models: with too few, or where something was not measured, a verdict is inconclusive and its
    reason says what is needed. The defaults were fixed before anything was measured with them.

    MSPGT's rivals are ``"half-depth transition"``, ``"Mix-Compress-Refine"``, ``"stages of
    inference"``, ``"entropy valley"`` and ``"abstraction phase"``; ``docs/rivals.md`` says what
    each predicts, with its source. Their predictions are about what a model shows by itself: of
    fewer than 4 models, each has a verdict of its own, whose interval is over its groups of
    prompts. :meth:`Verdicts.contradictions` shows where theories answer one question differently,
    and ``Verdicts.places`` whose places each model's boundaries are near.

    Args:
        results: Results of one model, or of many with different names.
        theories: Names of the theories to judge. None for MSPGT and those of which the results hold
            something: ``analyze`` measures it all.
        significance: P1: level of each model's own boundary test.
        share_of_models: P1: share of models that must show two boundaries.
        gain: P2: part of the better baseline's error that water-filling must take away.
        strong: P3: coefficient of variation below which dominance is strong.
        weak: P3: coefficient of variation above which it is called weak.
        family_minus_size: P3: how much more of the variance family must explain than size.
        family_ratio: P4: ratio of brittleness that two families must reach.
        segment_ratio: P4: ratio of brittleness of the local segment to the others.
        diagonal_excess: P5: excess of the diagonal of segments by token classes.
        gap: P6: how much deeper each scale must come than the one before, as a share of the depth.
        predictions: Further ones, judged after the theory's own.

    Returns:
        One verdict per prediction, and per family or noise shape where a prediction is about one.

    Raises:
        ValueError: If there are no results, two results or predictions of the same name, or no such
            theory.

    Example:
        >>> verdicts = ml.evaluate_predictions(ml.synthetic.synthetic_models(2, 4))
        >>> verdicts["P1 existence"].verdict
        'supported'
    """
    models = [results] if isinstance(results, ModelResults) else list(results)
    names = [model.name for model in models]
    if not models or len(set(names)) < len(names):
        raise ValueError(
            f"results must be of at least one model and all of different names, got {names}"
        )
    own = (
        existence(significance=significance, share=share_of_models),
        position(gain=gain),
        dominance(strong=strong, weak=weak),
        family_share(difference=family_minus_size),
        *(brittleness_between_families(shape, ratio=family_ratio) for shape in SHAPES),
        *(brittleness_between_segments(shape, ratio=segment_ratio) for shape in SHAPES),
        dissociation(excess=diagonal_excess),
        order(gap=gap),
    )
    chosen = _chosen(theories, models)
    stated = [p for p in (*own, *RIVALS) if p.theory in chosen]
    further = tuple(predictions)
    labels = [prediction.name for prediction in (*own, *RIVALS, *further)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"predictions must all have names of their own, got {labels}")
    thresholds = {
        "significance": significance,
        "share_of_models": share_of_models,
        "gain": gain,
        "strong": strong,
        "weak": weak,
        "family_minus_size": family_minus_size,
        "family_ratio": family_ratio,
        "segment_ratio": segment_ratio,
        "diagonal_excess": diagonal_excess,
        "gap": gap,
        **{p.name: p.threshold for p in (*stated, *further) if p not in own},
    }
    judged = (prediction.verdicts(models) for prediction in (*stated, *further))
    verdicts = tuple(itertools.chain.from_iterable(judged))
    places = {model.name: compare_places(model.partition, model.profile) for model in models}
    return Verdicts(verdicts, tuple(names), thresholds, models[0].profile.versions, places)


def _chosen(theories: Iterable[str] | None, models: Sequence[ModelResults]) -> list[str]:
    """Names of the theories to judge."""
    if theories is None:
        asking = [p for p in RIVALS if p.needs or p.signals]
        return [MSPGT, *(p.theory for p in asking if p.measured(models))]
    if isinstance(theories, str):
        raise TypeError(f"theories must be a sequence of names, got {theories!r} alone")
    names = list(theories)
    if not names or not set(names) <= set(THEORIES):
        raise ValueError(f"theories must be among {', '.join(THEORIES)}, got {names}")
    return names
