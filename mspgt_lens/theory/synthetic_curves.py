"""Curves of made-up models in which the statistics of rival theories are what they are set to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from mspgt_lens.estimates import Curve
from mspgt_lens.perturbation.block_runs import REACHES, SHIFTS
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.theory.depth_statistics import step_against_line
from mspgt_lens.theory.verdicts import ModelResults

_N_FOLDS, _N_GROUPS = 5, 20
# How far a model's own statistic lies from the mean over models (standard deviation), and what
# holds where a statistic is not set itself but another of the same curve is.
_SPREAD: Mapping[str, tuple[float, float]] = {
    "R1 future tokens": (0.2, 0.4),
    "R1 one transition": (0.2, 0.6),
    "R2 massive activations": (0.03, 0.05),
    "R3 middle blocks": (0.03, 0.85),
    "R3 first and last": (0.05, 0.3),
    "R4 entropy valley": (0.05, 0.3),
    "R5 early peak": (0.05, 0.2),
    "R5 learned peak": (0.05, 0.4),
}
_LOGARITHMIC = ("R1 future tokens", "R1 one transition")


def check_truths(rivals: Mapping[str, float]) -> None:
    """Whether these are predictions that curves can be made for.

    Args:
        rivals: Name of the prediction to its true statistic.

    Raises:
        ValueError: If one is not.
    """
    if not set(rivals) <= set(_SPREAD):
        raise ValueError(f"rivals must be among {', '.join(_SPREAD)}, got {', '.join(rivals)}")


def with_rival_curves(
    result: ModelResults, rivals: Mapping[str, float], spread: float, rng: np.random.Generator
) -> ModelResults:
    """A model with the curves that some predictions are about.

    Args:
        result: The model without them.
        rivals: Name of the prediction to its statistic, on average over models.
        spread: How far models differ, as a multiple of what is usual.
        rng: What draws.
    """
    own = {name: _own(name, rivals, spread, rng) for name in _SPREAD}
    signals: dict[str, Curve] = {}
    random_profile = None
    n_sites = result.profile.n_layers + 1
    if "R2 massive activations" in rivals:
        signals["first_norm"] = _first_norm(result, own["R2 massive activations"], rng)
    if "R4 entropy valley" in rivals:
        signals["prompt_entropy"] = _measured(_valley(n_sites, own["R4 entropy valley"]), rng)
    if {"R5 early peak", "R5 learned peak"} & set(rivals):
        peaks = _dimension(n_sites, own["R5 early peak"], own["R5 learned peak"])
        signals["intrinsic_dimension"] = _measured(peaks, rng)
        flat = _measured(np.full(n_sites, 12.0), rng)
        random_profile = _twin(result.profile, {"intrinsic_dimension": flat})
    effects = None
    if any(name.startswith(("R1", "R3")) for name in rivals):
        effects = _effects(result.profile, own, rng)
    profile = replace(result.profile, signals={**result.profile.signals, **signals})
    return replace(result, profile=profile, random_profile=random_profile, block_effects=effects)


def _own(name: str, rivals: Mapping[str, float], spread: float, rng: np.random.Generator) -> float:
    """A model's own true statistic."""
    usual, otherwise = _SPREAD[name]
    mean, moved = rivals.get(name, otherwise), spread * usual * float(rng.standard_normal())
    return mean * float(np.exp(moved)) if name in _LOGARITHMIC else mean + moved


def _measured(
    values: Float[np.ndarray, " point"], rng: np.random.Generator, noise: float = 0.01
) -> Curve:
    folds = values * (1 + noise * rng.standard_normal((_N_FOLDS, len(values))))
    mean = folds.mean(axis=0)
    reach = 2.8 * folds.std(axis=0, ddof=1) / _N_FOLDS**0.5
    return Curve(mean, mean - reach, mean + reach, "made up", "Made up.", folds)


def _first_norm(result: ModelResults, distance: float, rng: np.random.Generator) -> Curve:
    """Massive from one block to another, each so far from one of the model's boundaries."""
    n_layers = result.profile.n_layers
    # Rounded up or down so that its mean stays what it is.
    blocks = int(np.floor(abs(distance) * n_layers + rng.uniform()))
    first, second = result.partition.boundaries
    onset = first - blocks if first >= blocks else first + blocks
    end = second + blocks if second + blocks < n_layers else second - blocks
    if onset >= end:
        raise ValueError(f"rivals: boundaries leave no room for a distance of {distance:.3g}")
    sites = np.arange(n_layers + 1)
    return _measured(np.where((sites > onset) & (sites <= end), 200.0, 1.0), rng)


