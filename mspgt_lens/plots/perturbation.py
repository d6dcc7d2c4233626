"""Figures of perturbation: response to noise, and which tokens each scale's perturbation hurts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Curve
from mspgt_lens.perturbation.brittleness import Brittleness, Mode
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.perturbation.draws import Shape
from mspgt_lens.plots.look import (
    NEUTRAL,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    style_figure,
    transparent,
)

# Blue to orange through gray: told apart with any color vision, on light and on dark.
_SHARE_SCALE = [[0.0, "#1f66a8"], [0.5, "#8c8c8c"], [1.0, "#c65a11"]]
_ROWS = ("KL from the clean prediction", "Same most likely token", "Slope by block")
_UNITS = {
    "covariance": "of each direction's standard deviation",
    "diagonal": "of each coordinate's standard deviation",
    "isotropic": "of the residual's root-mean-square",
}
_MODES = {
    "per_block": "noise at one block's entry, mean over the segment's blocks",
    "equal_energy": "noise at all of a segment's blocks, the same total variance for each segment",
}


@in_own_state
def plot_brittleness(brittleness: Brittleness, *, mode: Mode = "equal_energy") -> go.Figure:
    """Response curves of every segment, one column per noise shape, and the slope of every block.

    Shaded bands are 95% intervals over documents; levels, KL and slopes are on logarithmic axes,
    which begin at the smallest value drawn, so that an interval reaching 0 is cut there (hover
    gives it whole). Columns share their axes: the same level means another thing in another
    shape.

    Args:
        brittleness: From :func:`~mspgt_lens.measure_brittleness`.
        mode: ``"equal_energy"`` or ``"per_block"``, for the upper two rows.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If the mode is unknown.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    n_shapes = len(brittleness.shapes)
    figure = make_subplots(
        rows=3,
        cols=n_shapes,
        shared_yaxes=True,
        subplot_titles=[f"{row}, {s} noise" for row in _ROWS for s in brittleness.shapes],
        vertical_spacing=0.12,
        horizontal_spacing=0.06,
    )
    colors = _colors(brittleness.segments)
    slopes = brittleness.signals(n_folds=2)
    floors = [_floor(brittleness, mode), None, least_positive(*slopes.values())]
    for col, shape in enumerate(brittleness.shapes, start=1):
        for name in brittleness.segments:
            for row, measure in ((1, "kl"), (2, "agreement")):
                curve = brittleness.response(name, shape, mode, measure)
                hover = _hover(brittleness, name, shape, curve, measure)
                for trace in banded_line(
                    np.array(brittleness.levels), curve, colors[name], hover, floors[row - 1]
                ):
                    trace.update(name=name.capitalize(), legendgroup=name)
                    trace.update(showlegend=trace.showlegend and (row, col) == (1, 1))
                    figure.add_trace(trace, row=row, col=col)
        figure.add_hline(y=0.5, line={"color": NEUTRAL, "width": 1, "dash": "dot"}, row=2, col=col)
        slope = slopes[f"brittleness_{shape}"]
        words = [
            f"<b>block {b}</b><br>slope {digits(slope.values[b])} {slope.unit}<br>95% interval "
            f"{digits(slope.low[b])} to {digits(slope.high[b])}"
            for b in range(len(slope))
        ]
        for trace in banded_line(np.arange(len(slope)), slope, NEUTRAL, words, floors[2]):
            trace.update(showlegend=False)
            figure.add_trace(trace, row=3, col=col)
        for name, first, last in _spans(brittleness.segments):
            figure.add_vrect(
                x0=first - 0.5,
                x1=last + 0.5,
                fillcolor=transparent(colors[name], 0.13),
                line_width=0,
                layer="below",
                row=3,
                col=col,
            )
        for row in (1, 2):
            figure.update_xaxes(
                type="log",
                tickvals=brittleness.levels,
                ticktext=[f"{level:g}" for level in brittleness.levels],
                title_text=f"noise, {_UNITS[shape]}",
                row=row,
                col=col,
            )
        figure.update_xaxes(title_text="block", showgrid=False, row=3, col=col)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03], row=2)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=3)
    if floors[2] is not None:
        highest = max(float(curve.high.max()) for curve in slopes.values())
        figure.update_yaxes(range=[np.log10(floors[2]), np.log10(highest * 1.5)], row=3)
    figure.update_yaxes(title_text="nats per token", row=1, col=1)
    figure.update_yaxes(title_text="share of positions", row=2, col=1)
    figure.update_yaxes(title_text="nats / level²", row=3, col=1)
    title = f"Brittleness: {escape(brittleness.model_name)}"
    style_figure(figure, title, _MODES[mode], 960)
    legend = {"x": 0, "xanchor": "left", "y": 1.04, "yanchor": "bottom", "yref": "paper"}
    figure.update_layout(margin={"t": figure.layout.margin.t + 20}, legend=legend)
    return figure


