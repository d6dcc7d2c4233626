"""Multi-Scale Probabilistic Generation Theory for TransformerLens: how layers divide the work.

Load a model and text
    load_model, load_demo_model; PromptDataset, load_passages; PromptPairs (ready-made ones: tasks)

Measure what layers hold
    profile_layers, with OFFSET_BANDS for single offsets; profile_cache with needed_hooks, and
    recording, where you run the model; fit_lens; fit_hvib; rate_distortion; mutual_information
    (more on your own arrays: arrays)

Find the scales
    detect_scales in a model, segment_blocks in signals of your own

Intervene
    patch_layers, patch_scales; perturb_scales by a Perturbation, measure_brittleness,
    residual_statistics for both; classify_tokens, measure_dissociation; generation_effects

Judge the theory
    analyze one model whole, evaluate_predictions on several; more in studies and theory, and
    made-up data with known answers in synthetic

See and keep
    plot_profile, plot_boundaries, plot_lens, plot_rate_distortion (all others: plots);
    write_report; load_result (all kinds: results). CannotMeasure is raised where nothing is wrong
    with the call

Add your own
    signals, perturbations, predictions, estimators: extending
"""

from mspgt_lens import arrays, extending, plots, results, studies, synthetic, theory
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.estimators.interface import mutual_information
from mspgt_lens.generation.writing import generation_effects
from mspgt_lens.hvib.probe import fit_hvib
from mspgt_lens.lens.fitting import fit_lens
from mspgt_lens.models import needed_hooks
from mspgt_lens.models.loading import load_demo_model, load_model
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
from mspgt_lens.plots import plot_boundaries, plot_lens, plot_profile, plot_rate_distortion
from mspgt_lens.profile.layers import profile_cache, profile_layers
from mspgt_lens.profile.recording import recording
from mspgt_lens.prompts import PromptDataset, load_passages
from mspgt_lens.rates.distortion import rate_distortion
from mspgt_lens.report.writing import write_report
from mspgt_lens.results import load_result
from mspgt_lens.scales.detection import detect_scales
from mspgt_lens.scales.segments import segment_blocks
from mspgt_lens.studies import analyze
from mspgt_lens.targets import OFFSET_BANDS
from mspgt_lens.theory import evaluate_predictions

__version__ = "0.3.0"

__all__ = [
    "OFFSET_BANDS",
    "CannotMeasure",
    "Perturbation",
    "PromptDataset",
    "PromptPairs",
    "analyze",
    "arrays",
    "classify_tokens",
    "detect_scales",
    "evaluate_predictions",
    "extending",
    "fit_hvib",
    "fit_lens",
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
    "plot_lens",
    "plot_profile",
    "plot_rate_distortion",
    "plots",
    "profile_cache",
    "profile_layers",
    "rate_distortion",
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
