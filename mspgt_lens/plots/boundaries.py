"""Figures of scale boundaries and of how well they stay."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.partition import ScalePartition
from mspgt_lens.plots.look import (
    NEUTRAL,
    digits,
    segment_color,
    style_figure,
    transparent,
)
from mspgt_lens.scales.detection import Stability
from mspgt_lens.scales.normalizing import rank_normalize

# Blue to orange through gray: told apart with any color vision, on light and on dark.
_RANK_SCALE = [[0.0, "#1f66a8"], [0.5, "#c9c9c9"], [1.0, "#c65a11"]]
_FOUND = {0: "no boundary", 1: "one boundary", 2: "two boundaries", 3: "three boundaries"}


@in_own_state
def plot_boundaries(partition: ScalePartition) -> go.Figure:
    """The signals over depth, with the segments and the probability of a boundary at each block.

    Colors are ranks within each signal, since their units differ; hover for values. Below, the
    share of bootstrap draws with a boundary at each block; tinted spans are the boundaries' 95%
    intervals. The title says how many boundaries the data support; segments that they do not
    support as such are faint.

    Args:
        partition: From :func:`~mspgt_lens.detect_scales` or :func:`~mspgt_lens.segment_blocks`.

    Returns:
        The figure; nothing is shown.

    Example:
        >>> made = ml.synthetic.synthetic_signals(12, effect=4.0)
        >>> partition = ml.segment_blocks(made.signals, n_draws=99, n_bootstraps=20)
        >>> ml.plot_boundaries(partition).write_html("boundaries.html")
    """
    n_layers, n_signals = partition.signals.shape
    heights = [26.0, 22.0 * n_signals + 10, 150.0]
    figure = make_subplots(
        rows=3,
        cols=1,
        shared_xaxes=True,
        row_heights=[h / sum(heights) for h in heights],
        vertical_spacing=0.035,
    )
    _draw_segments(figure, partition)
    _draw_ranks(figure, partition, heights)
    _draw_probability(figure, partition)
    name = escape(partition.model_name) or "signals"
    style_figure(figure, f"Scale boundaries: {name}", _finding(partition), int(sum(heights)) + 215)
    figure.update_layout(bargap=0.25, margin={"l": 205, "r": 20, "t": 105, "b": 55})
    figure.update_xaxes(showgrid=False, range=[-0.6, n_layers - 0.4])
    figure.update_xaxes(title_text="block", row=3, col=1)
    figure.update_yaxes(showgrid=False, visible=False, range=[0, 1], row=1, col=1)
    figure.update_yaxes(showgrid=False, autorange="reversed", row=2, col=1)
    figure.update_yaxes(
        title_text="boundary probability", range=[0, 1], tickformat=".0%", row=3, col=1
    )
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
        sure = one.n_boundaries == len(one.boundaries)
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
    found = _FOUND[partition.n_boundaries]
    best = min(partition.sharpness, key=lambda name: partition.sharpness[name])
    described = {"stages": "stages", "drift": "gradual drift", "both": "stages on drift"}[best]
    return (
        f"{found} beyond gradual drift (p = {partition.p_value:.3g} for two); "
        f"left-out blocks described best by {described}"
    )


def _draw_segments(figure: go.Figure, partition: ScalePartition) -> None:
    """The segments as a strip."""
    n_layers = partition.n_layers
    # Segments that the data do not support as such are faint.
    strength = 1.0 if partition.n_boundaries == len(partition.boundaries) else 0.7
    for name, inside in partition.segments.items():
        color = transparent(segment_color(partition, name), strength)
        figure.add_trace(
            go.Bar(
                x=[inside[0] - 0.5 + len(inside) / 2],
                y=[1],
                width=[len(inside)],
                marker={"color": color, "line": {"width": 0}},
                text=name.capitalize() if len(inside) * 12 >= n_layers else name[0].upper(),
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "#ffffff", "size": 13},
                hovertext=f"<b>{escape(name)}</b>: blocks {inside[0]} to {inside[-1]}",
                hoverinfo="text",
                showlegend=False,
            ),
            row=1,
            col=1,
        )


def _draw_ranks(figure: go.Figure, partition: ScalePartition, heights: Sequence[float]) -> None:
    """Ranks of the signals, a row each."""
    names, n_layers = list(partition.by_signal), partition.n_layers
    blocks = np.arange(n_layers)
    ranks = rank_normalize(partition.signals)
    order = np.argsort(np.argsort(partition.signals, axis=0), axis=0) + 1
    figure.add_trace(
        go.Heatmap(
            x=blocks,
            y=[escape(name) for name in names],
            z=ranks.T,
            colorscale=_RANK_SCALE,
            zmid=0,
            hovertext=[
                [
                    f"<b>block {block}</b><br>{escape(name)}: "
                    f"{digits(partition.signals[block, i])}<br>rank {order[block, i]} of {n_layers}"
                    f"<br>{100 * partition.by_signal[name].weight:.0f}% of what the jumps explain"
                    for block in blocks
                ]
                for i, name in enumerate(names)
            ],
            hoverinfo="text",
            colorbar={
                "title": {"text": "rank"},
                "tickvals": [float(ranks.min()), 0.0, float(ranks.max())],
                "ticktext": ["low", "middle", "high"],
                "thickness": 12,
                "outlinewidth": 0,
                "len": heights[1] / sum(heights),
                "y": 1 - (heights[0] + heights[1] / 2) / sum(heights),
            },
            xgap=1,
            ygap=1,
        ),
        row=2,
        col=1,
    )


def _draw_probability(figure: go.Figure, partition: ScalePartition) -> None:
    """How often a segment begins at each block, and where the boundaries are."""
    blocks = np.arange(partition.n_layers)
    figure.add_trace(
        go.Bar(
            x=blocks,
            y=partition.probability,
            marker={"color": NEUTRAL},
            hovertext=[
                f"<b>block {block}</b><br>begins a segment in "
                f"{100 * partition.probability[block]:.0f}% of draws"
                for block in blocks
            ],
            hoverinfo="text",
            showlegend=False,
        ),
        row=3,
        col=1,
    )
    for boundary, (low, high) in zip(partition.boundaries, partition.intervals, strict=True):
        figure.add_vrect(
            x0=low - 0.5,
            x1=high + 0.5,
            fillcolor=transparent(NEUTRAL, 0.22),
            line_width=0,
            layer="below",
            row=3,
            col=1,
        )
        for row in (2, 3):
            figure.add_vline(
                x=boundary - 0.5,
                line={"color": NEUTRAL, "width": 2, "dash": "solid"},
                row=row,
                col=1,
            )
