"""Studies of whole models: all measurements at once, along training, over texts and models.

And what a profile will take, before it is begun.
"""

from mspgt_lens.perturbation.massive import ablate_massive
from mspgt_lens.perturbation.skipping import block_effects
from mspgt_lens.profile.planning import plan_profile
from mspgt_lens.studies.analysis import analyze
from mspgt_lens.studies.comparison import compare_models
from mspgt_lens.studies.emergence import emergence
from mspgt_lens.studies.stability import stability

__all__ = [
    "ablate_massive",
    "analyze",
    "block_effects",
    "compare_models",
    "emergence",
    "plan_profile",
    "stability",
]
