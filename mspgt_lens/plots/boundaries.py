"""Figures of scale boundaries and of how well they stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.partition import Boundary, ScalePartition, size_digits
from mspgt_lens.plots.look import (
    FAINT,
    NEUTRAL,
    digits,
    draw_segment_strip,
    segment_color,
    style_figure,
    transparent,
)
from mspgt_lens.scales.normalizing import rank_normalize
from mspgt_lens.scales.segments import Rows, segment_blocks
from mspgt_lens.studies.stability import Stability

# Blue to orange through gray: told apart with any color vision, on light and on dark.
_RANK_SCALE = [[0.0, "#1f66a8"], [0.5, "#c9c9c9"], [1.0, "#c65a11"]]
_DASHES = {"jump": "solid", "bend": "6px,4px", "best": "2px,3px"}
# What stands before a label, in pixels from the boundary's line: a step, a kink.
_GLYPHS = {"jump": "M 4,-4 L 10,-4 L 10,4 L 16,4", "bend": "M 4,-4 L 10,-4 L 16,5"}
_GLYPH = 22
# Heights in pixels: of a line of labels, between panels, above and below all panels.
_LANE, _GAP, _ABOVE, _BELOW = 18, 10, 90, 55
# Pixels of a character and of the ranks' panel, about.
_CHARACTER, _PANEL = 6.6, 560
_LONGEST_NAME = 32


# Panel to its row and column.
_Cells: TypeAlias = Mapping[str, Mapping[str, int]]


class _Label(NamedTuple):
    """What is written above the ranks, and where."""

    block: int
    kind: str
    text: str


@in_own_state
def plot_boundaries(
    partition: ScalePartition | pd.DataFrame | Float[np.ndarray, "block signal"],
    *,
    rows: Rows = "blocks",
    unsupported: bool = False,
) -> go.Figure:
    """Signals over depth, as ranks and as levels, with every sharp change that the data support.

    A jump is a solid line with a step before its label, a bend a dashed one with a kink; the label
    says the block that makes the change and its size in units of a typical block's change. What one
    signal shows alone, or several by too little, is marked in the rows of these only. Crosses are
    on what the first or last block changes more than any gradual block does, which is not counted.
    Bars say in which share of bootstrap draws a segment begins at each block; tinted spans are 95%
    intervals.

    Args:
        partition: From :func:`~mspgt_lens.detect_scales` or :func:`~mspgt_lens.segment_blocks`; or
            the table or array of curves itself, which is given to the latter with its defaults.
        rows: What a row of a table or array is: ``"blocks"`` or ``"sites"``.
        unsupported: Show the best places and segments that the data do not support too, faint.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If a partition is given with ``rows``, or curves cannot be tested.

    Example:
        >>> made = ml.synthetic.synthetic_signals(12, effect=4.0)
        >>> partition = ml.segment_blocks(made.signals, n_bootstraps=20)
        >>> ml.plot_boundaries(partition).write_html("boundaries.html")
    """
    if not isinstance(partition, ScalePartition):
        partition = segment_blocks(partition, rows=rows)
    elif rows != "blocks":
        raise ValueError(
            f"rows says what a row of a table is, got {rows!r} with a partition, which knows it: "
            "leave rows out"
        )
    labels = _labels(partition, unsupported)
    lanes = _lanes(labels, partition.n_layers)
    placed = [b for b in partition.boundaries if unsupported or partition.is_found(b)]
    heights = {"labels": _LANE * (max(lanes, default=-1) + 2.0)}
    if partition.supported or unsupported:
        heights["segments"] = 26.0
    heights["ranks"] = 34.0 * partition.signals.shape[1]
    if placed:
        heights["probability"] = 130.0
    total = sum(heights.values()) + _GAP * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights),
        cols=2,
        shared_xaxes=True,
        row_heights=[h / sum(heights.values()) for h in heights.values()],
        column_widths=[0.6, 0.4],
        vertical_spacing=_GAP / total,
        horizontal_spacing=0.02,
        specs=[[{}, {} if panel == "ranks" else None] for panel in heights],
    )
    cells = {panel: {"row": row, "col": 1} for row, panel in enumerate(heights, start=1)}
    cells["levels"] = {**cells["ranks"], "col": 2}
    _draw_ranks(figure, cells, partition)
    _draw_levels(figure, cells, partition)
    _draw_changes(figure, cells, partition)
    _draw_edges(figure, cells, partition)
    _draw_labels(figure, cells, labels, lanes)
    if "segments" in cells:
        draw_segment_strip(figure, partition, **cells["segments"])
    if "probability" in cells:
        _draw_probability(figure, cells, partition, placed)
    if unsupported:
        _draw_best_places(figure, cells, partition)
    name = escape(partition.model_name) or "signals"
    style_figure(
        figure,
        f"Scale boundaries: {name}",
        f"{_finding(partition)}<br>{_key(labels, partition)}",
        int(total) + _ABOVE + _BELOW,
    )
    _lay_out(figure, cells, partition)
    return figure


@in_own_state
def plot_stability(stability: Stability) -> go.Figure:
    """The segments under every condition, one row each, with the boundaries' 95% intervals.

    Faint segments are those that the data do not support as such under that condition.

    Args:
        stability: From :func:`~mspgt_lens.studies.stability`.

    Returns:
        The figure; nothing is shown.
    """
    table = stability.table
    labels = [escape(label) for label in table["condition"]]
    figure = go.Figure()
    for label, one in zip(labels, stability.partitions.values(), strict=True):
        sure = one.supported
        for name, inside in one.segments.items():
            figure.add_trace(
                go.Bar(
                    x=[len(inside)],
                    base=[inside[0] - 0.5],
                    y=[label],
                    orientation="h",
                    marker={
                        "color": transparent(segment_color(one, name), 0.9 if sure else 0.45),
                        "line": {"width": 0},
                    },
                    hovertext=f"<b>{label}</b><br>{escape(name)}: blocks {inside[0]} to "
                    f"{inside[-1]}<br>{_finding(one)}",
                    hoverinfo="text",
                    showlegend=False,
                )
            )
        figure.add_trace(
            go.Scatter(
                x=[b - 0.5 for b in one.boundaries],
                y=[label] * len(one.boundaries),
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [
                        h - b for b, (_, h) in zip(one.boundaries, one.intervals, strict=True)
                    ],
                    "arrayminus": [
                        b - low for b, (low, _) in zip(one.boundaries, one.intervals, strict=True)
                    ],
                    "color": "#ffffff",
                    "thickness": 2,
                    "width": 5,
                },
                mode="markers",
                marker={"color": "#ffffff", "size": 6},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    first = next(iter(stability.partitions.values()))
    others = table.iloc[1:]
    words = (
        f"on average {100 * others['agreement'].mean():.0f}% of blocks keep their segment; faint: "
        "not supported as such"
        if len(others)
        else "one condition only"
    )
    style_figure(
        figure,
        f"Do the boundaries stay? {escape(first.model_name)}",
        words,
        height=190 + 38 * len(labels),
    )
    longest = max(len(label) for label in table["condition"])
    figure.update_layout(barmode="overlay", bargap=0.3, margin={"l": 30 + 7 * longest})
    figure.update_xaxes(title_text="block", range=[-0.6, first.n_layers - 0.4], showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _finding(partition: ScalePartition) -> str:
    found = partition.changes_in_words()[0].rstrip(".")
    return f"{found}; left-out blocks are described best by {partition.best_description}"


def _key(labels: Sequence[_Label], partition: ScalePartition) -> str:
    """What marks stand for, of those that are there."""
    kinds = {label.kind for label in labels} | {change.kind for change in partition.alone}
    words = {
        "jump": "solid: a jump, the level is new",
        "bend": "dashed: a bend, the change per block is new",
        "edge": "crosses: what the first or last block changes, not counted",
        "best": "dotted: best places, which the data do not support",
    }
    sizes = " (\u00d7: times a typical block's change)" * bool(kinds - {"best"})
    return "; ".join(word for kind, word in words.items() if kind in kinds) + sizes


def _labels(partition: ScalePartition, unsupported: bool) -> list[_Label]:
    """What is written above the ranks, in order of depth."""
    texts = [(c.block, c.kind, _described(c)) for c in partition.found]
    for name, change in zip(("first", "last"), partition.edges, strict=False):
        if change.signals:
            texts.append((change.block, "edge", f"{name} block, {size_digits(change.size)}\u00d7"))
    if unsupported:
        texts += [(b, "best", f"best place, block {b}") for b in _only_best(partition)]
    return [_Label(*text) for text in sorted(texts)]


def _only_best(partition: ScalePartition) -> list[int]:
    return [b for b in partition.boundaries if not partition.is_found(b)]


def _described(change: Boundary) -> str:
    over = f" over {change.width} blocks" if change.width > 1 else ""
    return f"{change.kind}{over}, block {change.block}, {size_digits(change.size)}\u00d7"


def _lanes(labels: Sequence[_Label], n_layers: int) -> list[int]:
    """A lane for each label, above those of all labels that begin where it is written.

    So no line goes through the words of another label.
    """
    lanes = [0] * len(labels)
    for i in reversed(range(len(labels))):
        wide = (len(labels[i].text) * _CHARACTER + _GLYPH) * n_layers / _PANEL
        end = labels[i].block + wide
        under = [lanes[j] for j in range(i + 1, len(labels)) if labels[j].block < end]
        lanes[i] = max(under, default=-1) + 1
    return lanes


def _draw_ranks(figure: go.Figure, cells: _Cells, partition: ScalePartition) -> None:
    """Ranks of the signals, a row each."""
    names, n_layers = list(partition.by_signal), partition.n_layers
    blocks = np.arange(n_layers)
    ranks = rank_normalize(partition.signals)
    order = np.argsort(np.argsort(partition.signals, axis=0), axis=0) + 1
    figure.add_trace(
        go.Heatmap(
            x=blocks,
            y=np.arange(len(names)),
            z=ranks.T,
            colorscale=_RANK_SCALE,
            zmid=0,
            hovertext=[
                [
                    f"<b>block {block}</b><br>{escape(name)}: "
                    f"{digits(partition.signals[block, i])}<br>rank {order[block, i]} of {n_layers}"
                    f"<br>{100 * partition.by_signal[name].weight:.0f}% of the evidence"
                    for block in blocks
                ]
                for i, name in enumerate(names)
            ],
            hoverinfo="text",
            showscale=False,
            xgap=1,
            ygap=1,
        ),
        **cells["ranks"],
    )


def _draw_levels(figure: go.Figure, cells: _Cells, partition: ScalePartition) -> None:
    """Each signal's level in its row; arrows where the first or last block leaves the row."""
    blocks = np.arange(partition.n_layers)
    for row, (name, levels) in enumerate(
        zip(partition.by_signal, partition.signals.T, strict=True)
    ):
        low, high = levels[1:-1].min(), levels[1:-1].max()
        # Of the row's height, from its foot; the axis points downward.
        risen = (levels - low) / (high - low)
        shown = risen.clip(-0.2, 1.2)
        symbols = np.select([risen > shown, risen < shown], ["triangle-up", "triangle-down"], "")
        figure.add_trace(
            go.Scatter(
                x=blocks,
                y=row + 0.34 - 0.68 * shown,
                mode="lines+markers",
                line={"color": NEUTRAL, "width": 1.8},
                marker={
                    "color": NEUTRAL,
                    "size": np.where(symbols == "", 0, 8),
                    "symbol": np.where(symbols == "", "circle", symbols),
                },
                cliponaxis=False,
                hovertext=[
                    f"<b>block {block}</b><br>{escape(name)}: {digits(level)}"
                    + "<br>off this row's scale" * bool(symbol)
                    for block, level, symbol in zip(blocks, levels, symbols, strict=True)
                ],
                hoverinfo="text",
                showlegend=False,
            ),
            **cells["levels"],
        )


