"""Padding that no mask declares is found by the tokenizer's pad id, or asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens.information import lens
from mspgt_lens.models import as_adapter
from mspgt_lens.prompts import as_dataset, count_tokens, n_ordinary

BOS, EOS, PAD = 1, 2, 0
QUICK: dict[str, Any] = {
    "bands": {"local": (1, 1), "intermediate": (2, 4)},
    "n_folds": 3,
    "progress": False,
}
CACHE = {name: value for name, value in QUICK.items() if name != "progress"}
LENGTHS = [30 - 3 * (i % 6) for i in range(18)]
WORDS = random_tokens(18, 30)


def told(architecture: str = "llama", pad: int | None = PAD, takes_bos: bool = True) -> Any:
    """A model whose tokenizer pads with this id."""
    model = tiny_model(architecture, n_layers=3)
    model.tokenizer = tiny_tokenizer.__wrapped__()
    model.tokenizer.pad_token = None if pad is None else model.tokenizer.convert_ids_to_tokens(pad)
    model.cfg.default_prepend_bos = takes_bos
    return model


def shared_pad(architecture: str = "gpt2", takes_bos: bool = True) -> Any:
    """As GPT-2: one id for BOS, EOS and padding."""
    model = told(architecture, EOS, takes_bos)
    model.tokenizer.bos_token = model.tokenizer.eos_token
    return model


def padded(rows: list[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[index, at], mask[index, at] = torch.tensor(row), True
    return tokens, mask


def cut(start: list[int] | None = None) -> list[list[int]]:
    return [[*(start or []), *row[:n].tolist()] for row, n in zip(WORDS, LENGTHS, strict=True)]


def rows_for(model: Any, tokens: Any) -> list[list[int]]:
    return [p.tokens.tolist() for p in as_dataset(ml.PromptDataset.from_tokens(tokens), model)]


def cache_of(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Any:
    kwargs = {} if mask is None else {"attention_mask": mask.long()}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=ml.needed_hooks(model), **kwargs)
    return cache


def assert_same(one: ml.results.LayerProfile, other: ml.results.LayerProfile) -> None:
    for name in ("compression", "relevance"):
        a, b = getattr(one, name).values, getattr(other, name).values
        assert np.allclose(a, b, rtol=1e-3, atol=1e-3), name
    for name, curve in one.signals.items():
        assert np.allclose(curve.values, other.signals[name].values, atol=1e-4), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_profile_of_padded_tokens_is_that_of_the_prompts(architecture: str, side: str) -> None:
    model = told(architecture)
    tokens, mask = padded(cut(), PAD, side)
    expected = ml.profile_layers(model, ml.PromptDataset.from_tokens(cut()), **QUICK)
    undeclared = ml.profile_layers(model, ml.PromptDataset.from_tokens(tokens), **QUICK)
    assert undeclared.settings == expected.settings
    assert np.array_equal(undeclared.relevance.values, expected.relevance.values)
    cached = ml.profile_cache(model, cache_of(model, tokens, mask), tokens, **CACHE)
    assert cached.settings == expected.settings
    assert_same(cached, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("start", [[], [BOS]], ids=["bare", "bos"])
def test_a_pad_of_its_own_is_taken_off_the_ends(side: str, start: list[int]) -> None:
    assert rows_for(told(), padded(cut(start), PAD, side)[0]) == cut(start)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_id_for_everything_leaves_the_bos_that_every_prompt_has(side: str) -> None:
    rows = cut([EOS])
    assert rows_for(shared_pad(), padded(rows, EOS, side)[0]) == rows
    # Padded to a length that no prompt reaches.
    more = torch.full((len(rows), 3), EOS)
    tokens = padded(rows, EOS, side)[0]
    longer = torch.cat([more, tokens] if side == "left" else [tokens, more], dim=1)
    assert rows_for(shared_pad(), longer) == rows
    # Without BOS, the longest prompt shows it.
    assert rows_for(shared_pad(), padded(cut(), EOS, side)[0]) == cut()


def test_an_eos_at_the_end_of_every_prompt_stays() -> None:
    rows = [[*row.tolist(), EOS] for row in WORDS]
    assert rows_for(shared_pad(), torch.tensor(rows)) == rows
    # Separators inside are text, and runs of the same id after the end are not.
    rows = [[*row[:5], EOS, *row[5:]] for row in cut()]
    assert rows_for(shared_pad(), padded(rows, EOS, "right")[0]) == rows
    assert rows_for(shared_pad(), padded(rows, EOS, "left")[0]) == rows


def test_what_may_be_padding_or_text_asks_for_a_mask() -> None:
    tokens = WORDS.clone()
    tokens[3, 0] = tokens[5, 9] = EOS
    with pytest.raises(ValueError, match=r"some prompts begin with it.*give mask="):
        rows_for(shared_pad(), tokens)
    # An ordinary token that pads: inside of texts and at their ends.
    tokens = padded(cut(), 7, "right")[0]
    tokens[2, 4] = 7
    with pytest.raises(ValueError, match=r"at the ends of some prompts and inside of some.*mask="):
        rows_for(told(pad=7), tokens)
    declared = ml.PromptDataset.from_tokens(tokens, torch.ones_like(tokens))
    assert as_dataset(declared, told(pad=7)) is declared
    # Where it is only inside, nothing is padded.
    tokens = WORDS.clone()
    tokens[tokens == 7] = 8
    tokens[2, 4] = 7
    assert rows_for(told(pad=7), tokens) == tokens.tolist()


@pytest.mark.parametrize("pad", [None, PAD], ids=["unknown", "another"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 50])
def test_padding_with_another_token_than_the_tokenizer_s_asks_for_a_mask(
    pad: int | None, side: str, fill: int
) -> None:
    model = told(pad=pad)
    if pad == fill:
        return
    if pad is None:
        model.tokenizer = None
    with pytest.raises(ValueError, match=rf"token {fill} over and over, as if padded.*give mask="):
        rows_for(model, padded(cut(), fill, side)[0])


def test_a_prompt_of_padding_only_is_named() -> None:
    tokens = WORDS.clone()
    tokens[4] = PAD
    with pytest.raises(ValueError, match="prompt 4 is nothing but the pad id 0"):
        rows_for(told(), tokens)


def test_rows_that_differ_in_length_are_taken_as_they_are() -> None:
    rows = [[5, 6, PAD], [7, PAD]]
    assert rows_for(told(), rows) == rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_pairs_padded_without_a_mask_are_patched_as_those_with_one(
    architecture: str, side: str
) -> None:
    model = told(architecture)
    rows = [row[: 6 + i % 3].tolist() for i, row in enumerate(WORDS[:6])]
    other = [[row[0], 90 - row[1] // 2, *row[2:]] for row in rows]
    tokens, mask = padded(rows, PAD, side)
    given = (tokens, padded(other, PAD, side)[0], range(10, 16), range(20, 26))
    found = [
        ml.patch_layers(
            model, ml.PromptPairs.from_tokens(*given, mask=one), positions="last", progress=False
        )
        for one in (None, mask)
    ]
    assert found[0].clean == found[1].clean
    assert np.array_equal(found[0].effect, found[1].effect)
    assert ml.PromptPairs.from_tokens(*given).for_model(model).mask.equal(mask)


def test_pairs_that_may_end_with_eos_or_padding_ask_for_a_mask() -> None:
    tokens = torch.cat([WORDS[:4, :5], torch.full((4, 1), EOS)], dim=1)
    pairs = ml.PromptPairs.from_tokens(tokens, tokens.roll(1, 0), range(10, 14), range(20, 24))
    with pytest.raises(ValueError, match=r"every prompt ends with it.*give mask="):
        ml.patch_layers(shared_pad(), pairs, progress=False)


def test_pairs_of_unequal_length_are_named_when_padding_is_off() -> None:
    clean, corrupted = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[5, 6, 9], [8, 9, 4]])
    pairs = ml.PromptPairs.from_tokens(clean, corrupted, [7, 7], [8, 8])
    with pytest.raises(ValueError, match="without padding, pair 1 has 2 and 3"):
        ml.patch_layers(told(), pairs, progress=False)


def test_special_tokens_are_in_no_frequency_and_no_fold_s_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All positions are decoded, not a sample that the whole prompt decides.
    monkeypatch.setattr(lens, "MIN_POSITIONS", 10_000)
    model = told()
    adapter = as_adapter(model)
    rows = [[BOS, *row, EOS, EOS] for row in cut()]
    prompts = list(ml.PromptDataset.from_tokens(rows))
    expected = np.bincount(np.concatenate(cut()), minlength=101)
    assert np.array_equal(count_tokens(adapter, prompts), expected)
    assert [n_ordinary(adapter, p) for p in prompts] == LENGTHS
    # Relevance is gain over the unigram model: neither knows how many special tokens there are.
    with_ends = ml.profile_layers(model, ml.PromptDataset.from_tokens(rows), **QUICK)
    more = [[BOS, *row, *[EOS] * 40] for row in cut()]
    longer = ml.profile_layers(model, ml.PromptDataset.from_tokens(more), **QUICK)
    assert np.allclose(with_ends.relevance.values, longer.relevance.values, atol=1e-5)
    assert with_ends.settings["unigram_cross_entropy"] == pytest.approx(
        longer.settings["unigram_cross_entropy"], abs=1e-9
    )


def test_prompts_of_special_tokens_only_are_told() -> None:
    with pytest.raises(ValueError, match="special tokens only"):
        ml.profile_layers(
            told(),
            ml.PromptDataset.from_tokens([[BOS, EOS] * (9 + i) for i in range(4)]),
            **QUICK,
        )


# ----------------------------------------------------------------------------- parts of caches


def test_a_cache_of_some_positions_is_refused() -> None:
    model = told()
    with torch.no_grad():
        _, cache = model.run_with_cache(
            WORDS, names_filter=ml.needed_hooks(model), pos_slice=slice(4, 24)
        )
    with pytest.raises(ValueError, match=r"hook_pattern'\] must have shape .*without pos_slice"):
        ml.profile_cache(model, cache, WORDS[:, 4:24], **CACHE)


@pytest.mark.parametrize(
    ("hook", "part"),
    [
        ("blocks.1.attn.hook_pattern", lambda x: x[:, :2]),
        ("blocks.1.attn.hook_pattern", lambda x: x[:, 0]),
        ("blocks.2.attn.hook_pattern", lambda x: x[:9]),
        ("blocks.0.attn.hook_pattern", lambda x: x[..., 3:]),
        ("blocks.1.hook_resid_pre", lambda x: x[:9]),
        ("blocks.2.hook_resid_post", lambda x: x[:, 2:]),
        ("blocks.0.hook_resid_pre", lambda x: x[..., :5]),
        ("blocks.0.hook_resid_pre", lambda x: x[0, 0]),
    ],
    ids=["heads", "one head", "batch", "keys", "site batch", "site pos", "width", "one position"],
)
def test_entries_of_other_shapes_are_named(hook: str, part: Any) -> None:
    model = told()
    cache = dict(cache_of(model, WORDS).items())
    cache[hook] = part(cache[hook])
    with pytest.raises(ValueError, match=r"cache\['blocks.*must have shape \("):
        ml.profile_cache(model, cache, WORDS, **CACHE)


def test_caches_of_arrays_and_in_half_precision_are_read() -> None:
    model = told()
    cache = cache_of(model, WORDS)
    expected = ml.profile_cache(model, cache, WORDS, **CACHE)
    arrays = {name: tensor.numpy() for name, tensor in cache.items()}
    assert np.array_equal(
        ml.profile_cache(model, arrays, WORDS.numpy(), **CACHE).relevance.values,
        expected.relevance.values,
    )
    half = {name: tensor.bfloat16() for name, tensor in cache.items()}
    assert np.allclose(
        ml.profile_cache(model, half, WORDS, **CACHE).relevance.values,
        expected.relevance.values,
        atol=0.1,
    )
    whole = {name: tensor.long() for name, tensor in cache.items()}
    with pytest.raises(TypeError, match=r"must hold floating-point numbers, got torch\.int64"):
        ml.profile_cache(model, whole, WORDS, **CACHE)


def test_a_cache_of_one_prompt_without_its_axis_has_one_prompt() -> None:
    model = told()
    with torch.no_grad():
        _, cache = model.run_with_cache(
            WORDS[:1], names_filter=ml.needed_hooks(model), remove_batch_dim=True
        )
    for tokens in (WORDS[0], WORDS[:1]):
        with pytest.raises(ValueError, match=r"as many groups as folds \(3\), got 1"):
            ml.profile_cache(model, cache, tokens, **CACHE)


def test_padding_that_was_attended_to_is_refused() -> None:
    model = told("gpt2")
    tokens, mask = padded(cut(), 50, "left")
    with pytest.raises(ValueError, match=r"attend to the .* positions of padding.*attention_mask"):
        ml.profile_cache(model, cache_of(model, tokens), tokens, mask=mask, **CACHE)


# ------------------------------------------------------------------------------- every other entry


@pytest.mark.parametrize(
    "measure",
    [
        lambda m, data: ml.perturb_scales(
            m,
            data,
            {"near": [0], "far": [2]},
            perturbations=[ml.Perturbation("scaling")],
            progress=False,
        ),
        lambda m, data: ml.classify_tokens(
            m, data, bands={"local": (1, 2), "global": (3, 6)}, n_tokens=30, progress=False
        ),
        lambda m, data: ml.generation_effects(
            m,
            data,
            {"near": [0], "far": [2]},
            perturbations=[ml.Perturbation("scaling")],
            n_new=8,
            target_kl=None,
            n_controls=0,
            progress=False,
        ),
    ],
    ids=["perturbation", "classes", "generation"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_function_that_takes_prompts_takes_the_padding_off(side: str, measure: Any) -> None:
    model = told()
    found = [
        measure(model, ml.PromptDataset.from_tokens(tokens))
        for tokens in (cut(), padded(cut(), PAD, side)[0])
    ]
    assert found[0].settings == found[1].settings
    for name, value in vars(found[0]).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, getattr(found[1], name), equal_nan=True), name
