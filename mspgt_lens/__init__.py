"""Multi-Scale Probabilistic Generation Theory for TransformerLens: how layers divide the work.

Prompts and models
    PromptDataset, PromptPairs, load_passages, load_model, load_demo_model, tasks

Measure
    profile_layers, profile_cache, recording, needed_hooks; detect_scales, boundary_signals;
    fit_hvib

Measure on arrays
    segment_blocks, mutual_information, bottleneck_frontier, channel_rate, fit_hvib_arrays

Intervene
    patch_layers, patch_scales; Perturbation, perturb_scales, measure_brittleness,
    residual_statistics; classify_tokens, measure_dissociation; generation_effects

Test the theory
    analyze, evaluate_predictions, compare_models; the rest in studies, theory and synthetic

See and keep
    plot_profile, plot_boundaries and all others in plots; write_report; load_result, results

Add your own
    perturbations and predictions: extending
"""

from mspgt_lens import extending, plots, results, studies, synthetic, theory
from mspgt_lens.estimates import CannotMeasure, Curve, Estimate
from mspgt_lens.estimators.interface import mutual_information
from mspgt_lens.generation.writing import generation_effects
from mspgt_lens.hvib.probe import fit_hvib, fit_hvib_arrays
from mspgt_lens.information.bottleneck import bottleneck_frontier
from mspgt_lens.information.channel import channel_rate
from mspgt_lens.models import needed_hooks
from mspgt_lens.models.loading import load_demo_model, load_model
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching import tasks
from mspgt_lens.patching.layers import patch_layers
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.scales import patch_scales
from mspgt_lens.perturbation.brittleness import measure_brittleness
from mspgt_lens.perturbation.dependence import classify_tokens
from mspgt_lens.perturbation.dissociation import measure_dissociation
from mspgt_lens.perturbation.kinds import Perturbation
from mspgt_lens.perturbation.perturbing import perturb_scales
from mspgt_lens.perturbation.residuals import residual_statistics
from mspgt_lens.plots import plot_boundaries, plot_profile
from mspgt_lens.profile.layers import profile_cache, profile_layers
from mspgt_lens.profile.recording import recording
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.prompts import PromptDataset, load_passages
from mspgt_lens.report.writing import write_report
from mspgt_lens.results import load_result
from mspgt_lens.scales.detection import boundary_signals, detect_scales
from mspgt_lens.scales.segments import segment_blocks
from mspgt_lens.studies import analyze, compare_models
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS
from mspgt_lens.theory import evaluate_predictions

__version__ = "0.3.0"

__all__ = [
    "DEFAULT_BANDS",
    "OFFSET_BANDS",
    "CannotMeasure",
    "Curve",
    "Estimate",
    "LayerProfile",
    "Perturbation",
    "PromptDataset",
    "PromptPairs",
    "ScalePartition",
    "analyze",
    "bottleneck_frontier",
    "boundary_signals",
    "channel_rate",
    "classify_tokens",
    "compare_models",
    "detect_scales",
    "evaluate_predictions",
    "extending",
    "fit_hvib",
    "fit_hvib_arrays",
    "generation_effects",
    "load_demo_model",
    "load_model",
    "load_passages",
    "load_result",
    "measure_brittleness",
    "measure_dissociation",
    "mutual_information",
    "needed_hooks",
    "patch_layers",
    "patch_scales",
    "perturb_scales",
    "plot_boundaries",
    "plot_profile",
    "plots",
    "profile_cache",
    "profile_layers",
    "recording",
    "residual_statistics",
    "results",
    "segment_blocks",
    "studies",
    "synthetic",
    "tasks",
    "theory",
    "write_report",
]