def _valley(n_sites: int, depth: float) -> Float[np.ndarray, " site"]:
    """A trough that takes this share of the shores, or a hill where it is negative."""
    depths = np.linspace(0.0, 1.0, n_sites)
    trough = np.exp(-0.5 * ((depths - 0.5) / 0.12) ** 2)
    curve: np.ndarray = 3.5 * (1 - depth * trough / trough.max())
    return curve


def _dimension(n_sites: int, early: float, height: float) -> Float[np.ndarray, " site"]:
    """Two peaks, the first so much higher than the second, above a foot that is so much lower."""
    depths = np.linspace(0.0, 1.0, n_sites)
    first, second = (_spike(depths, center) for center in (0.3, 0.75))
    top, foot = 20.0, 20.0 * (1 - height)
    lower = max(top * (1 - abs(early)), foot)
    left, right = (top, lower) if early > 0 else (lower, top)
    return foot + (left - foot) * first + (right - foot) * second


def _spike(depths: Float[np.ndarray, " site"], center: float) -> Float[np.ndarray, " site"]:
    """1 at the site nearest to a depth, 0 a fifth of the depth away."""
    nearest = depths[np.abs(depths - center).argmin()]
    spike: np.ndarray = (1 - np.abs(depths - nearest) / 0.2).clip(min=0)
    return spike


def _twin(profile: LayerProfile, signals: Mapping[str, Curve]) -> LayerProfile:
    return replace(
        profile,
        model_name=f"{profile.model_name} (random weights)",
        control="random_weights",
        signals=dict(signals),
    )


def _effects(
    profile: LayerProfile, own: Mapping[str, float], rng: np.random.Generator
) -> BlockEffects:
    n = profile.n_layers
    future = _future(n, own["R1 future tokens"], own["R1 one transition"])
    kept = np.full(n, own["R3 middle blocks"])
    kept[[0, -1]] -= own["R3 first and last"]
    skip = np.full((len(REACHES), len(SHIFTS), n, _N_GROUPS), 0.1)
    noise = 1 + 0.1 * rng.standard_normal((n, _N_GROUPS))
    skip[REACHES.index("future"), SHIFTS.index("kl")] = future[:, None] * noise
    drawn = kept[:, None] + 0.05 * rng.standard_normal((n, _N_GROUPS))
    skip[REACHES.index("all"), SHIFTS.index("top1_kept")] = drawn
    return BlockEffects(profile.model_name, n, skip, skip[:, :, :-1])


def _future(n: int, ratio: float, error: float) -> Float[np.ndarray, " block"]:
    """Effects whose second half is so much smaller, and that are so much more a step than a line.

    A zigzag about a mixture of both decides the errors; how far it is stretched, the ratio. They
    are squares, because the statistic takes roots.
    """
    blocks = np.arange(n)
    step, line = np.where(blocks >= n / 2, -1.0, 1.0), 1 - 2 * blocks / (n - 1)
    rough = 0.1 * np.where(blocks % 2, -1.0, 1.0)

    def shape(weight: float) -> np.ndarray:
        return weight * step + (1 - weight) * line + rough

    def off(weight: float) -> float:
        return step_against_line((2 + shape(weight)) ** 2) - float(np.log(error))

    own = shape(float(_root(off, 0.0, 1.0, "R1 one transition", error)))
    inner = own[1:-1]
    half = np.arange(1, n - 1) >= n / 2

    def away(stretch: float) -> float:
        moved = (1 + stretch * inner) ** 2
        return float(np.log(moved[half].mean() / moved[~half].mean() / ratio))

    most = 0.99 / float(np.abs(inner).max())
    stretch = _root(away, -most, most, "R1 future tokens", ratio)
    effects: np.ndarray = (1 + stretch * own).clip(min=0) ** 2
    effects[-1] = 0.0
    return effects


def _root(
    off: Callable[[float], float], low: float, high: float, name: str, wanted: float
) -> float:
    if off(low) * off(high) > 0:
        raise ValueError(
            f"rivals: no curve has {wanted:.3g} for {name} with the others as they are"
        )
    return float(brentq(off, low, high))
