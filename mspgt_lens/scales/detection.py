"""Scale boundaries of a model: all signals together, published detectors, baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import ruptures
from jaxtyping import Float
from scipy.signal import find_peaks

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import CannotMeasure, Curve
from mspgt_lens.models import as_adapter
from mspgt_lens.partition import Boundary, ScalePartition
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.scales import published
from mspgt_lens.scales.normalizing import rank_normalize
from mspgt_lens.scales.segments import MIN_BLOCKS, edge_changes, segment_blocks, summarize_places
from mspgt_lens.signals import RIVAL_SIGNALS, SIGNALS

Placing = Literal["fused", "stages", "attention_span", "mi_peaks", "hvib", "thirds", "quarters"]
AsPublished = Literal["attention_distance", "mi_drop", "published_fusion"]
METHODS: tuple[Placing, ...] = get_args(Placing)
# These place as many boundaries as they find.
PUBLISHED_METHODS: tuple[AsPublished, ...] = get_args(AsPublished)
_NAMES = (*METHODS, *PUBLISHED_METHODS)
# From the signals (rows are blocks) to the boundaries.
Detector = Callable[[pd.DataFrame], Sequence[int]]
_Weights = tuple[float, float, float]
_THREE_SCALES = ("local", "intermediate", "global")


@in_own_state
def detect_scales(
    model: Any = None,
    prompts: PromptDataset | Iterable[str] | None = None,
    *,
    profile: LayerProfile | None = None,
    method: Placing | AsPublished | Detector = "fused",
    n_boundaries: int | None = None,
    span_thresholds: tuple[float, float] | None = None,
    fusion_weights: tuple[float, float, float] = published.EQUAL_WEIGHTS,
    n_bootstraps: int = 200,
    min_size: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> ScalePartition:
    """Local, Intermediate and Global segments of a model's blocks, and how sure they are.

    The signals are those of :func:`boundary_signals`; see :func:`~mspgt_lens.segment_blocks` for
    the test. Intervals and probabilities include the spread between folds of groups of prompts.

    Methods: ``"fused"`` places the boundaries at the sharpest changes of all signals together.
    ``"stages"`` fits constant stages to the same signals and no drift (it finds boundaries in any
    smooth curve). ``"attention_span"`` takes the first blocks whose mean attention span reaches two
    thresholds. ``"mi_peaks"`` takes the two most prominent peaks or
    troughs of the information between the sites around each block. ``"hvib"`` takes the partition
    whose segments together drop most of what their own scale retained and add most to what it
    predicts, each in units of that curve's range (the H-VIB objective with the weights that make
    all scales count alike). ``"thirds"`` and ``"quarters"`` look at no data. The test is that of
    the fused signals whatever the method; all methods' places are in ``.by_method``.

    By the formulas of the theory's first version (arXiv 2505.18244v1), and placing as many
    boundaries as they find, also none: ``"mi_drop"``, blocks where the first difference of the
    information between neighboring sites is more than two standard deviations below its mean;
    ``"attention_distance"``, the same rule for rises of the attention distance as published (a
    profile of your own needs it among ``signals=``); ``"published_fusion"``, blocks where
    the weighted sum of peaks of the three scales' probes (here: predicted information), rises of
    the distance and falls of the information is as high. What the source leaves open, and what was
    chosen for it, is in ``docs/rivals.md``.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``; not needed with a profile.
        prompts: A :class:`PromptDataset`, or texts; not needed with a profile.
        profile: A profile that was made before, instead of a pass over the prompts.
        method: What places ``.boundaries``; also a function of one's own, from the table of
            :func:`boundary_signals` to as many boundaries as ``n_boundaries`` says, called once
            more for every draw of the intervals. The result calls it by its ``__name__``.
        n_boundaries: How many boundaries ``"fused"``, ``"stages"`` and one's own method place; None
            for the theory's two, which all other methods place.
        span_thresholds: Attention span in tokens from which a block is Intermediate, and Global; by
            default where the intermediate and the global band begin (2 and 17 tokens).
        fusion_weights: Of probes, attention and information in ``"published_fusion"``; they add up
            to 1. The source does not give its own; equal by default.
        n_bootstraps: Draws for intervals and probabilities.
        min_size: Fewest blocks of a segment.
        seed: Decides every draw.
        progress: Show a progress bar while profiling.

    Returns:
        The partition; read ``n_boundaries`` and ``p_value`` before ``boundaries``, or
        ``summary()``.

    Raises:
        ValueError: If there is neither a profile nor a model with prompts, or an argument is out of
            range.
        CannotMeasure: If the model has fewer than 6 blocks, the chosen method lacks its signals,
            or one that places two boundaries finds no two.

    Example:
        >>> partition = ml.detect_scales(profile=profile)
        >>> partition.n_boundaries, partition.segments  # how many are supported, best places
        (..., {'local': range(0, ...), 'intermediate': range(...), 'global': range(..., 8)})
    """
    label = _checked_method(method, n_boundaries)
    if span_thresholds is not None:
        _check_thresholds(span_thresholds)
    weights = published.check_weights(fusion_weights)
    if profile is None:
        profile = _profiled(model, prompts, method, seed, progress)
    _check_blocks(profile.n_layers)
    thresholds = span_thresholds or _default_thresholds(profile)
    signals, notes = _choose_signals(profile)
    replicates = _replicates(profile, n_bootstraps, seed)
    fused = segment_blocks(
        _matrix(profile, signals),
        n_boundaries=n_boundaries,
        n_bootstraps=n_bootstraps,
        min_size=min_size,
        names=list(signals),
        replicates=np.stack([_matrix(r, signals) for r in replicates]) if replicates else None,
        seed=seed,
    )
    place = len(fused.boundaries)

    def by(name: str, one: LayerProfile) -> tuple[int, ...] | None:
        if name == "stages":
            return _stages(_matrix(one, signals), place, min_size)
        if name in _PUBLISHED:
            return _PUBLISHED[name](one, weights)
        if name in _DETECTORS:
            return _DETECTORS[name](one, thresholds)
        table = pd.DataFrame(_matrix(one, signals), columns=list(signals))
        return _placed(method, table, place)

    by_method = {"fused": fused.boundaries} | {
        name: by(name, profile) for name in dict.fromkeys((*_NAMES, label)) if name != "fused"
    }
    if not replicates:
        notes.append(
            "the profile holds no values per fold, so intervals leave out the choice of prompts"
        )
    result = replace(
        fused,
        model_name=profile.model_name,
        by_method=by_method,
        control=profile.control,
        edges=_edges(profile, signals, fused.edges),
        settings={
            **fused.settings,
            "span_thresholds": list(thresholds),
            "fusion_weights": list(weights),
            "prompts_fingerprint": profile.settings.get("prompts_fingerprint", ""),
            "n_groups": profile.n_groups,
            "bands": {name: list(band) for name, band in profile.bands.items()},
        },
        versions=profile.versions,
        warnings=(*notes, *fused.warnings, *profile.warnings),
    )
    if label == "fused":
        return result
    return _placed_by(label, result, [by(label, r) for r in replicates])


def _placed_by(
    label: str, result: ScalePartition, drawn: Sequence[tuple[int, ...] | None]
) -> ScalePartition:
    """The partition with the places of another method.

    Args:
        label: The method's name in ``by_method``.
        result: The partition with places of its own.
        drawn: What the method finds in draws of other prompts.
    """
    boundaries = result.by_method[label]
    if boundaries is None:
        said = "cannot look" if label in PUBLISHED_METHODS else "finds no two boundaries"
        raise CannotMeasure(
            f"method {label!r} {said} in {result.model_name}: "
            f"{_WHY_NONE.get(label, 'its signals are flat')}"
        )
    found = [places for places in drawn if places is not None] or [boundaries]
    alike = [places for places in found if len(places) == len(boundaries)]
    further: tuple[str, ...] = ()
    if len(alike) < len(found):
        further = (
            f"{label} finds another number of boundaries than {len(boundaries)} in "
            f"{len(found) - len(alike)} of {len(found)} draws of other prompts; intervals are over "
            "the rest",
        )
    intervals, _ = summarize_places(np.array(alike or [boundaries], dtype=int), result.n_layers)
    places = np.array([b for one in found for b in one], dtype=int)
    return replace(
        result,
        method=label,
        boundaries=boundaries,
        intervals=tuple(
            (min(low, b), max(high, b))
            for (low, high), b in zip(intervals, boundaries, strict=True)
        ),
        probability=np.bincount(places, minlength=result.n_layers) / len(found),
        warnings=(*further, *result.warnings),
    )


def check_depth(model: Any) -> None:
    """See that boundaries can be sought in a model: nobody should wait for a pass in vain.

    Raises:
        CannotMeasure: If it has fewer than 6 blocks.
    """
    _check_blocks(as_adapter(model).n_layers)


def _check_blocks(n_layers: int) -> None:
    if n_layers < MIN_BLOCKS:
        raise CannotMeasure(
            f"model must have at least {MIN_BLOCKS} blocks, got {n_layers}: with fewer, two "
            "boundaries cannot be told from drift"
        )


def signals_for(method: Placing | AsPublished | Detector) -> list[str] | None:
    """What a pass must gather for a method: the usual signals (None), or one of another theory too.

    It changes nothing in the test, which is of the usual signals.
    """
    of_distance = ("attention_distance", "published_fusion")
    return [*SIGNALS, "attention_distance"] if method in of_distance else None


def _profiled(
    model: Any,
    prompts: PromptDataset | Iterable[str] | None,
    method: Placing | AsPublished | Detector,
    seed: int,
    progress: bool,
) -> LayerProfile:
    """A pass over the prompts, where it can be enough."""
    if model is None or prompts is None:
        raise ValueError("detect_scales needs a model and prompts, or profile=")
    check_depth(model)
    signals = signals_for(method)
    return profile_layers(model, prompts, signals=signals, seed=seed, progress=progress)


def _checked_method(method: Placing | AsPublished | Detector, n_boundaries: int | None) -> str:
    """A method's name."""
    label = getattr(method, "__name__", type(method).__name__) if callable(method) else method
    if callable(method) and label in _NAMES:
        raise ValueError(f"method must have a name of its own, got a function called {label!r}")
    if not callable(method) and method not in _NAMES:
        raise ValueError(
            f"method must be one of {', '.join(_NAMES)}, or a function, got {method!r}"
        )
    if method in PUBLISHED_METHODS and n_boundaries is not None:
        raise ValueError(
            f"method {method!r} places as many boundaries as it finds: leave n_boundaries at None, "
            f"got {n_boundaries}"
        )
    own_number = callable(method) or method in ("fused", "stages")
    if not own_number and n_boundaries not in (None, 2):
        raise ValueError(
            f"method {method!r} places two boundaries, got n_boundaries={n_boundaries}"
        )
    return label


