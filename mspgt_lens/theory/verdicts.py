"""Measured results of one model, verdicts on predictions, and the table of both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd

from mspgt_lens.partition import ScalePartition
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.results import Estimate
from mspgt_lens.storage import read_result, write_result

Judgment = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True, eq=False)
class ModelResults:
    """What was measured on one model, for predictions and comparisons.

    Attributes:
        profile: The model's layer profile.
        partition: Its partition into three segments.
        family: What it shares with other models ("Llama"), or None.
        n_parameters: Its size, or None where it is not known.
        random_weights: The partition of its twin with random weights, or None.
        shuffled_tokens: The partition from shuffled text, or None.
        brittleness: Noise shape (``"covariance"``, ``"isotropic"``) to segment to the logarithm of
            the segment's brittleness with its interval, in the same units for all models (see
            :func:`~mspgt_lens.log_brittleness`).
        dissociation: How much more the diagonal of its table of segments by token classes holds
            than both on their own explain (``ScaleByClass.interaction``), or None.
    """

    profile: LayerProfile
    partition: ScalePartition
    family: str | None = None
    n_parameters: int | None = None
    random_weights: ScalePartition | None = None
    shuffled_tokens: ScalePartition | None = None
    brittleness: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    dissociation: Estimate | None = None

    def __post_init__(self) -> None:
        if self.partition.n_blocks != self.profile.n_layers:
            raise ValueError(
                f"ModelResults: partition is of {self.partition.n_blocks} blocks, but the profile "
                f"of {self.profile.model_name} has {self.profile.n_layers}"
            )
        if len(self.partition.boundaries) != 2:
            raise ValueError(
                "ModelResults: partition must place two boundaries, got "
                f"{self.partition.boundaries} for {self.profile.model_name}; leave n_boundaries of "
                "detect_scales at None"
            )
        if self.n_parameters is not None and self.n_parameters < 1:
            raise ValueError(
                f"ModelResults: n_parameters must be positive or None, got {self.n_parameters}"
            )
        frozen = {shape: MappingProxyType(dict(b)) for shape, b in self.brittleness.items()}
        object.__setattr__(self, "brittleness", MappingProxyType(frozen))

    @property
    def name(self) -> str:
        """The model's name."""
        return self.profile.model_name

    @property
    def depths(self) -> tuple[float, ...]:
        """Boundaries as shares of the depth."""
        return tuple(b / self.partition.n_blocks for b in self.partition.boundaries)


@dataclass(frozen=True)
class Verdict:
    """What measured results say about one prediction.

    Attributes:
        name: Short name, such as ``"P1 existence"``.
        statement: The prediction, as it was tested.
        quantity: What ``statistic``, ``interval`` and ``threshold`` are, with their unit.
        statistic: The measured value; None where there is none.
        interval: Its 95% interval over models; None where there is none, or too few models for one.
        threshold: What the interval is held against.
        published: What was published, with its source.
        verdict: ``"supported"`` or ``"refuted"`` only if the whole interval lies on that side of
            the threshold; ``"inconclusive"`` otherwise.
        reason: One sentence.
        n_models: Models that it rests on.
    """

    name: str
    statement: str
    quantity: str
    statistic: float | None
    interval: tuple[float, float] | None
    threshold: float
    published: str
    verdict: Judgment
    reason: str
    n_models: int


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on all predictions, in their order.

    Attributes:
        verdicts: The verdicts; iterate, or take one by its name.
        models: Names of the models.
        thresholds: The thresholds that were set.
        versions: Package versions that the first model's profile was made with.
    """

    verdicts: tuple[Verdict, ...]
    models: tuple[str, ...]
    thresholds: Mapping[str, float]
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("thresholds", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, name: str) -> Verdict:
        """The verdict of this name.

        Raises:
            KeyError: If there is none; the message lists the names.
        """
        for verdict in self.verdicts:
            if verdict.name == name:
                return verdict
        raise KeyError(f"no verdict {name!r}; there are {', '.join(v.name for v in self.verdicts)}")

    def summary(self) -> str:
        """One line per prediction."""
        return "\n".join(f"{v.name}: {v.verdict}. {v.reason}" for v in self.verdicts)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prediction; ``low`` and ``high`` are the interval."""
        rows = []
        for verdict in self.verdicts:
            row = asdict(verdict)
            row["low"], row["high"] = row.pop("interval") or (None, None)
            rows.append(row)
        columns = [f.name for f in fields(Verdict)]
        at = columns.index("interval")
        return pd.DataFrame(rows, columns=[*columns[:at], "low", "high", *columns[at + 1 :]])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the verdicts to one ``.safetensors`` file with a JSON header.

        Args:
            path: Where to write; the suffix is added where it is missing.

        Returns:
            The path that was written.
        """
        header = {
            "verdicts": [asdict(v) for v in self.verdicts],
            "models": list(self.models),
            "thresholds": dict(self.thresholds),
            "versions": dict(self.versions),
        }
        return write_result(path, "Verdicts", header, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Verdicts:
        """Read verdicts that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no saved verdicts.
        """
        header, _ = read_result(path, "Verdicts")

        def one(values: dict[str, Any]) -> Verdict:
            interval = values["interval"]
            return Verdict(**values | {"interval": None if interval is None else tuple(interval)})

        values: dict[str, Any] = {f.name: header[f.name] for f in fields(cls)}
        values["verdicts"] = tuple(one(v) for v in values["verdicts"])
        values["models"] = tuple(values["models"])
        return cls(**values)
