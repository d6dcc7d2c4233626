"""One figure to look around in: every curve, every site, no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Unit
from mspgt_lens.plots.look import NEUTRAL, style_figure, transparent
from mspgt_lens.plots.profile import DASHES, axis_style, curve_of, curve_sentence, panel_title
from mspgt_lens.plots.wording import (
    future_words,
    in_unit,
    interval_words,
    place_words,
    sample_words,
    scale_color,
)
from mspgt_lens.profile.results import LayerProfile

_HEIGHT = 860
_ABOVE, _BOTTOM = 55, 130
_PATTERNS = ("", "/", "x", "-")
_BETAS = np.geomspace(1.0, 1000.0, 31)
# Further settings that tell profiles of one model apart.
_TELLING = ("noise", "skip_first", "seed")
# Menus look the same on light and on dark pages: under the mouse, plotly makes them light.
_MENU: dict[str, Any] = {
    "bgcolor": "#f2f2f4",
    "bordercolor": NEUTRAL,
    "font": {"color": "#1d1d1f", "size": 13},
    "pad": {"l": 0, "r": 0, "t": 0, "b": 0},
    "yanchor": "bottom",
    "showactive": True,
}


@in_own_state
def explore(profile: LayerProfile | Sequence[LayerProfile], *, unit: Unit = "nats") -> go.Figure:
    """A figure to look around in: choose curves from menus, and a site with the slider.

    Above are two curves over depth, each chosen from its menu, over sites and over blocks. Below is
    one site, chosen with the slider: the share of their best sites' information that it retains and
    predicts, scale by scale, and from which beta on a Gaussian bottleneck finds a scale worth its
    rate. With several profiles, a further menu shows one alone. All is in the figure: no server and
    no kernel is asked when something is chosen.

    Args:
        profile: One profile, or several of the same depth: of raw and of standardized coordinates,
            with bands and with single offsets, of a model and its control.
        unit: Unit of the information quantities.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If there is no profile, or depths differ.

    Example:
        >>> ml.plots.explore(profile).write_html("explore.html")
    """
    shown = _labeled([profile] if isinstance(profile, LayerProfile) else list(profile))
    figure = make_subplots(
        rows=2,
        cols=2,
        subplot_titles=[
            "",
            "",
            "Share of the best site's, by scale;<br>faint: retained, full: predicted",
            "What a bottleneck of each beta keeps<br>of this site's predicted information",
        ],
        vertical_spacing=0.16,
        horizontal_spacing=0.085,
    )
    menus = [menu for col in (1, 2) for menu in _curve_menus(figure, shown, unit, col)]
    bars = [_add(figure, one, trace, 2, 1) for one in shown for trace in _bars(one)]
    lines = [_add(figure, one, trace, 2, 2) for one in shown for trace in _frontiers(one, unit)]
    names = ", ".join(dict.fromkeys(escape(one.profile.model_name) for one in shown))
    style_figure(
        figure,
        f"Look around: {names}",
        sample_words(
            [one.profile for one in shown],
            "shaded, thin lines on bars: 95% intervals; what cannot be told from 0 has no bar",
        ),
        _HEIGHT,
    )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=2)
    figure.update_xaxes(type="category", row=2, col=1)
    figure.update_xaxes(title_text="beta", type="log", row=2, col=2)
    figure.update_yaxes(title_text="share of the best site", row=2, col=1)
    figure.update_yaxes(title_text="share of what is kept at beta 1,000", row=2, col=2)
    slider = _site_slider(shown, unit, [*bars, *lines])
    if len(shown) > 1:
        menus.append(_profile_menu(figure, shown))
        for one in shown:
            line = {"color": NEUTRAL, "dash": one.dash}
            figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=escape(one.label))
    last = shown[0].profile.n_layers
    for col, place in ((1, last), (2, last - 0.5)):
        figure.add_vline(x=place, line={"color": NEUTRAL, "width": 1}, row=1, col=col)
    figure.update_layout(
        updatemenus=menus,
        sliders=[slider],
        barmode="group",
        legend={"x": 0, "xanchor": "left", "y": 1.09, "yanchor": "bottom", "yref": "paper"},
        margin={
            "t": figure.layout.margin.t + (_ABOVE if len(shown) > 1 else _ABOVE - 45),
            "b": _BOTTOM,
        },
    )
    for control in (*menus, slider):
        _press(figure, control)
    return figure


@dataclass(frozen=True)
class _Shown:
    """One profile and how it is told apart from the others."""

    profile: LayerProfile
    label: str
    number: int

    @property
    def look(self) -> dict[str, Any]:
        return {"meta": self.number, "showlegend": False, "hoverinfo": "text"}

    @property
    def dash(self) -> str:
        return DASHES[self.number % len(DASHES)]

    @property
    def who(self) -> str:
        return f"<b>{escape(self.label)}</b><br>" if self.label else ""


def _labeled(profiles: Sequence[LayerProfile]) -> list[_Shown]:
    """The profiles, each with what tells it apart; one alone needs no label."""
    depths = sorted({one.n_layers for one in profiles})
    if not profiles:
        raise ValueError("profile must be a LayerProfile or several, got none")
    if len(depths) > 1:
        raise ValueError(
            f"profile: all must be of one depth, got {', '.join(map(str, depths))} blocks; "
            "plot_profile overlays models of different depths"
        )
    if len(profiles) == 1:
        return [_Shown(profiles[0], "", 0)]
    told = [_told(one) for one in profiles]
    differing = [name for name in told[0] if len({one[name] for one in told}) > 1]
    labels: list[str] = []
    for number, known in enumerate(told, start=1):
        label = ", ".join(known[name] for name in differing) or f"profile {number}"
        labels.append(f"{label} ({number})" if label in labels else label)
    return [_Shown(*pair, i) for i, pair in enumerate(zip(profiles, labels, strict=True))]


def _told(profile: LayerProfile) -> dict[str, str]:
    """What may tell a profile from others, in words."""
    settings = profile.settings
    return {
        "model": profile.model_name,
        "control": (profile.control or "no control").replace("_", " "),
        "coordinates": str(settings.get("coordinates")),
        "bands": f"{len(profile.bands)} bands",
        **{name: f"{name.replace('_', ' ')} {settings.get(name)}" for name in _TELLING},
    }


def _add(figure: go.Figure, one: _Shown, trace: dict[str, Any], row: int, col: int) -> int:
    """Add a trace of a profile; its number in the figure."""
    kind = go.Bar if trace["type"] == "bar" else go.Scatter
    figure.add_trace(kind({**one.look, **trace}), row=row, col=col)
    return len(figure.data) - 1


def _curve_menus(
    figure: go.Figure, shown: Sequence[_Shown], unit: Unit, col: int
) -> list[dict[str, Any]]:
    """Empty curves over sites or over blocks, and the menu that fills them if there are any."""
    blank = {"type": "scatter", "mode": "lines"}
    band = {**blank, "fill": "toself", "hoverinfo": "skip", "line": {"width": 0}}
    indices = [
        _add(figure, one, trace, 1, col)
        for one in shown
        for trace in (band, {**blank, "line": {"width": 2.2, "dash": one.dash}})
    ]
    axis = "yaxis" if col == 1 else "yaxis2"
    choices = dict.fromkeys(
        (quantity, scale)
        for one in shown
        for quantity, scale, curve in one.profile.curves()
        if (len(curve) == one.profile.n_layers) == (col == 2)
    )
    buttons = []
    for quantity, scale in choices:
        having = [one for one in shown if curve_of(one.profile, quantity, scale) is not None]
        owner = having[0].profile
        style = axis_style(owner, quantity, scale, _unit_of(owner, quantity, scale, unit))
        parts = [part for one in shown for part in _curve(one, quantity, scale, unit)]
        keys = ("x", "y", "hovertext", "line.color", "fillcolor")
        # One curve alone may lie within a decade: its ticks are plotly's.
        style.pop("dtick")
        relayout = {f"{axis}.{name.replace('_', '.')}": value for name, value in style.items()}
        buttons.append(
            {
                "label": panel_title([one.profile for one in having], quantity, scale),
                "method": "update",
                "args": [
                    {key: [part[key] for part in parts] for key in keys},
                    {**relayout, f"{axis}.autorange": True},
                    indices,
                ],
            }
        )
    figure.update_xaxes(title_text="site" if col == 1 else "block", row=1, col=col)
    domain = figure.layout.xaxis.domain if col == 1 else figure.layout.xaxis2.domain
    # Of what is predicted of the next token there is most to see.
    first = next((i for i, choice in enumerate(choices) if choice[0] == "predicted"), 0)
    place = {"x": domain[0], "xanchor": "left", "y": 1.01}
    return [{**_MENU, **place, "buttons": buttons, "active": first}] if buttons else []


def _curve(one: _Shown, quantity: str, scale: str, unit: Unit) -> list[dict[str, Any]]:
    """What the band and the line of a curve show; nothing where a profile has no such curve."""
    measured = curve_of(one.profile, quantity, scale)
    color = scale_color(one.profile, scale if scale in one.profile.bands else "")
    look = {"line.color": color, "fillcolor": transparent(color, 0.2)}
    if measured is None:
        return [{"x": [], "y": [], "hovertext": [], **look}] * 2
    curve = in_unit(measured, unit)
    x = list(range(len(curve)))
    low, values, high = (_short(v) for v in (curve.low, curve.values, curve.high))
    at_sites = len(curve) > one.profile.n_layers
    hover = [
        f"{one.who}<b>{place_words(one.profile, point, at_sites)}</b><br>"
        f"{curve_sentence(one.profile, quantity, scale, curve, point)}<br>"
        f"{interval_words(curve, point)}"
        for point in x
    ]
    return [
        {"x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "hovertext": [], **look},
        {"x": x, "y": values, "hovertext": hover, **look},
    ]


def _unit_of(profile: LayerProfile, quantity: str, scale: str, unit: Unit) -> str:
    curve = curve_of(profile, quantity, scale)
    assert curve is not None
    return in_unit(curve, unit).unit


def _bars(one: _Shown) -> list[dict[str, Any]]:
    """Bars of what a site retains and predicts, still without heights."""
    colors = [scale_color(one.profile, scale) for scale in one.profile.scales]
    pattern = {
        "shape": _PATTERNS[one.number % len(_PATTERNS)],
        "fillmode": "replace",
        "solidity": 0.6,
        "size": 5,
    }
    ink = {"color": transparent(NEUTRAL, 0.7), "thickness": 1, "width": 0}
    return [
        {
            "type": "bar",
            "x": [escape(scale) for scale in one.profile.scales],
            "marker": {
                "color": [transparent(color, strength) for color in colors],
                "pattern": pattern,
                "line": {"width": 0},
            },
            "error_y": {"type": "data", "symmetric": False, **ink},
        }
        for strength in (0.4, 1.0)
    ]


def _frontiers(one: _Shown, unit: Unit) -> list[dict[str, Any]]:
    """A line a scale, of what each beta keeps; old profiles have none."""
    if not one.profile.correlations:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": _short(_BETAS),
            "line": {"color": scale_color(one.profile, scale), "dash": one.dash, "width": 2.2},
            "hovertemplate": f"{one.who}at beta %{{x:.3g}}, a summary of %{{customdata[1]:.3g}} "
            f"{unit}<br>predicts %{{customdata[0]:.3g}} {unit} of "
            f"{future_words(one.profile, scale)}<extra></extra>",
        }
        for scale in one.profile.scales
    ]


def _site_slider(shown: Sequence[_Shown], unit: Unit, indices: list[int]) -> dict[str, Any]:
    """The slider that chooses a site, for all that is shown of one site."""
    last = shown[0].profile.n_layers
    keys = ("y", "hovertext", "error_y.array", "error_y.arrayminus", "customdata")
    steps = []
    for site in range(last + 1):
        parts = [bars for one in shown for bars in _bars_at(one, site, unit)]
        parts += [line for one in shown for line in _frontiers_at(one, site, unit)]
        marks: dict[str, float] = {"shapes[0].x0": site, "shapes[0].x1": site}
        # Block l lies between sites l and l + 1.
        marks |= {"shapes[1].x0": site - 0.5, "shapes[1].x1": site - 0.5}
        steps.append(
            {
                "label": str(site),
                "method": "update",
                "args": [{key: [part.get(key) for part in parts] for key in keys}, marks, indices],
            }
        )
    return {
        "steps": steps,
        "active": last,
        "currentvalue": {"prefix": "site ", "font": {"size": 14}},
        "pad": {"t": 55, "b": 0},
        "len": 1.0,
        "bgcolor": transparent(NEUTRAL, 0.3),
        "activebgcolor": NEUTRAL,
        "bordercolor": NEUTRAL,
        "tickcolor": NEUTRAL,
    }


def _bars_at(one: _Shown, site: int, unit: Unit) -> list[dict[str, Any]]:
    """Heights of the bars, as shares of each curve's best site; none where that is not above 0."""
    parts = []
    for quantity in ("retained", "predicted"):
        curves = getattr(one.profile, quantity)
        part: dict[str, Any] = {"y": [], "hovertext": []}
        part |= {"error_y.array": [], "error_y.arrayminus": []}
        for scale in one.profile.scales:
            curve = in_unit(curves[scale], unit)
            top = int(np.argmax(curve.values))
            best = curve.values[top]
            silent = bool((curve.low <= 0).all())
            told = "cannot be told from 0 at any site" if silent else f"the best is site {top}"
            ends = (curve.values[site], curve.high[site], curve.low[site])
            value, high, low = _short(np.array(ends) / best) if not silent else (0.0, 0.0, 0.0)
            part["y"].append(None if silent else value)
            part["error_y.array"].append(high - value)
            part["error_y.arrayminus"].append(value - low)
            part["hovertext"].append(
                f"{one.who}<b>{place_words(one.profile, site, True)}</b><br>"
                f"{curve_sentence(one.profile, quantity, scale, curve, site)}<br>"
                f"{interval_words(curve, site)}; {told}"
            )
        parts.append(part)
    return parts


