"""Pairs are checked token by token, and tasks keep to words that a tokenizer keeps whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SPECIAL, random_tokens, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mspgt_lens as ml
from mspgt_lens.patching import tasks

WHOLE = (
    "Mary John Tom Anna Paul store park book ring France Paris Italy Rome Japan Tokyo Spain Madrid "
    "key keys dog dogs river table doctor hospital teacher school is are"
)
WORDS = ("indirect_objects", "subject_verb_agreement", "capitals", "topic_cue")


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("llama", n_layers=2)
    model.tokenizer = tiny_tokenizer()
    return model


@pytest.fixture(scope="module")
def reader() -> Any:
    """A model whose tokenizer keeps a few of the tasks' words whole and splits all others."""
    whole = WHOLE.split()
    letters = [chr(i) for i in range(33, 127)]
    pieces = [*SPECIAL, *whole, *letters, *(f"##{letter}" for letter in letters)]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=SPECIAL[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tiny_model("llama", n_layers=2, vocab=len(pieces), n_ctx=512)
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        unk_token=SPECIAL[-1],
    )
    return model


def test_pairs_from_tokens_are_padded_on_the_right_and_read_at_their_last_token() -> None:
    pairs = ml.PromptPairs.from_tokens([[5, 6, 7], [8, 9]], [[5, 4, 7], [8, 7]], [10, 11], [12, 13])
    assert pairs.mask.tolist() == [[True, True, True], [True, True, False]]
    assert pairs.last.tolist() == [2, 1]
    assert pairs.first_difference.tolist() == [1, 1]
    assert pairs.groups == (0, 1)
    assert len(pairs) == 2


def test_pairs_padded_on_the_left_keep_their_padding() -> None:
    tokens = random_tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pairs = ml.PromptPairs.from_tokens(tokens, tokens, [4, 5], [6, 7], mask=mask)
    assert pairs.last.tolist() == [4, 4]
    assert pairs.mask.dtype == torch.bool
    assert pairs.first_difference.tolist() == [5, 5]


def test_pairs_from_texts_are_the_tokenizer_s_tokens(model: Any) -> None:
    pairs = ml.PromptPairs.from_texts(model, ["w4 w5 w6"], ["w4 w9 w6"], ["w7"], ["w8"])
    prefix = [] if not model.cfg.default_prepend_bos else [1]
    assert pairs.clean.tolist() == [[*prefix, 4, 5, 6]]
    assert pairs.corrupted.tolist() == [[*prefix, 4, 9, 6]]
    assert (pairs.answer.tolist(), pairs.foil.tolist()) == ([7], [8])


def test_unequal_lengths_show_the_pair(model: Any) -> None:
    with pytest.raises(ValueError, match=r"pair 1 has 3 and 2: \[4, 5, 6\] and \[4, 5\]"):
        ml.PromptPairs.from_tokens([[4], [4, 5, 6]], [[5], [4, 5]], [7, 7], [8, 8])
    with pytest.raises(ValueError, match=r"(?s)pair 0 has \d and \d:.*'w4 w5 w6'.*'w5'.*'w4 w9'"):
        ml.PromptPairs.from_texts(model, ["w4 w5 w6"], ["w4 w9"], ["w7"], ["w8"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": ["w7 w8"]}, r"answer must be a single token; pair 0 has 'w7 w8'.*2 tokens"),
        ({"foil": [""]}, "foil must be a single token; pair 0 has ''.*0 tokens"),
        ({"corrupted": ["w4", "w5"]}, r"corrupted must have one text per pair \(1\), got 2"),
    ],
    ids=["two tokens", "no token", "one more"],
)
def test_wrong_texts_are_named(model: Any, changed: dict[str, Any], message: str) -> None:
    given = {"clean": ["w4"], "corrupted": ["w5"], "answer": ["w7"], "foil": ["w8"], **changed}
    with pytest.raises(ValueError, match=message):
        ml.PromptPairs.from_texts(model, **given)


