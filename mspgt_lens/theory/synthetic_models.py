"""Results of made-up models of which it is known whether each prediction of the theory holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Curve, Estimate
from mspgt_lens.partition import SCALES, Boundary, ScalePartition, Support
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.targets import DEFAULT_BANDS
from mspgt_lens.theory.effect_predictions import SHAPES
from mspgt_lens.theory.synthetic_curves import check_truths, with_rival_curves
from mspgt_lens.theory.verdicts import ModelResults
from mspgt_lens.theory.waterfilling import water_fill

Boundaries = Literal["water-filling", "thirds", "quarters", "random", "families", "size"]
DEPTHS = (16, 24, 28, 32, 40, 48, 64, 80)
_N_FOLDS = 5
# Shares 0.22, 0.33 and 0.45 of the depth; at 32 blocks 5, 9 and 18.
_KAPPAS = np.array([0.135, 0.09, 0.066])
_LEVELS = np.array([1.0, 1.2, 1.6])


@in_own_state
def synthetic_models(
    n_families: int = 3,
    n_per_family: int = 6,
    *,
    boundaries: Boundaries = "water-filling",
    noise: float = 1.0,
    variation: float = 0.03,
    family_ratio: float = 100.0,
    segment_ratio: float = 5.0,
    excess: float = 0.5,
    half_depths: tuple[float, float, float] = (0.1, 0.35, 0.6),
    supported: bool = True,
    rivals: Mapping[str, float] | None = None,
    rival_spread: float = 1.0,
    seed: int = 0,
) -> list[ModelResults]:
    """Results as if measured on made-up models, for testing what verdicts they lead to.

    Args:
        n_families: Number of families.
        n_per_family: Models per family, their depths taken in turn from 16 to 80 blocks, their
            sizes growing with depth.
        boundaries: Where boundaries lie: by ``"water-filling"``; at ``"thirds"`` or ``"quarters"``
            of the depth; at ``"random"`` places; at depths of each of the ``"families"`` own; or
            deeper with the logarithm of the ``"size"``.
        noise: Standard deviation of boundaries around that, in blocks.
        variation: With ``"families"``, the coefficient of variation within a family.
        family_ratio: Brittleness of the last family over the first's, the others between.
        segment_ratio: Brittleness of the local segment over the others'.
        excess: Excess of the diagonal of segments by token classes.
        half_depths: Relative depth at which each scale's predicted information reaches half its
            maximum, before a spread of 0.05 over models.
        supported: Whether the partition's own test supports two boundaries.
        rivals: Name of a prediction of another theory (``"R4 entropy valley"``) to what its
            statistic truly is, on average over models (geometric, of a ratio): models then hold the
            curves that it is about. None for models without any.
        rival_spread: How far models differ in these, as a multiple of what is usual; 0 for alike.
        seed: Decides every draw.

    Returns:
        ``n_families * n_per_family`` results, family by family.

    Raises:
        ValueError: If ``boundaries`` is none of these, or ``rivals`` names no prediction.

    Example:
        >>> models = ml.synthetic.synthetic_models(2, 3, boundaries="thirds")
        >>> [one.family for one in models]
        ['family 1', 'family 1', 'family 1', 'family 2', 'family 2', 'family 2']
    """
    if boundaries not in get_args(Boundaries):
        raise ValueError(
            f"boundaries must be one of {', '.join(get_args(Boundaries))}, got {boundaries!r}"
        )
    check_truths(rivals or {})
    rng = np.random.default_rng(seed)
    made = []
    for family in range(n_families):
        home = np.array([0.3, 0.6]) + 0.15 * family / max(n_families - 1, 1)
        for member in range(n_per_family):
            n_layers = DEPTHS[(member * n_families + family) % len(DEPTHS)]
            size = int(4e5 * n_layers**2.5 * np.exp(0.2 * rng.standard_normal()))
            places = _places(boundaries, n_layers, size, home, variation, rng)
            placed = _rounded(places + noise * rng.standard_normal(2), n_layers)
            name = f"family {family + 1}, model {member + 1}"
            risen = np.log(family_ratio) * family / max(n_families - 1, 1)
            profile = _profile(name, n_layers, half_depths, rng)
            one = ModelResults(
                profile,
                _partition(name, n_layers, placed, noise, supported),
                family=f"family {family + 1}",
                n_parameters=size,
                random_weights=_partition(name, n_layers, placed, noise, False),
                brittleness={s: _brittleness(risen, segment_ratio, rng) for s in SHAPES},
                dissociation=_interaction(excess, rng),
            )
            made.append(with_rival_curves(one, rivals, rival_spread, rng) if rivals else one)
    return made


def _places(
    kind: Boundaries,
    n_layers: int,
    size: int,
    home: np.ndarray,
    variation: float,
    rng: np.random.Generator,
) -> np.ndarray:
    match kind:
        case "water-filling":
            importances = np.exp(_LEVELS) / _KAPPAS
            lengths = water_fill(
                n_layers, betas=importances, kappas=_KAPPAS, distortions=np.ones(3)
            )
            places: np.ndarray = np.cumsum(lengths)[:2]
            return places
        case "thirds":
            return n_layers * np.array([1, 2]) / 3
        case "quarters":
            return n_layers * np.array([1, 3]) / 4
        case "random":
            return n_layers * np.sort(rng.uniform(0.05, 0.95, 2))
        case "families":
            moved: np.ndarray = n_layers * home * (1 + variation * rng.standard_normal(2))
            return moved
        case "size":
            # From 0.2 and 0.45 of the depth at 0.4 billion parameters to 0.45 and 0.7 at 20.
            risen: np.ndarray = np.array([0.2, 0.45]) + 0.15 * np.log10(size / 4e8)
            return n_layers * risen


def _rounded(places: np.ndarray, n_layers: int) -> tuple[int, int]:
    """Whole blocks that leave every segment at least one."""
    first = int(np.clip(np.rint(places.min()), 1, n_layers - 2))
    return first, int(np.clip(np.rint(places.max()), first + 1, n_layers - 1))


def _partition(
    name: str, n_layers: int, placed: tuple[int, int], noise: float, supported: bool
) -> ScalePartition:
    reach = round(1.96 * noise)
    p_value = 0.01 if supported else 0.5
    return ScalePartition(
        model_name=name,
        n_layers=n_layers,
        boundaries=placed,
        intervals=tuple((max(b - reach, 1), min(b + reach, n_layers - 1)) for b in placed),
        p_values={1: p_value, 2: p_value, 3: p_value},
        n_boundaries=2 if supported else 0,
        explained=0.5,
        probability=np.zeros(n_layers),
        sharpness={"stages": 0.5 if supported else 0.9, "drift": 0.7, "both": 0.6},
        by_method={"fused": placed},
        by_signal={"made up": Support(1.0, None, None)},
        signals=np.arange(n_layers, dtype=float)[:, None],
        drift="made up",
        autocorrelation=0.0,
        found=tuple(Boundary(b, "jump", ("made up",), 10.0, p_value) for b in placed if supported),
    )


def _profile(
    name: str, n_layers: int, half_depths: tuple[float, float, float], rng: np.random.Generator
) -> LayerProfile:
    depth = np.linspace(0.0, 1.0, n_layers + 1)

    def curve(values: np.ndarray, spread: float = 0.02) -> Curve:
        folds = values * (1 + spread * rng.standard_normal((_N_FOLDS, 1)))
        folds = folds + spread * values.max() * rng.standard_normal(folds.shape)
        mean, reach = folds.mean(axis=0), 2 * folds.std(axis=0, ddof=1) / _N_FOLDS**0.5
        return Curve(mean, mean - reach, mean + reach, "nats", "Made up.", folds)

    predicted = {}
    for scale, half in zip(SCALES, half_depths, strict=True):
        own_half = half + 0.05 * rng.standard_normal()
        risen = 1 / (1 + np.exp(-12 * (depth - own_half)))
        predicted[scale] = curve(0.3 + risen / risen.max() if scale == "local" else risen)
    return LayerProfile(
        model_name=name,
        n_layers=n_layers,
        n_tokens=10_000,
        n_groups=100,
        bands=DEFAULT_BANDS,
        compression=curve(100 + 50 * depth),
        relevance=curve(1 + 3 * depth),
        retained={scale: curve(3 - 2 * depth) for scale in SCALES},
        predicted=predicted,
        signals={},
    )


def _brittleness(
    risen: float, segment_ratio: float, rng: np.random.Generator
) -> dict[str, Estimate]:
    """Logarithms, with a spread of 0.4 over models."""
    logs = risen + 0.4 * rng.standard_normal(3)
    logs[0] += np.log(segment_ratio)
    return {
        scale: Estimate(float(v), float(v) - 0.2, float(v) + 0.2, "log", "Made up.")
        for scale, v in zip(SCALES, logs, strict=True)
    }


def _interaction(excess: float, rng: np.random.Generator) -> Estimate:
    """The excess with a spread of 0.1 over models."""
    value = float(excess + 0.1 * rng.standard_normal())
    return Estimate(value, value - 0.1, value + 0.1, "of the mean increase", "Made up.")
