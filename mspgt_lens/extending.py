"""What of one's own can be added, and what it is made of; CONTRIBUTING.md shows how."""

from mspgt_lens.estimates import Estimate
from mspgt_lens.models import Edit
from mspgt_lens.perturbation.draws import Ask, Draws
from mspgt_lens.perturbation.registry import PerturbationKind, register_perturbation
from mspgt_lens.signals import RIVAL_SIGNALS, SIGNALS, BlockRows, Signal, SiteRows
from mspgt_lens.theory.judging import Finding, Prediction, over_models

__all__ = [
    "RIVAL_SIGNALS",
    "SIGNALS",
    "Ask",
    "BlockRows",
    "Draws",
    "Edit",
    "Estimate",
    "Finding",
    "PerturbationKind",
    "Prediction",
    "Signal",
    "SiteRows",
    "over_models",
    "register_perturbation",
]
