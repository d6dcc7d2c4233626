"""The figure to look around in: every control shows what the profiles hold."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from made_profile import made_profile

import mspgt_lens as ml


def choices(figure):
    """Label to the arguments of every menu's entries, and site to those of the slider's steps."""
    menus = [{b.label: b.args for b in menu.buttons} for menu in figure.layout.updatemenus]
    return menus, [step.args for step in figure.layout.sliders[0].steps]


def press(figure, args):
    """The figure after something was chosen, as a browser does it."""
    restyled, relayout, indices = json.loads(json.dumps(args))
    chosen = go.Figure(figure)
    chosen.plotly_restyle(restyled, indices)
    chosen.plotly_relayout(relayout)
    return chosen


def drawn(figure):
    """What a browser gets; a part that holds nothing is none."""
    traces = json.loads(figure.to_json())["data"]
    return [{name: part for name, part in trace.items() if part != {}} for trace in traces]


def panel(figure, col, row=1):
    axis = {(1, 1): "x", (1, 2): "x2", (2, 1): "x3", (2, 2): "x4"}[row, col]
    return [t for t in figure.data if t.xaxis == axis and t.meta is not None]


def of(coordinates, factor=1.0, **kwargs):
    """A profile with other coordinates, and other numbers."""
    made = made_profile(**kwargs)
    predicted = {
        s: replace(c, values=c.values * factor, low=c.low * factor, high=c.high * factor)
        for s, c in made.predicted.items()
    }
    settings = {**made.settings, "coordinates": coordinates}
    return replace(made, predicted=predicted, settings=settings)


@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_every_curve_can_be_chosen_and_shows_its_numbers(unit):
    profile = made_profile()
    figure = ml.plots.explore(profile, unit=unit)
    menus, _ = choices(figure)
    over_sites = [c for c in profile.curves() if c[0] not in profile.signals]
    over_blocks = [c for c in profile.curves() if c[0] in profile.signals]
    for col, (menu, curves) in enumerate(zip(menus, (over_sites, over_blocks), strict=True), 1):
        assert len(menu) == len(curves)
        for args, (quantity, _, curve) in zip(menu.values(), curves, strict=True):
            band, line = panel(press(figure, args), col)
            shown = curve.to(unit) if curve.unit == "nats" else curve
            np.testing.assert_allclose(line.y, shown.values, rtol=1e-4)
            ends = np.concatenate([shown.high, shown.low[::-1]])
            np.testing.assert_allclose(band.y, ends, rtol=1e-4)
            assert list(band.x) == [*line.x, *line.x[::-1]]
            assert len(line.hovertext) == len(curve), quantity


def test_a_chosen_curve_brings_its_axis_and_its_color():
    figure = ml.plots.explore(made_profile())
    (sites, blocks), _ = choices(figure)
    ratio = press(figure, blocks["Update ratio"])
    assert ratio.layout.yaxis2.type == "log"
    assert ratio.layout.yaxis2.title.text == "ratio"
    assert press(ratio, blocks["Novelty"]).layout.yaxis2.type == "linear"
    compression = press(figure, sites["Compression"])
    assert compression.layout.yaxis.rangemode == "normal"
    colors = {
        panel(press(figure, args), 1)[1].line.color
        for label, args in sites.items()
        if label.startswith("Predicted")
    }
    assert colors == {"#0072B2", "#D55E00", "#009E73"}


def test_the_slider_shows_one_site_as_shares_of_the_best():
    profile = made_profile()
    figure = ml.plots.explore(profile)
    _, steps = choices(figure)
    assert len(steps) == profile.n_layers + 1
    for site in (0, 5, profile.n_layers):
        chosen = press(figure, steps[site])
        bars = panel(chosen, 1, row=2)
        for trace, curves in zip(bars, (profile.retained, profile.predicted), strict=True):
            shares = [c.values[site] / c.values.max() for c in curves.values()]
            highs = [c.high[site] / c.values.max() for c in curves.values()]
            np.testing.assert_allclose(trace.y, shares, rtol=1e-4)
            np.testing.assert_allclose(np.add(trace.y, trace.error_y.array), highs, rtol=1e-3)
        for trace, scale in zip(panel(chosen, 2, row=2), profile.scales, strict=True):
            frontier = profile.frontier(site, scale, np.array(trace.x))
            most = frontier.relevance.values[-1]
            np.testing.assert_allclose(
                trace.y, frontier.relevance.values / most, rtol=1e-3, atol=1e-6
            )
            np.testing.assert_allclose(
                [pair[1] for pair in trace.customdata], frontier.rate.values, rtol=1e-3, atol=1e-6
            )
        assert [shape.x0 for shape in chosen.layout.shapes] == [site, site - 0.5]


def test_what_is_drawn_first_is_what_the_controls_say():
    figure = ml.plots.explore([of("standardized"), of("raw", 0.5)])
    menus, steps = choices(figure)
    slider = figure.layout.sliders[0]
    for menu, entries in zip(figure.layout.updatemenus, menus, strict=True):
        assert drawn(press(figure, list(entries.values())[menu.active])) == drawn(figure)
    assert drawn(press(figure, steps[slider.active])) == drawn(figure)


def test_several_profiles_are_told_apart_and_one_can_be_shown_alone():
    figure = ml.plots.explore([of("standardized"), of("raw", 0.5)])
    menus, _ = choices(figure)
    assert list(menus[2]) == ["all profiles", "standardized", "raw"]
    assert {t.name for t in figure.data if t.meta is None} == {"standardized", "raw"}
    lines = panel(figure, 1)[1::2]
    np.testing.assert_allclose(np.array(lines[1].y), 0.5 * np.array(lines[0].y), rtol=1e-3)
    assert len({line.line.dash for line in lines}) == 2
    alone = press(figure, menus[2]["raw"])
    assert {t.meta for t in alone.data if t.visible and t.meta is not None} == {1}
    again = press(alone, menus[2]["all profiles"])
    assert all(t.visible for t in again.data if t.meta is not None)
    # What is chosen from one menu leaves what was chosen from another.
    elsewhere = press(alone, menus[0]["Relevance"])
    assert [t.visible for t in elsewhere.data] == [t.visible for t in alone.data]


@pytest.mark.parametrize(
    ("profiles", "labels"),
    [
        ([made_profile("a"), made_profile("b")], ["a", "b"]),
        ([made_profile(), replace(made_profile(), control="random_weights")],
         ["no control", "random weights"]),
        ([made_profile(), made_profile(bands=ml.OFFSET_BANDS)], ["3 bands", "7 bands"]),
        ([made_profile(), made_profile()], ["profile 1", "profile 2"]),
        ([of("raw"), of("raw"), of("standardized")], ["raw", "raw (2)", "standardized"]),
    ],
)  # fmt: skip
def test_labels_say_what_differs(profiles, labels):
    menus, _ = choices(ml.plots.explore(profiles))
    assert list(menus[-1])[1:] == labels


def test_profiles_with_other_bands_and_signals_share_the_menus():
    one, two = made_profile(), made_profile(bands=ml.OFFSET_BANDS)
    two = replace(two, signals={"mine": two.signals["novelty"]}, correlations={}, fold_weights=())
    figure = ml.plots.explore([one, two])
    (sites, blocks, _), _ = choices(figure)
    assert len(sites) == 2 + 3 * 3 + 3 * len(ml.OFFSET_BANDS)
    assert "Mine" in blocks
    band, line, _, other_line = panel(press(figure, blocks["Mine"]), 2)
    assert not band.y
    assert not line.y
    assert len(other_line.y) == two.n_layers
    # Only the first has correlations.
    assert {t.meta for t in panel(figure, 2, row=2)} == {0}


def test_without_signals_there_is_no_menu_of_them():
    figure = ml.plots.explore(replace(made_profile(), signals={}))
    assert len(figure.layout.updatemenus) == 1


def test_scales_that_cannot_be_told_from_zero_stay_blank():
    figure = ml.plots.explore(made_profile(silent=("global",)))
    assert "what cannot be told from 0 has no bar" in figure.layout.title.text
    retained, predicted = panel(figure, 1, row=2)
    assert [y is None for y in predicted.y] == [False, False, True]
    assert "cannot be told from 0" in retained.hovertext[2]
    assert all(y is None for y in panel(figure, 2, row=2)[2].y)


def test_names_are_text():
    hostile = "<script>alert(1)</script>"
    named = made_profile(hostile, bands={hostile: (1, 1), "far": (2, 4)})
    assert "<script>" not in ml.plots.explore([named, made_profile()]).to_json()


def test_what_cannot_be_shown_together_is_refused():
    with pytest.raises(ValueError, match="got none"):
        ml.plots.explore([])
    with pytest.raises(ValueError, match=r"one depth, got 12, 24 blocks.*plot_profile"):
        ml.plots.explore([made_profile(), made_profile(n_layers=24)])
