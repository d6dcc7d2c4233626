"""The predictions about boundaries: existence, position, and dominance of family over size."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from mspgt_lens.contract import counted
from mspgt_lens.partition import ScalePartition
from mspgt_lens.statistics import LEVEL
from mspgt_lens.theory.dominance import MIN_FAMILY, depth_variation, variance_shares
from mspgt_lens.theory.judging import (
    HOW_MANY,
    MSPGT,
    PUBLISHED,
    Finding,
    Interval,
    Prediction,
    by_family,
    models_for,
    share_interval,
    too_few,
)
from mspgt_lens.theory.verdicts import ModelResults
from mspgt_lens.theory.waterfilling import held_out_errors

MIN_PREDICTED = 6
MIN_DEPTHS = 3
_RULES = ("water-filling", "thirds", "quarters", "same depth")


def existence(*, significance: float = 0.05, share: float = 0.5) -> Prediction:
    """P1: most models have two boundaries beyond drift, and not for their architecture alone.

    A model counts if its partition has p below ``significance`` for two boundaries, exactly two
    found (jumps or bends; what one signal shows alone, and the first and the last block, do not
    count), stages that describe left-out blocks better than drift does (alone or beside it), and a
    twin with random weights of which not all of this holds. A model that passes without such a twin
    may count or not: the interval (Clopper & Pearson 1934) takes in both.

    Args:
        significance: Level of each model's own test.
        share: The share of models that must show it.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        def shows(partition: ScalePartition) -> bool:
            sharpness = partition.sharpness
            return (
                partition.p_value < significance
                and partition.n_boundaries == 2
                and min(sharpness["stages"], sharpness["both"]) < sharpness["drift"]
            )

        passed = [r for r in results if shows(r.partition)]
        controlled = [r for r in passed if r.random_weights is not None]
        shown = [r for r in controlled if r.random_weights and not shows(r.random_weights)]
        n, uncontrolled = len(results), len(passed) - len(controlled)
        low, _ = share_interval(len(shown), n)
        _, high = share_interval(len(shown) + uncontrolled, n)
        shuffled = [r for r in results if r.shuffled_tokens is not None]
        words = (
            f"{len(shown)} of {n} models show two boundaries beyond drift that random weights lack"
        )
        kinds = Counter(change.kind for r in shown for change in r.partition.found)
        if kinds:
            words += f" ({counted(kinds['jump'], 'jump')}, {counted(kinds['bend'], 'bend')})"
        if len(passed) > len(shown):
            words += (
                f"; {len(passed) - len(shown) - uncontrolled} more share them with random weights"
            )
        if uncontrolled:
            words += f"; {uncontrolled} more lack the control with random weights"
        numbers = Counter(r.partition.n_boundaries for r in results if not shows(r.partition))
        if numbers:
            words += "; numbers of boundaries in the others: " + ", ".join(
                f"{number} ({numbers[number]})" for number in sorted(numbers)
            )
        if shuffled:
            still = sum(shows(r.shuffled_tokens) for r in shuffled if r.shuffled_tokens)
            words += f"; on shuffled text {still} of {len(shuffled)} show them"
        short = too_few(n, models_for(share), "models")
        return Finding((len(shown) / n, low, high), words, n, short)

    return Prediction(
        name="P1 existence",
        statement=(
            "Most models have two boundaries beyond gradual drift, stages describe their depth "
            "better than drift, and random weights show neither."
        ),
        quantity="share of models",
        threshold=share,
        published=PUBLISHED["P1"],
        find=find,
        theory=MSPGT,
        claims={HOW_MANY: "two, between three scales"},
    )


