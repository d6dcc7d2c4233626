"""What other theories of depth predict, stated and judged like MSPGT's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from mspgt_lens.theory.depth_statistics import (
    MASSIVE,
    difference,
    early,
    halves,
    massive_blocks,
    of_curve,
    peak,
    step_against_line,
    valley,
)
from mspgt_lens.theory.judging import (
    HOW_MANY,
    MOST_NEEDED,
    WIDE_CONTEXT,
    Finding,
    Interval,
    Prediction,
    models_for,
    one_by_one_or_together,
    share_interval,
    too_few,
)
from mspgt_lens.theory.verdicts import ModelResults

HALF_DEPTH = "half-depth transition"
MIX_COMPRESS_REFINE = "Mix-Compress-Refine"
STAGES_OF_INFERENCE = "stages of inference"
ENTROPY_VALLEY = "entropy valley"
ABSTRACTION = "abstraction phase"

_Statistic = Callable[[ModelResults], Interval | str]


def future_tokens(*, ratio: float = 0.5) -> Prediction:
    """R1: skipping a block of the second half changes later tokens much less than of the first.

    The statistic is the mean KL divergence of later tokens' predictions where a block is skipped at
    earlier tokens only: of the second half's blocks over the first half's, without the first and
    the last block (geometric mean over models).

    Args:
        ratio: What it must lie below.
    """
    return Prediction(
        name="R1 future tokens",
        statement=(
            "For later tokens' predictions, skipping a block of the second half matters less than "
            f"{ratio:g} times as much as skipping one of the first."
        ),
        quantity="second half over first half",
        threshold=ratio,
        published="Llama 3.1, Qwen 3, OLMo 2: blocks of the second half have little effect on "
        "future tokens; no ratio (arXiv 2505.13898)",
        find=_finder(
            lambda r: _of_effects(r, "future", halves),
            lambda value: (
                f"blocks of the second half matter {value:.3g} times as much as those of the first"
            ),
            logarithm=True,
        ),
        needs=("block_effects",),
        below=True,
        theory=HALF_DEPTH,
        claims={WIDE_CONTEXT: "before half depth; later blocks refine the token at hand"},
    )


def one_transition(*, ratio: float = 1.0) -> Prediction:
    """R1: what blocks do for later tokens changes once, at half depth, and not gradually.

    The statistic is the squared error that a step at half depth leaves of the effects on later
    tokens, over the error that a straight line leaves (square roots of the KL divergences, without
    the first and the last block; geometric mean over models). A step elsewhere, or gradual decline,
    is above 1.

    Args:
        ratio: What it must lie below.
    """
    return Prediction(
        name="R1 one transition",
        statement="One step at half depth describes what blocks do for later tokens better than "
        "gradual decline does.",
        quantity="error of a step at half depth over that of a straight line",
        threshold=ratio,
        published="one phase transition, around half of the depth (arXiv 2505.13898)",
        find=_finder(
            lambda r: _of_effects(r, "future", step_against_line),
            lambda value: (
                f"a step at half depth leaves {value:.3g} times the error of a straight line"
            ),
            logarithm=True,
        ),
        needs=("block_effects",),
        below=True,
        theory=HALF_DEPTH,
        claims={HOW_MANY: "one, at half depth"},
    )


def massive_phases(*, distance: float = 0.1) -> Prediction:
    """R2: boundaries lie where massive activations begin and end.

    The statistic is the mean distance of a model's two boundaries from those two blocks, as a share
    of the depth. Where one model is judged, its interval is that of its boundaries, which may be
    anywhere if the data do not support them. Models whose first position's residual is nowhere 10
    times the median's length are left out.

    Args:
        distance: What it must lie below.
    """

    def of(result: ModelResults) -> Interval | str:
        norm = result.profile.signals["first_norm"].values
        phases = massive_blocks(norm)
        if phases is None:
            return (
                f"no massive activations (the first position's norm is at most {norm.max():.3g} "
                f"times the median, below {MASSIVE:g})"
            )
        partition = result.partition
        places = np.array(phases)
        anywhere = [(1, partition.n_layers - 1)] * len(partition.boundaries)
        low, high = np.array(partition.intervals if partition.supported else anywhere).T
        near = np.maximum(np.maximum(low - places, places - high), 0)
        far = np.maximum(np.abs(low - places), np.abs(high - places))
        at = np.abs(np.array(partition.boundaries) - places)
        value, least, most = (float(each.mean()) / partition.n_layers for each in (at, near, far))
        return value, least, most

    def find(results: Sequence[ModelResults]) -> Sequence[Finding]:
        def words(value: float) -> str:
            unsure = sum(not r.partition.supported for r in results)
            said = f"boundaries are {100 * value:.1f}% of the depth from the onset and the end"
            if unsure:
                said += f"; in {unsure} of {len(results)} the data do not support these boundaries"
            return said

        return one_by_one_or_together({r.name: of(r) for r in results}, words)

    return Prediction(
        name="R2 massive activations",
        statement=(
            "The two boundaries lie at the onset and at the end of massive activations, within "
            f"{100 * distance:g}% of the depth on average."
        ),
        quantity="mean distance, share of the depth",
        threshold=distance,
        published="three phases, bounded by the onset and the end of massive activations, 410M to "
        "120B parameters; no distances (arXiv 2510.06477)",
        find=find,
        signals=("first_norm",),
        below=True,
        theory=MIX_COMPRESS_REFINE,
        claims={HOW_MANY: "two, at the onset and the end of massive activations"},
    )


def middle_blocks(*, kept: float = 0.72) -> Prediction:
    """R3: without any one middle block, most predictions stay.

    The statistic is the share of most likely tokens that stay where one block is skipped at every
    position, mean over all blocks but the first and the last.

    Args:
        kept: What it must lie above: the lower end of what was published.
    """
    return Prediction(
        name="R3 middle blocks",
        statement=f"Skipping a middle block keeps more than {100 * kept:g}% of the most likely "
        "tokens.",
        quantity="share of most likely tokens kept",
        threshold=kept,
        published="72 to 95% kept (arXiv 2406.19384)",
        find=_finder(
            lambda r: _of_effects(r, "all", lambda v: float(v[1:-1].mean()), "top1_kept"),
            lambda value: f"skipping one keeps {100 * value:.0f}%",
        ),
        needs=("block_effects",),
        theory=STAGES_OF_INFERENCE,
    )


def first_and_last(*, gap: float = 0.0) -> Prediction:
    """R3: the first and the last block are the worst to lose.

    The statistic is the median share of most likely tokens kept without a middle block, minus the
    share kept without the first or the last, whichever keeps more.

    Args:
        gap: What it must lie above.
    """

    def apart(kept: np.ndarray) -> float:
        return float(np.median(kept[1:-1]) - max(kept[0], kept[-1]))

    return Prediction(
        name="R3 first and last",
        statement="Skipping the first or the last block keeps fewer of the most likely tokens than "
        "skipping a middle one.",
        quantity="middle blocks' median minus the higher of both, share of tokens",
        threshold=gap,
        published="the first and the last blocks are the worst to lose (arXiv 2406.19384)",
        find=_finder(
            lambda r: _of_effects(r, "all", apart, "top1_kept"),
            lambda value: (
                f"the better of both keeps {100 * abs(value):.0f} points "
                f"{'less' if value > 0 else 'more'}"
            ),
        ),
        needs=("block_effects",),
        theory=STAGES_OF_INFERENCE,
        claims={MOST_NEEDED: "the first and the last"},
    )


def four_stages(*, share: float = 0.5) -> Prediction:
    """R3: most models have three boundaries, between four stages.

    The statistic is the share of models in which the test for boundaries finds exactly three, with
    its interval by Clopper & Pearson (1934).

    Args:
        share: What it must lie above.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        n = len(results)
        found = sum(r.partition.n_boundaries == 3 for r in results)
        low, high = share_interval(found, n)
        words = f"{found} of {n} models have three boundaries beyond drift"
        return Finding((found / n, low, high), words, n, too_few(n, models_for(share), "models"))

    return Prediction(
        name="R3 four stages",
        statement="Most models have exactly three boundaries beyond gradual drift.",
        quantity="share of models",
        threshold=share,
        published="four stages, whose boundaries differ between models (arXiv 2406.19384)",
        find=find,
        theory=STAGES_OF_INFERENCE,
        claims={HOW_MANY: "three, between four stages"},
    )


