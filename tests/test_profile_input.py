"""Profiles of bad input and in bad circumstances: what is named, and what is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from profiles import (
    QUICK,
    SMALL,
    TOKENS,
    assert_same,
    broken_late,
    cache_of,
    hooks_on,
    prompts_of,
    run,
)
from tiny import random_tokens, tiny_model
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens import moments as moments_module
from mspgt_lens.profile.results import LayerProfile


@pytest.mark.parametrize(
    "empty",
    [[], iter(()), ml.PromptDataset.from_tokens([])],
    ids=["list", "iterator", "tokens"],
)
def test_no_prompts(model: Any, empty: Any) -> None:
    with pytest.raises(ValueError, match="prompts holds no prompt"):
        run(model, empty)


def test_blank_texts_only(told: dict[str, Any]) -> None:
    with (
        pytest.warns(UserWarning, match="3 blank texts"),
        pytest.raises(ValueError, match="prompts holds no prompt"),
    ):
        run(told["llama"], ["", " ", "\n"])


def test_fewer_groups_than_folds(model: Any) -> None:
    groups = [i % 4 for i in range(24)]
    with pytest.raises(ValueError, match=r"groups as folds \(5\), got 4: .*groups=.*n_folds=4"):
        run(model, prompts_of(groups=groups), n_folds=5)
    run(model, prompts_of(groups=groups), n_folds=4)
    with pytest.raises(ValueError, match=r"groups as folds \(3\), got 2: .*groups= that tell"):
        run(model, prompts_of(groups=[i % 2 for i in range(24)]))


def test_prompts_too_short_for_the_bands(model: Any) -> None:
    with pytest.raises(ValueError, match="more than 40 tokens, or bands= with smaller offsets"):
        run(model, bands={"far": (20, 20)})
    run(model, prompts_of(random_tokens(24, 60)), bands={"far": (20, 20)})


def test_too_few_positions_in_a_fold_says_how_many_are_needed(model: Any) -> None:
    with pytest.raises(ValueError, match=r"give \d+ positions .* at least 32 are needed") as error:
        run(model, prompts_of(TOKENS[:12, :12]))
    assert int(str(error.value).split()[2]) < 32


def test_too_few_positions_for_the_width_says_how_many_are_needed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "N_FEATURES", 2)
    with pytest.raises(ValueError, match=r"give 24 valid positions.* width 16 need at least 32"):
        run(model, prompts_of(TOKENS[:12, :12]), bands={"local": (1, 1)}, skip_first=10)


@pytest.mark.parametrize("index", [0, 7])
def test_a_prompt_longer_than_the_context(model: Any, index: int) -> None:
    prompts = TOKENS.tolist()
    prompts[index] = random_tokens(1, 129)[0].tolist()
    with pytest.raises(ValueError, match=rf"prompt {index} has 129 tokens.*\(128\).*windows"):
        run(model, prompts_of(prompts))
    prompts[index] = prompts[index][:128]
    run(model, prompts_of(prompts))


@pytest.mark.parametrize("token", [-1, 101, 10**12])
@pytest.mark.parametrize("index", [0, 7])
def test_a_token_outside_the_vocabulary(model: Any, token: int, index: int) -> None:
    tokens = TOKENS.clone()
    tokens[index, 20] = token
    with pytest.raises(ValueError, match=rf"prompt {index} has a token outside .*\(0 to 100\)"):
        run(model, prompts_of(tokens))


def test_nan_weights_name_site_and_prompt() -> None:
    model = tiny_model("llama", **SMALL)
    with torch.no_grad():
        next(model.blocks[0].mlp.parameters())[0] = torch.nan
    before = hooks_on(model)
    with pytest.raises(FloatingPointError, match=r"site 1 .* prompt \d+"):
        run(model)
    assert hooks_on(model) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", [0, 7, 16])
def test_the_prompt_with_a_nan_is_named(value: float, index: int) -> None:
    model, prompts = broken_late(value, index)
    with pytest.raises(FloatingPointError, match=rf"site 0 .* prompt {index}\b"):
        run(model, prompts_of(prompts))


def test_a_nan_in_the_embedding_is_named() -> None:
    model = tiny_model("llama", **SMALL)
    with torch.no_grad():
        model.W_E[int(TOKENS[7, 8])] = torch.nan
    with pytest.raises(FloatingPointError, match=r"embedding|site 0"):
        run(model)


@pytest.mark.parametrize("index", [1, 7])
def test_the_prompt_with_a_nan_is_named_in_a_cache_too(model: Any, index: int) -> None:
    cache = dict(cache_of(model, TOKENS).items())
    name = ml.needed_hooks(model)[1]
    cache[name] = cache[name].clone()
    cache[name][index, 9, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=rf"site 1 .* prompt {index}\b"):
        ml.profile_cache(model, cache, TOKENS, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bands": {}}, "bands must name at least one"),
        ({"bands": {"odd": (3, 2)}}, r"bands\['odd'\] must be two offsets .* got \(3, 2\)"),
        ({"bands": {"odd": (0, 2)}}, r"bands\['odd'\]"),
        ({"bands": {"odd": (1.5, 2)}}, r"bands\['odd'\]"),
        ({"bands": {"odd": (1, 2, 3)}}, r"bands\['odd'\]"),
        ({"noise": 0.0}, "noise must be a positive variance, got 0.0"),
        ({"noise": float("nan")}, "noise must be a positive variance"),
        ({"coordinates": "whitened"}, "'standardized' or 'raw', got 'whitened'"),
        ({"n_folds": 2}, "n_folds must be at least 3 .* got 2"),
        ({"skip_first": -1}, "skip_first must be 0 or more tokens, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1 or None, got 0"),
    ],
)
def test_a_wrong_setting_is_named_before_the_model_runs(
    model: Any, wrong: dict[str, Any], message: str
) -> None:
    calls: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            run(model, **wrong)
    finally:
        handle.remove()
    assert not calls


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        ml.profile_layers(object(), prompts_of())
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        ml.profile_cache(object(), {}, TOKENS)


def test_attention_to_nothing_but_the_first_token() -> None:
    model = tiny_model("llama", **SMALL)

    def sink(pattern: Tensor, hook: Any) -> Tensor:
        first = torch.zeros_like(pattern)
        first[..., 0] = 1.0
        return first

    model.hook_dict["blocks.1.attn.hook_pattern"].add_hook(sink)
    with pytest.raises(ValueError, match="block 1 attends to nothing but the first token"):
        run(model)


def test_a_model_in_training_mode_is_evaluated_and_put_back() -> None:
    model = tiny_model("gpt2", **SMALL)
    expected = run(model)
    model.train()
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert_same(run(model), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(
    error: type[BaseException], profile: LayerProfile
) -> None:
    model = tiny_model("llama", **SMALL)
    model.blocks[0].train()
    modes = [module.training for module in model.modules()]
    calls: list[int] = []

    def fail(activation: Tensor, hook: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error

    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(fail, is_permanent=True)
    before = hooks_on(model)
    with pytest.raises(error):
        run(model, batch_size=2)
    assert len(calls) == 4
    assert hooks_on(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert_same(run(model), profile)
