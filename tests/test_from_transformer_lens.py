"""Sweeps that TransformerLens ran: the same numbers as its own here, and back again exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_patching import N_LAYERS, N_POS, logit_difference, made_pairs
from tiny import random_tokens
from torch import Tensor
from transformer_lens import patching

import mspgt_lens as ml
from mspgt_lens.results import PatchSweep
from mspgt_lens.statistics import holm

SWEEPS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_by_pos,
}
N_PAIRS = 6
GROUPS = ("a", "b", "b", "c", "d", "d")


def grouped_pairs(padding: str = "none") -> ml.PromptPairs:
    return replace(made_pairs(padding, n_pairs=N_PAIRS), groups=GROUPS)


def ends_differ(model: Any) -> ml.PromptPairs:
    """Ten pairs that differ in the last two tokens, with what the model says after each."""
    clean, corrupted = random_tokens(10, N_POS), random_tokens(10, N_POS)
    corrupted[:, -2:] = random_tokens(10, N_POS, seed=1)[:, -2:]
    answer, foil = (model(tokens)[:, -1].argmax(-1) for tokens in (clean, corrupted))
    return ml.PromptPairs.from_tokens(clean, corrupted, answer, foil)


def swept(
    model: Any,
    pairs: ml.PromptPairs,
    sweep: Callable[..., Any],
    *,
    noise: bool = False,
    metric: Any = None,
    **options: Any,
) -> tuple[Any, Tensor]:
    """TransformerLens's result, and the metric on the unpatched runs that activations are from."""
    source, into = (pairs.clean, pairs.corrupted)[:: -1 if noise else 1]

    def read(logits: Tensor) -> Tensor:
        return logit_difference(logits, pairs)

    options = {"reduce": "none", "baseline": True} | options
    with torch.no_grad():
        logits, cache = model.run_with_cache(source)
        result = sweep(model, into, cache, read if metric is None else metric, **options)
    return result, read(logits)


def assert_same_numbers(found: PatchSweep, expected: PatchSweep) -> None:
    for name in ("by_pair", "metric", "effect", "low", "high", "p_values", "positions"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )
    for name in ("clean", "corrupted", "clean_by_pair", "corrupted_by_pair"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5)
    assert (found.groups, found.warnings) == (expected.groups, expected.warnings)


@pytest.mark.parametrize(
    ("architecture", "place", "padding"),
    [
        *(("llama", place, "none") for place in SWEEPS),
        ("gpt2", "resid_pre", "right"),
        ("neox", "mlp_out", "right"),
    ],
)
def test_a_sweep_of_transformer_lens_equals_the_one_here(
    tiny: Callable[..., Any], architecture: str, place: Any, padding: str
) -> None:
    model, pairs = tiny(architecture), grouped_pairs(padding)
    result, clean = swept(model, pairs, SWEEPS[place])
    found = PatchSweep.from_transformer_lens(result, place=place, clean=clean, groups=GROUPS)
    expected = ml.patch_layers(model, pairs, place=place, progress=False)
    assert np.ptp(expected.effect) > 1e-3
    assert (expected.low < expected.high).any()
    assert_same_numbers(found, expected)
    assert "4 groups" in " ".join(found.warnings)