@in_own_state
def plot_dissociation(table: Dissociation) -> go.Figure:
    """Loss increase of each class of tokens under perturbation of each segment, as a heat map.

    Colors compare classes within a row, since segments differ in strength: 1 is the row's mean.
    Dotted cells are those that MSPGT predicts to lead. Hover gives intervals.

    Args:
        table: From :func:`~mspgt_lens.measure_dissociation`.

    Returns:
        The figure; nothing is shown.
    """
    rows = [name.capitalize() for name in table.segments]
    columns = [
        f"{name.capitalize()}<br>{n:,} tokens"
        for name, n in zip(table.classes, table.counts, strict=True)
    ]
    reach = max(float(np.abs(table.relative - 1.0).max()), 1e-9)
    figure = go.Figure(
        go.Heatmap(
            x=columns,
            y=rows,
            z=table.relative,
            zmin=1 - reach,
            zmax=1 + reach,
            colorscale=_SHARE_SCALE,
            text=[
                [
                    f"<b>{digits(value)} nats</b><br>{share:.2f} of the row's mean"
                    for value, share in zip(*pair, strict=True)
                ]
                for pair in zip(table.values, table.relative, strict=True)
            ],
            texttemplate="%{text}",
            textfont={"color": "#ffffff", "size": 13},
            hovertext=[
                [
                    f"<b>{escape(segment)} blocks perturbed, tokens of class {escape(name)}</b><br>"
                    f"loss rises by {digits(table.values[i, j])} nats<br>95% interval "
                    f"{digits(table.low[i, j])} to {digits(table.high[i, j])}<br>"
                    f"{table.counts[j]:,} tokens"
                    for j, name in enumerate(table.classes)
                ]
                for i, segment in enumerate(table.segments)
            ],
            hoverinfo="text",
            colorbar={
                "title": {"text": "of the<br>row's mean"},
                "thickness": 12,
                "outlinewidth": 0,
                "nticks": 6,
            },
            xgap=3,
            ygap=3,
        )
    )
    for index in range(len(rows)):
        figure.add_shape(
            type="rect",
            x0=index - 0.46,
            x1=index + 0.46,
            y0=index - 0.43,
            y1=index + 0.43,
            line={"color": "#ffffff", "width": 2, "dash": "dot"},
        )
    interaction = table.interaction
    assert interaction.p_value is not None
    style_figure(
        figure,
        f"Which tokens each scale's perturbation hurts: {escape(table.model_name)}",
        f"{escape(table.perturbation)}; diagonal beyond rows and columns {interaction.value:+.3f} "
        f"({interaction.low:+.3f} to {interaction.high:+.3f}), p = {interaction.p_value:.2g}",
        height=200 + 95 * len(rows),
    )
    figure.update_xaxes(title_text="tokens that depend on this context", showgrid=False)
    figure.update_yaxes(title_text="blocks perturbed", autorange="reversed", showgrid=False)
    figure.update_layout(margin={"l": 125, "b": 80})
    return figure


def _colors(segments: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {
        name: SCALE_COLORS.get(name, OTHER_COLORS[index % len(OTHER_COLORS)])
        for index, name in enumerate(segments)
    }


def _spans(segments: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """Every run of neighboring blocks of a segment."""
    for name, blocks in segments.items():
        first = last = sorted(blocks)[0]
        for block in sorted(blocks)[1:]:
            if block > last + 1:
                yield name, first, last
                first = block
            last = block
        yield name, first, last


def _floor(brittleness: Brittleness, mode: Mode) -> float | None:
    return least_positive(
        *(
            brittleness.response(name, shape, mode)
            for name in brittleness.segments
            for shape in brittleness.shapes
        )
    )


def least_positive(*curves: Curve) -> float | None:
    """Half the smallest positive value: where a logarithmic axis cuts intervals that reach 0."""
    positive = [float(v) for curve in curves for v in curve.values if v > 0]
    return min(positive) / 2 if positive else None


def banded_line(
    x: np.ndarray, curve: Curve, color: str, hover: list[str], floor: float | None
) -> Iterator[go.Scatter]:
    """A curve's interval as a band, cut at the floor where there is one, then its line."""
    low = curve.low if floor is None else np.maximum(curve.low, floor)
    yield go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([curve.high, low[::-1]]),
        fill="toself",
        fillcolor=transparent(color, 0.2),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
    yield go.Scatter(
        x=x,
        y=curve.values,
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker={"size": 5},
        hovertext=hover,
        hoverinfo="text",
        showlegend=True,
    )


def _hover(
    brittleness: Brittleness, name: str, shape: Shape, curve: Curve, measure: str
) -> list[str]:
    what = "KL" if measure == "kl" else "same most likely token"
    unit = " nats" if measure == "kl" else ""
    return [
        f"<b>{escape(name)}, {shape} noise {level:g}</b><br>{what} {digits(curve.values[i])}{unit}"
        f"<br>95% interval {digits(curve.low[i])} to {digits(curve.high[i])}{unit}"
        for i, level in enumerate(brittleness.levels)
    ]
