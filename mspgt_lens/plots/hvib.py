"""The figure of the trained H-VIB probe; nothing is shown."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Unit
from mspgt_lens.hvib.results import Grid, HvibFit
from mspgt_lens.plots.look import (
    DEPTH_SCALE,
    NEUTRAL,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    style_figure,
    transparent,
)

_TOKENS = "next token"


@in_own_state
def plot_hvib(fit: HvibFit, *, unit: Unit = "nats") -> go.Figure:
    """Rate against relevance: one path per site, along which beta grows; colored by depth.

    One panel per scale, and one for the next token. The rate is that of all t that the panel's
    decoder sees, an upper bound on what they take from the site; bars are 95% intervals of the
    relevance. A path further to the upper left is better: more of the target at less cost. Where
    the probe read each scale at its own tap, there is one path per panel.

    Args:
        fit: From :func:`~mspgt_lens.fit_hvib` or :func:`~mspgt_lens.arrays.fit_hvib_arrays`.
        unit: ``"nats"`` or ``"bits"``, of both axes.

    Returns:
        The figure; nothing is shown.
    """
    panels = _panels(fit)
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        subplot_titles=[title for title, _, _, _ in panels],
        horizontal_spacing=0.22 / len(panels),
    )
    n_sites = len(fit.sites)
    depths = np.linspace(0, 1, n_sites) if n_sites > 1 else np.array([0.5])
    colors = sample_colorscale(DEPTH_SCALE, depths.tolist())
    for col, (_, scale, rate, relevance) in enumerate(panels, start=1):
        for row, color in enumerate(colors):
            tapped = _tap_color(fit, scale) if fit.taps else color
            figure.add_trace(_path(fit, row, scale, rate, relevance, tapped, unit), row=1, col=col)
        figure.update_xaxes(title_text=f"rate ({unit})", rangemode="tozero", row=1, col=col)
        title = f"relevance ({unit} per token)" if col == 1 else ""
        figure.update_yaxes(title_text=title, row=1, col=col)
        _mark_betas(figure, fit, rate, relevance, unit, col)
    if n_sites > 1:
        figure.add_trace(_depth_bar(fit))
    words = (
        f"tested on {fit.n_positions['testing']:,} positions from "
        f"{fit.n_groups['testing']:,} groups; beta grows along each path; bars: 95% intervals"
    )
    name = f": {escape(fit.model_name)}" if fit.model_name else ""
    style_figure(figure, f"What a trained probe finds, and at which rate{name}", words, height=430)
    figure.update_layout(showlegend=False)
    return figure


def _panels(fit: HvibFit) -> list[tuple[str, str, Grid, Grid]]:
    """Title, scale, the rate that its decoder sees, and its relevance."""
    panels = [
        (_title(fit, scale), scale, fit.total_rate[scale], fit.relevance[scale])
        for scale in fit.scales
    ]
    if fit.token_relevance is not None:
        every = fit.total_rate[fit.scales[0]]
        panels.append(("Next token, by class", _TOKENS, every, fit.token_relevance))
    return panels


def _title(fit: HvibFit, scale: str) -> str:
    title = escape(scale.capitalize())
    band = fit.settings.get("bands", {}).get(scale)
    if band is None:
        return title
    return f"{title}: " + (
        f"offset {band[0]}" if band[0] == band[1] else f"offsets {band[0]} to {band[1]}"
    )


def _tap_color(fit: HvibFit, scale: str) -> str:
    if scale in SCALE_COLORS:
        return SCALE_COLORS[scale]
    return NEUTRAL if scale == _TOKENS else OTHER_COLORS[fit.scales.index(scale) % 4]


def _path(
    fit: HvibFit, row: int, scale: str, rate: Grid, relevance: Grid, color: str, unit: Unit
) -> go.Scatter:
    cost, told = rate.along_path(row).to(unit), relevance.along_path(row).to(unit)
    what = f"the {scale}" if scale == _TOKENS else f"the {escape(scale)} future"
    hover = [
        f"<b>{_place(fit, row, scale)}, beta {digits(beta)}</b><br>"
        f"tells {digits(told.values[i])} {unit} of {what}<br>"
        f"95% interval {digits(told.low[i])} to {digits(told.high[i])}<br>"
        f"at a rate of {digits(cost.values[i])} {unit} "
        f"({digits(cost.low[i])} to {digits(cost.high[i])})"
        for i, beta in enumerate(fit.betas)
    ]
    return go.Scatter(
        x=cost.values,
        y=told.values,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": told.high - told.values,
            "arrayminus": told.values - told.low,
            "color": transparent(NEUTRAL, 0.3),
            "thickness": 1,
            "width": 0,
        },
        mode="lines+markers",
        line={"color": color, "width": 1.4},
        marker={"color": color, "size": 6},
        hovertext=hover,
        hoverinfo="text",
    )


def _place(fit: HvibFit, row: int, scale: str) -> str:
    if fit.taps:
        return f"site {fit.taps.get(scale, fit.sites[row])}"
    return f"site {fit.sites[row]}"


def _mark_betas(
    figure: go.Figure, fit: HvibFit, rate: Grid, relevance: Grid, unit: Unit, col: int
) -> None:
    """Beta in figures at both ends of the highest path."""
    row = int(np.argmax(relevance.values[:, -1]))
    cost, told = rate.along_path(row).to(unit), relevance.along_path(row).to(unit)
    last = len(fit.betas) - 1
    for i in dict.fromkeys((0, last)):
        figure.add_annotation(
            x=cost.values[i],
            y=told.values[i],
            text=f"β = {digits(fit.betas[i])}",
            showarrow=False,
            yshift=16,
            xanchor="center" if i == 0 else "right",
            row=1,
            col=col,
        )


def _depth_bar(fit: HvibFit) -> go.Scatter:
    """Carries the color bar of the sites."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        marker={
            "color": [fit.sites[0]],
            "cmin": fit.sites[0],
            "cmax": fit.sites[-1],
            "colorscale": DEPTH_SCALE,
            "showscale": True,
            "colorbar": {"title": {"text": "site"}, "thickness": 12, "outlinewidth": 0},
        },
    )
