"""What tokenizers do to texts: ids without a text, spaces put before every text, halved pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import SPECIAL, random_tokens, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mspgt_lens as ml
from mspgt_lens.models import as_adapter, generate
from mspgt_lens.patching import tasks

NAMES = "Mary John Tom James Anna Paul"
REST = (
    "Then and went to the store park . gave a book drink The key keys dog dogs that he saw near "
    "river table is are capital of France Paris Italy Rome Japan Tokyo city My neighbor doctor "
    "hospital teacher school"
)
METASPACE, PREPEND, BYTES, WORDPIECE = "metaspace", "prepend", "bytes", "wordpiece"
KINDS = (METASPACE, PREPEND, BYTES, WORDPIECE)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that keeps these words whole after a space and falls back to letters.

    Metaspace and Prepend put a space before every text, as Llama 2's do (new and legacy files); the
    space is part of a word's token. Bytes do so without putting one. WordPiece has no spaces.
    """
    words = [*NAMES.split(), *REST.split()]
    letters = [chr(i) for i in range(33, 127)]
    mark = {METASPACE: "\u2581", PREPEND: "\u2581", BYTES: "\u0120", WORDPIECE: ""}[kind]
    pieces = [*SPECIAL, *(mark + word for word in words), *words, mark or "##", *letters]
    pieces += [f"##{letter}" for letter in letters] if kind == WORDPIECE else []
    pieces = list(dict.fromkeys(pieces))
    if kind == WORDPIECE:
        ids = {piece: index for index, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token=SPECIAL[3]))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
    else:
        scores = [(piece, -1.0 if len(piece) > 1 else -20.0) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
        if kind == METASPACE:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        elif kind == PREPEND:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
            )
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace(mark, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
    )


def model_with(tokenizer: Any, vocab: int | None = None, **sizes: int) -> Any:
    model = tiny_model("llama", n_layers=2, vocab=vocab or len(tokenizer), **sizes)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module", params=KINDS)
def reader(request: pytest.FixtureRequest) -> Any:
    return model_with(tokenizer_of(request.param), n_ctx=512)


# ------------------------------------------------------------ the token that follows a prompt


def test_the_answer_is_the_token_that_follows_the_prompt(reader: Any) -> None:
    clean, corrupted = "John gave a book to", "Mary gave a book to"
    pairs = ml.PromptPairs.from_texts(reader, [clean], [corrupted], [" Mary"], [" John"])
    ids = reader.tokenizer(f"{clean} Mary", add_special_tokens=False)["input_ids"]
    assert pairs.clean[0].tolist() == [1, *ids[:-1]]
    assert pairs.answer.tolist() == ids[-1:]
    assert reader.tokenizer.convert_ids_to_tokens(ids[-1]).endswith("Mary")


@pytest.mark.parametrize("name", ["indirect_objects", "subject_verb_agreement", "capitals"])
def test_word_tasks_work_and_answers_continue_their_prompts(reader: Any, name: str) -> None:
    pairs = tasks.TASKS[name](reader, 3)
    tokenizer = reader.tokenizer
    for rows, ends in ((pairs.clean, pairs.answer), (pairs.corrupted, pairs.foil)):
        for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            word = tokenizer.decode([end]).strip()
            together = tokenizer(f"{text} {word}", add_special_tokens=False)["input_ids"]
            assert together == [*row[1:], end]


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "message"),
    [
        (METASPACE, "a book to ", "Mary", "move the space from the prompt's end to the beginning"),
        (PREPEND, "a book to ", "Mary", "move the space from the prompt's end to the beginning"),
        (BYTES, "a book t", "he", "begin the answer with a space"),
        (BYTES, "a book to", " Xy", r"which is 3 tokens: \[.*keeps whole"),
        (METASPACE, "a book to", "", r"which is 0 tokens: \[\]"),
    ],
)
def test_hints_point_the_right_way(kind: str, prompt: str, answer: str, message: str) -> None:
    model = model_with(tokenizer_of(kind))
    with pytest.raises(ValueError, match=rf"answer must be a single token; pair 0 .*{message}"):
        ml.PromptPairs.from_texts(model, [prompt], [prompt], [answer], [" John"])