def entropy_valley(*, depth: float = 0.1) -> Prediction:
    """R4: prompt entropy has a valley within the depth.

    The statistic is how deep it is, as a share of its lower shore; see
    :func:`~mspgt_lens.theory.depth_statistics.valley`.

    Args:
        depth: What it must lie above.
    """
    return Prediction(
        name="R4 entropy valley",
        statement=f"Prompt entropy has an interior valley of more than {100 * depth:g}% of its "
        "lower shore.",
        quantity="depth of the valley, share of the lower shore",
        threshold=depth,
        published="a valley in the middle of decoders (arXiv 2502.02013)",
        find=_finder(
            lambda r: valley(r.profile.signals["prompt_entropy"]),
            lambda value: f"the valley takes {100 * value:.0f}% of the lower shore",
        ),
        signals=("prompt_entropy",),
        theory=ENTROPY_VALLEY,
    )


def early_dimension(*, excess: float = 0.0) -> Prediction:
    """R5: intrinsic dimension peaks before half depth.

    The statistic is by how much its highest value before half depth exceeds the highest from there
    on, as a share of the higher.

    Args:
        excess: What it must lie above.
    """
    return Prediction(
        name="R5 early peak",
        statement="Intrinsic dimension is highest before half depth.",
        quantity="highest before half depth minus highest after, share of the higher",
        threshold=excess,
        published="a phase of high intrinsic dimension in the first half (arXiv 2405.15471)",
        find=_finder(
            lambda r: early(r.profile.signals["intrinsic_dimension"]),
            lambda value: (
                f"the highest before half depth is {100 * abs(value):.0f}% "
                f"{'above' if value > 0 else 'below'} the highest after it"
            ),
        ),
        signals=("intrinsic_dimension",),
        theory=ABSTRACTION,
        claims={WIDE_CONTEXT: "at the peak of intrinsic dimension, before half depth"},
    )


