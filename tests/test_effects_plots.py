"""The forest plot holds every defined effect, its interval, and words."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

import mspgt_lens as ml
from mspgt_lens.generation.results import GenerationEffects, compare_texts, text_deltas
from mspgt_lens.plots.look import SCALE_COLORS

METRICS = {
    "mtld": "local",
    "distinct_1": "local",
    "repetition": "local",
    "sentence_count": "intermediate",
    "sentence_length": "intermediate",
    "embedding_coherence": "global",
}
SEGMENTS = {"local": (0, 1), "intermediate": (2, 3, 4), "global": (5, 6, 7)}


def made_effects(name: str = "made", n_draws: int = 3, seed: int = 0) -> GenerationEffects:
    """Effects of drawn properties: local interventions move the local ones."""
    rng = np.random.default_rng(seed)
    n, shape = 40, (3, len(SEGMENTS))
    clean = rng.standard_normal((n, len(METRICS)))
    measured = clean + 0.6 * rng.standard_normal((*shape, n, len(METRICS)))
    measured[:, 0, :, :3] += 0.9
    # Coherence is undefined in many texts, and in all under one intervention.
    measured[:, :, ::3, 5] = np.nan
    measured[1, 1, :, 5] = np.nan
    flat = measured.reshape(-1, n, len(METRICS))
    found = compare_texts(clean, flat, np.arange(n), n_draws=200)
    drawn = rng.standard_normal((9 * n_draws, n, len(METRICS)))
    controls = text_deltas(clean, drawn) if n_draws else np.zeros((0, len(METRICS)))
    texts = tuple(f"text {i}" for i in range(n))
    return GenerationEffects(
        model_name=name,
        perturbations=("covariance noise", "scaling", "temperature"),
        segments=SEGMENTS,
        metrics=METRICS,
        left_out={},
        clean=clean.mean(axis=0),
        **{key: values.reshape(*shape, -1) for key, values in found.items()},
        controls=controls.reshape(*shape, n_draws, len(METRICS)),
        strengths=np.ones(shape),
        kl=np.full(shape, 0.5),
        control_kl=np.full((*shape, n_draws), 0.5),
        prompts=texts,
        groups=np.arange(n),
        clean_texts=texts,
        texts=((texts,) * 3,) * 3,
        clean_measured=clean,
        measured=measured,
        settings={"n_prompts": n, "n_new": 48, "target_kl": 0.5},
    )


def points(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.hovertext is not None]


def test_every_defined_effect_is_drawn_with_its_interval_and_words():
    effects = made_effects()
    traces = points(ml.plots.plot_effects(effects))
    assert sum(len(trace.x) for trace in traces) == np.isfinite(effects.deltas).sum() == 53
    first = traces[0]
    assert first.x[0] == effects.deltas[0, 0, 0]
    assert first.error_x.array[0] == effects.delta_high[0, 0, 0] - effects.deltas[0, 0, 0]
    assert first.error_x.arrayminus[0] == effects.deltas[0, 0, 0] - effects.delta_low[0, 0, 0]
    words = first.hovertext[0]
    assert "covariance noise of local (2 blocks)" in words
    assert f"a difference: p {effects.p_values[0, 0, 0]:.3f} after Holm" in words
    assert "40 pairs of texts, 0 undefined" in words
    assert "random blocks" in words


def test_segments_keep_their_colors_and_predictions_are_filled():
    traces = points(ml.plots.plot_effects(made_effects()))
    assert {trace.marker.color for trace in traces} == set(SCALE_COLORS.values())
    assert sum(bool(trace.showlegend) for trace in traces) == 3
    local = traces[0]
    assert list(local.marker.symbol) == ["circle"] * 3 + ["circle-open"] * 3
    assert [("not predicted" in words) for words in local.hovertext] == [False] * 3 + [True] * 3


def test_properties_share_a_row_and_controls_are_ticks():
    figure = ml.plots.plot_effects(made_effects())
    for trace in points(figure):
        rows = np.round(trace.y)
        assert set(rows) <= set(range(1, 7))
        assert (np.abs(trace.y - rows) < 0.5).all()
    ticks = [t for t in figure.data if t.hoverinfo == "skip"]
    assert sum(len(t.x) for t in ticks) == 9 * 3 * 6
    without = ml.plots.plot_effects(made_effects(n_draws=0))
    assert "random blocks" not in without.to_json()


def test_hostile_names_are_shown_as_text(monkeypatch):
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    assert "<script>" not in ml.plots.plot_effects(made_effects("<script>x</script>")).to_json()


def made_perturbations(name: str = "made") -> ml.results.PerturbationEffects:
    """Two kinds of perturbation of three segments, four control sets each."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 2.0, (2, 3, 3))
    return ml.results.PerturbationEffects(
        model_name=name,
        perturbations=("covariance noise 0.1", "skip"),
        segments=SEGMENTS,
        values=values,
        low=values - 0.2,
        high=values + 0.3,
        p_values=rng.uniform(size=(2, 3)),
        controls=rng.uniform(0.1, 2.0, (2, 3, 4, 3)),
        p_controls=rng.uniform(0.1, 1.0, (2, 3, 3)),
        settings={"n_groups": 12},
    )


def test_perturbations_are_drawn_with_intervals_controls_and_words():
    effects = made_perturbations()
    for column, measure in enumerate(("kl", "cross_entropy", "agreement")):
        figure = ml.plots.plot_effects(effects, measure=measure)
        traces = points(figure)
        assert [trace.name for trace in traces] == list(SEGMENTS)
        for number, trace in enumerate(traces):
            np.testing.assert_allclose(trace.x, effects.values[:, number, column])
            np.testing.assert_allclose(trace.error_x.array, 0.3)
            assert trace.marker.color == SCALE_COLORS[trace.name]
        ticks = [t for t in figure.data if t.hoverinfo == "skip"]
        assert sum(len(t.x) for t in ticks) == 2 * 3 * 4
        assert ("after Holm" in traces[0].hovertext[0]) == (measure == "cross_entropy")
        assert figure.layout.xaxis.type == ("log" if measure == "kl" else None)


def test_what_reaches_zero_is_cut_on_a_logarithmic_axis_and_told_whole():
    effects = made_perturbations()
    trace = points(ml.plots.plot_effects(effects))[0]
    low = effects.low[0, 0, 0]
    assert "rank p" in trace.hovertext[0]
    assert (np.array(trace.x) - np.array(trace.error_x.arrayminus) > 0).all()
    assert f"{low:.3g}" in trace.hovertext[0]
    with pytest.raises(ValueError, match="measure must be one of kl, cross_entropy, agreement"):
        ml.plots.plot_effects(effects, measure="loss")
    assert "<script>" not in ml.plots.plot_effects(made_perturbations("<script>")).to_json()
