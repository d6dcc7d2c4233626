"""Signals with planted segments, or none: what the boundary test can see, and what it must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binomtest

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, tidy
from mspgt_lens.scales.evidence import Change, change_curves
from mspgt_lens.scales.seeking import seek_changes, standardized
from mspgt_lens.scales.segments import MIN_BLOCKS
from mspgt_lens.statistics import LEVEL, SIGNIFICANCE

Drift = Literal["flat", "ramp", "quadratic", "exponential", "logarithm", "sigmoid", "random_walk"]
_HEAVY = 3
_WIDEST = 3
Planted = Literal["jumps", "bends", "both"]
Noise = Literal["white", "random_walk"]
Tails = Literal["normal", "heavy"]
NoiseSize = Literal["even", "ends", "growing"]
DRIFTS: tuple[Drift, ...] = get_args(Drift)


@dataclass(frozen=True, eq=False, repr=False)
class SyntheticSignals(Result):
    """Signals whose boundaries are known.

    Attributes:
        signals: Shape ``[block, signal]``, for :func:`~mspgt_lens.segment_blocks`.
        boundaries: First block of every planted segment but the first; empty for a null.
    """

    signals: Float[np.ndarray, "block signal"]
    boundaries: tuple[int, ...]

    def heading(self) -> str:
        """Sizes."""
        n_layers, n_signals = self.signals.shape
        return f"SyntheticSignals: {n_signals} signals over {n_layers} blocks"

    def findings(self) -> list[str]:
        """Where boundaries were planted."""
        places = ", ".join(map(str, self.boundaries))
        return [f"Boundaries planted at blocks {places}." if places else "No boundary is planted."]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per signal and block: ``quantity, block, value, unit``."""
        n_layers, n_signals = self.signals.shape
        names = np.repeat([f"signal {i}" for i in range(n_signals)], n_layers)
        blocks = np.tile(np.arange(n_layers), n_signals)
        values = {"value": self.signals.T.ravel(), "unit": "noise deviations"}
        return tidy({"quantity": names, "block": blocks, **values})


@in_own_state
def synthetic_signals(
    n_layers: int,
    n_signals: int = 8,
    *,
    n_boundaries: int = 2,
    effect: float = 2.0,
    kind: Planted = "jumps",
    width: int = 1,
    share: float = 1.0,
    drift: Drift = "flat",
    drift_size: float = 4.0,
    noise: Noise = "white",
    tails: Tails = "normal",
    noise_size: NoiseSize = "even",
    correlation: float = 0.0,
    autocorrelation: float = 0.0,
    seed: int = 0,
) -> SyntheticSignals:
    """Signals over depth: drift, sharp changes planted on top, and noise of variance 1.

    Args:
        n_layers: Depth, at least 6.
        n_signals: Number of signals.
        n_boundaries: Planted boundaries, at random places that leave every segment at least a sixth
            of the depth (for two); 0 for a null.
        effect: Size of every change in units of the noise's deviation, its sign drawn for every
            signal; 2 is noise at half the jump.
        kind: ``"jumps"``: the level jumps at a boundary. ``"bends"``: the rate of change does, by
            ``effect`` per block. ``"both"``: jumps and bends take turns.
        width: Blocks over which every jump spreads evenly, 1 to 3; the boundary is the first.
        share: The share of signals that show a boundary, drawn for each; at least one does.
        drift: What changes gradually underneath, with its sign and size drawn for every signal.
        drift_size: Typical rise of the drift over the whole depth, in units of the noise; for
            ``"random_walk"`` the deviation of its steps is ``drift_size / 4``.
        noise: ``"white"``: new at every block. ``"random_walk"``: its steps are.
        tails: ``"normal"``, or ``"heavy"``: Student's t with 3 degrees of freedom, of variance 1,
            independent between signals.
        noise_size: ``"even"``; ``"ends"``: four times larger in the first and last two blocks;
            ``"growing"``: twentyfold with depth, like an exponential level's.
        correlation: Correlation of the noise between signals.
        autocorrelation: Lag-one autocorrelation of white noise along depth.
        seed: Decides everything.

    Returns:
        The signals, ``[block, signal]``, in units of the noise's deviation, and the planted
        boundaries.

    Raises:
        ValueError: If the depth cannot hold so many boundaries, or an argument is outside its
            range.

    Example:
        >>> made = ml.synthetic.synthetic_signals(24, n_signals=3, effect=4.0)
        >>> made.signals.shape, made.boundaries
        ((24, 3), (..., ...))
    """
    if n_layers < MIN_BLOCKS or n_signals < 1:
        raise ValueError(
            f"n_layers must be at least {MIN_BLOCKS} and n_signals at least 1, got {n_layers} and "
            f"{n_signals}"
        )
    if not 0 <= correlation < 1 or not -1 < autocorrelation < 1:
        raise ValueError(
            "correlation must be in [0, 1) and autocorrelation in (-1, 1), got "
            f"{correlation} and {autocorrelation}"
        )
    if not 1 <= width <= _WIDEST:
        raise ValueError(f"width must be 1 to {_WIDEST} blocks, got {width}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    for name, given, known in (
        ("kind", kind, Planted),
        ("noise", noise, Noise),
        ("tails", tails, Tails),
        ("noise_size", noise_size, NoiseSize),
    ):
        if given not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {given!r}")
    rng = np.random.default_rng(seed)
    boundaries = _places(n_layers, n_boundaries, width, rng)
    signals = _drift(drift, n_layers, n_signals, drift_size, rng)
    varied = _noise(n_layers, n_signals, correlation, autocorrelation, tails, rng)
    varied = varied * _sizes(noise_size, n_layers)[:, None]
    signals = signals + (np.cumsum(varied, axis=0) if noise == "random_walk" else varied)
    for number, boundary in enumerate(boundaries):
        shows = np.zeros(n_signals)
        shows[rng.permutation(n_signals)[: max(1, round(share * n_signals))]] = effect
        bends = kind == "bends" or (kind == "both" and number % 2 == 1)
        change = Change("bend", boundary) if bends else Change("jump", boundary, width)
        curve = change_curves(n_layers, [change])
        signals = signals + curve * shows * rng.choice([-1.0, 1.0], size=n_signals)
    return SyntheticSignals(signals, boundaries)


