"""Everything that the theory speaks of, measured on one model in one call."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, named
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import ModelAdapter, as_adapter, weight_digest
from mspgt_lens.models.loading import load_model
from mspgt_lens.partition import ScalePartition
from mspgt_lens.perturbation.brittleness import Brittleness, measure_brittleness
from mspgt_lens.perturbation.dependence import TokenClasses, classify_tokens
from mspgt_lens.perturbation.dissociation import Dissociation, measure_dissociation
from mspgt_lens.perturbation.perturbing import PerturbationEffects, perturb_scales
from mspgt_lens.perturbation.skipping import BlockEffects, block_effects
from mspgt_lens.processes import PeerError, Processes, joined
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.settings import Control
from mspgt_lens.prompts import (
    Prompt,
    PromptDataset,
    as_dataset,
    load_passages,
)
from mspgt_lens.scales.detection import check_depth, detect_scales
from mspgt_lens.signals import SIGNALS
from mspgt_lens.storage import read_result, write_result
from mspgt_lens.theory.evaluation import RIVALS
from mspgt_lens.theory.verdicts import ModelResults

# What interventions run on: the first tokens of a document's first window.
_PERTURBED_LENGTH = 48
_CLASSES_LENGTH = 160
_LEVELS = (0.05, 0.2, 1.0)
_N_CONTROLS = 5
_INDEX = "analysis"
# Steps that profile, and under which control.
_PASSES: Mapping[str, Control | None] = {
    "profile": None,
    "random_profile": "random_weights",
    "shuffled_tokens": "shuffled_tokens",
}
# Steps that the first of several processes takes alone; they share the others.
_ALONE = ("partition", "random_weights")
_CONTROLS = ("random_profile", "random_weights", "shuffled_tokens")
# The usual signals, and those that other theories' predictions are about.
_SIGNALS = tuple(dict.fromkeys((*SIGNALS, *(name for p in RIVALS for name in p.signals))))
_KINDS: Mapping[str, Any] = {
    "profile": LayerProfile,
    "partition": ScalePartition,
    "random_profile": LayerProfile,
    "random_weights": ScalePartition,
    "shuffled_tokens": ScalePartition,
    "brittleness": Brittleness,
    "token_classes": TokenClasses,
    "dissociation": Dissociation,
    "effects": PerturbationEffects,
    "block_effects": BlockEffects,
}


@dataclass(frozen=True, eq=False, repr=False)
class Analysis(Result):
    """What :func:`analyze` measured on one model.

    Attributes:
        profile: Its layer profile, with the signals that other theories speak of.
        partition: Its partition into three segments.
        random_profile: The same profile of the same architecture with random weights, or None.
        random_weights: The partition of that twin, or None.
        shuffled_tokens: The partition from shuffled text, or None.
        brittleness: Response to noise in every block and segment, or None.
        token_classes: Tokens by the longest context that they depend on, or None.
        dissociation: Each segment's perturbation against those classes, or None.
        effects: Every kind of perturbation of every segment, or None.
        block_effects: What becomes of predictions without each block, or None.
        family: What the model shares with others, or None.
        n_parameters: Number of its weights.
        skipped: Step to why it could not be taken; its result is None.
        identity: Of the weights, the prompts and the settings: :func:`analyze` goes on in a folder
            only if it holds the same.
    """

    profile: LayerProfile
    partition: ScalePartition
    random_profile: LayerProfile | None = None
    random_weights: ScalePartition | None = None
    shuffled_tokens: ScalePartition | None = None
    brittleness: Brittleness | None = None
    token_classes: TokenClasses | None = None
    dissociation: Dissociation | None = None
    effects: PerturbationEffects | None = None
    block_effects: BlockEffects | None = None
    family: str | None = None
    n_parameters: int | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""

    @property
    def parts(self) -> dict[str, Result]:
        """Step to its result, of those that were taken."""
        results = {name: getattr(self, name) for name in _KINDS}
        return {name: result for name, result in results.items() if result is not None}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was skipped and why, then the warnings of the results; not those of controls."""
        skipped = (f"{s.replace('_', ' ')} was skipped: {why}" for s, why in self.skipped.items())
        said = (
            n
            for name in _KINDS
            if name not in _CONTROLS and (result := getattr(self, name))
            for n in result.warnings
        )
        return tuple(dict.fromkeys((*skipped, *said)))

    def heading(self) -> str:
        """The model, its family and its size."""
        size = "" if self.n_parameters is None else f", {self.n_parameters:,} parameters"
        family = "" if self.family is None else f", family {self.family}"
        return f"Analysis{named(self.profile.model_name)}{family}{size}"

    def findings(self) -> list[str]:
        """The boundaries, then the first finding of every other step."""
        lines = self.partition.findings()
        for name, part in self.parts.items():
            if name not in ("profile", "partition", "random_profile") and part.findings():
                lines.append(f"{name.replace('_', ' ').capitalize()}: {part.findings()[0]}")
        return lines

    def to_dataframe(self) -> pd.DataFrame:
        """All results below one another: as their own tables, with ``result``, the step."""
        tables = [part.to_dataframe().assign(result=name) for name, part in self.parts.items()]
        table = pd.concat([t.dropna(axis=1, how="all") for t in tables], ignore_index=True)
        return table[["result", *(c for c in table.columns if c != "result")]]

    @property
    def results(self) -> ModelResults:
        """What :func:`~mspgt_lens.evaluate_predictions` and ``compare_models`` take."""
        return ModelResults(
            profile=self.profile,
            partition=self.partition,
            family=self.family,
            n_parameters=self.n_parameters,
            random_weights=self.random_weights,
            shuffled_tokens=self.shuffled_tokens,
            brittleness={} if self.brittleness is None else self.brittleness.log_brittleness(),
            dissociation=None if self.dissociation is None else self.dissociation.interaction,
            random_profile=self.random_profile,
            block_effects=self.block_effects,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write one file per result, and one that lists them, into a folder.

        Args:
            folder: Where to write; made if it is not there.

        Returns:
            The folder.
        """
        for name in _KINDS:
            result = getattr(self, name)
            if result is not None:
                result.save(Path(folder) / name)
        header = {
            "family": self.family,
            "n_parameters": self.n_parameters,
            "skipped": dict(self.skipped),
            "identity": self.identity,
        }
        write_result(Path(folder) / _INDEX, "Analysis", header, {})
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Analysis:
        """Read what :meth:`save` or :func:`analyze` wrote.

        Args:
            folder: Where it was written.

        Returns:
            An analysis that is equal to the one that was saved.

        Raises:
            FileNotFoundError: If there is no analysis, or it was not finished.
            ValueError: If the folder holds something else.
        """
        header, _ = read_result(Path(folder) / _INDEX, "Analysis")
        results = {name: _saved(Path(folder), name) for name in _KINDS}
        for name in ("profile", "partition"):
            if results[name] is None:
                raise FileNotFoundError(
                    f"folder: the analysis in {folder} was not finished: it has no {name}; call "
                    "analyze with the same folder again"
                )
        return cls(
            **results,
            **{name: header[name] for name in ("family", "n_parameters", "skipped", "identity")},
        )


@in_own_state
def analyze(
    model: Any,
    prompts: PromptDataset | Iterable[str] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    family: str | None = None,
    max_length: int = 384,
    n_documents: int = 12,
    n_control_documents: int = 40,
    n_tokens: int = 1000,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> Analysis:
    """Measure on one model all that the predictions of MSPGT and of its rivals need.

    In this order: the profile, with the signals that other theories speak of; its scale boundaries;
    both of random weights; the boundaries of shuffled text; brittleness of every block and segment;
    tokens by the context they depend on, and which of them each segment's perturbation hurts; every
    kind of perturbation of every segment; every block skipped, and swapped with the next.
    Segments are the two best places, whether or not the data support them. A step that the model
    or the text does not admit (interventions on an encoder, prompts too short for the global band)
    is skipped, and the result says why.

    With a folder, every result is written as soon as it is there, and sums of profiles every few
    minutes: an interrupted analysis goes on where it stopped. Prompts are read once and kept, as
    tokens.

    Args:
        model: A TransformerLens model, or a name for :func:`~mspgt_lens.load_model`.
        prompts: A :class:`PromptDataset`, or texts; the built-in passages by default.
        folder: Where results go; nowhere by default.
        family: What the model shares with others (``"Llama"``); its architecture by default.
        max_length: Longest window in tokens where texts are given; the model's context if shorter.
        n_documents: Documents that perturbations run on (their first 48 tokens), at most.
        n_control_documents: Documents that the two controls are profiled on, and whose first 160
            tokens are sorted by context, at most.
        n_tokens: Tokens that are sorted by context, at most.
        seed: Decides everything that is drawn.
        progress: Show progress bars; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work; the first
            one seeks boundaries alone, and writes. All of them call this with the same arguments
            and end with the same analysis; what stops one stops all.

    Returns:
        Every result that could be measured, and why others could not.

    Raises:
        ValueError: If an argument is out of range, or the folder holds an analysis of another
            model, other prompts or other settings.
        CannotMeasure: If the prompts do not suffice for a profile, or the model has fewer than 6
            blocks.
        RuntimeError: If another process of the group failed; says which one, and why.

    Example:
        >>> analysis = ml.analyze(model, prompts, n_documents=3, n_tokens=50)
        >>> list(analysis.parts)
        ['profile', 'partition', ...]
    """
    # What one process fails at before the others are with it must be told them, too.
    with joined(process_group) as processes:
        adapter = as_adapter(load_model(model) if isinstance(model, str) else model)
        check_depth(adapter)
        sizes = {
            "n_documents": n_documents,
            "n_control_documents": n_control_documents,
            "n_tokens": n_tokens,
        }
        for name, value in sizes.items():
            if value < 3:
                raise ValueError(f"{name} must be at least 3, got {value}")
        rows = _rows(adapter, prompts, max_length)
        into = None if folder is None else Path(folder)
        steps = _Steps(adapter, rows, into, sizes, seed, progress, processes, process_group)
        steps.begin(family)
        with tqdm(total=len(_KINDS), disable=not progress or not steps.is_first) as bar:
            for name in _KINDS:
                bar.set_description(f"{adapter.name}: {name.replace('_', ' ')}")
                steps.take(name)
                bar.update()
    return Analysis(
        **steps.found,
        family=steps.family,
        n_parameters=adapter.n_parameters,
        skipped=steps.skipped,
        identity=steps.identity,
    )


class _Steps:
    """The steps of one analysis, each from what those before it found."""

    def __init__(
        self,
        adapter: ModelAdapter,
        rows: Sequence[Prompt],
        folder: Path | None,
        sizes: Mapping[str, int],
        seed: int,
        progress: bool,
        processes: Processes,
        group: Any,
    ) -> None:
        self.adapter, self.rows, self.sizes = adapter, rows, sizes
        self.seed, self.progress = seed, progress
        self.processes, self.group = processes, group
        self.is_first = processes.rank == 0
        # Results are read and written by the first process, sums of a pass by all.
        self.folder, self.into = folder if self.is_first else None, folder
        self.found: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.family: str | None = None

    def begin(self, family: str | None) -> None:
        """See whether the folder holds the beginning of this analysis."""
        self.family = self.adapter.family if family is None else family
        self._look()
        self.skipped = json.loads(self.processes.texts(json.dumps(self.skipped))[0])

    def _look(self) -> None:
        if self.folder is None:
            return
        if (self.folder / f"{_INDEX}.safetensors").exists():
            header, _ = read_result(self.folder / _INDEX, "Analysis")
            if header["identity"] != self.identity:
                raise ValueError(
                    f"folder: {self.folder} holds an analysis of another model, other prompts or "
                    "other settings; choose another folder, or empty it"
                )
            self.skipped = dict(header["skipped"])
        self._write_index()

    def take(self, name: str) -> None:
        """Take one step, unless the folder holds its result."""
        kept = None if self.folder is None else _saved(self.folder, name)
        self.found[name] = self._of_first(name, kept)
        if self.found[name] is None and name not in self.skipped:
            result = self._taken(name)
            if self.folder is not None and result is not None:
                result.save(self.folder / name)
            self.found[name] = self._of_first(name, result)
        if name in _PASSES and (sums := self._sums(_PASSES[name])) is not None:
            shutil.rmtree(sums, ignore_errors=True)

    def _taken(self, name: str) -> Any:
        """What a step finds, or None; why it cannot be taken counts, wherever it is seen."""
        steps: dict[str, Callable[[], Any]] = {
            "profile": lambda: self._profile(self.rows, None, _SIGNALS),
            "partition": lambda: detect_scales(profile=self.found["profile"], seed=self.seed),
            "random_profile": lambda: self._control("random_weights", _SIGNALS),
            "random_weights": self._random_weights,
            "shuffled_tokens": lambda: detect_scales(
                profile=self._control("shuffled_tokens", None), seed=self.seed
            ),
            "brittleness": self._brittleness,
            "token_classes": self._token_classes,
            "dissociation": self._dissociation,
            "effects": self._effects,
            "block_effects": self._block_effects,
        }
        result, why, lost = None, "", None
        try:
            if self.is_first or name not in _ALONE:
                result = steps[name]()
        except CannotMeasure as error:
            if name in ("profile", "partition"):
                raise
            why = str(error)
        except PeerError as error:
            lost = error
        said = [json.loads(text) for text in self.processes.texts(json.dumps(why))]
        if any(said):
            self.skipped[name] = next(filter(None, said))
            self._write_index()
            return None
        if lost is not None:
            raise lost
        return result

    def _sums(self, control: Control | None) -> Path | None:
        """Where a pass is written down until its result is there."""
        return None if self.into is None else self.into / f"{control or 'profile'}-sums"

    def _of_first(self, name: str, result: Any) -> Any:
        """What the first process has as the result of a step, in all of them."""
        if self.processes.size == 1:
            return result
        with tempfile.TemporaryDirectory() as folder:
            file, sent = Path(folder) / f"{name}.safetensors", {}
            if self.is_first and result is not None:
                sent["file"] = np.frombuffer(result.save(file).read_bytes(), dtype=np.uint8)
            given = self.processes.give(sent, 0)
            if not given:
                return None
            file.write_bytes(given["file"].tobytes())
            return _KINDS[name].load(file)

    def _profile(
        self, rows: Sequence[Prompt], control: Control | None, signals: Sequence[str] | None
    ) -> LayerProfile:
        return profile_layers(
            self.adapter,
            PromptDataset(rows),
            signals=signals,
            control=control,
            seed=self.seed,
            progress=self.progress,
            process_group=self.group,
            checkpoint=self._sums(control),
        )

    def _control(self, control: Control, signals: Sequence[str] | None) -> LayerProfile:
        rows = self._documents(self.sizes["n_control_documents"], None)
        return self._profile(rows, control, signals)

    def _random_weights(self) -> ScalePartition:
        profile = self.found["random_profile"]
        if profile is None:
            raise CannotMeasure("there is no profile of the twin with random weights")
        return detect_scales(profile=profile, seed=self.seed)

    def _brittleness(self) -> Brittleness:
        return measure_brittleness(
            self.adapter,
            PromptDataset(self._documents(self.sizes["n_documents"], _PERTURBED_LENGTH)),
            self.found["partition"],
            levels=_LEVELS,
            seed=self.seed,
            progress=self.progress,
            process_group=self.group,
        )

    def _token_classes(self) -> TokenClasses:
        rows = self._documents(self.sizes["n_control_documents"], _CLASSES_LENGTH)
        return classify_tokens(
            self.adapter,
            PromptDataset(rows),
            n_tokens=self.sizes["n_tokens"],
            seed=self.seed,
            progress=self.progress,
            process_group=self.group,
        )

    def _dissociation(self) -> Dissociation:
        classes = self.found["token_classes"]
        if classes is None:
            raise CannotMeasure("there are no classes of tokens")
        rows = self._documents(self.sizes["n_control_documents"], _CLASSES_LENGTH)
        partition = self.found["partition"]
        return measure_dissociation(
            self.adapter,
            PromptDataset(rows),
            partition,
            classes,
            progress=self.progress,
            process_group=self.group,
        )

    def _effects(self) -> PerturbationEffects:
        return perturb_scales(
            self.adapter,
            PromptDataset(self._documents(self.sizes["n_documents"], _PERTURBED_LENGTH)),
            self.found["partition"],
            n_controls=_N_CONTROLS,
            seed=self.seed,
            progress=self.progress,
            process_group=self.group,
        )

    def _block_effects(self) -> BlockEffects:
        return block_effects(
            self.adapter,
            PromptDataset(self._documents(self.sizes["n_documents"], _PERTURBED_LENGTH)),
            seed=self.seed,
            progress=self.progress,
            process_group=self.group,
        )

    def _documents(self, count: int, length: int | None) -> list[Prompt]:
        """Some documents, evenly spread: whole, or the beginning of each one's first window."""
        groups = list(dict.fromkeys(row.group for row in self.rows))
        chosen = set(groups[:: max(1, len(groups) // count)][:count])
        if length is None:
            return [row for row in self.rows if row.group in chosen]
        first: dict[Hashable, Prompt] = {}
        for row in self.rows:
            if row.group in chosen:
                first.setdefault(row.group, Prompt(row.tokens[:length], row.group))
        return list(first.values())

    @cached_property
    def identity(self) -> str:
        """Of the weights, the prompts and the settings."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(weight_digest(self.adapter).encode())
        for row in self.rows:
            digest.update(stable_hash(row.tokens.tobytes(), row.group).to_bytes(8, "little"))
        digest.update(repr((sorted(self.sizes.items()), self.seed, _SIGNALS)).encode())
        return digest.hexdigest()

    def _write_index(self) -> None:
        if self.folder is None:
            return
        header = {
            "family": self.family,
            "n_parameters": self.adapter.n_parameters,
            "skipped": self.skipped,
            "identity": self.identity,
        }
        write_result(self.folder / _INDEX, "Analysis", header, {})


def _rows(
    adapter: ModelAdapter, prompts: PromptDataset | Iterable[str] | None, max_length: int
) -> list[Prompt]:
    if isinstance(prompts, PromptDataset):
        return list(as_dataset(prompts, adapter))
    texts = [passage.text for passage in load_passages()] if prompts is None else prompts
    longest = min(max_length, adapter.n_ctx)
    return list(PromptDataset.from_texts(adapter, texts, max_length=longest))


def _saved(folder: Path, name: str) -> Any:
    if not (folder / f"{name}.safetensors").exists():
        return None
    return _KINDS[name].load(folder / name)
