"""The figure of blocks skipped and swapped."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import Curve
from mspgt_lens.perturbation.block_runs import BLOCK_CHANGES, REACHES, SHIFTS
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.plots.look import NEUTRAL, OTHER_COLORS, digits, style_figure
from mspgt_lens.plots.perturbation import banded_line, least_positive

_COLORS = {"all": NEUTRAL, "same": OTHER_COLORS[1], "future": OTHER_COLORS[0]}
_NAMES = {
    "all": "changed everywhere",
    "same": "at the predicting token only",
    "future": "at earlier tokens only",
}
_DONE = {"skip": "skipped", "swap": "swapped with the next"}
_ROWS = {
    "kl": "KL from the clean prediction",
    "top1_kept": "Same most likely token",
    "entropy": "Change of the prediction's entropy",
}
# Decades that the axis of KL spans at most: rounding is not worth more.
_DECADES = 5


@in_own_state
def plot_block_effects(effects: BlockEffects) -> go.Figure:
    """KL, top-1 kept and change of entropy for every block skipped, and swapped with the next.

    Shaded bands are 95% intervals over documents. KL is on a logarithmic axis of at most five
    decades, which cuts intervals that reach 0 (hover gives them whole) and cannot show a KL of 0,
    as that of the last block on later tokens always is.

    Args:
        effects: From :func:`~mspgt_lens.studies.block_effects`.

    Returns:
        The figure; nothing is shown.
    """
    figure = make_subplots(
        rows=len(SHIFTS),
        cols=len(BLOCK_CHANGES),
        shared_yaxes=True,
        subplot_titles=[f"{_ROWS[m]},<br>block {_DONE[c]}" for m in SHIFTS for c in BLOCK_CHANGES],
        vertical_spacing=0.1,
        horizontal_spacing=0.05,
    )
    kl = [effects.curve(change, reach) for change in BLOCK_CHANGES for reach in REACHES]
    highest = max(float(curve.high.max()) for curve in kl)
    least = least_positive(*kl)
    floor = None if least is None else max(least, highest * 10.0**-_DECADES)
    for col, change in enumerate(BLOCK_CHANGES, start=1):
        for row, measure in enumerate(SHIFTS, start=1):
            for reach in REACHES:
                curve = effects.curve(change, reach, measure)
                hover = [_hover(curve, change, reach, measure, b) for b in range(len(curve))]
                for trace in banded_line(
                    np.arange(len(curve)),
                    curve,
                    _COLORS[reach],
                    hover,
                    floor if measure == "kl" else None,
                ):
                    trace.update(name=_NAMES[reach], legendgroup=reach)
                    if measure == "kl" and trace.showlegend:
                        # Rather a gap than a line to the bottom of the axis.
                        trace.update(y=np.where(curve.values > 0, curve.values, np.nan))
                    trace.update(showlegend=trace.showlegend and (row, col) == (1, 1))
                    figure.add_trace(trace, row=row, col=col)
        figure.update_xaxes(title_text="block", row=len(SHIFTS), col=col)
    figure.update_xaxes(showgrid=False, range=[-0.5, effects.n_layers - 0.5])
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=1)
    if floor is not None:
        figure.update_yaxes(range=[np.log10(floor), np.log10(highest * 1.5)], row=1)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], row=2)
    entropy = [effects.curve(c, r, "entropy") for c in BLOCK_CHANGES for r in REACHES]
    low, high = min(c.low.min() for c in entropy), max(c.high.max() for c in entropy)
    margin = 0.05 * (high - low)
    figure.update_yaxes(range=[low - margin, high + margin], row=3)
    for row, title in enumerate(("nats", "share of positions", "nats"), start=1):
        figure.update_yaxes(title_text=title, row=row, col=1)
    style_figure(
        figure,
        f"What each block is needed for: {escape(effects.model_name)}",
        f"{effects.skip.shape[3]:,} documents; 95% intervals over documents",
        920,
    )
    legend = {"x": 0, "xanchor": "left", "y": 1.07, "yanchor": "bottom", "yref": "paper"}
    figure.update_layout(margin={"t": figure.layout.margin.t + 45}, legend=legend)
    return figure


def _hover(curve: Curve, change: str, reach: str, measure: str, block: int) -> str:
    blocks = (
        f"block {block} skipped" if change == "skip" else f"blocks {block}, {block + 1} swapped"
    )
    return (
        f"<b>{blocks}, {_NAMES[reach]}</b><br>{_ROWS[measure]}: {digits(curve.values[block])} "
        f"{curve.unit}<br>95% interval {digits(curve.low[block])} to {digits(curve.high[block])}"
    )
