"""Multi-Scale Probabilistic Generation Theory for TransformerLens: how layers divide the work."""

from mspgt_lens.information import channel_rate
from mspgt_lens.loading import load_demo_model, load_model
from mspgt_lens.models import needed_hooks
from mspgt_lens.plots import plot_information_plane, plot_profile, plot_scale_map
from mspgt_lens.profile import profile_cache, profile_layers
from mspgt_lens.prompts import Passage, Prompt, PromptDataset, load_passages
from mspgt_lens.report import write_report
from mspgt_lens.results import Curve, LayerProfile
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_BANDS",
    "OFFSET_BANDS",
    "Curve",
    "LayerProfile",
    "Passage",
    "Prompt",
    "PromptDataset",
    "channel_rate",
    "load_demo_model",
    "load_model",
    "load_passages",
    "needed_hooks",
    "plot_information_plane",
    "plot_profile",
    "plot_scale_map",
    "profile_cache",
    "profile_layers",
    "write_report",
]
