"""Intervals from groups: folds of groups, jackknifed, or clusters of sampled positions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer
from scipy import stats

LEVEL = 0.95


def fold_interval(
    scores: Float[np.ndarray, "fold point"],
    weights: Float[np.ndarray, " fold"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted mean of per-fold scores, with a 95% t interval.

    The folds hold different groups, so their scores differ by sampling of groups; the interval has
    ``n_folds - 1`` degrees of freedom.

    Args:
        scores: One score per fold and point.
        weights: Tokens per fold.

    Returns:
        ``(mean, low, high)``, each of shape ``[point]``.
    """
    share = weights / weights.sum()
    mean = share @ scores
    n_folds = len(scores)
    # Variance of a weighted mean of independent scores with a common scale.
    error = np.sqrt(n_folds / (n_folds - 1) * (share**2 @ (scores - mean) ** 2))
    reach = stats.t.ppf(0.5 + LEVEL / 2, n_folds - 1) * error
    return mean, mean - reach, mean + reach


def jackknife_interval(
    value: Float[np.ndarray, " point"],
    without_fold: Float[np.ndarray, "fold point"],
) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a function of moments, from leaving out one fold of groups at a time.

    The interval spans the value itself and its bias-corrected version (Quenouille 1956), each
    widened by the jackknife standard error (Tukey 1958) times the t quantile: a plug-in value that
    is biased at the sample's size is covered together with what it would be without the bias.

    Args:
        value: The quantity from all folds.
        without_fold: The quantity with each fold left out.

    Returns:
        ``(low, high)``, each of shape ``[point]``.
    """
    n_folds = len(without_fold)
    center = without_fold.mean(axis=0)
    corrected = pseudo_values(value, without_fold).mean(axis=0)
    error = np.sqrt((n_folds - 1) / n_folds * ((without_fold - center) ** 2).sum(axis=0))
    reach = stats.t.ppf(0.5 + LEVEL / 2, n_folds - 1) * error
    return np.minimum(value, corrected) - reach, np.maximum(value, corrected) + reach


def pseudo_values(
    value: Float[np.ndarray, " point"],
    without_fold: Float[np.ndarray, "fold point"],
) -> Float[np.ndarray, "fold point"]:
    """What each fold adds to a function of moments (Tukey 1958); their mean is bias-corrected."""
    n_folds = len(without_fold)
    pseudo: np.ndarray = n_folds * value - (n_folds - 1) * without_fold
    return pseudo


def cluster_interval(
    scores: Float[np.ndarray, "position point"],
    groups: Integer[np.ndarray, " position"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over sampled positions, with a 95% t interval that resamples groups.

    Positions of one group count as one draw (cluster-robust standard error).

    Args:
        scores: One score per sampled position and point.
        groups: The group of each position.

    Returns:
        ``(mean, low, high)``, each of shape ``[point]``.
    """
    mean = scores.mean(axis=0)
    labels, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(labels), scores.shape[1]))
    np.add.at(sums, index, scores - mean)
    n_groups = len(labels)
    error = np.sqrt(n_groups / (n_groups - 1) * (sums**2).sum(axis=0)) / len(scores)
    reach = stats.t.ppf(0.5 + LEVEL / 2, n_groups - 1) * error
    return mean, mean - reach, mean + reach
