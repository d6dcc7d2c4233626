"""Edits change exactly what they name, on every architecture, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, random_tokens, tiny_model

from mspgt_lens.models import Edit, as_adapter, edited, edited_logits

TOKENS = random_tokens(3, 11)
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
N_LAYERS = 4


def hooks_on(model):
    """How many hooks sit on every hook point and on every torch module."""
    points = {f"point {name}": len(hook.fwd_hooks) for name, hook in model.hook_dict.items()}
    modules = {
        f"module {name}": len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
    }
    return points | modules


def logits(model, *edits):
    adapter = as_adapter(model)
    with adapter.inference():
        return edited_logits(adapter, TOKENS, MASK, edits)


def cached(model, name):
    with torch.no_grad():
        return model.run_with_cache(TOKENS)[1][name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edits_that_change_nothing_change_nothing(tiny, architecture):
    model = tiny(architecture)
    places = ("resid_pre", "resid_post", "attn_out", "mlp_out", "attn_scores")
    edits = [Edit(block, place, lambda x: x) for block in range(N_LAYERS) for place in places]
    assert torch.equal(logits(model, *edits), logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("place", ["resid_pre", "resid_post"])
def test_a_replaced_residual_decides_everything_after_it(tiny, architecture, place):
    model = tiny(architecture)
    other = random_tokens(3, 11, seed=5)
    with torch.no_grad():
        expected, cache = model.run_with_cache(other)
    patched = logits(model, Edit(2, place, lambda _: cache[f"blocks.2.hook_{place}"]))
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_skipped_block_is_the_same_as_one_that_adds_nothing(tiny, architecture):
    model = tiny(architecture)
    skipped = logits(model, Edit(1, "skip"))
    silent = logits(
        model, Edit(1, "attn_out", torch.zeros_like), Edit(1, "mlp_out", torch.zeros_like)
    )
    torch.testing.assert_close(skipped, silent, atol=1e-5, rtol=0)
    assert (skipped - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_scores_decide_the_pattern(tiny, architecture):
    model = tiny(architecture)
    # All keys alike: every query spreads its attention evenly over what it may see.
    patterns = []
    edits = [Edit(1, "attn_scores", lambda s: torch.where(s > -1e30, 0.0, s))]
    point = model.hook_dict["blocks.1.attn.hook_pattern"]
    adapter = as_adapter(model)
    with adapter.inference(), edited(adapter, edits):
        model.run_with_hooks(TOKENS, fwd_hooks=[(point.name, lambda x, hook: patterns.append(x))])
    even = torch.tril(torch.ones(11, 11))
    even = even / even.sum(dim=1, keepdim=True)
    torch.testing.assert_close(patterns[0], even.expand_as(patterns[0]))


def test_edits_of_one_activation_act_in_order(tiny):
    model = tiny("llama")
    double = Edit(1, "resid_pre", lambda x: 2 * x)
    shift = Edit(1, "resid_pre", lambda x: x + 1)
    both = Edit(1, "resid_pre", lambda x: 2 * x + 1)
    assert torch.equal(logits(model, double, shift), logits(model, both))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_an_edit_acts_once_in_compatibility_mode_too(architecture):
    model = tiny_model(architecture)
    model.enable_compatibility_mode()
    seen = []
    adapter = as_adapter(model)
    edits = [Edit(1, "resid_pre", lambda x: seen.append(x) or x)]
    with adapter.inference(), edited(adapter, edits) as counts:
        model(TOKENS)
    assert len(seen) == 1
    assert counts == [1]


def test_other_hooks_stay_and_act_before():
    model = tiny_model("llama")
    model.hook_dict["blocks.1.hook_in"].add_hook(lambda x, hook: x * 0 + 7)
    logits(model)  # The bridge puts hooks of its own on the norms in its first run.
    before, seen = hooks_on(model), []
    logits(model, Edit(1, "resid_pre", lambda x: seen.append(x) or x))
    assert hooks_on(model) == before
    assert (seen[0] == 7).all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inside", [True, False])
def test_no_hook_stays_whatever_happens(tiny, error, inside):
    model = tiny("gpt2")
    clean = logits(model)
    before = hooks_on(model)

    def stop(activation):
        raise error

    adapter = as_adapter(model)
    edits = [Edit(0, "skip"), Edit(2, "resid_pre", stop if inside else torch.zeros_like)]

    def run():
        with adapter.inference(), edited(adapter, edits):
            model(TOKENS)
            raise error

    with pytest.raises(error):
        run()
    assert hooks_on(model) == before
    assert torch.equal(logits(model), clean)


def test_wrong_edits_are_named(tiny):
    model = tiny("llama")
    logits(model)
    before = hooks_on(model)
    with pytest.raises(ValueError, match="place must be one of"):
        Edit(0, "resid", torch.zeros_like)
    with pytest.raises(ValueError, match="needs a change"):
        Edit(0, "resid_pre")
    with pytest.raises(ValueError, match="takes no change"):
        Edit(0, "skip", torch.zeros_like)
    with pytest.raises(ValueError, match=r"edits\[1\]: block must be 0 to 3"):
        logits(model, Edit(0, "skip"), Edit(4, "skip"))
    with pytest.raises(ValueError, match="must keep the shape"):
        logits(model, Edit(0, "resid_pre", lambda x: x[:1]))
    assert hooks_on(model) == before


def test_an_edit_that_never_acts_is_no_effect_of_zero():
    model = tiny_model("llama")
    adapter = as_adapter(model)
    model.blocks[1].attn.hook_attn_scores = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="never computes 'attn_scores' of block 1"):
        logits(adapter, Edit(1, "attn_scores", lambda x: x / 2))
