"""What every result can do: say what it found, become a table, be saved and be drawn."""

from __future__ import annotations

import importlib
import os
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
from jinja2 import Environment
from torch import Tensor

from mspgt_lens.storage import decoded_fields, encode, read_result, write_result

Rows = list[tuple[str, ...]]
_Kept = TypeVar("_Kept", bound="Result")

# The columns of all tables of results, with what each means.
COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "result": "which part of an analysis the row is from",
        "model": "the model's name",
        "family": "what the model shares with others",
        "step": "the checkpoint in training",
        "condition": "the prompts, seed or bands",
        "prediction": "the prediction's short name",
        "theory": "whose prediction it is",
        "quantity": "what `value` is",
        "scale": "local, intermediate or global; empty where there is none",
        "segment": "the segment of blocks; empty where there is none",
        "class": "the class of tokens",
        "perturbation": "what was done",
        "shape": "the shape of the noise",
        "mode": "how noise is shared out over a segment's blocks",
        "level": "the noise level",
        "site": "the residual stream before this block; after the last block for the last",
        "block": "the block; missing where the row is not of one",
        "point": "where on a curve",
        "beta": "the weight of relevance against rate",
        "distortion": "how far predictions may move, nats of KL",
        "rate": "what a channel passes on, nats per token",
        "depth": "share of the depth, 0 to 1",
        "prompt": "the prompt's number",
        "position": "the token's place in its prompt; -1 for the last",
        "token": "the token",
        "context": "tokens of context that the model was given",
        "head": "the attention head",
        "place": "the kind of activation",
        "value": "the number",
        "low": "lower end of its 95% interval",
        "high": "upper end of its 95% interval",
        "unit": "unit of the three",
        "p_value": "p-value, corrected where several are tested",
        "control": "the same for controls: their middle",
        "control_low": "lower end over controls",
        "control_high": "upper end over controls",
        "p_control": "rank of the value among controls",
        "delta": "Cliff's delta",
        "delta_low": "lower end of its 95% interval",
        "delta_high": "upper end of its 95% interval",
        "clean": "the mean without intervention",
        "metric": "the metric's mean, in its own unit",
        "relative": "the value over its mean over classes",
        "strength": "the perturbation's strength",
        "kl": "how far predictions move, nats per token",
        "predicted": "whether MSPGT's first version expects an effect",
        "threshold": "what the interval is held against",
        "verdict": "supported, refuted or inconclusive",
        "reason": "why",
        "statement": "the prediction in words",
        "published": "what was published",
        "n_models": "models that it rests on",
        "n_tokens": "tokens that it rests on",
        "n_pairs": "pairs that it rests on",
        "n_undefined": "pairs that were left out",
    }
)
_MOST_LINES = 12
_MOST_CHARACTERS = 1000
_WIDTH = 96
_MOST_ROWS = 6
_CELL = 30
_HTML = Environment(autoescape=True).from_string(
    """<div style="overflow-x:auto"><p><b dir="auto">{{ heading }}</b></p>
{%- if rows %}<table><thead><tr>
{%- for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows[1:] %}<tr>{% for cell in row %}<td dir="auto">{{ cell }}</td>{% endfor %}
</tr>{% endfor %}</tbody></table>{% endif %}
{%- for line in findings %}<p dir="auto">{{ line }}</p>{% endfor %}
{%- for note in notes %}
<p dir="auto" style="border-left:4px solid #d55e00;padding-left:8px">{{ note }}</p>{% endfor %}
</div>"""
)


