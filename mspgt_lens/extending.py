"""What of one's own can be added, and what it is made of; CONTRIBUTING.md shows how."""

from mspgt_lens.models import Edit
from mspgt_lens.perturbation.draws import Ask, Draws
from mspgt_lens.perturbation.registry import PerturbationKind, register_perturbation

__all__ = ["Ask", "Draws", "Edit", "PerturbationKind", "register_perturbation"]
