"""Every kind of result, and :func:`load_result` for a file of any kind."""

from __future__ import annotations

import os
from pathlib import Path

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result
from mspgt_lens.estimates import Curve, Estimate
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.hvib.results import Grid, HvibFit
from mspgt_lens.information.frontier import Frontier
from mspgt_lens.lens.reading import LensReading
from mspgt_lens.lens.ridge_lens import RidgeLens
from mspgt_lens.partition import ScalePartition, Support
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.perturbation.massive import MassiveAblation
from mspgt_lens.perturbation.perturbing import PerturbationEffects
from mspgt_lens.perturbation.residuals import ResidualStatistics
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.rates.results import ChannelRun, RateDistortion
from mspgt_lens.scales.synthetic import Power, SyntheticSignals
from mspgt_lens.storage import saved_kind
from mspgt_lens.studies.analysis import Analysis
from mspgt_lens.studies.comparison import Comparison
from mspgt_lens.studies.emergence import Emergence
from mspgt_lens.studies.stability import Stability
from mspgt_lens.theory.dominance import VarianceShares
from mspgt_lens.theory.place_comparison import PlaceComparison, PlacedTheory
from mspgt_lens.theory.verdicts import ModelResults, Verdict, Verdicts
from mspgt_lens.theory.waterfilling import WaterFilling

__all__ = [
    "Analysis",
    "BlockEffects",
    "Brittleness",
    "ChannelRun",
    "Comparison",
    "Curve",
    "Dissociation",
    "Emergence",
    "Estimate",
    "Frontier",
    "GenerationEffects",
    "Grid",
    "HvibFit",
    "LayerProfile",
    "LensReading",
    "MassiveAblation",
    "ModelResults",
    "PatchSweep",
    "PerturbationEffects",
    "PlaceComparison",
    "PlacedTheory",
    "Power",
    "RateDistortion",
    "ResidualStatistics",
    "Result",
    "RidgeLens",
    "ScalePartition",
    "ScalePatch",
    "Stability",
    "Support",
    "SyntheticSignals",
    "TokenClasses",
    "VarianceShares",
    "Verdict",
    "Verdicts",
    "WaterFilling",
    "load_result",
]


@in_own_state
def load_result(path: str | os.PathLike[str]) -> Result:
    """Read a saved result of any kind.

    Args:
        path: What a result's ``save`` wrote: a file, or the folder of an analysis.

    Returns:
        The result, of the class that was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no result of this package.
    """
    if Path(path).is_dir():
        return Analysis.load(path)
    kind = saved_kind(path)
    known = {name: globals()[name] for name in __all__ if name != "load_result"}
    if kind not in known or not issubclass(known[kind], Result):
        raise ValueError(f"path: {path} must hold one of {', '.join(known)}, got {kind!r}")
    result: Result = known[kind].load(path)
    return result