def learned_dimension(*, excess: float = 0.1) -> Prediction:
    """R5: training makes the peak of intrinsic dimension; random weights lack it.

    The statistic is the height of the interior peak (see
    :func:`~mspgt_lens.theory.depth_statistics.peak`) minus that of the twin with random weights.

    Args:
        excess: What it must lie above.
    """

    def of(result: ModelResults) -> Interval | str:
        assert result.random_profile is not None
        trained = peak(result.profile.signals["intrinsic_dimension"])
        untrained = peak(result.random_profile.signals["intrinsic_dimension"])
        if isinstance(trained, str):
            return trained
        return untrained if isinstance(untrained, str) else difference(trained, untrained)

    return Prediction(
        name="R5 learned peak",
        statement="Intrinsic dimension has an interior peak that random weights lack.",
        quantity="height of the peak, share of it, minus that with random weights",
        threshold=excess,
        published="no peak in untrained models (arXiv 2405.15471)",
        find=_finder(
            of,
            lambda value: (
                f"the peak is {100 * abs(value):.0f} points of its height "
                f"{'higher' if value > 0 else 'lower'} than with random weights"
            ),
        ),
        needs=("random_profile",),
        signals=("intrinsic_dimension",),
        theory=ABSTRACTION,
    )


def _of_effects(
    result: ModelResults,
    reach: Literal["all", "future"],
    statistic: Callable[[np.ndarray], float],
    measure: Literal["kl", "top1_kept"] = "kl",
) -> Interval | str:
    assert result.block_effects is not None
    return of_curve(result.block_effects.curve("skip", reach, measure), statistic)


def _finder(
    of: _Statistic, words: Callable[[float], str], logarithm: bool = False
) -> Callable[[Sequence[ModelResults]], Sequence[Finding]]:
    """What results say of a statistic that each model has on its own.

    Args:
        of: From a model to its statistic.
        words: From the statistic's value to half a sentence.
        logarithm: The statistic is a logarithm, and what is judged and shown is not.
    """

    def find(results: Sequence[ModelResults]) -> Sequence[Finding]:
        values: Mapping[str, Interval | str] = {r.name: of(r) for r in results}
        if not logarithm:
            return one_by_one_or_together(values, words)
        found = one_by_one_or_together(values, lambda value: words(float(np.exp(value))))
        return [replace(one, estimate=_raised(one.estimate)) for one in found]

    return find


def _raised(estimate: Interval | float | None) -> Interval | float | None:
    if not isinstance(estimate, tuple):
        return estimate
    value, low, high = (float(np.exp(end)) for end in estimate)
    return value, low, high
