"""Tables of curves from elsewhere: what numbers the rows, and what is no number."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mspgt_lens.cli.reading import check_file, read_lines
from mspgt_lens.scales.segments import Rows

# Names of a column that numbers the rows, with what it says a row is; "" is an index that pandas
# wrote without a name.
_INDEX: dict[str, Rows | None] = {
    "site": "sites",
    "sites": "sites",
    "block": "blocks",
    "blocks": "blocks",
    "layer": None,
    "layers": None,
    "": None,
}
# More than any model has; the test would take hours.
_MOST_ROWS = 500


def read_curves(path: Path, rows: Rows | None = None) -> tuple[pd.DataFrame, Rows]:
    """The curves of a comma-separated table, and what its rows are.

    A column called site, block or layer, or a first column without a name, numbers the rows and is
    no curve.

    Args:
        path: The table, with a header.
        rows: What a row is; None for what the numbering column is called, or blocks.

    Returns:
        One column per curve, and ``"blocks"`` or ``"sites"``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table, has more rows than any model, rows are not numbered from
            0 on, or a cell is no finite number.
    """
    check_file("--curves", path)
    reader = csv.reader(read_lines("--curves", path))
    try:
        lines = [(reader.line_num, [c.strip() for c in cells]) for cells in reader if any(cells)]
    except csv.Error as error:
        raise ValueError(
            f"--curves: line {reader.line_num} of {path} is no line of a table ({error})"
        ) from error
    if len(lines) < 2:
        raise ValueError(f"--curves: {path} must hold a header and a line per row, got no row")
    if len(lines) - 1 > _MOST_ROWS:
        raise ValueError(
            f"--curves: {path} must have a row per block or site, {_MOST_ROWS} at most, got "
            f"{len(lines) - 1:,}: give one number per layer, such as the mean over tokens"
        )
    header = lines[0][1]
    _check_header(path, header)
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"--curves: line {number} of {path} has {len(cells)} cells where the header has "
                f"{len(header)}"
            )
    columns = {
        name: [_number(path, line, name, cells[i]) for line, cells in lines[1:]]
        for i, name in enumerate(header)
    }
    index = next((name for name in header if name.lower() in _INDEX), None)
    told = None if index is None else _INDEX[index.lower()]
    if rows is not None and told is not None and rows != told:
        raise ValueError(
            f"--rows {rows}, but the column {index!r} of {path} numbers {told}: leave --rows out, "
            "or call the column what it is"
        )
    if index is not None:
        _check_index(path, index, columns.pop(index))
    if not columns:
        raise ValueError(f"--curves: {path} holds no curve beside {index!r}")
    return pd.DataFrame(columns), rows or told or "blocks"


def _check_header(path: Path, header: Sequence[str]) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise ValueError(
            f"--curves: columns of {path} must be separated by commas, got the header {header[0]!r}"
        )
    unnamed = [i + 1 for i, name in enumerate(header) if i and not name]
    if unnamed:
        raise ValueError(f"--curves: column {unnamed[0]} of {path} has no name")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"--curves: {path} has two columns called {twice[0]!r}: rename one")
    numbering = [name for name in header if name.lower() in _INDEX]
    if len(numbering) > 1:
        raise ValueError(
            f"--curves: {' and '.join(map(repr, numbering))} of {path} number the rows: keep one"
        )


def _number(path: Path, line: int, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        said = f"got {cell!r}: leave columns of words out" if cell else "got nothing"
    else:
        if math.isfinite(value):
            return value
        said = f"got {cell}"
    raise ValueError(
        f"--curves: column {name!r} in line {line} of {path} must be a finite number, {said}"
    )


def _check_index(path: Path, name: str, given: Sequence[float]) -> None:
    label = repr(name) if name else "the first, unnamed column"
    expected = np.arange(len(given))
    wrong = np.flatnonzero(np.array(given) != expected)
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"--curves: {label} of {path} must number the rows 0, 1, 2 ... without gap, repetition "
            f"or change of order, got {given[at]:g} where {at} is due: sort the table, keep one "
            "row for each, and count from 0 as blocks and sites are counted"
        )
