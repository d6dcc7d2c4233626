"""Figures of patching: what each block and position, head or segment does to the answer."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mspgt_lens.ambient import in_own_state
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.plots.look import (
    FAINT,
    NEUTRAL,
    SCALE_COLORS,
    digits,
    draw_segment_strip,
    style_figure,
    transparent,
)
from mspgt_lens.statistics import SIGNIFICANCE

# Blue to orange through gray: told apart with any color vision, on light and on dark.
_CHANGE_SCALE = [[0.0, "#1f66a8"], [0.5, "#c9c9c9"], [1.0, "#c65a11"]]
_SITES = {
    "resid_pre": "the residual before a block",
    "resid_mid": "the residual after a block's attention",
    "attn_out": "a block's attention output",
    "mlp_out": "a block's MLP output",
    "z": "one attention head's output",
    "q": "one attention head's queries",
    "k": "one attention head's keys",
    "v": "one attention head's values",
}
_DIRECTIONS = {
    "denoise": "clean activations into the corrupted run",
    "noise": "corrupted activations into the clean run",
}
_ROW = 22


@in_own_state
def plot_patching(sweep: PatchSweep, partition: ScalePartition | None = None) -> go.Figure:
    """Effects over blocks and positions (or heads), with the tokens at the axis.

    Gray is the unpatched run: 0 where clean activations were put into the corrupted run, 1 the
    other way round. Dots mark corrected p-values below 0.05. For heads, each cell shows the
    position with the largest change; hover tells which.

    Args:
        sweep: The sweep.
        partition: Draws its segments above, and its boundaries; of the same model.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If the partition is of another depth.
    """
    if partition is not None and partition.n_layers != sweep.n_layers:
        raise ValueError(
            f"partition is of {partition.n_layers} blocks, but the sweep is of {sweep.n_layers}"
        )
    start = 0.0 if sweep.direction == "denoise" else 1.0
    effect, hover, labels, p_values = _cells(sweep, start)
    heights = [26.0] * (partition is not None) + [max(140.0, _ROW * len(labels))]
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        shared_xaxes=True,
        row_heights=[h / sum(heights) for h in heights],
        vertical_spacing=8 / sum(heights),
    )
    row = len(heights)
    figure.add_trace(_heatmap(effect, start, hover), row=row, col=1)
    if p_values is not None:
        figure.add_trace(_dots(p_values), row=row, col=1)
    if partition is not None:
        draw_segment_strip(figure, partition, row=1, col=1)
        sure = {"color": NEUTRAL, "width": 3}
        unsure = {"color": transparent(NEUTRAL, 2 * FAINT), "width": 1.5, "dash": "dot"}
        for boundary in partition.boundaries:
            line = sure if partition.is_found(boundary) else unsure
            figure.add_vline(x=boundary - 0.5, line=line, row=row, col=1)
    style_figure(
        figure,
        f"Patching {_SITES[sweep.place]}: {escape(sweep.model_name)}",
        _sweep_words(sweep),
        int(sum(heights)) + 165,
    )
    longest = max(len(label) for label in labels)
    figure.update_layout(margin={"l": min(220, 60 + 7 * longest)})
    figure.update_xaxes(showgrid=False, range=[-0.6, effect.shape[1] - 0.4])
    axis = "block" if sweep.window == 1 else f"first of {sweep.window} blocks"
    figure.update_xaxes(title_text=axis, row=row, col=1)
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        tickmode="array",
        tickvals=np.arange(len(labels)),
        ticktext=labels,
        row=row,
        col=1,
    )
    return figure


@in_own_state
def plot_scale_patch(result: ScalePatch) -> go.Figure:
    """Each segment's effect with its 95% interval, over those of random sets of as many blocks.

    Args:
        result: From :func:`~mspgt_lens.patch_scales`.

    Returns:
        The figure; nothing is shown.
    """
    figure = go.Figure()
    for index, name in enumerate(result.segments):
        color = SCALE_COLORS.get(name, NEUTRAL)
        first, last = result.blocks[index]
        others = result.controls[index]
        figure.add_trace(
            go.Scatter(
                x=others,
                y=[index] * len(others),
                mode="markers",
                marker={"symbol": "line-ns-open", "size": 14, "color": transparent(NEUTRAL, 0.4)},
                hovertext=f"random sets of {last - first + 1} blocks: median "
                f"{digits(float(np.median(others)))}",
                hoverinfo="text",
                showlegend=False,
            )
        )
        bars = None
        words = ""
        if result.low is not None and result.high is not None:
            low, high = float(result.low[index]), float(result.high[index])
            bars = {
                "type": "data",
                "symmetric": False,
                "array": [high - result.effect[index]],
                "arrayminus": [result.effect[index] - low],
                "color": color,
                "thickness": 2,
            }
            words = f"<br>95% interval {digits(low)} to {digits(high)}"
        figure.add_trace(
            go.Scatter(
                x=[result.effect[index]],
                y=[index],
                error_x=bars,
                mode="markers",
                marker={"size": 12, "color": color},
                hovertext=f"<b>{escape(name)}</b>, blocks {first} to {last}<br>effect "
                f"{digits(float(result.effect[index]))}{words}<br>p = {result.p_values[index]:.3g}",
                hoverinfo="text",
                showlegend=False,
            )
        )
    labels = [
        f"{escape(name)}, {first} to {last}  (p = {p:.2g})"
        for name, (first, last), p in zip(
            result.segments, result.blocks, result.p_values, strict=True
        )
    ]
    for x in (0.0, 1.0):
        figure.add_vline(x=x, line={"color": transparent(NEUTRAL, 0.6), "width": 1, "dash": "dot"})
    style_figure(
        figure,
        f"Patching whole segments: {escape(result.model_name)}",
        f"{_DIRECTIONS[result.direction]}; 0 is the corrupted run, 1 the clean one; "
        "ticks: random sets of as many blocks",
        height=190 + 48 * len(labels),
    )
    figure.update_layout(margin={"l": 40 + 7 * max(len(label) for label in labels)})
    figure.update_xaxes(title_text=f"effect on {escape(result.metric_name.replace('_', ' '))}")
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=labels,
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
    )
    return figure


def _cells(
    sweep: PatchSweep, start: float
) -> tuple[np.ndarray, list[list[str]], list[str], np.ndarray | None]:
    """Effects ``[row, block]``, their hover texts, the rows' labels and p-values."""
    tokens = [_token_label(sweep, i) for i in range(len(sweep.tokens))]
    by_head = sweep.effect.ndim == 3
    if by_head:
        strongest = np.abs(sweep.effect - start).argmax(axis=1)
        labels = [f"head {head}" for head in range(sweep.effect.shape[2])]
    else:
        labels = tokens

    def at(values: np.ndarray) -> np.ndarray:
        if not by_head:
            return values.T
        picked: np.ndarray = np.take_along_axis(values, strongest[:, None, :], axis=1)[:, 0].T
        return picked

    values = {
        name: None if getattr(sweep, name) is None else at(getattr(sweep, name))
        for name in ("effect", "metric", "low", "high", "p_values")
    }
    effect, metric = values["effect"], values["metric"]
    assert effect is not None
    assert metric is not None
    low, high, p_values = values["low"], values["high"], values["p_values"]

    def words(row: int, block: int) -> str:
        token = tokens[strongest[block, row]] if by_head else labels[row]
        head = f", {labels[row]}" if by_head else ""
        lines = [
            f"<b>block {block}{head}, {token}</b>",
            f"effect {digits(effect[row, block])}, metric {digits(metric[row, block])}",
        ]
        if low is not None and high is not None:
            lines.append(f"95% interval {digits(low[row, block])} to {digits(high[row, block])}")
        if p_values is not None:
            lines.append(f"p = {p_values[row, block]:.3g} (Holm)")
        return "<br>".join(lines)

    n_rows, n_layers = effect.shape
    hover = [[words(row, block) for block in range(n_layers)] for row in range(n_rows)]
    return effect, hover, labels, p_values


