"""Multi-Scale Probabilistic Generation Theory for TransformerLens: how layers divide the work."""

from mspgt_lens.estimators.interface import mutual_information
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.generation.writing import generation_effects
from mspgt_lens.hvib.probe import HVIB_BETAS, fit_hvib, fit_hvib_arrays
from mspgt_lens.hvib.results import Grid, HvibFit
from mspgt_lens.information.bottleneck import bottleneck_frontier
from mspgt_lens.information.channel import channel_rate
from mspgt_lens.information.frontier import Frontier
from mspgt_lens.models import needed_hooks
from mspgt_lens.models.loading import load_demo_model, load_model
from mspgt_lens.partition import ScalePartition, Support
from mspgt_lens.patching import tasks
from mspgt_lens.patching.layers import patch_layers
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.patching.scales import patch_scales
from mspgt_lens.perturbation.brittleness import Brittleness, measure_brittleness
from mspgt_lens.perturbation.dependence import TokenClasses, classify_tokens
from mspgt_lens.perturbation.dissociation import Dissociation, measure_dissociation
from mspgt_lens.perturbation.kinds import Perturbation
from mspgt_lens.perturbation.perturbing import PerturbationEffects, perturb_scales
from mspgt_lens.perturbation.residuals import ResidualStatistics, residual_statistics
from mspgt_lens.plots.boundaries import plot_boundaries, plot_stability
from mspgt_lens.plots.comparison import plot_comparison
from mspgt_lens.plots.emergence import plot_emergence
from mspgt_lens.plots.forest import plot_effects
from mspgt_lens.plots.hvib import plot_hvib
from mspgt_lens.plots.patching import plot_patching, plot_scale_patch
from mspgt_lens.plots.perturbation import plot_brittleness, plot_dissociation
from mspgt_lens.plots.plane import plot_information_plane, plot_scale_map
from mspgt_lens.plots.profile import plot_profile
from mspgt_lens.profile.layers import profile_cache, profile_layers
from mspgt_lens.profile.recording import Recording, recording
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.prompts import Passage, Prompt, PromptDataset, load_passages
from mspgt_lens.report.writing import write_report
from mspgt_lens.results import CannotMeasure, Curve, Estimate
from mspgt_lens.scales.detection import Stability, boundary_signals, detect_scales, stability
from mspgt_lens.scales.segments import segment_blocks
from mspgt_lens.scales.synthetic import Power, SyntheticSignals, power, synthetic_signals
from mspgt_lens.studies.analysis import Analysis, analyze
from mspgt_lens.studies.comparison import Comparison, compare_models
from mspgt_lens.studies.emergence import Emergence, emergence
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS
from mspgt_lens.theory.dominance import VarianceShares, depth_variation, variance_shares
from mspgt_lens.theory.effect_predictions import half_depth, log_brittleness
from mspgt_lens.theory.evaluation import evaluate_predictions
from mspgt_lens.theory.synthetic_models import synthetic_models
from mspgt_lens.theory.verdicts import ModelResults, Verdict, Verdicts
from mspgt_lens.theory.waterfilling import (
    WaterFilling,
    fit_water_filling,
    held_out_errors,
    water_fill,
    water_fill_whole,
)

__version__ = "0.3.0"

__all__ = [
    "DEFAULT_BANDS",
    "HVIB_BETAS",
    "OFFSET_BANDS",
    "Analysis",
    "Brittleness",
    "CannotMeasure",
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
    "ModelResults",
    "Passage",
    "PatchSweep",
    "Perturbation",
    "PerturbationEffects",
    "Power",
    "Prompt",
    "PromptDataset",
    "PromptPairs",
    "Recording",
    "ResidualStatistics",
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
    "analyze",
    "bottleneck_frontier",
    "boundary_signals",
    "channel_rate",
    "classify_tokens",
    "compare_models",
    "depth_variation",
    "detect_scales",
    "emergence",
    "evaluate_predictions",
    "fit_hvib",
    "fit_hvib_arrays",
    "fit_water_filling",
    "generation_effects",
    "half_depth",
    "held_out_errors",
    "load_demo_model",
    "load_model",
    "load_passages",
    "log_brittleness",
    "measure_brittleness",
    "measure_dissociation",
    "mutual_information",
    "needed_hooks",
    "patch_layers",
    "patch_scales",
    "perturb_scales",
    "plot_boundaries",
    "plot_brittleness",
    "plot_comparison",
    "plot_dissociation",
    "plot_effects",
    "plot_emergence",
    "plot_hvib",
    "plot_information_plane",
    "plot_patching",
    "plot_profile",
    "plot_scale_map",
    "plot_scale_patch",
    "plot_stability",
    "power",
    "profile_cache",
    "profile_layers",
    "recording",
    "residual_statistics",
    "segment_blocks",
    "stability",
    "synthetic_models",
    "synthetic_signals",
    "tasks",
    "variance_shares",
    "water_fill",
    "water_fill_whole",
    "write_report",
]
