"""Made-up data with known answers: what tests see at a model's depth, how often they err."""

from mspgt_lens.scales.synthetic import power, synthetic_signals
from mspgt_lens.theory.synthetic_models import synthetic_models

__all__ = ["power", "synthetic_models", "synthetic_signals"]
