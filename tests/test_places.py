"""Distances from the places that theories name, and their exact p-values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

import mspgt_lens as ml

HALF = "half-depth transition"
STAGES = "stages of inference"


def placed(boundaries, n_layers, supported=True, min_size=1):
    (one,) = ml.synthetic.synthetic_models(1, 1, supported=supported)
    found = [one.partition.found[0]._replace(block=b) for b in boundaries] if supported else ()
    return replace(
        one.partition,
        n_layers=n_layers,
        boundaries=tuple(boundaries),
        intervals=tuple((b, b) for b in boundaries),
        found=tuple(found),
        n_boundaries=len(found),
        settings={"min_size": min_size},
    )


def curve(values):
    values = np.asarray(values, dtype=float)
    return ml.results.Curve(values, values, values, "made", "Made up.")


def showing(n_layers, **signals):
    (one,) = ml.synthetic.synthetic_models(1, 1)
    level = curve(np.ones(n_layers + 1))
    scales = dict.fromkeys(one.profile.predicted, level)
    curves = {"compression": level, "relevance": level, "retained": scales, "predicted": scales}
    made = {name: curve(values) for name, values in signals.items()}
    return replace(one.profile, n_layers=n_layers, **curves, signals=made)


def plain_distance(boundaries, places):
    to_place = [min(abs(b - p) for p in places) for b in boundaries]
    to_boundary = [min(abs(b - p) for b in boundaries) for p in places]
    return (sum(to_place) / len(to_place) + sum(to_boundary) / len(to_boundary)) / 2


def test_distances_by_hand():
    found = ml.theory.compare_places(placed((2, 8), 12))
    assert found["MSPGT"].places == pytest.approx((2, 8))
    assert found["MSPGT"].distance == pytest.approx(0, abs=1e-12)
    assert found["MSPGT"].p_value == found["MSPGT"].least_p == pytest.approx(1 / 55)
    # 4 and 2 blocks from half depth, which is 2 from the nearer.
    assert found[HALF].distance == pytest.approx(2.5 / 12)
    # From 6 and 11: 4 and 2, and 2 and 3.
    assert found[STAGES].distance == pytest.approx((3 + 2.5) / 2 / 12)
    assert found.supported
    assert "nearer than chance to the places of MSPGT" not in found.findings()[0]


@pytest.mark.parametrize(
    ("boundaries", "n_layers", "min_size"),
    [((4,), 9, 1), ((3, 7), 11, 1), ((3, 7), 12, 2), ((2, 5, 9), 13, 2), ((3, 6, 10), 14, 3)],
)
def test_p_values_by_walking_through_all_placements(boundaries, n_layers, min_size):
    found = ml.theory.compare_places(placed(boundaries, n_layers, min_size=min_size))
    every = [
        b
        for b in itertools.combinations(range(1, n_layers), len(boundaries))
        if min(np.diff((0, *b, n_layers))) >= min_size
    ]
    assert found.n_placements == len(every)
    for one in found.theories:
        own = plain_distance(boundaries, one.places)
        chance = [plain_distance(b, one.places) for b in every]
        assert one.distance * n_layers == pytest.approx(own)
        assert one.p_value == pytest.approx(np.mean([x <= own + 1e-9 for x in chance]))
        assert one.least_p == pytest.approx(np.mean([x <= min(chance) + 1e-9 for x in chance]))
        assert one.chance * n_layers == pytest.approx(np.median(chance))
    p_values = [one.p_value for one in found.theories]
    np.testing.assert_allclose(
        [one.p_holm for one in found.theories], multipletests(p_values, method="holm")[1]
    )


def test_p_values_are_exactly_even_where_boundaries_are_anywhere():
    every = list(itertools.combinations(range(1, 10), 2))
    p_values = {}
    for boundaries in every:
        for one in ml.theory.compare_places(placed(boundaries, 10)).theories:
            p_values.setdefault(one.theory, []).append(one.p_value)
    for found in p_values.values():
        for p in found:
            assert np.mean(np.array(found) <= p + 1e-12) == pytest.approx(p)


def test_a_model_s_own_signals_name_places():
    n_layers = 12
    norm = np.ones(13)
    norm[3:10] = 300
    # Falls most in block 2, lowest at site 6, rises most in block 8.
    entropy = np.array([5, 4.9, 4.8, 3, 2.9, 2.8, 2.7, 2.8, 2.9, 4.2, 4.3, 4.4, 4.5])
    dimension = np.array([5, 6, 8, 12, 14, 13, 11, 9, 8, 7, 6, 5, 5])
    signals = {"first_norm": norm, "prompt_entropy": entropy, "intrinsic_dimension": dimension}
    found = ml.theory.compare_places(placed((2, 9), n_layers), showing(n_layers, **signals))
    assert found["Mix-Compress-Refine"].places == (2, 9)
    assert found["Mix-Compress-Refine"].distance == 0
    assert found["entropy valley"].places == (2, 8)
    assert found["abstraction phase"].places == (4,)
    assert not found.left_out
    assert len(found.theories) == 6
    flat = {name: np.linspace(1, 2, 13) for name in signals}
    bare = ml.theory.compare_places(placed((2, 9), n_layers), showing(n_layers, **flat))
    assert "no massive activations" in bare.left_out["Mix-Compress-Refine"]
    assert "no interior valley of 10%" in bare.left_out["entropy valley"]
    assert "no interior peak of 10%" in bare.left_out["abstraction phase"]
    with pytest.raises(KeyError, match="no interior valley"):
        bare["entropy valley"]
    without = ml.theory.compare_places(placed((2, 9), n_layers))
    assert without.left_out["abstraction phase"] == "there is no intrinsic_dimension to place it by"


def test_an_encoder_is_held_against_what_was_published_of_encoders():
    profile = showing(12)
    encoder = replace(profile, settings={**profile.settings, "hidden_share": 0.15})
    assert ml.theory.compare_places(placed((4, 8), 12), profile)["MSPGT"].distance > 0
    found = ml.theory.compare_places(placed((4, 8), 12), encoder)["MSPGT"]
    assert found.places == pytest.approx((4, 8))
    assert found.distance == pytest.approx(0, abs=1e-12)


def test_many_blocks_tell_a_theory_s_places_and_few_cannot():
    near = ml.theory.compare_places(placed((8, 32), 48))
    assert near["MSPGT"].p_holm < 0.01
    assert "nearer than chance to the places of MSPGT" in near.findings()[0]
    assert near.warnings == ()
    few = ml.theory.compare_places(placed((2, 4), 6, supported=False, min_size=2))
    assert few.n_placements == 1
    assert {one.least_p for one in few.theories} == {1.0}
    unreachable, unsure = few.warnings
    assert "with 1 placement of 2 in 6 blocks, no place of the boundaries alone" in unreachable
    assert unreachable.endswith("for MSPGT, half-depth transition, stages of inference")
    assert "do not support these boundaries" in unsure


def test_boundaries_nearer_than_those_that_are_placed_are_held_against_all_placements():
    found = ml.theory.compare_places(placed((5, 6), 12, min_size=2))
    assert (found.min_size, found.n_placements) == (1, 55)


def test_what_cannot_be_compared_is_refused():
    partition = placed((3, 7), 12)
    with pytest.raises(ValueError, match="profile must be of the partition's model, of 12 blocks"):
        ml.theory.compare_places(partition, showing(9))
    with pytest.raises(ml.CannotMeasure, match="partition has no boundaries"):
        ml.theory.compare_places(placed((), 12))
    with pytest.raises(ml.CannotMeasure, match="at most 1,000,000 can be walked through"):
        ml.theory.compare_places(placed((10, 20, 30, 40, 50), 90))


def test_verdicts_and_their_report_hold_every_model_s_places(tmp_path):
    models = ml.synthetic.synthetic_models(1, 2, rivals={"R4 entropy valley": 0.5})
    verdicts = ml.evaluate_predictions(models)
    assert list(verdicts.places) == [one.name for one in models]
    for one in models:
        assert verdicts.places[one.name] == ml.theory.compare_places(one.partition, one.profile)
    assert ml.results.Verdicts.load(verdicts.save(tmp_path / "v")) == verdicts
    several = ml.write_report(tmp_path / "several.html", verdicts).read_text()
    alone = ml.write_report(tmp_path / "one.html", ml.evaluate_predictions(models[0])).read_text()
    for html in (several, alone):
        assert "Whose places?" in html
        assert "half-depth transition" in html
    assert "plot" in alone.split("Whose places?", 1)[1]


def test_the_figure_shows_every_place():
    found = ml.theory.compare_places(placed((8, 32), 48))
    figure = found.plot()
    points = sorted(x for trace in figure.data for x in trace.x)
    assert points == pytest.approx(sorted(p for one in found.theories for p in one.places))
    filled = [trace.marker.symbol == "diamond" for trace in figure.data]
    assert filled == [one.p_holm < 0.05 for one in found.theories]
    assert [shape.x0 for shape in figure.layout.shapes] == [8, 32]
