"""Sharp changes of several curves, sought one after another and tested against gradual change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mspgt_lens.scales.chance import Chance, chance_for
from mspgt_lens.scales.evidence import (
    LEAST_FREEDOM,
    Change,
    Evidence,
    change_curves,
    evidence_for_change,
    votes,
)
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.scales.odds import Told, own_evidence, weigh_changes
from mspgt_lens.scales.regenerating import Regenerator, kind_weights, regenerator
from mspgt_lens.statistics import SIGNIFICANCE

# More changes than these are not told apart in a few dozen rows.
MAX_CHANGES = 6
# What one signal shows and others share is a boundary if the one has as much evidence in this part
# of the level's share of series: signals that say the same thing do not make that likelier.
_BY_ONE = 0.2
# What was found is left out again from such a p-value on, beside all others. Two changes that are
# seen together tell more than each beside the other, so that the level itself would cost real ones.
_NO_LONGER = 0.2
# Gradual kinds that are less likely than this for every signal are not weighed.
_LIKELY = 0.01


@dataclass(frozen=True)
class ChangeTest:
    """Is there one more change?

    Attributes:
        p_value: Share of series without it that tell as much of one or two changes, or five times
            that in which a single signal has as much evidence as the one with most, if others share
            its change.
        best: The likeliest change.
        alone: Evidence that a single signal reaches somewhere in 5% of series without a change.
        shares: Evidence that a signal has at a given change in 5% of them.
        more_share: What any signal but one has there in 5% of them.
        own: Changes for which one signal has more than ``alone``, with the share of series where a
            single signal has as much.
        repeats: Signals that repeat another one beside the likeliest changes; the p-value is that
            of the others.
    """

    p_value: float
    best: Change
    alone: float
    shares: float
    more_share: float
    own: dict[Change, float]
    repeats: tuple[int, ...]


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
    def width(self) -> int:
        """Over how many rows its jumps spread, if it is a jump; otherwise 1."""
        if self.lead.kind != "jump":
            return 1
        jumps = [change for change in self.members if change.kind == "jump"]
        return max(jump.end for jump in jumps) - min(jump.row for jump in jumps)

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


def seek_changes(series: Float[np.ndarray, "row signal"]) -> Search:
    """Find sharp changes, the likeliest first, until one more is no likelier than by chance.

    Each test compares the odds for one or two changes, given those found before, with those of
    series that have none. What later ones explain as well is left out again.
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
        test = _test(series, given)
        first = first or test
        if test.p_value >= SIGNIFICANCE:
            last, apart = test.p_value, test.own
            break
        found = _settled(series, found | {test.best: test.p_value})
    assert first is not None
    found, rest = _kept(series, found)
    if rest is not None:
        last, apart = rest.p_value, rest.own
    found |= apart
    changes = tuple(sorted(found))
    places = _places(series, found, set(apart), first)
    like = regenerator(evidence_for_change(n_rows, changes), series)
    return Search(places, changes, first, last, like)


def p_without(series: Float[np.ndarray, "row signal"]) -> list[float]:
    """p-value of any change with each signal left out; there have to be two or more."""
    rests = (np.delete(series, signal, axis=1) for signal in range(series.shape[1]))
    return [_test(rest, ()).p_value for rest in rests]


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
    evidence = evidence_for_change(len(series), others)
    own: np.ndarray = own_evidence(evidence, series)[evidence.candidates.index(change)]
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


def _test(series: Float[np.ndarray, "row signal"], given: tuple[Change, ...]) -> ChangeTest:
    n_rows, n_signals = series.shape
    evidence = evidence_for_change(n_rows, given)
    told, p_value = _judged(evidence, series)
    best = told.best
    chance = chance_for(n_rows - len(given), n_signals)
    alone = chance.alone(told, SIGNIFICANCE)
    own = {}
    for signal in np.flatnonzero(told.own.max(axis=0) > alone):
        most = evidence.candidates[int(told.own[:, signal].argmax())]
        own[most] = chance.p_alone(told, float(told.own[:, signal].max()))
        shared = _shared(evidence, told, chance, int(signal), most)
        if shared is not None and own[most] / _BY_ONE < p_value:
            p_value, best = own[most] / _BY_ONE, shared
    return ChangeTest(
        p_value=p_value,
        best=best,
        alone=alone,
        shares=chance.anywhere(SIGNIFICANCE),
        more_share=chance.anywhere(SIGNIFICANCE / max(n_signals - 1, 1)),
        own=own,
        repeats=tuple(sorted({*range(n_signals)} - {*told.distinct})),
    )


