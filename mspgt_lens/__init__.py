"""Multi-Scale Probabilistic Generation Theory for TransformerLens: how layers divide the work."""

from mspgt_lens.bottleneck import bottleneck_frontier
from mspgt_lens.boundary_plots import plot_boundaries, plot_stability
from mspgt_lens.brittleness import Brittleness, measure_brittleness
from mspgt_lens.comparison import Comparison, compare_models
from mspgt_lens.comparison_plots import plot_comparison
from mspgt_lens.dependence import TokenClasses, token_classes
from mspgt_lens.dissociation import ScaleByClass, scale_by_class
from mspgt_lens.dominance import VarianceShares, depth_variation, variance_shares
from mspgt_lens.effect_predictions import half_depth, log_brittleness
from mspgt_lens.effects import PerturbationEffects, perturb_scales
from mspgt_lens.effects_plots import plot_effects
from mspgt_lens.estimators import mutual_information
from mspgt_lens.frontier import Frontier
from mspgt_lens.generation import generation_effects
from mspgt_lens.hvib import HVIB_BETAS, fit_hvib, fit_hvib_arrays
from mspgt_lens.hvib_plots import plot_hvib
from mspgt_lens.hvib_result import Grid, HvibFit
from mspgt_lens.information import channel_rate
from mspgt_lens.layer_profile import LayerProfile
from mspgt_lens.loading import load_demo_model, load_model
from mspgt_lens.models import needed_hooks
from mspgt_lens.pairs import PromptPairs
from mspgt_lens.partition import ScalePartition, Support
from mspgt_lens.patch_results import PatchSweep, ScalePatch
from mspgt_lens.patching import patch_layers
from mspgt_lens.patching_plots import plot_patching, plot_scale_patch
from mspgt_lens.perturbation import Perturbation
from mspgt_lens.perturbation_plots import plot_brittleness, plot_token_classes
from mspgt_lens.plane_plots import plot_information_plane, plot_scale_map
from mspgt_lens.plots import plot_profile
from mspgt_lens.profile import profile_cache, profile_layers
from mspgt_lens.prompts import Passage, Prompt, PromptDataset, load_passages
from mspgt_lens.report import write_report
from mspgt_lens.residuals import ResidualStatistics, residual_statistics
from mspgt_lens.results import Curve, Estimate
from mspgt_lens.scale_patching import patch_scales
from mspgt_lens.scales import Stability, boundary_signals, detect_scales, stability
from mspgt_lens.segments import segment_blocks
from mspgt_lens.synthetic import Power, SyntheticSignals, power, synthetic_signals
from mspgt_lens.synthetic_models import synthetic_models
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS
from mspgt_lens.text_effects import GenerationEffects
from mspgt_lens.theory import evaluate_predictions
from mspgt_lens.training import Emergence, emergence
from mspgt_lens.training_plots import plot_emergence
from mspgt_lens.verdicts import ModelResults, Verdict, Verdicts
from mspgt_lens.waterfilling import (
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
    "Brittleness",
    "Comparison",
    "Curve",
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
    "ResidualStatistics",
    "ScaleByClass",
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
    "bottleneck_frontier",
    "boundary_signals",
    "channel_rate",
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
    "mutual_information",
    "needed_hooks",
    "patch_layers",
    "patch_scales",
    "perturb_scales",
    "plot_boundaries",
    "plot_brittleness",
    "plot_comparison",
    "plot_effects",
    "plot_emergence",
    "plot_hvib",
    "plot_information_plane",
    "plot_patching",
    "plot_profile",
    "plot_scale_map",
    "plot_scale_patch",
    "plot_stability",
    "plot_token_classes",
    "power",
    "profile_cache",
    "profile_layers",
    "residual_statistics",
    "scale_by_class",
    "segment_blocks",
    "stability",
    "synthetic_models",
    "synthetic_signals",
    "token_classes",
    "variance_shares",
    "water_fill",
    "water_fill_whole",
    "write_report",
]
