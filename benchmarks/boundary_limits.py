"""What no boundary test can exceed: the most power that leaves errors at 5% under gradual change.

    python -m benchmarks.boundary_limits                # the planted cases
    python -m benchmarks.boundary_limits --draws 2000   # more exactly

A test that is wrong in at most 5% of the draws of every kind of gradual change is so, too, where
kinds are mixed. Among those, the likelihood ratio of what is planted against the mixture has the
most power (Neyman and Pearson). So its power bounds that of every test, whatever the mixture; the
tightest is sought here (Elliott, Müller and Watson 2015, Econometrica 83:771). That test is told
all: the size of changes and of noise, how many there are, how many signals show them, and how their
places are dealt. It may not use a signal's level and slope, and sees blocks but the first and last.
Beside it, the power of a likelihood ratio that is not told the sizes and the number.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_triangular
from scipy.special import logsumexp

import mspgt_lens as ml
from benchmarks.table import Comparison
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.statistics import SIGNIFICANCE

Kind = Literal["jumps", "bends"]
# Blocks, signals, boundaries, kind, size; and how many boundaries a test has to reckon with that is
# not told.
CASES: tuple[tuple[int, int, int, Kind, float, tuple[int, ...]], ...] = (
    (24, 8, 2, "jumps", 2.0, (1, 2)),
    (24, 8, 1, "jumps", 2.0, (1, 2)),
    (16, 5, 2, "jumps", 2.0, (1, 2)),
    (16, 5, 2, "jumps", 4.0, (1, 2)),
    (30, 8, 1, "bends", 1.0, (1,)),
)
# Variance of sizes beforehand, where they are not told, in units of the noise's.
_SIZE_VARIANCE = 4.0
# Gradual kinds that are the likeliest for what is planted, in sizes that a test cannot know.
_KINDS = 24
_SIZES = (0.8, 1.0, 1.25)
# Walks, and walks of the slope, that signals share; what of their variance is shared.
_SHARES = (0.03, 0.1, 0.35, 1.0)
_CORRELATION = 0.5
_PLACES_DRAWN = 4000
_TOGETHER = 2000
_UPDATES = 300
_STEP = 15.0
# No kind is given less of the mixture than this, in nats below the most.
_LEAST = 25.0


class Ratio(Protocol):
    """Tells how much likelier series are than under white noise of variance 1, in nats."""

    def log_ratio(self, series: Float[np.ndarray, "draw signal free"]) -> np.ndarray: ...


@dataclass(frozen=True)
class Planted:
    """Changes of one size in white noise of variance 1, at places and with signs by chance.

    Attributes:
        beyond: Orthonormal curves beyond a straight line; series are told by these alone.
        curves: One planted change of size 1 at every row, by these.
        places: Rows of the changes, one row per placement.
        chances: Of each placement.
        size: Of every change.
        n_signals: Number of signals, all of which show every change.
    """

    beyond: Float[np.ndarray, "row free"]
    curves: Float[np.ndarray, "free row"]
    places: np.ndarray
    chances: Float[np.ndarray, " placement"]
    size: float
    n_signals: int

    def draw(self, n_draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draw signal free"]:
        series = rng.standard_normal((n_draws, self.n_signals, self.beyond.shape[1]))
        rows = self.places[rng.choice(len(self.places), n_draws, p=self.chances)]
        for row in rows.T:
            signs = rng.choice([-self.size, self.size], (n_draws, self.n_signals, 1))
            series += signs * self.curves.T[row][:, None]
        return series

    def log_ratio(self, series: Float[np.ndarray, "draw signal free"]) -> np.ndarray:
        """Log-likelihood, less that of white noise of variance 1."""
        along = series @ self.curves
        signs = np.array(list(itertools.product([-1.0, 1.0], repeat=self.places.shape[1])))
        each = np.empty((len(self.places), len(series)))
        for number, rows in enumerate(self.places):
            curves = self.size * signs @ self.curves[:, rows].T
            fits = self.size * along[:, :, rows] @ signs.T - (curves**2).sum(axis=1) / 2
            each[number] = (logsumexp(fits, axis=2) - np.log(len(signs))).sum(axis=1)
        ratio: np.ndarray = logsumexp(each + np.log(self.chances)[:, None], axis=0)
        return ratio


class Null:
    """Normal series without a change: what each signal has for itself, and what all share.

    Args:
        planted: Tells in what series are told.
        own: Covariance over rows of what is every signal's own.
        shared: Of one course that all signals take, each upward or downward by chance; None for
            none.
    """

    def __init__(self, planted: Planted, own: np.ndarray, shared: np.ndarray | None = None) -> None:
        self.n_signals = planted.n_signals
        inside = planted.beyond.T @ own @ planted.beyond
        self.root = np.linalg.cholesky(inside)
        self.base = -self.n_signals * np.log(np.diag(self.root)).sum()
        self.turn, self.extra = np.eye(len(inside)), np.zeros(len(inside))
        ups: list[tuple[float, ...]] = [(1.0,) * self.n_signals]
        if shared is not None:
            half = solve_triangular(
                self.root, planted.beyond.T @ shared @ planted.beyond, lower=True
            )
            along = solve_triangular(self.root, half.T, lower=True)
            extra, self.turn = np.linalg.eigh(along)
            self.extra = self.n_signals * np.maximum(extra, 0.0)
            # All signs turned are the same course turned.
            rest = itertools.product([-1.0, 1.0], repeat=self.n_signals - 1)
            ups = [(1.0, *signs) for signs in rest]
        self.ups = np.array(ups) / np.sqrt(self.n_signals)

    def draw(self, n_draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draw signal free"]:
        white = rng.standard_normal((n_draws, self.n_signals, len(self.root)))
        common = rng.standard_normal((n_draws, 1, len(self.root))) * np.sqrt(self.extra)
        white += self.ups[rng.integers(len(self.ups), size=n_draws)][:, :, None] * common
        series: np.ndarray = white @ (self.root @ self.turn).T
        return series

    def log_ratio(self, series: Float[np.ndarray, "draw signal free"]) -> np.ndarray:
        """Log-likelihood, less that of white noise of variance 1."""
        flat = series.reshape(-1, series.shape[2]).T
        white = self.turn.T @ solve_triangular(self.root, flat, lower=True)
        squares = (flat**2).sum(axis=0) - (white**2).sum(axis=0)
        ratio: np.ndarray = self.base + squares.reshape(len(series), -1).sum(axis=1) / 2
        if len(self.ups) == 1:
            return ratio
        white = white.T.reshape(series.shape)
        part = self.extra / (1 + self.extra) / 2
        for start in range(0, len(series), _TOGETHER):
            now = slice(start, start + _TOGETHER)
            taken = ((self.ups @ white[now]) ** 2) @ part
            ratio[now] += logsumexp(taken, axis=1) - np.log(len(self.ups))
        return ratio - np.log1p(self.extra).sum() / 2


class Untold:
    """What may be planted, for a test that is told neither sizes, normal by chance, nor number.

    Args:
        planted: Tells in what series are told.
        curves: One change of size 1 at every row.
        places: How likely each placement is.
    """

    def __init__(
        self,
        planted: Planted,
        curves: Float[np.ndarray, "row row"],
        places: Mapping[tuple[int, ...], float],
    ) -> None:
        white = np.eye(len(curves))
        self.parts, chances = [], []
        for rows, chance in places.items():
            change = curves[:, list(rows)]
            covariance = white + _SIZE_VARIANCE * change @ change.T
            self.parts += [Null(planted, size**2 * covariance) for size in _SIZES]
            chances += [chance / len(_SIZES)] * len(_SIZES)
        self.chances = np.array(chances) / sum(chances)

    def log_ratio(self, series: Float[np.ndarray, "draw signal free"]) -> np.ndarray:
        """Log-likelihood, less that of white noise of variance 1."""
        each = np.stack([part.log_ratio(series) for part in self.parts])
        ratio: np.ndarray = logsumexp(each + np.log(self.chances)[:, None], axis=0)
        return ratio


def placements(n_layers: int, n_boundaries: int) -> dict[tuple[int, ...], float]:
    """Rows of changes as :func:`mspgt_lens.synthetic.synthetic_signals` deals them."""
    drawn = Counter(
        ml.synthetic.synthetic_signals(n_layers, 1, n_boundaries=n_boundaries, seed=s).boundaries
        for s in range(_PLACES_DRAWN)
    )
    # Row 0 is block 1.
    return {tuple(b - 1 for b in places): n / _PLACES_DRAWN for places, n in drawn.items()}


def change_curves(n_rows: int, kind: Kind) -> Float[np.ndarray, "row row"]:
    """One change of size 1 at every row."""
    steps = np.tril(np.ones((n_rows, n_rows)))
    return steps if kind == "jumps" else np.cumsum(steps, axis=0)


def planted_case(
    n_layers: int, n_signals: int, n_boundaries: int, kind: Kind, size: float
) -> Planted:
    """Changes as the calibration plants them, shared by all signals."""
    n_rows = n_layers - 2
    line = np.column_stack([np.ones(n_rows), np.arange(n_rows)])
    beyond = np.linalg.svd(line)[0][:, 2:]
    places = placements(n_layers, n_boundaries)
    rows, chances = np.array(list(places)), np.array(list(places.values()))
    curves = beyond.T @ change_curves(n_rows, kind)
    return Planted(beyond, curves, rows, chances, size, n_signals)


def gradual_nulls(planted: Planted, rng: np.random.Generator) -> list[Null]:
    """White noise, the package's own kinds that are likeliest, and walks that signals share."""
    n_rows = len(planted.beyond)
    series = planted.draw(200, rng)
    every = [
        Null(planted, size**2 * kind)
        for kind in gradual_kinds(n_rows).covariances
        for size in _SIZES
    ]
    likelihood = np.stack([null.log_ratio(series) for null in every])
    likeliest = np.argsort(-(likelihood - likelihood.max(axis=0)).mean(axis=1))[:_KINDS]
    summed = np.tril(np.ones((n_rows, n_rows)))
    walks = (summed @ summed.T, summed @ summed @ summed.T @ summed.T / n_rows)
    white = np.eye(n_rows)
    both = [
        Null(planted, white + (1 - _CORRELATION) * share * walk, _CORRELATION * share * walk)
        for walk in walks
        for share in _SHARES
    ]
    return [Null(planted, white), *(every[i] for i in likeliest), *both]


