"""How far curves speak for a sharp change at each block, beyond everything gradual.

For every signal, the log-likelihood of the likeliest gradual kind with the change, less that of the
likeliest without it. A change is a **jump**, which moves the level from one row on, or a **bend**,
which moves the rate. Nothing is scaled beforehand: what is left beside a change does not hold it,
so that its evidence grows with its size without end, whatever the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

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
# Rows beyond the fitted curves without which nothing can be told.
LEAST_FREEDOM = 2
_VALUES_PER_CHUNK = 1500
_LEAST_LEFT = 1e-6


class Change(NamedTuple):
    """A sharp change at a row: its level (a jump), or its rate (a bend), is new from there on."""

    kind: Kind
    row: int


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
        values, vectors = np.linalg.eigh(beyond.T @ gradual_kinds(n_rows).covariances @ beyond)
        # Rows that are independent under each kind, and hold no line and no given change.
        self.whiteners = (
            (vectors / np.sqrt(values)[:, None]) @ vectors.transpose(0, 2, 1) @ beyond.T
        )
        self._base = -0.5 * np.log(values).sum(axis=1)
        curves = self.whiteners @ change_curves(n_rows, self.candidates)
        length = np.linalg.norm(curves, axis=1)
        # Given changes can add up to a candidate, of which nothing is left then.
        new = length > 1e-4
        units = curves / np.where(new, length, np.inf)[:, None]
        self._units = units.transpose(0, 2, 1).astype(np.float32)
        price = np.where(new, -0.5 * np.log1p(_SIZE_VARIANCE * length**2), -np.inf)
        self._price = price.astype(np.float32)

    def likelihoods(
        self, series: Float[np.ndarray, "row signal"]
    ) -> Float[np.ndarray, "kind signal"]:
        """Log-likelihood of every gradual kind beside the given changes, sizes fitted."""
        left = ((self.whiteners @ series) ** 2).sum(axis=1)
        return self._log_likelihood(left)

    def gains(
        self, series: Float[np.ndarray, "draw row signal"]
    ) -> Float[np.ndarray, "candidate signal draw"]:
        """Evidence of every signal for every candidate, in nats."""
        n_draws, n_rows, n_signals = series.shape
        flat = series.transpose(1, 2, 0).reshape(n_rows, n_signals * n_draws)
        white = self.whiteners @ flat
        left = np.einsum("krs,krs->ks", white, white)
        without = self._log_likelihood(left)
        best = without.max(axis=0)
        white /= np.sqrt(np.maximum(left, np.finfo(float).tiny))[:, None]
        with_it = self._units @ white.astype(np.float32)
        # In place: these are the largest arrays there are.
        with_it *= with_it
        np.subtract(1, with_it, out=with_it)
        np.log(np.maximum(with_it, _LEAST_LEFT, out=with_it), out=with_it)
        with_it *= np.float32(-self.freedom / 2)
        with_it += self._price[:, :, None]
        with_it += (without - best).astype(np.float32)[:, None]
        gains: np.ndarray = with_it.max(axis=0).reshape(-1, n_signals, n_draws)
        return gains

    def chunks(
        self, series: Float[np.ndarray, "draw row signal"]
    ) -> list[Float[np.ndarray, "draw row signal"]]:
        """Series in portions that stay in the processor's cache."""
        together = max(1, _VALUES_PER_CHUNK // series.shape[2])
        return np.array_split(series, -(-len(series) // together))

    def _log_likelihood(self, left: Float[np.ndarray, "kind series"]) -> np.ndarray:
        least = np.finfo(float).tiny
        value: np.ndarray = self._base[:, None] - self.freedom / 2 * np.log(np.maximum(left, least))
        return value


@lru_cache(maxsize=256)
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
