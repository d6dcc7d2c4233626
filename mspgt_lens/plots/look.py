"""The look that all figures share: colors, numbers, layout."""

from __future__ import annotations

import re
from html import escape, unescape

import plotly.graph_objects as go

from mspgt_lens.partition import ScalePartition

# Okabe and Ito's colors: told apart with any color vision, on light and on dark.
SCALE_COLORS = {"local": "#0072B2", "intermediate": "#D55E00", "global": "#009E73"}
OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1")
NEUTRAL = "#767676"
# Of segments and places that the data do not support.
FAINT = 0.35
# Viridis without its ends, which vanish on dark or on light.
DEPTH_SCALE = [[0.0, "#46327e"], [0.33, "#277f8e"], [0.66, "#4ac16d"], [1.0, "#d2b01c"]]

# Letters of a subtitle that a narrow notebook shows, and the height of a line of them in pixels.
_LETTERS = 118
_LINE = 24


def transparent(color: str, alpha: float) -> str:
    """``#rrggbb`` as ``rgba``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def digits(value: float) -> str:
    """Three digits that count, or whole thousands."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def style_figure(figure: go.Figure, title: str, subtitle: str, height: int) -> None:
    """One look for all figures: no background of their own, ink that reads on light and dark.

    A subtitle whose parts (between semicolons) are long goes over several lines, for which margin
    and height grow; one that is in lines already stays as it is.
    """
    lines_below = subtitle if "<br>" in subtitle else in_lines(subtitle)
    more = _LINE * (lines_below.count("<br>") - subtitle.count("<br>"))
    height += more
    figure.update_layout(
        title={
            "text": f"{title}<br><span style='font-size:13px'>{lines_below}</span>",
            "x": 0.01,
            "y": 1 - 18 / height,
            "yanchor": "top",
            "font": {"size": 18},
        },
        height=height,
        margin={"l": 60, "r": 20, "t": 105 + more, "b": 55},
        font={"color": NEUTRAL, "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yref": "container"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": NEUTRAL, "activecolor": NEUTRAL},
    )
    lines = {"gridcolor": transparent(NEUTRAL, 0.25), "linecolor": NEUTRAL, "zeroline": False}
    figure.update_xaxes(title_standoff=4, title_font_size=12, **lines)
    figure.update_yaxes(title_standoff=6, title_font_size=12, **lines)
    figure.update_annotations(font={"size": 13, "color": NEUTRAL})


def in_lines(words: str) -> str:
    """HTML broken after semicolons, so that a line has no more letters than are seen at once."""
    lines: list[str] = []
    for part in words.split("; "):
        joined = f"{lines[-1]}; {part}" if lines else part
        if lines and len(unescape(re.sub("<[^>]*>", "", joined))) > _LETTERS:
            lines[-1] += ";"
            lines.append(part)
        else:
            lines[-1:] = [joined]
    return "<br>".join(lines)


def segment_color(partition: ScalePartition, name: str) -> str:
    """A scale's own color; other segments take turns."""
    names = list(partition.segments)
    return SCALE_COLORS.get(name, OTHER_COLORS[names.index(name) % len(OTHER_COLORS)])


def draw_segment_strip(figure: go.Figure, partition: ScalePartition, *, row: int, col: int) -> None:
    """The segments as a row of bars with their names; faint where the data do not support them."""
    strength = 1.0 if partition.supported else FAINT
    for name, blocks in partition.segments.items():
        wide = len(blocks) * 12 >= partition.n_layers
        figure.add_trace(
            go.Bar(
                x=[blocks[0] - 0.5 + len(blocks) / 2],
                y=[1],
                width=[len(blocks)],
                marker={
                    "color": transparent(segment_color(partition, name), strength),
                    "line": {"width": 0},
                },
                text=escape(name.capitalize() if wide else name[0].upper()),
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "#ffffff" if partition.supported else NEUTRAL, "size": 13},
                hovertext=f"<b>{escape(name)}</b>: blocks {blocks[0]} to {blocks[-1]}"
                + "<br>not supported as such" * (not partition.supported),
                hoverinfo="text",
                showlegend=False,
            ),
            row=row,
            col=col,
        )
    figure.update_yaxes(visible=False, range=[0, 1], row=row, col=col)