class Limit(NamedTuple):
    """Of the best test against the mixture that leaves it the least power.

    Attributes:
        power: Share of planted draws that it finds, wrong in 5% of the mixture's draws. Told all,
            it bounds every test that is wrong in at most 5% under every null.
        held: The same, wrong in at most 5% of the draws of every null.
        mixture: Weight of every null.
    """

    power: float
    held: float
    mixture: Float[np.ndarray, " null"]


def limit(
    planted: Planted,
    nulls: Sequence[Null],
    n_draws: int = 1000,
    *,
    seed: int = 0,
    told: Ratio | None = None,
) -> Limit:
    """The most power of any test that is wrong in at most 5% under every null.

    Args:
        planted: What is to be found.
        nulls: Kinds of gradual change.
        n_draws: Draws of every null for the search, and as many others for where it is wrong most;
            twenty times as many in all for the mixture.
        seed: Decides every draw.
        told: What the test takes for planted; None for what is.
    """
    rng = np.random.default_rng(seed)
    sought = planted if told is None else told
    drawn = [null.draw(n_draws, rng) for null in nulls]
    ours = np.concatenate([sought.log_ratio(series) for series in drawn])
    theirs = np.stack([null.log_ratio(np.concatenate(drawn)) for null in nulls])
    mixture = _least_favorable(ours, theirs)
    known = np.flatnonzero(mixture)

    def ratios(series: np.ndarray) -> np.ndarray:
        each = np.stack([nulls[i].log_ratio(series) for i in known])
        mixed = logsumexp(each + np.log(mixture[known])[:, None], axis=0)
        value: np.ndarray = sought.log_ratio(series) - mixed
        return value

    # Draws that the mixture was not sought on.
    counts = rng.multinomial(20 * n_draws, mixture)
    fresh = np.concatenate([null.draw(n, rng) for null, n in zip(nulls, counts, strict=True)])
    above = np.quantile(ratios(fresh), 1 - SIGNIFICANCE)
    worst = max(np.quantile(ratios(null.draw(n_draws, rng)), 1 - SIGNIFICANCE) for null in nulls)
    found = ratios(planted.draw(10 * n_draws, rng))
    return Limit(float((found > above).mean()), float((found > worst).mean()), mixture)


