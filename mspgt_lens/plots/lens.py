"""Figures of a lens: what it says of a text, site by site, and what it is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Curve
from mspgt_lens.lens.reading import LensReading
from mspgt_lens.lens.ridge_lens import RidgeLens
from mspgt_lens.plots.look import (
    NEUTRAL,
    OTHER_COLORS,
    digits,
    style_figure,
    transparent,
)

LensColor = Literal["probability", "rank", "entropy"]
# Cells without a rank: a color that is in no scale.
_BLANK = [[0.0, "#c9c9c9"], [1.0, "#c9c9c9"]]
# Dark to light with little between, since text is written on it: white on dark, dark on light. The
# light end is the sure one, whichever is shown.
_SURE_IS_HIGH: list[list[Any]] = [
    [0.0, "#3b2f7a"],
    [0.45, "#2a7886"],
    [0.7, "#84c98c"],
    [1.0, "#f4e07a"],
]
_SURE_IS_LOW = [[1.0 - place, color] for place, color in reversed(_SURE_IS_HIGH)]
_TITLES = {
    "probability": "probability of the token shown",
    "rank": "rank of the token that came",
    "entropy": "entropy (nats)",
}
_WORDS = {
    "probability": "color: the probability of the token shown",
    "rank": "color: the rank of the token that came",
    "entropy": "color: the entropy of the prediction",
}
_ROW = 21
_COLUMN = 62
_TOP, _SPACE = 75, 155
# Characters of a subtitle's line that a page 900 wide shows, and how high the line is.
_LINE, _LINE_HEIGHT = 115, 24
# As wide as a report's page.
_FIXED_FROM = 1100
_LONGEST = 9


@in_own_state
def plot_lens(
    lens: RidgeLens,
    model: Any,
    text: str | Sequence[int] | Int[Tensor, " pos"],
    *,
    color: LensColor = "probability",
) -> go.Figure:
    """What every site predicts at every position of a text: the most probable token in each cell.

    Columns are the text's tokens, rows the sites, the model's own prediction on top. Hover for the
    most probable tokens and their probabilities, the entropy, and the rank of the token that came.

    Args:
        lens: From :func:`~mspgt_lens.fit_lens`, or loaded.
        model: The model that it was fitted on.
        text: A text, or its token ids as the model takes them.
        color: ``"probability"`` of the token shown, ``"rank"`` of the token that came (1 is the
            most probable; blank where nothing came), or ``"entropy"`` of the prediction in nats.
            Light cells are sure ones.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If the model's weights are not those of the lens, the text does not fit the
            context, or there is no such color.

    Example:
        >>> lens = ml.fit_lens(model, prompts, progress=False)
        >>> figure = ml.plot_lens(lens, model, "w5 w6 w7 w8 w9", color="entropy")
    """
    return plot_lens_reading(lens.attach(model).read(text), color=color)


@in_own_state
def plot_lens_reading(reading: LensReading, *, color: LensColor = "probability") -> go.Figure:
    """The figure of :func:`plot_lens` from a reading that is already there.

    Args:
        reading: From :meth:`RidgeLens.read`.
        color: As in :func:`plot_lens`.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If there is no such color.
    """
    if color not in get_args(LensColor):
        raise ValueError(f"color must be one of {', '.join(get_args(LensColor))}, got {color!r}")
    n_sites, n_pos = reading.entropy.shape
    values, known, look = _colored(reading, color)
    figure = go.Figure(_cells(reading, values, known, look))
    if not known.all():
        plain = {"colorscale": _BLANK, "showscale": False}
        figure.add_trace(_cells(reading, np.zeros_like(values), ~known, plain))
    told = [f"most probable token at every site; {_WORDS[color]}", *reading.warnings]
    lines = [line for text in told for line in textwrap.wrap(text, _LINE)]
    more = _LINE_HEIGHT * (len(lines) - 1)
    style_figure(
        figure,
        f"Through the ridge lens: {escape(reading.model_name)}",
        "<br>".join(map(escape, lines)),
        _ROW * n_sites + _SPACE + more,
    )
    labels = [_short(token) for token in reading.tokens]
    figure.update_layout(margin={"t": _TOP + more})
    figure.update_xaxes(
        tickvals=np.arange(n_pos), ticktext=labels, showgrid=False, title_text="token read"
    )
    figure.update_yaxes(title_text="site", showgrid=False, range=[-0.5, n_sites - 0.5])
    if n_pos * _COLUMN > _FIXED_FROM:
        # Cells keep room for a token; the page scrolls.
        figure.update_layout(width=n_pos * _COLUMN + _SPACE)
    return figure


@in_own_state
def plot_lens_scores(lens: RidgeLens) -> go.Figure:
    """Held-out cross-entropy of a lens at every site, and its divergence from the model.

    Shaded bands are 95% intervals; the dotted line is the unigram model.

    Args:
        lens: From :func:`~mspgt_lens.fit_lens`, or loaded.

    Returns:
        The figure; nothing is shown.
    """
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=["Cross-entropy", "KL from the model's own predictions"]
    )
    for col, curve in enumerate((lens.cross_entropy, lens.kl), start=1):
        for trace in _line(curve, OTHER_COLORS[col - 1]):
            figure.add_trace(trace, row=1, col=col)
        figure.update_xaxes(title_text="site", row=1, col=col)
        figure.update_yaxes(title_text="nats per token" if col == 1 else "", row=1, col=col)
    figure.add_hline(
        y=lens.unigram,
        line={"color": NEUTRAL, "width": 1, "dash": "dot"},
        annotation={"text": "unigram model", "xanchor": "right"},
        row=1,
        col=1,
    )
    style_figure(
        figure,
        f"Ridge lens: {escape(lens.model_name)}",
        f"fitted on {lens.n_tokens:,} positions from {lens.n_groups:,} groups, held out at "
        f"{lens.n_decoded:,}; bands: 95% intervals",
        400,
    )
    return figure


def _cells(
    reading: LensReading,
    values: Float[np.ndarray, "site pos"],
    drawn: Bool[np.ndarray, "site pos"],
    look: dict[str, Any],
) -> go.Heatmap:
    """Some of the cells, each with its most probable token; the others stay empty."""
    n_sites, n_pos = values.shape

    def of_drawn(content: Callable[[int, int], Any], other: str | None = "") -> list[list[Any]]:
        return [
            [content(site, pos) if drawn[site, pos] else other for pos in range(n_pos)]
            for site in range(n_sites)
        ]

    return go.Heatmap(
        x=np.arange(n_pos),
        y=np.arange(n_sites),
        z=of_drawn(lambda site, pos: float(values[site, pos]), None),
        text=of_drawn(lambda site, pos: _short(reading.texts[int(reading.top[site, pos, 0])])),
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertext=of_drawn(lambda site, pos: _words(reading, site, pos)),
        hoverinfo="text",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        **look,
    )


def _colored(
    reading: LensReading, color: LensColor
) -> tuple[Float[np.ndarray, "site pos"], Bool[np.ndarray, "site pos"], dict[str, Any]]:
    """What colors the cells: values, where there are any, scale and bar."""
    title = {"text": _TITLES[color], "side": "right"}
    bar: dict[str, Any] = {"title": title, "thickness": 12, "outlinewidth": 0}
    known = np.ones(reading.entropy.shape, dtype=bool)
    if color == "probability":
        values, scale, most = reading.probability[:, :, 0], _SURE_IS_HIGH, 1.0
    elif color == "entropy":
        values, scale, most = reading.entropy, _SURE_IS_LOW, float(reading.entropy.max())
    else:
        known = reading.rank > 0
        values, scale = np.log10(np.where(known, reading.rank, 1)), _SURE_IS_LOW
        most = max(1.0, float(values.max()))
        decades = range(int(most) + 1)
        bar |= {"tickvals": list(decades), "ticktext": [f"{10**decade:,}" for decade in decades]}
    return values, known, {"zmin": 0, "zmax": most, "colorscale": scale, "colorbar": bar}


def _words(reading: LensReading, site: int, pos: int) -> str:
    last = site == len(reading.top) - 1
    best = zip(reading.top[site, pos], reading.probability[site, pos], strict=True)
    lines = [
        f"<b>site {site}{', the model itself' if last else ''}, at {_quoted(reading.tokens[pos])} "
        f"({reading.positions[pos]})</b>",
        *(f"{_quoted(reading.texts[int(token)])}  {share:.3f}" for token, share in best),
        f"entropy {digits(float(reading.entropy[site, pos]))} nats",
    ]
    if reading.rank[site, pos]:
        came = _quoted(reading.texts[int(reading.answers[pos])])
        lines.append(f"{came}, which came, has rank {reading.rank[site, pos]:,}")
    return "<br>".join(lines)


def _quoted(token: str) -> str:
    # Figures decode no quotes, and need none decoded: this is no attribute.
    return escape(repr(token), quote=False)


def _short(token: str) -> str:
    """A token as it fits a cell, white space made visible."""
    text = token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    shown = text.strip(" ") or "\u2423" * max(1, len(text))
    short = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}\u2026"
    return escape(short, quote=False)


def _line(curve: Curve, color: str) -> tuple[go.Scatter, go.Scatter]:
    sites = np.arange(len(curve))
    band = go.Scatter(
        x=[*sites, *sites[::-1]],
        y=[*curve.high, *curve.low[::-1]],
        fill="toself",
        fillcolor=transparent(color, 0.2),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        x=sites,
        y=curve.values,
        mode="lines",
        line={"color": color, "width": 2.2},
        showlegend=False,
        hovertext=[
            f"<b>site {site}</b><br>{digits(curve.values[site])} nats "
            f"({digits(curve.low[site])} to {digits(curve.high[site])})"
            for site in sites
        ],
        hoverinfo="text",
    )
    return band, line