def _draw_changes(figure: go.Figure, cells: _Cells, partition: ScalePartition) -> None:
    """Lines over all signals for shared changes, over their own rows for what is not counted."""
    names = list(partition.by_signal)
    for change in partition.found:
        _draw_line(figure, cells, change, -0.5, len(names) - 0.5)
    for row, name in enumerate(names):
        own = [change for change in partition.alone if name in change.signals]
        for change in own:
            _draw_line(figure, cells, change, row - 0.5, row + 0.5)
        if own:
            figure.add_annotation(
                text="<br>".join(
                    f"{'alone' if len(change.signals) == 1 else 'too little'}: {_described(change)}"
                    for change in own
                ),
                xref="x domain",
                x=1,
                xanchor="left",
                xshift=6,
                y=row,
                align="left",
                showarrow=False,
                **cells["levels"],
            )


def _draw_line(
    figure: go.Figure, cells: _Cells, change: Boundary, top: float, bottom: float
) -> None:
    """Between the blocks before and after; black on white, which is seen on every rank's color."""
    at = {"type": "line", "x0": change.block - 0.5, "x1": change.block - 0.5}
    at |= {"y0": top, "y1": bottom}
    dash = _DASHES[change.kind]
    figure.add_shape(line={"color": "#ffffff", "width": 5}, **at, **cells["ranks"])
    figure.add_shape(line={"color": "#000000", "width": 2.5, "dash": dash}, **at, **cells["ranks"])
    figure.add_shape(line={"color": NEUTRAL, "width": 2, "dash": dash}, **at, **cells["levels"])


