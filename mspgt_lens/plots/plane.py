"""Information planes and scale maps of a profile."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Unit
from mspgt_lens.plots.look import DEPTH_SCALE, digits, style_figure
from mspgt_lens.plots.wording import (
    error_bars,
    future_words,
    interval_words,
    is_masked,
    past_words,
    place_words,
    sample_words,
    scale_color,
    scale_title,
)
from mspgt_lens.profile.results import LayerProfile

# Frontiers drawn per scale, about: more could not be told apart.
_FRONTIERS = 8


@in_own_state
def plot_information_plane(profile: LayerProfile, *, unit: Unit = "nats") -> go.Figure:
    """Retained against predicted information, and what a bottleneck of each rate could keep.

    Above: one path per scale through the layers, from the first site to the last; bars are 95%
    intervals. Below: per scale, the Gaussian bottleneck frontier of every fourth site or so, from
    the rate of its noisy summary to what that summary predicts. Both are colored by depth. The
    scales have axes of their own, since they differ by orders of magnitude.

    Args:
        profile: From :func:`~mspgt_lens.profile_layers`.
        unit: ``"nats"`` or ``"bits"``, of all axes.

    Returns:
        The figure; nothing is shown.
    """
    scales = profile.scales
    n_rows = 2 if profile.correlations else 1
    figure = make_subplots(
        rows=n_rows,
        cols=len(scales),
        subplot_titles=[scale_title(profile, scale) for scale in scales],
        horizontal_spacing=0.25 / len(scales),
        vertical_spacing=0.16,
    )
    for col, scale in enumerate(scales, start=1):
        _draw_path(figure, profile, scale, unit, col)
        if n_rows == 2:
            _draw_frontiers(figure, profile, scale, unit, col)
    figure.update_layout(
        coloraxis={
            "colorscale": DEPTH_SCALE,
            "cmin": 0,
            "cmax": profile.n_layers,
            "colorbar": {"title": {"text": "site"}, "thickness": 12, "outlinewidth": 0},
        }
    )
    name = escape(profile.model_name)
    told = "above: path through the layers, bars: 95% intervals"
    if n_rows == 2:
        told += "; below: what the best Gaussian bottleneck of each rate predicts"
    subtitle = sample_words([profile], told)
    height = 430 if n_rows == 1 else 740
    style_figure(figure, f"Information plane: {name}", subtitle, height=height)
    return figure


@in_own_state
def plot_scale_map(profile: LayerProfile, *, unit: Unit = "nats") -> go.Figure:
    """Depth by token offset: where each offset is best retained, and best predicted.

    Each row is shown as a share of its own maximum, which its label gives, since offsets differ by
    orders of magnitude. Rows that cannot be told from 0 at any site are left blank and say so.

    Args:
        profile: A profile with one band per offset:
            ``profile_layers(model, prompts, bands=OFFSET_BANDS)``.
        unit: Unit of the labels and the hover text.

    Returns:
        The figure; nothing is shown.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=(
            ["Retained: visible tokens", "Predicted: hidden tokens"]
            if is_masked(profile)
            else ["Retained: tokens already read", "Predicted: tokens to come"]
        ),
        horizontal_spacing=0.2,
    )
    sites = list(range(profile.n_layers + 1))
    for col, (curves, words) in enumerate(
        ((profile.retained, past_words), (profile.predicted, future_words)), start=1
    ):
        shares, labels, hover = [], [], []
        for scale in profile.scales:
            curve, band = curves[scale].to(unit), profile.bands[scale]
            silent = bool((curve.low <= 0).all())
            top = float(curve.values.max())
            shares.append([None] * len(sites) if silent else list(curve.values / top))
            name = str(band[0]) if band[0] == band[1] else f"{band[0]} to {band[1]}"
            told = "not above 0" if silent else f"max {digits(top)} {unit}"
            labels.append(f"{name}  ({told})")
            hover.append(
                [
                    f"<b>{place_words(profile, site, True)}</b><br>"
                    f"{digits(curve.values[site])} {unit} of {words(profile, scale)}<br>"
                    f"{interval_words(curve, site)}"
                    for site in sites
                ]
            )
        figure.add_trace(
            go.Heatmap(
                z=shares,
                x=sites,
                y=labels,
                zmin=0,
                zmax=1,
                colorscale=DEPTH_SCALE,
                showscale=col == 2,
                colorbar={
                    "title": {"text": "share of<br>row's max"},
                    "thickness": 12,
                    "outlinewidth": 0,
                    "tickformat": ".0%",
                },
                hovertext=hover,
                hoverinfo="text",
                xgap=1,
                ygap=1,
            ),
            row=1,
            col=col,
        )
        figure.update_xaxes(title_text="site", showgrid=False, row=1, col=col)
        figure.update_yaxes(
            title_text="token offset" if col == 1 else "", showgrid=False, row=1, col=col
        )
    name = escape(profile.model_name)
    subtitle = sample_words([profile], "95% intervals in the hover text")
    style_figure(figure, f"Scale map: {name}", subtitle, height=440)
    return figure


