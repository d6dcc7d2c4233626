"""Series without a further sharp change, drawn from what the signals may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import rankdata

from mspgt_lens.scales.evidence import Evidence
from mspgt_lens.scales.gradual import gradual_kinds

_ITERATIONS = 100


@dataclass(frozen=True)
class Regenerator:
    """Draws series like some signals without changes.

    Attributes:
        n_rows: Rows of a series.
        weights: How likely each signal is of each gradual kind, shape ``[kind, signal]``.
        sizes: Standard deviation of each signal's noise under each kind.
        correlation: Between signals, of what is new at each row.
        common: The kind that is likeliest for all signals together.
    """

    n_rows: int
    weights: Float[np.ndarray, "kind signal"]
    sizes: Float[np.ndarray, "kind signal"]
    correlation: Float[np.ndarray, "signal signal"]
    common: int

    def draw(self, n_draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draw row signal"]:
        """New series; the size of every draw's noise is that of its signal.

        Args:
            n_draws: How many.
            rng: Decides every draw.
        """
        n_kinds, n_signals = self.weights.shape
        n_rows, roots = self.n_rows, gradual_kinds(self.n_rows).roots
        root = np.linalg.cholesky(self.correlation + 1e-9 * np.eye(n_signals))
        noise = rng.standard_normal((n_rows, n_draws, n_signals)) @ root.T
        kinds = np.stack(
            [rng.choice(n_kinds, size=n_draws, p=self.weights[:, i]) for i in range(n_signals)], 1
        )
        series = np.empty_like(noise)
        for kind in np.unique(kinds):
            chosen = kinds == kind
            series[:, chosen] = roots[kind] @ noise[:, chosen]
        series *= self.sizes[kinds, np.arange(n_signals)]
        drawn: np.ndarray = series.transpose(1, 0, 2)
        return drawn


def regenerator(evidence: Evidence, series: Float[np.ndarray, "row signal"]) -> Regenerator:
    """What series without a further change may be, besides the changes that ``evidence`` is given.

    How often each kind occurs among the signals is fitted (by expectation and maximization), so
    that many signals tell what one of so few rows could not.

    Args:
        evidence: Given the changes that the series may hold.
        series: The series.
    """
    likelihoods = evidence.likelihoods(series)
    squares = ((evidence.whiteners @ series) ** 2).sum(axis=1)
    common = int(likelihoods.sum(axis=1).argmax())
    return Regenerator(
        n_rows=evidence.n_rows,
        weights=kind_weights(likelihoods),
        sizes=np.sqrt(squares / max(evidence.freedom, 1)),
        correlation=_correlation(evidence.whiteners[common] @ series, evidence.freedom),
        common=common,
    )


def kind_weights(
    likelihoods: Float[np.ndarray, "kind signal"],
) -> Float[np.ndarray, "kind signal"]:
    """How likely each signal is of each kind, given how often each occurs among all of them."""
    relative = np.exp(likelihoods - likelihoods.max(axis=0))
    n_kinds, n_signals = relative.shape
    share = np.full(n_kinds, 1 / n_kinds)
    for _ in range(_ITERATIONS):
        share = share * (relative @ (1 / (share @ relative))) / n_signals
    weights: np.ndarray = share[:, None] * relative
    weights /= weights.sum(axis=0)
    return weights


def _correlation(
    white: Float[np.ndarray, "row signal"], freedom: int
) -> Float[np.ndarray, "signal signal"]:
    """Of normal scores of ranks, which large values do not decide, less what chance gives."""
    n_rows, n_signals = white.shape
    if n_signals == 1 or freedom < 2:
        return np.eye(n_signals)
    scores = ndtri(rankdata(white, axis=0) / (n_rows + 1))
    correlation = np.corrcoef(scores.T)
    between = correlation[~np.eye(n_signals, dtype=bool)]
    # Correlations no larger than chance gives are taken for chance; clear ones are kept whole.
    chance = min(1.0, 1 / freedom / max(float((between**2).mean()), 1e-12)) ** 2
    shrunk: np.ndarray = (1 - chance) * correlation + chance * np.eye(n_signals)
    return shrunk