def _draw_best_places(figure: go.Figure, cells: _Cells, partition: ScalePartition) -> None:
    for block in _only_best(partition):
        for panel, color in (("ranks", "#ffffff"), ("levels", NEUTRAL)):
            figure.add_vline(
                x=block - 0.5,
                line={"color": color, "width": 1.5, "dash": _DASHES["best"]},
                **cells[panel],
            )


def _draw_edges(figure: go.Figure, cells: _Cells, partition: ScalePartition) -> None:
    """Crosses on what the first and the last block change."""
    names = list(partition.by_signal)
    for change in partition.edges:
        if not change.signals:
            continue
        figure.add_trace(
            go.Scatter(
                x=[change.block] * len(change.signals),
                y=[names.index(name) for name in change.signals],
                mode="markers",
                marker={
                    "symbol": "x-thin",
                    "size": 8,
                    "line": {"color": "rgba(0,0,0,0.7)", "width": 1.5},
                },
                hoverinfo="skip",
                showlegend=False,
            ),
            **cells["ranks"],
        )


def _draw_labels(
    figure: go.Figure, cells: _Cells, labels: Sequence[_Label], lanes: Sequence[int]
) -> None:
    """What every change is, above its line, and the panels' titles above that."""
    cell = cells["labels"]
    # Without a trace the panel would have no axes.
    figure.add_trace(go.Scatter(x=[0], y=[0], mode="none", hoverinfo="skip"), **cell)
    figure.update_yaxes(range=[0, max(lanes, default=-1) + 2], visible=False, **cell)
    low, high = _RANK_SCALE[0][1], _RANK_SCALE[-1][1]
    titles = {
        "ranks": f"Rank within each signal, from <span style='color:{low}'>blue (low)</span> to "
        f"<span style='color:{high}'>orange (high)</span>",
        "levels": "Level of each signal",
    }
    for panel, title in titles.items():
        figure.add_annotation(
            text=title,
            xref="paper",
            x=figure.get_subplot(**cells[panel]).xaxis.domain[0],
            xanchor="left",
            yref="paper",
            y=1,
            yanchor="top",
            showarrow=False,
        )
    for label, lane in zip(labels, lanes, strict=True):
        _draw_label(figure, cell, label, lane + 0.5)


