"""Figures from results: every function returns a plotly ``Figure`` and shows nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import NATS_PER_BIT, Curve, Unit
from mspgt_lens.partition import ScalePartition
from mspgt_lens.plots.look import (
    FAINT,
    NEUTRAL,
    OTHER_COLORS,
    digits,
    segment_color,
    style_figure,
    transparent,
)
from mspgt_lens.plots.wording import (
    beyond_words,
    future_words,
    in_unit,
    interval_words,
    past_words,
    place_words,
    sample_words,
    scale_color,
)
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.signals import SIGNALS, SignalWords

DASHES = ("solid", "dash", "dot", "dashdot")
_COLUMNS = 3
_ROW_HEIGHT = 262
# Height of the segments above a panel, in pixels.
_STRIP = 7

# Of what is a signal of no block; signals say these things of themselves.
_TITLES = {"compression": "Compression", "relevance": "Relevance"}
_SENTENCES = {
    "compression": "a noisy channel needs {value} to carry this site",
    "relevance": "the ridge lens is {value} better than a unigram model",
    "logit_lens": "the logit lens is {value} better than a unigram model",
}


@in_own_state
def plot_profile(
    profile: LayerProfile | Sequence[LayerProfile],
    partition: ScalePartition | None = None,
    *,
    unit: Unit = "nats",
    unsupported: bool = False,
) -> go.Figure:
    """All curves of one profile, or of several overlaid, as small multiples.

    Shaded bands are 95% intervals. Scales keep their color in every figure; overlaid profiles
    differ by their dashes.

    Args:
        profile: One profile, or several with the same bands.
        partition: Draws its segments as a strip above the curves if the data support them; of a
            model as deep as the profiles'.
        unit: Unit of the information quantities.
        unsupported: Draw segments that the data do not support too, faint.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If there is no profile, or bands or depths differ.

    Example:
        >>> figure = ml.plot_profile(profile, unit="bits")
        >>> figure.write_html("profile.html")
    """
    profiles = _as_list(profile)
    if partition is not None and {p.n_layers for p in profiles} != {partition.n_layers}:
        raise ValueError(
            f"partition is of {partition.n_layers} blocks, but the profiles have "
            f"{sorted({p.n_layers for p in profiles})}"
        )
    strip = partition if partition is not None and (partition.supported or unsupported) else None
    panels = _panels(profiles)
    n_rows = len(panels) // _COLUMNS
    figure = make_subplots(
        rows=n_rows,
        cols=_COLUMNS,
        # What a scale is stands below its name: side by side they are too long for narrow screens.
        subplot_titles=[
            "" if p is None else panel_title(profiles, *p).replace(": ", "<br>", 1) for p in panels
        ],
        vertical_spacing=0.34 / n_rows,
        horizontal_spacing=0.075,
    )
    for index, panel in enumerate(panels):
        if panel is not None:
            cell = {"row": index // _COLUMNS + 1, "col": index % _COLUMNS + 1}
            _draw_panel(figure, cell, profiles, panel, strip, unit)
    for number, named in enumerate(profiles if len(profiles) > 1 else []):
        line = {"color": NEUTRAL, "dash": DASHES[number % len(DASHES)]}
        label = escape(named.model_name)
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label))
    names = ", ".join(dict.fromkeys(escape(p.model_name) for p in profiles))
    shaded = "shaded: 95% intervals"
    if partition is not None:
        shaded += f"; {_strip_words(partition, strip)}"
    style_figure(
        figure,
        f"What each layer keeps and predicts: {names}",
        sample_words(profiles, shaded),
        height=130 + _ROW_HEIGHT * n_rows,
    )
    if strip is not None:
        figure.update_annotations(yshift=_STRIP)
    return figure


def _panels(profiles: Sequence[LayerProfile]) -> list[tuple[str, str] | None]:
    """Quantity and scale of each panel, row by row; None where a row ends early."""
    scales = list(profiles[0].scales)
    # Profiles need not have the same signals: theirs may have been joined by others.
    signals = list(dict.fromkeys(name for profile in profiles for name in profile.signals))
    groups = [
        [
            ("compression", ""),
            ("relevance", ""),
            *[(name, "") for name in signals if name == "effective_rank"],
        ],
        [("retained", scale) for scale in scales],
        [("predicted", scale) for scale in scales],
        [("added", scale) for scale in scales if any(scale in p.added for p in profiles)],
        [(name, "") for name in signals if name != "effective_rank"],
    ]
    panels: list[tuple[str, str] | None] = []
    for group in groups:
        panels += [*group, *[None] * (-len(group) % _COLUMNS)]
    return panels


def _draw_panel(
    figure: go.Figure,
    cell: Mapping[str, int],
    profiles: Sequence[LayerProfile],
    panel: tuple[str, str],
    strip: ScalePartition | None,
    unit: Unit,
) -> None:
    """One quantity of all profiles, with its axes."""
    quantity, scale = panel
    relative = len({p.n_layers for p in profiles}) > 1
    for number, profile in enumerate(profiles):
        trace = _Trace(profile, number, relative, unit, named=len(profiles) > 1)
        for item in trace.draw(quantity, scale):
            figure.add_trace(item, **cell)
        if profile.about_one_token(quantity, scale):
            figure.add_trace(trace.most(), **cell)
    shown, owner = next(
        (in_unit(curve, unit), profile)
        for profile in profiles
        if (curve := curve_of(profile, quantity, scale)) is not None
    )
    axis = "site" if len(shown) > owner.n_layers else "block"
    if strip is not None:
        # Block l lies between sites l and l + 1.
        _draw_strip(figure, strip, 0.0 if axis == "site" else -0.5, cell)
    figure.update_xaxes(title_text=f"relative depth ({axis})" if relative else axis, **cell)
    figure.update_yaxes(**axis_style(owner, quantity, scale, shown.unit), **cell)


def _draw_strip(
    figure: go.Figure, partition: ScalePartition, shift: float, cell: Mapping[str, int]
) -> None:
    """The segments above a panel; block l begins at ``l + shift`` on its axis."""
    for name, blocks in partition.segments.items():
        figure.add_shape(
            type="rect",
            xref="x",
            x0=blocks[0] + shift,
            x1=blocks[-1] + 1 + shift,
            yref="y domain",
            ysizemode="pixel",
            yanchor=1,
            y0=2,
            y1=_STRIP,
            fillcolor=transparent(
                segment_color(partition, name), 1.0 if partition.supported else FAINT
            ),
            line={"width": 0},
            **cell,
        )


def _strip_words(partition: ScalePartition, strip: ScalePartition | None) -> str:
    """The segments' names in their colors, or why there are none."""
    if strip is None:
        return "no segments: the data do not support them"
    words = ", ".join(
        f"<span style='color:{segment_color(partition, name)}'>{escape(name)}</span> "
        f"{blocks[0]} to {blocks[-1]}"
        for name, blocks in partition.segments.items()
    )
    unsure = " (best places; not supported as such)" * (not partition.supported)
    return f"strip: {words}{unsure}"


