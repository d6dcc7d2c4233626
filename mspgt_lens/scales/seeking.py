"""Sharp changes of several curves, sought one after another and tested against gradual change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mspgt_lens.scales.evidence import (
    LEAST_FREEDOM,
    Change,
    change_curves,
    evidence_for_change,
    votes,
)
from mspgt_lens.scales.regenerating import Regenerator, regenerator
from mspgt_lens.statistics import SIGNIFICANCE

# More changes than these are not told apart in a few dozen rows.
MAX_CHANGES = 6
# A signal shares a change if its own evidence there is more than this, in nats: what one in a
# hundred reaches by chance at a given place.
SHARES = 2.0
_DRAWS_PER_LOOK = 33
# Later tests take this part of the draws, but no fewer than a p-value of 0.05 needs.
_PART_OF_DRAWS = 4
_FEWEST_DRAWS = 99


@dataclass(frozen=True)
class ChangeTest:
    """Is there one more change?

    Attributes:
        p_value: Share of regenerated series with as much evidence; the larger of both tails.
        without: The same with each signal left out.
        best: The likeliest change.
        alone: Evidence that a single signal reaches in 5% of regenerated series.
        own: Changes for which one signal has more than that, with the share of regenerated series
            where a single signal has as much.
    """

    p_value: float
    without: Float[np.ndarray, " signal"]
    best: Change
    alone: float
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
        last: p-value of one more change than were found.
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

    Each test compares the evidence of the likeliest change, given those found before, with the same
    on series regenerated without it, with normal and with heavy-tailed noise. With ``decide_only``,
    no more series are drawn once a test cannot be significant any more; its p-value is then a lower
    bound.
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
        last = test.p_value
        if test.p_value >= SIGNIFICANCE:
            apart = test.own
            break
        found = _settled(series, found | {test.best: test.p_value})
    assert first is not None
    found |= apart
    changes = tuple(sorted(found))
    places = _places(series, found, set(apart), first)
    like = regenerator(evidence_for_change(n_rows, changes), series)
    return Search(places, changes, first, last, like)


def standardized(series: Float[np.ndarray, "row signal"]) -> Float[np.ndarray, "row signal"]:
    """Signals with mean 0 and deviation 1, which keeps numbers even and changes no evidence."""
    value: np.ndarray = (series - series.mean(axis=0)) / series.std(axis=0)
    return value


def gains_of(
    series: Float[np.ndarray, "row signal"], change: Change, others: tuple[Change, ...]
) -> Float[np.ndarray, " signal"]:
    """Evidence of every signal for one change beside others."""
    evidence = evidence_for_change(len(series), others)
    at = evidence.candidates.index(change)
    gains: np.ndarray = evidence.gains(series[None])[at, :, 0]
    return gains


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
    gains = evidence.gains(series[None])[..., 0]
    each = votes(gains)
    total = each.sum(axis=1)
    best = int(total.argmax())
    rest = (total[:, None] - each).max(axis=0)
    like = regenerator(evidence, series)
    reached, reached_rest, drawn = np.zeros(2), np.zeros((2, len(rest))), np.zeros(2)
    alone: list[list[np.ndarray]] = [[], []]
    enough = SIGNIFICANCE * (n_draws + 1)
    for heavy in (0, 1):
        while drawn[heavy] < n_draws:
            number = int(n_draws - drawn[heavy])
            if decide_only:
                number = min(number, _DRAWS_PER_LOOK)
            for part in evidence.chunks(like.draw(number, rng, heavy=bool(heavy))):
                one = evidence.gains(part)
                each = votes(one)
                every = each.sum(axis=1)
                others = (every[:, None] - each).max(axis=0)
                # What single precision cannot tell apart counts as equal.
                reached[heavy] += (every.max(axis=0) >= total[best] - 1e-4).sum()
                reached_rest[heavy] += (others >= rest[:, None] - 1e-4).sum(axis=1)
                alone[heavy].append(one.max(axis=(0, 1)))
            drawn[heavy] += number
            if decide_only and 1 + reached[heavy] >= enough:
                break
        if decide_only and 1 + reached[heavy] >= enough:
            break
    tails = [heavy for heavy in (0, 1) if drawn[heavy]]
    p_values = (1 + reached[tails]) / (1 + drawn[tails])
    singles = [np.concatenate(alone[h]) for h in tails]
    limit = max(float(np.quantile(one, 1 - SIGNIFICANCE)) for one in singles)
    own = {}
    for signal in np.flatnonzero(gains.max(axis=0) > limit):
        most = float(gains[:, signal].max())
        share = max(float((1 + (one >= most).sum()) / (1 + len(one))) for one in singles)
        own[evidence.candidates[int(gains[:, signal].argmax())]] = share
    return ChangeTest(
        p_value=float(p_values.max()),
        without=((1 + reached_rest[tails]) / (1 + drawn[tails, None])).max(axis=0),
        best=evidence.candidates[best],
        alone=limit,
        own=own,
    )


def _settled(
    series: Float[np.ndarray, "row signal"], found: dict[Change, float]
) -> dict[Change, float]:
    """Every change where it is likeliest beside all others."""
    for _ in range(2):
        before = set(found)
        for change in sorted(found):
            others = tuple(sorted(c for c in found if c != change))
            evidence = evidence_for_change(len(series), others)
            total = votes(evidence.gains(series[None])[..., 0]).sum(axis=1)
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
        own = most[strongest] > first.alone and (most > SHARES).sum() == 1
        own = own or apart.issuperset(group)
        alone = strongest if own and series.shape[1] > 1 else None
        p_value = min(found[c] for c in group)
        places.append(Place(group[lead], tuple(group), most, alone, p_value))
    return tuple(places)