def _placed(method: Any, table: pd.DataFrame, n_boundaries: int) -> tuple[int, ...]:
    """Boundaries by a function of somebody's own, checked."""
    places = tuple(int(b) for b in method(table))
    inside = all(a < b for a, b in pairwise((0, *places, len(table))))
    if len(places) != n_boundaries or not inside:
        raise ValueError(
            f"method must return {n_boundaries} boundaries (n_boundaries) that rise from 1 to "
            f"{len(table) - 1}, got {places}"
        )
    return places


@in_own_state
def boundary_signals(profile: LayerProfile) -> pd.DataFrame:
    """The signals that boundaries are sought in, one row per block.

    Levels after each block of compression, relevance, and, per scale, retained information (its
    logarithm, where it is positive everywhere) and predicted information, but of the next token,
    which is relevance once more; the profile's signals of blocks as they are, and of one's own
    signals of sites the levels. Curves that cannot be told from 0 at any site, and columns that
    never change, are left out.

    Args:
        profile: From :func:`~mspgt_lens.profile_layers` or :func:`~mspgt_lens.profile_cache`.

    Returns:
        Shape ``[block, signal]``, in nats and the signals' own units.

    Raises:
        CannotMeasure: If there are fewer than 3 blocks, or nothing changes with depth.
    """
    if profile.n_layers < 3:
        raise CannotMeasure(
            f"profile must be of at least 3 blocks, got {profile.n_layers}: the first and the last "
            "are set apart"
        )
    names, _ = _choose_signals(profile)
    return pd.DataFrame(_matrix(profile, names), columns=list(names))


