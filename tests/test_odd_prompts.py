"""A thousand odd prompts are refused by name or served, and give no number that is none."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
from profiles import QUICK
from tiny import SPECIAL, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mspgt_lens as ml

N_PROMPTS = 1000
SCRIPTS = (
    "abc xyz",
    "жук",
    "שלום",
    "مرحبا",
    "हिन्दी",
    "漢字仮名",
    "한국어",
    "ไทย",
    "𐍈𐌰",
    "\U0001d510\U0001d51e",
)
EMOJI = ("🙂", "👩‍👩‍👧‍👦", "🇺🇳", "👍🏽", "🏴\U000e0067\U000e0062\U000e007f", "©️")
ODD = (
    "",
    " ",
    "\n\t \r\n",
    "\u200b",
    "\u2028\u2029\x85",
    "\ufeff",
    "\0",
    "\0" * 300,
    "\x1b[31m\x07\x08",
    "\uffff\ufdd0",
    "e" + "\u0301" * 400,
    "\u202eabc\u202c",
    "a",
    "<bos>",
    "<eos>" * 50,
    "<pad>" * 20 + "text",
    "<unk><bos><eos><pad>",
    '{"text": "a", "group": null}',
    "%s %d {0} {{}} $HOME `ls` '; DROP TABLE x; --",
    "a" * 5000,
    "ab" * 2000,
    "\n" * 500 + "x",
)
HALF = ("\ud800", "abc\udfff", "🙂\ud83d")


@cache
def model() -> Any:
    """A tiny model that reads bytes, as GPT-2's tokenizer does, so that any text has tokens."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    told = tiny_model("llama", n_layers=2, d_model=16, vocab=len(pieces), n_ctx=128)
    told.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    return told


@cache
def texts() -> list[str]:
    """Every odd text, one of 100,000 characters, and mixtures of all scripts."""
    rng = np.random.default_rng(0)
    found = [*ODD, "".join(rng.choice(list("abcdef é\n"), 100_000))]
    pieces = [*SCRIPTS, *EMOJI, *ODD[:18], " ", " ", ". "]
    while len(found) < N_PROMPTS:
        found.append("".join(rng.choice(pieces, rng.integers(1, 10))))
    return found


def profiled(prompts: Any, **kwargs: Any) -> ml.results.LayerProfile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ml.profile_layers(model(), prompts, progress=False, **{**QUICK, **kwargs})


def assert_numbers(profile: ml.results.LayerProfile) -> None:
    for quantity, scale, curve in profile.curves():
        for name in ("values", "low", "high"):
            assert np.isfinite(getattr(curve, name)).all(), (quantity, scale, name)


def test_a_thousand_odd_texts_are_windows_of_tokens() -> None:
    with pytest.warns(UserWarning, match="blank texts hold no token and were left out"):
        prompts = list(ml.PromptDataset.from_texts(model(), texts(), max_length=128))
    assert {prompt.group for prompt in prompts} == {i for i, x in enumerate(texts()) if x.strip()}
    for prompt in prompts:
        assert 2 <= len(prompt.tokens) <= 128
        assert 0 <= prompt.tokens.min() <= prompt.tokens.max() < model().cfg.d_vocab
    # Nothing but blanks is lost: bytes tell the text.
    for index in (6, 10, 19, 22):
        ids = [int(i) for p in prompts if p.group == index for i in p.tokens[1:]]
        assert model().tokenizer.decode(ids) == texts()[index]


def test_a_profile_of_a_thousand_odd_texts_is_of_numbers() -> None:
    profile = profiled(ml.PromptDataset.from_texts(model(), texts(), max_length=128))
    assert_numbers(profile)
    assert profile.n_groups == sum(bool(text.strip()) for text in texts()) > 950
    assert len(profile.summary()) > 100


@pytest.mark.parametrize("half", HALF, ids=ascii)
def test_half_of_a_pair_is_refused_by_its_text(half: str) -> None:
    given = [*texts()[12:30], half]
    with pytest.raises(ValueError, match=r"half of a surrogate pair at character .*\(text 18\)"):
        list(ml.PromptDataset.from_texts(model(), given))


ALIKE = {
    "nothing": [""] * 30,
    "blanks": [" \n"] * 30,
    "NULs": ["\0" * 60] * 30,
    "one letter": ["a"] * 30,
    "one letter over and over": ["a" * 60] * 30,
    "two letters": ["ab" * 30] * 30,
    "one text": ["the same text, word for word, in every document"] * 30,
    "special tokens": ["<eos>" * 60] * 30,
    "special tokens and a letter": ["<eos>" * 60 + "a"] * 30,
    "mostly special": [("<eos>" * 3 + "ab") * 10 + chr(97 + i % 9) for i in range(30)],
    "one letter each": [chr(97 + i % 26) * 60 for i in range(30)],
    "emoji": ["🙂" * 20] * 30,
    "one of many": ["a" * 60] * 29 + ["a b c d e f g h i j k l m n o p q r s t u v w x y z" * 2],
    "one long": ["a"] * 29 + ["abc" * 3000],
}


@pytest.mark.parametrize("name", ALIKE)
def test_texts_that_are_all_alike_are_refused_by_name_or_served(name: str) -> None:
    prompts = ml.PromptDataset.from_texts(model(), ALIKE[name], max_length=128)
    try:
        profile = profiled(prompts)
    except ValueError as error:
        message = str(error)
    else:
        assert_numbers(profile)
        message = "prompts"
    assert "prompts" in message
    assert "nan" not in message.lower().split()


def test_odd_tokens_are_refused_by_prompt() -> None:
    for rows, words in (
        ([[1, 2], []], "prompt 1 has none"),
        ([[1.5]], "whole numbers"),
        ([["a"]], "whole numbers"),
        ([[[1]]], "whole numbers"),
        ([[2**70]], "whole numbers"),
        ([[None]], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            ml.PromptDataset.from_tokens(rows)
    for token in (-1, 260, 2**40):
        with pytest.raises(ValueError, match="prompt 3 has a token outside the vocabulary"):
            profiled(ml.PromptDataset.from_tokens([[5, 6, 7]] * 3 + [[5, token]] + [[5, 6]] * 9))
