"""Reports: any results of one or many models as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from mspgt_lens.ambient import in_own_state
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.hvib.results import HvibFit
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.perturbation.perturbing import PerturbationEffects
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.report import sections
from mspgt_lens.report.findings import findings
from mspgt_lens.report.page import heading, table, write_page
from mspgt_lens.scales.detection import Stability
from mspgt_lens.studies.analysis import Analysis
from mspgt_lens.studies.comparison import Comparison
from mspgt_lens.studies.emergence import Emergence
from mspgt_lens.theory.verdicts import Verdicts

_One = TypeVar("_One")
_KINDS = (
    LayerProfile,
    ScalePartition,
    Stability,
    HvibFit,
    Brittleness,
    TokenClasses,
    Dissociation,
    PerturbationEffects,
    GenerationEffects,
    PatchSweep,
    ScalePatch,
    Emergence,
    Comparison,
    Verdicts,
    Analysis,
)


@in_own_state
def write_report(
    path: str | os.PathLike[str], *results: Any, scale_map: LayerProfile | None = None
) -> Path:
    """Write results as one HTML file with their figures; no network is needed to read it.

    Args:
        path: Where to write.
        *results: Profiles (several are overlaid), a partition (more of them, and those of controls,
            are shown beside it), and any other results of this package, one of each kind. An
            :class:`~mspgt_lens.results.Analysis` stands for all that it holds.
        scale_map: A profile of the same model with one band per offset, for the scale map.

    Returns:
        The path that was written.

    Raises:
        TypeError: If something else is given than results.
        ValueError: If there are none, or two of a kind of which one can be shown.
    """
    given = _Given(results, scale_map)
    body = "".join(
        (
            heading("What was asked", _question(given)),
            _findings(given),
            *_sections(given),
            heading("How it was made", ""),
            _details(given),
        )
    )
    return write_page(
        path,
        title=f"{given.name}: mspgt_lens",
        title_line=f"{given.name}: {given.subject}",
        subtitle=_subtitle(given),
        notes=given.notes,
        body=body,
    )


class _Given:
    """The results of a report, by kind."""

    def __init__(self, results: Sequence[Any], scale_map: LayerProfile | None) -> None:
        self.scale_map = scale_map
        self.everything: list[Any] = []
        self.notes: list[str] = []
        for one in results:
            if not isinstance(one, _KINDS):
                raise TypeError(
                    f"results must be of {', '.join(k.__name__ for k in _KINDS)}; got "
                    f"{type(one).__name__}"
                )
            if isinstance(one, Analysis):
                self.everything += _parts(one)
                self.notes += [
                    f"{step.replace('_', ' ')} was skipped: {why}"
                    for step, why in one.skipped.items()
                ]
            else:
                self.everything.append(one)
        if not self.everything:
            raise ValueError("results must hold at least one result, got none")
        self.profiles = self._all(LayerProfile)
        # The model itself before its controls, in whatever order they were given.
        self.partitions = sorted(self._all(ScalePartition), key=lambda p: p.control is not None)
        said = (n for one in (*self.everything, scale_map) if one for n in self._warnings(one))
        self.notes = list(dict.fromkeys([*self.notes, *said]))

    def one(self, kind: type[_One]) -> _One | None:
        """The only result of a kind, or None."""
        found = self._all(kind)
        if len(found) > 1:
            raise ValueError(f"results must hold one {kind.__name__} at most, got {len(found)}")
        return found[0] if found else None

    @property
    def partition(self) -> ScalePartition | None:
        """The first partition; those after it are controls."""
        return self.partitions[0] if self.partitions else None

    @property
    def name(self) -> str:
        """The models' names."""
        comparison = self.one(Comparison)
        if comparison is not None:
            return f"{len(comparison.models)} models"
        named = self.profiles or self.everything
        names = [str(getattr(one, "model_name", "")) for one in named]
        known = list(dict.fromkeys(filter(None, names)))
        # Of other results, those after the first may be of controls.
        return ", ".join(known if self.profiles else known[:1]) or "Results"

    @property
    def subject(self) -> str:
        """What the report is about."""
        if self.one(Comparison) is not None or self.one(Verdicts) is not None:
            return "the theory's predictions, measured"
        if self.profiles:
            return "what each layer keeps and predicts"
        if self.one(PatchSweep) is not None:
            return "which activations carry the answer"
        if self.one(Brittleness) is not None:
            return "how much noise each scale bears"
        return "results"

    def _warnings(self, one: Any) -> Sequence[str]:
        # Beside its model, a control's warnings are about the control.
        if isinstance(one, ScalePartition) and one.control and one is not self.partition:
            return ()
        notes: Sequence[str] = getattr(one, "warnings", ())
        return notes

    def _all(self, kind: type[_One]) -> list[_One]:
        return [one for one in self.everything if isinstance(one, kind)]


def _parts(analysis: Analysis) -> list[Any]:
    names = (
        "profile",
        "partition",
        "random_weights",
        "shuffled_tokens",
        "brittleness",
        "token_classes",
        "dissociation",
        "effects",
    )
    found = (getattr(analysis, name) for name in names)
    return [one for one in found if one is not None]


