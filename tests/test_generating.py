"""Cached generation writes what whole passes write, alone or in a batch, and leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, as_text, random_tokens, tiny_model, tiny_tokenizer

from mspgt_lens.models import Edit, as_adapter, decode_text, edited, generate

LENGTHS = (20, 5, 13, 1, 9)
PROMPTS = [row[:n] for row, n in zip(random_tokens(5, 20).numpy(), LENGTHS, strict=True)]
N_NEW = 12
EDITS = [
    Edit(1, "resid_pre", lambda x: 1.3 * x + 0.2),
    Edit(2, "attn_scores", lambda scores: scores / 2),
    Edit(3, "skip"),
]


def hooks_on(model):
    """How many hooks sit on every hook point and on every torch module."""
    points = {f"point {name}": len(hook.fwd_hooks) for name, hook in model.hook_dict.items()}
    modules = {
        f"module {name}": len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
    }
    return points | modules


def uncached(adapter, edits=()):
    """Each prompt alone, without padding, every pass over the whole text."""
    found = []
    for prompt in PROMPTS:
        tokens = torch.from_numpy(prompt)[None]
        with adapter.inference(), edited(adapter, edits):
            for _ in range(N_NEW):
                last = adapter.model(tokens, return_type="logits")[:, -1:]
                tokens = torch.cat([tokens, last.argmax(dim=-1)], dim=1)
        found.append(tokens[0, -N_NEW:].numpy())
    return np.array(found)


@pytest.mark.parametrize("edits", [[], EDITS], ids=["clean", "edited"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_and_padded_equals_uncached_and_alone(tiny, architecture, edits):
    adapter = as_adapter(tiny(architecture))
    expected = uncached(adapter, edits)
    assert len(np.unique(expected)) > 3
    for batch_size in (64, 2):
        found = generate(
            adapter, PROMPTS, n_new=N_NEW, edits=lambda rows: edits, batch_size=batch_size
        )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_cached_equals_uncached_in_compatibility_mode(architecture):
    model = tiny_model(architecture)
    model.enable_compatibility_mode()
    adapter = as_adapter(model)
    found = generate(adapter, PROMPTS, n_new=N_NEW, edits=lambda rows: EDITS)
    np.testing.assert_array_equal(found, uncached(adapter, EDITS))


def test_edits_see_the_prompt_once_and_then_only_new_positions(tiny):
    shapes, seen = [], []

    def look(rows):
        seen.append(rows)
        return [Edit(1, "resid_pre", lambda x: shapes.append(tuple(x.shape[:2])) or x)]

    generate(as_adapter(tiny("llama")), PROMPTS, n_new=4, edits=look, batch_size=3)
    assert shapes == [(3, 20), (3, 1), (3, 1), (3, 1), (2, 9), (2, 1), (2, 1), (2, 1)]
    assert [rows.prompts for rows in seen] == [range(3), range(3, 5)]
    for rows in seen:
        for row, number in enumerate(rows.prompts):
            kept = rows.tokens[row, rows.mask[row]]
            np.testing.assert_array_equal(kept.numpy(), PROMPTS[number])
            assert rows.mask[row, -1]


def test_seeds_decide_draws_whatever_the_batch(tiny):
    adapter = as_adapter(tiny("llama"))

    def draw(seeds, prompts=PROMPTS, **options):
        return generate(adapter, prompts, n_new=N_NEW, temperature=2.0, seeds=seeds, **options)

    together = draw([1, 2, 3, 4, 5])
    np.testing.assert_array_equal(together, draw([1, 2, 3, 4, 5], batch_size=2))
    np.testing.assert_array_equal(together[3:4], draw([4], PROMPTS[3:4]))
    assert (together != draw([1, 2, 3, 4, 6])).any(axis=1).tolist() == [False] * 4 + [True]


def test_draws_follow_the_models_probabilities(tiny):
    adapter = as_adapter(tiny("gpt2"))
    prompt = PROMPTS[1]
    with adapter.inference():
        logits = adapter.model(torch.from_numpy(prompt)[None], return_type="logits")[0, -1]
    expected = torch.softmax(logits / 1.5, dim=0).numpy()
    n = 4000
    drawn = generate(
        adapter, [prompt] * n, n_new=1, temperature=1.5, seeds=range(n), batch_size=1000
    )
    share = np.bincount(drawn[:, 0], minlength=len(expected)) / n
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(share - expected) < 4.5 * error + 1e-3).all()


def test_special_tokens_are_never_chosen():
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    adapter = as_adapter(model)
    drawn = generate(
        adapter, PROMPTS * 20, n_new=20, temperature=50.0, seeds=range(100), batch_size=100
    )
    assert drawn.min() >= 4
    assert decode_text(adapter, drawn[0]) == as_text(torch.from_numpy(drawn[0]))
    assert decode_text(adapter, np.array([1, 7, 2])) == "w7"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_whatever_happens(error):
    model = tiny_model("llama")
    adapter = as_adapter(model)
    generate(adapter, PROMPTS, n_new=1)  # The bridge puts hooks of its own in its first run.
    model.train()
    before = hooks_on(model)
    calls = []

    def fail(x):
        calls.append(x)
        if len(calls) == 3:
            raise error("stop")
        return x

    with pytest.raises(error, match="stop"):
        generate(adapter, PROMPTS, n_new=6, edits=lambda rows: [Edit(1, "resid_pre", fail)])
    assert hooks_on(model) == before
    assert all(module.training for module in model.modules())


def test_logits_that_are_not_finite_are_named(tiny):
    adapter = as_adapter(tiny("llama"))
    broken = Edit(1, "resid_pre", lambda x: x * torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        generate(adapter, PROMPTS, n_new=2, edits=lambda rows: [broken])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_new": 0}, "n_new must be"),
        ({"n_new": 250}, r"prompts\[0\] has 20 tokens; with 250 new"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1.0}, "seeds must give"),
        ({"seeds": [1, 2]}, "one seed per prompt"),
    ],
)
def test_wrong_arguments_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        generate(as_adapter(tiny("llama")), PROMPTS, **({"n_new": 3} | options))


def test_no_prompt_an_empty_one_and_a_missing_tokenizer_are_named(tiny):
    adapter = as_adapter(tiny("llama"))
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(adapter, [], n_new=3)
    with pytest.raises(ValueError, match=r"prompts\[1\] has 0 tokens"):
        generate(adapter, [PROMPTS[0], PROMPTS[0][:0]], n_new=3)
    with pytest.raises(ValueError, match="no tokenizer"):
        decode_text(adapter, PROMPTS[0])