class Result(ABC):
    """A frozen dataclass that says what it found, with its caveats, and can be kept.

    Arrays are read-only copies, mappings cannot be changed, and results are compared by value.
    Arrays must be finite, but where a class says that NaN stands for what is undefined.

    A class gives :meth:`heading`, :meth:`to_dataframe`, and :meth:`findings` or :meth:`rows`; all
    else follows from its fields.
    """

    nan_is_undefined: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, item.name, self._frozen(getattr(self, item.name), item.name))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader has to know before trusting the result."""
        return ()

    @abstractmethod
    def heading(self) -> str:
        """What this is, and of what, in one line.

        Returns:
            One line, without its end.
        """

    def findings(self) -> list[str]:
        """What was found, in sentences; empty where the numbers of :meth:`rows` say it.

        Returns:
            Sentences, each a line of its own.
        """
        return []

    def rows(self) -> Rows:
        """The numbers to look at first, as text: a header row, then the others.

        Returns:
            A header row, then the others, all as long as the header; empty where there is no table.
        """
        return []

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a tidy table; its columns are among ``COLUMNS``.

        Returns:
            One row per number, with its interval and unit where it has them.
        """

    def summary(self) -> str:
        """What was found in words and numbers, and every caveat.

        Returns:
            The heading, the table of :meth:`rows`, :meth:`findings` and :attr:`warnings`, line by
            line.
        """
        notes = [f"Note: {note}" for note in self.warnings]
        table = aligned(self.rows()).splitlines()
        return "\n".join([self.heading(), *table, *self.findings(), *notes])

    def plot(self, **options: Any) -> Any:
        """The figure of this kind of result, a plotly ``Figure``; nothing is shown.

        Args:
            **options: Those of the kind's function in ``mspgt_lens.plots``.

        Returns:
            The figure, a plotly ``Figure``.
        """
        # What computes must not import plotting, and need not before a figure is asked for.
        return importlib.import_module("mspgt_lens.plots.registry").draw(self, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one ``.safetensors`` file with a JSON header.

        Args:
            path: Where to write; the suffix is added where it is missing.

        Returns:
            The path that was written.
        """
        arrays: dict[str, np.ndarray] = {}
        return write_result(path, type(self).__name__, encode(self, "", arrays), arrays)

    @classmethod
    def load(cls: type[_Kept], path: str | os.PathLike[str]) -> _Kept:
        """Read what :meth:`save` wrote.

        Args:
            path: What :meth:`save` returned; the suffix may be left out.

        Returns:
            A result that is equal to the one that was saved.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds something else.
        """
        header, arrays = read_result(path, cls.__name__)
        try:
            return cls(**decoded_fields(cls, header, arrays))
        # Another version of the class, or a file that was made by hand.
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"path: {path} does not hold what a {cls.__name__} of this version is made of "
                f"({type(error).__name__}: {error}); read it with the version that wrote it, or "
                "measure again"
            ) from error

    def __repr__(self) -> str:
        lines = _wrapped(self.heading())
        lines += [
            textwrap.shorten(x, _WIDTH, placeholder=" ...") if len(x) > _WIDTH else x
            for x in aligned(_short(self.rows())).splitlines()
        ]
        for finding in self.findings():
            lines += _wrapped(finding)
        caveat = _caveat(self.warnings)
        shown = _fitting(lines, _MOST_LINES - len(caveat), _MOST_CHARACTERS - sum(map(len, caveat)))
        return "\n".join([*shown, *caveat])

    def _repr_html_(self) -> str:
        return _HTML.render(
            heading=self.heading(),
            rows=_short(self.rows()),
            findings=self.findings(),
            notes=self.warnings,
        )

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [item.name for item in fields(self)]  # type: ignore[arg-type]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> str:
        raise TypeError(
            f"a {type(self).__name__} is not pickled: write it with save(path) and read it with "
            f"{type(self).__name__}.load(path)"
        )

    def _frozen(self, value: Any, name: str) -> Any:
        if isinstance(value, np.ndarray):
            copy = np.array(value)
            if not (self.nan_is_undefined or np.isfinite(copy).all()):
                raise ValueError(f"{type(self).__name__}: {name} must be finite")
            copy.flags.writeable = False
            return copy
        if isinstance(value, Mapping):
            return MappingProxyType(
                {k: self._frozen(v, f"{name}[{k!r}]") for k, v in value.items()}
            )
        return value


def tidy(columns: Mapping[str, Any], length: int | None = None) -> pd.DataFrame:
    """A table from columns and from single values that stand in every row."""
    return pd.DataFrame(dict(columns), index=None if length is None else range(length))


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as lines of text, column under column."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def interval(value: float, low: float, high: float) -> str:
    """A number with its interval, as text."""
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def named(name: str) -> str:
    """`` of NAME``, or nothing where there is no name."""
    return f" of {name}" if name else ""


def counted(number: int, thing: str) -> str:
    """A number of things, in words: ``1 block``, ``2 blocks``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _short(rows: Rows) -> Rows:
    """The first rows, their cells cut, with a row that says how many more there are."""
    cut = [tuple(c if len(c) <= _CELL else f"{c[: _CELL - 3]}..." for c in row) for row in rows]
    left = len(cut) - 1 - _MOST_ROWS
    if left <= 0:
        return cut
    return [*cut[: 1 + _MOST_ROWS], (f"... {left} more", *[""] * (len(cut[0]) - 1))]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, subsequent_indent="  ") or [""]


def _caveat(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    more = f" (and {len(notes) - 1} more in .warnings)" if len(notes) > 1 else ""
    return [
        textwrap.shorten(f"Note: {notes[0]}", 2 * _WIDTH - len(more), placeholder=" ...") + more
    ]


def _fitting(lines: list[str], most_lines: int, most_characters: int) -> list[str]:
    """As many lines as fit, with one that says where the rest is."""
    rest = "... (the rest: summary())"
    total = 0
    for number, line in enumerate(lines):
        total += len(line) + 1
        last = number == len(lines) - 1
        if total + (0 if last else len(rest) + 1) > most_characters or (
            number + (0 if last else 1) >= most_lines
        ):
            return [*lines[:number], rest]
    return lines


def _same(own: Any, other: Any) -> bool:
    if isinstance(own, np.ndarray | Tensor):
        if type(own) is not type(other):
            return False
        a, b = np.asarray(own), np.asarray(other)
        return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f"))
    if isinstance(own, pd.DataFrame):
        return isinstance(other, pd.DataFrame) and own.equals(other)
    if isinstance(own, Mapping):
        return (
            isinstance(other, Mapping)
            and own.keys() == other.keys()
            and all(_same(value, other[key]) for key, value in own.items())
        )
    # JSON knows lists only.
    if isinstance(own, tuple | list | range):
        return (
            isinstance(other, tuple | list | range)
            and len(own) == len(other)
            and all(map(_same, own, other))
        )
    return bool(own == other)
