"""How much likelier series are with one or two sharp changes than with none.

The odds are a Bayes factor over everything gradual on both sides: most signals are of one gradual
kind, or each is of its own, and tails are normal or heavy. What chance makes of them hardly depends
on the kind that series are of, so that no noise has to be known to judge them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp, ndtri
from scipy.stats import rankdata

from mspgt_lens.scales.evidence import OTHER_KIND, Change, Evidence, capped, either
from mspgt_lens.scales.gradual import gradual_kinds

# Variances of a change's size beforehand, in units of the noise's, and how likely each is: sizes of
# all signals are a few times the noise, or all of them may be larger.
_SIZES = ((4.0, 0.5), (64.0, 0.25), (4096.0, 0.25))
# The shares of signals that a change may have, each as likely.
_SHARES = (0.5, 0.95)
# The size by which likely kinds and pairs are found.
_MIDDLE = 1
# How likely heavy tails are beforehand.
_HEAVY_CHANCE = 0.5
# Second changes are weighed beside so many of the likeliest first ones.
_FIRSTS = 5
# Kinds that are less likely by so many nats than the likeliest are not weighed.
_UNLIKELY = 8.0
# Scales of Student's t with 3 degrees of freedom that are tried, in units of the deviation.
_HEAVY = 3
_HEAVY_SCALES = (0.3, 0.45, 0.65, 1.0)
_ROWS_TOGETHER = 24
_VALUES_TOGETHER = 200_000
_HEAVY_PEAK = float(np.log(2 / (np.pi * np.sqrt(_HEAVY))))
_NORMAL_MEAN = -0.5 * float(np.log(2 * np.pi)) - 0.5
# Evidence for what cannot be, in nats.
_NEVER = np.float32(-1e4)
# Two changes are told apart if what they do not share is more than this part of each.
_SAME = 1e-4
_LEAST_LEFT = np.float32(1e-6)
# Squares of rows that single precision cannot tell from 0, beside 1.
_NOTHING = 1e-12
# Signals repeat one another from such a correlation on, if as many rows tell.
_REPEATS = 0.9
_FEW_ROWS = 8
_TINY = float(np.finfo(np.float32).tiny)


class Told(NamedTuple):
    """What series tell of one or two more changes.

    Attributes:
        odds: Logarithm of the Bayes factor against none.
        heavy: The same of heavy tails against normal ones, without a change.
        together: Mean squared correlation between signals, by normal scores of their ranks, of
            what the likeliest two changes leave; 0 for a single signal.
        even: How likely most signals are noise beside them, new at every row and even over depth.
        distinct: Signals whose correlation with one another is below 0.9 there.
        best: The likeliest change.
        own: Of every signal, whatever the others do, for every change that is weighed: the
            logarithm of its Bayes factor.
    """

    odds: float
    heavy: float
    together: float
    even: float
    distinct: tuple[int, ...]
    best: Change
    own: Float[np.ndarray, "candidate signal"]


class _Rows(NamedTuple):
    """Series under every gradual kind, and changes of size 1 under them.

    Attributes:
        along: The part of every signal's length that lies along every change.
        units: The changes, each of length 1.
        length: Their squared lengths before.
        freedom: Rows less fitted curves.
    """

    along: Float[np.ndarray, "kind candidate signal"]
    units: Float[np.ndarray, "kind candidate row"]
    length: Float[np.ndarray, "kind candidate"]
    freedom: int

    def of(self, kinds: Int[np.ndarray, " kind"]) -> _Rows:
        """Under these kinds only."""
        return _Rows(self.along[kinds], self.units[kinds], self.length[kinds], self.freedom)

    def at(self, candidates: list[int]) -> _Rows:
        """These changes only."""
        units, length = self.units[:, candidates], self.length[:, candidates]
        return _Rows(self.along[:, candidates], units, length, self.freedom)

    def one(self, variance: float) -> Float[np.ndarray, "kind candidate signal"]:
        """What every signal's log-likelihood gains by every change, its size of such a variance."""
        times = np.float32(variance) * self.length
        taken = self.along**2 * (times / (1 + times))[..., None]
        return self._gained(taken, 1 + times)

    def two(
        self, firsts: Int[np.ndarray, " kind"], variance: float
    ) -> Float[np.ndarray, "kind candidate signal"]:
        """The same by every change together with a first one of every kind."""
        kinds = np.arange(len(firsts))
        common = (self.units @ self.units[kinds, firsts, :, None])[..., 0]
        times = np.maximum(np.float32(variance) * self.length, np.float32(1e-9))
        more = 1 + 1 / times
        mine = more[kinds, firsts][:, None]
        apart = 1 - common**2
        same = apart < _SAME
        # As mine * more - common**2, which single precision would not tell from 0.
        rest = np.where(same, 1, apart) + (mine - 1) + (more - 1) * mine
        one = self.along[kinds, firsts][:, None]
        taken = (mine / rest)[..., None] * self.along
        taken -= (2 * common / rest)[..., None] * one
        taken *= self.along
        taken += (more / rest)[..., None] * one**2
        value = self._gained(taken, rest * times * times[kinds, firsts][:, None])
        value[same] = _NEVER
        return value

    def _gained(
        self,
        taken: Float[np.ndarray, "kind candidate signal"],
        determinant: Float[np.ndarray, "kind candidate"],
    ) -> Float[np.ndarray, "kind candidate signal"]:
        value: np.ndarray = np.log(np.maximum(1 - taken, _LEAST_LEFT))
        value *= np.float32(-self.freedom / 2)
        value -= np.log(determinant)[..., None] / 2
        return value


