"""Forest plots of effect sizes: of perturbations on predictions, and on generated text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.perturbation.perturbing import PerturbationEffects
from mspgt_lens.plots.look import (
    NEUTRAL,
    OTHER_COLORS,
    SCALE_COLORS,
    digits,
    style_figure,
    transparent,
)
from mspgt_lens.plots.texts import plot_texts

Measure = Literal["kl", "cross_entropy", "agreement"]
_AXES: dict[str, str] = {
    "kl": "KL from the clean prediction, nats per token",
    "cross_entropy": "rise of the next token's loss, nats",
    "agreement": "share of positions that keep their most likely token",
}
_ROW_HEIGHT = 58


@in_own_state
def plot_effects(
    effects: PerturbationEffects | GenerationEffects, *, measure: Measure = "kl"
) -> go.Figure:
    """Forest plot: one row per perturbation or property of text, one color per segment.

    Bars are 95% intervals over groups, gray ticks random block sets of the segment's size. Of
    perturbations the measure is shown (KL on a logarithmic axis). Of generated text it is Cliff's
    delta, one panel per perturbation: filled points are the effects that MSPGT's first version
    predicts, and undefined effects are left blank. Hover for the numbers in words.

    Args:
        effects: From :func:`~mspgt_lens.perturb_scales` or :func:`~mspgt_lens.generation_effects`.
        measure: Of perturbations: ``"kl"``, ``"cross_entropy"`` or ``"agreement"``.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If the measure is unknown.
    """
    if measure not in _AXES:
        raise ValueError(f"measure must be one of {', '.join(_AXES)}, got {measure!r}")
    if isinstance(effects, GenerationEffects):
        return plot_texts(effects)
    names = list(effects.perturbations)
    figure = go.Figure(list(_traces(effects, measure)))
    figure.update_yaxes(
        tickvals=[len(names) - row for row in range(len(names))],
        ticktext=[escape(name) for name in names],
        range=[0.4, len(names) + 0.6],
        showgrid=False,
    )
    for edge in range(1, len(names)):
        figure.add_hline(y=edge + 0.5, line={"color": transparent(NEUTRAL, 0.25), "width": 1})
    figure.update_xaxes(title_text=_AXES[measure])
    if measure == "kl":
        figure.update_xaxes(type="log", exponentformat="power")
    else:
        figure.add_vline(x=float(measure == "agreement"), line={"color": NEUTRAL, "width": 1})
    style_figure(
        figure,
        f"Perturbing each scale: {escape(effects.model_name)}",
        f"{effects.settings.get('n_groups')} documents; bars: 95% intervals; gray: random blocks",
        height=175 + _ROW_HEIGHT * len(names),
    )
    figure.update_layout(
        margin={"l": 150, "t": figure.layout.margin.t + 15},
        legend={"yref": "paper", "yanchor": "bottom", "y": 1 + 12 / (_ROW_HEIGHT * len(names))},
    )
    return figure


def _traces(effects: PerturbationEffects, measure: Measure) -> Iterator[go.Scatter]:
    """Of each segment, its controls and then its effects; the first perturbation on top."""
    table = effects.to_dataframe()
    table = table[table["quantity"] == measure]
    controls = effects.controls[..., list(_AXES).index(measure)]
    floor = -np.inf
    if measure == "kl":
        # A logarithmic axis has no room for 0.
        floor = min((v for v in (*table["value"], *controls.ravel()) if v > 0), default=1e-6) / 2
    n_names, n_segments = len(effects.perturbations), len(effects.segments)
    for number, segment in enumerate(effects.segments):
        color = SCALE_COLORS.get(segment, OTHER_COLORS[number % len(OTHER_COLORS)])
        # Segments side by side within each row, the first on top.
        shift = (0.5 - (number + 0.5) / n_segments) * 0.72
        heights = n_names - np.arange(n_names) + shift
        yield _ticks(np.maximum(controls[:, number], floor), heights)
        rows: list[Any] = list(table[table["segment"] == segment].itertuples())
        words = [_words(row, effects) for row in rows]
        yield _bars(rows, heights, floor, color, escape(segment), words)


def _ticks(
    controls: Float[np.ndarray, "perturbation draw"], heights: Float[np.ndarray, " perturbation"]
) -> go.Scatter:
    return go.Scatter(
        x=controls.ravel(),
        y=np.repeat(heights, controls.shape[1]),
        mode="markers",
        marker={
            "symbol": "line-ns",
            "size": 8,
            "line": {"width": 1.5, "color": transparent(NEUTRAL, 0.6)},
        },
        hoverinfo="skip",
        showlegend=False,
    )


def _bars(
    rows: Sequence[Any],
    heights: Float[np.ndarray, " perturbation"],
    floor: float,
    color: str,
    name: str,
    words: Sequence[str],
) -> go.Scatter:
    """Effects with their intervals, none drawn below the floor."""
    values = [max(row.value, floor) for row in rows]
    lows = [max(row.low, floor) for row in rows]
    return go.Scatter(
        x=values,
        y=list(heights),
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.high - x for row, x in zip(rows, values, strict=True)],
            "arrayminus": [x - low for x, low in zip(values, lows, strict=True)],
            "color": color,
            "thickness": 1.8,
            "width": 0,
        },
        mode="markers",
        marker={"color": color, "size": 9},
        name=name,
        hovertext=words,
        hoverinfo="text",
    )


def _words(row: Any, effects: PerturbationEffects) -> str:
    lines = [
        f"<b>{escape(row.perturbation)}</b> of {escape(row.segment)} "
        f"({len(effects.segments[row.segment])} blocks)",
        f"{digits(row.value)} ({digits(row.low)} to {digits(row.high)})",
        f"random blocks: {digits(row.control)} ({digits(row.control_low)} to "
        f"{digits(row.control_high)}); rank p {row.p_control:.3g}",
    ]
    if row.p_value == row.p_value:
        lines.append(f"p of no rise {row.p_value:.3g} after Holm")
    return "<br>".join(lines)