# Quantity, scale, and whether the signal is a block's, a curve's level, or the level's logarithm.
_Signal = tuple[str, str, Literal["block", "level", "log"]]
# These repeat what relevance and predicted information say, which would count twice.
_NO_SIGNALS = ("logit_lens", "added")


def _choose_signals(profile: LayerProfile) -> tuple[dict[str, _Signal], list[str]]:
    """Names to signals, and notes on what was left out."""
    chosen: dict[str, _Signal] = {}
    left_out = []
    for quantity, scale, curve in profile.curves():
        name = " ".join(filter(None, (quantity, scale))).replace("_", " ")
        kind: Literal["block", "level", "log"] = "level"
        # How often the test is wrong was seen with the package's own curves.
        if quantity in (*_NO_SIGNALS, *RIVAL_SIGNALS) or (
            quantity == "predicted" and profile.bands[scale] == (1, 1) and profile.reads_tokens
        ):
            continue
        if quantity in profile.signals and len(curve) == profile.n_layers:
            kind = "block"
        elif scale and (curve.low <= 0).all():
            left_out.append(f"{name} (cannot be told from 0)")
            continue
        elif quantity == "retained" and (curve.values > 0).all():
            kind = "log"
        signal = quantity, scale, kind
        if np.ptp(_column(profile, signal)[1:-1]) == 0:
            left_out.append(f"{name} (constant)")
        else:
            chosen[f"{name}, log" if kind == "log" else name] = signal
    if not chosen:
        raise CannotMeasure(
            f"no signal of {profile.model_name} changes with depth, so there is nothing to segment"
        )
    return chosen, [f"signals left out: {', '.join(left_out)}"] if left_out else []


