"""Layers allocated to scales by reverse water-filling: optimum, fit and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Integer
from scipy import stats
from scipy.optimize import least_squares

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, interval, tidy
from mspgt_lens.partition import segment_names
from mspgt_lens.statistics import LEVEL

MIN_FITTED = 3
# Shares below this are as good as none; the fit starts from at least so much.
_LEAST_SHARE = 0.02


@in_own_state
def water_fill(
    n_layers: int,
    *,
    betas: Float[np.ndarray, " scale"],
    kappas: Float[np.ndarray, " scale"],
    distortions: Float[np.ndarray, " scale"],
) -> Float[np.ndarray, " scale"]:
    """The layers of each scale that leave the least weighted distortion.

    Minimizes ``sum_s beta_s D_s exp(-kappa_s n_s)`` over ``n_s >= 0`` with ``sum_s n_s = L``:
    ``n_s = (1/kappa_s) log(beta_s kappa_s D_s / mu)``, clipped at 0 (Cover & Thomas 2006, section
    10.3, with rates for layers). The water level mu is found exactly, since the sum is piecewise
    linear in its logarithm.

    Args:
        n_layers: L, the layers to allocate.
        betas: Weight of each scale's distortion, positive.
        kappas: Rate at which a layer takes each scale's distortion away, per layer, positive.
        distortions: Distortion of each scale without any layer, positive.

    Returns:
        Layers per scale, real numbers that add up to ``n_layers``; see :func:`water_fill_whole`.

    Raises:
        ValueError: If a parameter is not positive or their shapes differ.

    Example:
        >>> even = np.ones(3)
        >>> ml.theory.water_fill(12, betas=even, kappas=even, distortions=even)
        array([4., 4., 4.])
    """
    b, k, d = _checked_parameters(n_layers, betas, kappas, distortions)
    lengths: np.ndarray = _allocate(np.array([float(n_layers)]), 1 / k, np.log(b * k * d))[0]
    return lengths


@in_own_state
def water_fill_whole(
    n_layers: int,
    *,
    betas: Float[np.ndarray, " scale"],
    kappas: Float[np.ndarray, " scale"],
    distortions: Float[np.ndarray, " scale"],
) -> Integer[np.ndarray, " scale"]:
    """The best allocation in whole layers, by giving each layer where it takes most away.

    The distortions are convex and separate, so that this greedy rule is exact (Fox 1966). Rounding
    the cumulated :func:`water_fill`, as fitted predictions do, may differ from it by a layer.

    Args:
        n_layers, betas, kappas, distortions: As in :func:`water_fill`.

    Returns:
        Layers per scale, whole numbers that add up to ``n_layers``.

    Raises:
        ValueError: If a parameter is not positive or their shapes differ.

    Example:
        >>> even = np.ones(3)
        >>> betas = 2.0 ** np.arange(3)
        >>> ml.theory.water_fill_whole(13, betas=betas, kappas=even, distortions=even).sum()
        np.int64(13)
    """
    b, k, d = _checked_parameters(n_layers, betas, kappas, distortions)
    given = np.zeros(len(b), dtype=np.int64)
    for _ in range(n_layers):
        # In logarithms, which stay finite where exp(-kappa n) is 0.
        gain = np.log(b * d) + np.log(-np.expm1(-k)) - k * given
        given[gain.argmax()] += 1
    return given


@dataclass(frozen=True, eq=False, repr=False)
class WaterFilling(Result):
    """Water-filling as far as the segment lengths of models can tell it.

    Lengths depend on the parameters only through each scale's share of the inverse rates and its
    offset. Multiplying all rates kappa, or all weights and distortions, by one number changes
    nothing: neither kappa, beta nor D can be told from lengths, only

    * ``shares``: ``(1/kappa_s) / sum_r (1/kappa_r)``, the part of every further layer that goes to
      scale s where all scales have layers;
    * ``offsets``: how many layers scale s has beyond its share of the depth,
      ``(1/kappa_s) (a_s - mean a)`` with ``a = log(beta kappa D)`` and the mean weighted by the
      shares; they add up to 0.

    Attributes:
        scales: Names of the scales.
        shares: Shape ``[scale]``, adding up to 1.
        offsets: In blocks, shape ``[scale]``, adding up to 0.
        middle_depth: Mean depth of the models fitted, in blocks; lengths are known best there.
        middle_lengths: Lengths at that depth, in blocks, shape ``[scale]``.
        shares_interval, offsets_interval, middle_interval: 95% intervals, shape ``[2, scale]``,
            from the fit's residuals; they hold where all scales have layers.
        residual: Root mean square distance of fitted and measured boundaries, in blocks.
        n_models: Models that it was fitted on.
    """

    scales: tuple[str, ...]
    shares: Float[np.ndarray, " scale"]
    offsets: Float[np.ndarray, " scale"]
    middle_depth: float
    middle_lengths: Float[np.ndarray, " scale"]
    shares_interval: Float[np.ndarray, "2 scale"]
    offsets_interval: Float[np.ndarray, "2 scale"]
    middle_interval: Float[np.ndarray, "2 scale"]
    residual: float
    n_models: int

    def lengths(self, n_layers: float) -> Float[np.ndarray, " scale"]:
        """Length of each segment in a model of this depth, in blocks, not rounded.

        Args:
            n_layers: Depth, in blocks.

        Returns:
            Blocks per scale, ``[scale]``, which add up to the depth.
        """
        lengths: np.ndarray = _lengths(np.array([float(n_layers)]), self.shares, self.offsets)[0]
        return lengths

    def boundaries(self, n_layers: int) -> tuple[int, ...]:
        """Boundaries in a model of this depth: the cumulated lengths, rounded to whole blocks.

        Args:
            n_layers: Depth, in blocks.

        Returns:
            The first block of every segment but the first.
        """
        return tuple(int(b) for b in np.rint(np.cumsum(self.lengths(n_layers))[:-1]))

    def heading(self) -> str:
        """How many models, and how well it fits."""
        return (
            f"WaterFilling fitted on {counted(self.n_models, 'model')}: boundaries "
            f"{self.residual:.2g} blocks off (root mean square)"
        )

    def rows(self) -> Rows:
        """The identified parameters of every scale."""
        parts = self._parts()
        rows: Rows = [("scale", *(f"{name} ({unit})" for name, (unit, *_) in parts.items()))]
        for i, scale in enumerate(self.scales):
            cells = (
                interval(values[i], ends[0, i], ends[1, i]) for _, values, ends in parts.values()
            )
            rows.append((scale, *cells))
        return rows

    def findings(self) -> list[str]:
        """What else to know of the parameters."""
        return [f"Lengths are those at the mean depth of the models, {self.middle_depth:g} blocks."]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per scale and parameter: ``quantity, scale, value, low, high, unit``."""
        parts = [
            tidy(
                {
                    "quantity": name,
                    "scale": list(self.scales),
                    "value": values,
                    "low": ends[0],
                    "high": ends[1],
                    "unit": unit,
                }
            )
            for name, (unit, values, ends) in self._parts().items()
        ]
        return pd.concat(parts, ignore_index=True)

    def _parts(self) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
        """Name of every parameter to its unit, values and interval."""
        return {
            "share": ("of further layers", self.shares, self.shares_interval),
            "offset": ("blocks", self.offsets, self.offsets_interval),
            "length": ("blocks", self.middle_lengths, self.middle_interval),
        }


