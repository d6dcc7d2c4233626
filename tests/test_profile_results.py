"""Profiles as results: kept, read back, tables and curves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from profiles import BANDS, assert_same, run
from safetensors.numpy import save_file

from mspgt_lens.estimates import Curve
from mspgt_lens.profile.results import LayerProfile


def test_a_saved_profile_loads_back_equal(
    model: Any, profile: LayerProfile, tmp_path: Path
) -> None:
    for saved in (profile, run(model, logit_lens=True)):
        loaded = LayerProfile.load(saved.save(tmp_path / "deep" / "v1.0"))
        assert_same(loaded, saved)
        for field in dataclasses.fields(LayerProfile):
            first, second = getattr(loaded, field.name), getattr(saved, field.name)
            if field.name in ("retained", "predicted", "added", "signals", "bands"):
                assert list(first) == list(second)
            elif field.name == "correlations":
                assert list(first) == list(second)
                assert all(np.array_equal(first[scale], second[scale]) for scale in first)
            elif not isinstance(first, Curve):
                assert first == second, field.name
    assert profile.warnings
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["v1.0.safetensors"]


def test_profiles_compare_by_value(profile: LayerProfile, tmp_path: Path) -> None:
    loaded = LayerProfile.load(profile.save(tmp_path / "p"))
    assert loaded == profile
    assert loaded.compression == profile.compression
    assert loaded.compression != profile.relevance


def test_a_path_with_the_suffix_is_kept(profile: LayerProfile, tmp_path: Path) -> None:
    assert profile.save(tmp_path / "p.safetensors") == tmp_path / "p.safetensors"
    assert LayerProfile.load(tmp_path / "p").n_tokens == profile.n_tokens
    assert LayerProfile.load(str(tmp_path / "p.safetensors")).n_tokens == profile.n_tokens


def test_a_failed_save_keeps_the_old_file(
    profile: LayerProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = profile.save(tmp_path / "p")
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mspgt_lens.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        profile.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert path.read_bytes() == before


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        LayerProfile.load(tmp_path / "nothing")


def make_garbage(path: Path, profile: LayerProfile) -> None:
    path.write_bytes(b"not a profile at all")


def make_empty(path: Path, profile: LayerProfile) -> None:
    path.write_bytes(b"")


def make_truncated(path: Path, profile: LayerProfile) -> None:
    path.write_bytes(profile.save(path).read_bytes()[:-100])


def make_weights(path: Path, profile: LayerProfile) -> None:
    save_file({"weight": np.zeros(3)}, path)


def make_other_kind(path: Path, profile: LayerProfile) -> None:
    header = json.dumps({"kind": "ScalePartition", "format": 1})
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": header})


def make_other_format(path: Path, profile: LayerProfile) -> None:
    header = json.dumps({"kind": "LayerProfile", "format": 99})
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": header})


def make_no_json(path: Path, profile: LayerProfile) -> None:
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": "{"})


@pytest.mark.parametrize(
    "make",
    [
        make_garbage,
        make_empty,
        make_truncated,
        make_weights,
        make_other_kind,
        make_other_format,
        make_no_json,
    ],
)
def test_a_file_that_is_no_profile_is_refused(
    make: Callable[[Path, LayerProfile], None], profile: LayerProfile, tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    make(path, profile)
    with pytest.raises(ValueError, match=r"path: .*file\.safetensors"):
        LayerProfile.load(path)


def test_the_table_has_one_row_per_curve_and_point(model: Any) -> None:
    profile = run(model, logit_lens=True)
    table = profile.to_dataframe()
    assert list(table.columns) == [
        "model",
        "quantity",
        "scale",
        "site",
        "value",
        "low",
        "high",
        "unit",
    ]
    counts = table.groupby(["quantity", "scale"]).size().to_dict()
    over_sites = {(q, ""): 3 for q in ("compression", "relevance", "logit_lens")}
    by_scale = {(q, s): 3 for q in ("retained", "predicted") for s in BANDS}
    # What a single token adds is not read.
    by_scale["added", "intermediate"] = 3
    assert counts == over_sites | by_scale | {(q, ""): 2 for q in profile.signals}
    assert set(table["model"]) == {"tiny-llama"}
    mine = table[(table.quantity == "retained") & (table.scale == "local")]
    assert mine.site.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(mine.value, profile.retained["local"].values)
    np.testing.assert_array_equal(mine.low, profile.retained["local"].low)
    np.testing.assert_array_equal(mine.high, profile.retained["local"].high)


def test_the_table_in_bits(profile: LayerProfile) -> None:
    nats, bits = profile.to_dataframe(), profile.to_dataframe("bits")
    information = (nats.unit == "nats").to_numpy()
    assert 0 < information.sum() < len(nats)
    assert set(bits.unit[information]) == {"bits"}
    assert (bits.unit[~information] == nats.unit[~information]).all()
    for column in ("value", "low", "high"):
        ratio = np.where(information, 1 / np.log(2), 1.0)
        np.testing.assert_allclose(bits[column], nats[column] * ratio)


def test_results_cannot_be_changed(profile: LayerProfile) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.n_tokens = 1
    with pytest.raises(ValueError, match="read-only"):
        profile.compression.values[0] = 0.0
    with pytest.raises(TypeError):
        profile.retained["local"] = profile.compression
    assert profile.scales == ("local", "intermediate")


def test_curves_have_one_point_per_site_or_block(profile: LayerProfile) -> None:
    with pytest.raises(ValueError, match="compression needs 4 points for 3 blocks, got 3"):
        dataclasses.replace(profile, n_layers=3)


@pytest.mark.parametrize(
    ("values", "low", "high", "message"),
    [
        ([1.0, np.nan], [0.0, 0.0], [2.0, 2.0], "values must be a finite vector"),
        ([1.0, 1.0], [0.0, -np.inf], [2.0, 2.0], "low must be a finite vector"),
        ([1.0, 1.0], [0.0, 0.0], [2.0, np.inf], "high must be a finite vector"),
        ([[1.0]], [[0.0]], [[2.0]], "values must be a finite vector"),
        ([1.0, 1.0], [0.0], [2.0, 2.0], "same length"),
        ([1.0, 1.0], [0.0, 1.5], [2.0, 2.0], "the interval must hold the value"),
        ([1.0, 1.0], [0.0, 0.0], [2.0, 0.5], "the interval must hold the value"),
    ],
)
def test_a_curve_must_make_sense(values: Any, low: Any, high: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(np.array(values), np.array(low), np.array(high), "nats", "")


def test_a_curve_is_a_copy_and_converts_between_units() -> None:
    values = np.array([1.0, 2.0])
    curve = Curve(values, values - 1, values + 1, "nats", "what it is")
    values[0] = 9.0
    assert curve.values.tolist() == [1.0, 2.0]
    bits = curve.to("bits")
    assert (bits.unit, bits.guarantee, len(bits)) == ("bits", "what it is", 2)
    np.testing.assert_allclose(bits.high, curve.high / np.log(2))
    np.testing.assert_allclose(bits.to("nats").low, curve.low, atol=1e-15)
    assert curve.to("nats") is curve
    with pytest.raises(ValueError, match="'nats' or 'bits', got 'hartleys'"):
        curve.to("hartleys")
    with pytest.raises(ValueError, match="in 'tokens'"):
        dataclasses.replace(curve, unit="tokens").to("bits")


def made_curve(values: Any, folds: Any = None) -> Curve:
    values = np.array(values, dtype=float)
    folds = np.tile(values, (5, 1)) if folds is None else folds
    return Curve(values, values - 0.01, values + 0.01, "nats", "Made up.", folds)


def test_half_depth_of_simple_curves() -> None:
    assert made_curve([0, 0, 1, 2, 4]).half_depth().value == pytest.approx(0.75)
    assert made_curve([0, 0, 0, 4, 4]).half_depth().value == pytest.approx(2.5 / 4)
    assert made_curve([3, 3, 4, 4, 4]).half_depth().value == 0.0
    # The first time that it reaches half, whatever it does later.
    assert made_curve([0, 4, 0, 0, 2]).half_depth().value == pytest.approx(0.5 / 4)


def test_half_depth_has_an_interval_from_folds() -> None:
    rng = np.random.default_rng(0)
    sites = np.linspace(0, 1, 25)
    risen = 1 / (1 + np.exp(-12 * (sites - 0.5)))
    folds = np.array(
        [1 / (1 + np.exp(-12 * (sites - 0.5 + d))) for d in 0.05 * rng.standard_normal(5)]
    )
    mean = folds.mean(axis=0)
    estimate = made_curve(mean, folds).half_depth()
    assert estimate.low < 0.5 < estimate.high
    assert 0.01 < estimate.high - estimate.low < 0.3
    same = made_curve(risen).half_depth()
    assert same.low == pytest.approx(same.high)


def test_half_depth_of_nothing_is_not_defined() -> None:
    assert made_curve([0.0, 0.005, 0.005]).half_depth() is None
    flat = Curve(np.ones(3), np.ones(3), np.ones(3), "nats", "Made up.")
    assert flat.half_depth() is None