@pytest.mark.parametrize("kind", [METASPACE, PREPEND, BYTES])
def test_the_text_of_a_token_keeps_its_space(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    adapter = as_adapter(model_with(tokenizer))
    ids = tokenizer("a book.", add_special_tokens=False)["input_ids"]
    texts = adapter.token_texts(ids)
    assert texts[-2:] == [" book", "."]
    assert "".join(texts).strip() == "a book."


@pytest.mark.parametrize("kind", [METASPACE, PREPEND])
def test_windows_of_a_document_are_cut_from_its_own_tokens(kind: str) -> None:
    model = model_with(tokenizer_of(kind))
    text = " ".join(REST.split())
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = ml.PromptDataset.from_texts(model, [text], max_length=8)
    assert [i for p in windows for i in p.tokens.tolist()[1:]] == ids
    # The mark alone is a space, and no more special than another piece.
    alone = model.tokenizer.convert_tokens_to_ids("\u2581")
    assert model.tokenizer.decode([alone]).strip() == ""
    assert alone not in as_adapter(model).special_ids


# -------------------------------------------------------------------------- ids without a text


def padded_vocabulary() -> Any:
    """Ids 101 to 127 are the model's alone; an added token is special by its own word."""
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.add_tokens([AddedToken("<extra>", special=True), AddedToken("w900")])
    return model_with(tokenizer, vocab=128)


def test_ids_without_a_text_and_added_special_ones_are_special() -> None:
    model = padded_vocabulary()
    assert 101 not in model.tokenizer.all_special_ids
    assert as_adapter(model).special_ids == {0, 1, 2, 3, 101, *range(103, 128)}


def test_holes_in_a_vocabulary_are_special() -> None:
    ids = {word: index for index, word in enumerate(SPECIAL)} | {"": 4, "w5": 5, "w9": 9}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[3])),
        unk_token=SPECIAL[3],
    )
    assert as_adapter(model_with(tokenizer, vocab=11)).special_ids == {3, 4, 6, 7, 8, 10}


def test_ids_beyond_the_model_are_none_of_its_special_ids() -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    assert tokenizer.pad_token_id == 101
    adapter = as_adapter(model_with(tokenizer, vocab=101))
    assert (adapter.special_ids, adapter.pad_id) == ({0, 1, 2, 3}, 101)
    new = generate(adapter, list(random_tokens(2, 8).numpy()), n_new=5)
    assert new.min() > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_what_has_no_text_is_not_generated(temperature: float) -> None:
    model = padded_vocabulary()
    prompts = list(random_tokens(6, 8).numpy())
    new = generate(
        as_adapter(model), prompts, n_new=30, temperature=temperature, seeds=list(range(6))
    )
    assert np.isin(new, [*range(4, 101), 102]).all()


def test_tasks_and_controls_leave_them_alone() -> None:
    model = padded_vocabulary()
    pairs = tasks.induction(model, 40, length=20)
    assert np.isin(pairs.clean[:, 1:].numpy(), [*range(4, 101), 102]).all()
    row = torch.cat([torch.tensor([1, 120, 101]), random_tokens(1, 30)[0]])
    data = ml.PromptDataset.from_tokens([row.tolist()])
    shuffled = next(iter(data.shuffled(as_adapter(model).special_ids)))
    assert shuffled.tokens[:3].tolist() == [1, 120, 101]


# -------------------------------------------------------------------------------- halved pairs


def test_half_a_surrogate_pair_is_named_with_its_text() -> None:
    model = model_with(tiny_tokenizer())
    with pytest.raises(ValueError, match=r"character 3, in 'w9 .ud83d w8'.*\(text 1\)"):
        list(ml.PromptDataset.from_texts(model, ["w7", "w9 \ud83d w8"]))
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        ml.PromptPairs.from_texts(model, ["w9 \ud83d"], ["w9 w8"], ["w7"], ["w8"])
