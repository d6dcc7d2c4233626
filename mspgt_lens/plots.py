"""Figures from results: every function returns a plotly ``Figure`` and shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.look import (
    DEPTH_SCALE,
    NEUTRAL,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    draw_segments,
    segment_words,
    style_figure,
    transparent,
)
from mspgt_lens.partition import ScalePartition
from mspgt_lens.results import Curve, LayerProfile, Unit

# Their changes with depth are small against their size.
_FAR_FROM_ZERO = {"compression", "inter_layer_information"}
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLUMNS = 3
_ROW_HEIGHT = 250

_TITLES = {
    "compression": "Compression",
    "relevance": "Relevance",
    "effective_rank": "Effective rank",
    "attention_span": "Attention span",
    "attention_entropy": "Attention entropy",
    "novelty": "Novelty",
    "inter_layer_information": "Inter-layer information",
    "update_ratio": "Update ratio",
}
_WORDS = {
    "compression": "a noisy channel needs {value} to carry this site",
    "relevance": "the ridge lens is {value} better than a unigram model",
    "logit_lens": "the logit lens is {value} better than a unigram model",
    "effective_rank": "the spectrum is as wide as {value}",
    "attention_span": "heads attend {value} back on average",
    "attention_entropy": "attention is spread over {value}",
    "novelty": "the block changes the geometry by {value}",
    "inter_layer_information": "the sites around the block share {value}",
    "update_ratio": "the update is {value} of the residual's length",
}


def plot_profile(
    profile: LayerProfile | Sequence[LayerProfile],
    partition: ScalePartition | None = None,
    *,
    unit: Unit = "nats",
) -> go.Figure:
    """All curves of one profile, or of several overlaid, as small multiples.

    Shaded bands are 95% intervals. Scales keep their color in every figure; overlaid profiles
    differ by their dashes.

    Args:
        profile: One profile, or several with the same bands.
        partition: Draws its segments behind the curves; of a model as deep as the profiles'.
        unit: Unit of the information quantities.

    Raises:
        ValueError: If there is no profile, or bands or depths differ.
    """
    profiles = _as_list(profile)
    first = profiles[0]
    if partition is not None and {p.n_layers for p in profiles} != {partition.n_blocks}:
        raise ValueError(
            f"partition is of {partition.n_blocks} blocks, but the profiles have "
            f"{sorted({p.n_layers for p in profiles})}"
        )
    groups = [
        [("compression", ""), ("relevance", ""), ("effective_rank", "")],
        [("retained", scale) for scale in first.scales],
        [("predicted", scale) for scale in first.scales],
        [(name, "") for name in first.signals if name != "effective_rank"],
    ]
    panels: list[tuple[str, str] | None] = []
    for group in groups:
        panels += [*group, *[None] * (-len(group) % _COLUMNS)]
    n_rows = len(panels) // _COLUMNS
    figure = make_subplots(
        rows=n_rows,
        cols=_COLUMNS,
        subplot_titles=["" if p is None else _panel_title(first, *p) for p in panels],
        vertical_spacing=0.32 / n_rows,
        horizontal_spacing=0.075,
    )
    relative = len({p.n_layers for p in profiles}) > 1
    for index, panel in enumerate(panels):
        if panel is None:
            continue
        row, col = index // _COLUMNS + 1, index % _COLUMNS + 1
        for number, one in enumerate(profiles):
            trace = _Trace(one, number, relative, unit, named=len(profiles) > 1)
            for item in trace.draw(*panel):
                figure.add_trace(item, row=row, col=col)
        quantity, scale = panel
        shown = _in_unit(_curve(first, quantity, scale), unit)
        axis = "site" if len(shown) > first.n_layers else "block"
        if partition is not None:
            # Block l lies between sites l and l + 1.
            shift = 0.0 if axis == "site" else -0.5
            draw_segments(figure, partition, shift, row=row, col=col)
        figure.update_xaxes(
            title_text=f"relative depth ({axis})" if relative else axis, row=row, col=col
        )
        figure.update_yaxes(
            title_text=_axis_unit(shown.unit),
            rangemode="normal" if quantity in _FAR_FROM_ZERO else "tozero",
            type="log" if quantity == "update_ratio" else "linear",
            dtick=1 if quantity == "update_ratio" else None,
            row=row,
            col=col,
        )
    for number, one in enumerate(profiles if len(profiles) > 1 else []):
        line = {"color": NEUTRAL, "dash": _DASHES[number % len(_DASHES)]}
        label = escape(one.model_name)
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label))
    names = ", ".join(dict.fromkeys(escape(p.model_name) for p in profiles))
    shaded = "shaded: 95% intervals"
    if partition is not None:
        shaded += f"; background: {segment_words(partition)}"
    style_figure(
        figure,
        f"What each layer keeps and predicts: {names}",
        _sample_words(profiles, shaded),
        height=130 + _ROW_HEIGHT * n_rows,
    )
    return figure


def plot_information_plane(profile: LayerProfile, *, unit: Unit = "nats") -> go.Figure:
    """Retained against predicted information: one path per scale, from the first site to the last.

    Markers are colored by depth; bars are 95% intervals. Local, Intermediate and Global have axes
    of their own, since they differ by orders of magnitude.
    """
    scales = profile.scales
    figure = make_subplots(
        rows=1,
        cols=len(scales),
        subplot_titles=[_scale_title(profile, scale) for scale in scales],
        horizontal_spacing=0.25 / len(scales),
    )
    sites = range(profile.n_layers + 1)
    for col, scale in enumerate(scales, start=1):
        kept = profile.retained[scale].to(unit)
        told = profile.predicted[scale].to(unit)
        hover = [
            f"<b>{_place(profile, site, True)}</b><br>"
            f"keeps {digits(kept.values[site])} {unit} of {_past(profile.bands[scale])}<br>"
            f"predicts {digits(told.values[site])} {unit} of {_future(profile.bands[scale])}"
            for site in sites
        ]
        figure.add_trace(
            go.Scatter(
                x=kept.values,
                y=told.values,
                error_x=_bars(kept),
                error_y=_bars(told),
                mode="lines+markers",
                line={"color": _color(profile, scale), "width": 1.5},
                marker={
                    "color": list(sites),
                    "colorscale": DEPTH_SCALE,
                    "size": 9,
                    "showscale": col == len(scales),
                    "colorbar": {"title": {"text": "site"}, "thickness": 12, "outlinewidth": 0},
                },
                hovertext=hover,
                hoverinfo="text",
                showlegend=False,
            ),
            row=1,
            col=col,
        )
        figure.update_xaxes(title_text=f"retained ({unit})", row=1, col=col)
        figure.update_yaxes(title_text=f"predicted ({unit})" if col == 1 else "", row=1, col=col)
        for site, at in ((0, "first"), (profile.n_layers, "last")):
            figure.add_annotation(
                x=kept.values[site],
                y=told.values[site],
                text=at,
                showarrow=False,
                yshift=13,
                row=1,
                col=col,
            )
    name = escape(profile.model_name)
    subtitle = _sample_words([profile], "bars: 95% intervals")
    style_figure(figure, f"Information plane: {name}", subtitle, height=430)
    return figure


def plot_scale_map(profile: LayerProfile, *, unit: Unit = "nats") -> go.Figure:
    """Depth by token offset: where each offset is best retained, and best predicted.

    Each row is shown as a share of its own maximum, which its label gives, since offsets differ by
    orders of magnitude. Rows that cannot be told from 0 at any site are left blank and say so.

    Args:
        profile: A profile with one band per offset:
            ``profile_layers(model, prompts, bands=OFFSET_BANDS)``.
        unit: Unit of the labels and the hover text.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=["Retained: tokens already read", "Predicted: tokens to come"],
        horizontal_spacing=0.2,
    )
    sites = list(range(profile.n_layers + 1))
    for col, (curves, words) in enumerate(
        ((profile.retained, _past), (profile.predicted, _future)), start=1
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
                    f"<b>{_place(profile, site, True)}</b><br>{digits(curve.values[site])} {unit} "
                    f"of {words(band)}<br>{_interval_words(curve, site)}"
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
    subtitle = _sample_words([profile], "95% intervals in the hover text")
    style_figure(figure, f"Scale map: {name}", subtitle, height=440)
    return figure


@dataclass(frozen=True)
class _Trace:
    """One profile's share of a panel: its interval and its line."""

    profile: LayerProfile
    number: int
    relative: bool
    unit: Unit
    named: bool

    def draw(self, quantity: str, scale: str) -> list[go.Scatter]:
        traces = self._curve(quantity, scale, _color(self.profile, scale))
        if quantity == "relevance" and self.profile.logit_lens is not None:
            traces += self._curve("logit_lens", "", OTHER_COLORS[0])
        return traces

    def _curve(self, quantity: str, scale: str, color: str) -> list[go.Scatter]:
        curve = _in_unit(_curve(self.profile, quantity, scale), self.unit)
        at_sites = len(curve) > self.profile.n_layers
        x = np.arange(len(curve)) / (self.profile.n_layers if self.relative else 1)
        who = f"<b>{escape(self.profile.model_name)}</b><br>" if self.named else ""
        hover = [
            f"{who}<b>{_place(self.profile, point, at_sites)}</b><br>"
            f"{_sentence(self.profile, quantity, scale, curve, point)}<br>"
            f"{_interval_words(curve, point)}"
            for point in range(len(curve))
        ]
        band = go.Scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([curve.high, curve.low[::-1]]),
            fill="toself",
            fillcolor=transparent(color, 0.2),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        line = go.Scatter(
            x=x,
            y=curve.values,
            mode="lines",
            line={"color": color, "width": 2.2, "dash": _DASHES[self.number % len(_DASHES)]},
            hovertext=hover,
            hoverinfo="text",
            showlegend=False,
        )
        return [band, line]


def _as_list(profile: LayerProfile | Sequence[LayerProfile]) -> list[LayerProfile]:
    profiles = [profile] if isinstance(profile, LayerProfile) else list(profile)
    if not profiles:
        raise ValueError("profile must be a LayerProfile or several, got none")
    if any(dict(p.bands) != dict(profiles[0].bands) for p in profiles):
        raise ValueError("profiles to overlay must have the same bands")
    return profiles


def _curve(profile: LayerProfile, quantity: str, scale: str) -> Curve:
    for name, at, curve in profile.curves():
        if (name, at) == (quantity, scale):
            return curve
    raise KeyError(f"profile has no {quantity} {scale}")


def _in_unit(curve: Curve, unit: Unit) -> Curve:
    return curve.to(unit) if curve.unit in ("nats", "bits") else curve


def _axis_unit(unit: str) -> str:
    return f"{unit} per token" if unit in ("nats", "bits") else unit


def _color(profile: LayerProfile, scale: str) -> str:
    if not scale:
        return NEUTRAL
    others = [s for s in profile.scales if s not in SCALE_COLORS]
    if scale in SCALE_COLORS:
        return SCALE_COLORS[scale]
    return OTHER_COLORS[others.index(scale) % len(OTHER_COLORS)]


def _panel_title(profile: LayerProfile, quantity: str, scale: str) -> str:
    if not scale:
        return _TITLES.get(quantity, quantity.replace("_", " ").capitalize())
    words: Callable[[tuple[int, int]], str] = _past if quantity == "retained" else _future
    return f"{quantity.capitalize()}, {escape(scale)}: {words(profile.bands[scale])}"


def _scale_title(profile: LayerProfile, scale: str) -> str:
    first, last = profile.bands[scale]
    offsets = f"offset {first}" if first == last else f"offsets {first} to {last}"
    return f"{escape(scale.capitalize())}: {offsets}"


def _past(band: tuple[int, int]) -> str:
    if band == (1, 1):
        return "the current token"
    if band[0] == band[1]:
        return f"the token {band[0] - 1} back"
    return f"tokens {band[0] - 1} to {band[1] - 1} back"


def _future(band: tuple[int, int]) -> str:
    if band == (1, 1):
        return "the next token"
    if band[0] == band[1]:
        return f"the token {band[0]} ahead"
    return f"tokens {band[0]} to {band[1]} ahead"


def _place(profile: LayerProfile, point: int, at_sites: bool) -> str:
    if not at_sites:
        return f"block {point} of {profile.n_layers}"
    if point == 0:
        return "site 0, before the first block"
    return f"site {point}, after block {point - 1}"


def _sentence(profile: LayerProfile, quantity: str, scale: str, curve: Curve, point: int) -> str:
    value = f"{digits(curve.values[point])} {curve.unit}"
    if quantity == "novelty":
        value = digits(curve.values[point])
    if quantity == "update_ratio":
        value = f"{digits(curve.values[point])} times"
        return f"the block's update is {value} the residual's length"
    if quantity == "retained":
        return f"keeps {value} of {_past(profile.bands[scale])}"
    if quantity == "predicted":
        return f"predicts {value} of {_future(profile.bands[scale])}"
    return _WORDS[quantity].format(value=value)


def _interval_words(curve: Curve, point: int) -> str:
    return f"95% interval {digits(curve.low[point])} to {digits(curve.high[point])}"


def _sample_words(profiles: Sequence[LayerProfile], intervals: str) -> str:
    parts = dict.fromkeys(f"{p.n_tokens:,} tokens from {p.n_groups:,} groups" for p in profiles)
    return f"{'; '.join(parts)}; {intervals}"


def _bars(curve: Curve) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": curve.high - curve.values,
        "arrayminus": curve.values - curve.low,
        "color": transparent(NEUTRAL, 0.45),
        "thickness": 1,
        "width": 0,
    }
