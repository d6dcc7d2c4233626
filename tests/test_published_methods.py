"""The first version's detectors: places on curves made to have them, none on flat ones."""

from dataclasses import replace

import numpy as np
import pytest
from made_profile import made_profile

import mspgt_lens as ml
from mspgt_lens.estimates import Curve
from mspgt_lens.scales import published
from mspgt_lens.scales.detection import PUBLISHED_METHODS

FAST = {"n_bootstraps": 20}
BLOCKS = np.arange(24)
SITES = np.arange(25)
STEPS = np.select([BLOCKS < 8, BLOCKS < 17], [0.0, 1.0], 2.0)


def tent(site):
    return np.clip(3 - np.abs(SITES - site), 0, None).astype(float)


def profile_of(distance, information, probes, spread=1e-3):
    """A profile with these curves, whose folds differ a little."""
    rng = np.random.default_rng(0)
    made = made_profile(n_layers=24)

    def curve(values):
        values = np.asarray(values, dtype=float)
        folds = values + spread * rng.standard_normal((5, 1))
        return Curve(values, values - 1, values + 1, "nats", "Made up.", folds)

    signals = {name: curve(c.values) for name, c in made.signals.items()}
    signals["inter_layer_information"] = curve(information)
    if distance is not None:
        signals["attention_distance"] = curve(distance)
    return replace(
        made,
        compression=curve(made.compression.values),
        relevance=curve(made.relevance.values),
        retained={name: curve(c.values) for name, c in made.retained.items()},
        predicted=dict(zip(made.predicted, map(curve, probes), strict=True)),
        added={},
        signals=signals,
    )


STEPPED = profile_of(2 + 5 * STEPS, 900 - 50 * STEPS, [tent(8), tent(17), 0.1 * SITES])
FLAT = profile_of(np.full(24, 2.0), np.full(24, 900.0), [np.full(25, 0.5)] * 3)


@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_published_methods_find_what_was_planted(method):
    found = ml.detect_scales(profile=STEPPED, method=method, **FAST)
    assert found.boundaries == found.by_method[method] == (8, 17)
    assert found.intervals == ((8, 8), (17, 17))
    assert found.probability[[8, 17]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_published_methods_find_nothing_in_flat_curves(method, tmp_path):
    found = ml.detect_scales(profile=FLAT, method=method, **FAST)
    assert found.boundaries == found.by_method[method] == ()
    assert found.intervals == ()
    assert not found.probability.any()
    assert f"No boundary by {method}." in found.summary()
    assert list(found.segments.values()) == [range(24)]
    assert ml.results.ScalePartition.load(found.save(tmp_path / "flat")) == found
    assert found.plot().to_html()


def test_one_more_boundary_is_one_more():
    three = np.select([BLOCKS < 6, BLOCKS < 12, BLOCKS < 18], [0.0, 1.0, 2.0], 3.0)
    one = np.where(BLOCKS < 12, 0.0, 1.0)
    assert published.information_drops(-three) == published.distance_rises(three) == (6, 12, 18)
    assert published.information_drops(-one) == (12,)
    # Rises of information, and falls of distance, are no boundaries.
    assert published.information_drops(three) == published.distance_rises(-three) == ()


def test_drops_are_those_more_than_two_deviations_below_the_mean():
    rng = np.random.default_rng(0)
    for _ in range(50):
        information = rng.standard_normal(30).cumsum()
        steps = [information[i + 1] - information[i] for i in range(29)]
        mean = sum(steps) / 29
        deviation = (sum((s - mean) ** 2 for s in steps) / 29) ** 0.5
        expected = tuple(i + 1 for i, s in enumerate(steps) if s < mean - 2 * deviation)
        assert published.information_drops(information) == expected


def test_rounding_is_no_step():
    assert published.distance_rises(2.0 + 1e-13 * np.random.default_rng(0).random(24)) == ()


def test_weights_say_what_the_fusion_listens_to():
    probes = [tent(5), tent(11), 0.1 * SITES]
    rises = np.select([BLOCKS < 8, BLOCKS < 17], [0.0, 1.0], 2.0)
    falls = -np.select([BLOCKS < 3, BLOCKS < 21], [0.0, 1.0], 2.0)
    made = profile_of(rises, falls, probes)
    for weights, places in (
        ((1, 0, 0), (5, 11)),
        ((0, 1, 0), (8, 17)),
        ((0, 0, 1), (3, 21)),
    ):
        found = ml.detect_scales(
            profile=made, method="published_fusion", fusion_weights=weights, **FAST
        )
        assert found.boundaries == places
        assert found.settings["fusion_weights"] == list(weights)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.5), (1.5, -0.5, 0.0)])
def test_weights_must_add_up_to_one(weights):
    with pytest.raises(ValueError, match="fusion_weights must be three numbers from 0 on"):
        ml.detect_scales(profile=STEPPED, fusion_weights=weights, **FAST)


def test_without_its_signals_a_published_method_cannot_look():
    made = profile_of(None, 900 - 50 * STEPS, [tent(8), tent(17), 0.1 * SITES])
    found = ml.detect_scales(profile=made, method="mi_drop", **FAST)
    assert found.by_method["attention_distance"] is None
    assert found.by_method["published_fusion"] is None
    for method in ("attention_distance", "published_fusion"):
        with pytest.raises(ml.CannotMeasure, match=r"cannot look in .*: .* signals= of"):
            ml.detect_scales(profile=made, method=method, **FAST)
    with pytest.raises(ValueError, match="leave n_boundaries at None"):
        ml.detect_scales(profile=made, method="mi_drop", n_boundaries=2, **FAST)


def test_other_prompts_may_give_another_number():
    rng = np.random.default_rng(0)
    made = profile_of(None, 900 - 50 * STEPS, [tent(8), tent(17), 0.1 * SITES])
    noisy = made.signals["inter_layer_information"]
    folds = noisy.values + 40 * rng.standard_normal((5, 24))
    signals = {**made.signals, "inter_layer_information": replace(noisy, by_fold=folds)}
    found = ml.detect_scales(profile=replace(made, signals=signals), method="mi_drop", **FAST)
    assert found.boundaries == (8, 17)
    assert any("mi_drop finds another number of boundaries than 2" in w for w in found.warnings)
    assert 0 < found.probability.sum() < 24