def _draw_label(figure: go.Figure, cell: Mapping[str, int], label: _Label, height: float) -> None:
    glyph, edge = _GLYPHS.get(label.kind), label.kind == "edge"
    x = label.block if edge else label.block - 0.5
    if not edge:
        line = {"color": NEUTRAL, "width": 1.5, "dash": _DASHES[label.kind]}
        figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=height + 0.4, line=line, **cell)
    if glyph:
        figure.add_shape(
            type="path",
            path=glyph,
            xsizemode="pixel",
            ysizemode="pixel",
            xanchor=x,
            yanchor=height,
            line={"color": NEUTRAL, "width": 2},
            **cell,
        )
    figure.add_annotation(
        text=label.text,
        x=x,
        y=height,
        xanchor="left",
        yanchor="middle",
        xshift=_GLYPH if glyph else 4,
        showarrow=False,
        opacity=1.0 if glyph else 0.7,
        **cell,
    )


def _draw_probability(
    figure: go.Figure, cells: _Cells, partition: ScalePartition, placed: Sequence[int]
) -> None:
    """How often a segment begins at each block; faint where no supported boundary may be."""
    cell, blocks = cells["probability"], np.arange(partition.n_layers)
    intervals = dict(zip(partition.boundaries, partition.intervals, strict=True))
    sure = np.full(partition.n_layers, not _only_best(partition))
    for boundary, (low, high) in intervals.items():
        sure[low : high + 1] |= partition.is_found(boundary)
    shown = blocks if set(placed) == set(intervals) else blocks[sure]
    figure.add_trace(
        go.Bar(
            x=shown,
            y=partition.probability[shown],
            marker={
                "color": [
                    transparent(NEUTRAL, 1.0 if supported else FAINT) for supported in sure[shown]
                ]
            },
            hovertext=[
                f"<b>block {block}</b><br>begins a segment in "
                f"{100 * partition.probability[block]:.0f}% of draws"
                for block in shown
            ],
            hoverinfo="text",
            showlegend=False,
        ),
        **cell,
    )
    for boundary in placed:
        low, high = intervals[boundary]
        figure.add_vrect(
            x0=low - 0.5,
            x1=high + 0.5,
            fillcolor=transparent(NEUTRAL, 0.22 if partition.is_found(boundary) else 0.1),
            line_width=0,
            layer="below",
            **cell,
        )
    figure.update_yaxes(title_text="share of draws", range=[0, 1], tickformat=".0%", **cell)


def _lay_out(figure: go.Figure, cells: _Cells, partition: ScalePartition) -> None:
    names = [_shortened(name) for name in partition.by_signal]
    longest = max(map(len, names))
    figure.update_layout(
        bargap=0.25,
        margin={
            "l": max(75, 20 + 7 * longest),
            "r": 195 if partition.alone else 20,
            "t": _ABOVE,
            "b": _BELOW,
        },
    )
    figure.update_xaxes(showgrid=False, range=[-0.6, partition.n_layers - 0.4])
    rows = {"range": [len(names) - 0.5, -0.5], "showgrid": False}
    figure.update_yaxes(
        **rows,
        tickmode="array",
        tickvals=np.arange(len(names)),
        ticktext=[escape(name) for name in names],
        **cells["ranks"],
    )
    figure.update_yaxes(**rows, showticklabels=False, **cells["levels"])
    figure.update_xaxes(visible=False, **cells["labels"])
    lowest = "probability" if "probability" in cells else "ranks"
    for panel in (lowest, "levels"):
        figure.update_xaxes(title_text="block", showticklabels=True, **cells[panel])


def _shortened(name: str) -> str:
    """The hover says it whole."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\u2026"
