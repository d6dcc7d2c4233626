"""The figure of the rates that predictions need of every site; nothing is shown."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Curve, Unit
from mspgt_lens.plots.look import (
    DEPTH_SCALE,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    style_figure,
    transparent,
)
from mspgt_lens.rates.results import Noise, RateDistortion


@in_own_state
def plot_rate_distortion(found: RateDistortion, *, unit: Unit = "nats") -> go.Figure:
    """The rate that predictions need over depth, and the rate-distortion function of every site.

    On top the rate at the distortion nearest to 0.1 nats over the sites, one line per scale with
    its 95% interval; dotted, the same of noise that keeps one correlation in every direction, where
    it needs more. Below one panel per scale: rate against distortion, one line per site, early
    (dark) to late (bright).

    Args:
        found: From :func:`~mspgt_lens.rate_distortion`.
        unit: ``"nats"`` or ``"bits"``, of rates; distortions stay in nats.

    Returns:
        The figure; nothing is shown.
    """
    scales = list(found.bands)
    shown = found.distortions[found.shown]
    panels = [f"R(D), {escape(_title(found, scale))}" for scale in scales]
    figure = make_subplots(
        rows=2,
        cols=len(scales),
        specs=[[{"colspan": len(scales)}, *[None] * (len(scales) - 1)], [{}] * len(scales)],
        subplot_titles=[f"Rate needed at D = {shown:g} nats", *panels],
        vertical_spacing=0.16,
        horizontal_spacing=0.05,
    )
    for number, scale in enumerate(scales):
        color = SCALE_COLORS.get(scale, OTHER_COLORS[number % len(OTHER_COLORS)])
        lines: tuple[Noise, ...] = ("either", "covariance")
        for noise in lines:
            _draw_depth(figure, found, scale, noise, unit, color)
        _draw_functions(figure, found, scale, unit, number + 1)
    figure.update_xaxes(title_text="site", row=1)
    figure.update_yaxes(title_text=f"{unit} per token", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(
        title_text="distortion D (nats of KL)",
        type="log",
        tickvals=found.distortions,
        ticktext=[f"{distortion:g}" for distortion in found.distortions],
        row=2,
    )
    figure.update_yaxes(title_text=f"{unit} per token", row=2, col=1)
    figure.update_yaxes(rangemode="tozero", row=2)
    name = f": {escape(found.model_name)}" if found.model_name else ""
    words = (
        "upper bounds, by whichever noise needs less; bands: 95% intervals; dotted: one "
        "correlation in every direction; below: early sites dark"
    )
    style_figure(figure, f"What predictions need of every site{name}", words, height=760)
    figure.update_layout(
        margin={"b": 95},
        legend={"y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left", "xref": "container"},
    )
    return figure


def _title(found: RateDistortion, scale: str) -> str:
    a, b = found.bands[scale]
    return f"{scale}: " + (f"{a} ahead" if a == b else f"{a} to {b} ahead")


def _draw_depth(
    figure: go.Figure, found: RateDistortion, scale: str, noise: Noise, unit: Unit, color: str
) -> None:
    """One line over the sites, with its interval."""
    curve = found.over_sites(scale, found.distortions[found.shown], noise=noise).to(unit)
    is_least = noise == "either"
    is_shaped = found.is_shaped[list(found.bands).index(scale), :, found.shown] & is_least
    kinds = np.where(is_shaped, "shaped noise", "one correlation in every direction")
    sites = np.array(found.sites)
    figure.add_trace(
        go.Scatter(
            x=np.concatenate([sites, sites[::-1]]),
            y=np.concatenate([curve.high, curve.low[::-1]]),
            mode="lines",
            fill="toself",
            fillcolor=transparent(color, 0.18 if is_least else 0.07),
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=scale,
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Scatter(
            x=sites,
            y=curve.values,
            mode="lines+markers",
            line={"color": color, "width": 2, "dash": "solid" if is_least else "dot"},
            marker={"size": 6 if is_least else 4},
            name=escape(_title(found, scale)),
            legendgroup=scale,
            showlegend=is_least,
            hovertext=[
                f"<b>site {site}, {escape(scale)}, {kinds[i]}</b><br>{_words(curve, i)}"
                for i, site in enumerate(found.sites)
            ],
            hoverinfo="text",
        ),
        row=1,
        col=1,
    )


def _draw_functions(
    figure: go.Figure, found: RateDistortion, scale: str, unit: Unit, col: int
) -> None:
    """R(D) of every site."""
    depths = np.array(found.sites) / found.n_layers
    for site, color in zip(
        found.sites, sample_colorscale(DEPTH_SCALE, depths.tolist()), strict=True
    ):
        curve = found.over_distortions(scale, site).to(unit)
        figure.add_trace(
            go.Scatter(
                x=found.distortions,
                y=curve.values,
                mode="lines+markers",
                line={"color": color, "width": 1.4},
                marker={"size": 5},
                showlegend=False,
                hovertext=[
                    f"<b>site {site}, {escape(scale)}, D = {distortion:g}</b><br>{_words(curve, i)}"
                    for i, distortion in enumerate(found.distortions)
                ],
                hoverinfo="text",
            ),
            row=2,
            col=col,
        )


def _words(curve: Curve, point: int) -> str:
    value, low, high = (digits(x[point]) for x in (curve.values, curve.low, curve.high))
    return f"at most {value} {curve.unit} per token are needed<br>95% interval {low} to {high}"