@in_own_state
def fit_water_filling(
    boundaries: Integer[np.ndarray, "model boundary"],
    n_layers: Integer[np.ndarray, " model"],
) -> WaterFilling:
    """Water-filling that comes closest to the boundaries of several models.

    Least squares on the boundaries (blocks). Where every scale has layers in every model, lengths
    are linear in depth, and so is the fit.

    Args:
        boundaries: Boundaries of each model.
        n_layers: Depth of each model.

    Returns:
        Each scale's share of further layers and its offset in blocks, with 95% intervals.

    Raises:
        ValueError: If there are fewer than 3 models or all have the same depth: then shares and
            offsets cannot be told apart.

    Example:
        >>> placed = np.array([[4, 8], [8, 16], [10, 20]])
        >>> ml.theory.fit_water_filling(placed, np.array([12, 24, 30])).boundaries(18)
        (6, 12)
    """
    placed, depths = _checked_models(boundaries, n_layers)
    if len(depths) < MIN_FITTED or len(set(depths.tolist())) < 2:
        raise ValueError(
            f"boundaries must come from at least {MIN_FITTED} models of at least two depths, got "
            f"{len(depths)} of depths {sorted(set(depths.tolist()))}: models of one depth cannot "
            "tell a scale's share of further layers from its offset"
        )
    shares, offsets = _fit(placed, depths)
    fitted = np.cumsum(_lengths(depths, shares, offsets), axis=1)[:, :-1]
    left = fitted - placed
    middle = float(depths.mean())
    freedom = left.size - 2 * placed.shape[1]
    design = np.stack([np.ones_like(depths), depths - middle])
    shared = np.linalg.inv(design @ design.T)
    # Boundaries err together or apart; lengths are their differences.
    covariance = left.T @ left / max(freedom / placed.shape[1], 1)
    ends = np.pad(covariance, 1)
    of_length = np.diff(np.diff(ends, axis=0), axis=1).diagonal().clip(min=0.0)
    reach = stats.t.ppf(0.5 + LEVEL / 2, max(freedom / placed.shape[1], 1)) * np.sqrt(of_length)
    lengths = _lengths(np.array([middle]), shares, offsets)[0]
    errors = {
        "shares": (shares, reach * np.sqrt(shared[1, 1])),
        "offsets": (offsets, reach * np.sqrt(shared[0, 0] + middle**2 * shared[1, 1])),
        "middle": (lengths, reach * np.sqrt(shared[0, 0])),
    }
    interval = {name: np.stack([v - e, v + e]) for name, (v, e) in errors.items()}
    return WaterFilling(
        scales=segment_names(len(shares)),
        shares=shares,
        offsets=offsets,
        middle_depth=middle,
        middle_lengths=lengths,
        shares_interval=interval["shares"],
        offsets_interval=interval["offsets"],
        middle_interval=interval["middle"],
        residual=float(np.sqrt((left**2).mean())),
        n_models=len(depths),
    )


