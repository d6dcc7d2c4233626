"""Edits change exactly what they name, on every architecture, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, MORE, random_tokens, tiny_model

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models import CannotEdit, Edit, as_adapter, edited, edited_logits

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


PLACES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "attn_scores", "skip")
# TransformerLens forms attention for its hooks a second time, and throws away what is put there.
DISCARDED = {(name, "attn_scores") for name in ("gptj", "gptneo", "opt", "xglm")}


def plainly_moves(model, place, block):
    """Whether a strong change of one block by a plain hook reaches the logits."""
    ends = [f"blocks.{block}.{end}" for end in ("hook_resid_pre", "hook_resid_post")]
    kept = []

    def disturb(x, hook):
        if place == "attn_scores":
            return torch.where(x > -1e30, torch.arange(x.shape[-1]) % 3 - 2 * x, x)
        return 2 * x.flip(-1) + 1

    hooks = {
        "skip": [(ends[0], lambda x, hook: kept.append(x)), (ends[1], lambda x, hook: kept[0])],
        "attn_scores": [(f"blocks.{block}.attn.hook_attn_scores", disturb)],
    }.get(place, [(f"blocks.{block}.hook_{place}", disturb)])
    with torch.no_grad():
        changed = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        return bool((changed - model(TOKENS)).abs().max() > 1e-3)


def edit_of(block, place):
    return Edit(block, place, None if place == "skip" else lambda x: x)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE)
def test_a_place_is_edited_only_if_that_moves_the_logits(tiny, architecture, place):
    model = tiny(architecture, n_layers=2)
    moves = {plainly_moves(model, place, block) for block in range(2)}
    assert moves == {(architecture, place) not in DISCARDED}
    edits = [edit_of(block, place) for block in range(2)]
    if moves == {True}:
        assert torch.equal(logits(model, *edits), logits(model)) == (place != "skip")
    else:
        for error in (CannotEdit, CannotMeasure, RuntimeError):
            with pytest.raises(error, match=rf"computes '{place}' of block 0 for its hook only"):
                logits(model, *edits)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_block_that_discards_is_found_among_others(place, dtype):
    model = tiny_model("llama").to(dtype)
    end = "resid_post" if place == "skip" else place
    name = f"blocks.2.{'attn.' if place == 'attn_scores' else ''}hook_{end}"
    # What other hooks return is thrown away there.
    model.hook_dict[name].register_forward_hook(lambda module, inputs, out: inputs[0])
    model.hook_dict[name].add_hook = lambda hook: type(model.hook_dict[name]).add_hook(
        model.hook_dict[name], hook, prepend=True
    )
    prepended = model.hook_dict[name].fwd_hooks
    assert not prepended
    assert logits(model, *(edit_of(block, place) for block in (0, 1, 3))).isfinite().all()
    for blocks in ((2,), (0, 1, 2, 3)):
        with pytest.raises(CannotEdit, match=f"'{end}' of block 2 for its hook only"):
            logits(model, *(edit_of(block, place) for block in blocks))


def test_what_changes_little_is_no_edit_that_cannot_act(tiny):
    """The proof is of the place: the user's own edit may well change nothing."""
    model = tiny("llama")
    for edit in (
        Edit(1, "resid_pre", lambda x: x + 0.0),
        Edit(3, "attn_scores", lambda s: torch.where(s > -1e30, s + 5.0, s)),
        Edit(2, "attn_out", lambda x: torch.cat([x[:, :-1], x[:, -1:] + 1], dim=1)),
    ):
        torch.testing.assert_close(logits(model, edit)[:, :-1], logits(model)[:, :-1])


@pytest.mark.parametrize("place", ["attn_out", "attn_scores"])
def test_a_place_is_proven_whatever_the_users_hooks_do_there(place):
    model = tiny_model("llama")
    logits(model)  # The bridge puts hooks of its own on the norms in its first run.
    seen = []

    def ablate(x, hook):
        seen.append(x.shape)
        return x * 0

    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", ablate)]):
        before = hooks_on(model)
        ablated = logits(model)
        edited_too = logits(model, edit_of(1, place))
        assert hooks_on(model) == before
    # Once for each run of the user's own, and never for a probe.
    assert [tuple(shape) for shape in seen] == [(3, 11, 32)] * 2
    assert torch.equal(ablated, edited_too)
    assert not torch.equal(ablated, logits(model))


def test_each_place_of_a_model_is_proven_once(tiny):
    model = tiny_model("llama")
    runs = []
    handle = model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        logits(model, edit_of(1, "resid_pre"), edit_of(2, "resid_pre"))
    handle.remove()
    assert len(runs) == 3 + 1
