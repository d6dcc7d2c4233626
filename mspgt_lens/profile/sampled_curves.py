"""Signals of sites that sampled positions give: the lens's predictions, intrinsic dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from mspgt_lens.estimates import Curve
from mspgt_lens.information.dimension import without_each
from mspgt_lens.information.lens import mean_over_sample, score_lens
from mspgt_lens.models import ModelAdapter
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.statistics import jackknife_interval, pseudo_values


def sampled_curves(
    moments: Moments, adapter: ModelAdapter, coordinates: Coordinates
) -> Mapping[str, Callable[[str, str], Curve]]:
    """Each curve that a signal asks for, by what the signal is ``of``, given unit and guarantee."""
    asked = {signal.of for signal in moments.plan.signals}
    curves: dict[str, Callable[[str, str], Curve]] = {}
    if asked & {"lens_entropy", "lens_kl"}:
        scores = score_lens(moments, adapter, coordinates, every=False)
        curves["lens_entropy"] = partial(_mean_curve, moments, scores.entropy)
        curves["lens_kl"] = partial(_mean_curve, moments, scores.kl)
    if "dimension" in asked:
        curves["dimension"] = partial(_dimension_curve, moments)
    return curves


def _mean_curve(
    moments: Moments, scores: Float[np.ndarray, "position site"], unit: str, guarantee: str
) -> Curve:
    values, low, high, by_fold = mean_over_sample(moments, scores)
    return Curve(values, low, high, unit, guarantee, by_fold)


def _dimension_curve(moments: Moments, unit: str, guarantee: str) -> Curve:
    rows, folds = torch.stack(moments.sample.rows), torch.from_numpy(moments.sample.fold)
    found = [
        without_each(rows[:, site], folds, moments.plan.n_folds) for site in range(rows.shape[1])
    ]
    values = np.array([value for value, _ in found])
    left = np.array([others for _, others in found]).T
    low, high = jackknife_interval(values, left)
    return Curve(values, low, high, unit, guarantee, pseudo_values(values, left))
