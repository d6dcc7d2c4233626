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
# A bend needs so many changes from row to row on either side.
_RATES_BESIDE = 2
# How likely a signal is of some other kind than most.
_OTHER_KIND = 0.2
# A second change is sought beside so many first ones.
_FIRSTS = 2
# Rows beyond the fitted curves without which nothing can be told.
LEAST_FREEDOM = 2
_VALUES_PER_CHUNK = 400
_LEAST_LEFT = 1e-6
# Two changes are told apart if what they share is less than this part of each.
_SAME = 0.9999


class Change(NamedTuple):
    """A sharp change at a row: its level (a jump), or its rate (a bend), is new from there on."""

    kind: Kind
    row: int


class Weighed(NamedTuple):
    """Evidence of several series, each of several signals.

    Attributes:
        gains: Of every signal for every change, in nats.
        own: The same where every signal is of its own likeliest kind, whatever the others are: what
            it says by itself.
        pair: All signals' votes for the likeliest two changes together.
    """

    gains: Float[np.ndarray, "candidate signal draw"]
    own: Float[np.ndarray, "candidate signal draw"]
    pair: Float[np.ndarray, " draw"]


def change_curves(n_rows: int, changes: Sequence[Change]) -> Float[np.ndarray, "row change"]:
    """What each change of size 1 adds to every row."""
    columns = [(steps if c.kind == "jump" else hinges)(n_rows, [c.row]) for c in changes]
    return np.hstack([np.zeros((n_rows, 0)), *columns])