def _question(given: _Given) -> str:
    parts = []
    if given.profiles:
        parts.append(
            "How much of what it has read does every layer keep, and how much of what is to come "
            "does it predict, at several distances?"
        )
    if given.partitions:
        parts.append(
            "Do the layers fall into segments with sharp boundaries, or do they change gradually?"
        )
    if given.one(Brittleness) is not None or given.one(PerturbationEffects) is not None:
        parts.append("Which segment breaks first under noise?")
    if given.one(Dissociation) is not None:
        parts.append("Does each segment matter most to the tokens that depend on its own scale?")
    if given.one(PatchSweep) is not None or given.one(ScalePatch) is not None:
        parts.append("Which activations carry the answer from clean prompts into corrupted ones?")
    if given.one(GenerationEffects) is not None:
        parts.append("What changes in the text that a perturbed model writes?")
    if given.one(HvibFit) is not None:
        parts.append("What do trained, nonlinear readers find at which rate?")
    if given.one(Emergence) is not None:
        parts.append("When in training does all this appear?")
    if given.one(Verdicts) is not None or given.one(Comparison) is not None:
        parts.append(
            "Do the predictions of the Multi-Scale Probabilistic Generation Theory (MSPGT, arXiv "
            "2505.18244) hold?"
        )
    return " ".join(parts)


def _findings(given: _Given) -> str:
    lines = findings(
        given.profiles[0] if len(given.profiles) == 1 else None,
        given.partition,
        given.partitions[1:],
        given.one(Brittleness),
        given.one(Dissociation),
        given.one(Verdicts),
    )
    if not lines:
        return ""
    items = "".join(f"<li dir='auto'>{escape(line)}</li>" for line in lines)
    return f"{heading('In short', '')}<ul>{items}</ul>"


def _sections(given: _Given) -> list[str]:
    shown: list[str] = []
    verdicts, comparison = given.one(Verdicts), given.one(Comparison)
    if verdicts is not None:
        shown.append(sections.verdict_section(verdicts))
    if comparison is not None:
        shown.append(sections.comparison_section(comparison))
    if given.partition is not None:
        shown.append(sections.boundary_sections(given.partition, given.partitions[1:]))
    if given.profiles:
        shown += sections.profile_sections(given.profiles, given.partition, given.scale_map)
    for kind, build in _BUILDERS:
        one = given.one(kind)
        if one is not None:
            shown.append(build(one))
    shown += sections.sweep_sections(given.one(PatchSweep), given.one(ScalePatch), given.partition)
    return shown


_BUILDERS: tuple[tuple[type[Any], Callable[[Any], str]], ...] = (
    (Stability, sections.stability_section),
    (Brittleness, sections.brittleness_sections),
    (TokenClasses, sections.classes_section),
    (Dissociation, sections.dissociation_section),
    (PerturbationEffects, sections.effects_section),
    (GenerationEffects, sections.effects_section),
    (HvibFit, sections.hvib_section),
    (Emergence, sections.emergence_section),
)


def _subtitle(given: _Given) -> str:
    parts = []
    if len(given.profiles) == 1:
        profile = given.profiles[0]
        parts.append(
            f"{profile.n_layers} blocks; {profile.n_tokens:,} token positions from "
            f"{profile.n_groups:,} groups of text"
        )
    sweep = given.one(PatchSweep)
    if sweep is not None:
        parts.append(
            f"{sweep.settings['n_pairs']} pairs; {sweep.metric_name.replace('_', ' ')} "
            f"{sweep.clean:.3g} on clean and {sweep.corrupted:.3g} on corrupted prompts"
        )
    brittleness = given.one(Brittleness)
    if brittleness is not None and not given.profiles:
        parts.append(
            f"{brittleness.settings['n_positions']:,} positions in "
            f"{brittleness.settings['n_groups']} documents, with 95% intervals over documents"
        )
    known = (_versions(one).get("mspgt-lens") for one in given.everything)
    version = next(filter(None, known), "")
    made = f"Made with mspgt_lens {version}".rstrip()
    return "".join(f"{sentence}. " for sentence in ("; ".join(parts), made) if sentence).rstrip()


def _versions(one: Any) -> Mapping[str, str]:
    versions: Mapping[str, str] = getattr(one, "versions", {})
    return versions


def _details(given: _Given) -> str:
    """Settings, seeds, versions and hashes of every result, and what its numbers mean."""
    blocks = []
    for one in (*given.everything, *([given.scale_map] if given.scale_map else [])):
        settings = dict(getattr(one, "settings", {}))
        if isinstance(one, LayerProfile):
            settings |= {"bands": dict(one.bands)}
        if isinstance(one, Verdicts):
            settings |= dict(one.thresholds)
        settings.pop("ridge", None)
        rows = [("setting", "value"), *((name, str(value)) for name, value in settings.items())]
        rows += [(f"version of {name}", value) for name, value in _versions(one).items()]
        if len(rows) == 1:
            continue
        label = " ".join(filter(None, (type(one).__name__, getattr(one, "model_name", ""))))
        blocks.append(
            f"<details><summary>{escape(label)}</summary>{table(rows)}{_meanings(one)}</details>"
        )
    return "".join(blocks)


def _meanings(one: Any) -> str:
    if not isinstance(one, LayerProfile):
        return ""
    items = {quantity: curve.guarantee for quantity, _, curve in one.curves()}
    lines = (
        f"<li><b>{escape(name.replace('_', ' '))}</b>: {escape(text)}</li>"
        for name, text in items.items()
    )
    return f"<ul>{''.join(lines)}</ul>"
