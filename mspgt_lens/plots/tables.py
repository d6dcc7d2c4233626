"""Figures of small results from their tidy tables: lines along an axis, or intervals by row."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.plots.look import (
    NEUTRAL,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    style_figure,
    transparent,
)

# What a line may run along, the first that there is.
_AXES = ("beta", "site", "block", "point")
_NAMES = ("quantity", "prediction", "scale", "segment", "class", "site")
_ROW_HEIGHT = 26


@in_own_state
def plot_table(result: Result) -> go.Figure:
    """A result's table: a line for every quantity along its axis, or one interval per row.

    Shaded bands and bars are 95% intervals. Of rows without a value only the name is shown.

    Args:
        result: Any result of this package.

    Returns:
        The figure; nothing is shown.
    """
    table = result.to_dataframe()
    axis = next((name for name in _AXES if name in table and table[name].nunique() > 1), None)
    names = [n for n in _NAMES if n in table and n != axis and table[n].nunique() > 1]
    figure = go.Figure()
    if axis is None:
        _draw_rows(figure, table, names)
        height = 190 + _ROW_HEIGHT * len(table)
    else:
        _draw_lines(figure, table, axis, names)
        height = 380
    units = list(dict.fromkeys(table["unit"])) if "unit" in table else []
    style_figure(figure, escape(result.heading()), escape("; ".join(map(str, units))), height)
    if axis is None:
        figure.update_layout(margin={"l": 230})
    return figure


@in_own_state
def plot_class_counts(classes: TokenClasses) -> go.Figure:
    """How many tokens depend on each band of context.

    Args:
        classes: From :func:`~mspgt_lens.classify_tokens`.

    Returns:
        The figure; nothing is shown.
    """
    names = list(classes.counts)
    figure = go.Figure(
        go.Bar(
            x=[escape(name) for name in names],
            y=list(classes.counts.values()),
            marker={"color": [SCALE_COLORS.get(name, NEUTRAL) for name in names]},
            hovertext=[f"<b>{escape(n)}</b>: {count:,}" for n, count in classes.counts.items()],
            hoverinfo="text",
        )
    )
    figure.update_yaxes(title_text="tokens")
    words = f"longest context that lowers the loss by {classes.threshold:g} nats or more"
    style_figure(figure, f"Tokens by context: {escape(classes.model_name)}", words, 380)
    return figure


def _draw_lines(figure: go.Figure, table: pd.DataFrame, axis: str, names: list[str]) -> None:
    groups = (
        [("", table)]
        if not names
        else [
            (", ".join(filter(None, map(str, key))), part)
            for key, part in table.groupby(names, sort=False)
        ]
    )
    for number, (label, part) in enumerate(groups):
        color = OTHER_COLORS[number % len(OTHER_COLORS)]
        if "low" in part:
            figure.add_trace(
                go.Scatter(
                    x=[*part[axis], *part[axis][::-1]],
                    y=[*part["high"], *part["low"][::-1]],
                    fill="toself",
                    fillcolor=transparent(color, 0.2),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
        figure.add_trace(
            go.Scatter(
                x=part[axis],
                y=part["value"],
                mode="lines",
                line={"color": color, "width": 2.2},
                name=escape(label),
                showlegend=bool(label),
                hovertext=[
                    f"<b>{axis} {digits(float(x))}</b><br>{escape(label)} {digits(float(y))}"
                    for x, y in zip(part[axis], part["value"], strict=True)
                ],
                hoverinfo="text",
            )
        )
    figure.update_xaxes(title_text=axis, type="log" if axis == "beta" else "linear")


def _draw_rows(figure: go.Figure, table: pd.DataFrame, names: list[str]) -> None:
    labels = ["" for _ in range(len(table))]
    if names:
        labels = [", ".join(filter(None, map(str, row))) for row in table[names].to_numpy()]
    # Names may repeat, and every row keeps its own place.
    places = np.arange(len(table))
    values = table["value"].astype(float)
    ends = {n: table[n].astype(float) if n in table else values for n in ("low", "high")}
    figure.add_trace(
        go.Scatter(
            x=values,
            y=places,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (ends["high"] - values).fillna(0.0),
                "arrayminus": (values - ends["low"]).fillna(0.0),
                "color": OTHER_COLORS[0],
                "thickness": 1.8,
                "width": 0,
            },
            mode="markers",
            marker={"color": OTHER_COLORS[0], "size": 9},
            hovertext=[
                f"<b>{escape(label)}</b><br>{digits(v)} ({digits(low)} to {digits(high)})"
                for label, v, low, high in zip(
                    labels, values, ends["low"], ends["high"], strict=True
                )
            ],
            hoverinfo="text",
            showlegend=False,
        )
    )
    figure.update_yaxes(
        tickvals=places,
        ticktext=[escape(label) for label in labels],
        range=[len(table) - 0.5, -0.5],
        showgrid=False,
    )
