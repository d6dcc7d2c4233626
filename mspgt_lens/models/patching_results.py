"""TransformerLens's own results of patching sweeps: their values cell by cell, and back."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

BLOCK_PLACES = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
HEAD_PLACES = ("z", "q", "k", "v")
# In results that hold several places, keys and values are filled up with zeros where heads share
# them, and nothing tells these from measured ones.
_FILLED_UP = ("k", "v")


@dataclass(frozen=True, eq=False)
class SweptValues:
    """One metric after each patch of a sweep.

    Attributes:
        metric_name: The metric's name.
        values: Shape ``[pair, block, pos]``, or ``[pair, block, pos, head]`` for single heads.
        positions: The columns that were patched; -1 stands for the last.
        baseline: The metric without a patch, or None where it is not known.
    """

    metric_name: str
    values: Float[np.ndarray, "pair *cell"]
    positions: Int[np.ndarray, " pos"]
    baseline: Float[np.ndarray, " pair"] | None


def read_patching_result(result: Any, place: str, metric: str | None) -> SweptValues:
    """The values of a ``PatchingResult``.

    Args:
        result: From a sweep with ``reduce="none"``.
        place: What was patched, or which part of a result that holds several.
        metric: Which metric, where there are several.

    Raises:
        ImportError: If this TransformerLens has no such results.
        TypeError: If it is none.
        ValueError: If it holds means only, another metric or place, or not every block.
    """
    kind = _result_class()
    if not isinstance(result, kind):
        raise TypeError(
            "result must be a PatchingResult of transformer_lens.patching, got "
            f"{type(result).__name__}; run the sweep with reduce='none', baseline=True and a "
            "metric that returns one value per prompt"
        )
    if place not in BLOCK_PLACES + HEAD_PLACES:
        raise ValueError(
            f"place must be one of {', '.join(BLOCK_PLACES + HEAD_PLACES)}, got {place!r}"
        )
    if result.reduced:
        raise ValueError(
            "result must hold one value per prompt, got means, which no interval or p-value can be "
            "told from; run the sweep with reduce='none' and a metric that returns one value per "
            "prompt"
        )
    one = result[_metric_name(result, metric)]
    n_pairs = one.values.shape[-1]
    by_cell = one.values.detach().cpu().double().reshape(-1, n_pairs).numpy()
    table = one.index_df.reset_index(drop=True).rename(columns={"head_index": "head"})
    if "patch_type" in table:
        table = table[table.pop("patch_type") == _part(one.patch_type_names or [], place)]
    rows, positions = _grid(table, place)
    baseline = None if one.baseline is None else one.baseline.detach().cpu().double().numpy()
    return SweptValues(one.metric_names[0], np.moveaxis(by_cell[rows], -1, 0), positions, baseline)


def patching_result(swept: SweptValues) -> Any:
    """A ``PatchingResult`` of these values, in float64.

    Raises:
        ImportError: If this TransformerLens has no such results.
    """
    kind = _result_class()
    shape = swept.values.shape[1:]
    names = ["layer", "pos", "head"][: len(shape)]
    table = pd.DataFrame(np.argwhere(np.ones(shape)), columns=names)
    whole = np.array_equal(swept.positions, np.arange(shape[1]))
    table["pos"] = swept.positions[table["pos"]]
    values = torch.from_numpy(np.moveaxis(swept.values, 0, -1).copy())
    return kind(
        # An axis of positions counts from 0; others are listed cell by cell.
        values=values if whole else values.reshape(len(table), -1),
        axis_names=names if whole else [],
        index_df=table,
        metric_names=[swept.metric_name],
        reduced=False,
        baseline=None if swept.baseline is None else torch.from_numpy(swept.baseline.copy()),
    )


def _result_class() -> Any:
    try:
        from transformer_lens.patching import PatchingResult
    except ImportError as error:
        raise ImportError(
            "patching results of TransformerLens need version 4.2 or later, which has "
            "transformer_lens.patching.PatchingResult; this is "
            f"{metadata.version('transformer-lens')}: install a later one, or sweep with "
            "mspgt_lens.patch_layers, which needs none"
        ) from error
    return PatchingResult


def _metric_name(result: Any, metric: str | None) -> str:
    names: list[str] = result.metric_names
    if metric is None and len(names) == 1:
        return names[0]
    if metric not in names:
        raise ValueError(f"metric must be one of the result's, {', '.join(names)}, got {metric!r}")
    return metric


def _part(names: list[str], place: str) -> int:
    """The number of a place in a result that holds several."""
    name = "out" if place == "z" else place
    if name not in names or name in _FILLED_UP:
        usable = ["z" if n == "out" else n for n in names if n not in (*_FILLED_UP, "pattern")]
        raise ValueError(
            f"place must be one of {', '.join(usable)} in a result that holds several places, got "
            f"{place!r}; give the result of its own sweep, such as get_act_patch_attn_head_k_by_pos"
        )
    return names.index(name)


def _grid(
    table: pd.DataFrame, place: str
) -> tuple[Int[np.ndarray, "*cell"], Int[np.ndarray, " pos"]]:
    """The row of values that holds each cell, and the positions in the order they were swept."""
    axes = ["layer", "pos", "head"] if place in HEAD_PLACES else ["layer", "pos"]
    if sorted(table.columns) != sorted(axes):
        raise ValueError(
            f"result must have the axes {', '.join(axes)} where {place} was patched, got "
            f"{', '.join(map(str, table.columns)) or 'none'}; sweep by position, as "
            "get_act_patch_resid_pre and get_act_patch_attn_head_out_by_pos do"
        )
    positions = table["pos"].drop_duplicates().to_numpy(dtype=np.int64)
    if positions.min() < -1:
        raise ValueError(
            f"result must be of columns from 0, or of -1 for the last, got pos {positions.min()}"
        )
    numbers = {
        "layer": table["layer"],
        "pos": table["pos"].map({int(p): i for i, p in enumerate(positions)}),
        "head": table.get("head"),
    }
    cells = np.stack([np.asarray(numbers[axis], dtype=np.int64) for axis in axes])
    if cells.min() < 0:
        raise ValueError("result must number blocks and heads from 0")
    rows = np.full(cells.max(axis=1) + 1, -1)
    rows[tuple(cells)] = table.index
    if len(table) != rows.size or (rows < 0).any():
        raise ValueError(
            f"result must hold every combination of {', '.join(axes)} once, from block 0 on; it "
            f"holds {len(table)} cells, and up to the last of each there are {rows.size}"
        )
    return rows, positions
