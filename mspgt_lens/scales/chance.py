"""What chance makes of the odds for changes: tables drawn beforehand, for any curves.

The odds' distribution without a change hardly depends on what the noise is like, but on the numbers
of rows and signals, and on how far signals say the same thing. It was drawn once over all gradual
kinds (``python -m benchmarks.chance``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load as load_tables
from scipy.optimize import bisect
from scipy.special import expit

from mspgt_lens.scales.evidence import OTHER_KIND, evidence_for_change
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.scales.odds import Told, weigh_changes

# Rows and signals that tables are drawn for; between them, shares are interpolated.
ROWS = (4, 6, 8, 10, 14, 22, 30, 46, 78)
SIGNALS = (1, 2, 4, 8, 16)
_HEAVY = 3
# Odds for heavy tails beforehand: to miss them makes more of chance than to miss normal ones.
_HEAVY_ODDS = 8.0
# Tables hold the mean of all kinds. Walks whose signals say the same thing reach high odds more
# often, the more so the more signals repeat one another, and so do heavy-tailed ones, the more so
# the more rows there are. Even noise is no walk, and such a chance of it halves what they count.
_WALKS_WORST = 8.0
_HEAVY_WORST = 3.0
_HEAVY_ROWS = 22
_EVEN = 0.02
# Series are held against those whose signals are about as much alike: by the logarithm of the mean
# squared correlation, from so much of it on, within such a deviation, or the distance of so many
# draws where these are few.
_FROM = 0.03
_NEAR = 0.25
_FEWEST = 60
# The highest odds have an exponential tail; this share of series reaches it.
_TAIL = 0.15
# How likely signals are each of its own kind in a draw, or else correlated.
_APART = 1 / 3
_CORRELATED = 0.7
_GROUPS = 2
# The least that correlated signals share of their variance where they say nearly the same thing.
_LEAST_SHARED = 0.4
# No single signal has less evidence everywhere, in nats.
_LEAST_ALONE = -100.0
# Single signals' evidence that is kept of every draw.
_KEPT = 4


class Table:
    """What series without a change told, of so many rows and signals.

    Args:
        drawn: Of normal and of heavy-tailed series: the odds, how far signals say the same thing,
            the most evidence of a single signal anywhere, and some single signals' at changes by
            chance.
    """

    def __init__(self, drawn: Float[np.ndarray, "tails draw value"]) -> None:
        drawn = drawn.astype(np.float64)
        self._odds, self._together, self._alone = np.moveaxis(drawn[..., :3], 2, 0)
        self._anywhere = drawn[..., 3:].reshape(2, -1)
        self.most_alone = float(self._alone.max())

    def p_value(
        self, told: Told, together: float, worst: float = 1.0, heavy_worst: float = 1.0
    ) -> float:
        """Share of series with as high odds, those whose signals are as much alike first.

        Shares count ``worst`` times, and heavy-tailed ones ``heavy_worst`` times.
        """
        distance = np.abs(np.log((self._together + _FROM) / (together + _FROM)))
        normal, heavy = (
            self._share(odds, away / _NEAR, told.odds)
            for odds, away in zip(self._odds, distance, strict=True)
        )
        p_value = _of_tails(told, normal, heavy, worst, heavy_worst)
        return max(p_value, 1 / (len(self._odds[0]) + 1))

    @staticmethod
    def _share(
        odds: Float[np.ndarray, " draw"], distance: Float[np.ndarray, " draw"], reached: float
    ) -> float:
        """Share of draws with as high odds, the nearer ones counting more."""
        distance = distance / max(1.0, np.sort(distance)[_FEWEST])
        weights = np.exp(-(distance**2) / 2)
        order = np.argsort(-odds)
        above = np.cumsum(weights[order])
        tail = int(np.searchsorted(above, _TAIL * above[-1])) + 1
        begins = odds[order[tail]]
        if reached <= begins:
            return float((weights[odds >= reached].sum() + 1) / (above[-1] + 1))
        beyond = weights[order[:tail]] / above[tail - 1]
        mean_excess = beyond @ odds[order[:tail]] - begins
        beyond_it = np.exp(-(reached - begins) / mean_excess)
        return float((above[tail - 1] + 1) / (above[-1] + 1) * beyond_it)

    def p_alone(self, told: Told, evidence: float, heavy_worst: float = 1.0) -> float:
        """Share of series in which a single signal has so much evidence somewhere."""
        normal, heavy = ((self._alone >= evidence).sum(axis=1) + 1) / (self._alone.shape[1] + 1)
        return _of_tails(told, float(normal), float(heavy), 1.0, heavy_worst)

    def anywhere(self, share: float) -> float:
        """Evidence that a given signal has for a given change in such a share of series."""
        return float(np.quantile(self._anywhere, 1 - share, axis=1).max())


@dataclass(frozen=True)
class Chance:
    """What chance makes of series of so many rows and signals.

    Attributes:
        n_rows: Number of rows.
        n_signals: Number of signals.
        parts: Tables of as many rows and signals, or of fewer and more, with their numbers of
            signals and their weights.
    """

    n_rows: int
    n_signals: int
    parts: tuple[tuple[Table, int, float], ...]

    def p_value(self, told: Told) -> float:
        """Share of series without a change that have as much evidence for some."""
        # Signals repeat one another as often in tables of fewer or more.
        repeated = (self.n_signals - 1) * told.together
        worst = 1 + _WALKS_WORST * repeated * _walking(told)
        heavy_worst = self._heavy_worst(told)
        return sum(
            w * table.p_value(told, min(repeated / max(n - 1, 1), 1.0), worst, heavy_worst)
            for table, n, w in self.parts
        )

    def p_alone(self, told: Told, evidence: float) -> float:
        """Share of series in which a single signal has so much evidence somewhere.

        However far signals say the same thing: that only makes it rarer.
        """
        heavy_worst = self._heavy_worst(told)
        return sum(w * table.p_alone(told, evidence, heavy_worst) for table, _, w in self.parts)

    def alone(self, told: Told, share: float) -> float:
        """Evidence that a single signal has somewhere in such a share of series."""
        most = max(table.most_alone for table, _, _ in self.parts) + 1.0
        if self.p_alone(told, most) > share:
            return np.inf
        return float(bisect(lambda e: self.p_alone(told, e) - share, _LEAST_ALONE, most, xtol=1e-3))

    def _heavy_worst(self, told: Told) -> float:
        worst = _HEAVY_WORST * max(1.0, self.n_rows / _HEAVY_ROWS)
        return 1 + (worst - 1) * _walking(told)

    def anywhere(self, share: float) -> float:
        """Evidence that a given signal has for a given change in such a share of series."""
        return sum(w * table.anywhere(share) for table, _, w in self.parts)


def _of_tails(told: Told, normal: float, heavy: float, worst: float, heavy_worst: float) -> float:
    """Shares of normal and of heavy-tailed series, by how likely tails are heavy."""
    heavier = float(expit(told.heavy + np.log(_HEAVY_ODDS)))
    # Heavy tails never make a change likelier.
    heavy = min(1.0, max(worst, heavy_worst) * max(normal, heavy))
    return (1 - heavier) * min(1.0, worst * normal) + heavier * heavy


def _walking(told: Told) -> float:
    """How far series count as walks, which even noise is not."""
    return _EVEN / (told.even + _EVEN)


@lru_cache(maxsize=64)
def chance_for(n_rows: int, n_signals: int) -> Chance:
    """Of so many rows and signals; beyond the tables, as at their ends."""
    rows, signals = list(_between(n_rows, ROWS)), list(_between(n_signals, SIGNALS))
    parts = tuple((_table(n, m), m, a * b) for n, a in rows for m, b in signals)
    return Chance(n_rows, n_signals, parts)


def draw_table(
    n_rows: int, n_signals: int, n_draws: int, n_alike: int = 0, seed: int = 0
) -> Float[np.ndarray, "tails draw value"]:
    """Draw series without a change and weigh them; see :class:`Table`.

    Args:
        n_rows: Rows of every series.
        n_signals: Signals of every series.
        n_draws: Draws with normal tails, and as many with heavy ones.
        n_alike: More draws of either, of signals that say nearly the same thing.
        seed: Decides every draw.
    """
    evidence = evidence_for_change(n_rows)
    table = np.empty((2, n_draws + n_alike, 3 + _KEPT))
    for heavy, draw in np.ndindex(2, n_draws + n_alike):
        rng = np.random.default_rng([seed, n_rows, n_signals, heavy, draw])
        make = _drawn if draw < n_draws else _drawn_alike
        told = weigh_changes(evidence, make(n_rows, n_signals, bool(heavy), rng))
        kept = rng.choice(told.own.ravel(), _KEPT)
        table[heavy, draw] = (told.odds, told.together, told.own.max(), *kept)
    return table


def _drawn(
    n_rows: int, n_signals: int, heavy: bool, rng: np.random.Generator
) -> Float[np.ndarray, "row signal"]:
    """Each signal of its own gradual kind, or most of one kind, and correlated then or not."""
    each = _kinds_of(n_rows, n_signals, heavy, rng)
    alike = rng.random() >= _APART
    if alike:
        each = np.where(rng.random(n_signals) < OTHER_KIND, each, each[0])
    noise = rng.standard_normal((n_rows, n_signals))
    if alike and rng.random() < _CORRELATED:
        noise = _correlated(noise, rng.random(), rng)
    return _made(noise, each, heavy, rng)


def _drawn_alike(
    n_rows: int, n_signals: int, heavy: bool, rng: np.random.Generator
) -> Float[np.ndarray, "row signal"]:
    """Most signals of one gradual kind, and much correlated."""
    each = _kinds_of(n_rows, n_signals, heavy, rng)
    each = np.where(rng.random(n_signals) < OTHER_KIND, each, each[0])
    noise = rng.standard_normal((n_rows, n_signals))
    noise = _correlated(noise, 1 - (1 - _LEAST_SHARED) * rng.random() ** 2, rng)
    return _made(noise, each, heavy, rng)


def _kinds_of(
    n_rows: int, n_signals: int, heavy: bool, rng: np.random.Generator
) -> Int[np.ndarray, " signal"]:
    kinds = gradual_kinds(n_rows)
    chances = kinds.chances
    if heavy:
        chances = np.where(np.isin(np.arange(len(chances)), kinds.jagged), chances, 0.0)
    return rng.choice(len(chances), size=n_signals, p=chances / chances.sum())


def _correlated(
    noise: Float[np.ndarray, "row signal"], share: float, rng: np.random.Generator
) -> Float[np.ndarray, "row signal"]:
    """Noise of which such a share of the variance belongs to all signals of a group."""
    n_rows, n_signals = noise.shape
    groups = rng.integers(rng.integers(1, _GROUPS + 1), size=n_signals)
    common = rng.standard_normal((n_rows, _GROUPS))[:, groups]
    value: np.ndarray = np.sqrt(share) * common + np.sqrt(1 - share) * noise
    return value


def _made(
    noise: Float[np.ndarray, "row signal"],
    each: Int[np.ndarray, " signal"],
    heavy: bool,
    rng: np.random.Generator,
) -> Float[np.ndarray, "row signal"]:
    """Series of such kinds from independent draws for every row, with heavy tails or not."""
    if heavy:
        noise = noise / np.sqrt(rng.chisquare(_HEAVY, noise.shape) / _HEAVY)
    series = np.einsum("srt,ts->rs", gradual_kinds(len(noise)).roots[each], noise)
    drawn: np.ndarray = (series - series.mean(axis=0)) / series.std(axis=0)
    return drawn


def _between(number: int, grid: tuple[int, ...]) -> Iterator[tuple[int, float]]:
    """The neighbors of a number in a grid, with weights by their logarithms."""
    within = min(max(number, grid[0]), grid[-1])
    low = max(g for g in grid if g <= within)
    high = min(g for g in grid if g >= within)
    part = 0.0 if low == high else np.log(within / low) / np.log(high / low)
    yield low, float(1 - part)
    if part:
        yield high, float(part)


@lru_cache(maxsize=1)
def _stored() -> dict[str, np.ndarray]:
    return load_tables((files("mspgt_lens") / "data" / "chance.safetensors").read_bytes())


@lru_cache(maxsize=len(ROWS) * len(SIGNALS))
def _table(n_rows: int, n_signals: int) -> Table:
    return Table(_stored()[table_name(n_rows, n_signals)])


def table_name(n_rows: int, n_signals: int) -> str:
    """Under which a table is stored."""
    return f"{n_rows}x{n_signals}"
