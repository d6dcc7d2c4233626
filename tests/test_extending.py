"""Whoever uses the package adds to it by the front door, and what is added is used like its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_profile import made_profile
from test_perturbation import dataset, prepared, run
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.extending import (
    Edit,
    Finding,
    PerturbationKind,
    Prediction,
    over_models,
    register_perturbation,
)
from mspgt_lens.perturbation import registry
from mspgt_lens.perturbation.matching import match_strengths


class Shrink(PerturbationKind):
    """The residual at the block's entry, shrunk."""

    name = "shrink"
    default = 0.3
    least, most = 0.0, 0.9

    def edits(self, draws, block):
        shrunk = draws.on_rows(lambda rows, ask: rows * (1 - draws.strength))
        return [Edit(block, "resid_pre", shrunk)]


class Lessen(PerturbationKind):
    """The block's update, as in scaling by 1 - strength."""

    name = "lessen"

    def edits(self, draws, block):
        return draws.on_update(
            block, lambda before, rows, ask: torch.lerp(before, rows, 1 - draws.strength)
        )


@pytest.fixture
def kinds(monkeypatch):
    """The registry as it is, and again after the test."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    assert register_perturbation(Shrink) is Shrink
    register_perturbation(Lessen)


def test_a_perturbation_is_used_by_its_name(tiny, kinds):
    shrink = ml.Perturbation("shrink")
    assert (shrink.amount, shrink.label) == (0.3, "shrink 0.3")
    found = ml.perturb_scales(
        tiny("llama"), dataset(), [1, 3], perturbations=[shrink], n_controls=2, progress=False
    )
    assert found.perturbations == ("shrink 0.3",)
    assert (found.values[0, :, 0] > 0).all()


def test_texts_are_written_under_an_added_perturbation(kinds):
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    found = ml.generation_effects(
        model,
        [as_text(row) for row in random_tokens(4, 14)],
        (1, 3),
        perturbations=[ml.Perturbation("lessen")],
        target_kl=0.05,
        n_new=4,
        n_controls=1,
        progress=False,
    )
    assert found.perturbations == ("lessen",)
    assert abs(found.kl / 0.05 - 1).max() < 0.06


def test_a_perturbation_does_what_its_edits_say(tiny, kinds):
    scaled, lessened = run(
        tiny("gpt2"), dataset(), [ml.Perturbation("scaling", 0.25), ml.Perturbation("lessen", 0.75)]
    )
    assert (scaled == lessened).all()


def test_the_strength_of_a_perturbation_is_matched(tiny, kinds):
    pairs = [(ml.Perturbation("shrink"), (1, 2)), (ml.Perturbation("shrink"), (0,))]
    near, far = (
        match_strengths(*prepared(tiny("llama"), dataset()), pairs, kl) for kl in (0.01, 9)
    )
    assert all(abs(one.kl / 0.01 - 1) < 0.06 for one in near)
    assert len({one.perturbation.amount for one in near}) == 2
    # What cannot be reached is told at the kind's full effort.
    assert [one.perturbation.amount for one in far] == [0.9, 0.9]


def test_a_range_and_a_direction_are_asked_for(kinds):
    with pytest.raises(ValueError, match=r"strength of 'shrink' must be finite, 0 to 0.9, got 1"):
        ml.Perturbation("shrink", 1.0)
    with pytest.raises(ValueError, match="'shrink' takes no direction"):
        ml.Perturbation("shrink", direction=torch.ones(32))
    with pytest.raises(ValueError, match=r"one of noise, .*, shrink, lessen, got 'shrinks'"):
        ml.Perturbation("shrinks")


def test_a_perturbation_that_cannot_be_registered_says_why(kinds):
    register_perturbation(Shrink)  # As in a notebook's cell that runs again.
    taken = type("Other", (Shrink,), {"name": "noise", "__module__": __name__})
    with pytest.raises(ValueError, match=r"'noise' is that of mspgt_lens.*Noise already"):
        register_perturbation(taken)
    with pytest.raises(ValueError, match="Nameless lacks"):
        register_perturbation(type("Nameless", (PerturbationKind,), {}))
    beyond = type("Beyond", (PerturbationKind,), {"name": "beyond", "least": 2.0})
    with pytest.raises(ValueError, match="default of 'beyond' must be 2 to inf"):
        register_perturbation(beyond)


def early(results):
    """Where the first boundary is, as a finding of a prediction from outside."""
    depths = np.array([r.depths[0] for r in results])
    if len(depths) < 4:
        return Finding(None, f"{len(depths)} models were measured", len(depths), "4 are needed")
    return Finding(over_models(depths), "the first boundary comes early", len(depths))


def prediction(threshold, **changed):
    made = Prediction(
        name="Early boundary",
        statement="The first boundary lies early.",
        quantity="share of the depth",
        threshold=threshold,
        published="nothing was",
        find=early,
        needs=("n_parameters",),
        below=True,
    )
    return replace(made, **changed)


def test_a_prediction_is_judged_beside_the_theorys_own():
    models = ml.synthetic.synthetic_models(2, 5)
    own = ml.evaluate_predictions(models)
    verdicts = ml.evaluate_predictions(models, predictions=[prediction(0.99)])
    assert list(verdicts)[:-1] == list(own)
    added = verdicts["Early boundary"]
    depths = [r.depths[0] for r in models]
    assert added.statistic == pytest.approx(np.mean(depths))
    assert added.interval[0] < added.statistic < added.interval[1]
    assert (added.verdict, added.n_models, added.published) == ("supported", 10, "nothing was")
    assert dict(verdicts.thresholds) == {**own.thresholds, "Early boundary": 0.99}
    assert "Early boundary" in set(verdicts.to_dataframe()["prediction"])
    assert prediction(0.01).verdicts(models)[0].verdict == "refuted"


def test_a_prediction_sees_the_models_that_hold_what_it_needs():
    models = ml.synthetic.synthetic_models(2, 5)
    unknown = [replace(one, n_parameters=None) for one in models[:7]]
    (verdict,) = prediction(0.99).verdicts([*unknown, *models[7:]])
    assert (verdict.verdict, verdict.n_models) == ("inconclusive", 3)
    assert verdict.reason == "3 models were measured; 4 are needed."


def test_a_prediction_of_several_parts_gives_a_verdict_each():
    parts = [Finding((0.1, 0.0, 0.2), "early", 5, part="one"), Finding(0.3, "late", 1, part="two")]
    verdicts = prediction(0.5, find=lambda results: parts).verdicts([])
    assert [v.name for v in verdicts] == ["Early boundary, one", "Early boundary, two"]
    assert [(v.verdict, v.reason) for v in verdicts] == [
        ("supported", "Early."),
        ("inconclusive", "Late."),
    ]


def test_a_prediction_that_cannot_be_judged_says_why():
    models = ml.synthetic.synthetic_models(1, 3)
    with pytest.raises(ValueError, match=r"needs must be fields of ModelResults .*sizes"):
        prediction(0.5, needs=("sizes",))
    with pytest.raises(ValueError, match="predictions must all have names of their own"):
        ml.evaluate_predictions(models, predictions=[prediction(0.5, name="P6 order")])


def correlation(z, y, *, groups, seed, reach=0.0):
    """Information of two jointly Gaussian columns, from their correlation."""
    value = -0.5 * np.log(1 - np.corrcoef(z[:, 0], y[:, 0])[0, 1] ** 2)
    warnings = (f"seed {seed}, {len(set(groups.tolist()))} groups",)
    return ml.results.Estimate(
        value, value - reach, value + reach, "nats", "Of Gaussians.", warnings=warnings
    )


def test_an_estimator_is_a_function():
    rng = np.random.default_rng(0)
    z = 3 + 5 * rng.standard_normal((400, 1))
    y = z + 5 * rng.standard_normal((400, 1))
    given = {"groups": np.repeat(list("abcdefghij"), 40), "seed": 7}
    with pytest.warns(UserWarning, match="seed 7, 10 groups"):
        found = ml.mutual_information(z, y, estimator=correlation, reach=0.1, **given)
    assert found.value == pytest.approx(-0.5 * np.log(1 - np.corrcoef(z.T, y.T)[0, 1] ** 2))
    assert found.high - found.value == pytest.approx(0.1)


def test_an_estimator_gets_labels_and_a_checked_input():
    def labels(z, y, *, groups, seed):
        assert (y == np.arange(60) % 3).all()
        return ml.results.Estimate(0.5, 0.4, 0.6, "nats", "Made up.")

    z = np.random.default_rng(0).standard_normal((60, 2))
    assert ml.mutual_information(z, 10 + np.arange(60) % 3, estimator=labels).value == 0.5
    with pytest.raises(ValueError, match="finite"):
        ml.mutual_information(z * np.nan, np.arange(60) % 3, estimator=labels)


def test_an_estimator_that_cannot_be_used_says_why():
    z = np.random.default_rng(0).standard_normal((60, 2))
    with pytest.raises(ValueError, match=r"'gaussian' takes none, got reach"):
        ml.mutual_information(z[:, 0], z[:, 1], reach=0.1)
    with pytest.raises(ValueError, match=r"must return an Estimate in nats, got 0.5"):
        ml.mutual_information(z[:, 0], z[:, 1], estimator=lambda *_, **__: 0.5)
    with pytest.raises(ValueError, match=r"one of gaussian, .*, or a function, got 'pearson'"):
        ml.mutual_information(z[:, 0], z[:, 1], estimator="pearson")


def largest_jumps(signals):
    """The two blocks before which the novelty changes most."""
    jumps = signals["novelty"].diff().abs().to_numpy()[1:]
    return sorted(1 + np.argsort(jumps)[-2:])


DRAWS = {"n_bootstraps": 20}


def profile_of_folds():
    """A profile whose curves differ between folds, so that intervals are drawn."""
    rng = np.random.default_rng(0)

    def folds(curve):
        spread = 0.1 * np.abs(curve.values).mean() * rng.standard_normal((5, len(curve.values)))
        return replace(curve, by_fold=curve.values + spread)

    made = made_profile(n_layers=8)
    several = {
        name: {key: folds(curve) for key, curve in getattr(made, name).items()}
        for name in ("retained", "predicted", "signals")
    }
    single = {name: folds(getattr(made, name)) for name in ("compression", "relevance")}
    return replace(made, **several, **single)


def test_a_method_places_boundaries():
    profile = profile_of_folds()
    found = ml.detect_scales(profile=profile, method=largest_jumps, **DRAWS)
    jumps = np.abs(np.diff(profile.signals["novelty"].values))
    assert found.boundaries == tuple(sorted(1 + np.argsort(jumps)[-2:]))
    assert found.method == "largest_jumps"
    assert any(low < high for low, high in found.intervals)
    assert found.by_method["largest_jumps"] == found.boundaries
    assert found.p_value == ml.detect_scales(profile=profile, **DRAWS).p_value
    three = ml.detect_scales(profile=profile, method=lambda s: (1, 3, 5), n_boundaries=3, **DRAWS)
    assert three.boundaries == (1, 3, 5)


def test_a_method_that_places_no_boundaries_says_why():
    profile = profile_of_folds()
    for places in ((3,), (3, 3), (0, 4), (4, 8)):
        with pytest.raises(ValueError, match=r"must return 2 boundaries .* rise from 1 to 7, got"):
            ml.detect_scales(profile=profile, method=lambda signals: places, **DRAWS)  # noqa: B023
    with pytest.raises(ValueError, match=r"one of fused, .*, or a function, got 'jumps'"):
        ml.detect_scales(profile=profile, method="jumps")