@dataclass(frozen=True)
class _Trace:
    """One profile's share of a panel: its interval and its line."""

    profile: LayerProfile
    number: int
    relative: bool
    unit: Unit
    named: bool

    def draw(self, quantity: str, scale: str) -> list[go.Scatter]:
        traces = self._curve(quantity, scale, scale_color(self.profile, scale))
        if quantity == "relevance" and self.profile.logit_lens is not None:
            traces += self._curve("logit_lens", "", OTHER_COLORS[0])
        return traces

    def most(self) -> go.Scatter:
        """What one token tells at most: the unigram model's cross-entropy."""
        nats = self.profile.settings["unigram_cross_entropy"]
        value = nats if self.unit == "nats" else nats / NATS_PER_BIT
        last = 1 if self.relative else self.profile.n_layers
        who = f"<b>{escape(self.profile.model_name)}</b><br>" if self.named else ""
        return go.Scatter(
            x=[0, last],
            y=[value, value],
            mode="lines",
            line={"color": transparent(NEUTRAL, 0.6), "width": 1.2, "dash": "dot"},
            hovertext=f"{who}a unigram model's cross-entropy, {digits(value)} {self.unit}: "
            "what a token tells at most",
            hoverinfo="text",
            showlegend=False,
        )

    def _curve(self, quantity: str, scale: str, color: str) -> list[go.Scatter]:
        measured = curve_of(self.profile, quantity, scale)
        if measured is None:
            return []
        curve = in_unit(measured, self.unit)
        at_sites = len(curve) > self.profile.n_layers
        x = np.arange(len(curve)) / (self.profile.n_layers if self.relative else 1)
        who = f"<b>{escape(self.profile.model_name)}</b><br>" if self.named else ""
        hover = [
            f"{who}<b>{place_words(self.profile, point, at_sites)}</b><br>"
            f"{curve_sentence(self.profile, quantity, scale, curve, point)}<br>"
            f"{interval_words(curve, point)}"
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
            line={"color": color, "width": 2.2, "dash": DASHES[self.number % len(DASHES)]},
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


def curve_of(profile: LayerProfile, quantity: str, scale: str) -> Curve | None:
    """The profile's curve, or None where it has no such one."""
    matching = (c for name, at, c in profile.curves() if (name, at) == (quantity, scale))
    return next(matching, None)


def axis_style(profile: LayerProfile, quantity: str, scale: str, unit: str) -> dict[str, object]:
    """The axis of a curve's values: title, kind, and whether it begins at 0."""
    signal = _words([profile], quantity)
    # The changes of compression with depth are small against its size.
    from_zero = quantity != "compression" if signal is None else signal.from_zero
    logarithmic = signal is not None and signal.logarithmic
    return {
        "title_text": escape(_axis_unit(profile, quantity, scale, unit), quote=False),
        "rangemode": "tozero" if from_zero else "normal",
        "type": "log" if logarithmic else "linear",
        "dtick": 1 if logarithmic else None,
    }


def _axis_unit(profile: LayerProfile, quantity: str, scale: str, unit: str) -> str:
    if unit not in ("nats", "bits"):
        return unit
    if not scale or not profile.reads_tokens:
        return f"{unit} per token"
    about = "the token" if profile.about_one_token(quantity, scale) else "the band's mean"
    return f"{unit} about {about}"


def _words(profiles: Sequence[LayerProfile], signal: str) -> SignalWords | None:
    """What is said of a signal: the package's own words, or those that came with it."""
    own = (p.signal_words[signal] for p in profiles if signal in p.signal_words)
    return SIGNALS.get(signal) or next(own, None)


def panel_title(profiles: Sequence[LayerProfile], quantity: str, scale: str) -> str:
    """What a curve is, for the panel that shows it."""
    profile, words_of_signal = profiles[0], _words(profiles, quantity)
    if words_of_signal is not None:
        return escape(words_of_signal.title, quote=False)
    if not scale:
        return _TITLES.get(quantity, escape(quantity.replace("_", " ").capitalize()))
    if quantity == "added":
        return f"Added, {escape(scale)}: {beyond_words(profile, scale)}"
    words = past_words if quantity == "retained" else future_words
    return f"{quantity.capitalize()}, {escape(scale)}: {words(profile, scale)}"


def curve_sentence(
    profile: LayerProfile, quantity: str, scale: str, curve: Curve, point: int
) -> str:
    """What a curve says at one point."""
    number = digits(curve.values[point])
    value = f"{number} {curve.unit}"
    if (signal := _words([profile], quantity)) is not None:
        return escape(signal.sentence.format(number=number, value=value), quote=False)
    if quantity == "retained":
        return f"keeps {value} of {past_words(profile, scale)}"
    if quantity == "predicted":
        return f"predicts {value} of {future_words(profile, scale)}"
    if quantity == "added":
        beyond = beyond_words(profile, scale)
        return f"predicts {value} of {future_words(profile, scale)}, {beyond}"
    if quantity in _SENTENCES:
        return _SENTENCES[quantity].format(value=value)
    # Signals may come from elsewhere: from brittleness, or from the user.
    return f"{escape(quantity.replace('_', ' '))} is {escape(value)}"
