"""Figures of perturbation say what was measured, and only that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from test_brittleness import made

import mspgt_lens as ml
from mspgt_lens.perturbation.dissociation import _tabulate


def made_table(name="made/up"):
    rng = np.random.default_rng(0)
    means = np.outer([0.5, 1.0, 2.0], [0.4, 0.6, 1.4])
    classes = rng.integers(3, size=300)
    return _tabulate(
        means[:, classes].T + 0.3 * rng.standard_normal((300, 3)),
        classes,
        np.repeat(np.arange(15), 20),
        names=("local", "intermediate", "global"),
        model_name=name,
        perturbation="covariance noise 1",
        segments={"local": (0, 1), "intermediate": (2, 3), "global": (4, 5)},
        settings={},
    )


@pytest.mark.parametrize("mode", ["per_block", "equal_energy"])
def test_every_segment_and_shape_has_its_curve_and_interval(mode, monkeypatch):
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    one = made()
    figure = ml.plots.plot_brittleness(one, mode=mode)
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    bands = [t for t in figure.data if t.fill == "toself"]
    # Three segments by two measures, and the slopes, for two shapes.
    assert len(lines) == len(bands) == 2 * (3 * 2 + 1)
    kl = one.response("global", "covariance", mode)
    drawn = [t for t in lines if t.name == "Global" and "covariance noise" in t.hovertext[0]]
    np.testing.assert_allclose(drawn[0].y, kl.values)
    assert f"KL {kl.values[1]:.3g} nats" in drawn[0].hovertext[1]
    assert sum(bool(t.showlegend) for t in figure.data) == 3
    assert figure.layout.yaxis.type == figure.layout.xaxis.type == "log"


def test_intervals_that_reach_zero_are_cut_at_the_axis_but_told_whole():
    one = made()
    by_group = np.array(one.by_group)
    by_group[:, 0, :, 1:, 0] *= 1e-3
    figure = ml.plots.plot_brittleness(replace(one, by_group=by_group))
    for trace in figure.data:
        if trace.fill == "toself" and trace.yaxis in ("y", "y2"):
            assert min(trace.y) > 0
    assert any("to" in t and "interval -" in t for d in figure.data for t in d.hovertext or ())


def test_a_model_that_does_not_respond_is_drawn_too():
    one = made()
    assert ml.plots.plot_brittleness(replace(one, by_group=0 * one.by_group)).data


def test_the_table_shows_numbers_and_the_finding():
    table = made_table("<b>bold</b>")
    figure = ml.plots.plot_dissociation(table)
    heat = figure.data[0]
    np.testing.assert_allclose(np.array(heat.z, dtype=float), table.relative)
    assert f"{table.values[2, 0]:.3g} nats" in heat.text[2][0]
    assert "95% interval" in heat.hovertext[1][1]
    title = figure.layout.title.text
    assert f"{table.interaction.value:+.3f}" in title
    assert "<b>bold" not in title
    assert len(figure.layout.shapes) == 3


def test_wrong_modes_are_named():
    with pytest.raises(ValueError, match="mode must be one of per_block, equal_energy"):
        ml.plots.plot_brittleness(made(), mode="both")
