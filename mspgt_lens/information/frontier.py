"""The Gaussian information bottleneck in closed form, from canonical correlations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.contract import Result, interval, tidy
from mspgt_lens.estimates import Curve, Estimate
from mspgt_lens.statistics import fold_interval, jackknife_interval

DEFAULT_BETAS = np.geomspace(1.0, 1000.0, 61)
_RATE = (
    "Information that the optimal Gaussian bottleneck takes from the site at this beta, given its "
    "canonical correlations with the target."
)
_RELEVANCE = (
    "Information that the optimal Gaussian bottleneck keeps about the target at this beta, given "
    "held-out canonical correlations: what linear-Gaussian readers can use, no bound on Shannon's."
)
_OF_TOKEN = (
    " The target is one token's embedding, which is far from Gaussian: this may be more than a "
    "token carries. Compare sites by it, and not with what is predicted of the token."
)
_CRITICAL = "The least beta at which a Gaussian bottleneck keeps anything: 1 / rho^2, rho held out."


@dataclass(frozen=True, eq=False, repr=False)
class Frontier(Result):
    """How much of a target can be kept at which rate: the Gaussian information bottleneck.

    Minimizing ``I(T;Z) - beta I(T;Y)`` over noisy linear summaries T of z, component i switches on
    at ``beta = 1 / rho_i^2`` (Chechik et al. 2005). The correlations are held out: directions are
    found on the other folds of groups, so a chance direction correlates with either sign, and one
    that correlates negatively on the whole never switches on.

    Attributes:
        betas: Weights of relevance against rate, shape ``[beta]``.
        by_fold: Held-out canonical correlations on each fold, shape ``[fold, component]``.
        weights: Positions of each fold, shape ``[fold]``.
        of_token: Whether the target is a single token's embedding, about which a Gaussian reading
            may exceed what the token carries.
    """

    betas: Float[np.ndarray, " beta"]
    by_fold: Float[np.ndarray, "fold component"]
    weights: Float[np.ndarray, " fold"]
    of_token: bool = False

    def __post_init__(self) -> None:
        for name in ("betas", "by_fold", "weights"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.betas.ndim != 1 or not (self.betas >= 1).all() or not np.isfinite(self.betas).all():
            raise ValueError(
                "betas must be a vector of finite numbers, at least 1 (below it nothing is worth "
                f"its rate), got {self.betas!r}"
            )
        if (np.abs(self.correlations) > 1 - 1e-9).any():
            raise ValueError(
                "z determines y: a canonical correlation is 1, so the information between them is "
                "infinite; add the noise that they are measured with"
            )

    @property
    def correlations(self) -> Float[np.ndarray, " component"]:
        """Held-out canonical correlations, in the order of the training folds."""
        return _pooled(self.by_fold, self.weights)

    @cached_property
    def rate(self) -> Curve:
        """``I(T;Z)`` at each beta (nats)."""
        return self._jackknifed(0, _RATE)

    @cached_property
    def relevance(self) -> Curve:
        """``I(T;Y)`` at each beta (nats)."""
        return self._jackknifed(1, self._kept)

    @property
    def critical_betas(self) -> Float[np.ndarray, " component"]:
        """The beta at which each component switches on; infinite where it never does."""
        return _critical(self.correlations)

    @property
    def critical_beta(self) -> Estimate:
        """The first beta at which anything is kept; infinite where nothing ever is."""
        first = int(np.argmax(self.correlations))
        _, low, high = fold_interval(self.by_fold[:, [first]], self.weights)
        ends = _critical(np.array([high[0], low[0]]))
        value, below, above = (float(b) for b in (self.critical_betas[first], *ends))
        return Estimate(value, min(below, value), max(above, value), "beta", _CRITICAL)

    def relevance_at(self, rate: float) -> Estimate:
        """The most that a Gaussian bottleneck of this rate keeps: relevance at a matched rate.

        Args:
            rate: ``I(T;Z)`` in nats, at least 0.

        Returns:
            ``I(T;Y)`` in nats, with its 95% jackknife interval over folds (Chechik et al. 2005).

        Raises:
            ValueError: If the rate is negative or not finite.
        """
        if not (np.isfinite(rate) and rate >= 0):
            raise ValueError(f"rate must be a finite number of nats, at least 0, got {rate!r}")
        value = np.array([relevance_at_rate(self.correlations, rate)])
        without = [[relevance_at_rate(c, rate)] for c in self._without_fold()]
        low, high = jackknife_interval(value, np.array(without))
        return Estimate(float(value[0]), float(low[0]), float(high[0]), "nats", self._kept)

    def heading(self) -> str:
        """Sizes."""
        n_folds, n_components = self.by_fold.shape
        return (
            f"Frontier: Gaussian information bottleneck at {len(self.betas)} betas, "
            f"{n_components} components, {n_folds} folds"
        )

    def findings(self) -> list[str]:
        """Where anything is kept, and how much at most."""
        last = int(np.argmax(self.betas))
        rate, relevance = (
            interval(c.values[last], c.low[last], c.high[last]) for c in (self.rate, self.relevance)
        )
        beta = self.critical_beta
        return [
            f"Something is kept from beta {interval(beta.value, beta.low, beta.high)} on.",
            f"At beta {self.betas[last]:g}: relevance {relevance} nats at a rate of {rate} nats.",
            "What linear-Gaussian readers can use; no bound on Shannon's information."
            + _OF_TOKEN * self.of_token,
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """Rows of rate and relevance: ``quantity, beta, value, low, high, unit``."""
        parts = [
            tidy(
                {
                    "quantity": name,
                    "beta": self.betas,
                    "value": curve.values,
                    "low": curve.low,
                    "high": curve.high,
                    "unit": curve.unit,
                }
            )
            for name, curve in (("rate", self.rate), ("relevance", self.relevance))
        ]
        return pd.concat(parts, ignore_index=True)

    def _without_fold(self) -> list[np.ndarray]:
        remaining = [np.arange(len(self.weights)) != k for k in range(len(self.weights))]
        return [_pooled(self.by_fold[rows], self.weights[rows]) for rows in remaining]

    @property
    def _kept(self) -> str:
        return _RELEVANCE + _OF_TOKEN * self.of_token

    def _jackknifed(self, which: int, guarantee: str) -> Curve:
        value = gaussian_frontier(self.correlations, self.betas)[which]
        without = [gaussian_frontier(c, self.betas)[which] for c in self._without_fold()]
        low, high = jackknife_interval(value, np.stack(without))
        return Curve(value, low, high, "nats", guarantee)


def gaussian_frontier(
    correlations: Float[np.ndarray, " component"], betas: Float[np.ndarray, " beta"]
) -> tuple[Float[np.ndarray, " beta"], Float[np.ndarray, " beta"]]:
    """Rate and relevance of the optimal Gaussian bottleneck (Chechik et al. 2005), in nats.

    Over the components with ``beta > 1 / rho^2``,
    ``I(T;Z) = 1/2 sum log((beta - 1) rho^2 / (1 - rho^2))`` and
    ``I(T;Y) = I(T;Z) - 1/2 sum log(beta rho^2)``.

    Args:
        correlations: Canonical correlations below 1; none above 0 switches on otherwise.
        betas: At least 1.

    Returns:
        ``(rate, relevance)``, one entry per beta.
    """
    squared = _usable(correlations)
    beta = np.asarray(betas, dtype=float)[:, None]
    active = beta * squared > 1.0
    # Components that are off get arguments whose logarithm is 0.
    rate = np.log(np.where(active, (beta - 1.0) * squared / (1.0 - squared), 1.0)).sum(axis=1) / 2
    lost = np.log(np.where(active, beta * squared, 1.0)).sum(axis=1) / 2
    return rate, rate - lost


def relevance_at_rate(correlations: Float[np.ndarray, " component"], rate: float) -> float:
    """The relevance of the optimal Gaussian bottleneck of a given rate, in nats."""
    squared = np.sort(_usable(correlations))[::-1]
    if rate == 0 or not len(squared):
        return 0.0
    odds = np.log(squared / (1.0 - squared))
    for n_active in range(1, len(squared) + 1):
        # From the rate's formula with this many components on.
        beta = 1.0 + np.exp((2.0 * rate - odds[:n_active].sum()) / n_active)
        if n_active == len(squared) or beta * squared[n_active] <= 1.0:
            break
    return float(rate - np.log(beta * squared[:n_active]).sum() / 2)


def _usable(correlations: Float[np.ndarray, " component"]) -> Float[np.ndarray, " positive"]:
    correlations = np.asarray(correlations, dtype=float)
    squared: np.ndarray = correlations[correlations > 0] ** 2
    return squared


def _critical(correlations: Float[np.ndarray, " point"]) -> Float[np.ndarray, " point"]:
    positive = np.maximum(correlations, 0.0)
    with np.errstate(divide="ignore"):
        critical: np.ndarray = 1.0 / positive**2
    return critical


def _pooled(
    by_fold: Float[np.ndarray, "fold component"], weights: Float[np.ndarray, " fold"]
) -> Float[np.ndarray, " component"]:
    pooled: np.ndarray = weights @ by_fold / weights.sum()
    return pooled