def _heatmap(
    effect: Float[np.ndarray, "row block"], start: float, hover: list[list[str]]
) -> go.Heatmap:
    """Colors on both sides of the unpatched run."""
    n_rows, n_layers = effect.shape
    reach = max(float(np.abs(effect - start).max()), 1e-9)
    return go.Heatmap(
        x=np.arange(n_layers),
        y=np.arange(n_rows),
        z=effect,
        zmin=start - reach,
        zmax=start + reach,
        colorscale=_CHANGE_SCALE,
        hovertext=hover,
        hoverinfo="text",
        colorbar={"title": {"text": "effect"}, "thickness": 12, "outlinewidth": 0, "nticks": 7},
        xgap=1,
        ygap=1,
    )


def _dots(p_values: Float[np.ndarray, "row block"]) -> go.Scatter:
    rows, blocks = np.nonzero(p_values < SIGNIFICANCE)
    return go.Scatter(
        x=blocks,
        y=rows,
        mode="markers",
        marker={"size": 4, "color": "#111111"},
        hoverinfo="skip",
        showlegend=False,
    )


def _token_label(sweep: PatchSweep, index: int) -> str:
    """A token as text, escaped, with its position; white space is made visible."""
    text = sweep.tokens[index].replace("\n", "\\n").replace("\t", "\\t")
    shown = text.strip(" ") or "\u2423"
    position = int(sweep.positions[index])
    return f"{escape(shown)}  {'last' if position < 0 else position}"


def _sweep_words(sweep: PatchSweep) -> str:
    """Up to three lines, so that none is cut off."""
    first = f"{_DIRECTIONS[sweep.direction]}, {sweep.settings.get('n_pairs', '?')} pairs"
    if sweep.p_values is not None:
        first += "; dots: p < 0.05"
    if sweep.effect.ndim == 3:
        first += "; each head at its strongest position"
    lines = [
        first,
        f"0 is the corrupted run ({escape(sweep.metric_name.replace('_', ' '))} "
        f"{digits(sweep.corrupted)}), 1 the clean one ({digits(sweep.clean)})",
    ]
    error = sweep.attribution_error
    if error is not None:
        lines.append(
            f"attribution: off by {digits(error['mean'])} on average, correlation "
            f"{error['correlation']:.2f} with exact on {error['n_cells']:.0f} cells"
        )
    return "<br>".join(lines)
