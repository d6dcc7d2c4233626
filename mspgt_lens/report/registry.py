"""What a report asks and shows of every kind of result: one entry a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mspgt_lens.contract import Result
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.hvib.results import HvibFit
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.perturbation.massive import MassiveAblation
from mspgt_lens.perturbation.perturbing import PerturbationEffects
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.rates.results import RateDistortion
from mspgt_lens.report import sections
from mspgt_lens.studies.comparison import Comparison
from mspgt_lens.studies.emergence import Emergence
from mspgt_lens.studies.stability import Stability
from mspgt_lens.theory.place_comparison import PlaceComparison
from mspgt_lens.theory.verdicts import Verdicts


@dataclass(frozen=True)
class Beside:
    """What else a report holds, for sections that show it, too.

    Attributes:
        partition: The model's partition, or None.
        scale_map: A profile with one band per offset, or None.
    """

    partition: ScalePartition | None
    scale_map: LayerProfile | None


@dataclass(frozen=True)
class Kind:
    """How a report treats one kind of result.

    Attributes:
        build: All results of the kind, and what else there is, to the section.
        question: What it answers; empty where the section says so.
        many: Whether several may be shown.
    """

    build: Callable[[Sequence[Any], Beside], Markup]
    question: str = ""
    many: bool = False


def kind_of(result: Result) -> type[Any]:
    """The entry of a result: its own class, or ``Result`` for kinds without one."""
    return type(result) if type(result) in KINDS else Result


_PREDICTIONS = (
    "Do the predictions of the Multi-Scale Probabilistic Generation Theory (MSPGT, arXiv "
    "2505.18244) hold?"
)
_BREAKS = "Which segment breaks first under noise?"
_CARRIES = "Which activations carry the answer from clean prompts into corrupted ones?"

# In the order of a report.
KINDS: dict[type[Any], Kind] = {
    Verdicts: Kind(lambda r, _: sections.verdict_section(r[0]), _PREDICTIONS),
    Comparison: Kind(lambda r, _: sections.comparison_section(r[0]), _PREDICTIONS),
    PlaceComparison: Kind(
        lambda r, _: Markup().join(map(sections.place_section, r)),
        "Which theory's places are the boundaries near?",
        many=True,
    ),
    ScalePartition: Kind(
        lambda r, _: sections.boundary_sections(r[0], r[1:]),
        "Do the layers fall into segments with sharp boundaries, or do they change gradually?",
        many=True,
    ),
    LayerProfile: Kind(
        lambda r, beside: Markup().join(
            sections.profile_sections(r, beside.partition, beside.scale_map)
        ),
        "How much of what it has read does every layer keep, and how much of what is to come does "
        "it predict, at several distances?",
        many=True,
    ),
    Stability: Kind(lambda r, _: sections.stability_section(r[0])),
    Brittleness: Kind(lambda r, _: sections.brittleness_sections(r[0]), _BREAKS),
    TokenClasses: Kind(lambda r, _: sections.classes_section(r[0])),
    Dissociation: Kind(
        lambda r, _: sections.dissociation_section(r[0]),
        "Does each segment matter most to the tokens that depend on its own scale?",
    ),
    PerturbationEffects: Kind(lambda r, _: sections.effects_section(r[0]), _BREAKS),
    BlockEffects: Kind(
        lambda r, _: sections.block_effects_section(r[0]),
        "Which blocks do predictions need, at their own token and at earlier ones?",
    ),
    MassiveAblation: Kind(
        lambda r, _: sections.massive_section(r[0]),
        "What goes with the massive activations: attention sinks, the valley of entropy, "
        "predictions?",
    ),
    GenerationEffects: Kind(
        lambda r, _: sections.effects_section(r[0]),
        "What changes in the text that a perturbed model writes?",
    ),
    HvibFit: Kind(
        lambda r, _: sections.hvib_section(r[0]),
        "What do trained, nonlinear readers find at which rate?",
    ),
    RateDistortion: Kind(
        lambda r, _: sections.rate_section(r[0]),
        "How much do predictions need of every layer, at several distances?",
    ),
    Emergence: Kind(
        lambda r, _: sections.emergence_section(r[0]), "When in training does all this appear?"
    ),
    PatchSweep: Kind(lambda r, beside: sections.sweep_section(r[0], beside.partition), _CARRIES),
    ScalePatch: Kind(lambda r, _: sections.scale_patch_section(r[0]), _CARRIES),
    Result: Kind(lambda r, _: Markup().join(map(sections.result_section, r)), many=True),
}
