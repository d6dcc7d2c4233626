"""How much boundary depth varies within a family, and whether family or size explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, interval, tidy
from mspgt_lens.estimates import Estimate
from mspgt_lens.statistics import LEVEL, pseudo_values

# The fewest models that leave a family two when one of them is left out.
MIN_FAMILY = 3
N_PERMUTATIONS = 999


@in_own_state
def depth_variation(
    depths: Float[np.ndarray, "model boundary"],
    errors: Float[np.ndarray, "model boundary"] | None = None,
) -> Estimate:
    """Coefficient of variation of relative boundary depth over the models of one family.

    The root mean square over the boundaries of deviation over mean. The interval takes depths as
    normal and both boundaries as moving together (McKay's chi-square with one degree of freedom
    less than models), which is conservative where they do not. Its lower end leaves out what the
    boundaries' own uncertainty explains: boundaries that are not known cannot be said to vary.

    Args:
        depths: Boundaries over the number of blocks.
        errors: Standard error of each, in the same units; None for exact ones.

    Returns:
        The coefficient (a ratio, at least 0), with its 95% interval.

    Raises:
        ValueError: If there are fewer than two models, or a boundary at depth 0.
    """
    n_models = len(depths)
    if n_models < 2 or not (depths > 0).all():
        raise ValueError(
            f"depths must be those of at least two models, all above 0, got {n_models} models"
        )
    mean = depths.mean(axis=0)
    square = float(((depths.std(axis=0, ddof=1) / mean) ** 2).mean())
    own = 0.0 if errors is None else float((errors**2 / mean**2).mean())
    tail = (1 - LEVEL) / 2
    below, above = (
        square * (n_models - 1) / stats.chi2.ppf(q, n_models - 1) for q in (1 - tail, tail)
    )
    return Estimate(
        float(np.sqrt(square)),
        float(np.sqrt(max(below - own, 0.0))),
        float(np.sqrt(above)),
        "CV",
        "Coefficient of variation of relative boundary depth; the lower end without the "
        "boundaries' own uncertainty.",
    )


@dataclass(frozen=True, eq=False, repr=False)
class VarianceShares(Result):
    """What family and size explain of boundary depth, each beyond the other.

    Attributes:
        family: Share of variance that family explains beyond size, less what chance explains
            (negative where it explains less than chance).
        size: The same of size (logarithm of the number of parameters) beyond family.
        p_family: Permutation p-value of family given size.
        p_size: Permutation p-value of size given family.
        difference: ``family - size`` with its jackknife interval over models.
    """

    family: float
    size: float
    p_family: float
    p_size: float
    difference: Estimate

    def heading(self) -> str:
        """What is shared."""
        return "VarianceShares: variance of boundary depth by family and by size"

    def findings(self) -> list[str]:
        """Both shares, and their difference."""
        e = self.difference
        return [
            f"Family explains {100 * self.family:.0f}% of the variance beyond size (permutation p "
            f"{self.p_family:.3f}), size {100 * self.size:.0f}% beyond family "
            f"(p {self.p_size:.3f}).",
            f"Difference: {interval(e.value, e.low, e.high)}.",
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """Family, size and their difference: ``quantity, value, low, high, unit, p_value``."""
        e = self.difference
        return tidy(
            {
                "quantity": ["family", "size", "difference"],
                "value": [self.family, self.size, e.value],
                "low": [np.nan, np.nan, e.low],
                "high": [np.nan, np.nan, e.high],
                "unit": e.unit,
                "p_value": [self.p_family, self.p_size, np.nan],
            }
        )


@in_own_state
def variance_shares(
    depths: Float[np.ndarray, "model boundary"],
    families: Sequence[str],
    n_parameters: Sequence[int],
    *,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
) -> VarianceShares:
    """Shares of the variance of relative boundary depth by family and by size.

    Sums of squares of all boundaries together, each factor beyond the other and adjusted for its
    degrees of freedom (as omega squared). p-values permute what the other factor leaves (Freedman &
    Lane 1983).

    Args:
        depths: Boundaries over the number of blocks.
        families: Family of each model; each needs at least 3 models.
        n_parameters: Parameters of each model.
        n_permutations: Draws of each permutation test.
        seed: Decides the permutations.

    Returns:
        Both shares of the variance, with their p-values and the interval of their difference.

    Raises:
        ValueError: If there are fewer than two families, a family has fewer than 3 models, all
            models are as large, or no boundary differs.
    """
    labels, index = np.unique(np.asarray(families), return_inverse=True)
    sizes = np.log10(np.asarray(n_parameters, dtype=float))
    counts = np.bincount(index)
    if len(labels) < 2 or counts.min() < MIN_FAMILY or not np.ptp(sizes):
        raise ValueError(
            f"families must be at least two with at least {MIN_FAMILY} models each, of different "
            f"n_parameters; got {dict(zip(labels.tolist(), counts.tolist(), strict=True))}"
        )
    if not np.ptp(depths, axis=0).any():
        raise ValueError("depths are the same in all models: there is no variance to share")
    by_family = np.eye(len(labels))[index]
    by_size = np.column_stack([np.ones_like(sizes), sizes])
    family, size = _unique_shares(depths, by_family, by_size)
    # Leaving out one model keeps two of every family, so every fit stays defined.
    without = np.array(
        [
            _unique_shares(*(np.delete(x, i, axis=0) for x in (depths, by_family, by_size)))
            for i in range(len(depths))
        ]
    )
    difference = np.array([family - size])
    pseudo = pseudo_values(difference, without[:, :1] - without[:, 1:])[:, 0]
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(pseudo) - 1) * pseudo.std(ddof=1) / len(pseudo) ** 0.5
    rng = np.random.default_rng(seed)
    return VarianceShares(
        family,
        size,
        _permutation_p(depths, by_size, by_family, n_permutations, rng),
        _permutation_p(depths, by_family, by_size, n_permutations, rng),
        Estimate(
            family - size,
            family - size - float(reach),
            family - size + float(reach),
            "share of variance",
            "Share of the variance of boundary depth by family beyond size, minus that by size "
            "beyond family, both adjusted for chance.",
        ),
    )


def _unique_shares(
    depths: Float[np.ndarray, "model boundary"],
    by_family: Float[np.ndarray, "model family"],
    by_size: Float[np.ndarray, "model 2"],
) -> tuple[float, float]:
    """Adjusted shares of family beyond size and of size beyond family."""
    both = np.column_stack([by_family, by_size[:, 1]])
    left, without_family, without_size = (
        float((_residual(x, depths) ** 2).sum()) for x in (both, by_size, by_family)
    )
    total = float(((depths - depths.mean(axis=0)) ** 2).sum())
    noise = left / (len(depths) - both.shape[1])
    family = without_family - left - (by_family.shape[1] - 1) * noise
    size = without_size - left - noise
    return family / total, size / total


def _permutation_p(
    depths: Float[np.ndarray, "model boundary"],
    reduced: Float[np.ndarray, "model a"],
    added: Float[np.ndarray, "model b"],
    n_permutations: int,
    rng: np.random.Generator,
) -> float:
    """p-value of what ``added`` explains beyond ``reduced``, permuting what the latter leaves."""
    left = _residual(reduced, depths)
    fitted = depths - left
    orders = np.array([rng.permutation(len(depths)) for _ in range(n_permutations)])
    drawn = np.concatenate([depths[None], fitted + left[orders]])
    both = np.column_stack([reduced, added])
    alone, together = ((_residual(x, drawn) ** 2).sum(axis=(1, 2)) for x in (reduced, both))
    # A ratio of sums of squares, as F, which does not depend on what the reduced model explains.
    gain = (alone - together) / np.maximum(together, 1e-12 * alone)
    return float((gain >= gain[0] * (1 - 1e-9)).mean())


def _residual(
    design: Float[np.ndarray, "model column"], values: Float[np.ndarray, "*draw model boundary"]
) -> Float[np.ndarray, "*draw model boundary"]:
    left: np.ndarray = values - design @ (np.linalg.pinv(design) @ values)
    return left