@in_own_state
def held_out_errors(
    boundaries: Integer[np.ndarray, "model 2"],
    n_layers: Integer[np.ndarray, " model"],
    families: Sequence[str | None] | None = None,
) -> pd.DataFrame:
    """How far the boundaries of left-out models are from what the other models predict.

    Each model in turn is left out, and, where families are given, each family. Beside the fitted
    water-filling: ``"thirds"`` and ``"quarters"`` of the depth, which look at no data, and
    ``"same depth"``, the mean relative depth of the other models (water-filling without offsets;
    what it leaves is what offsets could explain).

    Args:
        boundaries: Two boundaries of each model.
        n_layers: Depth of each model.
        families: Family of each model; None where it has none.

    Returns:
        One row per left-out model, way of leaving out and rule: ``model`` (its index), ``left_out``
        (``"model"`` or ``"family"``), ``rule``, ``first`` and ``second`` (the predicted
        boundaries) and ``error``, their mean distance from the measured ones as a share of the
        depth. Models whose training set is too small to fit are not in it.

    Raises:
        ValueError: If models do not have two boundaries each, which rise within their depth, or
            shapes do not agree.
    """
    placed, depths = _checked_models(boundaries, n_layers)
    if placed.shape[1] != 2:
        raise ValueError(f"boundaries must be two per model, got {placed.shape[1]}")
    everyone = np.arange(len(depths))
    rounds = [("model", everyone == i, everyone != i) for i in everyone]
    names = [None] * len(depths) if families is None else list(families)
    for family in sorted({f for f in names if f is not None}):
        inside = np.array([f == family for f in names])
        # Models without a family could belong to this one, so they teach nothing about it.
        outside = np.array([f is not None and f != family for f in names])
        rounds.append(("family", inside, outside))
    rows = []
    for left_out, tested, others in rounds:
        if others.sum() < MIN_FITTED or len(set(depths[others].tolist())) < 2:
            continue
        fit = fit_water_filling(placed[others], depths[others])
        same = (placed[others] / depths[others, None]).mean(axis=0)
        for i in np.flatnonzero(tested):
            depth = int(depths[i])
            rules: dict[str, Sequence[float]] = {
                "water-filling": fit.boundaries(depth),
                "thirds": (round(depth / 3), round(2 * depth / 3)),
                "quarters": (round(depth / 4), round(3 * depth / 4)),
                "same depth": np.rint(same * depth).astype(int).tolist(),
            }
            for rule, predicted in rules.items():
                error = float(np.abs(np.subtract(predicted, placed[i])).mean()) / depth
                rows.append((int(i), left_out, rule, *predicted, error))
    return pd.DataFrame(rows, columns=["model", "left_out", "rule", "first", "second", "error"])


