"""Whose stages are these? A partition's boundaries against the places that theories name."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.partition import ScalePartition
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.statistics import LEVEL, holm
from mspgt_lens.theory.depth_statistics import MASSIVE, massive_blocks, relief
from mspgt_lens.theory.judging import MSPGT
from mspgt_lens.theory.place_comparison import PlaceComparison, PlacedTheory
from mspgt_lens.theory.rival_predictions import (
    ABSTRACTION,
    ENTROPY_VALLEY,
    HALF_DEPTH,
    MIX_COMPRESS_REFINE,
    STAGES_OF_INFERENCE,
)

# As the first version gives them, of residuals 0 ... 12: local 0 to 2 and intermediate 3 to 8 in
# GPT-2, 0 to 4 and 5 to 8 in BERT and RoBERTa; T5, of 0 ... 6, has the same shares as these.
_DECODERS = ("segments of GPT-2 (arXiv 2505.18244v1)", (2 / 12, 8 / 12))
_ENCODERS = ("segments of BERT, RoBERTa and T5 (arXiv 2505.18244v1)", (4 / 12, 8 / 12))
# A valley or a peak that stands out less has no places. Fixed before any model was compared.
PROMINENT = 0.1
# Placements that are worth walking through: three boundaries in 180 blocks.
_MOST_PLACEMENTS = 1_000_000


@in_own_state
def compare_places(
    partition: ScalePartition, profile: LayerProfile | None = None
) -> PlaceComparison:
    """How near a partition's boundaries are to each theory's places, against chance placements.

    The distance is the mean over boundaries of that to the nearest place, and the mean over places
    of that to the nearest boundary, half each, so that it is 0 only where both are the same. It is
    held against all placements of as many boundaries that leave every segment ``min_size`` blocks:
    p is the share of those that are as near or nearer, ties counted, and exact where boundaries
    are anywhere alike; Holm's correction is over the theories. What places are is in
    ``docs/rivals.md``.

    Boundaries of a method are not anywhere alike: of a mere drift, most methods place two near
    thirds of the depth. Nearness to a theory's places says something only where the partition's
    own test supports the boundaries.

    Args:
        partition: The partition, whether its boundaries are supported or not.
        profile: The same model's profile, for places that its ``first_norm``, ``prompt_entropy``
            and ``intrinsic_dimension`` show; without, or where it lacks them, those are left out.
            MSPGT's places are those of an encoder if the profile is of one, else of a decoder.

    Returns:
        Every theory's places, distance and p-values, and why theories were left out.

    Raises:
        ValueError: If the profile is of another number of blocks.
        CannotMeasure: If the partition has no boundaries, or too many to walk through.

    Example:
        >>> partition = ml.detect_scales(profile=profile)
        >>> places = ml.theory.compare_places(partition, profile)
        >>> places["half-depth transition"].places
        (4.0,)
    """
    n_layers, boundaries = partition.n_layers, partition.boundaries
    if profile is not None and profile.n_layers != n_layers:
        raise ValueError(
            f"profile must be of the partition's model, of {n_layers} blocks, got "
            f"{profile.n_layers}"
        )
    if not boundaries:
        raise CannotMeasure("partition has no boundaries, so that there is nothing to compare")
    edges = (0, *boundaries, n_layers)
    asked = int(partition.settings.get("min_size", 1))
    # What the test finds may be nearer to one another than what is placed without support.
    min_size = asked if min(np.diff(edges)) >= asked else 1
    placements = _placements(n_layers, len(boundaries), min_size)
    named_places, left_out = _places(n_layers, profile)
    found = []
    for theory, (what, places) in named_places.items():
        own = _distances(np.array([boundaries], dtype=float), np.array(places))[0] / n_layers
        by_chance = _distances(placements, np.array(places)) / n_layers
        # Up to rounding, so that ties are ties.
        p_value = float((by_chance <= own + 1e-12).mean())
        least = float((by_chance <= by_chance.min() + 1e-12).mean())
        low, middle, high = np.quantile(by_chance, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]).tolist()
        chance = (middle, low, high)
        found.append(PlacedTheory(theory, what, places, float(own), *chance, p_value, 1.0, least))
    corrected = holm(np.array([one.p_value for one in found]))
    return PlaceComparison(
        model_name=partition.model_name,
        n_layers=n_layers,
        boundaries=boundaries,
        supported=partition.supported,
        n_placements=len(placements),
        min_size=min_size,
        theories=tuple(
            one._replace(p_holm=float(p)) for one, p in zip(found, corrected, strict=True)
        ),
        left_out=left_out,
    )


def _places(
    n_layers: int, profile: LayerProfile | None
) -> tuple[dict[str, tuple[str, tuple[float, ...]]], dict[str, str]]:
    """Theory to what its places are and where, and theory to why it has none."""
    # Only profiles of models that attend in both directions hide tokens.
    encodes = profile is not None and "hidden_share" in profile.settings
    shares = {
        MSPGT: _ENCODERS if encodes else _DECODERS,
        HALF_DEPTH: ("half depth (arXiv 2505.13898)", (1 / 2,)),
        STAGES_OF_INFERENCE: (
            "half depth and the last block (arXiv 2406.19384v1)",
            (1 / 2, 1 - 1 / n_layers),
        ),
    }
    places = {
        theory: (what, tuple(share * n_layers for share in of))
        for theory, (what, of) in shares.items()
    }
    left_out = {}
    shown = {
        MIX_COMPRESS_REFINE: (
            "first_norm",
            "onset and end of massive activations (arXiv 2510.06477)",
            _massive,
        ),
        ENTROPY_VALLEY: (
            "prompt_entropy",
            "steepest fall into and rise out of the valley (arXiv 2502.02013)",
            _valley,
        ),
        ABSTRACTION: (
            "intrinsic_dimension",
            "peak of intrinsic dimension (arXiv 2405.15471)",
            _peak,
        ),
    }
    for theory, (signal, what, of) in shown.items():
        if profile is None or signal not in profile.signals:
            left_out[theory] = f"there is no {signal} to place it by"
            continue
        found = of(profile.signals[signal].values)
        if isinstance(found, str):
            left_out[theory] = found
        else:
            places[theory] = (what, found)
    return places, left_out


def _massive(norm: Float[np.ndarray, " site"]) -> tuple[float, ...] | str:
    phases = massive_blocks(norm)
    if phases is None:
        return f"no massive activations (first_norm is nowhere {MASSIVE:g})"
    return tuple(map(float, phases))


def _valley(entropy: Float[np.ndarray, " site"]) -> tuple[float, ...] | str:
    lowest, depth = relief(entropy, entropy, -1.0)
    if depth < PROMINENT:
        return f"prompt_entropy has no interior valley of {PROMINENT:.0%} of its lower shore"
    steps = np.diff(entropy)
    return float(steps[:lowest].argmin()), float(lowest + steps[lowest:].argmax())


def _peak(dimension: Float[np.ndarray, " site"]) -> tuple[float, ...] | str:
    highest, height = relief(dimension, dimension, 1.0)
    if height < PROMINENT:
        return f"intrinsic_dimension has no interior peak of {PROMINENT:.0%} of its height"
    return (float(highest),)


def _placements(
    n_layers: int, n_boundaries: int, min_size: int
) -> Float[np.ndarray, "placement boundary"]:
    """All of them, every segment of ``min_size`` blocks or more."""
    # Taking from every segment what it must have leaves free choices of as many places.
    free = n_layers - (n_boundaries + 1) * (min_size - 1) - 1
    number = comb(free, n_boundaries)
    if number > _MOST_PLACEMENTS:
        raise CannotMeasure(
            f"partition has {n_boundaries} boundaries in {n_layers} blocks, which is {number:,} "
            f"placements; at most {_MOST_PLACEMENTS:,} can be walked through: place fewer "
            "(n_boundaries of detect_scales)"
        )
    flat = itertools.chain.from_iterable(itertools.combinations(range(1, free + 1), n_boundaries))
    chosen = np.fromiter(flat, dtype=float, count=number * n_boundaries)
    between = (min_size - 1) * np.arange(1, n_boundaries + 1)
    placed: np.ndarray = chosen.reshape(number, n_boundaries) + between
    return placed


def _distances(
    placements: Float[np.ndarray, "placement boundary"], places: Float[np.ndarray, " place"]
) -> Float[np.ndarray, " placement"]:
    """In blocks; see :func:`compare_places`."""
    apart = np.abs(placements[:, :, None] - places)
    both: np.ndarray = (apart.min(axis=2).mean(axis=1) + apart.min(axis=1).mean(axis=1)) / 2
    return both
