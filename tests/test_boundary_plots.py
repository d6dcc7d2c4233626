"""Figures of sharp changes: kinds told apart, sizes written, nothing that is not supported."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from browser import open_page
from made_profile import made_profile
from test_partition import SIGNALS, bend, jump, made

import mspgt_lens as ml
from mspgt_lens.partition import Boundary
from mspgt_lens.plots.boundaries import _Label, _lanes
from mspgt_lens.plots.look import SCALE_COLORS, transparent

EDGES = (Boundary(0, "edge", ("a", "c"), 47.0, None), Boundary(11, "edge", (), 0.5, None))


def texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def lines_over_ranks(figure):
    """From the block before to the rows and dash of every line over the ranks."""
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    return [
        (shape.x0 + 0.5, (shape.y0, shape.y1), shape.line.dash)
        for shape in figure.layout.shapes
        if shape.type == "line" and shape.xref == heat.xaxis and shape.line.color == "#000000"
    ]


def level_curves(figure):
    return [t for t in figure.data if t.type == "scatter" and t.mode == "lines+markers"]


def test_jumps_are_solid_and_bends_dashed_with_their_own_marks_and_sizes():
    figure = ml.plot_boundaries(made([jump(3), bend(8)]))
    assert lines_over_ranks(figure) == [
        (3, (-0.5, 4.5), "solid"),
        (8, (-0.5, 4.5), "6px,4px"),
    ]
    assert "jump, block 3, 30\u00d7" in texts(figure)
    assert "bend, block 8, 3.6\u00d7" in texts(figure)
    glyphs = {shape.path for shape in figure.layout.shapes if shape.type == "path"}
    assert len(glyphs) == 2
    title = figure.layout.title.text
    assert "Two boundaries beyond gradual change with depth" in title
    assert "solid: a jump" in title
    assert "dashed: a bend" in title
    assert "solid" not in ml.plot_boundaries(made([bend(8)])).layout.title.text


def test_what_one_signal_shows_alone_is_marked_in_its_row_only():
    alone = (Boundary(5, "jump", ("c",), 46.0, 0.01),)
    figure = ml.plot_boundaries(made(alone=alone))
    assert lines_over_ranks(figure) == [(5, (1.5, 2.5), "solid")]
    assert "alone: jump, block 5, 46\u00d7" in texts(figure)


def test_what_several_signals_show_by_too_little_is_marked_in_their_rows():
    figure = ml.plot_boundaries(made(alone=(Boundary(5, "jump", ("a", "c"), 46.0, 0.03),)))
    assert lines_over_ranks(figure) == [(5, (-0.5, 0.5), "solid"), (5, (1.5, 2.5), "solid")]
    assert texts(figure).count("too little: jump, block 5, 46\u00d7") == 2


def test_edges_are_crosses_in_the_signals_that_they_change():
    figure = ml.plot_boundaries(made(edges=EDGES))
    crosses = [t for t in figure.data if t.type == "scatter" and t.mode == "markers"]
    assert [trace.marker.symbol for trace in crosses] == ["x-thin"]
    assert [(list(trace.x), list(trace.y)) for trace in crosses] == [([0, 0], [0, 2])]
    assert "first block, 47\u00d7" in texts(figure)
    assert lines_over_ranks(figure) == []


def test_levels_stand_beside_the_ranks_in_the_same_rows():
    partition = made()
    figure = ml.plot_boundaries(partition)
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    curves = level_curves(figure)
    assert len(curves) == partition.signals.shape[1]
    for row, (curve, levels) in enumerate(zip(curves, partition.signals.T, strict=True)):
        assert curve.xaxis != heat.xaxis
        inner = np.array(curve.y[1:-1])
        assert (np.abs(np.array(curve.y) - row) <= 0.5).all()
        # Higher is nearer the top, where rows count downward.
        assert (np.argsort(-inner) == np.argsort(levels[1:-1])).all()
        assert f"{levels[4]:.3g}" in curve.hovertext[4]
    far = replace(partition, signals=partition.signals + 1000.0 * (np.arange(12) == 0)[:, None])
    curve = next(
        t for t in ml.plot_boundaries(far).data if t.type == "scatter" and t.mode == "lines+markers"
    )
    assert curve.marker.symbol[0] == "triangle-up"
    assert "off this row's scale" in curve.hovertext[0]
    assert np.ptp(curve.y[1:-1]) > 0.6


def test_unsupported_places_and_segments_are_drawn_only_where_asked_for():
    none, one = made(), made([jump(3)])
    for partition, supported in ((none, []), (one, [3])):
        plain = ml.plot_boundaries(partition)
        bars = [trace for trace in plain.data if trace.type == "bar"]
        shown = [block for bar in bars for block in bar.x]
        assert all(partition.intervals[0][0] <= b <= partition.intervals[0][1] for b in shown)
        assert bool(shown) == bool(supported)
        assert not [text for text in texts(plain) if "best place" in text]
        asked = ml.plot_boundaries(partition, unsupported=True)
        names = [trace.text for trace in asked.data if trace.type == "bar" and trace.text]
        assert names == ["Local", "Intermediate", "Global"]
        best = [text for text in texts(asked) if "best place" in text]
        assert best == [
            f"best place, block {b}" for b in partition.boundaries if b not in supported
        ]
    segments = [t for t in ml.plot_boundaries(none, unsupported=True).data if t.text == "Local"]
    assert segments[0].marker.color == transparent(SCALE_COLORS["local"], 0.35)
    sure = [t for t in ml.plot_boundaries(made([jump(3), bend(8)])).data if t.text == "Local"]
    assert sure[0].marker.color == transparent(SCALE_COLORS["local"], 1.0)


@pytest.mark.parametrize("n_found", [0, 1, 2, 3, 4, 6])
def test_any_number_of_boundaries_can_be_drawn(n_found):
    blocks = (1, 3, 5, 7, 8, 10)[:n_found]
    figure = ml.plot_boundaries(made([jump(block) for block in blocks], (5, 8)))
    assert [block for block, _, _ in lines_over_ranks(figure)] == list(blocks)


def test_no_line_goes_through_the_words_of_another_label():
    rng = np.random.default_rng(0)
    for _ in range(50):
        blocks = np.sort(rng.choice(40, size=rng.integers(1, 7), replace=False))
        labels = [_Label(int(block), "jump", "jump, block 12, 30\u00d7") for block in blocks]
        lanes = _lanes(labels, 40)
        for label, lane in zip(labels, lanes, strict=True):
            # Text is at least 100 pixels long of 560.
            crossed = [
                other
                for other, height in zip(labels, lanes, strict=True)
                if label.block < other.block < label.block + 40 * 100 / 560 and height >= lane
            ]
            assert not crossed
    assert _lanes([_Label(b, "jump", "x") for b in (2, 30)], 40) == [0, 0]


def test_tables_and_arrays_are_tested_on_the_way():
    levels = np.random.default_rng(0).standard_normal((21, 4))
    levels[10:] += 40.0
    table = pd.DataFrame(levels, columns=list("wxyz"))
    blocks, sites = (ml.plot_boundaries(table, rows=rows) for rows in ("blocks", "sites"))
    assert any(text.startswith("jump, block 10, ") for text in texts(blocks))
    assert any(text.startswith("jump, block 9, ") for text in texts(sites))
    heat = next(t for t in ml.plot_boundaries(levels).data if t.type == "heatmap")
    assert np.shape(heat.z) == (4, 21)
    with pytest.raises(ValueError, match="leave rows out"):
        ml.plot_boundaries(made(), rows="sites")


def test_long_names_are_cut_on_the_axis_and_whole_in_the_hover():
    name = "x" * 60
    figure = ml.plot_boundaries(made(signals=(name, "b")))
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    axis = figure.layout[heat.yaxis.replace("y", "yaxis")]
    assert axis.ticktext == ("x" * 31 + "\u2026", "b")
    assert name in heat.hovertext[0][0]


def test_profiles_bear_segments_above_their_curves_if_the_data_support_them():
    profile, sure, unsure = made_profile(), made([jump(3), bend(8)]), made([jump(3)])

    def strips(figure):
        return [shape for shape in figure.layout.shapes if shape.type == "rect"]

    drawn = ml.plot_profile(profile, sure)
    panels = len(list(profile.curves()))
    assert len(strips(drawn)) == 3 * panels
    # In pixels above the panel's top, so that nothing lies behind curves and intervals.
    assert all(s.ysizemode == "pixel" and s.yanchor == 1 and s.y0 > 0 for s in strips(drawn))
    assert "local</span> 0 to 2" in drawn.layout.title.text
    none = ml.plot_profile(profile, unsure)
    assert strips(none) == []
    assert "no segments: the data do not support them" in none.layout.title.text
    asked = ml.plot_profile(profile, unsure, unsupported=True)
    assert len(strips(asked)) == 3 * panels
    assert "not supported as such" in asked.layout.title.text
    assert {s.fillcolor for s in strips(asked)} == {
        transparent(color, 0.35) for color in SCALE_COLORS.values()
    }
    # Block 3 begins at site 3, and half a block before its own number.
    starts = {shape.x0 for shape in strips(drawn)}
    assert starts == {0, 3, 8, -0.5, 2.5, 7.5}


def test_the_figure_opens_in_a_real_browser(tmp_path):
    partition = made(
        [jump(3), bend(8)], edges=EDGES, alone=(Boundary(5, "bend", ("d",), 9.0, 0.01),)
    )
    path = ml.write_report(tmp_path / "report.html", partition)
    page = open_page(path, tmp_path)
    assert page.console == []
    assert page.plots == page.drawn == page.hovered == 1
    for words in ("jump, block 3", "bend, block 8", "alone: bend, block 5", *SIGNALS):
        assert words in page.html


def test_reports_say_where_controls_change_sharply_too(tmp_path):
    twin = replace(made([bend(5)]), model_name="twin", control="random_weights")
    page = ml.write_report(tmp_path / "r.html", made([jump(3), bend(8)]), twin).read_text()
    rows = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert rows[:10] == [
        *("made", "2", "jump at block 3, bend at block 8", "0.002", "stages"),
        *("twin", "1", "bend at block 5", "0.001", "stages"),
    ]
    assert "where curves change sharply with depth" in page
    assert page.count("A sharp change at block 3, shared by 4 of 5 signals") == 2
