"""Intervals and p-values of patching effects, over groups of pairs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from mspgt_lens.statistics import SIGNIFICANCE, cluster_interval, holm, sign_flip_p_values

_MIN_DRAWS = 10_000
# Sign patterns per cell tested, so that drawing them never keeps a corrected p-value above
# SIGNIFICANCE.
_DRAWS_PER_CELL = 40


@dataclass(frozen=True)
class Effects:
    """Effects on the scale from the corrupted run (0) to the clean one (1), with intervals.

    Attributes:
        clean: Mean of the metric on the clean runs.
        corrupted: Mean of the metric on the corrupted runs.
        effect: Shape ``[cell]``.
        low: Lower ends of 95% intervals, or None where there are none.
        high: Upper ends.
        groups: The group of each pair, as numbers.
        warnings: Why there are no intervals, or no reliable scale.
    """

    clean: float
    corrupted: float
    effect: Float[np.ndarray, "*cell"]
    low: Float[np.ndarray, "*cell"] | None
    high: Float[np.ndarray, "*cell"] | None
    groups: Integer[np.ndarray, " pair"]
    warnings: tuple[str, ...]

    @property
    def n_groups(self) -> int:
        """Number of groups of pairs."""
        return len(np.unique(self.groups))

    def scaled(self, metric: Any) -> Any:
        """Metric values on the scale of effects."""
        gap = self.clean - self.corrupted
        # Without a gap nothing was patched: clean and corrupted prompts are the same.
        return (metric - self.corrupted) / gap if gap else 0.0 * metric


def summarize_effects(
    values: Float[np.ndarray, "*cell"],
    clean: Float[np.ndarray, "*pair"],
    corrupted: Float[np.ndarray, "*pair"],
    groups: Sequence[Hashable],
) -> Effects:
    """Effects of metric values ``[pair, *cell]``, or ``[*cell]`` where there is one for all pairs.

    Args:
        values: The metric after each patch.
        clean: On the clean runs; a single number has no axis.
        corrupted: On the corrupted runs.
        groups: The group of each pair.
    """
    index = np.unique([repr(g) for g in groups], return_inverse=True)[1]
    single = clean.ndim == 0
    metric = values if single else values.mean(axis=0)
    plain = Effects(float(clean.mean()), float(corrupted.mean()), metric, None, None, index, ())
    plain = replace(plain, effect=plain.scaled(metric))
    if single:
        note = "the metric gives one number for all pairs, so there are no intervals and no "
        return replace(plain, warnings=(f"{note}p-values over pairs: return one value per pair",))
    if plain.n_groups < 2:
        note = "all pairs are one group, so there are no intervals and no p-values over pairs"
        return replace(plain, warnings=(note,))
    low, high = effect_interval(values, clean, corrupted, index)
    notes = _gap_notes(clean, corrupted, index)
    return replace(plain, low=low, high=high, warnings=tuple(notes))


def tested_effects(
    values: Float[np.ndarray, "*cell"],
    clean: Float[np.ndarray, "*pair"],
    corrupted: Float[np.ndarray, "*pair"],
    groups: Sequence[Hashable],
    *,
    direction: str,
    able: Bool[np.ndarray, "*able"],
    seed: int,
) -> tuple[Effects, Float[np.ndarray, "*able"] | None]:
    """Effects of a sweep, and the p-values of their cells where there are intervals.

    Args:
        values: The metric after each patch, as for :func:`summarize_effects`.
        clean: On the clean runs.
        corrupted: On the corrupted runs.
        groups: The group of each pair.
        direction: ``"denoise"`` where the corrupted run was patched, ``"noise"`` the clean one.
        able: Cells where the patch could change anything.
        seed: Of the sign patterns, where there are too many to count.
    """
    effects = summarize_effects(values, clean, corrupted, groups)
    if effects.low is None:
        return effects, None
    unpatched = corrupted if direction == "denoise" else clean
    p_values, notes = patch_p_values(values, unpatched, able, effects.groups, seed)
    return replace(effects, warnings=(*effects.warnings, *notes)), p_values


def kept_labels(groups: Sequence[Hashable]) -> tuple[str | float, ...]:
    """Labels of groups as results keep them: numbers and texts as they are, others in words."""
    plain = (label.item() if isinstance(label, np.generic) else label for label in groups)
    return tuple(g if isinstance(g, str | int | float) else repr(g) for g in plain)


def effect_interval(
    by_pair: Float[np.ndarray, "pair *cell"],
    clean: Float[np.ndarray, " pair"],
    corrupted: Float[np.ndarray, " pair"],
    groups: Integer[np.ndarray, " pair"],
) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of ``(mean metric - mean corrupted) / (mean clean - mean corrupted)``.

    Linearized, so that the spread of the denominator counts; by groups of pairs. Where clean and
    corrupted have the same mean, nothing was patched, and the interval is 0 to 0.

    Returns:
        ``(low, high)``, each of shape ``[cell]``.
    """
    change = (by_pair.T - corrupted).T.reshape(len(by_pair), -1)
    gap = clean - corrupted
    if gap.mean() == 0:
        zero = np.zeros(by_pair.shape[1:])
        return zero, zero
    effect = change.mean(axis=0) / gap.mean()
    influence = (change - gap[:, None] * effect) / gap.mean()
    _, low, high = cluster_interval(influence, groups)
    shape = by_pair.shape[1:]
    return (effect + low).reshape(shape), (effect + high).reshape(shape)


