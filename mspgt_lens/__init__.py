"""Multi-Scale Probabilistic Generation Theory for TransformerLens: how layers divide the work."""

from mspgt_lens.boundary_plots import plot_boundaries, plot_stability
from mspgt_lens.information import channel_rate
from mspgt_lens.loading import load_demo_model, load_model
from mspgt_lens.models import needed_hooks
from mspgt_lens.partition import ScalePartition, Support
from mspgt_lens.plots import plot_information_plane, plot_profile, plot_scale_map
from mspgt_lens.profile import profile_cache, profile_layers
from mspgt_lens.prompts import Passage, Prompt, PromptDataset, load_passages
from mspgt_lens.report import write_report
from mspgt_lens.results import Curve, LayerProfile
from mspgt_lens.scales import Stability, boundary_signals, detect_scales, stability
from mspgt_lens.segments import segment_blocks
from mspgt_lens.synthetic import Power, SyntheticSignals, power, synthetic_signals
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS

__version__ = "0.2.0"

__all__ = [
    "DEFAULT_BANDS",
    "OFFSET_BANDS",
    "Curve",
    "LayerProfile",
    "Passage",
    "Power",
    "Prompt",
    "PromptDataset",
    "ScalePartition",
    "Stability",
    "Support",
    "SyntheticSignals",
    "boundary_signals",
    "channel_rate",
    "detect_scales",
    "load_demo_model",
    "load_model",
    "load_passages",
    "needed_hooks",
    "plot_boundaries",
    "plot_information_plane",
    "plot_profile",
    "plot_scale_map",
    "plot_stability",
    "power",
    "profile_cache",
    "profile_layers",
    "segment_blocks",
    "stability",
    "synthetic_signals",
    "write_report",
]
