"""Sharp changes of several curves, sought one after another and tested against gradual change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mspgt_lens.scales.evidence import (
    LEAST_FREEDOM,
    Change,
    Evidence,
    Weighed,
    change_curves,
    evidence_for_change,
    votes,
)
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.scales.regenerating import Regenerator, kind_weights, lightness, regenerator
from mspgt_lens.statistics import SIGNIFICANCE

# More changes than these are not told apart in a few dozen rows.
MAX_CHANGES = 6
# Later tests take this part of the draws, but no fewer than a p-value of 0.05 needs.
_PART_OF_DRAWS = 4
_FEWEST_DRAWS = 99
# What is taken out of the series that regenerated ones are like leaves so many rows on either side:
# what happens in the outermost rows may be noise that is larger there.
_ROWS_BESIDE = 2
# Gradual kinds that are less likely than this for every signal are not weighed.
_LIKELY = 0.01
# Odds for heavy tails beforehand: to miss them makes more of chance than to miss normal ones.
_HEAVY_ODDS = 8.0
# Variance of how light tails are, in which any two can be told apart.
_LEAST_SPREAD = 1e-12
# What single precision cannot tell apart.
_EQUAL = 1e-4


@dataclass(frozen=True)
class ChangeTest:
    """Is there one more change?

    Attributes:
        p_value: Share of regenerated series with as much evidence; normal and heavy-tailed ones are
            weighed by how likely the signals' tails are either.
        without: The same with each signal left out.
        best: The likeliest change.
        alone: Evidence that a single signal reaches in 5% of regenerated series.
        shares: Evidence that a signal has at a given change in 5% of regenerated series.
        more_share: What any signal but one has there in 5% of them.
        own: Changes for which one signal has more than ``alone``, with the share of regenerated
            series where a single signal has as much.
    """

    p_value: float
    without: Float[np.ndarray, " signal"]
    best: Change
    alone: float
    shares: float
    more_share: float
    own: dict[Change, float]


@dataclass(frozen=True)
class Place:
    """A change, or several in neighboring rows, at one boundary.

    Attributes:
        lead: The change with most evidence.
        members: All of them.
        gains: Evidence of every signal for the change that it shows most.
        alone: The one signal that shows it, where it is one signal's own.
        p_value: Of the test that found the first of them.
    """

    lead: Change
    members: tuple[Change, ...]
    gains: Float[np.ndarray, " signal"]
    alone: int | None
    p_value: float

    @property
    def evidence(self) -> float:
        """Of all signals together."""
        return float(votes(self.gains).sum())


@dataclass(frozen=True)
class Search:
    """What was found in some series.

    Attributes:
        places: Where changes are, by row.
        changes: All changes.
        first: The test of any change against none.
        last: p-value of one more change than were found; 1 where it was not tested, since curves
            leave no room or enough changes are found.
        like: What series with these changes and no more may be.
    """

    places: tuple[Place, ...]
    changes: tuple[Change, ...]
    first: ChangeTest
    last: float
    like: Regenerator

    @property
    def shared(self) -> tuple[Place, ...]:
        """Places that are not one signal's own."""
        return tuple(place for place in self.places if place.alone is None)