def _draw_path(figure: go.Figure, profile: LayerProfile, scale: str, unit: Unit, col: int) -> None:
    sites = range(profile.n_layers + 1)
    retained = profile.retained[scale].to(unit)
    told = profile.predicted[scale].to(unit)
    hover = [
        f"<b>{place_words(profile, site, True)}</b><br>"
        f"keeps {digits(retained.values[site])} {unit} of {past_words(profile, scale)}<br>"
        f"predicts {digits(told.values[site])} {unit} of {future_words(profile, scale)}"
        for site in sites
    ]
    path = go.Scatter(
        x=retained.values,
        y=told.values,
        error_x=error_bars(retained),
        error_y=error_bars(told),
        mode="lines+markers",
        line={"color": scale_color(profile, scale), "width": 1.5},
        marker={"color": list(sites), "coloraxis": "coloraxis", "size": 9},
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
    )
    figure.add_trace(path, row=1, col=col)
    figure.update_xaxes(title_text=f"retained ({unit})", row=1, col=col)
    figure.update_yaxes(title_text=f"predicted ({unit})" if col == 1 else "", row=1, col=col)
    for site, at in ((0, "first"), (profile.n_layers, "last")):
        figure.add_annotation(
            x=retained.values[site],
            y=told.values[site],
            text=at,
            showarrow=False,
            yshift=13,
            row=1,
            col=col,
        )


def _draw_frontiers(
    figure: go.Figure, profile: LayerProfile, scale: str, unit: Unit, col: int
) -> None:
    step = max(1, round(profile.n_layers / _FRONTIERS))
    sites = [*range(0, profile.n_layers, step), profile.n_layers]
    colors = sample_colorscale(DEPTH_SCALE, [site / profile.n_layers for site in sites])
    for site, color in zip(sites, colors, strict=True):
        frontier = profile.frontier(site, scale)
        rate, kept = frontier.rate.to(unit), frontier.relevance.to(unit)
        first = frontier.critical_beta
        hover = [
            f"<b>{place_words(profile, site, True)}</b><br>at beta {digits(beta)}, a summary of "
            f"{digits(rate.values[point])} {unit}<br>predicts {digits(kept.values[point])} {unit} "
            f"({digits(kept.low[point])} to {digits(kept.high[point])}) of "
            f"{future_words(profile, scale)}<br>"
            f"first worth its rate at beta {digits(first.value)} ({digits(first.low)} to "
            f"{digits(first.high)})"
            for point, beta in enumerate(frontier.betas)
        ]
        line = go.Scatter(
            x=rate.values,
            y=kept.values,
            mode="lines",
            line={"color": color, "width": 2},
            hovertext=hover,
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_trace(line, row=2, col=col)
    figure.update_xaxes(title_text=f"rate ({unit})", row=2, col=col)
    one_token = len(set(profile.bands[scale])) == 1
    axis = f"of the embedding ({unit})" if one_token else f"predicted ({unit})"
    figure.update_yaxes(title_text=axis, row=2, col=col)
