"""Scale detection on profiles: signals, methods, replicates, stability, files and figures."""

from dataclasses import replace

import numpy as np
import pytest
from made_profile import made_profile
from tiny import random_tokens

import mspgt_lens as ml
from mspgt_lens.scales.detection import METHODS

FAST = {"n_bootstraps": 20}


@pytest.fixture(scope="module")
def stepped():
    """A profile of 24 blocks whose signals jump at blocks 8 and 17, as its folds agree."""
    rng = np.random.default_rng(0)
    blocks = np.arange(24)
    profile = made_profile(n_layers=24)

    def step(low, middle, high):
        return np.select([blocks < 8, blocks < 17], [low, middle], high)

    def curve(old, values):
        folds = values + 0.02 * rng.standard_normal((5, len(values)))
        return replace(old, values=values, low=values - 0.1, high=values + 0.1, by_fold=folds)

    def site_curve(old, start, change):
        return curve(old, start + np.cumsum(np.concatenate([[0.0], change])))

    def noisy(levels):
        return levels + 0.02 * rng.standard_normal(24)

    return replace(
        profile,
        compression=site_curve(profile.compression, 500, noisy(step(1.0, 0.3, 0.8))),
        relevance=site_curve(profile.relevance, 1, noisy(step(0.1, 0.3, 0.0))),
        retained={
            scale: curve(
                c, np.exp(3 - np.cumsum(np.append(0, noisy(step(0.05, 0.2, 0.1) * (i + 1) / 3))))
            )
            for i, (scale, c) in enumerate(profile.retained.items())
        },
        predicted={
            scale: site_curve(c, 1, noisy(step(*levels)))
            for (scale, c), levels in zip(
                profile.predicted.items(),
                ((0.3, 0.1, 0.0), (0.0, 0.2, 0.1), (0.0, 0.05, 0.3)),
                strict=True,
            )
        },
        signals={
            name: curve(c, noisy(step(*levels)))
            for (name, c), levels in zip(
                profile.signals.items(),
                ((1.0, 5.0, 30.0), (1, 2, 3), (1, 3, 2), (9, 7, 8), (0.5, 0.3, 0.6), (30, 50, 40)),
                strict=True,
            )
        },
    )


@pytest.fixture(scope="module")
def partition(stepped):
    return ml.detect_scales(profile=stepped, **FAST)


def test_steps_in_a_profile_are_found(partition):
    assert partition.boundaries == (8, 17)
    assert partition.intervals == ((8, 8), (17, 17))
    assert partition.n_boundaries == 2
    assert partition.p_value <= 0.02
    assert partition.segments["intermediate"] == range(8, 17)
    assert "Two boundaries" in partition.summary()


def test_signals_are_levels_of_curves_and_the_block_signals(stepped):
    table = ml.arrays.boundary_signals(stepped)
    assert table.shape == (24, 14)
    # After every block: a jump belongs to the block that makes it.
    assert np.allclose(table["compression"], stepped.compression.values[1:])
    assert np.allclose(table["retained global, log"], np.log(stepped.retained["global"].values[1:]))
    assert np.allclose(table["attention span"], stepped.signals["attention_span"].values)


def test_curves_that_say_nothing_are_left_out_and_named(stepped):
    silent = stepped.predicted["global"]
    silent = replace(silent, low=-np.ones(25))
    flat = replace(stepped.signals["novelty"], values=np.ones(24), low=np.ones(24) - 1)
    flat = replace(flat, high=np.ones(24) * 4)
    changed = replace(
        stepped,
        predicted=dict(stepped.predicted) | {"global": silent},
        signals=dict(stepped.signals) | {"novelty": flat},
    )
    found = ml.detect_scales(profile=changed, **FAST)
    assert "novelty" not in found.by_signal
    assert "predicted global" not in found.by_signal
    assert any("predicted global (cannot be told from 0)" in note for note in found.warnings)
    assert any("novelty (constant)" in note for note in found.warnings)


def test_curves_that_touch_zero_enter_without_a_logarithm(stepped):
    low = stepped.retained["local"]
    shift = low.values.min() + 0.01
    crossing = replace(low, values=low.values - shift, low=low.low - shift, high=low.high - shift)
    changed = replace(stepped, retained=dict(stepped.retained) | {"local": crossing})
    assert "retained local" in ml.arrays.boundary_signals(changed)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_places_two_boundaries(stepped, partition, method):
    found = ml.detect_scales(profile=stepped, method=method, **FAST)
    assert found.method == method
    assert found.boundaries == partition.by_method[method]
    assert (found.p_values, found.n_boundaries) == (partition.p_values, partition.n_boundaries)
    for (low, high), boundary in zip(found.intervals, found.boundaries, strict=True):
        assert low <= boundary <= high


