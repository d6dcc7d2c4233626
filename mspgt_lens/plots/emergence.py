"""The figure of curves and segments along training."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.plots.look import DEPTH_SCALE, digits, segment_color, style_figure, transparent
from mspgt_lens.studies.emergence import Emergence


@in_own_state
def plot_emergence(emergence: Emergence) -> go.Figure:
    """Relevance and predicted information over depth, a line per checkpoint, and the segments.

    Lines go from early (dark) to late (bright). Faint segments are those that the data do not
    support as such at that checkpoint; white marks are boundaries with their 95% intervals.

    Args:
        emergence: From :func:`~mspgt_lens.studies.emergence`.

    Returns:
        The figure; nothing is shown.
    """
    first = emergence.profiles[0]
    scales = list(first.predicted)
    partitioned = any(p is not None for p in emergence.partitions)
    n_columns = 1 + len(scales)
    heights = [250.0] + [40.0 + 30 * len(emergence.steps)] * partitioned
    specs: list[list[dict[str, int] | None]] = [[{} for _ in range(n_columns)]]
    if partitioned:
        specs.append([{"colspan": n_columns}, *[None] * (n_columns - 1)])
    figure = make_subplots(
        rows=len(heights),
        cols=n_columns,
        specs=specs,
        row_heights=[h / sum(heights) for h in heights],
        vertical_spacing=75 / (sum(heights) + 75),
        horizontal_spacing=0.05,
        subplot_titles=["Relevance", *(f"Predicts: {escape(s)}" for s in scales), "Segments"],
    )
    shades = sample_colorscale(DEPTH_SCALE, np.linspace(0, 1, max(len(emergence.steps), 2)))
    for step, profile, color in zip(emergence.steps, emergence.profiles, shades, strict=False):
        for column, curve in enumerate((profile.relevance, *profile.predicted.values()), start=1):
            figure.add_trace(
                go.Scatter(
                    x=np.arange(len(curve)),
                    y=curve.values,
                    mode="lines",
                    line={"color": color, "width": 2},
                    name=escape(str(step)),
                    legendgroup=str(step),
                    showlegend=column == 1,
                    hovertext=[
                        f"<b>{escape(str(step))}</b><br>site {site}: {digits(value)} nats "
                        f"({digits(low)} to {digits(high)})"
                        for site, (value, low, high) in enumerate(
                            zip(curve.values, curve.low, curve.high, strict=True)
                        )
                    ],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    if partitioned:
        _draw_partitions(figure, emergence)
    figure.update_xaxes(title_text="site", row=1)
    figure.update_yaxes(title_text="nats per token", row=1, col=1)
    supported = [
        str(step)
        for step, p in zip(emergence.steps, emergence.partitions, strict=True)
        if p is not None and p.supported
    ]
    words = (
        f"two boundaries supported at: {', '.join(supported)}"
        if supported
        else ("two boundaries are supported at no checkpoint")
    )
    style_figure(
        figure,
        f"Along training: {escape(first.model_name)}",
        escape(words) if partitioned else "too few blocks for boundaries",
        int(sum(heights)) + 75 * partitioned + 190,
    )
    figure.update_layout(
        barmode="overlay",
        bargap=0.3,
        margin={"l": 100},
        legend={"y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left", "xref": "container"},
    )
    return figure


def _draw_partitions(figure: go.Figure, emergence: Emergence) -> None:
    for step, partition in zip(emergence.steps, emergence.partitions, strict=True):
        if partition is None:
            continue
        label, sure = escape(str(step)), partition.supported
        for name, inside in partition.segments.items():
            figure.add_trace(
                go.Bar(
                    x=[len(inside)],
                    base=[inside[0] - 0.5],
                    y=[label],
                    orientation="h",
                    marker={
                        "color": transparent(segment_color(partition, name), 0.9 if sure else 0.45),
                        "line": {"width": 0},
                    },
                    hovertext=f"<b>{label}</b><br>{escape(name)}: blocks {inside[0]} to "
                    f"{inside[-1]}<br>{partition.n_boundaries} boundaries supported (p = "
                    f"{partition.p_value:.3g} for two)",
                    hoverinfo="text",
                    showlegend=False,
                ),
                row=2,
                col=1,
            )
        reach = list(zip(partition.boundaries, partition.intervals, strict=True))
        figure.add_trace(
            go.Scatter(
                x=[b - 0.5 for b in partition.boundaries],
                y=[label] * len(reach),
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - b for b, (_, high) in reach],
                    "arrayminus": [b - low for b, (low, _) in reach],
                    "color": "#ffffff",
                    "thickness": 2,
                    "width": 5,
                },
                mode="markers",
                marker={"color": "#ffffff", "size": 6},
                hoverinfo="skip",
                showlegend=False,
            ),
            row=2,
            col=1,
        )
    n_layers = emergence.profiles[0].n_layers
    figure.update_xaxes(
        title_text="block", range=[-0.6, n_layers - 0.4], showgrid=False, row=2, col=1
    )
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, title_text="checkpoint", row=2, col=1
    )
