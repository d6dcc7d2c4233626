"""What a model does not admit is said by every public function, and never a number or a crash."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.models import Edit, as_adapter, bridge_class, generate

TOKENS = random_tokens(6, 24)
QUIET = {"progress": False}
BANDS = {"local": (1, 1), "intermediate": (2, 4)}
NATIVE = {
    "n_layers": 4,
    "d_model": 32,
    "n_ctx": 64,
    "d_head": 8,
    "n_heads": 4,
    "d_vocab": 101,
    "d_mlp": 64,
    "act_fn": "gelu",
    "normalization_type": "LN",
}


def prompts():
    return ml.PromptDataset.from_tokens(TOKENS)


def pairs(answer=7, foil=9):
    corrupted = TOKENS.clone()
    corrupted[:, 8] = TOKENS.flip(0)[:, 8] + 1
    corrupted[:, 8].clamp_(max=100)
    n = len(TOKENS)
    return ml.PromptPairs.from_tokens(
        TOKENS, corrupted, torch.full((n,), answer), torch.full((n,), foil)
    )


def native(**changed):
    model = bridge_class().boot_native(NATIVE | changed)
    model.tokenizer = tiny_tokenizer()
    return model


CALLS = {
    "profile": lambda m: ml.profile_layers(m, prompts(), bands=BANDS, n_folds=3, **QUIET),
    "random weights": lambda m: ml.profile_layers(
        m, prompts(), bands=BANDS, n_folds=3, control="random_weights", **QUIET
    ),
    "cache": lambda m: ml.profile_cache(m, m.run_with_cache(TOKENS)[1], TOKENS, bands=BANDS),
    "stability": lambda m: ml.studies.stability(m, [prompts()], **QUIET),
    "hvib": lambda m: ml.fit_hvib(m, prompts(), bands=BANDS, n_steps=2, **QUIET),
    "perturb": lambda m: ml.perturb_scales(m, prompts(), [1, 2], **QUIET),
    "brittleness": lambda m: ml.measure_brittleness(m, prompts(), [1, 2], **QUIET),
    "statistics": lambda m: ml.residual_statistics(m, prompts()),
    "classes": lambda m: ml.classify_tokens(m, prompts(), **QUIET),
    "generation": lambda m: ml.generation_effects(m, prompts(), [1, 2], n_new=4, **QUIET),
    "patching": lambda m: ml.patch_layers(m, pairs(), **QUIET),
    "segments": lambda m: ml.patch_scales(m, pairs(), [1, 2], **QUIET),
}


@pytest.mark.parametrize("call", CALLS)
def test_models_that_read_both_ways_are_refused(call):
    flagged = tiny_model("llama", n_layers=6)
    flagged.tokenizer = tiny_tokenizer()
    flagged.cfg.attention_dir = "bidirectional"
    unflagged = native(attention_dir="bidirectional", n_layers=6)
    unflagged.cfg.attention_dir = "causal"
    for model in (flagged, unflagged):
        with pytest.raises(ml.CannotMeasure, match="attends in both directions"):
            CALLS[call](model)


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"patching", "segments"}))
def test_models_with_fewer_logits_than_tokens_are_refused(call):
    with pytest.raises(ml.CannotMeasure, match=r"101 tokens and has logits of 50"):
        CALLS[call](native(d_vocab_out=50, n_layers=6))


def test_patching_asks_only_for_logits_that_there_are():
    model = native(d_vocab_out=50)
    assert np.isfinite(ml.patch_layers(model, pairs(), **QUIET).metric).all()
    with pytest.raises(ValueError, match=r"0 to 49 \(d_vocab_out\), got 60"):
        ml.patch_layers(model, pairs(answer=60), **QUIET)


def test_models_without_a_cache_generate_nothing():
    with pytest.raises(ml.CannotMeasure, match="keeps no keys and values of earlier tokens"):
        CALLS["generation"](native())


HEAT = [ml.Perturbation("temperature")]
HEATED = (
    lambda m: ml.perturb_scales(m, prompts(), [1, 2], perturbations=HEAT, **QUIET),
    lambda m: ml.generation_effects(m, prompts(), [1, 2], perturbations=HEAT, n_new=4, **QUIET),
)


@pytest.mark.parametrize("architecture", ["opt", "gptj", "gptneo", "xglm"])
@pytest.mark.parametrize("call", HEATED, ids=["perturb", "generation"])
def test_a_temperature_that_is_thrown_away_is_refused(architecture, call):
    model = tiny_model(architecture)
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(RuntimeError, match=r"'attn_scores' of block \d for its hook only"):
        call(model)
    kinds = [ml.Perturbation("noise"), ml.Perturbation("skip")]
    found = ml.perturb_scales(model, prompts(), [1, 2], perturbations=kinds, n_controls=1, **QUIET)
    assert (found.values[..., 0] > 0).all()


@pytest.mark.parametrize("architecture", ["opt", "gptj", "llama", "gpt2", "bloom"])
def test_generation_proves_its_own_way_of_running(architecture):
    adapter = as_adapter(tiny_model(architecture))
    edits = [Edit(1, "attn_scores", lambda scores: scores / 2), Edit(2, "skip")]
    words = [row[:9].numpy() for row in TOKENS]
    if architecture in ("opt", "gptj"):
        with pytest.raises(RuntimeError, match="'attn_scores' of block 1 for its hook only"):
            generate(adapter, words, n_new=2, edits=lambda rows: edits)
        generate(adapter, words, n_new=2, edits=lambda rows: edits[1:])
    else:
        generate(adapter, words, n_new=2, edits=lambda rows: edits)


def test_an_edit_that_acts_on_the_prompt_only_is_refused_in_generation():
    model = tiny_model("llama")
    point = model.hook_dict["blocks.1.hook_attn_out"]

    def discard(module, inputs, out):
        return inputs[0] if out.shape[1] == 1 else None

    point.register_forward_hook(discard)
    point.add_hook = lambda hook: type(point).add_hook(point, hook, prepend=True)
    adapter = as_adapter(model)
    words = [row[:9].numpy() for row in TOKENS]
    with pytest.raises(RuntimeError, match="'attn_out' of block 1 for its hook only"):
        generate(adapter, words, n_new=2, edits=lambda rows: [Edit(1, "attn_out", lambda x: 2 * x)])


def test_models_of_attention_only_have_no_mlp_to_patch():
    config = {name: NATIVE[name] for name in NATIVE if name not in ("d_mlp", "act_fn")}
    model = bridge_class().boot_native(config | {"attn_only": True})
    with pytest.raises(ml.CannotMeasure, match=r"attention only have no MLP.*another place"):
        ml.patch_layers(model, pairs(), place="mlp_out", **QUIET)
    silent = tiny_model("llama")
    for block in silent.blocks[1:]:
        block.mlp.hook_out = torch.nn.Identity()
    with pytest.raises(ml.CannotMeasure, match=r"computes it in 1 of its 4 blocks"):
        ml.patch_layers(silent, pairs(), place="mlp_out", **QUIET)


def test_every_form_of_a_partition_patches_the_same_segments():
    model = tiny_model("llama")
    common = {"n_controls": 20, **QUIET}
    named = {"local": [0], "intermediate": range(1, 3), "global": (3,)}
    by_boundaries = ml.patch_scales(model, pairs(), [1, 3], **common)
    by_name = ml.patch_scales(model, pairs(), named, **common)
    assert by_boundaries.segments == by_name.segments == ("local", "intermediate", "global")
    assert by_boundaries.blocks.tolist() == by_name.blocks.tolist() == [[0, 0], [1, 2], [3, 3]]
    np.testing.assert_array_equal(by_boundaries.effect, by_name.effect)
    assert by_boundaries.settings["boundaries"] == [1, 3]
    assert by_boundaries.settings["supported"] is None
    with pytest.raises(ValueError, match="must hold blocks that follow one another"):
        ml.patch_scales(model, pairs(), {"ends": [0, 3], "middle": [1, 2]}, **common)


@pytest.mark.parametrize("wrong", [2, None, "2, 4", [1.5, 3], {"a": 1}, [[1], [3]]])
def test_what_is_no_partition_is_named_by_every_function(wrong):
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    for call in (
        lambda: ml.patch_scales(model, pairs(), wrong, **QUIET),
        lambda: ml.perturb_scales(model, prompts(), wrong, **QUIET),
        lambda: ml.measure_brittleness(model, prompts(), wrong, **QUIET),
        lambda: ml.generation_effects(model, prompts(), wrong, **QUIET),
    ):
        with pytest.raises(TypeError, match=r"partition must be a ScalePartition, a mapping .* or"):
            call()
