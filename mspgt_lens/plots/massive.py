"""The figure of massive activations taken away."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.perturbation.massive import TRAITS, MassiveAblation
from mspgt_lens.plots.look import NEUTRAL, OTHER_COLORS, digits, style_figure, transparent
from mspgt_lens.plots.perturbation import banded_line

_TITLES = {
    "massive_share": "Power in the three largest coordinates",
    "sink_rate": "Heads that attend to the first token",
    "prompt_entropy": "Entropy of the prompt's Gram matrix",
}
_AXES = {"massive_share": "share", "sink_rate": "share of heads", "prompt_entropy": "nats"}
_RUNS = {False: "clean", True: "without what the block writes"}


@in_own_state
def plot_massive_ablation(ablation: MassiveAblation) -> go.Figure:
    """What is massive, attention sinks and prompt entropy along depth, clean and without it.

    Shaded bands are 95% intervals over documents; the dotted line is the block whose writing was
    taken away. The subtitle says how far predictions move.

    Args:
        ablation: From :func:`~mspgt_lens.studies.ablate_massive`.

    Returns:
        The figure; nothing is shown.
    """
    figure = make_subplots(
        rows=1, cols=len(TRAITS), subplot_titles=list(_TITLES.values()), horizontal_spacing=0.07
    )
    colors = {False: NEUTRAL, True: OTHER_COLORS[1]}
    for col, trait in enumerate(TRAITS, start=1):
        where = "block" if trait == "sink_rate" else "site"
        for ablated, name in _RUNS.items():
            curve = ablation.curve(trait, ablated=ablated)
            hover = [
                f"<b>{where} {point}, {name}</b><br>{digits(curve.values[point])} {curve.unit}<br>"
                f"95% interval {digits(curve.low[point])} to {digits(curve.high[point])}"
                for point in range(len(curve))
            ]
            for trace in banded_line(np.arange(len(curve)), curve, colors[ablated], hover, None):
                trace.update(name=name, legendgroup=name)
                trace.update(showlegend=trace.showlegend and col == 1)
                figure.add_trace(trace, row=1, col=col)
        figure.add_vline(
            # Between the sites before and after the block.
            x=ablation.block if trait == "sink_rate" else ablation.block + 0.5,
            line={"color": transparent(NEUTRAL, 0.8), "width": 1, "dash": "dot"},
            row=1,
            col=col,
        )
        figure.update_xaxes(title_text=where, showgrid=False, row=1, col=col)
        figure.update_yaxes(title_text=_AXES[trait], rangemode="tozero", row=1, col=col)
    kl, kept = ablation.shift("kl"), ablation.shift("top1_kept")
    style_figure(
        figure,
        f"Without massive activations: {escape(ablation.model_name)}",
        f"taken away after block {ablation.block}; predictions move by {digits(kl.value)} nats "
        f"({digits(kl.low)} to {digits(kl.high)}) and keep {kept.value:.0%} of their most likely "
        "tokens",
        420,
    )
    legend = {"x": 0, "xanchor": "left", "y": 1.13, "yanchor": "bottom", "yref": "paper"}
    figure.update_layout(margin={"t": figure.layout.margin.t + 25}, legend=legend)
    return figure