def patch_p_values(
    by_pair: Float[np.ndarray, "pair *cell"],
    unpatched: Float[np.ndarray, " pair"],
    able: Bool[np.ndarray, "*cell"],
    groups: Integer[np.ndarray, " pair"],
    seed: int,
) -> tuple[Float[np.ndarray, "*cell"], list[str]]:
    """Sign-flip p-values of the change that each patch makes, Holm-corrected; and notes on them.

    Args:
        by_pair: The metric after each patch.
        unpatched: The metric without.
        able: Cells where the patch can change anything; the others are no tests and get 1.
        groups: The group of each pair.
        seed: Of the sign patterns, where there are too many to count.
    """
    p_values = np.ones(by_pair.shape[1:])
    n_cells = int(able.sum())
    if not n_cells:
        return p_values, ["clean and corrupted prompts are the same, so no patch changes anything"]
    change = (by_pair.T - unpatched).T[:, able]
    draws = max(_MIN_DRAWS, _DRAWS_PER_CELL * n_cells)
    p_values[able] = holm(sign_flip_p_values(change, groups, n_draws=draws, seed=seed))
    n_groups = len(np.unique(groups))
    least = min(1.0, 2.0 ** (1 - n_groups) * n_cells)
    if least <= SIGNIFICANCE:
        return p_values, []
    needed = int(np.ceil(1 + np.log2(n_cells / SIGNIFICANCE)))
    return p_values, [
        f"{n_groups} groups of pairs are too few: no p-value can fall below {least:.2g} after "
        f"Holm's correction over {n_cells} cells, whatever the effect; {needed} would do"
    ]


def _gap_notes(
    clean: Float[np.ndarray, " pair"],
    corrupted: Float[np.ndarray, " pair"],
    groups: Integer[np.ndarray, " pair"],
) -> list[str]:
    """A note if the unpatched runs are not clearly apart, so that effects have a loose scale."""
    gap, low, high = cluster_interval((clean - corrupted)[:, None], groups)
    if low[0] > 0 or high[0] < 0:
        return []
    return [
        f"clean and corrupted runs cannot be told apart by the metric (they differ by "
        f"{gap[0]:.3g}, 95% interval {low[0]:.3g} to {high[0]:.3g}), "
        "so effects have no reliable scale"
    ]
