"""The theory tested: predictions, verdicts, and what explains where boundaries are."""

from mspgt_lens.theory.dominance import depth_variation, variance_shares
from mspgt_lens.theory.evaluation import evaluate_predictions
from mspgt_lens.theory.places import compare_places
from mspgt_lens.theory.verdicts import ModelResults
from mspgt_lens.theory.waterfilling import (
    fit_water_filling,
    held_out_errors,
    water_fill,
    water_fill_whole,
)

__all__ = [
    "ModelResults",
    "compare_places",
    "depth_variation",
    "evaluate_predictions",
    "fit_water_filling",
    "held_out_errors",
    "variance_shares",
    "water_fill",
    "water_fill_whole",
]