def _levels(profile: LayerProfile, signal: _Signal) -> Float[np.ndarray, " row"]:
    """Of every site, or of every block for a block's own signal."""
    quantity, scale, kind = signal
    values = next(c.values for q, s, c in profile.curves() if (q, s) == (quantity, scale))
    return np.log(values) if kind == "log" else values


def _column(profile: LayerProfile, signal: _Signal) -> Float[np.ndarray, " block"]:
    # A jump of a curve belongs to the block that makes it: its level is new after that block.
    levels = _levels(profile, signal)
    return levels if signal[2] == "block" else levels[1:]


def _matrix(
    profile: LayerProfile, signals: Mapping[str, _Signal]
) -> Float[np.ndarray, "block signal"]:
    return np.column_stack([_column(profile, signal) for signal in signals.values()])


def _edges(
    profile: LayerProfile, signals: Mapping[str, _Signal], edges: tuple[Boundary, ...]
) -> tuple[Boundary, ...]:
    """The first block's change of the curves over sites is seen from the site before it."""
    curves = {name: signal for name, signal in signals.items() if signal[2] != "block"}
    if not curves:
        return edges
    before = np.column_stack([_levels(profile, signal) for signal in curves.values()])
    return edge_changes(before, list(curves), profile.n_layers)[0], *edges[1:]


