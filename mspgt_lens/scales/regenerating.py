"""Series without a further sharp change, drawn from what the signals may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import norm, rankdata, t

from mspgt_lens.scales.evidence import Evidence
from mspgt_lens.scales.gradual import gradual_kinds

# Degrees of freedom of heavy tails.
_HEAVY = 3
# Its scales that are tried, in units of the deviation.
_HEAVY_SCALES = (0.3, 0.45, 0.6, 0.8, 1.0)
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

    def draw(
        self, n_draws: int, rng: np.random.Generator, *, heavy: bool = False
    ) -> Float[np.ndarray, "draw row signal"]:
        """New series; the size of every draw's noise is that of its signal.

        Args:
            n_draws: How many.
            rng: Decides every draw.
            heavy: Noise of Student's t with 3 degrees of freedom instead of normal noise.
        """
        n_kinds, n_signals = self.weights.shape
        n_rows, roots = self.n_rows, gradual_kinds(self.n_rows).roots
        root = np.linalg.cholesky(self.correlation + 1e-9 * np.eye(n_signals))
        noise = rng.standard_normal((n_rows, n_draws, n_signals)) @ root.T
        if heavy:
            noise /= np.sqrt(rng.chisquare(_HEAVY, noise.shape) / _HEAVY)
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


def regenerator(
    evidence: Evidence,
    series: Float[np.ndarray, "row signal"],
    correlated: Evidence | None = None,
) -> Regenerator:
    """What series without a further change may be, besides the changes that ``evidence`` is given.

    How often each kind occurs among the signals is fitted (by expectation and maximization), so
    that many signals tell what one of so few rows could not.

    Args:
        evidence: Given the changes that the series may hold.
        series: The series.
        correlated: Given fewer changes, for the correlation between signals: what is left without
            the likeliest changes is correlated too little. None takes ``evidence``.
    """
    likelihoods = evidence.likelihoods(series)
    squares = ((evidence.whiteners @ series) ** 2).sum(axis=1)
    held = correlated or evidence
    common = int(held.likelihoods(series).sum(axis=1).argmax())
    return Regenerator(
        n_rows=evidence.n_rows,
        weights=kind_weights(likelihoods),
        sizes=np.sqrt(squares / max(evidence.freedom, 1)),
        correlation=_correlation(held.whiteners[common] @ series, held.freedom),
        common=int(likelihoods.sum(axis=1).argmax()),
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


def lightness(
    evidence: Evidence, series: Float[np.ndarray, "draw row signal"]
) -> Float[np.ndarray, " draw"]:
    """How much better normal noise describes series than Student's t with 3 degrees of freedom.

    The log-likelihood ratio per row, each signal of its likeliest kind whose size is even over
    depth: one that is larger where steps are large would account for heavy tails.
    """
    n_draws, n_rows, n_signals = series.shape
    even = np.arange(gradual_kinds(evidence.n_rows).n_even)
    flat = series.transpose(1, 2, 0).reshape(n_rows, -1)
    white = evidence.whiteners[even] @ flat
    likeliest = evidence.log_likelihood(white, even).argmax(axis=0)
    own = white[likeliest, :, np.arange(flat.shape[1])]
    own /= np.maximum(np.sqrt((own**2).mean(axis=1, keepdims=True)), np.finfo(float).tiny)
    heavy = [t.logpdf(own, _HEAVY, scale=scale).mean(axis=1) for scale in _HEAVY_SCALES]
    ratio = norm.logpdf(own).mean(axis=1) - np.max(heavy, axis=0)
    value: np.ndarray = ratio.reshape(n_signals, n_draws).mean(axis=0)
    return value


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
