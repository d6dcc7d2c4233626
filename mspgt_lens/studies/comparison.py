"""Several models side by side: boundaries, segments, brittleness, and what explains them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted
from mspgt_lens.estimates import Estimate
from mspgt_lens.partition import SCALES
from mspgt_lens.theory.dominance import MIN_FAMILY, VarianceShares, depth_variation, variance_shares
from mspgt_lens.theory.judging import by_family
from mspgt_lens.theory.partition_predictions import depths_and_errors
from mspgt_lens.theory.verdicts import ModelResults

_COLUMNS = [
    *("model", "family", "quantity", "segment", "shape"),
    *("value", "low", "high", "unit", "p_value"),
]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Several models side by side; tables of plain columns, intervals of 95%.

    Attributes:
        models: One row per model: ``model, family, n_parameters, n_layers, first, second`` (the
            boundaries), their depths as shares of the blocks (``first_depth, second_depth``) with
            ``_low`` and ``_high``, ``p_value`` and ``n_boundaries`` (how many the data support).
        segments: One row per model and segment: ``model, segment, start, blocks, share``.
        families: One row per family of at least two models: ``family, models, cv, low, high`` of
            relative boundary depth (see :func:`~mspgt_lens.theory.depth_variation`).
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

    def heading(self) -> str:
        """How many models."""
        return f"Comparison of {counted(len(self.models), 'model')}"

    def rows(self) -> Rows:
        """Boundaries of every model."""
        rows: Rows = [("model", "blocks", "boundaries", "depths", "supported", "p of two")]
        for row in records(self.models):
            rows.append(
                (
                    str(row["model"]),
                    str(row["n_layers"]),
                    f"{row['first']}, {row['second']}",
                    f"{row['first_depth']:.0%}, {row['second_depth']:.0%}",
                    str(row["n_boundaries"]),
                    f"{row['p_value']:.3g}",
                )
            )
        return rows

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and number: boundaries, segments and brittleness.

        Returns:
            Columns ``model, family, quantity, segment, shape, value, low, high, unit, p_value``. A
            ``"boundary"`` (share of the depth) is named by the segment that begins there, and its
            p-value is that of two boundaries; then come the ``"length"`` of every segment and its
            ``"brittleness"``.
        """
        rows: list[dict[str, Any]] = []
        for row in records(self.models):
            about = {"model": row["model"], "family": row["family"], "quantity": "boundary"}
            for segment, name in zip(SCALES[1:], ("first_depth", "second_depth"), strict=True):
                ends = {"low": row[f"{name}_low"], "high": row[f"{name}_high"]}
                tested = {"p_value": row["p_value"], "unit": "share of the depth"}
                rows.append({**about, "segment": segment, "value": row[name], **ends, **tested})
        families = dict(zip(self.models["model"], self.models["family"], strict=True))
        for row in records(self.segments):
            about = {"model": row["model"], "family": families[row["model"]], "quantity": "length"}
            value = {"value": row["share"], "unit": "share of the depth"}
            rows.append({**about, "segment": row["segment"], **value})
        for row in records(self.brittleness):
            rows.append({**row, "quantity": "brittleness", "unit": "nats per squared level"})
        table = pd.DataFrame(rows).reindex(columns=_COLUMNS)
        return table.assign(shape=table["shape"].fillna(""))

    def findings(self) -> list[str]:
        """The comparison in words."""
        lines = [
            f"{row['model']}: {row['n_layers']} blocks, boundaries at {row['first']} and "
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
            lines += self.shares.findings()[:1]
        between = records(self.ratios[self.ratios["kind"] == "models"])
        for shape in dict.fromkeys(row["shape"] for row in between):
            # Every pair is there in both orders.
            row = max((r for r in between if r["shape"] == shape), key=lambda r: float(r["ratio"]))
            lines.append(
                f"Under {shape} noise the local segment of {row['of']} is {row['ratio']:.3g} times "
                f"({row['low']:.3g} to {row['high']:.3g}) as brittle as that of {row['over']}."
            )
        return lines


@in_own_state
def compare_models(results: Iterable[ModelResults]) -> Comparison:
    """Several models side by side, on relative depth.

    Args:
        results: Results of at least one model, all of different names.

    Returns:
        Boundaries, segments, brittleness and curves of all models as tables.

    Raises:
        ValueError: If there are none, or two of the same name.

    Example:
        >>> comparison = ml.studies.compare_models(ml.synthetic.synthetic_models(2, 3))
        >>> len(comparison.models)
        6
    """
    models = list(results)
    names = [model.name for model in models]
    if not models or len(set(names)) < len(names):
        raise ValueError(
            f"results must be of at least one model and all of different names, got {names}"
        )
    brittleness = _brittleness(models)
    return Comparison(
        models=pd.DataFrame([_model(model) for model in models]),
        segments=pd.DataFrame(
            [
                {
                    "model": model.name,
                    "segment": segment,
                    "start": blocks.start,
                    "blocks": len(blocks),
                    "share": len(blocks) / model.partition.n_layers,
                }
                for model in models
                for segment, blocks in model.partition.segments.items()
            ]
        ),
        families=_family_table(models),
        shares=_shares(models),
        brittleness=brittleness,
        ratios=_ratios(models),
        curves=pd.concat([_curves(model) for model in models], ignore_index=True),
        versions=models[0].profile.versions,
    )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by column."""
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return rows


def _model(model: ModelResults) -> dict[str, Any]:
    partition, n_layers = model.partition, model.partition.n_layers
    row: dict[str, Any] = {
        "model": model.name,
        "family": model.family,
        "n_parameters": model.n_parameters,
        "n_layers": n_layers,
    }
    row |= dict(zip(("first", "second"), partition.boundaries, strict=True))
    for name, depth, (low, high) in zip(
        ("first_depth", "second_depth"), model.depths, partition.intervals, strict=True
    ):
        row |= {name: depth, f"{name}_low": low / n_layers, f"{name}_high": high / n_layers}
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
    known = [model for model in models if model.n_parameters is not None]
    families = [members for members in by_family(known).values() if len(members) >= MIN_FAMILY]
    used = list(itertools.chain(*families))
    sizes = [model.n_parameters or 0 for model in used]
    if len(families) < 2 or len(set(sizes)) < 2:
        return None
    depths, _ = depths_and_errors(used)
    if not np.ptp(depths, axis=0).any():
        return None
    return variance_shares(depths, [str(model.family) for model in used], sizes)


def _brittleness(models: Sequence[ModelResults]) -> pd.DataFrame:
    rows = [
        (model.name, model.family, shape, segment, *np.exp([e.value, e.low, e.high]).tolist())
        for model in models
        for shape, by_segment in model.brittleness.items()
        for segment, e in by_segment.items()
    ]
    columns = ["model", "family", "shape", "segment", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _ratios(models: Sequence[ModelResults]) -> pd.DataFrame:
    rows = []
    for shape in sorted({shape for model in models for shape in model.brittleness}):
        measured = {model.name: model.brittleness.get(shape, {}) for model in models}
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


def _curves(model: ModelResults) -> pd.DataFrame:
    table = model.profile.to_dataframe()
    n_layers = model.profile.n_layers
    of_block = table["quantity"].isin(
        [name for name, curve in model.profile.signals.items() if len(curve) == n_layers]
    )
    # A signal of blocks belongs to the middle of its block, between two sites.
    table["depth"] = (table["site"] + 0.5 * of_block) / n_layers
    table["family"] = model.family
    return table
