"""Models side by side: tables against the results that they come from, saved, and drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import mspgt_lens as ml
from mspgt_lens.plots.look import SCALE_COLORS


@pytest.fixture(scope="module")
def results():
    return ml.synthetic.synthetic_models(2, 4)


@pytest.fixture(scope="module")
def comparison(results):
    return ml.studies.compare_models(results)


def test_tables_hold_what_was_measured(results, comparison):
    wide, table = comparison.models.set_index("model"), comparison.to_dataframe()
    assert len(wide) == len(results)
    # Two boundaries, three lengths, three segments under two shapes.
    assert len(table) == len(results) * (2 + 3 + 6)
    for one in results:
        row, n = wide.loc[one.name], one.partition.n_layers
        assert (row["first"], row["second"]) == one.partition.boundaries
        assert row["first_depth"] == one.partition.boundaries[0] / n
        assert row["second_depth_high"] == one.partition.intervals[1][1] / n
        own = table[table["model"] == one.name]
        placed = own[own["quantity"] == "boundary"].set_index("segment")
        assert placed["value"].to_dict() == {"intermediate": one.depths[0], "global": one.depths[1]}
        assert placed.loc["global", "high"] == one.partition.intervals[1][1] / n
        assert set(placed["p_value"]) == {one.partition.p_value}
        lengths = own[own["quantity"] == "length"].set_index("segment")["value"]
        assert list(lengths.index) == ["local", "intermediate", "global"]
        assert lengths.sum() == pytest.approx(1.0)
        assert lengths["local"] == row["first_depth"]
        brittle = one.brittleness["isotropic"]["global"]
        where = {"quantity": "brittleness", "shape": "isotropic", "segment": "global"}
        (found,) = own[(own[list(where)] == pd.Series(where)).all(axis=1)].itertuples()
        expected = np.exp([brittle.value, brittle.low, brittle.high])
        np.testing.assert_allclose([found.value, found.low, found.high], expected)
    family = comparison.families.set_index("family").loc["family 1"]
    depths = np.array([r.depths for r in results[:4]])
    assert family["cv"] == pytest.approx(ml.theory.depth_variation(depths).value)
    sizes = [r.n_parameters for r in results]
    shares = ml.theory.variance_shares(
        np.array([r.depths for r in results]), [r.family for r in results], sizes
    )
    assert comparison.shares == shares


def test_curves_of_different_depth_align_on_relative_depth(results, comparison):
    for one in results:
        curves = comparison.curves[comparison.curves["model"] == one.name]
        relevance = curves[curves["quantity"] == "relevance"]
        np.testing.assert_allclose(relevance["depth"], np.linspace(0, 1, one.profile.n_layers + 1))
    assert comparison.curves["depth"].between(0, 1).all()


def test_ratios_and_their_intervals(results, comparison):
    """The interval of a ratio of two independent estimates holds the truth in 95%."""
    ratios = comparison.ratios
    rows = ratios[(ratios["kind"] == "models") & (ratios["shape"] == "covariance")]
    first, last = results[0], results[-1]
    row = rows[(rows["of"] == last.name) & (rows["over"] == first.name)].iloc[0]
    logs = [r.brittleness["covariance"]["local"] for r in (last, first)]
    assert row["ratio"] == pytest.approx(np.exp(logs[0].value - logs[1].value))
    # Each half-width is 0.2 in logarithms.
    assert np.log(row["high"] / row["ratio"]) == pytest.approx(0.2 * np.sqrt(2))
    other = rows[(rows["of"] == first.name) & (rows["over"] == last.name)].iloc[0]
    assert other["high"] == pytest.approx(1 / row["low"])
    within = ratios[ratios["kind"] == "segments"]
    assert len(within) == len(results) * 2 * 6


def test_saved_and_loaded(comparison, tmp_path):
    again = ml.results.Comparison.load(comparison.save(tmp_path / "comparison"))
    for name in ("models", "segments", "families", "brittleness", "ratios", "curves"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(comparison, name))
    assert again.shares == comparison.shares
    assert again.summary() == comparison.summary()


def test_one_bare_model_is_enough(tmp_path):
    (one,) = ml.synthetic.synthetic_models(1, 1)
    bare = replace(one, family=None, n_parameters=None, brittleness={})
    compared = ml.studies.compare_models([bare])
    assert compared.shares is None
    assert compared.families.empty
    assert compared.brittleness.empty
    assert ml.plots.plot_comparison(
        ml.results.Comparison.load(compared.save(tmp_path / "one"))
    ).data
    assert len(compared.findings()) == 1
    with pytest.raises(ValueError, match="different names"):
        ml.studies.compare_models([one, one])
    with pytest.raises(ValueError, match="at least one"):
        ml.studies.compare_models([])


def test_the_summary_says_what_is_not_supported(results):
    unsure = replace(results[0], partition=replace(results[0].partition, n_boundaries=0))
    first, second = ml.studies.compare_models([unsure, results[1]]).findings()[:2]
    assert "not supported" in first
    assert "not supported" not in second


def test_the_figure_has_every_model_segment_and_noise_shape(results, comparison):
    figure = ml.plots.plot_comparison(comparison)
    drawn = [t for t in figure.data if t.type == "scatter" and t.hovertext is not None]
    lines = [t for t in drawn if t.mode == "lines"]
    assert len(lines) == 4 * len(results)
    assert all(max(t.x) <= 1 for t in lines)
    bars = [t for t in figure.data if t.type == "bar"]
    assert len(bars) == 3 * len(results)
    ends = {t.y[0]: t.base[0] + t.x[0] for t in bars}
    np.testing.assert_allclose(list(ends.values()), 1.0)
    points = [t for t in drawn if t.mode == "markers"]
    assert len(points) == 2 * 3
    assert {t.marker.color for t in points} == set(SCALE_COLORS.values())
    assert sum(axis.type == "log" for axis in figure.select_xaxes()) == 2


def test_hostile_names_are_shown_as_text(results):
    name = "<script>alert('x')</script>"
    profile = replace(results[0].profile, model_name=name)
    figure = ml.plots.plot_comparison(
        ml.studies.compare_models([replace(results[0], profile=profile, family=name), *results[1:]])
    )
    assert "<script>" not in figure.to_plotly_json()["layout"]["title"]["text"]
    assert not any("<script>" in str(t.name) or "<script>" in str(t.y) for t in figure.data)
