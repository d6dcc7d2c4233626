"""Figures are built from results, say what they show, and open in a real browser."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from browser import open_page
from made_profile import made_profile

import mspgt_lens as ml
from mspgt_lens.plots.look import SCALE_COLORS, style_figure

FIGURES = {
    "profile": ml.plot_profile,
    "information plane": ml.plots.plot_information_plane,
    "scale map": ml.plots.plot_scale_map,
}


@pytest.mark.parametrize("plot", FIGURES.values(), ids=FIGURES)
def test_figures_are_returned_and_nothing_is_shown(plot, monkeypatch):
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    figure = plot(made_profile())
    assert isinstance(figure, go.Figure)
    assert figure.data
    assert figure.to_json()


@pytest.mark.parametrize("plot", FIGURES.values(), ids=FIGURES)
def test_bits_are_nats_over_log_two(plot):
    assert "bits" in plot(made_profile(), unit="bits").to_json()
    assert "bits" not in plot(made_profile()).to_json()


def test_every_curve_has_its_values_its_interval_and_words():
    profile = made_profile()
    figure = ml.plot_profile(profile)
    lines = [t for t in figure.data if t.mode == "lines" and t.hovertext is not None]
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(lines) == len(bands) == len(list(profile.curves()))
    local = next(t for t in lines if "the next token" in t.hovertext[3])
    assert "site 3, after block 2" in local.hovertext[3]
    assert f"predicts {profile.predicted['local'].values[3]:.3g} nats" in local.hovertext[3]
    assert "95% interval" in local.hovertext[3]


@pytest.mark.parametrize("plot", [ml.plot_profile, ml.plots.plot_information_plane])
def test_scales_keep_their_colors(plot):
    drawn = {t.line.color for t in plot(made_profile()).data if t.hovertext is not None}
    assert set(SCALE_COLORS.values()) <= drawn


def test_overlaid_profiles_of_other_depth_share_a_relative_axis_and_differ_by_dash():
    figure = ml.plot_profile([made_profile("one", 12), made_profile("two", 24)])
    lines = [t for t in figure.data if t.hovertext is not None]
    assert {t.line.dash for t in lines} == {"solid", "dash"}
    assert all(max(t.x) <= 1.0 for t in lines)
    assert {t.name for t in figure.data if t.showlegend is None} == {"one", "two"}
    same_depth = ml.plot_profile([made_profile("one", 12), made_profile("two", 12)])
    assert max(max(t.x) for t in same_depth.data if t.hovertext is not None) == 12


def test_overlays_need_profiles_with_the_same_bands():
    with pytest.raises(ValueError, match="same bands"):
        ml.plot_profile([made_profile(), made_profile(bands={"local": (1, 2)})])
    with pytest.raises(ValueError, match="got none"):
        ml.plot_profile([])


def test_rows_that_cannot_be_told_from_zero_stay_blank():
    figure = ml.plots.plot_scale_map(made_profile(bands=ml.OFFSET_BANDS, silent=("64",)))
    shares = dict(zip(figure.data[0].y, figure.data[0].z, strict=True))
    blank = [label for label, row in shares.items() if all(value is None for value in row)]
    assert blank == ["64  (not above 0)"]


def test_hostile_names_are_shown_as_text(tmp_path):
    name, note = "<script>alert('x')</script>", "<img src=x onerror=alert(1)> \u202eright-to-left"
    profile = made_profile(name, warnings=(note,))
    path = ml.write_report(tmp_path / "report.html", profile, scale_map=profile)
    text = path.read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    overlaid = ml.plot_profile([profile, made_profile()]).to_json()
    assert "<script>" not in json.loads(overlaid)["layout"]["title"]["text"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_opens_in_a_real_browser(tmp_path, dark):
    path = ml.write_report(
        tmp_path / "report.html", made_profile(), scale_map=made_profile(bands=ml.OFFSET_BANDS)
    )
    page = open_page(path, tmp_path, dark=dark)
    assert page.console == []
    assert page.requests == []
    assert page.plots == page.drawn == page.hovered == 4
    # Every curve of the profile, every path of the plane, and both maps are drawn.
    assert page.html.count('class="js-line"') >= len(list(made_profile().curves())) + 3
    assert page.html.count('class="hm"') == 2
    # Menus of curves over sites, over blocks, and of profiles.
    assert page.html.count('class="updatemenu-header"') == 3
    assert page.html.count('class="slider-group"') == 1
    ink = "rgb(180, 180, 186)" if dark else "rgb(74, 74, 78)"
    assert f"fill: {ink}" in page.html


def test_signals_from_elsewhere_are_drawn_in_words_of_their_own(tmp_path):
    made = made_profile()
    foreign = "slope <b>of</b> mine"
    span = made.signals["attention_span"]
    joined = replace(made, signals={foreign: span})
    figure = ml.plot_profile(joined)
    drawn = [t for t in figure.data if t.hovertext is not None and "slope" in t.hovertext[2]]
    assert len(drawn) == 1
    assert (
        f"slope &lt;b&gt;of&lt;/b&gt; mine is {span.values[2]:.3g} tokens" in drawn[0].hovertext[2]
    )
    titles = [a.text for a in figure.layout.annotations]
    assert "Slope &lt;b&gt;of&lt;/b&gt; mine" in titles
    html = ml.write_report(tmp_path / "r.html", joined).read_text()
    assert "slope <b>of</b> mine" not in html


def test_overlaid_profiles_may_have_other_signals():
    one, two = made_profile("one"), replace(made_profile("two"), added={})
    more = replace(one, signals={**one.signals, "mine": one.signals["novelty"]})
    for overlaid in ([more, two], [two, more]):
        figure = ml.plot_profile(overlaid)
        drawn = [t for t in figure.data if t.hovertext is not None]
        assert len(drawn) == len(list(more.curves())) + len(list(two.curves()))


@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_curves_about_one_token_come_with_the_most_that_it_tells(unit):
    profile = made_profile()
    settings = {**profile.settings, "unigram_cross_entropy": 6.5, "unigram_entropy": 6.0}
    figure = ml.plot_profile(replace(profile, settings=settings), unit=unit)
    drawn = [t for t in figure.data if "tells at most" in str(t.hovertext)]
    most = 6.5 if unit == "nats" else 6.5 / np.log(2)
    assert len(drawn) == 2
    assert all(t.y == pytest.approx((most, most)) for t in drawn)
    titles = [axis.title.text for axis in figure.select_yaxes()]
    assert titles.count(f"{unit} about the token") == 2
    assert titles.count(f"{unit} about the band's mean") >= 4
    # An older profile read single tokens as if they were Gaussian, which nothing bounds.
    before = ml.plot_profile(profile, unit=unit)
    assert not [t for t in before.data if "tells at most" in str(t.hovertext)]


def test_long_subtitles_go_over_lines_for_which_the_figure_grows():
    short, long = go.Figure(), go.Figure()
    part = "<span style='color:#0072B2'>forty letters</span> that a reader sees, no more"
    style_figure(short, "title", part, 400)
    style_figure(long, "title", "; ".join([part] * 4), 400)
    assert short.layout.height == 400
    assert "<br>" not in short.layout.title.text.split("<br>", 1)[1]
    lines = long.layout.title.text.split("<br>")[1:]
    assert len(lines) == 2
    assert [line.count(part) for line in lines] == [2, 2]
    more = long.layout.height - short.layout.height
    assert more == long.layout.margin.t - short.layout.margin.t > 0