def _least_favorable(
    ours: Float[np.ndarray, " draw"], theirs: Float[np.ndarray, "null draw"]
) -> Float[np.ndarray, " null"]:
    """The mixture, by giving more weight to nulls under which its test is wrong too often.

    Args:
        ours: How likely draws are with changes; as many draws of each null, one after another.
        theirs: How likely they are under every null.
    """
    n_nulls = len(theirs)
    n_draws = len(ours) // n_nulls
    weights = np.full(n_nulls, -np.log(n_nulls))
    mean = np.zeros(n_nulls)
    for update in range(_UPDATES):
        ratio = ours - logsumexp(theirs + weights[:, None], axis=0)
        order = np.argsort(-ratio)
        chance = np.repeat(np.exp(weights) / n_draws, n_draws)
        above = ratio[order[np.searchsorted(np.cumsum(chance[order]), SIGNIFICANCE)]]
        wrong = (ratio.reshape(n_nulls, -1) > above).mean(axis=1)
        weights = weights + _STEP / np.sqrt(1 + update) * (wrong - SIGNIFICANCE)
        weights = np.maximum(weights, weights.max() - _LEAST)
        weights -= logsumexp(weights)
        # The search goes round its goal: the mixture is the mean of its second half.
        mean += np.exp(weights) if 2 * update >= _UPDATES else 0.0
    mixture: np.ndarray = mean / mean.sum()
    return mixture


