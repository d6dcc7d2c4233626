"""Figure of what interventions on each scale do to generated text."""

from __future__ import annotations

from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.plots.look import NEUTRAL, OTHER_COLORS, SCALE_COLORS, style_figure, transparent
from mspgt_lens.statistics import SIGNIFICANCE

_WORDS = {
    "mtld": "lexical diversity (MTLD)",
    "distinct_1": "different words",
    "distinct_2": "different word pairs",
    "repetition": "repeated runs of 4 words",
    "sentence_count": "number of sentences",
    "sentence_length": "words per sentence",
    "dependency_depth": "depth of syntax",
    "embedding_coherence": "coherence (token embeddings)",
    "semantic_coherence": "coherence (sentence embeddings)",
}
_ROW_HEIGHT = 62


def plot_texts(effects: GenerationEffects) -> go.Figure:
    """Forest plot: Cliff's delta of every property, under each perturbation of each segment.

    Bars are 95% intervals; filled points are the effects that MSPGT's first version predicts. Gray
    ticks are random block sets of the segment's size at the same KL. Undefined effects are left
    blank. Hover for the numbers and the p-value in words.

    Args:
        effects: From :func:`~mspgt_lens.generation_effects`.

    Returns:
        The figure; nothing is shown.
    """
    table = effects.to_dataframe()
    metrics = list(effects.metrics)
    n_segments = len(effects.segments)
    figure = make_subplots(
        rows=1,
        cols=len(effects.perturbations),
        shared_yaxes=True,
        subplot_titles=[escape(name) for name in effects.perturbations],
        horizontal_spacing=0.025,
    )
    for col, perturbation in enumerate(effects.perturbations, start=1):
        for number, segment in enumerate(effects.segments):
            color = SCALE_COLORS.get(segment, OTHER_COLORS[number % len(OTHER_COLORS)])
            # Segments side by side within each property's row, the first on top.
            shift = (0.5 - (number + 0.5) / n_segments) * 0.72
            part = table[(table["perturbation"] == perturbation) & (table["segment"] == segment)]
            ticks: list[tuple[float, float]] = []
            for row in range(len(metrics)):
                drawn = effects.controls[col - 1, number, :, row]
                ticks += [(delta, len(metrics) - row + shift) for delta in drawn]
            figure.add_trace(
                go.Scatter(
                    x=[x for x, _ in ticks],
                    y=[y for _, y in ticks],
                    mode="markers",
                    marker={
                        "symbol": "line-ns",
                        "size": 8,
                        "line": {"width": 1.5, "color": transparent(NEUTRAL, 0.6)},
                    },
                    hoverinfo="skip",
                    showlegend=False,
                ),
                row=1,
                col=col,
            )
            figure.add_trace(
                _points(part, effects, metrics, shift, color, named=col == 1), row=1, col=col
            )
        figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1}, row=1, col=col)
        figure.update_xaxes(
            range=[-1.04, 1.04], tickvals=[-1, -0.5, 0, 0.5, 1], title_text="Cliff's delta", col=col
        )
    figure.update_yaxes(
        tickvals=[len(metrics) - row for row in range(len(metrics))],
        ticktext=[escape(_WORDS.get(metric, metric)) for metric in metrics],
        range=[0.4, len(metrics) + 0.6],
        showgrid=False,
    )
    for edge in range(1, len(metrics)):
        figure.add_hline(y=edge + 0.5, line={"color": transparent(NEUTRAL, 0.25), "width": 1})
    style_figure(
        figure,
        f"Generated text under interventions: {escape(effects.model_name)}",
        _subtitle(effects),
        height=185 + _ROW_HEIGHT * len(metrics),
    )
    # Above the panels' titles, clear of the buttons.
    figure.update_layout(
        margin={"l": 220, "r": 20, "t": figure.layout.margin.t + 25, "b": 55},
        legend={"yref": "paper", "yanchor": "bottom", "y": 1 + 30 / (_ROW_HEIGHT * len(metrics))},
    )
    return figure


def _points(
    part: Any,
    effects: GenerationEffects,
    metrics: list[str],
    shift: float,
    color: str,
    *,
    named: bool,
) -> go.Scatter:
    """One segment's effects under one perturbation; undefined ones stay out."""
    part = part[part["delta"].notna()]
    rows = list(part.itertuples())
    segment = str(rows[0].segment) if rows else ""
    return go.Scatter(
        x=[row.delta for row in rows],
        y=[len(metrics) - metrics.index(str(row.quantity)) + shift for row in rows],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.delta_high - row.delta for row in rows],
            "arrayminus": [row.delta - row.delta_low for row in rows],
            "color": color,
            "thickness": 1.8,
            "width": 0,
        },
        mode="markers",
        marker={
            "color": color,
            "symbol": ["circle" if row.predicted else "circle-open" for row in rows],
            "size": 9,
            "line": {"width": 2, "color": color},
        },
        name=escape(segment),
        legendgroup=segment,
        showlegend=named and bool(rows),
        hovertext=[_words(row, effects) for row in rows],
        hoverinfo="text",
    )


def _words(row: Any, effects: GenerationEffects) -> str:
    blocks = effects.segments[row.segment]
    unchanged = row.n_pairs and row.delta_low == row.delta_high == 0
    clear = row.p_value < SIGNIFICANCE
    p = "under 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"
    verdict = (
        "no difference at all"
        if unchanged
        else f"{'a difference' if clear else 'no clear difference'}: p {p} after Holm"
    )
    lines = [
        f"<b>{escape(_WORDS.get(row.quantity, row.quantity))}</b>, {escape(row.perturbation)} of "
        f"{escape(row.segment)} ({len(blocks)} blocks)",
        f"Cliff's delta {row.delta:+.2f} ({row.delta_low:+.2f} to {row.delta_high:+.2f})",
        f"mean {row.clean:.3g} without, {row.value:+.3g} ({row.low:+.3g} to {row.high:+.3g}) with",
        verdict,
        f"{row.n_pairs} pairs of texts, {row.n_undefined} undefined; KL {row.kl:.2g} nats",
    ]
    if row.control == row.control:
        lines.append(
            f"random blocks: {row.control:+.2f} ({row.control_low:+.2f} to {row.control_high:+.2f})"
        )
    lines.append("predicted by MSPGT v1" if row.predicted else "not predicted by MSPGT v1")
    return "<br>".join(lines)


def _subtitle(effects: GenerationEffects) -> str:
    settings = effects.settings
    target_kl = settings.get("target_kl")
    words = f"{settings.get('n_prompts')} prompts, {settings.get('n_new')} new tokens"
    words += "" if target_kl is None else f", KL {target_kl:g} nats per token"
    ticks = "; gray: random blocks" if effects.controls.shape[2] else ""
    return f"{words}<br>bars: 95% intervals; filled: predicted by MSPGT v1{ticks}"