def test_the_other_direction_takes_the_corrupted_metric(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("llama"), grouped_pairs()
    result, corrupted = swept(model, pairs, SWEEPS["resid_pre"], noise=True)
    found = PatchSweep.from_transformer_lens(
        result, place="resid_pre", corrupted=corrupted, direction="noise", groups=GROUPS
    )
    expected = ml.patch_layers(model, pairs, direction="noise", progress=False)
    assert_same_numbers(found, expected)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_p_values_are_those_of_transformer_lens_corrected(
    tiny: Callable[..., Any], direction: str
) -> None:
    """Where every pair is a group of its own; cells that no patch moves are no tests."""
    model, pairs = tiny("llama"), ends_differ(tiny("llama"))
    result, source = swept(model, pairs, SWEEPS["resid_pre"], noise=direction == "noise")
    given = {"clean" if direction == "denoise" else "corrupted": source}
    found = PatchSweep.from_transformer_lens(
        result, place="resid_pre", direction=direction, **given
    )
    moved = (result.effect() != 0).any(dim=-1).numpy()
    expected = np.ones(moved.shape)
    expected[moved] = holm(result.permutation_pvalue().double().numpy()[moved])
    np.testing.assert_allclose(found.p_values, expected, atol=1e-6)
    assert expected.min() < 0.5
    assert 0 < moved.sum() < moved.size


def test_one_of_several_metrics_and_places(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("llama"), grouped_pairs()
    metrics = {
        "twice": lambda logits: 2 * logit_difference(logits, pairs),
        "once": lambda logits: logit_difference(logits, pairs),
    }
    blocks, clean = swept(model, pairs, patching.get_act_patch_block_every, metric=metrics)
    heads, _ = swept(model, pairs, patching.get_act_patch_attn_head_by_pos_every)
    for result, place, metric in ((blocks, "attn_out", "once"), (heads, "z", None)):
        found = PatchSweep.from_transformer_lens(
            result, place=place, clean=clean, metric=metric, groups=GROUPS
        )
        expected = ml.patch_layers(model, pairs, place=place, progress=False)
        assert_same_numbers(found, expected)
        assert found.metric_name == (metric or "metric")
    with pytest.raises(ValueError, match="metric must be one of the result's, twice, once, got N"):
        PatchSweep.from_transformer_lens(blocks, place="attn_out", clean=clean)
    # Keys are of fewer heads here, and filled up with zeros.
    with pytest.raises(ValueError, match="place must be one of z, q in a result that holds sev"):
        PatchSweep.from_transformer_lens(heads, place="k", clean=clean)


@pytest.mark.parametrize(
    ("place", "n_heads"),
    [("resid_mid", None), ("q", 4), ("k", 2), ("v", 2)],
)
def test_places_that_are_not_patched_here_are_taken_as_they_are(
    tiny: Callable[..., Any], place: str, n_heads: int | None
) -> None:
    name = "resid_mid" if n_heads is None else f"attn_head_{place}_by_pos"
    sweep = getattr(patching, f"get_act_patch_{name}")
    result, clean = swept(tiny("llama"), made_pairs(), sweep)
    found = PatchSweep.from_transformer_lens(
        result, place=place, clean=clean, tokens=list("abcdefg"), model_name="mine"
    )
    np.testing.assert_allclose(found.metric, result.mean(), atol=1e-6)
    assert found.metric.shape == (N_LAYERS, N_POS, n_heads)[: 2 if n_heads is None else 3]
    title = ml.plots.plot_patching(found).layout.title.text
    assert "mine" in title
    assert place in found.summary()
    assert found.to_dataframe().token.tolist()[:2] == (["a", "b"] if n_heads is None else ["a"] * 2)


def test_chosen_cells_are_put_where_they_belong(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("gpt2"), grouped_pairs()
    cells = [(layer, pos) for pos in (4, 2) for layer in range(N_LAYERS)]
    table = pd.DataFrame(cells, columns=["layer", "pos"], index=range(8, 0, -1))
    only = {"index_axis_names": None, "index_df": table}
    result, clean = swept(model, pairs, SWEEPS["resid_pre"], **only)
    found = PatchSweep.from_transformer_lens(result, place="resid_pre", clean=clean, groups=GROUPS)
    expected = ml.patch_layers(model, pairs, positions=[4, 2], progress=False)
    assert_same_numbers(found, expected)
    gap = replace(result, index_df=table.iloc[1:], values=result.values[1:])
    with pytest.raises(ValueError, match="every combination of layer, pos once"):
        PatchSweep.from_transformer_lens(gap, place="resid_pre", clean=clean)


@pytest.mark.parametrize(
    "options",
    [{}, {"place": "z"}, {"direction": "noise"}, {"positions": [4, 2]}, {"positions": "last"}],
)
def test_there_and_back_is_exact(
    tiny: Callable[..., Any], options: dict[str, Any], tmp_path: Any
) -> None:
    sweep = ml.patch_layers(tiny("llama"), grouped_pairs("right"), progress=False, **options)
    sweep = PatchSweep.load(sweep.save(tmp_path / "sweep"))
    result = sweep.to_transformer_lens()
    assert torch.equal(result.mean().flatten(), torch.from_numpy(sweep.metric.copy()).flatten())
    assert len(result.to_dataframe()) == sweep.by_pair.size
    other = "corrupted" if options.get("direction") == "noise" else "clean"
    back = PatchSweep.from_transformer_lens(
        result,
        place=sweep.place,
        **{other: getattr(sweep, f"{other}_by_pair")},
        direction=sweep.direction,
        groups=sweep.groups,
        tokens=sweep.tokens,
        model_name=sweep.model_name,
    )
    assert replace(back, settings=sweep.settings) == sweep


def test_back_and_there_is_exact(tiny: Callable[..., Any]) -> None:
    result, clean = swept(tiny("llama"), made_pairs(), SWEEPS["z"])
    back = PatchSweep.from_transformer_lens(result, place="z", clean=clean).to_transformer_lens()
    assert torch.equal(back.values, result.values.double())
    assert torch.equal(back.baseline, result.baseline.double())
    pd.testing.assert_frame_equal(back.index_df, result.index_df)
    for name in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(back, name) == getattr(result, name)


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., Any]) -> tuple[Any, Tensor]:
    return swept(tiny("llama"), made_pairs(), SWEEPS["resid_pre"])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"result": torch.zeros(4, 7)}, TypeError, "PatchingResult .* got Tensor; run .*reduce"),
        ({"reduced": True}, ValueError, "one value per prompt, got means, .*reduce='none'"),
        ({"axis_names": ["layer", "head"]}, ValueError, "axes layer, pos .* got layer, head"),
        ({"axis_names": ["layer", "dest_pos"]}, ValueError, "got layer, dest_pos; sweep by pos"),
        ({"place": "z"}, ValueError, "axes layer, pos, head where z was patched, got layer, pos"),
        ({"place": "pattern"}, ValueError, "place must be one of resid_pre, .*, v, got 'pattern'"),
        ({"metric": "other"}, ValueError, "metric must be one of the result's, metric, got 'oth"),
        ({"clean": None}, ValueError, "clean must hold .* metric\\(model\\(clean_tokens\\)\\)"),
        ({"clean": [1.0, 2.0]}, ValueError, "clean must hold one finite value per pair \\(3\\)"),
        ({"clean": [1.0, 2.0, np.nan]}, ValueError, "clean must hold one finite value per pair"),
        ({"corrupted": [0.0] * 3}, ValueError, "corrupted must be left out: result holds it"),
        ({"baseline": None}, ValueError, "corrupted must hold the metric of every pair's"),
        ({"direction": "both"}, ValueError, "direction must be denoise or noise, got 'both'"),
        ({"groups": ["a"]}, ValueError, "groups must have one label per pair \\(3\\), got 1"),
        ({"groups": ["a", None, "b"]}, ValueError, "groups must label every prompt"),
        ({"tokens": ["a"]}, ValueError, "tokens must have one token per position .* \\(7\\)"),
        ({"values": torch.full((4, 7, 3), torch.inf)}, ValueError, "result must hold finite"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(
    plain: tuple[Any, Tensor], given: dict[str, Any], error: type[Exception], words: str
) -> None:
    result, clean = plain
    changes = {n: given[n] for n in given if hasattr(result, n) and n != "result"}
    if "axis_names" in changes:
        changes["index_df"] = result.index_df.set_axis(changes["axis_names"], axis=1)
    arguments = {"place": "resid_pre", "clean": clean, "result": replace(result, **changes)}
    arguments |= {name: value for name, value in given.items() if name not in changes}
    with pytest.raises(error, match=words):
        PatchSweep.from_transformer_lens(**arguments)


def test_runs_that_are_alike_give_effects_no_scale(plain: tuple[Any, Tensor]) -> None:
    result, _ = plain
    with pytest.raises(ValueError, match="clean and corrupted must differ in their means"):
        PatchSweep.from_transformer_lens(result, place="resid_pre", clean=result.baseline)


def test_without_a_baseline_both_runs_are_given(plain: tuple[Any, Tensor]) -> None:
    result, clean = plain
    given = {"place": "resid_pre", "clean": clean}
    bare = PatchSweep.from_transformer_lens(
        replace(result, baseline=None), corrupted=result.baseline, **given
    )
    assert bare == PatchSweep.from_transformer_lens(result, **given)


@pytest.mark.parametrize("options", [{"method": "attribution"}, {"window": 2}, {"metric": "one"}])
def test_what_a_result_cannot_say_is_not_put_into_one(
    tiny: Callable[..., Any], options: dict[str, Any]
) -> None:
    pairs = made_pairs()
    if "metric" in options:
        options = {"metric": lambda logits: logit_difference(logits, pairs).mean()}
    sweep = ml.patch_layers(tiny("llama"), pairs, positions=[4], progress=False, **options)
    with pytest.raises(ValueError, match="exact patches of one block with a value per pair, got"):
        sweep.to_transformer_lens()


def test_versions_without_such_results_say_so(
    plain: tuple[Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, clean = plain
    sweep = PatchSweep.from_transformer_lens(result, place="resid_pre", clean=clean)
    monkeypatch.delattr(patching, "PatchingResult")
    with pytest.raises(ImportError, match=r"version 4\.2 or later, .* this is \d"):
        PatchSweep.from_transformer_lens(result, place="resid_pre", clean=clean)
    with pytest.raises(ImportError, match=r"version 4\.2 or later, .* this is \d"):
        sweep.to_transformer_lens()
