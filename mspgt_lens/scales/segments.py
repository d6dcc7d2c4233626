"""Boundaries in curves over depth: sharp changes, tested against everything gradual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float
from pandas.api.types import is_numeric_dtype

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.partition import Boundary, ScalePartition, Support
from mspgt_lens.scales.evidence import Change, change_curves, evidence_for_change, votes
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.scales.normalizing import rank_normalize
from mspgt_lens.scales.regenerating import regenerator
from mspgt_lens.scales.seeking import (
    Place,
    Search,
    gains_beside,
    gains_of,
    likely_kinds,
    p_without,
    seek_changes,
    sizes,
    standardized,
)
from mspgt_lens.scales.sharpness import sharpness
from mspgt_lens.statistics import LEVEL

Rows = Literal["blocks", "sites"]
MIN_BLOCKS = 6
_LARGEST = 1e100
# Against two jumps of twice the noise, power stays low below so many blocks, and below so many
# blocks times signals (docs/boundaries.md).
FEW_BLOCKS = 24
FEW_VALUES = 140
HIGH_CORRELATION = 0.35
_MAX_PLACED = 3
# Every signal is left out once, unless there are so many that each takes long and tells little.
_MOST_LEFT_OUT = 40


@in_own_state
def segment_blocks(
    signals: Float[np.ndarray, "block signal"] | pd.DataFrame,
    *,
    rows: Rows = "blocks",
    n_boundaries: int | None = None,
    n_bootstraps: int = 200,
    min_size: int = 2,
    names: Sequence[str] | None = None,
    replicates: Float[np.ndarray, "draw block signal"] | None = None,
    seed: int = 0,
) -> ScalePartition:
    """Sharp changes that curves over depth share, tested against everything gradual.

    A change is a jump (one block, or a few in a row, move the level) or a bend (the rate of change
    is new from a block on). The evidence is the Bayes factor of one or two changes against none,
    averaged over all kinds of gradual change on both sides (:mod:`mspgt_lens.scales.gradual` lists
    them); signals are added up, none of which decides alone. Its p-value is the share of gradual
    series that reach as much, by tables drawn beforehand (:mod:`mspgt_lens.scales.chance`). Where
    another signal shares what one shows most, five times the share of series in which a single
    signal reaches as much is the p-value if it is less. Changes are sought one after another, each
    tested beside those found before.

    A boundary bears the index of the block that makes the change: of the first block whose value is
    new, and for curves over sites the block from whose output on the curve is new. What the first
    and the last block do is reported apart, in ``.edges``; it is no boundary.

    Args:
        signals: One row per block or site, one column per signal, in any units; a table's columns
            are named by it.
        rows: What a row is: ``"blocks"``, or ``"sites"`` (of L + 1 rows: the residual stream before
            every block, then after the last one).
        n_boundaries: How many boundaries to place, 1 to 3. None places the theory's two, whatever
            number the test chooses: ``result.n_boundaries`` is the finding.
        n_bootstraps: Series regenerated for intervals and probabilities.
        min_size: Fewest blocks of a segment that is placed without support, at least 1.
        names: One name per column, for arrays.
        replicates: The same rows from resampled groups of prompts; their spread is added to that of
            the noise in intervals and probabilities.
        seed: Decides what is drawn for intervals and probabilities; no p-value depends on it.

    Returns:
        The partition. ``found`` are the boundaries that the data support, with their kinds, the
        signals that share them and their sizes; ``boundaries`` are the best places whether or not
        they are supported.

    Raises:
        ValueError: If signals are constant, NaN or infinite, or there are not enough blocks for so
            many segments.
        CannotMeasure: If there are fewer than 6 blocks.

    Example:
        >>> made = ml.synthetic.synthetic_signals(24, effect=4.0)
        >>> partition = ml.segment_blocks(made.signals)
        >>> partition.boundaries == made.boundaries, partition.n_boundaries
        (True, 2)
    """
    matrix, labels = _checked(signals, names, rows)
    first_block = 0 if rows == "sites" else 1
    n_layers = len(matrix) - (rows == "sites")
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1 block, got {min_size}")
    if n_bootstraps < 20:
        raise ValueError(
            f"n_bootstraps must be at least 20 for a 95% interval to mean anything, got "
            f"{n_bootstraps}"
        )
    place = 2 if n_boundaries is None else n_boundaries
    most = min(_MAX_PLACED, n_layers // min_size - 1)
    if not 1 <= place <= most or most < 2:
        raise ValueError(
            f"n_boundaries must be 1 to {most} for {n_layers} blocks in segments of at "
            f"least {min_size}, got {place}: lower min_size or n_boundaries"
        )
    spread = _resampled(replicates, matrix)
    scale = matrix[1:-1].std(axis=0)
    inner = standardized(matrix[1:-1])
    rng = np.random.default_rng(seed)
    search = seek_changes(inner)
    placed = _placed(inner, search, place, min_size, n_layers - first_block)
    drawn = _bootstrap(inner, search, placed, spread / scale, n_bootstraps, rng) + first_block
    boundaries = tuple(change.row + first_block for change in placed)
    intervals, probability = summarize_places(drawn, n_layers)
    levels = matrix[1:] if rows == "sites" else matrix
    shared = search.shared
    kinds = gradual_kinds(len(inner))
    like = search.like
    return ScalePartition(
        model_name="",
        n_layers=n_layers,
        boundaries=boundaries,
        intervals=tuple(
            (min(low, b), max(high, b))
            for (low, high), b in zip(intervals, boundaries, strict=True)
        ),
        p_values=_p_values(search),
        n_boundaries=len(shared),
        explained=_explained(inner, placed),
        probability=probability,
        sharpness=sharpness(rank_normalize(levels), place, min_size),
        by_method={"fused": boundaries},
        by_signal=_support(inner, search, placed, labels, first_block),
        signals=levels,
        drift=kinds.words[like.common],
        autocorrelation=kinds.autocorrelation(like.common),
        found=tuple(_described(p, inner, search, labels, first_block) for p in shared),
        alone=tuple(
            _described(p, inner, search, labels, first_block)
            for p in search.places
            if p.alone is not None
        ),
        edges=edge_changes(matrix, labels, n_layers, search.changes),
        settings={
            "rows": rows,
            "n_bootstraps": n_bootstraps,
            "min_size": min_size,
            "seed": seed,
            "placed": place,
        },
        warnings=(
            *_cautions(n_layers, len(labels), kinds.autocorrelation(like.common)),
            *_repetitions(labels, search.first.repeats),
        ),
    )


def summarize_places(
    places: np.ndarray, n_layers: int
) -> tuple[list[tuple[int, int]], Float[np.ndarray, " block"]]:
    """95% interval of every boundary, and the share of draws with a boundary at each block."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(places, [tail, 1 - tail], axis=0, method="inverted_cdf").astype(int)
    probability = np.bincount(places.ravel(), minlength=n_layers) / len(places)
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)], probability


