"""Figures: functions of results that return a plotly figure; nothing is shown."""

from mspgt_lens.plots.block_effects import plot_block_effects
from mspgt_lens.plots.boundaries import plot_boundaries, plot_stability
from mspgt_lens.plots.comparison import plot_comparison
from mspgt_lens.plots.emergence import plot_emergence
from mspgt_lens.plots.explore import explore
from mspgt_lens.plots.forest import plot_effects
from mspgt_lens.plots.hvib import plot_hvib
from mspgt_lens.plots.lens import plot_lens, plot_lens_reading, plot_lens_scores
from mspgt_lens.plots.massive import plot_massive_ablation
from mspgt_lens.plots.patching import plot_patching, plot_scale_patch
from mspgt_lens.plots.perturbation import plot_brittleness, plot_dissociation
from mspgt_lens.plots.places import plot_places
from mspgt_lens.plots.plane import plot_information_plane, plot_scale_map
from mspgt_lens.plots.profile import plot_profile
from mspgt_lens.plots.rate_distortion import plot_rate_distortion
from mspgt_lens.plots.tables import plot_class_counts, plot_table

__all__ = [
    "explore",
    "plot_block_effects",
    "plot_boundaries",
    "plot_brittleness",
    "plot_class_counts",
    "plot_comparison",
    "plot_dissociation",
    "plot_effects",
    "plot_emergence",
    "plot_hvib",
    "plot_information_plane",
    "plot_lens",
    "plot_lens_reading",
    "plot_lens_scores",
    "plot_massive_ablation",
    "plot_patching",
    "plot_places",
    "plot_profile",
    "plot_rate_distortion",
    "plot_scale_map",
    "plot_scale_patch",
    "plot_stability",
    "plot_table",
]
