"""How far curves speak for a sharp change at each block, beyond everything gradual.

For every signal, the log-likelihood of gradual change and noise with the change, less that without
it. A change is a **jump**, which moves the level from one row on, or a **bend**, which moves the
rate. Signals of one model mostly vary about their lines alike, so that one gradual kind is the
likeliest for all, and every signal may be of any other kind instead. Nothing is scaled beforehand:
what is left beside a change does not hold it, so that its evidence grows with its size without end,
whatever the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mspgt_lens.scales.drift import hinges, steps
from mspgt_lens.scales.gradual import gradual_kinds

Kind = Literal["jump", "bend"]
# A change's size beforehand, in units of the noise: its variance.
_SIZE_VARIANCE = 4.0
# Evidence of one signal beyond this counts by its logarithm: it grows on, but no signal decides
# alone.
_MUCH = 2.5
# A bend needs so many changes from row to row on either side, and a jump that spreads over several
# rows one.
_RATES_BESIDE = 2
# How likely a change is a jump over so many rows, or a bend, beforehand.
_CHANCES: dict[tuple[Kind, int], float] = {
    ("jump", 1): 0.4,
    ("jump", 2): 0.05,
    ("jump", 3): 0.05,
    ("bend", 1): 0.5,
}
# How likely a signal is of some other kind than most.
OTHER_KIND = 0.2
# Rows beyond the fitted curves without which nothing can be told.
LEAST_FREEDOM = 2
_VALUES_PER_CHUNK = 400
_LEAST_LEFT = 1e-6
_ALL = (-1,)
# Evidence for what cannot be, in nats.
_NEVER = -1e4


class Change(NamedTuple):
    """A sharp change at a row: its level (a jump), or its rate (a bend), is new from there on.

    Attributes:
        kind: Jump or bend.
        row: The first row whose value is new.
        width: Over how many rows a jump spreads, evenly.
    """

    kind: Kind
    row: int
    width: int = 1

    @property
    def end(self) -> int:
        """The first row after those that change."""
        return self.row + self.width


def change_curves(n_rows: int, changes: Sequence[Change]) -> Float[np.ndarray, "row change"]:
    """What each change of size 1 adds to every row."""
    columns = [
        steps(n_rows, range(c.row, c.end)).mean(axis=1, keepdims=True)
        if c.kind == "jump"
        else hinges(n_rows, [c.row])
        for c in changes
    ]
    return np.hstack([np.zeros((n_rows, 0)), *columns])


def _possible(n_rows: int) -> dict[Change, float]:
    """Every change that series of so many rows may hold, with its chance."""
    chances: dict[Change, float] = {}
    for (kind, width), chance in _CHANCES.items():
        if kind == "bend":
            rows = range(_RATES_BESIDE + 1, n_rows - _RATES_BESIDE + 1)
        elif width > 1:
            rows = range(2, n_rows - width)
        else:
            rows = range(1, n_rows)
        chances |= {Change(kind, row, width): chance / len(rows) for row in rows}
    return chances


class Curves(NamedTuple):
    """Changes of size 1, as whiteners make them.

    Attributes:
        units: Each of length 1, or 0 where given changes add up to it.
        length: Their squared lengths before.
    """

    units: Float[np.ndarray, "kind candidate row"]
    length: Float[np.ndarray, "kind candidate"]


class Evidence:
    """Evidence for one more change, for series that may hold some changes already.

    Attributes:
        given: The changes that series may hold, free in size for every signal.
        candidates: The changes that are weighed.
        prior: How likely every candidate is beforehand, in nats: anywhere as likely.
        freedom: Rows less fitted curves.
        whiteners: Turn series into rows that are independent under each gradual kind, and hold no
            line and no given change.
    """

    def __init__(self, n_rows: int, given: tuple[Change, ...]) -> None:
        self.n_rows, self.given = n_rows, given
        weighed = {c: chance for c, chance in _possible(n_rows).items() if c not in given}
        self.candidates = list(weighed)
        self.prior = np.log(list(weighed.values()))
        line = np.column_stack([np.ones(n_rows), np.arange(n_rows) - (n_rows - 1) / 2])
        fitted = np.column_stack([line, change_curves(n_rows, given)])
        self.freedom = n_rows - fitted.shape[1]
        kinds = gradual_kinds(n_rows)
        # Row by row, what the rows before do not foretell, so that a large one stays one row's.
        innovations = np.linalg.inv(kinds.roots)
        axes, _ = np.linalg.qr(innovations @ fitted)
        self.whiteners = innovations - axes @ (axes.transpose(0, 2, 1) @ innovations)
        beyond = np.linalg.svd(fitted)[0][:, fitted.shape[1] :]
        roots = np.linalg.cholesky(beyond.T @ kinds.covariances @ beyond)
        self._base = -np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
        # Of all kinds, and of those that were asked for last.
        self._made: dict[tuple[int, ...], Curves] = {}

    def likelihoods(
        self, series: Float[np.ndarray, "row signal"]
    ) -> Float[np.ndarray, "kind signal"]:
        """Log-likelihood of every gradual kind beside the given changes, sizes fitted."""
        return self.log_likelihood(self.whiteners @ series, np.arange(len(self.whiteners)))

    def log_likelihood(
        self, white: Float[np.ndarray, "kind row series"], kinds: Int[np.ndarray, " kind"]
    ) -> Float[np.ndarray, "kind series"]:
        """Of each kind, from the rows that its whitener made."""
        left = np.einsum("krs,krs->ks", white, white)
        least = np.finfo(float).tiny
        base = self._base[kinds][:, None]
        value: np.ndarray = base - self.freedom / 2 * np.log(np.maximum(left, least))
        return value

    def gains(
        self, series: Float[np.ndarray, "draw row signal"], kinds: Int[np.ndarray, " kind"]
    ) -> Float[np.ndarray, "candidate signal draw"]:
        """Evidence of every signal for every candidate, in nats.

        Args:
            series: Independent draws of some signals.
            kinds: The gradual kinds that they may be of.
        """
        n_draws, n_rows, n_signals = series.shape
        flat = series.transpose(1, 2, 0).reshape(n_rows, n_signals * n_draws)
        white = self.whiteners[kinds] @ flat
        without = self.log_likelihood(white, kinds)
        without -= without.max(axis=0)
        base = without.astype(np.float32).reshape(len(kinds), n_signals, n_draws)
        plain = _under_common_kind(base)
        white /= np.maximum(np.linalg.norm(white, axis=1), np.finfo(float).tiny)[:, None]
        units, length = self.curves(kinds)
        along = (units @ white.astype(np.float32)).reshape(len(kinds), -1, n_signals, n_draws)
        fitted = np.log(np.maximum(1 - along * along, np.float32(_LEAST_LEFT)))
        fitted *= np.float32(-self.freedom / 2)
        price = np.where(length > 0, -0.5 * np.log1p(_SIZE_VARIANCE * length), _NEVER)
        with_it = fitted + price.astype(np.float32)[:, :, None, None] + base[:, None]
        gains: np.ndarray = _under_common_kind(with_it.transpose(1, 0, 2, 3)) - plain
        return gains

    def chunks(
        self, series: Float[np.ndarray, "draw row signal"]
    ) -> list[Float[np.ndarray, "draw row signal"]]:
        """Series in portions that stay in the processor's cache."""
        together = max(1, _VALUES_PER_CHUNK // series.shape[2])
        return np.array_split(series, -(-len(series) // together))

    def curves(self, kinds: Int[np.ndarray, " kind"] | None = None) -> Curves:
        """Every candidate under some kinds, or all of them."""
        key = _ALL if kinds is None else tuple(kinds.tolist())
        if key not in self._made:
            whiteners = self.whiteners if kinds is None else self.whiteners[kinds]
            curves = whiteners @ change_curves(self.n_rows, self.candidates)
            length = np.linalg.norm(curves, axis=1)
            # Given changes can add up to a candidate, of which nothing is left then.
            new = length > 1e-4
            units = (curves / np.where(new, length, np.inf)[:, None]).transpose(0, 2, 1)
            squares = np.where(new, length**2, 0.0)
            self._made = {k: made for k, made in self._made.items() if k == _ALL}
            self._made[key] = Curves(units.astype(np.float32), squares.astype(np.float32))
        return self._made[key]


@lru_cache(maxsize=32)
def evidence_for_change(n_rows: int, given: tuple[Change, ...] = ()) -> Evidence:
    """What weighs one more change in series of so many rows that may hold the given ones."""
    return Evidence(n_rows, given)


def votes(gains: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """What one signal's evidence counts: it may share the change or not, one as likely as other."""
    return capped(either(gains, np.float32(0)))


def either(one: np.ndarray, other: np.ndarray | np.float32) -> np.ndarray:
    """Log-likelihood of what may be one or the other, as likely as not; shapes are broadcast."""
    # As numpy.logaddexp, several times faster.
    value: np.ndarray = np.maximum(one, other) + np.log(1 + np.exp(-np.abs(one - other)))
    return value - np.float32(np.log(2))


def capped(evidence: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """One signal's evidence among several: beyond a few nats it counts by its logarithm.

    So what many signals share outweighs one.
    """
    beyond = np.maximum(evidence - np.float32(_MUCH), 0)
    value: np.ndarray = np.minimum(evidence, np.float32(_MUCH)) + np.log(1 + beyond)
    return value


def _under_common_kind(
    likelihoods: Float[np.ndarray, "*any kind signal draw"],
) -> Float[np.ndarray, "*any signal draw"]:
    """Every signal's log-likelihood under the kind that is the likeliest for all of them."""
    top = likelihoods.max(axis=-3, keepdims=True)
    top = np.where(np.isfinite(top), top, np.float32(0))
    relative = np.exp(likelihoods - top)
    any_kind = relative.mean(axis=-3, keepdims=True)
    with np.errstate(divide="ignore"):
        each = np.log((1 - OTHER_KIND) * relative + OTHER_KIND * any_kind) + top
    best = each.sum(axis=-2).argmax(axis=-2)
    value: np.ndarray = np.take_along_axis(each, best[..., None, None, :], -3)[..., 0, :, :]
    return value
