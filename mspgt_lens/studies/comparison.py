"""Several models side by side: boundaries, segments, brittleness, and what explains them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from mspgt_lens.ambient import in_own_state
from mspgt_lens.results import Estimate
from mspgt_lens.storage import read_result, write_result
from mspgt_lens.theory.dominance import MIN_FAMILY, VarianceShares, depth_variation, variance_shares
from mspgt_lens.theory.judging import by_family
from mspgt_lens.theory.partition_predictions import depths_and_errors
from mspgt_lens.theory.verdicts import ModelResults

_TABLES = ("models", "segments", "families", "brittleness", "ratios", "curves")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several models side by side; tables of plain columns, intervals of 95%.

    Attributes:
        models: One row per model: ``model, family, n_parameters, n_blocks, first, second`` (the
            boundaries), their depths as shares of the blocks (``first_depth, second_depth``) with
            ``_low`` and ``_high``, ``p_value`` and ``n_boundaries`` (how many the data support).
        segments: One row per model and segment: ``model, segment, start, blocks, share``.
        families: One row per family of at least two models: ``family, models, cv, low, high`` of
            relative boundary depth (see :func:`~mspgt_lens.depth_variation`).
        shares: Variance of boundary depth by family against size, or None where families or sizes
            are too few or not known.
        brittleness: One row per model, noise shape and segment, not in logarithms.
        ratios: Ratios of brittleness under each noise shape: between segments of a model
            (``kind`` is ``"segments"``), and of the local segment between models (``"models"``).
            Their intervals take both as measured independently.
        curves: All curves over relative depth: as ``LayerProfile.to_dataframe`` with ``depth``
            (0 is the embedding, 1 the last site).
        versions: Package versions that the first model's profile was made with.
    """

    models: pd.DataFrame
    segments: pd.DataFrame
    families: pd.DataFrame
    shares: VarianceShares | None
    brittleness: pd.DataFrame
    ratios: pd.DataFrame
    curves: pd.DataFrame
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", MappingProxyType(dict(self.versions)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, with the length and brittleness of its segments as columns."""
        wide = self.models.merge(
            self.segments.pivot(index="model", columns="segment", values="share")
            .add_prefix("share_")
            .reset_index(),
            on="model",
        )
        if len(self.brittleness):
            table = self.brittleness.assign(
                column="brittleness_"
                + self.brittleness["shape"]
                + "_"
                + self.brittleness["segment"]
            )
            columns = table.pivot(index="model", columns="column", values="value").reset_index()
            wide = wide.merge(columns, on="model", how="left")
        return wide.rename_axis(columns=None)

    def summary(self) -> str:
        """The comparison in words."""
        lines = [
            f"{row['model']}: {row['n_blocks']} blocks, boundaries at {row['first']} and "
            f"{row['second']} ({100 * row['first_depth']:.0f}% and "
            f"{100 * row['second_depth']:.0f}% of the depth"
            + (")." if row["n_boundaries"] == 2 else "; not supported as such).")
            for row in records(self.models)
        ]
        lines += [
            f"{row['family']}: boundary depth varies by CV {row['cv']:.3f} ({row['low']:.3f} to "
            f"{row['high']:.3f}) over {row['models']} models."
            for row in records(self.families)
        ]
        if self.shares is not None:
            s = self.shares
            lines.append(
                f"Family explains {100 * s.family:.0f}% of the variance beyond size (permutation p "
                f"{s.p_family:.3f}), size {100 * s.size:.0f}% beyond family (p {s.p_size:.3f})."
            )
        between = records(self.ratios[self.ratios["kind"] == "models"])
        for shape in dict.fromkeys(row["shape"] for row in between):
            # Every pair is there in both orders.
            row = max((r for r in between if r["shape"] == shape), key=lambda r: float(r["ratio"]))
            lines.append(
                f"Under {shape} noise the local segment of {row['of']} is {row['ratio']:.3g} times "
                f"({row['low']:.3g} to {row['high']:.3g}) as brittle as that of {row['over']}."
            )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the comparison to one ``.safetensors`` file with a JSON header.

        Args:
            path: Where to write; the suffix is added where it is missing.

        Returns:
            The path that was written.
        """
        header: dict[str, Any] = {
            name: {
                column: [None if pd.isna(x) else x for x in values.tolist()]
                for column, values in getattr(self, name).items()
            }
            for name in _TABLES
        }
        header["shares"] = None if self.shares is None else asdict(self.shares)
        header["versions"] = dict(self.versions)
        return write_result(path, "Comparison", header, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a comparison that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no saved comparison.
        """
        header, _ = read_result(path, "Comparison")
        shares = header["shares"]
        if shares is not None:
            difference = shares["difference"]
            difference["warnings"] = tuple(difference["warnings"])
            shares = VarianceShares(**shares | {"difference": Estimate(**difference)})
        tables = {name: pd.DataFrame(header[name]) for name in _TABLES}
        return cls(**tables, shares=shares, versions=header["versions"])