def edge_changes(
    matrix: Float[np.ndarray, "row signal"],
    labels: Sequence[str],
    n_layers: int,
    changes: Sequence[Change] = (),
) -> tuple[Boundary, Boundary]:
    """What the first and the last block change, with the signals that no block between does so.

    Args:
        matrix: Rows with the first and the last.
        labels: The signals' names.
        n_layers: Number of blocks.
        changes: Sharp changes within, at rows counted from the second.
    """
    steps = np.abs(np.diff(matrix, axis=0))
    typical = _typical(matrix[1:-1], changes)
    within = np.delete(steps[1:-1], _jumped(changes), axis=0)
    largest = within.max(axis=0) if len(within) else np.zeros(len(labels))

    def one(block: int, step: np.ndarray) -> Boundary:
        larger = step > largest
        names = tuple(n for n, more in zip(labels, larger, strict=True) if more)
        size = np.median((step / typical)[larger if larger.any() else slice(None)])
        return Boundary(block, "edge", names, float(size), None)

    return one(0, steps[0]), one(n_layers - 1, steps[-1])


def _checked(
    signals: np.ndarray | pd.DataFrame, names: Sequence[str] | None, rows: str
) -> tuple[Float[np.ndarray, "row signal"], list[str]]:
    if rows not in get_args(Rows):
        raise ValueError(f"rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
    if isinstance(signals, pd.DataFrame):
        if names is not None:
            raise ValueError("names must be left out for a table, whose columns have names")
        names = [str(column) for column in signals.columns]
        texts = [str(c) for c in signals.columns if not is_numeric_dtype(signals[c])]
        if texts:
            raise ValueError(
                f"signals must be numbers, got none in {', '.join(texts)}: leave those columns out"
            )
        matrix = signals.to_numpy(dtype=np.float64)
    else:
        matrix = np.array(signals, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(f"signals must have shape [block, signal], got {np.shape(signals)}")
    n_layers = len(matrix) - (rows == "sites")
    if n_layers < MIN_BLOCKS:
        raise CannotMeasure(
            f"signals must have at least {MIN_BLOCKS} blocks, got {n_layers}: with fewer, two "
            "boundaries cannot be told from drift"
        )
    labels = [f"signal {i}" for i in range(matrix.shape[1])] if names is None else list(names)
    if len(labels) != matrix.shape[1] or len(set(labels)) < len(labels):
        raise ValueError(
            f"names must be {matrix.shape[1]} different names, one per signal, got {labels}"
        )
    bad = np.array(~np.isfinite(matrix).all(axis=0))
    if bad.any():
        raise ValueError(f"signals must be finite; NaN or infinite in {_named(labels, bad)}")
    # The first and the last row are set apart.
    flat = np.array(np.ptp(matrix[1:-1], axis=0) <= 1e-12 * np.abs(matrix).max(axis=0))
    if flat.any():
        raise ValueError(
            "signals must change with depth between the first and the last block; constant: "
            f"{_named(labels, flat)}; leave them out"
        )
    sizes = np.abs(matrix).max(axis=0)
    extreme = np.array((sizes > _LARGEST) | (sizes < 1 / _LARGEST))
    if extreme.any():
        raise ValueError(
            f"signals must be of sizes from {1 / _LARGEST:g} to {_LARGEST:g}, since their squares "
            f"are added up, got others in {_named(labels, extreme)}; give them in other units, "
            "which change nothing"
        )
    return matrix, labels


def _named(labels: Sequence[str], chosen: np.ndarray) -> str:
    return ", ".join(label for label, c in zip(labels, chosen, strict=True) if c)


def _resampled(
    replicates: np.ndarray | None, matrix: Float[np.ndarray, "row signal"]
) -> Float[np.ndarray, "draw inner signal"]:
    """What resampling moves within; one draw of nothing where there are no replicates."""
    if replicates is None:
        return np.zeros((1, len(matrix) - 2, matrix.shape[1]))
    replicates = np.asarray(replicates, dtype=np.float64)
    if replicates.ndim != 3 or replicates.shape[1:] != matrix.shape:
        n_rows, n_signals = matrix.shape
        raise ValueError(
            f"replicates must have shape [draw, {n_rows}, {n_signals}], got {replicates.shape}"
        )
    if not np.isfinite(replicates).all():
        raise ValueError("replicates must be finite")
    moved: np.ndarray = (replicates - matrix)[:, 1:-1]
    return moved


def _placed(
    inner: Float[np.ndarray, "row signal"], search: Search, number: int, min_size: int, end: int
) -> tuple[Change, ...]:
    """The likeliest boundaries found, then the likeliest others beside them, in order of depth.

    Args:
        inner: The rows within.
        search: What was found in them.
        number: How many to place.
        min_size: Fewest rows between one of the others and any boundary.
        end: The row that the last segment ends before.
    """
    found = sorted(search.shared, key=lambda place: -place.evidence)
    placed = [place.lead for place in found[:number]]
    start = end - len(inner) - 1
    taken = [row for c in search.changes for row in range(c.row, c.end)]
    while len(placed) < number:
        evidence, gains = gains_beside(inner, tuple(sorted({*search.changes, *placed})))
        total = votes(gains).sum(axis=1) + evidence.prior
        ends = [start, end, *taken, *(change.row for change in placed)]
        apart = [min(abs(c.row - e) for e in ends) >= min_size for c in evidence.candidates]
        if not any(apart):
            apart = [c.row not in ends for c in evidence.candidates]
        placed.append(evidence.candidates[int(np.where(apart, total, -np.inf).argmax())])
    return tuple(sorted(placed, key=lambda change: change.row))


def _bootstrap(
    inner: Float[np.ndarray, "row signal"],
    search: Search,
    placed: tuple[Change, ...],
    spread: Float[np.ndarray, "draw row signal"],
    n_bootstraps: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Rows where each placed change is likeliest, on series with all changes and new noise."""
    n_rows = len(inner)
    changes = tuple(sorted({*search.changes, *placed}))
    like = regenerator(evidence_for_change(n_rows, changes), inner)
    fitted = change_curves(n_rows, changes) @ sizes(inner, changes)
    drawn = (
        fitted + like.draw(n_bootstraps, rng) + spread[rng.integers(len(spread), size=n_bootstraps)]
    )
    places = np.zeros((n_bootstraps, len(placed)), dtype=int)
    kinds = likely_kinds(inner, (), changes)
    for column, change in enumerate(placed):
        others = tuple(c for c in changes if c != change)
        evidence = evidence_for_change(n_rows, others)
        same = np.array([_alike(c, change) for c in evidence.candidates])
        rows = np.array([c.row for c in evidence.candidates])[same]
        best = [
            votes(evidence.gains(part, kinds)[same]).sum(axis=1).argmax(axis=0)
            for part in evidence.chunks(drawn)
        ]
        places[:, column] = rows[np.concatenate(best)]
    return places


def _p_values(search: Search) -> dict[int, float]:
    """Of at least one, two and three boundaries: no number is surer than a smaller one."""
    p_values: dict[int, float] = {}
    found = [place.p_value for place in sorted(search.shared, key=lambda place: place.p_value)]
    for number in range(1, _MAX_PLACED + 1):
        one = found[number - 1] if number <= len(found) else search.last
        p_values[number] = max(one, p_values.get(number - 1, 0.0))
    return p_values


def _explained(inner: Float[np.ndarray, "row signal"], placed: tuple[Change, ...]) -> float:
    """Share of what is beyond a straight line that the placed changes take, mean over signals."""
    evidence = evidence_for_change(len(inner))
    kind = int(evidence.likelihoods(inner).sum(axis=1).argmax())
    white = evidence.whiteners[kind] @ inner
    axes, _ = np.linalg.qr(evidence.whiteners[kind] @ change_curves(len(inner), placed))
    total = (white**2).sum(axis=0)
    return float((((axes.T @ white) ** 2).sum(axis=0) / np.where(total > 0, total, 1.0)).mean())


def _support(
    inner: Float[np.ndarray, "row signal"],
    search: Search,
    placed: tuple[Change, ...],
    labels: Sequence[str],
    first_block: int,
) -> dict[str, Support]:
    everything = {*search.changes, *placed}
    gains = {c: gains_of(inner, c, tuple(sorted(everything - {c}))) for c in placed}
    weights = np.sum([votes(g).clip(min=0.0) for g in gains.values()], axis=0)
    total = weights.sum()
    weights = weights / total if total > 0 else np.full(len(labels), 1 / len(labels))
    if len(labels) == 1:
        return {labels[0]: Support(1.0, None, None)}
    few = len(labels) <= _MOST_LEFT_OUT
    without = p_without(inner) if few else [None] * len(labels)
    return {
        label: Support(
            float(weights[i]),
            without[i],
            _places_without(inner, everything, placed, i, first_block),
        )
        for i, label in enumerate(labels)
    }


def _places_without(
    inner: Float[np.ndarray, "row signal"],
    everything: set[Change],
    placed: tuple[Change, ...],
    left_out: int,
    first_block: int,
) -> tuple[int, ...]:
    """Where each placed change is likeliest without one signal, beside the other changes."""
    rest = np.delete(inner, left_out, axis=1)
    rows = []
    for change in placed:
        others = tuple(sorted(everything - {change}))
        evidence, gains = gains_beside(rest, others, everything)
        total = votes(gains).sum(axis=1)
        same = [_alike(c, change) for c in evidence.candidates]
        rows.append(evidence.candidates[int(np.where(same, total, -np.inf).argmax())].row)
    return tuple(sorted(row + first_block for row in rows))


def _described(
    place: Place,
    inner: Float[np.ndarray, "row signal"],
    search: Search,
    labels: Sequence[str],
    first_block: int,
) -> Boundary:
    """Its kind, who shares it, and its size in units of a typical block's change."""
    if place.alone is None:
        shares = place.gains > search.first.shares
        # Where all speak for it a little, the strongest are named.
        shares |= place.gains >= np.sort(place.gains)[-min(2, len(labels))]
    else:
        shares = place.gains > search.first.more_share
        shares[place.alone] = True
    fitted = sizes(inner, search.changes)
    mine = [
        i
        for i, change in enumerate(search.changes)
        if change in place.members and change.kind == place.lead.kind
    ]
    size = np.abs(fitted[mine].sum(axis=0)) / _typical(inner, search.changes)
    return Boundary(
        block=place.lead.row + first_block,
        kind=place.lead.kind,
        signals=tuple(label for label, s in zip(labels, shares, strict=True) if s),
        size=float(np.median(size[shares])),
        p_value=place.p_value,
        width=place.width,
    )


def _typical(
    inner: Float[np.ndarray, "row signal"], changes: Sequence[Change]
) -> Float[np.ndarray, " signal"]:
    """The median change from row to row, jumps left out; the mean where most rows stay the same."""
    steps = np.abs(np.diff(inner, axis=0))
    left = np.delete(steps, _jumped(changes), axis=0)
    steps = left if len(left) else steps
    median, mean = np.median(steps, axis=0), steps.mean(axis=0)
    typical: np.ndarray = np.where(median > 0, median, mean)
    # A signal that only jumps has no other change: its jump is one of its own units.
    return np.where(typical > 0, typical, np.ptp(inner, axis=0))


def _alike(one: Change, other: Change) -> bool:
    return (one.kind, one.width) == (other.kind, other.width)


def _jumped(changes: Sequence[Change]) -> list[int]:
    """Changes from row to row that jumps make."""
    jumps = [change for change in changes if change.kind == "jump"]
    return sorted({row - 1 for jump in jumps for row in range(jump.row, jump.end)})


def _repetitions(labels: Sequence[str], repeats: tuple[int, ...]) -> list[str]:
    if not repeats:
        return []
    names, say = ", ".join(labels[s] for s in repeats), "says" if len(repeats) == 1 else "say"
    return [
        f"beside the likeliest changes {names} {say} nearly the same as another signal ("
        "correlation of ranks 0.9 or more); p-values count such signals once"
    ]


def _cautions(n_layers: int, n_signals: int, correlation: float) -> list[str]:
    notes = []
    if n_layers < FEW_BLOCKS or n_layers * n_signals < FEW_VALUES:
        notes.append(
            f"{n_layers} blocks and {n_signals} signals leave little power for changes of a few "
            "times the noise: not finding boundaries says little of those (see "
            "mspgt_lens.synthetic.power)"
        )
    if correlation >= HIGH_CORRELATION:
        notes.append(
            f"the signals wander with depth (lag-one autocorrelation {correlation:.2f} beyond a "
            "straight line), which hides changes that are not much larger than a typical block's"
        )
    return notes
