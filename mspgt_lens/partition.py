"""The partition of a model's blocks into scales, with the evidence for it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.contract import Result, Rows, counted, named, tidy

SCALES = ("local", "intermediate", "global")


class Support(NamedTuple):
    """What the answer owes to one signal.

    Attributes:
        weight: The signal's share of the evidence for the boundaries; all shares add up to 1.
        p_value: p-value of any boundary without this signal; None if it is the only one, or one of
            more than 40, of which none decides.
        boundaries: The best boundaries without it; None if it is the only one.
    """

    weight: float
    p_value: float | None
    boundaries: tuple[int, ...] | None


class Boundary(NamedTuple):
    """One sharp change over depth.

    Attributes:
        block: The block that makes it: the first whose value, or whose rate of change, is new.
        kind: ``"jump"`` (the level is new), ``"bend"`` (the rate of change is), or ``"edge"`` (what
            the first or the last block changes).
        signals: The signals that share it.
        size: Its median size in them, in units of a typical block's change.
        p_value: Of the test that found it; None at an edge, which is not tested.
        width: Over how many blocks in a row a jump spreads, ``block`` among them; 1 for the others.
    """

    block: int
    kind: str
    signals: tuple[str, ...]
    size: float
    p_value: float | None
    width: int = 1


def segment_names(n_segments: int) -> tuple[str, ...]:
    """Local, Intermediate and Global where there are three; plain numbers otherwise."""
    if n_segments == len(SCALES):
        return SCALES
    return tuple(f"segment {i + 1}" for i in range(n_segments))


@dataclass(frozen=True, eq=False, repr=False)
class ScalePartition(Result):
    """Segments of blocks, and how far the data support them.

    Attributes:
        model_name: The model's name, or ``""`` for bare arrays.
        n_layers: Number of blocks, L.
        boundaries: The index of the first block of every segment but the first. These are the best
            places; whether the data support any boundary is for the next fields to say.
        intervals: 95% interval of each boundary, in blocks, ends included.
        p_values: Number of boundaries to p-value: how often there is as much evidence for so many
            where there are fewer. From the first that is not significant on, a lower bound.
        n_boundaries: The number of boundaries that the data ask for, step by step; 0 means that
            gradual change describes the depth as well. Changes of one signal alone do not count.
        explained: Share of what is beyond a straight line that the placed boundaries take.
        probability: Per block, the share of bootstrap draws with a boundary there, shape
            ``[block]``.
        sharpness: Leave-one-block-out error of ``"stages"`` (jumps alone), ``"drift"`` (gradual
            alone) and ``"both"``, as shares of the error of the mean. The least describes best;
            drift is given its best polynomial order, so small differences say nothing.
        by_method: Method to its boundaries; none where a published detector finds none, and None
            where a method cannot place its own.
        by_signal: Signal to what the answer owes to it.
        signals: The signals, in their own units, shape ``[block, signal]``, in the order of
            ``by_signal``.
        drift: What is gradual, in a word.
        autocorrelation: Lag-one autocorrelation of what is gradual, beyond a straight line.
        found: The boundaries that the data support, in order of depth.
        alone: Sharp changes that are listed and not counted: what one signal shows alone, or
            several, none of them by so much that single signals do in less than 1% by chance.
        edges: What the first and the last block change, with the signals in which no block between
            them changes as much; never counted as boundaries.
        method: The method that placed ``boundaries``.
        control: What kind of null to compare with this is, as the profile says; None for a model.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    n_layers: int
    boundaries: tuple[int, ...]
    intervals: tuple[tuple[int, int], ...]
    p_values: Mapping[int, float]
    n_boundaries: int
    explained: float
    probability: Float[np.ndarray, " block"]
    sharpness: Mapping[str, float]
    by_method: Mapping[str, tuple[int, ...] | None]
    by_signal: Mapping[str, Support]
    signals: Float[np.ndarray, "block signal"]
    drift: str
    autocorrelation: float
    found: tuple[Boundary, ...] = ()
    alone: tuple[Boundary, ...] = ()
    edges: tuple[Boundary, ...] = ()
    method: str = "fused"
    control: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        edges = (0, *self.boundaries, self.n_layers)
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(
                f"ScalePartition: boundaries must rise from 1 to {self.n_layers - 1}, "
                f"got {self.boundaries}"
            )

    @property
    def p_value(self) -> float:
        """p-value of two boundaries against gradual change."""
        return self.p_values[2]

    @property
    def p_found(self) -> float:
        """p-value of as many boundaries as were found (at most three), or of any if none were."""
        return self.p_values[min(max(self.n_boundaries, 1), max(self.p_values))]

    @property
    def supported(self) -> bool:
        """Whether the data ask for these segments: as many boundaries, each where one was found."""
        return self.n_boundaries == len(self.boundaries) and all(
            map(self.is_found, self.boundaries)
        )

    def is_found(self, boundary: int) -> bool:
        """Whether the data support a boundary at this block.

        Args:
            boundary: One of ``boundaries``; those of other methods than ``"fused"`` may be a block
                off.

        Returns:
            Whether one of ``found`` is there.
        """
        reach = 0 if self.method == "fused" else 1
        return any(abs(change.block - boundary) <= reach for change in self.found)

    @property
    def segments(self) -> dict[str, range]:
        """Segment name to its blocks; Local, Intermediate and Global where there are three."""
        edges = (0, *self.boundaries, self.n_layers)
        names = segment_names(len(edges) - 1)
        return {
            name: range(a, b) for name, (a, b) in zip(names, itertools.pairwise(edges), strict=True)
        }

    @property
    def agreement(self) -> pd.DataFrame:
        """Share of blocks that two methods put into the same segment, for every two of them."""
        placed = {name: b for name, b in self.by_method.items() if b is not None}
        labels = {
            name: np.searchsorted(boundaries, np.arange(self.n_layers), side="right")
            for name, boundaries in placed.items()
        }
        return pd.DataFrame(
            {a: {b: float((labels[a] == labels[b]).mean()) for b in labels} for a in labels}
        )

    def heading(self) -> str:
        """The model and its depth."""
        return f"ScalePartition{named(self.model_name)}: {counted(self.n_layers, 'block')}"

    def findings(self) -> list[str]:
        """Every sharp change, how sure; stages or drift; where segments begin."""
        errors = ", ".join(f"{name} {value:.2f}" for name, value in self.sharpness.items())
        return [
            *self.changes_in_words(),
            f"Left-out blocks are described best by {self.best_description}: {errors} of the "
            "variance left.",
            *self._places_in_words(),
        ]

    def rows(self) -> Rows:
        """The segments."""
        return [
            ("segment", "blocks", "first", "last"),
            *((n, str(len(b)), str(b[0]), str(b[-1])) for n, b in self.segments.items()),
        ]

    def changes_in_words(self) -> list[str]:
        """Every sharp change, shared or of one signal alone, then the first and the last block.

        Returns:
            Sentences, the first of which says how many boundaries there are and how surely.
        """
        number, p = _counted(self.n_boundaries), _p_words(self.p_found)
        lines = [f"{number} beyond gradual change with depth ({p})."]
        n_signals = len(self.by_signal)
        for change in self.found:
            shared = f", shared by {len(change.signals)} of {n_signals} signals" * (n_signals > 1)
            lines.append(
                f"{_NAMES[change.kind]} at block {change.block}{_over(change)}{shared}"
                f"{_by_size(change)}."
            )
        for change in self.alone:
            alone = " alone" if len(change.signals) == 1 else ", too little for a boundary,"
            lines.append(
                f"{_NAMES[change.kind]} of {' and '.join(change.signals)}{alone} at block "
                f"{change.block}{_over(change)}{_by_size(change)}."
            )
        for name, change in zip(("first", "last"), self.edges, strict=False):
            if change.signals:
                counted = f"{len(change.signals)} of {n_signals} signals"
                lines.append(
                    f"The {name} block changes {counted if n_signals > 1 else 'the signal'} more "
                    f"than any gradual block does ({size_digits(change.size)} times a typical "
                    "block's change); it is not counted."
                )
        return lines

    @property
    def best_description(self) -> str:
        """What describes left-out blocks best, in words."""
        words = {"stages": "stages", "drift": "gradual drift", "both": "stages and drift together"}
        best = min(self.sharpness, key=lambda name: self.sharpness[name])
        return words[best] if self.sharpness[best] < 1 else "their mean alone"

    def _places_in_words(self) -> list[str]:
        """Where segments begin, told apart by whether the data support it."""
        places = {
            boundary: f"block {boundary} ({low} to {high})"
            for boundary, (low, high) in zip(self.boundaries, self.intervals, strict=True)
        }
        by = "" if self.method == "fused" else f" by {self.method}"
        found = [words for boundary, words in places.items() if self.is_found(boundary)]
        others = [words for boundary, words in places.items() if not self.is_found(boundary)]
        lines = [] if places else [f"No boundary{by}."]
        if found:
            most = " with most evidence" * (
                self.method == "fused" and self.n_boundaries > len(found)
            )
            name = "Boundary" if len(found) == 1 else "Boundaries"
            lines.append(f"{name}{most}{by}: {'; '.join(found)}.")
        if others:
            name = "Best other place" if found else "Best place"
            name += "s" * (len(others) > 1)
            lines.append(f"{name}{by}, which the data do not support as such: {'; '.join(others)}.")
        return lines

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity and block: ``model, quantity, segment, block, value, unit``.

        The quantities are the ``"probability"`` of a boundary at the block, then every signal in
        its own unit.
        """
        segment = [name for name, blocks in self.segments.items() for _ in blocks]
        of_signals = dict(zip(self.by_signal, self.signals.T, strict=True))
        parts = [
            tidy(
                {
                    "model": self.model_name,
                    "quantity": quantity,
                    "segment": segment,
                    "block": np.arange(self.n_layers),
                    "value": values,
                    "unit": "share of draws" if quantity == "probability" else "the signal's own",
                }
            )
            for quantity, values in {"probability": self.probability, **of_signals}.items()
        ]
        return pd.concat(parts, ignore_index=True)


# What functions take for a partition.
Segments: TypeAlias = ScalePartition | Mapping[str, Iterable[int]] | Sequence[int]


def as_segments(partition: Segments, n_layers: int) -> dict[str, tuple[int, ...]]:
    """Segment names to their blocks.

    Args:
        partition: A :class:`ScalePartition`, a mapping from names to blocks, or the boundaries: the
            first block of every segment but the first.
        n_layers: Blocks of the model.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it does not fit the model.
    """
    if isinstance(partition, ScalePartition):
        if partition.n_layers != n_layers:
            raise ValueError(
                f"partition is of {partition.n_layers} blocks, but the model has {n_layers}"
            )
        partition = partition.segments
    try:
        if not isinstance(partition, Mapping):
            partition = _between([operator.index(b) for b in partition], n_layers)
        segments = {
            str(name): tuple(operator.index(b) for b in blocks)
            for name, blocks in partition.items()
        }
    except TypeError:
        raise TypeError(
            "partition must be a ScalePartition, a mapping from names to blocks, or boundaries "
            f"such as [2, 4], all in whole numbers, got {partition!r}"
        ) from None
    for name, blocks in segments.items():
        if not blocks or len(set(blocks)) < len(blocks):
            raise ValueError(f"partition[{name!r}] must hold blocks, each once, got {blocks}")
        if min(blocks) < 0 or max(blocks) >= n_layers:
            raise ValueError(
                f"partition[{name!r}] must hold blocks 0 to {n_layers - 1}, got {blocks}"
            )
    if not segments:
        raise ValueError("partition must name at least one segment, got none")
    return segments


def _between(boundaries: list[int], n_layers: int) -> dict[str, range]:
    edges = (0, *boundaries, n_layers)
    if n_layers == 1 and boundaries:
        raise ValueError(
            "partition of a model of 1 block has no boundary: name its one segment, as in "
            f"{{'all': [0]}}, got {tuple(boundaries)}"
        )
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"partition must hold boundaries that rise from 1 to {n_layers - 1}, got "
            f"{tuple(boundaries)}"
        )
    names = segment_names(len(edges) - 1)
    return {name: range(edges[i], edges[i + 1]) for i, name in enumerate(names)}


_NAMES = {"jump": "A sharp change", "bend": "A bend"}
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six")


def size_digits(size: float) -> str:
    """A size in units of a typical block's change, with the two digits that count.

    Args:
        size: Such as ``Boundary.size``.

    Returns:
        Such as ``"20"``, never with an exponent.
    """
    rounded = float(f"{size:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _counted(n_boundaries: int) -> str:
    number = _NUMBERS[n_boundaries] if n_boundaries < len(_NUMBERS) else str(n_boundaries)
    return f"{number} {'boundary' if n_boundaries < 2 else 'boundaries'}"


def _over(change: Boundary) -> str:
    return f", over {change.width} blocks" if change.width > 1 else ""


def _by_size(change: Boundary) -> str:
    times = f"{size_digits(change.size)} times"
    if change.kind == "jump":
        return f", {times} a typical block's"
    return f": from there on the change per block differs by {times} a typical block's"


def _p_words(p_value: float) -> str:
    return f"p = {p_value:.3f}" if p_value >= 0.0095 else f"p = {p_value:.1g}"