def _places(
    n_layers: int, n_boundaries: int, width: int, rng: np.random.Generator
) -> tuple[int, ...]:
    if not 0 <= n_boundaries <= n_layers // 2 - 1:
        raise ValueError(
            f"n_boundaries must be 0 to {n_layers // 2 - 1} for {n_layers} blocks, got "
            f"{n_boundaries}"
        )
    shortest = max(2, n_layers // (3 * (n_boundaries + 1) - 3)) if n_boundaries > 1 else 2
    shortest = min(max(shortest, width), n_layers // (n_boundaries + 1))
    # Even among all placements: spare blocks are dealt to the segments at random.
    spare = n_layers - shortest * (n_boundaries + 1)
    cuts = np.sort(rng.integers(0, spare + 1, size=n_boundaries))
    return tuple(int(c + shortest * (i + 1)) for i, c in enumerate(cuts))


def _drift(
    drift: Drift, n_layers: int, n_signals: int, size: float, rng: np.random.Generator
) -> Float[np.ndarray, "block signal"]:
    if drift == "random_walk":
        walk: np.ndarray = np.cumsum(rng.standard_normal((n_layers, n_signals)), axis=0) * size / 4
        return walk
    depth = np.linspace(0.0, 1.0, n_layers)
    shapes = {
        "flat": np.zeros(n_layers),
        "ramp": depth,
        "quadratic": (2 * depth - 1) ** 2,
        "exponential": np.expm1(3 * depth) / np.expm1(3.0),
        "logarithm": np.log1p(9 * depth) / np.log(10.0),
        "sigmoid": 1 / (1 + np.exp(-12 * (depth - 0.5))),
    }
    if drift not in shapes:
        raise ValueError(f"drift must be one of {', '.join(DRIFTS)}, got {drift!r}")
    amplitude = size * rng.choice([-1.0, 1.0], n_signals) * rng.uniform(0.5, 1.5, n_signals)
    risen: np.ndarray = shapes[drift][:, None] * amplitude
    return risen


def _noise(
    n_layers: int,
    n_signals: int,
    correlation: float,
    autocorrelation: float,
    tails: Tails,
    rng: np.random.Generator,
) -> Float[np.ndarray, "block signal"]:
    shared = rng.standard_normal((n_layers, 1))
    own = rng.standard_normal((n_layers, n_signals))
    noise: np.ndarray = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    if tails == "heavy":
        # Their variance is 3.
        noise /= np.sqrt(rng.chisquare(_HEAVY, noise.shape) / _HEAVY) * np.sqrt(_HEAVY)
    noise[1:] *= np.sqrt(1 - autocorrelation**2)
    for block in range(1, n_layers):
        noise[block] += autocorrelation * noise[block - 1]
    return noise


def _sizes(noise_size: NoiseSize, n_layers: int) -> Float[np.ndarray, " block"]:
    sizes = np.ones(n_layers)
    if noise_size == "ends":
        sizes[[0, 1, -2, -1]] = 4.0
    elif noise_size == "growing":
        sizes = np.exp(3 * np.linspace(-0.5, 0.5, n_layers))
    return sizes


@dataclass(frozen=True, eq=False, repr=False)
class Power(Result):
    """What the boundary test makes of many synthetic draws; every field is a share of them.

    Attributes:
        rejected: p < 0.05 for any sharp change.
        chosen: Number of boundaries to how often it was found; changes of one signal alone count
            where ``share`` leaves a single signal that shows any.
        located: Exactly the planted boundaries were found, each within one block; 0 for a null.
        n_simulations: Draws; a share s has a standard error of ``sqrt(s (1 - s) / n)``.
    """

    rejected: float
    chosen: Mapping[int, float]
    located: float
    n_simulations: int

    def heading(self) -> str:
        """How many draws."""
        return f"Power of the boundary test, from {counted(self.n_simulations, 'draw')}"

    def rows(self) -> Rows:
        """Every share with its standard error."""
        rows: Rows = [("share of draws", "value", "standard error")]
        for quantity, share in self._shares().items():
            error = (share * (1 - share) / self.n_simulations) ** 0.5
            rows.append((quantity, f"{share:.3f}", f"{error:.3f}"))
        return rows

    def to_dataframe(self) -> pd.DataFrame:
        """One row per share: ``quantity, value, low, high, unit``; Wilson's 95% intervals."""
        shares = self._shares()
        counts = [round(share * self.n_simulations) for share in shares.values()]
        ends = [
            binomtest(n, self.n_simulations).proportion_ci(LEVEL, method="wilson") for n in counts
        ]
        return tidy(
            {
                "quantity": list(shares),
                "value": list(shares.values()),
                "low": [float(end.low) for end in ends],
                "high": [float(end.high) for end in ends],
                "unit": "share of draws",
            }
        )

    def _shares(self) -> dict[str, float]:
        chosen = {f"{k} boundaries chosen": share for k, share in self.chosen.items()}
        return {"rejected": self.rejected, "located": self.located, **chosen}


@in_own_state
def power(
    n_layers: int,
    n_signals: int = 8,
    effect: float = 2.0,
    *,
    n_boundaries: int = 2,
    drift: Drift = "flat",
    noise: Noise = "white",
    tails: Tails = "normal",
    noise_size: NoiseSize = "even",
    correlation: float = 0.0,
    autocorrelation: float = 0.0,
    kind: Planted = "jumps",
    width: int = 1,
    share: float = 1.0,
    n_simulations: int = 100,
    seed: int = 0,
) -> Power:
    """How often the boundary test finds what is planted at this depth; with no boundary, errs.

    Args:
        n_layers: Depth; this and all that follow down to ``share`` as in
            :func:`synthetic_signals`.
        n_signals: Number of signals.
        effect: Size of every planted change.
        n_boundaries: Planted boundaries; 0 for a null.
        drift: What changes gradually underneath.
        noise: White or a random walk.
        tails: Normal or heavy.
        noise_size: How the size of noise goes over depth.
        correlation: Of the noise between signals.
        autocorrelation: Of white noise along depth.
        kind: Jumps, bends or both.
        width: Blocks over which every jump spreads.
        share: The share of signals that show a boundary.
        n_simulations: Draws.
        seed: Decides every draw.

    Returns:
        Shares of the draws, each with its standard error.

    Example:
        >>> ml.synthetic.power(24, effect=4.0, n_simulations=3).rejected  # share of draws
        1.0
    """
    rejected, located, chosen = 0, 0, []
    one_signal = round(share * n_signals) <= 1
    for number in range(n_simulations):
        made = synthetic_signals(
            n_layers,
            n_signals,
            n_boundaries=n_boundaries,
            effect=effect,
            kind=kind,
            width=width,
            share=share,
            drift=drift,
            noise=noise,
            tails=tails,
            noise_size=noise_size,
            correlation=correlation,
            autocorrelation=autocorrelation,
            seed=seed + number,
        )
        # The first and the last block are set apart.
        search = seek_changes(standardized(made.signals[1:-1]))
        places = search.places if one_signal else search.shared
        found = np.array([place.lead.row + 1 for place in places])
        rejected += search.first.p_value < SIGNIFICANCE
        chosen.append(len(found))
        if n_boundaries == len(found):
            first = np.array(made.boundaries)
            away = np.abs(found - np.clip(found, first, first + width - 1))
            located += bool(n_boundaries) and bool((away <= 1).all())
    counts = np.bincount(chosen, minlength=4) / n_simulations
    return Power(
        rejected / n_simulations,
        {k: float(share) for k, share in enumerate(counts)},
        located / n_simulations,
        n_simulations,
    )
