"""The figure of several models side by side."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.plots.look import (
    NEUTRAL,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    style_figure,
    transparent,
)
from mspgt_lens.studies.comparison import Comparison, records

_PANELS = (
    ("relevance", "", "Relevance"),
    ("predicted", "local", "Predicts: local"),
    ("predicted", "intermediate", "Predicts: intermediate"),
    ("predicted", "global", "Predicts: global"),
)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = {"local": "circle", "intermediate": "square", "global": "diamond"}


@in_own_state
def plot_comparison(comparison: Comparison) -> go.Figure:
    """Profiles on relative depth, segments as bars, and brittleness on a logarithmic axis.

    Families have a color each, models of a family a dash each. Faint segments are those that a
    model's data do not support as such. Shaded bands and bars are 95% intervals.

    Args:
        comparison: From :func:`~mspgt_lens.studies.compare_models`.

    Returns:
        The figure; nothing is shown.
    """
    names = list(comparison.models["model"])
    shapes = list(dict.fromkeys(comparison.brittleness["shape"]))
    bar = 26.0 * len(names) + 30
    heights = [230.0, bar, *([bar * 1.5] if shapes else [])]
    n_columns = len(_PANELS)
    specs: list[list[dict[str, int] | None]] = [
        [{} for _ in _PANELS],
        [{"colspan": n_columns}, *[None] * (n_columns - 1)],
    ]
    titles = [title for _, _, title in _PANELS] + ["Segments"]
    if shapes:
        span = n_columns // len(shapes)
        specs.append([{"colspan": span} if i % span == 0 else None for i in range(n_columns)])
        titles += [f"Brittleness, {escape(shape)} noise" for shape in shapes]
    gap = 75 / (sum(heights) + 75 * len(heights))
    figure = make_subplots(
        rows=len(heights),
        cols=n_columns,
        specs=specs,
        row_heights=[h / sum(heights) for h in heights],
        vertical_spacing=gap,
        horizontal_spacing=0.05,
        subplot_titles=titles,
    )
    _draw_profiles(figure, comparison)
    _draw_segments(figure, comparison)
    for index, shape in enumerate(shapes):
        _draw_brittleness(figure, comparison, shape, 1 + index * (n_columns // len(shapes)))
    cv = records(comparison.families)
    words = "; ".join(
        f"{escape(row['family'])} {row['cv']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        for row in cv[:4]
    )
    words = f"CV of boundary depth: {words}" + "; ..." * (len(cv) > 4)
    if not cv:
        words = "white: boundaries with their 95% intervals; faint: not supported as such"
    style_figure(
        figure,
        f"{len(names)} models side by side" if len(names) > 1 else escape(names[0]),
        words,
        int(sum(heights) + 75 * (len(heights) - 1) + 190),
    )
    longest = max(len(name) for name in names)
    figure.update_layout(
        barmode="overlay",
        bargap=0.3,
        margin={"l": min(30 + 7 * longest, 280)},
        legend={"y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left", "xref": "container"},
    )
    return figure


def _draw_profiles(figure: go.Figure, comparison: Comparison) -> None:
    families = list(dict.fromkeys(str(f or "") for f in comparison.models["family"]))
    seen: dict[str, int] = {}
    for model_row in records(comparison.models):
        model, family = model_row["model"], str(model_row["family"] or "")
        color = OTHER_COLORS[families.index(family) % len(OTHER_COLORS)]
        dash = _DASHES[seen.get(family, 0) % len(_DASHES)]
        seen[family] = seen.get(family, 0) + 1
        own = comparison.curves[comparison.curves["model"] == model]
        for column, (quantity, scale, _) in enumerate(_PANELS, start=1):
            curve = own[(own["quantity"] == quantity) & (own["scale"] == scale)]
            if not len(curve):
                continue
            figure.add_trace(
                go.Scatter(
                    x=[*curve["depth"], *curve["depth"][::-1]],
                    y=[*curve["high"], *curve["low"][::-1]],
                    fill="toself",
                    fillcolor=transparent(color, 0.12),
                    line={"width": 0},
                    hoverinfo="skip",
                    legendgroup=model,
                    showlegend=False,
                ),
                row=1,
                col=column,
            )
            figure.add_trace(
                go.Scatter(
                    x=curve["depth"],
                    y=curve["value"],
                    mode="lines",
                    line={"color": color, "dash": dash, "width": 2},
                    name=escape(model),
                    legendgroup=model,
                    showlegend=column == 1,
                    hovertext=[
                        f"<b>{escape(model)}</b><br>{100 * row['depth']:.0f}% of the depth, site "
                        f"{row['site']}<br>{digits(row['value'])} nats ({digits(row['low'])} to "
                        f"{digits(row['high'])})"
                        for row in records(curve)
                    ],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(tickformat=".0%", range=[0, 1], title_text="depth", row=1)
    figure.update_yaxes(title_text="nats per token", row=1, col=1)


def _draw_segments(figure: go.Figure, comparison: Comparison) -> None:
    models = {row["model"]: row for row in records(comparison.models)}
    first = next(iter(models))
    for row in records(comparison.segments):
        model = models[row["model"]]
        n_layers, sure = model["n_layers"], model["n_boundaries"] == 2
        figure.add_trace(
            go.Bar(
                x=[row["share"]],
                base=[row["start"] / n_layers],
                y=[escape(row["model"])],
                orientation="h",
                marker={
                    "color": transparent(SCALE_COLORS[row["segment"]], 0.9 if sure else 0.45),
                    "line": {"width": 0},
                },
                hovertext=f"<b>{escape(row['model'])}</b><br>{escape(row['segment'])}: blocks "
                f"{row['start']} to {row['start'] + row['blocks'] - 1}"
                + ("" if sure else "<br>not supported as such"),
                hoverinfo="text",
                name=escape(row["segment"]),
                legendgroup=f"segment {row['segment']}",
                # Brittleness, where it is drawn, names the colors.
                showlegend=row["model"] == first and comparison.brittleness.empty,
            ),
            row=2,
            col=1,
        )
    for row in records(comparison.models):
        figure.add_trace(
            go.Scatter(
                x=[row["first_depth"], row["second_depth"]],
                y=[escape(row["model"])] * 2,
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [
                        row["first_depth_high"] - row["first_depth"],
                        row["second_depth_high"] - row["second_depth"],
                    ],
                    "arrayminus": [
                        row["first_depth"] - row["first_depth_low"],
                        row["second_depth"] - row["second_depth_low"],
                    ],
                    "color": "#ffffff",
                    "thickness": 2,
                    "width": 5,
                },
                mode="markers",
                marker={"color": "#ffffff", "size": 5},
                hoverinfo="skip",
                showlegend=False,
            ),
            row=2,
            col=1,
        )
    figure.update_xaxes(
        tickformat=".0%", range=[0, 1], title_text="depth", showgrid=False, row=2, col=1
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, row=2, col=1)


def _draw_brittleness(figure: go.Figure, comparison: Comparison, shape: str, column: int) -> None:
    of_shape = comparison.brittleness[comparison.brittleness["shape"] == shape]
    for segment, rows in of_shape.groupby("segment", sort=False):
        figure.add_trace(
            go.Scatter(
                x=rows["value"],
                y=[escape(model) for model in rows["model"]],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": rows["high"] - rows["value"],
                    "arrayminus": rows["value"] - rows["low"],
                    "thickness": 1.5,
                    "width": 3,
                },
                mode="markers",
                marker={
                    "color": SCALE_COLORS.get(str(segment), NEUTRAL),
                    "symbol": _SYMBOLS.get(str(segment), "x"),
                    "size": 9,
                },
                name=escape(str(segment)),
                legendgroup=f"segment {segment}",
                showlegend=column == 1,
                hovertext=[
                    f"<b>{escape(row['model'])}</b><br>{segment}: {digits(row['value'])} "
                    f"({digits(row['low'])} to {digits(row['high'])})"
                    for row in records(rows)
                ],
                hoverinfo="text",
            ),
            row=3,
            col=column,
        )
    figure.update_xaxes(type="log", title_text="brittleness", row=3, col=column)
    figure.update_yaxes(
        autorange="reversed", showgrid=False, showticklabels=column == 1, row=3, col=column
    )