def _frontiers_at(one: _Shown, site: int, unit: Unit) -> list[dict[str, Any]]:
    """What each beta keeps of what the largest does, scale by scale."""
    parts = []
    for scale in one.profile.scales if one.profile.correlations else ():
        frontier = one.profile.frontier(site, scale, _BETAS)
        silent = bool((one.profile.predicted[scale].low <= 0).all())
        kept, rate = (in_unit(curve, unit).values for curve in (frontier.relevance, frontier.rate))
        most = kept[-1]
        parts.append(
            {
                "y": _short(kept / most) if most > 0 and not silent else [None] * len(kept),
                "customdata": [_short(pair) for pair in np.stack([kept, rate], axis=1)],
            }
        )
    return parts


def _profile_menu(figure: go.Figure, shown: Sequence[_Shown]) -> dict[str, Any]:
    """The menu that shows one profile alone."""
    owners = {i: trace.meta for i, trace in enumerate(figure.data) if trace.meta is not None}
    choices = [("all profiles", None), *((escape(one.label), one.number) for one in shown)]
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"visible": [number in (None, owner) for owner in owners.values()]},
                {},
                list(owners),
            ],
        }
        for label, number in choices
    ]
    return {**_MENU, "x": 1.0, "xanchor": "right", "y": 1.09, "buttons": buttons, "active": 0}


def _press(figure: go.Figure, control: dict[str, Any]) -> None:
    """Do what the control does where it stands."""
    choices = control["buttons"] if "buttons" in control else control["steps"]
    restyled, relayout, indices = choices[control["active"]]["args"]
    figure.plotly_restyle(restyled, indices)
    figure.plotly_relayout(relayout)


def _short(values: Float[np.ndarray, " point"]) -> list[float]:
    """Five digits, more than a screen shows: every choice is in the file."""
    return [float(f"{value:.5g}") for value in values]