def test_one_string_is_no_list_of_texts(model: Any) -> None:
    with pytest.raises(TypeError, match="clean must be a list of strings"):
        ml.PromptPairs.from_texts(model, "w4", ["w5"], ["w7"], ["w8"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clean": [], "corrupted": []}, "at least one prompt"),
        ({"corrupted": [[4, 5]]}, r"one prompt per clean one \(2\), got 1"),
        ({"clean": [[4.5, 5.0], [5, 6]]}, "clean must hold token ids"),
        ({"answer": [1.0, 2.0]}, "answer must be token ids"),
        ({"foil": [1]}, r"foil must hold one token per pair \(2\)"),
        ({"groups": ["a"]}, r"one label per pair \(2\), got 1"),
        ({"mask": [[1, 1]]}, "mask must have the shape of clean"),
        ({"mask": [[0, 0], [1, 1]]}, "pair 0 has"),
        ({"mask": [[1, 0], [1, 1]]}, "pair 0 differs where the mask is False"),
    ],
    ids=["none", "fewer", "floats", "float answer", "foils", "groups", "shape", "empty", "padding"],
)
def test_wrong_tokens_are_named(changed: dict[str, Any], message: str) -> None:
    given = {
        "clean": [[4, 5], [5, 6]],
        "corrupted": [[4, 6], [5, 7]],
        "answer": [1, 2],
        "foil": [3, 4],
        **changed,
    }
    if "mask" in given:
        given["mask"] = torch.tensor(given["mask"])
    with pytest.raises(ValueError, match=message):
        ml.PromptPairs.from_tokens(**given)


@pytest.mark.parametrize("name", WORDS)
def test_tasks_line_up_and_follow_the_seed(reader: Any, name: str) -> None:
    task = tasks.TASKS[name]
    pairs = task(reader, 2, 0)
    assert pairs.mask.all()
    assert (pairs.answer != pairs.foil).all()
    assert (pairs.first_difference < pairs.clean.shape[1]).all()
    again, other = task(reader, 2, 0), task(reader, 2, 3)
    assert torch.equal(pairs.clean, again.clean)
    assert not torch.equal(pairs.clean, other.clean)


def test_indirect_objects_are_given_to_the_one_who_does_not_give(reader: Any) -> None:
    pairs = tasks.indirect_objects(reader, 8)
    decode = reader.tokenizer.convert_ids_to_tokens
    for clean, corrupted, answer, foil in zip(
        pairs.clean, pairs.corrupted, pairs.answer, pairs.foil, strict=True
    ):
        words = decode(clean.tolist()), decode(corrupted.tolist())
        answer, foil = decode(int(answer)), decode(int(foil))
        assert (words[0].count(answer), words[0].count(foil)) == (1, 2)
        assert (words[1].count(answer), words[1].count(foil)) == (2, 1)


def test_subject_verb_agreement_has_both_numbers(reader: Any) -> None:
    pairs = tasks.subject_verb_agreement(reader, 6)
    decode = reader.tokenizer.convert_ids_to_tokens
    assert {decode(int(i)) for i in pairs.answer} == {"is", "are"}
    for clean, answer in zip(pairs.clean, pairs.answer, strict=True):
        plural = {"keys", "dogs"} & set(decode(clean.tolist()))
        assert bool(plural) == (decode(int(answer)) == "are")


def test_the_topic_s_cue_is_far_back(reader: Any) -> None:
    pairs = tasks.topic_cue(reader, 2)
    assert int((pairs.last - pairs.first_difference).min()) > 40
    assert ((pairs.clean != pairs.corrupted).sum(dim=1) == 1).all()


def test_induction_repeats_random_ordinary_tokens(model: Any) -> None:
    pairs = tasks.induction(model, 5, seed=1, length=6)
    start = pairs.clean.shape[1] - 11
    first, end = pairs.clean[:, start : start + 5], pairs.clean[:, start + 5]
    again = pairs.clean[:, -5:]
    assert torch.equal(first, again)
    assert torch.equal(end, pairs.answer)
    assert torch.equal(pairs.corrupted[:, start + 5], pairs.foil)
    assert ((pairs.clean != pairs.corrupted).sum(dim=1) == 1).all()
    assert int(pairs.clean[:, start:].min()) >= len(SPECIAL)
    with pytest.raises(ValueError, match="length must be below the 97 ordinary tokens"):
        tasks.induction(model, 2, length=97)


@pytest.mark.parametrize("name", WORDS)
def test_too_few_whole_words_are_told(model: Any, name: str) -> None:
    # Every word but w4, w5, ... is unknown, one token all the same: so split all of them.
    split = tiny_model("llama", n_layers=2)
    split.tokenizer = _Letters()
    with pytest.raises(ValueError, match=f"{name}: needs at least .* keeps whole, found 0 of"):
        tasks.TASKS[name](split)


def test_too_many_pairs_are_told(reader: Any) -> None:
    with pytest.raises(ValueError, match=r"capitals: needs at least 99 different pairs"):
        tasks.capitals(reader, 99)
    with pytest.raises(ValueError, match="n_pairs must be at least 1"):
        tasks.capitals(reader, 0)


class _Letters:
    """A tokenizer that splits everything into letters."""

    all_special_ids = ()
    bos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 + 4 for letter in text]}