class _Likelihoods(NamedTuple):
    """Log-likelihoods of series that may be of some variants: kinds with normal or heavy tails.

    Attributes:
        prior: How likely every variant is beforehand, in nats.
        each: Of every signal.
        any: Of every signal, of whatever variant.
    """

    prior: Float[np.ndarray, " variant"]
    each: Float[np.ndarray, "variant *candidate signal"]
    any: Float[np.ndarray, "*candidate signal"]

    @classmethod
    def over(
        cls, prior: Float[np.ndarray, " variant"], each: Float[np.ndarray, "variant *any"]
    ) -> _Likelihoods:
        """Of these variants and no others."""
        weighed = each + prior.reshape((-1,) + (1,) * (each.ndim - 1))
        top = weighed.max(axis=0)
        weighed -= top
        return cls(prior, each, np.log(np.exp(weighed, out=weighed).sum(axis=0)) + top)

    def of(self, variants: Int[np.ndarray, " variant"]) -> _Likelihoods:
        """Of most signals these variants only; some may still be of any."""
        return _Likelihoods(self.prior[variants], self.each[variants], self.any)

    def together(self) -> Float[np.ndarray, "variant *candidate"]:
        """Of all signals, of which most are of one variant: the likelier of one and any."""
        total = _summed(np.maximum(self.each, self.any + np.float32(np.log(OTHER_KIND))))
        value: np.ndarray = total + self.prior.reshape((-1,) + (1,) * (total.ndim - 1))
        return value

    def mixed(self) -> Float[np.ndarray, "variant *candidate signal"]:
        """Of every signal if most are of one variant, but some may be of any."""
        most, other = (np.float32(np.log(2 * part)) for part in (1 - OTHER_KIND, OTHER_KIND))
        return either(self.each + most, self.any + other)


