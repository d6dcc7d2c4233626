"""The figure of a partition's boundaries beside the places that theories name."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from mspgt_lens.ambient import in_own_state
from mspgt_lens.plots.look import FAINT, NEUTRAL, OTHER_COLORS, style_figure, transparent
from mspgt_lens.statistics import SIGNIFICANCE
from mspgt_lens.theory.place_comparison import PlaceComparison, PlacedTheory

_ROW_HEIGHT = 44


@in_own_state
def plot_places(comparison: PlaceComparison) -> go.Figure:
    """Each theory's places along depth, and the boundaries as lines.

    Filled where the boundaries are nearer to them than chance, after Holm's correction; lines are
    faint where the data do not support the boundaries. Hover for distances and p-values.

    Args:
        comparison: From :func:`~mspgt_lens.theory.compare_places`.

    Returns:
        The figure; nothing is shown.
    """
    theories = comparison.theories
    figure = go.Figure([_trace(one, len(theories) - i) for i, one in enumerate(theories)])
    strength = 1.0 if comparison.supported else FAINT
    for boundary in comparison.boundaries:
        line = {"color": transparent(NEUTRAL, strength), "width": 2}
        figure.add_vline(x=boundary, line=line)
    figure.update_xaxes(title_text="block", range=[-0.5, comparison.n_layers], showgrid=False)
    figure.update_yaxes(
        tickvals=[len(theories) - i for i in range(len(theories))],
        ticktext=[f"{escape(one.theory)}<br>p = {one.p_holm:.2g}" for one in theories],
        range=[0.4, len(theories) + 0.6],
    )
    unsure = "" if comparison.supported else ", which the data do not support"
    title = f"Whose places? {escape(comparison.model_name)}".rstrip()
    style_figure(
        figure,
        title,
        f"points: the theory's places; lines: the boundaries{unsure}; p after Holm's correction",
        175 + _ROW_HEIGHT * len(theories),
    )
    figure.update_layout(margin={"l": 170})
    return figure


def _trace(one: PlacedTheory, height: int) -> go.Scatter:
    near = one.p_holm < SIGNIFICANCE
    words = (
        f"{escape(one.what)}<br>distance {one.distance:.1%} of the depth; by chance "
        f"{one.chance:.1%} ({one.chance_low:.1%} to {one.chance_high:.1%})<br>p {one.p_value:.3g}, "
        f"after Holm's correction {one.p_holm:.3g}"
    )
    return go.Scatter(
        x=list(one.places),
        y=[height] * len(one.places),
        mode="markers",
        marker={
            "symbol": "diamond" if near else "diamond-open",
            "size": 12,
            "color": OTHER_COLORS[0] if near else NEUTRAL,
        },
        hovertext=[
            f"<b>{escape(one.theory)}: block {place:.3g}</b><br>{words}" for place in one.places
        ],
        hoverinfo="text",
        showlegend=False,
    )
