"""Which function draws which kind of result: what ``Result.plot`` asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from mspgt_lens.contract import Result
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.hvib.results import HvibFit
from mspgt_lens.lens.reading import LensReading
from mspgt_lens.lens.ridge_lens import RidgeLens
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.perturbation.massive import MassiveAblation
from mspgt_lens.perturbation.perturbing import PerturbationEffects
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.plots.block_effects import plot_block_effects
from mspgt_lens.plots.boundaries import plot_boundaries, plot_stability
from mspgt_lens.plots.comparison import plot_comparison
from mspgt_lens.plots.emergence import plot_emergence
from mspgt_lens.plots.forest import plot_effects
from mspgt_lens.plots.hvib import plot_hvib
from mspgt_lens.plots.lens import plot_lens_reading, plot_lens_scores
from mspgt_lens.plots.massive import plot_massive_ablation
from mspgt_lens.plots.patching import plot_patching, plot_scale_patch
from mspgt_lens.plots.perturbation import plot_brittleness, plot_dissociation
from mspgt_lens.plots.places import plot_places
from mspgt_lens.plots.profile import plot_profile
from mspgt_lens.plots.rate_distortion import plot_rate_distortion
from mspgt_lens.plots.tables import plot_class_counts, plot_table
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.rates.results import RateDistortion
from mspgt_lens.studies.analysis import Analysis
from mspgt_lens.studies.comparison import Comparison
from mspgt_lens.studies.emergence import Emergence
from mspgt_lens.studies.stability import Stability
from mspgt_lens.theory.place_comparison import PlaceComparison
from mspgt_lens.theory.verdicts import ModelResults


def draw(result: Result, **options: Any) -> go.Figure:
    """The figure of a result; kinds without one of their own are drawn from their tables.

    Args:
        result: Any result of this package.
        **options: Those of the kind's function.

    Returns:
        The figure; nothing is shown.
    """
    kind: Callable[..., go.Figure] = _FIGURES.get(type(result), plot_table)
    return kind(result, **options)


def _profile_with_segments(measured: Analysis | ModelResults, **options: Any) -> go.Figure:
    return plot_profile(measured.profile, measured.partition, **options)


_FIGURES: dict[type[Result], Callable[..., go.Figure]] = {
    LayerProfile: plot_profile,
    RidgeLens: plot_lens_scores,
    LensReading: plot_lens_reading,
    ScalePartition: plot_boundaries,
    Stability: plot_stability,
    HvibFit: plot_hvib,
    RateDistortion: plot_rate_distortion,
    Brittleness: plot_brittleness,
    TokenClasses: plot_class_counts,
    Dissociation: plot_dissociation,
    PerturbationEffects: plot_effects,
    BlockEffects: plot_block_effects,
    MassiveAblation: plot_massive_ablation,
    GenerationEffects: plot_effects,
    PatchSweep: plot_patching,
    ScalePatch: plot_scale_patch,
    Emergence: plot_emergence,
    Comparison: plot_comparison,
    PlaceComparison: plot_places,
    ModelResults: _profile_with_segments,
    Analysis: _profile_with_segments,
}