@in_own_state
def compare_models(results: Iterable[ModelResults]) -> Comparison:
    """Several models side by side, on relative depth.

    Args:
        results: Results of at least one model, all of different names.

    Raises:
        ValueError: If there are none, or two of the same name.
    """
    models = list(results)
    names = [one.name for one in models]
    if not models or len(set(names)) < len(names):
        raise ValueError(
            f"results must be of at least one model and all of different names, got {names}"
        )
    brittleness = _brittleness(models)
    return Comparison(
        models=pd.DataFrame([_model(one) for one in models]),
        segments=pd.DataFrame(
            [
                {
                    "model": one.name,
                    "segment": segment,
                    "start": blocks.start,
                    "blocks": len(blocks),
                    "share": len(blocks) / one.partition.n_blocks,
                }
                for one in models
                for segment, blocks in one.partition.segments.items()
            ]
        ),
        families=_family_table(models),
        shares=_shares(models),
        brittleness=brittleness,
        ratios=_ratios(models),
        curves=pd.concat([_curves(one) for one in models], ignore_index=True),
        versions=models[0].profile.versions,
    )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by column."""
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return rows


def _model(one: ModelResults) -> dict[str, Any]:
    partition, n_blocks = one.partition, one.partition.n_blocks
    row: dict[str, Any] = {
        "model": one.name,
        "family": one.family,
        "n_parameters": one.n_parameters,
        "n_blocks": n_blocks,
    }
    row |= dict(zip(("first", "second"), partition.boundaries, strict=True))
    for name, depth, (low, high) in zip(
        ("first_depth", "second_depth"), one.depths, partition.intervals, strict=True
    ):
        row |= {name: depth, f"{name}_low": low / n_blocks, f"{name}_high": high / n_blocks}
    return row | {"p_value": partition.p_value, "n_boundaries": partition.n_boundaries}


def _family_table(models: Sequence[ModelResults]) -> pd.DataFrame:
    rows = []
    for family, members in by_family(models).items():
        if len(members) > 1:
            cv = depth_variation(*depths_and_errors(members))
            rows.append((family, len(members), cv.value, cv.low, cv.high))
    return pd.DataFrame(rows, columns=["family", "models", "cv", "low", "high"])


def _shares(models: Sequence[ModelResults]) -> VarianceShares | None:
    """None where they are not defined, as the attribute says."""
    known = [one for one in models if one.n_parameters is not None]
    families = [members for members in by_family(known).values() if len(members) >= MIN_FAMILY]
    used = list(itertools.chain(*families))
    sizes = [one.n_parameters or 0 for one in used]
    if len(families) < 2 or len(set(sizes)) < 2:
        return None
    depths, _ = depths_and_errors(used)
    if not np.ptp(depths, axis=0).any():
        return None
    return variance_shares(depths, [str(one.family) for one in used], sizes)


def _brittleness(models: Sequence[ModelResults]) -> pd.DataFrame:
    rows = [
        (one.name, one.family, shape, segment, *np.exp([e.value, e.low, e.high]).tolist())
        for one in models
        for shape, by_segment in one.brittleness.items()
        for segment, e in by_segment.items()
    ]
    columns = ["model", "family", "shape", "segment", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _ratios(models: Sequence[ModelResults]) -> pd.DataFrame:
    rows = []
    for shape in sorted({shape for one in models for shape in one.brittleness}):
        measured = {one.name: one.brittleness.get(shape, {}) for one in models}
        for name, by_segment in measured.items():
            for of, over in itertools.permutations(by_segment, 2):
                ratio = _ratio(by_segment[of], by_segment[over])
                rows.append(("segments", shape, f"{name}, {of}", f"{name}, {over}", *ratio))
        local = {name: b["local"] for name, b in measured.items() if "local" in b}
        for of, over in itertools.permutations(local, 2):
            rows.append(("models", shape, of, over, *_ratio(local[of], local[over])))
    return pd.DataFrame(rows, columns=["kind", "shape", "of", "over", "ratio", "low", "high"])


def _ratio(of: Estimate, over: Estimate) -> tuple[float, float, float]:
    """Ratio with its interval from two logarithms (MOVER, Zou & Donner 2008)."""
    value = of.value - over.value
    below = np.hypot(of.value - of.low, over.high - over.value)
    above = np.hypot(of.high - of.value, over.value - over.low)
    ratio, low, high = np.exp([value, value - below, value + above]).tolist()
    return ratio, low, high


def _curves(one: ModelResults) -> pd.DataFrame:
    table = one.profile.to_dataframe()
    of_block = table["quantity"].isin(list(one.profile.signals))
    # A signal belongs to the middle of its block, between two sites.
    table["depth"] = (table["site"] + 0.5 * of_block) / one.profile.n_layers
    table["family"] = one.family
    return table
