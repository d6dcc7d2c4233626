"""What blocks are called with is taken apart rightly, where sizes alone would not tell."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_model, random_tokens, tiny_config, tiny_model

import mspgt_lens as ml
from mspgt_lens.models import RecordedRun, as_adapter, bridge_from_huggingface
from mspgt_lens.models.arguments import BlockCall, Rows, learn_arguments, record_calls

N = 4  # Prompts, positions and heads alike.


class Blocks:
    """A model whose only block is called with made-up arguments; just enough of an adapter."""

    name, n_layers, n_ctx = "made", 1, 64

    def __init__(self, made: Any) -> None:
        self.made = made
        self.block = torch.nn.Identity()
        self.block.forward = lambda residual, **_: residual
        self.model = torch.nn.Module()
        self.model.blocks = torch.nn.ModuleList([self.block])
        self.model.hook_dict = {}  # No hooks of users.

    def run(self, tokens: Any, mask: Any, on_site: Any, *, cached: bool) -> None:
        on_site(1, self.block(torch.zeros(*tokens.shape, 2), **self.made(*tokens.shape)))


def taken(made: Any, rows: Rows, size: tuple[int, int] = (N, N)) -> dict[str, Any]:
    """The keyword arguments for some rows, of a block recorded at that size."""
    model: Any = Blocks(made)
    calls = [BlockCall(torch.zeros(*size, 2), (), made(*size))]
    tokens = torch.zeros(size, dtype=torch.long)
    return learn_arguments(model, calls, tokens, tokens == 0)[0].take(rows)[1]


def filled(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize(
    ("name", "made", "expected"),
    [
        ("position_ids", lambda n, p: filled(n, p), lambda x: x[[2, 0], 1:3]),
        ("position_ids", lambda n, p: filled(1, p), lambda x: x[:, 1:3]),
        ("position_ids", lambda n, p: filled(3, n, p), lambda x: x[:, [2, 0], 1:3]),
        ("cache_position", lambda n, p: filled(p), lambda x: x[1:3]),
        ("slopes", lambda n, p: filled(N), lambda x: x),
        ("per_head", lambda n, p: filled(N, N), lambda x: x),
        ("attention_mask", lambda n, p: filled(n, p), lambda x: x[[2, 0], :3]),
        ("attention_mask", lambda n, p: filled(n, 1, p, p), lambda x: x[[2, 0], :, 1:3, :3]),
        ("attention_mask", lambda n, p: filled(1, 1, p, p), lambda x: x[:, :, 1:3, :3]),
        ("alibi", lambda n, p: filled(n * N, 1, p), lambda x: x[[8, 9, 10, 11, 0, 1, 2, 3], :, :3]),
        ("alibi", lambda n, p: filled(N, 1, p), lambda x: x[:, :, :3]),
        ("bias", lambda n, p: filled(N, p, p), lambda x: x[:, 1:3, :3]),
        ("first", lambda n, p: filled(p, n, 2), lambda x: x[1:3, [2, 0]]),
    ],
)
@pytest.mark.parametrize("inside", ["alone", "tuple", "list", "dict"])
def test_axes_are_known_though_prompts_positions_and_heads_are_as_many(
    name: str, made: Any, expected: Any, inside: str
) -> None:
    def arguments(n: int, p: int) -> dict[str, Any]:
        value = made(n, p)
        wrapped = {"tuple": (value, None), "list": [value], "dict": {"x": value}}
        return {name: wrapped.get(inside, value)}

    found = taken(arguments, Rows(torch.tensor([2, 0]), 1, 3))[name]
    found = {"alone": lambda: found, "dict": lambda: found["x"]}.get(inside, lambda: found[0])()
    torch.testing.assert_close(found, expected(made(N, N)), atol=0, rtol=0)


def test_twice_as_many_positions_as_prompts_are_told_from_two_rows_a_prompt() -> None:
    rows = Rows(torch.tensor([1]), 0, 3)
    both = taken(lambda n, p: {"a": filled(2 * n), "b": filled(p)}, rows, (3, 6))
    assert both["a"].tolist() == [2, 3]
    assert both["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda n, p: filled(2 * p), r"\[8\] for 4 prompts of 4 tokens"),
        (lambda n, p: filled(n, p + 1), "does not follow"),
        (lambda n, p: filled(n * p), "does not follow"),
        (lambda n, p: p, "4 or 4 or 5"),
        (lambda n, p: object(), "does not follow"),
        (lambda n, p: None if n == 5 else filled(p), "Tensor or Tensor or NoneType"),
        (lambda n, p: [filled(n)] * n, "does not follow"),
    ],
)
def test_what_is_not_understood_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)block 0 of made is called with.*{message}"):
        taken(lambda n, p: {"x": made(n, p)}, Rows(torch.tensor([0]), 0, 1))


def test_what_blocks_hand_on_beside_the_residual_is_refused() -> None:
    shared: UserDict[str, torch.Tensor] = UserDict()
    model: Any = Blocks(lambda n, p: {"states": shared})
    model.block.forward = lambda residual, states: states.update(keys=residual) or residual
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ml.CannotMeasure, match="blocks of made hand states on to later blocks"):
        record_calls(model, tokens, tokens == 0)


def test_a_wrong_row_among_massive_ones_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", n_layers=2)
    adapter = as_adapter(model)
    tokens = random_tokens(2, 6)
    with torch.no_grad(), adapter.inference():
        run = RecordedRun(adapter, tokens, torch.ones_like(tokens, dtype=torch.bool))
        expected = torch.ones(1, 6, 32)
        expected[:, 0] *= 1e6
        found = expected.clone()
        found[:, 3] *= -1
        real = torch.ones(1, 6, dtype=torch.bool)
        assert run._equal(expected, expected, real)
        assert not run._equal(found, expected, real)


def test_a_block_that_mixes_rows_up_is_found() -> None:
    model = tiny_model("llama", n_layers=2)

    def mixed(module: Any, args: Any, out: Any) -> Any:
        # Adds what depends on the place in the batch.
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + torch.arange(float(len(hidden)))[:, None, None]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    model.blocks[0].register_forward_hook(mixed)
    clean, corrupted = random_tokens(3, 5), random_tokens(3, 5, seed=1)
    answer, foil = random_tokens(3, 2, seed=2).T
    pairs = ml.PromptPairs.from_tokens(clean, corrupted, answer, foil)
    with pytest.raises(ValueError, match="block 0 of tiny-llama, called on its own"):
        ml.patch_layers(model, pairs, progress=False)


def padded(lead: Any, trail: Any) -> torch.Tensor:
    """Which of 8 positions are no padding."""
    places = torch.arange(8)
    return (places >= torch.tensor(lead)[:, None]) & (places < 8 - torch.tensor(trail)[:, None])


@pytest.mark.parametrize(
    ("lead", "trail", "unlike"),
    [
        ([0] * 12, [0] * 12, {0, 11}),
        ([0] * 12, [0] * 4 + [1, 3, 1, 2, 1, 1, 1, 1], {0, 5, 11}),
        ([1, 0, 1, 3, 1, 1], [0] * 6, {0, 1, 3, 5}),
        ([0], [2], {0}),
    ],
)
def test_a_few_prompts_tell_whether_runs_resume_within_them(
    lead: list[int], trail: list[int], unlike: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them comes out wrong, the run is computed from the first position on."""
    mask = padded(lead, trail)
    tokens = random_tokens(*mask.shape)
    adapter = as_adapter(tiny_model("llama", n_layers=2))
    run_block, resumed = RecordedRun.run_block, []

    def prepared(wrong: int) -> bool:
        def spoilt(run: Any, block: int, residual: Any, prompts: Any, start: int) -> Any:
            resumed.append(prompts.tolist())
            after = run_block(run, block, residual, prompts, start)
            return after + 5.0 * (prompts == wrong)[:, None, None] if start else after

        monkeypatch.setattr(RecordedRun, "run_block", spoilt)
        with adapter.inference():
            run = RecordedRun(adapter, tokens, mask)
            run.prepare()
        return run.reuses_prefix

    assert prepared(-1)
    assert {frozenset(prompts) for prompts in resumed} == {frozenset(unlike)}
    assert all(prompts == sorted(prompts, reverse=True) for prompts in resumed)
    assert not any(prepared(wrong) for wrong in unlike)