class Evidence:
    """Evidence for one more change, for series that may hold some changes already.

    Attributes:
        given: The changes that series may hold, free in size for every signal.
        candidates: The changes that are weighed.
        freedom: Rows less fitted curves.
        whiteners: Turn series into rows that are independent under each gradual kind, and hold no
            line and no given change.
    """

    def __init__(self, n_rows: int, given: tuple[Change, ...]) -> None:
        self.n_rows, self.given = n_rows, given
        jumps = [Change("jump", row) for row in range(1, n_rows)]
        bends = [
            Change("bend", row) for row in range(_RATES_BESIDE + 1, n_rows - _RATES_BESIDE + 1)
        ]
        self.candidates = [c for c in (*jumps, *bends) if c not in given]
        line = np.column_stack([np.ones(n_rows), np.arange(n_rows) - (n_rows - 1) / 2])
        fitted = np.column_stack([line, change_curves(n_rows, given)])
        self.freedom = n_rows - fitted.shape[1]
        beyond = np.linalg.svd(fitted)[0][:, fitted.shape[1] :]
        roots = np.linalg.cholesky(beyond.T @ gradual_kinds(n_rows).covariances @ beyond)
        self.whiteners = np.linalg.solve(
            roots, np.broadcast_to(beyond.T, roots.shape[:1] + beyond.T.shape)
        )
        # Of the kinds that were asked for last.
        self._made: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._base = -np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)

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
        return self._weigh(series, kinds, pairs=False).gains

    def weigh(
        self, series: Float[np.ndarray, "draw row signal"], kinds: Int[np.ndarray, " kind"]
    ) -> Weighed:
        """The same, with the evidence for two changes together."""
        return self._weigh(series, kinds, pairs=True)

    def chunks(
        self, series: Float[np.ndarray, "draw row signal"]
    ) -> list[Float[np.ndarray, "draw row signal"]]:
        """Series in portions that stay in the processor's cache."""
        together = max(1, _VALUES_PER_CHUNK // series.shape[2])
        return np.array_split(series, -(-len(series) // together))

    def _weigh(self, series: np.ndarray, kinds: np.ndarray, pairs: bool) -> Weighed:
        n_draws, n_rows, n_signals = series.shape
        flat = series.transpose(1, 2, 0).reshape(n_rows, n_signals * n_draws)
        white = self.whiteners[kinds] @ flat
        without = self.log_likelihood(white, kinds)
        without -= without.max(axis=0)
        shape = (len(kinds), n_signals, n_draws)
        base = without.astype(np.float32).reshape(shape)
        plain = _under_common_kind(base)
        white /= np.maximum(np.linalg.norm(white, axis=1), np.finfo(float).tiny)[:, None]
        units, price, length = self._curves(tuple(kinds.tolist()))
        along = (units @ white.astype(np.float32)).reshape(len(kinds), -1, n_signals, n_draws)
        with_it = self._fitted(along * along) + price[:, :, None, None] + base[:, None]
        gains = _under_common_kind(with_it.transpose(1, 0, 2, 3)) - plain
        own = with_it.max(axis=0) - base.max(axis=0)
        if not pairs:
            return Weighed(gains, own, np.zeros(n_draws))
        first = np.argsort(-votes(gains).sum(axis=1), axis=0)[:_FIRSTS]
        two = [self._beside(row, along, base, kinds, units, length) - plain for row in first]
        return Weighed(gains, own, np.max([votes(g).sum(axis=1).max(axis=0) for g in two], axis=0))

    def _beside(
        self,
        first: Int[np.ndarray, " draw"],
        along: Float[np.ndarray, "kind candidate signal draw"],
        base: Float[np.ndarray, "kind signal draw"],
        kinds: Int[np.ndarray, " kind"],
        units: Float[np.ndarray, "kind candidate row"],
        length: Float[np.ndarray, "kind candidate"],
    ) -> Float[np.ndarray, "candidate signal draw"]:
        """Log-likelihood of every signal with every candidate beside each draw's first change."""
        draws = np.arange(len(first))
        chosen, which = np.unique(first, return_inverse=True)
        shared = (units @ units[:, chosen].transpose(0, 2, 1))[:, :, which][:, :, None]
        one = along[:, first, :, draws].transpose(1, 2, 0)[:, None]
        rest = np.maximum(1 - shared**2, 1 - _SAME)
        taken = (one**2 + along**2 - 2 * shared * one * along) / rest
        mine, other = length[:, first][:, None, None], length[:, :, None, None]
        apart_by = (1 + _SIZE_VARIANCE * mine) * (1 + _SIZE_VARIANCE * other)
        apart_by -= _SIZE_VARIANCE**2 * shared**2 * mine * other
        # What single precision leaves of two large numbers may be less than it can be.
        price = -0.5 * np.log(np.maximum(apart_by, 1))
        apart = (shared**2 < _SAME) & (other > 0)
        with_both = np.where(apart, self._fitted(taken) + price, -np.inf) + base[:, None]
        return _under_common_kind(with_both.transpose(1, 0, 2, 3))

    def _curves(self, kinds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every kind and candidate: its whitened unit curve, its price, and squared length."""
        if kinds in self._made:
            return self._made[kinds]
        curves = self.whiteners[list(kinds)] @ change_curves(self.n_rows, self.candidates)
        length = np.linalg.norm(curves, axis=1)
        # Given changes can add up to a candidate, of which nothing is left then.
        new = length > 1e-4
        units = (curves / np.where(new, length, np.inf)[:, None]).transpose(0, 2, 1)
        price = np.where(new, -0.5 * np.log1p(_SIZE_VARIANCE * length**2), -np.inf)
        squared = np.where(new, length**2, 0.0)
        made = units.astype(np.float32), price.astype(np.float32), squared.astype(np.float32)
        self._made = {kinds: made}
        return made

    def _fitted(self, taken: np.ndarray) -> np.ndarray:
        """What is gained where so large a part of a series is taken."""
        value: np.ndarray = np.log(np.maximum(1 - taken, np.float32(_LEAST_LEFT)))
        value *= np.float32(-self.freedom / 2)
        return value


@lru_cache(maxsize=128)
def evidence_for_change(n_rows: int, given: tuple[Change, ...] = ()) -> Evidence:
    """What weighs one more change in series of so many rows that may hold the given ones."""
    return Evidence(n_rows, given)


def votes(gains: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """What one signal's evidence counts: it may share the change or not, one as likely as other.

    Beyond a few nats it counts by its logarithm, so that what many signals share outweighs one.
    """
    shared = np.logaddexp(np.float32(0), gains) - np.float32(np.log(2))
    beyond = np.maximum(shared - np.float32(_MUCH), 0)
    value: np.ndarray = np.minimum(shared, np.float32(_MUCH)) + np.log1p(beyond)
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
        each = np.log((1 - _OTHER_KIND) * relative + _OTHER_KIND * any_kind) + top
    best = each.sum(axis=-2).argmax(axis=-2)
    value: np.ndarray = np.take_along_axis(each, best[..., None, None, :], -3)[..., 0, :, :]
    return value