class _Weighing:
    """One set of series under all kinds, with normal tails and some with heavy ones.

    Args:
        evidence: Tells the changes that series may hold, and those that are weighed.
        series: The series.
    """

    def __init__(self, evidence: Evidence, series: Float[np.ndarray, "row signal"]) -> None:
        kinds = gradual_kinds(evidence.n_rows)
        white = evidence.whiteners @ series
        normal = evidence.log_likelihood(white, np.arange(len(white)))
        self.normal = (normal - normal.max(axis=0)).astype(np.float32)
        white /= np.maximum(np.linalg.norm(white, axis=1), _TINY)[:, None]
        self.white = white.astype(np.float32)
        self.units, length = evidence.curves()
        self.rows = _Rows(self.units @ self.white, self.units, length, evidence.freedom)
        self.places = evidence.prior
        self.even = [word == "even" for word in kinds.words]
        # Variants: every kind with normal tails, then those that may have heavy ones.
        self.n_kinds = len(kinds.words)
        self.kinds = np.concatenate([np.arange(self.n_kinds), kinds.jagged])
        chances = kinds.chances[self.kinds]
        chances[: self.n_kinds] *= 1 - _HEAVY_CHANCE
        chances[self.n_kinds :] *= _HEAVY_CHANCE / chances[self.n_kinds :].sum()
        self.prior = np.log(chances).astype(np.float32)
        self.plain = _Likelihoods.over(self.prior, self._with_tails(self.white))
        self.without = self._without()
        self.gains = [self.rows.one(variance) for variance, _ in _SIZES]
        self.first = self._best(self.gains[_MIDDLE])

    def one(self) -> tuple[np.ndarray, np.ndarray]:
        """Evidence for every change: of all signals together, and of each by itself."""
        roughly = self._with_tails(_beside(self.white, self.units, self.first))[:, None]
        every = [_Likelihoods.over(self.prior, gain[self.kinds] + roughly) for gain in self.gains]
        chosen = np.unique(
            np.concatenate([_likely(with_it.together().max(axis=1)) for with_it in every])
        )
        kinds, which = np.unique(self.kinds[chosen], return_inverse=True)
        base = self._exact(chosen, kinds, which, self.white[kinds], self.units[kinds])
        shared, own = [], []
        for gain, (_, chance), with_it in zip(self.gains, _SIZES, every, strict=True):
            exact = gain[self.kinds[chosen]] + base
            exactly = _Likelihoods(self.prior[chosen], exact, with_it.any)
            shared.append(self._shared(exactly, chosen) + np.log(chance))
            own.append(with_it.any - self.plain.any + np.float32(np.log(chance)))
        return logsumexp(shared, axis=0) + self.places, logsumexp(own, axis=0)

    def two(self) -> tuple[np.ndarray, np.ndarray]:
        """First changes, and evidence for every change together with each of them.

        The first two are the likeliest pair.
        """
        gains = self.rows.two(self.first, _SIZES[_MIDDLE][0])
        second = self._best(gains, self.first)
        left = _beside(self.white, self.units, self.first, second)
        both = gains[np.arange(self.n_kinds), second]
        with_both = both[self.kinds] + self._with_tails(left)
        totals = _Likelihoods.over(self.prior, with_both).together()
        chosen = _likely(totals)
        # What two changes make plain, one alone may not: so firsts are those of likely pairs.
        order = self.kinds[chosen[np.argsort(-totals[chosen])]]
        pairs = np.column_stack([self.first, second])[order]
        firsts = np.array(list(dict.fromkeys(pairs.ravel().tolist()))[:_FIRSTS])
        kinds, which = np.unique(self.kinds[chosen], return_inverse=True)
        rows, white, units = self.rows.of(kinds), self.white[kinds], self.units[kinds]
        values = np.empty((len(_SIZES), len(firsts), len(self.places)))
        for number, first in enumerate(firsts):
            every = np.full(len(kinds), first)
            beside, apart = _beside(white, units, every), _apart(units, first)
            base = self._exact(chosen, kinds, which, beside, apart)
            for size, (variance, chance) in enumerate(_SIZES):
                exact = rows.two(every, variance)[which] + base
                with_both = _Likelihoods.over(self.prior[chosen], exact)
                values[size, number] = self._shared(with_both, chosen) + np.log(2 * chance)
        return firsts, logsumexp(values, axis=0) + self.places + self.places[firsts][:, None]

    def between(self, first: int, second: int) -> tuple[Float[np.ndarray, "signal signal"], float]:
        """Correlations between signals beside two changes, of their likeliest kind; 0 with itself.

        By ranks, or one row that all signals share would make them alike. With them comes how
        likely most signals are even noise there.
        """
        prior = self.prior[: self.n_kinds]
        every = np.zeros(self.n_kinds, dtype=int)
        gains = self.rows.at([first, second]).two(every, _SIZES[_MIDDLE][0])[:, 1]
        each = gains + self.normal
        kind = int((_summed(each) + prior).argmax())
        totals = _Likelihoods.over(prior, each).together()
        even = float(np.exp(logsumexp(totals[self.even]) - logsumexp(totals)))
        pair = np.array([[first], [second]])
        left = _beside(self.white[kind, None], self.units[kind, None], *pair)[0]
        left = ndtri((rankdata(left, axis=0) - 0.5) / len(left))
        left /= np.maximum(np.linalg.norm(left, axis=0), _TINY)
        value: np.ndarray = left.T @ left
        np.fill_diagonal(value, 0.0)
        return value, even

    def _best(self, gains: np.ndarray, but: np.ndarray | None = None) -> Int[np.ndarray, " kind"]:
        """The likeliest change under every kind with normal tails, ``but`` one."""
        prior = self.prior[: self.n_kinds]
        totals = _Likelihoods.over(prior, gains + self.normal[:, None]).together()
        if but is not None:
            totals[np.arange(self.n_kinds), but] = -np.inf
        best: np.ndarray = totals.argmax(axis=1)
        return best

    def _with_tails(self, left: Float[np.ndarray, "kind row signal"]) -> np.ndarray:
        """Log-likelihood of every variant, of whose tails ``left`` tells."""
        jagged = self.kinds[self.n_kinds :]
        rows = np.ascontiguousarray(left[jagged].transpose(1, 0, 2))
        heavy = self.normal[jagged] + _heavier(rows, self.rows.freedom)
        return np.concatenate([self.normal, heavy])

    def _exact(
        self,
        chosen: Int[np.ndarray, " variant"],
        kinds: Int[np.ndarray, " kind"],
        which: Int[np.ndarray, " variant"],
        white: Float[np.ndarray, "kind row signal"],
        units: Float[np.ndarray, "kind candidate row"],
    ) -> Float[np.ndarray, "variant candidate signal"]:
        """Log-likelihood of some variants, heavy tails told by what every change leaves."""
        value = np.repeat(self.normal[kinds][which][:, None], units.shape[1], axis=1)
        heavy = np.flatnonzero(chosen >= self.n_kinds)
        together = max(1, _VALUES_TOGETHER // (units[0].size * white.shape[2]))
        for part in np.array_split(heavy, -(-len(heavy) // together) or 1):
            some = which[part]
            along = units[some] @ white[some]
            by_row = np.ascontiguousarray(units[some].transpose(2, 0, 1))
            left = white[some].transpose(1, 0, 2)[:, :, None] - by_row[..., None] * along
            value[part] += _heavier(left, self.rows.freedom)
        return value

    def _without(self) -> Float[np.ndarray, " signal"]:
        """Every signal's part of the log-likelihood without a change."""
        each = self.plain.mixed()
        totals = each.sum(axis=1) + self.prior
        self.heavy = float(logsumexp(totals[self.n_kinds :]) - logsumexp(totals[: self.n_kinds]))
        at = int(totals.argmax())
        whole = np.logaddexp(logsumexp(totals), self.plain.any.sum()) - np.log(2)
        value: np.ndarray = each[at] + (whole - each[at].sum()) / each.shape[1]
        return value.astype(np.float32)

    def _shared(
        self, with_it: _Likelihoods, chosen: Int[np.ndarray, " variant"]
    ) -> Float[np.ndarray, " candidate"]:
        """Evidence of all signals together: most are of one variant, or each is of its own.

        Every signal may share the change or not, one as likely as the other, or nearly all do.
        """
        changed, same = with_it.mixed(), self.plain.of(chosen).mixed()[:, None]
        values = []
        for share in _SHARES:
            most, rest = (np.float32(np.log(2 * part)) for part in (share, 1 - share))
            alike = either(changed + most, same + rest)
            apart = either(with_it.any + most, self.plain.any + rest)
            total = _summed(capped(alike - self.without)) + with_it.prior[:, None]
            values += [logsumexp(total, axis=0), _summed(capped(apart - self.without))]
        value: np.ndarray = logsumexp(values, axis=0) - np.log(len(values))
        return value


def weigh_changes(evidence: Evidence, series: Float[np.ndarray, "row signal"]) -> Told:
    """Weigh one and two changes beside those that ``evidence`` is given."""
    weighing = _Weighing(evidence, series)
    one, own = weighing.one()
    firsts, two = weighing.two()
    between, even = weighing.between(int(firsts[0]), int(firsts[1]))
    n_signals = len(between)
    return Told(
        odds=float(np.logaddexp(logsumexp(one), logsumexp(two)) - np.log(2)),
        heavy=weighing.heavy,
        together=float((between**2).sum() / max(n_signals * (n_signals - 1), 1)),
        even=even,
        distinct=_distinct(between, own, evidence.freedom - 2),
        best=evidence.candidates[_likeliest(one, firsts, two)],
        own=own,
    )


def own_evidence(
    evidence: Evidence, series: Float[np.ndarray, "row signal"]
) -> Float[np.ndarray, "candidate signal"]:
    """What every signal says of every change by itself, as in :class:`Told`."""
    _, own = _Weighing(evidence, series).one()
    return own


def _distinct(
    between: Float[np.ndarray, "signal signal"],
    own: Float[np.ndarray, "candidate signal"],
    freedom: int,
) -> tuple[int, ...]:
    """Signals of which none repeats another, those with less evidence first.

    Few rows cannot tell, so that all are kept.
    """
    if freedom < _FEW_ROWS:
        return tuple(range(len(between)))
    kept: list[int] = []
    # Copies have as much but for rounding.
    for signal in np.argsort(own.max(axis=0).round(1), kind="stable").tolist():
        if not (np.abs(between[signal, kept]) >= _REPEATS).any():
            kept.append(signal)
    return tuple(sorted(kept))


def _likeliest(one: np.ndarray, firsts: np.ndarray, two: np.ndarray) -> int:
    """The change that is likeliest, alone or as one of two."""
    marginal = np.logaddexp(one, logsumexp(two, axis=0))
    marginal[firsts] = np.logaddexp(marginal[firsts], logsumexp(two, axis=1))
    return int(marginal.argmax())


def _heavier(left: Float[np.ndarray, "row *any signal"], freedom: int) -> np.ndarray:
    """How much likelier rows are with heavy tails than with normal ones, in nats.

    Rows come first, over which numpy adds and multiplies fastest.
    """
    n_rows = len(left)
    squares = left**2
    total = squares.sum(axis=0)
    squares *= n_rows / np.maximum(total, np.float32(_NOTHING))
    best = np.full(total.shape, -np.inf, dtype=np.float32)
    for scale in _HEAVY_SCALES:
        each = squares * np.float32(1 / _HEAVY / scale**2)
        each += 1
        tails = np.zeros_like(best)
        # One logarithm for several rows, whose product does not exceed single precision.
        for at in range(0, n_rows, _ROWS_TOGETHER):
            tails += np.log(each[at : at + _ROWS_TOGETHER].prod(axis=0))
        tails *= np.float32(-(_HEAVY + 1) / 2 / n_rows)
        np.maximum(best, tails + np.float32(_HEAVY_PEAK - np.log(scale)), out=best)
    value: np.ndarray = (best - np.float32(_NORMAL_MEAN)) * np.float32(freedom)
    return np.where(total > _NOTHING, value, np.float32(0))


def _beside(
    white: Float[np.ndarray, "kind row signal"],
    units: Float[np.ndarray, "kind candidate row"],
    *changes: np.ndarray,
) -> Float[np.ndarray, "kind row signal"]:
    """What changes, one of every kind at a time, leave of series."""
    kinds = np.arange(len(white))
    axes, _ = np.linalg.qr(np.stack([units[kinds, change] for change in changes], axis=2))
    left: np.ndarray = white - axes @ (axes.transpose(0, 2, 1) @ white)
    return left


def _apart(units: Float[np.ndarray, "kind candidate row"], first: int) -> np.ndarray:
    """What changes have beside a first one, each of length 1, or 0 where it has nothing."""
    one = units[:, first]
    left = units - (units @ one[..., None]) * one[:, None]
    length = np.linalg.norm(left, axis=2, keepdims=True)
    value: np.ndarray = left / np.where(length > np.sqrt(_SAME), length, np.inf)
    return value


def _likely(totals: Float[np.ndarray, " variant"]) -> Int[np.ndarray, " chosen"]:
    return np.flatnonzero(totals > totals.max() - _UNLIKELY)


def _summed(values: Float[np.ndarray, "*any signal"]) -> Float[np.ndarray, "*any"]:
    """Over signals, several times faster than numpy's sum over so few."""
    total: np.ndarray = values @ np.ones(values.shape[-1], dtype=np.float32)
    return total