def test_prompts_as_long_as_the_context_are_patched() -> None:
    clean, corrupted = random_tokens(3, 5), random_tokens(3, 5, seed=1)
    answer, foil = random_tokens(3, 2, seed=2).T
    pairs = ml.PromptPairs.from_tokens(clean, corrupted, answer, foil)
    tight, wide = (random_model(tiny_config("gpt2", n_layers=2, n_ctx=n_ctx)) for n_ctx in (5, 8))
    weights = tight.state_dict()
    weights["transformer.wpe.weight"] = wide.transformer.wpe.weight.detach().clone()
    weights["transformer.wpe.weight"][:5] = tight.transformer.wpe.weight
    wide.load_state_dict(weights)
    found, expected = (
        ml.patch_layers(bridge_from_huggingface(model, None, "tiny"), pairs, progress=False).by_pair
        for model in (tight, wide)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_logits_are_in_float32_where_weights_are_not() -> None:
    """Rounded to bfloat16 they are .01 off here, more than many a patch moves them."""
    tokens = random_tokens(3, 12)
    half = random_model(tiny_config("llama")).to(torch.bfloat16)
    wide = bridge_from_huggingface(copy.deepcopy(half).float(), None, "wide")
    adapter = as_adapter(bridge_from_huggingface(half, None, "half"))
    with adapter.inference():
        run = RecordedRun(adapter, tokens, torch.ones_like(tokens, dtype=torch.bool))
        final = run.residual[-1][0]
        expected = wide.unembed(wide.ln_final(final.float()[None]))[0]
        rounded = adapter.model.unembed(adapter.model.ln_final(final[None]))[0].float()
        assert (rounded - expected).abs().max() > 1e-3
        torch.testing.assert_close(run.logits(final), expected, atol=1e-5, rtol=1e-5)