def _replicates(profile: LayerProfile, n_draws: int, seed: int) -> list[LayerProfile]:
    """Profiles as other groups of prompts might have given them.

    Every curve moves along the differences between its folds, all curves together, by multivariate
    t draws with the folds' covariance: the spread that the curves' own intervals state.
    """
    folds = [c.by_fold for quantity, _, c in profile.curves() if quantity not in _NO_SIGNALS]
    counts = {len(f) for f in folds if f is not None}
    if any(f is None for f in folds) or len(counts) != 1:
        return []
    n_folds = counts.pop()
    rng = np.random.default_rng([seed, n_folds])
    normal = rng.standard_normal((n_draws, n_folds))
    heavy = np.sqrt((n_folds - 1) / rng.chisquare(n_folds - 1, size=n_draws))
    weights = normal * heavy[:, None] / np.sqrt(n_folds * (n_folds - 1))

    def moved(curve: Curve, weight: np.ndarray, logarithmic: bool) -> Curve:
        assert curve.by_fold is not None
        change = weight @ (curve.by_fold - curve.by_fold.mean(axis=0))
        if logarithmic:
            # First order in the logarithm, so that a replicate stays positive.
            values = curve.values * np.exp(change / curve.values)
        else:
            values = curve.values + change
        return replace(
            curve,
            values=values,
            low=np.minimum(curve.low, values),
            high=np.maximum(curve.high, values),
        )

    def one(weight: np.ndarray) -> LayerProfile:
        return replace(
            profile,
            compression=moved(profile.compression, weight, False),
            relevance=moved(profile.relevance, weight, False),
            retained={
                s: moved(c, weight, bool((c.values > 0).all())) for s, c in profile.retained.items()
            },
            predicted={s: moved(c, weight, False) for s, c in profile.predicted.items()},
            signals={s: moved(c, weight, False) for s, c in profile.signals.items()},
        )

    return [one(weight) for weight in weights]


def _check_thresholds(given: tuple[float, float]) -> None:
    if len(given) != 2 or not 0 < given[0] < given[1]:
        raise ValueError(f"span_thresholds must be two rising numbers of tokens, got {given!r}")


def _default_thresholds(profile: LayerProfile) -> tuple[float, float]:
    """Where the two bands farthest ahead begin."""
    starts = sorted({a for a, _ in profile.bands.values()})
    first, second = starts[-2:] if len(starts) > 1 else (2, 17)
    return float(first), float(second)


def _attention_span(
    profile: LayerProfile, thresholds: tuple[float, float]
) -> tuple[int, ...] | None:
    if "attention_span" not in profile.signals:
        return None
    span = profile.signals["attention_span"].values
    reached = [np.flatnonzero(span >= threshold) for threshold in thresholds]
    if not all(len(r) for r in reached):
        return None
    return _valid(tuple(int(r[0]) for r in reached), profile.n_layers)


def _mi_peaks(profile: LayerProfile, thresholds: tuple[float, float]) -> tuple[int, ...] | None:
    if "inter_layer_information" not in profile.signals:
        return None
    shared = profile.signals["inter_layer_information"].values
    found: list[tuple[float, int]] = []
    for series in (shared, -shared):
        peaks, properties = find_peaks(series, prominence=0)
        found += list(zip(properties["prominences"].tolist(), peaks.tolist(), strict=True))
    if len(found) < 2:
        return None
    return _valid(tuple(sorted(block for _, block in sorted(found)[-2:])), profile.n_layers)


def _hvib(profile: LayerProfile, thresholds: tuple[float, float]) -> tuple[int, ...] | None:
    scales = _three_scales(profile)
    if len(scales) < 3:
        return None
    gains = []
    for scale in scales:
        predicted, retained = profile.predicted[scale].values, profile.retained[scale].values
        rise, fall = np.ptp(predicted), np.ptp(retained)
        gains.append((predicted / rise if rise else 0.0) - (retained / fall if fall else 0.0))
    n = profile.n_layers
    first, middle, last = (np.broadcast_to(gain, n + 1) for gain in gains)

    def total(a: int, b: int) -> float:
        return float(first[a] - first[0] + middle[b] - middle[a] + last[n] - last[b])

    return max(combinations(range(1, n), 2), key=lambda places: total(*places))