def _allocate(
    depths: Float[np.ndarray, " model"],
    widths: Float[np.ndarray, " scale"],
    levels: Float[np.ndarray, " scale"],
) -> Float[np.ndarray, "model scale"]:
    """``widths (levels - water)`` clipped at 0, the water such that each row adds up to a depth."""
    order = np.argsort(-levels, kind="stable")
    w, a = widths[order], levels[order]
    # The water level if exactly the first 1, 2, ... scales have layers.
    water = (np.cumsum(w * a) - depths[:, None]) / np.cumsum(w)
    n_active = (water < a).sum(axis=1)
    chosen = np.take_along_axis(water, n_active[:, None] - 1, axis=1)
    lengths: np.ndarray = widths * (levels - chosen).clip(min=0.0)
    return lengths


def _lengths(
    depths: Float[np.ndarray, " model"],
    shares: Float[np.ndarray, " scale"],
    offsets: Float[np.ndarray, " scale"],
) -> Float[np.ndarray, "model scale"]:
    return _allocate(depths, shares, offsets / shares)


def _fit(
    placed: Float[np.ndarray, "model boundary"], depths: Float[np.ndarray, " model"]
) -> tuple[Float[np.ndarray, " scale"], Float[np.ndarray, " scale"]]:
    """Shares and offsets with the least squared distance of boundaries."""
    design = np.column_stack([np.ones_like(depths), depths])
    intercepts, slopes = np.linalg.lstsq(design, placed, rcond=None)[0]
    offsets = np.diff(np.concatenate([[0.0], intercepts, [0.0]]))
    shares = np.diff(np.concatenate([[0.0], slopes, [1.0]]))
    linear = offsets + np.outer(depths, shares)
    if (shares >= _LEAST_SHARE).all() and (linear >= 0).all():
        return shares, offsets

    def unpacked(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        free = np.concatenate([theta[: len(slopes)], [0.0]])
        # A scale without layers has a share near 0, which must not become 0.
        share: np.ndarray = np.exp((free - free.max()).clip(min=-20.0))
        begun = theta[len(slopes) :]
        return share / share.sum(), np.append(begun, -begun.sum())

    def distance(theta: np.ndarray) -> np.ndarray:
        fitted = np.cumsum(_lengths(depths, *unpacked(theta)), axis=1)[:, :-1]
        error: np.ndarray = (fitted - placed).ravel()
        return error

    start = shares.clip(min=_LEAST_SHARE)
    mean = np.diff(np.pad((placed / depths[:, None]).mean(axis=0), 1, constant_values=(0, 1)))
    solutions = [
        least_squares(distance, np.concatenate([np.log(s[:-1] / s[-1]), o[:-1]]))
        for s, o in ((start / start.sum(), offsets), (mean.clip(min=1e-3), np.zeros(len(mean))))
    ]
    best: np.ndarray = min(solutions, key=lambda s: float(s.cost)).x
    return unpacked(best)


def _checked_parameters(
    n_layers: int, betas: np.ndarray, kappas: np.ndarray, distortions: np.ndarray
) -> list[np.ndarray]:
    if n_layers < 1:
        raise ValueError(f"n_layers must be at least 1, got {n_layers}")
    named = {"betas": betas, "kappas": kappas, "distortions": distortions}
    arrays = {name: np.asarray(given, dtype=float) for name, given in named.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or not len(array) or not (np.isfinite(array) & (array > 0)).all():
            raise ValueError(f"{name} must be positive, one per scale, got {named[name]!r}")
    if len({len(array) for array in arrays.values()}) > 1:
        sizes = {name: len(array) for name, array in arrays.items()}
        raise ValueError(f"betas, kappas and distortions must be as many, got {sizes}")
    return list(arrays.values())


def _checked_models(
    boundaries: np.ndarray, n_layers: np.ndarray
) -> tuple[Float[np.ndarray, "model boundary"], Float[np.ndarray, " model"]]:
    placed, depths = np.asarray(boundaries, dtype=float), np.asarray(n_layers, dtype=float)
    if placed.ndim != 2 or depths.shape != placed.shape[:1] or not placed.shape[1]:
        raise ValueError(
            "boundaries must have shape [model, boundary] and n_layers [model], got "
            f"{placed.shape} and {depths.shape}"
        )
    ends = np.column_stack([np.zeros_like(depths), placed, depths])
    if not (np.diff(ends, axis=1) >= 0).all():
        raise ValueError("boundaries must rise from 0 to the depth of their model")
    return placed, depths