def _shared(
    evidence: Evidence, told: Told, chance: Chance, signal: int, most: Change
) -> Change | None:
    """The likeliest of what touches the change that a signal shows most, if another shows any."""
    touching = [i for i, change in enumerate(evidence.candidates) if _touch(change, most)]
    others = [other for other in told.distinct if other != signal]
    if signal not in told.distinct or not others:
        return None
    own = told.own[touching]
    share = SIGNIFICANCE / own[:, others].size
    if (own[:, others] <= chance.anywhere(share)).all():
        return None
    total = votes(own[:, told.distinct]).sum(axis=1) + evidence.prior[touching]
    return evidence.candidates[touching[int(total.argmax())]]


def _touch(one: Change, other: Change) -> bool:
    """Do their rows meet, so that both are one boundary?"""
    return one.row <= other.end and other.row <= one.end


def _judged(evidence: Evidence, series: Float[np.ndarray, "row signal"]) -> tuple[Told, float]:
    """What series tell of one more change, and its p-value, for which repetitions count once."""
    told = weigh_changes(evidence, series)
    distinct = list(told.distinct)
    repeated = len(distinct) < series.shape[1]
    judged = weigh_changes(evidence, series[:, distinct]) if repeated else told
    chance = chance_for(evidence.n_rows - len(evidence.given), len(distinct))
    return told, chance.p_value(judged)


def _settled(
    series: Float[np.ndarray, "row signal"], found: dict[Change, float]
) -> dict[Change, float]:
    """Every change where it is likeliest beside all others, if enough rows are left to tell."""
    if evidence_for_change(len(series), tuple(sorted(found))).freedom < LEAST_FREEDOM:
        return found
    for _ in range(2):
        before = set(found)
        for change in sorted(found):
            others = tuple(sorted(c for c in found if c != change))
            evidence, gains = gains_beside(series, others, found)
            total = votes(gains).sum(axis=1) + evidence.prior
            p_value = found.pop(change)
            found[evidence.candidates[int(total.argmax())]] = p_value
        if set(found) == before:
            break
    return found


def _kept(
    series: Float[np.ndarray, "row signal"], found: dict[Change, float]
) -> tuple[dict[Change, float], ChangeTest | None]:
    """What was found, less places that are no likelier than by chance beside all others.

    Large transitions that are known in part only make others likely. With it comes the test of the
    last one that is left out.
    """
    rest = None
    while len(groups := _grouped(found)) > 1:
        tests = [_test(series, tuple(sorted(found.keys() - set(group)))) for group in groups]
        weakest = int(np.argmax([test.p_value for test in tests]))
        if tests[weakest].p_value < _NO_LONGER:
            break
        rest = tests[weakest]
        found = {change: p for change, p in found.items() if change not in groups[weakest]}
    return found, rest


def _grouped(changes: Iterable[Change]) -> list[list[Change]]:
    """Changes in neighboring rows are one transition that takes several blocks."""
    groups: list[list[Change]] = []
    for change in sorted(changes, key=lambda c: c.row):
        if groups and change.row <= max(c.end for c in groups[-1]):
            groups[-1].append(change)
        else:
            groups.append([change])
    return groups


def _places(
    series: Float[np.ndarray, "row signal"],
    found: dict[Change, float],
    apart: set[Change],
    first: ChangeTest,
) -> tuple[Place, ...]:
    """Every transition, with the signals that show it."""
    places = []
    for group in _grouped(found):
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
