"""Reports: any results of one or many models as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.results import PatchSweep
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.report.findings import findings
from mspgt_lens.report.page import folded, heading, items, table, write_page
from mspgt_lens.report.registry import KINDS, Beside, kind_of
from mspgt_lens.studies.analysis import Analysis
from mspgt_lens.studies.comparison import Comparison
from mspgt_lens.theory.verdicts import Verdicts

_One = TypeVar("_One")


@in_own_state
def write_report(
    path: str | os.PathLike[str], *results: Any, scale_map: LayerProfile | None = None
) -> Path:
    """Write results as one HTML file with their figures; no network is needed to read it.

    Args:
        path: Where to write.
        *results: Any results of this package: profiles (several are overlaid), a partition (more of
            them, and those of controls, are shown beside it), one each of the other kinds. An
            :class:`~mspgt_lens.results.Analysis` stands for all that it holds but the profile of
            random weights.
        scale_map: A profile of the same model with one band per offset, for the scale map.

    Returns:
        The path that was written.

    Raises:
        TypeError: If something else is given than results.
        ValueError: If there are none, or two of a kind of which one can be shown.

    Example:
        >>> ml.write_report("report.html", profile).name
        'report.html'
    """
    given = _Given(results, scale_map)
    body = Markup().join(
        (
            heading("What was asked", _question(given)),
            _findings(given),
            *_sections(given),
            heading("How it was made"),
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
            if not isinstance(one, Result):
                raise TypeError(
                    f"results must be results of this package, such as a LayerProfile; got "
                    f"{type(one).__name__}"
                )
            if isinstance(one, Analysis):
                # The twin's profile is behind its partition and the verdicts; no model to overlay.
                parts = one.parts.items()
                self.everything += [part for step, part in parts if step != "random_profile"]
                self.notes += [
                    f"{step.replace('_', ' ')} was skipped: {why}"
                    for step, why in one.skipped.items()
                ]
            else:
                self.everything.append(one)
        if not self.everything:
            raise ValueError("results must hold at least one result, got none")
        for of, kind in KINDS.items():
            if not kind.many and len(self.of(of)) > 1:
                raise ValueError(
                    f"results must hold one {of.__name__} at most, got {len(self.of(of))}"
                )
        self.profiles: list[LayerProfile] = self.of(LayerProfile)
        self.partitions: list[ScalePartition] = self.of(ScalePartition)
        said = (n for one in (*self.everything, scale_map) if one for n in self._warnings(one))
        self.notes = list(dict.fromkeys([*self.notes, *said]))

    def of(self, kind: type[Any]) -> list[Any]:
        """All results of a kind; the model itself before its controls, whatever their order."""
        found = [one for one in self.everything if kind_of(one) is kind]
        return sorted(found, key=lambda one: getattr(one, "control", None) is not None)

    def one(self, kind: type[_One]) -> _One | None:
        """The only result of a kind, or None."""
        return next(iter(self.of(kind)), None)

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
        if self.partitions:
            return "where curves change sharply with depth"
        return "results"

    def _warnings(self, one: Any) -> Sequence[str]:
        # Beside its model, a control's warnings are about the control.
        if isinstance(one, ScalePartition) and one.control and one is not self.partition:
            return ()
        notes: Sequence[str] = getattr(one, "warnings", ())
        return notes


def _question(given: _Given) -> str:
    asked = [kind.question for of, kind in KINDS.items() if given.of(of)]
    return " ".join(dict.fromkeys(filter(None, asked)))


def _findings(given: _Given) -> Markup:
    lines = findings(
        given.profiles[0] if len(given.profiles) == 1 else None,
        given.partition,
        given.partitions[1:],
        given.one(Brittleness),
        given.one(Dissociation),
        given.one(Verdicts),
    )
    if not lines:
        return Markup()
    return heading("In short") + items([("", line) for line in lines])


def _sections(given: _Given) -> list[Markup]:
    beside = Beside(given.partition, given.scale_map)
    return [kind.build(found, beside) for of, kind in KINDS.items() if (found := given.of(of))]


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
        # Results that were put together by hand may lack settings.
        pairs = f"{sweep.settings['n_pairs']} pairs; " if "n_pairs" in sweep.settings else ""
        parts.append(
            f"{pairs}{sweep.metric_name.replace('_', ' ')} {sweep.clean:.3g} on clean and "
            f"{sweep.corrupted:.3g} on corrupted prompts"
        )
    brittleness = given.one(Brittleness)
    if brittleness is not None and not given.profiles:
        settings, documents = brittleness.settings, brittleness.by_group.shape[3]
        count = f"{settings['n_positions']:,} positions in " if "n_positions" in settings else ""
        parts.append(f"{count}{documents} documents, with 95% intervals over documents")
    known = (_versions(one).get("mspgt-lens") for one in given.everything)
    version = next(filter(None, known), "")
    made = f"Made with mspgt_lens {version}".rstrip()
    return "".join(f"{sentence}. " for sentence in ("; ".join(parts), made) if sentence).rstrip()


def _versions(one: Any) -> Mapping[str, str]:
    versions: Mapping[str, str] = getattr(one, "versions", {})
    return versions


def _details(given: _Given) -> Markup:
    """Settings, seeds, versions and hashes of every result, and what its numbers mean."""
    blocks = Markup()
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
        blocks += folded(label, table(rows) + _meanings(one))
    return blocks


def _meanings(one: Any) -> Markup:
    if not isinstance(one, LayerProfile):
        return Markup()
    meanings = {quantity: curve.guarantee for quantity, _, curve in one.curves()}
    return items([(name.replace("_", " "), text) for name, text in meanings.items()])