def seek_changes(
    series: Float[np.ndarray, "row signal"],
    n_draws: int,
    rng: np.random.Generator,
    *,
    decide_only: bool = False,
) -> Search:
    """Find sharp changes, the likeliest first, until one more is no likelier than by chance.

    Each test compares the evidence for the likeliest change, and for the likeliest two together,
    given those found before, with the same in series regenerated without them, with normal and with
    heavy-tailed noise. With ``decide_only``, heavy tails are not drawn once normal ones show that a
    test cannot be significant; its p-value is then a lower bound.
    """
    n_rows = len(series)
    found: dict[Change, float] = {}
    first: ChangeTest | None = None
    last = 1.0
    apart: dict[Change, float] = {}
    while len(found) < MAX_CHANGES:
        given = tuple(sorted(found))
        if first is not None and evidence_for_change(n_rows, given).freedom < LEAST_FREEDOM:
            break
        draws = n_draws if first is None else max(n_draws // _PART_OF_DRAWS, _FEWEST_DRAWS)
        test = _test(series, given, draws, rng, decide_only)
        first = first or test
        if test.p_value >= SIGNIFICANCE:
            last, apart = test.p_value, test.own
            break
        found = _settled(series, found | {test.best: test.p_value})
    assert first is not None
    found |= apart
    changes = tuple(sorted(found))
    places = _places(series, found, set(apart), first)
    like = regenerator(evidence_for_change(n_rows, changes), series)
    return Search(places, changes, first, last, like)


def likely_kinds(
    series: Float[np.ndarray, "row signal"], *given: tuple[Change, ...]
) -> Int[np.ndarray, " kind"]:
    """Gradual kinds that some signal may be of beside some of the given changes."""
    likely = np.zeros(len(gradual_kinds(len(series)).words), dtype=bool)
    for changes in given:
        weights = kind_weights(evidence_for_change(len(series), changes).likelihoods(series))
        likely |= weights.max(axis=1) > _LIKELY
    return np.flatnonzero(likely)


def standardized(series: Float[np.ndarray, "row signal"]) -> Float[np.ndarray, "row signal"]:
    """Signals with mean 0 and deviation 1, which keeps numbers even and changes no evidence."""
    value: np.ndarray = (series - series.mean(axis=0)) / series.std(axis=0)
    return value


def gains_of(
    series: Float[np.ndarray, "row signal"], change: Change, others: tuple[Change, ...]
) -> Float[np.ndarray, " signal"]:
    """Evidence of every signal by itself for one change beside others."""
    kinds = likely_kinds(series, (), others, tuple(sorted({change, *others})))
    evidence = evidence_for_change(len(series), others)
    at = evidence.candidates.index(change)
    own: np.ndarray = evidence.weigh(series[None], kinds).own[at, :, 0]
    return own


def gains_beside(
    series: Float[np.ndarray, "row signal"],
    given: tuple[Change, ...],
    changes: Iterable[Change] = (),
) -> tuple[Evidence, Float[np.ndarray, "candidate signal"]]:
    """Evidence of every signal for every change beside the given ones.

    Gradual kinds are those that the signals may be of beside those, or beside all ``changes``.
    """
    kinds = likely_kinds(series, (), given, tuple(sorted({*given, *changes})))
    evidence = evidence_for_change(len(series), given)
    return evidence, evidence.gains(series[None], kinds)[..., 0]


def sizes(
    series: Float[np.ndarray, "row signal"], changes: tuple[Change, ...]
) -> Float[np.ndarray, "change signal"]:
    """How large each change is in every signal, fitted under that signal's likeliest kind."""
    n_rows, n_signals = series.shape
    plain = evidence_for_change(n_rows)
    kinds = evidence_for_change(n_rows, changes).likelihoods(series).argmax(axis=0)
    fitted = np.zeros((len(changes), n_signals))
    curves = change_curves(n_rows, changes)
    for signal, kind in enumerate(kinds):
        white = plain.whiteners[kind]
        fitted[:, signal] = np.linalg.lstsq(white @ curves, white @ series[:, signal], rcond=None)[
            0
        ]
    return fitted


def _test(
    series: Float[np.ndarray, "row signal"],
    given: tuple[Change, ...],
    n_draws: int,
    rng: np.random.Generator,
    decide_only: bool,
) -> ChangeTest:
    evidence = evidence_for_change(len(series), given)
    changes = _and_likeliest(series, given)
    without = evidence_for_change(len(series), _and_likeliest(series, given, _ROWS_BESIDE))
    kinds = likely_kinds(series, given, changes, without.given)
    # Heavy tails account for the likeliest change themselves.
    likes = regenerator(without, series, correlated=evidence), regenerator(evidence, series)
    seen = evidence.weigh(series[None], kinds)
    drawn, tails = [], []
    for heavy, like in zip((False, True), likes, strict=True):
        parts = evidence.chunks(like.draw(n_draws, rng, heavy=heavy))
        drawn.append(_Reference([evidence.weigh(part, kinds) for part in parts]))
        if decide_only and drawn[0].p_value(seen) >= SIGNIFICANCE:
            break
        tails.append(np.concatenate([lightness(evidence, part) for part in parts]))
    heavy_share = _heavier(float(lightness(evidence, series[None])[0]), tails)
    total = votes(seen.gains[..., 0]).sum(axis=1)
    gains = seen.own[..., 0]
    alone = max(reference.highest(SIGNIFICANCE) for reference in drawn)
    own = {}
    for signal in np.flatnonzero(gains.max(axis=0) > alone):
        at = int(gains[:, signal].argmax())
        most = float(gains[at, signal])
        own[evidence.candidates[at]] = max(reference.p_alone(most) for reference in drawn)
    others = max(series.shape[1] - 1, 1)
    return ChangeTest(
        p_value=float(_mixed([reference.p_value(seen) for reference in drawn], heavy_share)),
        without=_mixed([reference.p_without(seen) for reference in drawn], heavy_share),
        best=evidence.candidates[int(total.argmax())],
        alone=alone,
        shares=max(reference.anywhere(SIGNIFICANCE) for reference in drawn),
        more_share=max(reference.anywhere(SIGNIFICANCE / others) for reference in drawn),
        own=own,
    )


class _Reference:
    """What regenerated series reach."""

    def __init__(self, weighed: list[Weighed]) -> None:
        gains = np.concatenate([part.gains for part in weighed], axis=2)
        each = votes(gains)
        total = each.sum(axis=1)
        self._one = total.max(axis=0)
        self._two = np.concatenate([part.pair for part in weighed])
        self._rest = (total[:, None] - each).max(axis=0)
        self._own = np.concatenate([part.own for part in weighed], axis=2)
        self._single = self._own.max(axis=(0, 1))

    def p_value(self, seen: Weighed) -> float:
        """Share with as much evidence for one change, or for two, whichever is rarer.

        Each is measured in units of its own spread among regenerated series.
        """
        one = np.append(self._one, votes(seen.gains).sum(axis=1).max())
        two = np.append(self._two, seen.pair)
        rarest = np.maximum(_spread(one), _spread(two))
        return self._share(rarest[:-1] >= rarest[-1] - _EQUAL)

    def p_without(self, seen: Weighed) -> Float[np.ndarray, " signal"]:
        """Share with as much evidence for one change in all signals but each."""
        each = votes(seen.gains[..., 0])
        rest = (each.sum(axis=1)[:, None] - each).max(axis=0)
        reached = (self._rest >= rest[:, None] - _EQUAL).sum(axis=1)
        share: np.ndarray = (1 + reached) / (1 + len(self._one))
        return share

    def p_alone(self, gain: float) -> float:
        """Share in which a single signal has so much evidence somewhere."""
        return self._share(self._single >= gain - _EQUAL)

    def highest(self, share: float) -> float:
        """Evidence that a single signal has somewhere in such a share."""
        return float(np.quantile(self._single, 1 - share))

    def anywhere(self, share: float) -> float:
        """Evidence that a given signal has at a given change in such a share."""
        return float(np.quantile(self._own, 1 - share))

    def _share(self, reached: np.ndarray) -> float:
        return float((1 + reached.sum()) / (1 + len(reached)))


def _heavier(light: float, tails: list[Float[np.ndarray, " draw"]]) -> float:
    """How likely tails are heavy.

    Args:
        light: How light the signals' tails are.
        tails: The same of series with normal noise, and of some with heavy noise.
    """
    if len(tails) < 2:
        return 0.0
    normal, heavy = (float(part.mean()) for part in tails)
    spread = float(np.mean([part.var() for part in tails]))
    apart = (light - (normal + heavy) / 2) * (normal - heavy) / max(spread, _LEAST_SPREAD)
    return float(1 / (1 + np.exp(np.clip(apart, -700, 700)) / _HEAVY_ODDS))


def _mixed(p_values: Sequence[Any], heavy_share: float) -> Any:
    """p-values over normal and heavy tails, of which the heavy never make a change likelier."""
    normal, heavy = p_values[0], np.maximum(p_values[0], p_values[-1])
    return (1 - heavy_share) * normal + heavy_share * heavy


def _spread(evidence: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
    """Evidence in units of how far the first draws' upper tenth lies above their middle."""
    middle, high = np.quantile(evidence[:-1], [0.5, 0.9])
    units: np.ndarray = (evidence - middle) / max(high - middle, _EQUAL)
    return units


def _and_likeliest(
    series: Float[np.ndarray, "row signal"], given: tuple[Change, ...], beside: int = 1
) -> tuple[Change, ...]:
    """The given changes and the likeliest further one, whose noise shows what is left without it.

    Were it left in, a change would be taken for wandering, and its evidence held against itself.

    Args:
        series: The series.
        given: Changes that they hold.
        beside: Fewest rows on either side of the further one.
    """
    n_rows = len(series)
    evidence = evidence_for_change(n_rows, given)
    if evidence.freedom <= max(2 * LEAST_FREEDOM, n_rows // 2):
        return given
    every_kind = np.arange(len(evidence.whiteners))
    total = votes(evidence.gains(series[None], every_kind)[..., 0]).sum(axis=1)
    within = [beside <= c.row <= n_rows - beside for c in evidence.candidates]
    best = evidence.candidates[int(np.where(within, total, -np.inf).argmax())]
    return tuple(sorted((*given, best)))


def _settled(
    series: Float[np.ndarray, "row signal"], found: dict[Change, float]
) -> dict[Change, float]:
    """Every change where it is likeliest beside all others."""
    for _ in range(2):
        before = set(found)
        for change in sorted(found):
            others = tuple(sorted(c for c in found if c != change))
            evidence, gains = gains_beside(series, others, found)
            total = votes(gains).sum(axis=1)
            p_value = found.pop(change)
            found[evidence.candidates[int(total.argmax())]] = p_value
        if set(found) == before:
            break
    return found


def _places(
    series: Float[np.ndarray, "row signal"],
    found: dict[Change, float],
    apart: set[Change],
    first: ChangeTest,
) -> tuple[Place, ...]:
    """Changes in neighboring rows are one transition that takes several blocks."""
    groups: list[list[Change]] = []
    for change in sorted(found, key=lambda c: c.row):
        if groups and change.row - groups[-1][-1].row <= 1:
            groups[-1].append(change)
        else:
            groups.append([change])
    places = []
    for group in groups:
        gains = np.array(
            [gains_of(series, c, tuple(sorted(o for o in found if o != c))) for c in group]
        )
        lead = int(votes(gains).sum(axis=1).argmax())
        most = gains.max(axis=0)
        strongest = int(most.argmax())
        own = most[strongest] > first.alone and (most > first.more_share).sum() <= 1
        own = own or apart.issuperset(group)
        alone = strongest if own and series.shape[1] > 1 else None
        p_value = min(found[c] for c in group)
        places.append(Place(group[lead], tuple(group), most, alone, p_value))
    return tuple(places)