def test_published_detectors_and_baselines(partition):
    assert partition.by_method["attention_span"] == (8, 17)
    assert partition.by_method["stages"] == (8, 17)
    assert partition.by_method["hvib"] == (8, 17)
    assert partition.by_method["thirds"] == (8, 16)
    assert partition.by_method["quarters"] == (6, 18)


def test_agreement_between_methods(partition):
    shares = partition.agreement
    assert np.allclose(np.diag(shares), 1)
    assert shares.loc["fused", "thirds"] == pytest.approx(23 / 24)
    assert shares.loc["fused", "quarters"] == pytest.approx(21 / 24)


def test_detectors_that_find_nothing_say_so(stepped):
    with pytest.raises(ValueError, match="does not pass both thresholds"):
        ml.detect_scales(
            profile=stepped, method="attention_span", span_thresholds=(100, 200), **FAST
        )
    found = ml.detect_scales(profile=stepped, span_thresholds=(100, 200), **FAST)
    assert found.by_method["attention_span"] is None
    assert "attention_span" not in found.agreement


def test_disagreeing_folds_widen_the_intervals(stepped):
    rng = np.random.default_rng(1)

    def loud(curve):
        scale = 3 * np.ptp(curve.values)
        return replace(curve, by_fold=curve.values + scale * rng.standard_normal((5, len(curve))))

    changed = replace(
        stepped,
        signals={name: loud(c) for name, c in stepped.signals.items()},
        predicted={name: loud(c) for name, c in stepped.predicted.items()},
        compression=loud(stepped.compression),
        relevance=loud(stepped.relevance),
    )
    settings = {"n_bootstraps": 60}
    calm = ml.detect_scales(profile=stepped, **settings)
    found = ml.detect_scales(profile=changed, **settings)
    assert found.boundaries == calm.boundaries
    assert np.ptp(found.intervals, axis=1).sum() > np.ptp(calm.intervals, axis=1).sum()


def test_profiles_without_folds_say_what_is_missing():
    found = ml.detect_scales(profile=made_profile(), **FAST)
    assert any("leave out the choice of prompts" in note for note in found.warnings)


def test_partitions_survive_saving(partition, tmp_path):
    path = partition.save(tmp_path / "folder" / "found")
    assert ml.results.ScalePartition.load(path) == partition
    with pytest.raises(ValueError, match="must hold a LayerProfile"):
        ml.results.LayerProfile.load(path)
    with pytest.raises(FileNotFoundError, match="no saved ScalePartition"):
        ml.results.ScalePartition.load(tmp_path / "other")
    other = tmp_path / "x.npz"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a saved ScalePartition"):
        ml.results.ScalePartition.load(other)


def test_partition_as_a_table(partition):
    table = partition.to_dataframe()
    assert list(table.columns) == ["model", "quantity", "segment", "block", "value", "unit"]
    n_signals = partition.signals.shape[1]
    assert n_signals == 14
    assert len(table) == 24 * (1 + n_signals)
    wide = table.pivot(index="block", columns="quantity", values="value")
    np.testing.assert_array_equal(wide["probability"], partition.probability)
    np.testing.assert_array_equal(wide[list(partition.by_signal)], partition.signals)
    assert (table["segment"] == "global").sum() == 7 * (1 + n_signals)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a model and prompts, or profile="),
        ({"profile": made_profile(n_layers=4)}, "at least 6 blocks, got 4"),
        ({"profile": made_profile(n_layers=2)}, "at least 6 blocks, got 2"),
        ({"profile": made_profile(n_layers=1)}, "at least 6 blocks, got 1"),
        ({"profile": made_profile(), "method": "guess"}, "method must be one of"),
        ({"profile": made_profile(), "method": "thirds", "n_boundaries": 3}, "places two"),
        ({"profile": made_profile(), "span_thresholds": (5, 2)}, "two rising numbers"),
    ],
)
def test_bad_calls_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ml.detect_scales(**arguments)