def _three_scales(profile: LayerProfile) -> list[str]:
    """The theory's scales, or the three bands nearest the token; fewer where there are fewer."""
    named = [s for s in _THREE_SCALES if s in profile.bands]
    return (
        named if len(named) == 3 else sorted(profile.bands, key=lambda s: profile.bands[s][0])[:3]
    )


def _signal(profile: LayerProfile, name: str) -> Float[np.ndarray, " block"] | None:
    return profile.signals[name].values if name in profile.signals else None


def _mi_drop(profile: LayerProfile, weights: _Weights) -> tuple[int, ...] | None:
    information = _signal(profile, "inter_layer_information")
    return None if information is None else published.information_drops(information)


def _attention_distance(profile: LayerProfile, weights: _Weights) -> tuple[int, ...] | None:
    distance = _signal(profile, "attention_distance")
    return None if distance is None else published.distance_rises(distance)


def _published_fusion(profile: LayerProfile, weights: _Weights) -> tuple[int, ...] | None:
    distance = _signal(profile, "attention_distance")
    information = _signal(profile, "inter_layer_information")
    scales = _three_scales(profile)
    if distance is None or information is None or len(scales) < 3:
        return None
    probes = [profile.predicted[scale].values for scale in scales]
    return published.fused(probes, distance, information, weights)


def _thirds(profile: LayerProfile, thresholds: tuple[float, float]) -> tuple[int, ...]:
    n = profile.n_layers
    return round(n / 3), round(2 * n / 3)


def _quarters(profile: LayerProfile, thresholds: tuple[float, float]) -> tuple[int, ...]:
    n = profile.n_layers
    return round(n / 4), round(3 * n / 4)


def _stages(
    signals: Float[np.ndarray, "block signal"], n_boundaries: int, min_size: int
) -> tuple[int, ...]:
    # Its default jump=5 would look at every fifth block only.
    search = ruptures.Dynp(model="l2", min_size=min_size, jump=1).fit(rank_normalize(signals))
    return tuple(int(b) for b in search.predict(n_bkps=n_boundaries)[:-1])


def _valid(places: tuple[int, ...], n_layers: int) -> tuple[int, ...] | None:
    rising = all(a < b for a, b in pairwise(places))
    return places if rising and places[0] > 0 and places[-1] < n_layers else None


_DETECTORS: Mapping[str, Callable[[LayerProfile, tuple[float, float]], tuple[int, ...] | None]] = {
    "attention_span": _attention_span,
    "mi_peaks": _mi_peaks,
    "hvib": _hvib,
    "thirds": _thirds,
    "quarters": _quarters,
}
# As published: however many boundaries there are; None where the signals were not profiled.
_PUBLISHED: Mapping[str, Callable[[LayerProfile, _Weights], tuple[int, ...] | None]] = {
    "attention_distance": _attention_distance,
    "mi_drop": _mi_drop,
    "published_fusion": _published_fusion,
}
_WHY_NONE = {
    "attention_span": "its mean attention span was not profiled, or does not pass both thresholds "
    "at two blocks after the first; give other span_thresholds=",
    "mi_peaks": "the information between neighboring sites was not profiled, or has fewer than two "
    "peaks and troughs",
    "hvib": "it needs three bands",
    "attention_distance": "the attention distance was not profiled; add it to signals= of "
    "profile_layers",
    "mi_drop": "the information between neighboring sites was not profiled; add "
    "inter_layer_information to signals= of profile_layers",
    "published_fusion": "it needs three bands, and attention_distance and inter_layer_information "
    "among the signals; add them to signals= of profile_layers",
}