def limits(
    n_layers: int,
    n_signals: int,
    n_boundaries: int,
    kind: Kind,
    size: float,
    numbers: tuple[int, ...],
    n_draws: int,
) -> tuple[Limit, Limit]:
    """Of a test that is told all, and of one that is told neither sizes nor number."""
    planted = planted_case(n_layers, n_signals, n_boundaries, kind, size)
    nulls = gradual_nulls(planted, np.random.default_rng(1))
    places = {rows: p for n in numbers for rows, p in placements(n_layers, n).items()}
    untold = Untold(planted, change_curves(n_layers - 2, kind), places)
    return limit(planted, nulls, n_draws), limit(planted, nulls, n_draws, told=untold)


def compare(n_draws: int = 500) -> Iterator[Comparison]:
    """Most power of any test, beside that of a likelihood ratio that has to find out more."""
    for n_layers, n_signals, n_boundaries, kind, size, numbers in CASES:
        most, untold = limits(n_layers, n_signals, n_boundaries, kind, size, numbers, n_draws)
        changes = kind if n_boundaries > 1 else kind[:-1]
        what = f"{n_layers} x {n_signals}, {n_boundaries} {changes} of {size:g}"
        against = "likelihood ratio not told sizes and number"
        yield Comparison(
            f"power that no test exceeds, {what}", most.power, against, untold.held, "share"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=500, help="of every null, for the search")
    for one in compare(parser.parse_args().draws):
        print(f"{one.measured}: {one.value:.3f}; {one.against}: {one.reference:.3f}", flush=True)


if __name__ == "__main__":
    main()