def test_bad_calls_are_named_before_the_pass(tiny, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr("mspgt_lens.scales.detection.profile_layers", fail)
    for arguments, message in (
        ({"span_thresholds": (5, 2)}, "two rising numbers"),
        ({"method": "quarters", "n_boundaries": 1}, "places two"),
        ({}, "at least 6 blocks, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.detect_scales(tiny("llama"), ["some text"], **arguments)


def test_figures_show_what_was_found(stepped, partition):
    figure = ml.plot_boundaries(partition)
    assert [t.text for t in figure.data if t.type == "bar"][:3] == [
        "Local",
        "Intermediate",
        "Global",
    ]
    assert "Two boundaries beyond gradual change" in figure.layout.title.text
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    assert np.shape(heat.z) == (14, 24)
    with pytest.raises(ValueError, match="partition is of 24 blocks"):
        ml.plot_profile(made_profile(), partition)


def test_hostile_names_stay_text(partition):
    hostile = replace(
        partition,
        model_name="<script>alert(1)</script>",
        by_signal={f"<b>{k}": v for k, v in partition.by_signal.items()},
    )
    text = ml.plot_boundaries(hostile).to_json()
    assert "<script>" not in text.replace("\\u003c", "<")
    assert "<b>attention" not in text.replace("\\u003c", "<")


def test_the_report_tells_of_boundaries(stepped, partition, tmp_path):
    html = ml.write_report(tmp_path / "r.html", stepped, partition).read_text()
    assert "Scale boundaries" in html
    assert "Two boundaries beyond gradual change" in html


def test_stability_on_a_tiny_model(tiny):
    """Halves, another seed and other bands, on a model of random weights with six blocks."""
    model = tiny("llama", n_layers=6)
    prompts = ml.PromptDataset.from_tokens(random_tokens(48, 40))
    bands = {"local": (1, 1), "intermediate": (2, 4), "global": (5, 8)}
    found = ml.studies.stability(
        model,
        {"text": prompts},
        seeds=(0, 1),
        bands={"short": bands | {"global": (4, 6)}},
        profile_settings={"n_folds": 3, "bands": bands},
        progress=False,
        **FAST,
    )
    assert list(found.partitions) == [
        "text",
        "text, half 1",
        "text, half 2",
        "text, seed 1",
        "text, bands short",
    ]
    table = found.table
    assert table["agreement"][0] == 1.0
    assert table["distance"][0] == 0.0
    assert (table["groups"][:3] == [48, 24, 24]).all()
    figure = ml.plots.plot_stability(found)
    assert len([t for t in figure.data if t.type == "bar"]) == 15


def test_conditions_with_other_numbers_of_boundaries_have_no_distance(partition):
    conditions = {
        "text": partition,
        "moved": replace(partition, boundaries=tuple(b + 1 for b in partition.boundaries)),
        "one": replace(partition, boundaries=partition.boundaries[:1]),
        "none": replace(partition, boundaries=()),
    }
    found = ml.results.Stability(conditions)
    assert found.table["distance"].tolist()[:2] == [0.0, 1.0]
    assert found.table["distance"].isna().tolist() == [False, False, True, True]
    assert found.findings() == [
        "Against the first, boundaries move by 1 blocks on average, 1 at most.",
        "2 of 3 other conditions give another number of boundaries.",
    ]


def test_studies_gather_what_their_method_reads(tiny):
    model = tiny("llama", n_layers=6)
    prompts = ml.PromptDataset.from_tokens(random_tokens(24, 40))
    bands = {"local": (1, 1), "intermediate": (2, 4), "global": (5, 8)}
    settings = {"profile_settings": {"n_folds": 3, "bands": bands}, "progress": False, **FAST}
    settings["method"] = "published_fusion"
    stable = ml.studies.stability(model, [prompts], halves=False, **settings)
    trained = ml.studies.emergence([(0, model)], prompts, **settings)
    for partition in (*stable.partitions.values(), *trained.partitions):
        assert partition.method == "published_fusion"


@pytest.mark.parametrize("n_layers", [1, 2])
def test_signals_of_very_shallow_models_are_refused(n_layers):
    with pytest.raises(ml.CannotMeasure, match=f"at least 3 blocks, got {n_layers}"):
        ml.arrays.boundary_signals(made_profile(n_layers=n_layers))


def test_a_model_of_one_block_has_no_boundary(tiny):
    with pytest.raises(ValueError, match=r"of 1 block has no boundary: .*\{'all': \[0\]\}"):
        ml.measure_brittleness(tiny("llama", n_layers=1), ["w5"], (1,), progress=False)


def test_controls_are_told_by_a_field_not_by_a_name(stepped, partition, tmp_path):
    noted = replace(partition, model_name="mine (tuned)", warnings=("read this first",))
    twin = replace(noted, control="random_weights", warnings=("about the twin",))
    for given in ((noted, twin), (twin, noted)):
        html = ml.write_report(tmp_path / "r.html", *given).read_text()
        assert "read this first" in html
        assert "about the twin" not in html
    # A control by itself is what the report is about.
    assert "about the twin" in ml.write_report(tmp_path / "r.html", twin).read_text()
    profile = replace(stepped, control="shuffled_tokens")
    assert ml.detect_scales(profile=profile, n_bootstraps=20).control == ("shuffled_tokens")
    assert ml.results.LayerProfile.load(profile.save(tmp_path / "p")).control == "shuffled_tokens"


def test_a_signal_of_sites_of_one_s_own_is_sought_in_after_each_block(stepped):
    """Its value after a block is that block's, as of the profile's other curves over sites."""
    values = np.linspace(1.0, 2.0, stepped.n_layers + 1) ** 2
    own = ml.results.Curve(values, values, values, "made", "Made up.")
    wider = replace(stepped, signals={**stepped.signals, "mine": own})
    table = ml.arrays.boundary_signals(wider)
    np.testing.assert_array_equal(table["mine"], values[1:])
    assert "mine" in ml.detect_scales(profile=wider, n_bootstraps=20).by_signal