def position(*, gain: float = 0.2) -> Prediction:
    """P2: water-filling fitted on other models predicts where a model's boundaries are.

    The statistic is the part of the better baseline's error (thirds or quarters of the depth,
    whichever errs less on these models) that water-filling takes away when each model in turn is
    left out; its interval is that of a ratio of means over models.

    Args:
        gain: The part of the error that it must take away.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        blocks = np.array([r.partition.n_layers for r in results])
        short = too_few(len(results), MIN_PREDICTED, "models") or too_few(
            len(set(blocks.tolist())), MIN_DEPTHS, "different depths"
        )
        estimate, words = None, "water-filling was not fitted"
        if not short:
            boundaries = np.array([r.partition.boundaries for r in results])
            table = held_out_errors(boundaries, blocks, [r.family for r in results])
            errors = table.pivot_table(index=["left_out", "model"], columns="rule", values="error")
            by_model, mean = errors.loc["model"], errors.groupby("left_out").mean()
            best = str(mean.loc["model", ["thirds", "quarters"]].idxmin())
            baseline = by_model[best].to_numpy()
            if baseline.any():
                estimate = _part_taken(by_model["water-filling"].to_numpy(), baseline)
            else:
                short = f"{best} are exact for every model, so there is nothing to improve"
            words = "; ".join(
                f"left-out {'models' if kind == 'model' else 'families'} are missed by "
                + ", ".join(f"{100 * row[rule]:.1f}% ({rule})" for rule in _RULES)
                for kind, row in mean.sort_index(ascending=False).iterrows()
            )
            words += " of the depth"
        return Finding(estimate, words + _unsupported(results), len(results), short)

    return Prediction(
        name="P2 position",
        statement=(
            "Boundaries lie where reverse water-filling, fitted on other models, puts them, better "
            "than at thirds or quarters of the depth."
        ),
        quantity="part of the better baseline's error taken away",
        threshold=gain,
        published=PUBLISHED["P2"],
        find=find,
        theory=MSPGT,
    )


def dominance(*, strong: float = 0.1, weak: float = 0.4) -> Prediction:
    """P3: within a family, boundary depth hardly varies (strong dominance); judged one by one.

    There is one finding per family of at least 3 models; one for all, without an estimate, if there
    is none.

    Args:
        strong: Coefficient of variation that must not be reached.
        weak: Coefficient of variation from which dominance is called weak.
    """

    def of_family(family: str, members: Sequence[ModelResults]) -> Finding:
        cv = depth_variation(*depths_and_errors(members))
        low, high = cv.low, cv.high
        grade = (
            f"strong dominance (below {strong:g})"
            if high < strong
            else f"weak dominance (above {weak:g})"
            if low > weak
            else f"neither surely below {strong:g} (strong) nor surely above {weak:g} (weak)"
        )
        words = f"boundary depth varies by CV {cv.value:.3f} over {len(members)} models, {grade}"
        estimate = (cv.value, low, high)
        return Finding(estimate, words + _unsupported(members), len(members), part=family)

    def find(results: Sequence[ModelResults]) -> Sequence[Finding]:
        families = by_family(results)
        enough = [family for family in families.items() if len(family[1]) >= MIN_FAMILY]
        if enough:
            return [of_family(*family) for family in enough]
        largest = max((len(members) for members in families.values()), default=0)
        words = f"the largest family has {largest} model{'' if largest == 1 else 's'}"
        short = f"at least {MIN_FAMILY} models of one family are needed"
        return [Finding(None, words, len(results), short)]

    return Prediction(
        name="P3 dominance",
        statement=f"Boundary depth varies little within the family (CV below {strong:g}).",
        quantity="coefficient of variation of boundary depth",
        threshold=strong,
        published=PUBLISHED["P3"],
        find=find,
        below=True,
        theory=MSPGT,
    )


def family_share(*, difference: float = 0.0) -> Prediction:
    """P3: family explains more of the variance of boundary depth than size does.

    Args:
            models, are left out.
        difference: How much more, as a share of the variance.
    """

    def find(results: Sequence[ModelResults]) -> Finding:
        families = {f: m for f, m in by_family(results).items() if len(m) >= MIN_FAMILY}
        used = list(itertools.chain(*families.values()))
        estimate = None
        words, short = "", None
        if len(families) < 2 or len({r.n_parameters for r in used}) < 2:
            words = f"{len(families)} families have {MIN_FAMILY} models with known sizes"
            short = f"at least 2 families of {MIN_FAMILY} models with n_parameters are needed"
        else:
            depths, _ = depths_and_errors(used)
            if not np.ptp(depths, axis=0).any():
                words, short = (
                    "boundaries are at the same depth in all models",
                    "there is no variance",
                )
            else:
                shares = variance_shares(
                    depths, [str(r.family) for r in used], [r.n_parameters or 0 for r in used]
                )
                estimate = (shares.difference.value, shares.difference.low, shares.difference.high)
                words = (
                    f"family explains {100 * shares.family:.0f}% beyond size (permutation p "
                    f"{shares.p_family:.3f}), size {100 * shares.size:.0f}% beyond family "
                    f"(p {shares.p_size:.3f})"
                ) + _unsupported(used)
        return Finding(estimate, words, len(used), short)

    return Prediction(
        name="P3 family against size",
        statement="The family explains more of where boundaries lie than the size does.",
        quantity="share of variance by family minus share by size",
        threshold=difference,
        published=PUBLISHED["P3 shares"],
        find=find,
        needs=("family", "n_parameters"),
        theory=MSPGT,
    )


def _unsupported(results: Sequence[ModelResults]) -> str:
    """A reminder that places are not boundaries where the model's own test finds none."""
    unsure = sum(not r.partition.supported for r in results)
    return f"; in {unsure} of {len(results)} the data do not support these boundaries" * bool(
        unsure
    )


def depths_and_errors(results: Sequence[ModelResults]) -> tuple[np.ndarray, np.ndarray]:
    """Relative boundary depths, and their standard errors from their intervals."""
    quantile = stats.norm.ppf(0.5 + LEVEL / 2)
    errors = [
        [
            (high - low) / (2 * quantile * r.partition.n_layers)
            for low, high in r.partition.intervals
        ]
        for r in results
    ]
    return np.array([r.depths for r in results]), np.array(errors)


def _part_taken(
    errors: Float[np.ndarray, " model"], baseline: Float[np.ndarray, " model"]
) -> Interval:
    """``1 - sum(errors) / sum(baseline)`` with the t interval of a ratio of means."""
    n, ratio = len(errors), float(errors.sum() / baseline.sum())
    left = errors - ratio * baseline
    error = np.sqrt(n / (n - 1) * (left**2).sum()) / baseline.sum()
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1) * error)
    return 1 - ratio, 1 - ratio - reach, 1 - ratio + reach
