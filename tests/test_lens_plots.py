"""Figures of a lens show what it says, in three colors, and open in a real browser."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from browser import open_page
from made_results import made_lens, made_reading

import mspgt_lens as ml


@pytest.fixture
def reading():
    return made_reading(np.random.default_rng(0))


@pytest.mark.parametrize("color", ["probability", "rank", "entropy"])
def test_every_cell_shows_its_most_probable_token(reading, color):
    figure = ml.plots.plot_lens_reading(reading, color=color)
    texts = {0: '"a"', 1: "&lt;script&gt;\u2026", 2: "&lt;b&gt;", 3: "\\n", 4: "\u2423"}
    shown = np.full((3, 4), None, dtype=object)
    for trace in figure.data:
        # A gap answers to no mouse: below it is the cell of another trace.
        assert trace.hoverongaps is False
        for site in range(3):
            for pos in range(4):
                if trace.z[site][pos] is not None:
                    assert shown[site, pos] is None  # No cell is drawn twice.
                    shown[site, pos] = trace.text[site][pos]
                else:
                    assert trace.text[site][pos] == trace.hovertext[site][pos] == ""
    assert shown.tolist() == [[texts[int(i)] for i in row] for row in reading.top[:, :, 0]]
    # With what a reader has to know, as text.
    assert "another &lt;b&gt;note" in figure.layout.title.text


def test_colors_are_what_they_are_called(reading):
    def values(color):
        trace = ml.plots.plot_lens_reading(reading, color=color).data[0]
        return trace, np.array(trace.z, dtype=float)

    trace, drawn = values("probability")
    np.testing.assert_array_equal(drawn, reading.probability[:, :, 0])
    assert (trace.zmin, trace.zmax) == (0, 1)
    trace, drawn = values("entropy")
    np.testing.assert_array_equal(drawn, reading.entropy)
    trace, drawn = values("rank")
    np.testing.assert_allclose(10 ** drawn[:, :3], reading.rank[:, :3])
    assert np.isnan(drawn[:, 3]).all()
    # The light end of the scale is the sure one: high probabilities, low ranks.
    light = ml.plots.plot_lens_reading(reading).data[0].colorscale[-1][1]
    assert trace.colorscale[0] == (0.0, light)
    assert trace.colorbar.ticktext[:1] == ("1",)


def test_hover_tells_the_best_tokens_the_entropy_and_what_came(reading):
    hover = ml.plots.plot_lens_reading(reading).data[0].hovertext
    assert "site 2, the model itself" in hover[2][0]
    assert "the model itself" not in hover[1][0]
    for share in reading.probability[1, 1]:
        assert f"{share:.3f}" in hover[1][1]
    assert f"entropy {reading.entropy[1, 1]:.3g} nats" in hover[1][1]
    assert f"'&lt;b&gt;', which came, has rank {reading.rank[1, 1]}" in hover[1][1]
    assert "which came" not in hover[1][3]
    # Figures decode no named quotes.
    assert "&quot;" not in str(hover)
    assert """'"a"'""" in str(hover).replace("\\'", "'")


def test_cells_of_long_texts_keep_room_for_their_tokens(reading):
    n_pos = 40

    def longer(values):
        return np.concatenate([values] * (n_pos // 4), axis=1)

    long = replace(
        reading,
        tokens=reading.tokens * 10,
        positions=np.arange(n_pos),
        answers=np.tile(reading.answers, 10),
        **{name: longer(getattr(reading, name)) for name in ("top", "probability", "entropy")},
        rank=longer(reading.rank),
    )
    assert ml.plots.plot_lens_reading(reading).layout.width is None
    assert ml.plots.plot_lens_reading(long).layout.width > 40 * 50


def test_what_a_reader_has_to_know_fits_the_width_of_a_page(reading):
    plain = ml.plots.plot_lens_reading(replace(reading, warnings=())).layout
    long = ml.plots.plot_lens_reading(replace(reading, warnings=("some words " * 30,))).layout
    lines = re.sub(r"<span.*?>|</span>", "", long.title.text).split("<br>")
    assert max(map(len, lines)) <= 115
    assert " ".join(lines[2:]).split() == ["some", "words"] * 30
    # Cells stay as high as they were.
    assert plain.height - plain.margin.t == long.height - long.margin.t


def test_a_color_that_is_none_is_refused(reading):
    with pytest.raises(ValueError, match="color must be one of probability, rank, entropy, got 'k"):
        reading.plot(color="kl")


def test_scores_are_drawn_with_their_intervals_and_the_unigram_model():
    lens = made_lens(np.random.default_rng(0))
    figure = lens.plot()
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    lines = [trace for trace in figure.data if trace.hovertext is not None]
    for band, line, curve in zip(bands, lines, (lens.cross_entropy, lens.kl), strict=True):
        np.testing.assert_array_equal(line.y, curve.values)
        np.testing.assert_array_equal(band.y, [*curve.high, *curve.low[::-1]])
    assert [shape.y0 for shape in figure.layout.shapes] == [lens.unigram]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_both_figures_open_in_a_real_browser(tmp_path, reading, dark):
    lens = made_lens(np.random.default_rng(0))
    page = open_page(ml.write_report(tmp_path / "r.html", lens, reading), tmp_path, dark=dark)
    assert page.console == []
    assert page.requests == []
    assert page.plots == page.drawn == page.hovered == 2
    # As text, with its quotes.
    assert "'<script>alert(1)</script> & co' (1)" in page.said[1]
