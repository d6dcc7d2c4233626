"""Profiles: what must not matter, caches, streams and controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from profiles import (
    BANDS,
    QUICK,
    RAGGED,
    SMALL,
    TOKENS,
    assert_same,
    broken_late,
    cache_of,
    pad,
    prompts_of,
    run,
)
from tiny import ARCHITECTURES, as_text, random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens.gathering import finish_batch
from mspgt_lens.moments import Moments
from mspgt_lens.profile import passing as passing_module
from mspgt_lens.profile import run as profile_module
from mspgt_lens.profile.results import LayerProfile


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(
    model: Any, ragged: Callable[[str], LayerProfile], side: str
) -> None:
    tokens, mask = pad(RAGGED, side)
    assert_same(run(model, prompts_of(tokens, mask=mask), logit_lens=True), ragged("llama"))


def test_texts_and_their_tokens_give_the_same_profile() -> None:
    model = tiny_model("llama", **SMALL)
    model.tokenizer = tiny_tokenizer()
    texts = [as_text(row) for row in TOKENS]
    tokens = [[1, *row] for row in TOKENS.tolist()]
    by_texts = run(model, texts)
    assert_same(by_texts, run(model, prompts_of(tokens)))
    assert_same(by_texts, run(model, ml.PromptDataset.from_texts(model, iter(texts))))


def test_plain_texts_fit_a_model_with_a_short_context() -> None:
    """Without a length being asked for, windows are as long as the model takes."""
    model = tiny_model("llama", n_layers=2, d_model=16, n_ctx=64)
    model.tokenizer = tiny_tokenizer()
    assert run(model, [as_text(row) for row in random_tokens(24, 24)]).n_groups == 24


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_does_not_matter(
    tiny: Callable[..., Any], ragged: Callable[[str], LayerProfile], batch_size: int
) -> None:
    model, default = tiny("gpt2", **SMALL), ragged("gpt2")
    other = run(model, prompts_of(RAGGED), logit_lens=True, batch_size=batch_size)
    assert_same(other, default, rtol=1e-5, atol=1e-5)
    assert other.settings == default.settings


def test_batch_size_does_not_matter_where_wide_residuals_are_projected(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 8)
    model = tiny("llama", **SMALL)
    one = run(model, prompts_of(RAGGED), batch_size=1)
    many = run(model, prompts_of(RAGGED), batch_size=4)
    np.testing.assert_allclose(one.compression.values, many.compression.values, rtol=1e-3)


def test_two_runs_agree_to_the_last_digit(model: Any, profile: LayerProfile) -> None:
    again = run(model)
    assert_same(again, profile)
    assert (again.settings, again.n_tokens) == (profile.settings, profile.n_tokens)


def test_the_seed_decides_the_folds_and_nothing_else(model: Any, profile: LayerProfile) -> None:
    other = run(model, seed=1)
    assert not np.allclose(other.retained["local"].values, profile.retained["local"].values)
    np.testing.assert_allclose(other.compression.values, profile.compression.values, rtol=1e-6)


def test_no_global_random_state_is_touched(model: Any) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(model)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_what_was_measured_is_recorded(model: Any, profile: LayerProfile) -> None:
    assert (profile.model_name, profile.n_layers, profile.n_groups) == ("tiny-llama", 2, 24)
    assert profile.n_tokens == 24 * (24 - 4)
    assert dict(profile.bands) == BANDS
    recorded = {name: profile.settings[name] for name in ("noise", "n_folds", "skip_first", "seed")}
    assert recorded == {"noise": 0.1, "n_folds": 3, "skip_first": 4, "seed": 0}
    assert profile.settings["n_prompts"] == 24
    assert profile.settings["width"] == 16
    # What torch says of itself may have the kind of build added.
    assert torch.__version__.startswith(profile.versions["torch"])
    grouped = run(model, prompts_of(groups=[i // 6 for i in range(24)]))
    assert (grouped.n_groups, grouped.n_tokens) == (4, profile.n_tokens)


def test_the_fingerprint_is_that_of_the_prompts(model: Any, profile: LayerProfile) -> None:
    def fingerprint(tokens: Tensor) -> str:
        return run(model, prompts_of(tokens)).settings["prompts_fingerprint"]

    assert fingerprint(TOKENS.flip(0)) == profile.settings["prompts_fingerprint"]
    changed = TOKENS.clone()
    changed[5, 5] = 4 + changed[5, 5] % 50
    assert fingerprint(changed) != profile.settings["prompts_fingerprint"]


def test_the_fingerprint_counts_repeated_prompts(model: Any) -> None:
    twice = run(model, prompts_of(TOKENS.repeat(2, 1))).settings["prompts_fingerprint"]
    others = run(model, prompts_of(random_tokens(12, 24, seed=9).repeat(2, 1)))
    assert twice != others.settings["prompts_fingerprint"]


def test_progress_is_shown_only_when_asked(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(model)
    assert capsys.readouterr() == ("", "")
    run(model, progress=True)
    assert "tok" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_left_padded_cache_gives_the_same_profile(
    tiny: Callable[..., Any], ragged: Callable[[str], LayerProfile], architecture: str
) -> None:
    model = tiny(architecture, **SMALL)
    tokens, mask = pad(RAGGED, "left")
    cache = cache_of(model, tokens, mask)
    cached = ml.profile_cache(model, cache, tokens, mask=mask, logit_lens=True, **QUICK)
    assert_same(cached, ragged(architecture), rtol=1e-4, atol=2e-5)
    assert cached.settings == ragged(architecture).settings


@pytest.mark.parametrize("side", ["right", None])
def test_any_other_cache_gives_the_same_profile(model: Any, side: str | None) -> None:
    tokens, mask = (TOKENS, None) if side is None else pad(RAGGED, side)
    groups = [i // 2 for i in range(24)]
    cached = ml.profile_cache(
        model,
        cache_of(model, tokens, mask),
        tokens,
        mask=mask,
        groups=groups,
        logit_lens=True,
        coordinates="raw",
        seed=3,
        **QUICK,
    )
    direct = run(
        model,
        prompts_of(tokens, mask=mask, groups=groups),
        logit_lens=True,
        coordinates="raw",
        seed=3,
    )
    assert_same(cached, direct, rtol=1e-4, atol=2e-5)


def test_an_incomplete_cache_gives_the_names_filter(model: Any) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=ml.needed_hooks(model)[1:])
    with pytest.raises(KeyError, match=r"names_filter=mspgt_lens\.needed_hooks"):
        ml.profile_cache(model, cache, TOKENS, **QUICK)


def test_a_cache_of_other_tokens_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"of shape \(24, 24\), got \(24, 23\)"):
        ml.profile_cache(model, cache_of(model, TOKENS), TOKENS[:, 1:], **QUICK)


def test_a_cache_is_left_as_it_was(model: Any) -> None:
    tokens, mask = pad(RAGGED, "left")
    cache = cache_of(model, tokens, mask)
    before = {name: cache[name].clone() for name in ml.needed_hooks(model)}
    ml.profile_cache(model, cache, tokens, mask=mask, **QUICK)
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())


def watched(texts: list[str], taken: list[str]) -> Iterator[str]:
    for text in texts:
        taken.append(text)
        yield text


def test_an_iterator_streams(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more prompts are held than the look-ahead; all enter the moments."""
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 12)
    monkeypatch.setattr(passing_module, "_CHUNK", 4)
    texts = [as_text(row) for row in random_tokens(40, 24)]
    taken: list[str] = []
    waiting: list[int] = []
    done: list[int] = []

    def counting(moments: Moments, adapter: Any, reader: Any) -> None:
        waiting.append(len(taken) - sum(done))
        finish_batch(moments, adapter, reader)
        done.append(len(reader.batch.tokens))

    monkeypatch.setattr(passing_module, "finish_batch", counting)
    streamed = run(told["llama"], watched(texts, taken))
    assert sum(done) == len(texts)
    assert waiting[0] == 12
    assert max(waiting) <= 12
    monkeypatch.undo()
    whole = run(told["llama"], texts)
    assert (
        (streamed.n_tokens, streamed.n_groups) == (whole.n_tokens, whole.n_groups) == (40 * 21, 40)
    )
    np.testing.assert_allclose(streamed.compression.values, whole.compression.values, rtol=1e-6)
    for name in ("settings", "retained", "predicted"):
        assert set(getattr(streamed, name)) == set(getattr(whole, name))
    fingerprints = {p.settings["prompts_fingerprint"] for p in (streamed, whole)}
    assert len(fingerprints) == 1


def test_windows_of_a_streamed_document_are_one_group(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 6)
    texts = [as_text(row) for row in random_tokens(9, 46)]
    prompts = ml.PromptDataset.from_texts(told["llama"], texts, max_length=24)
    assert run(told["llama"], prompts).n_groups == 9


@pytest.mark.parametrize("index", [3, 9, 11])
def test_a_bad_token_in_a_stream_is_found_and_counted_right(
    model: Any, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 6)
    monkeypatch.setattr(passing_module, "_CHUNK", 2)
    tokens = TOKENS.clone()
    tokens[index, 20] = 101
    with pytest.raises(ValueError, match=rf"prompt {index} has a token outside"):
        run(model, prompts_of(tokens))


@pytest.mark.parametrize("index", [9, 20])
def test_a_nan_in_a_stream_is_counted_right(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 6)
    monkeypatch.setattr(passing_module, "_CHUNK", 2)
    model, prompts = broken_late(torch.nan, index)
    with pytest.raises(FloatingPointError, match=rf"prompt {index}\b"):
        run(model, prompts_of(prompts))
