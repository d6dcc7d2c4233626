"""Prompt data sets: windows, groups, padding, laziness, and the built-in passages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import mspgt_lens as ml
from mspgt_lens.folds import stable_hash
from mspgt_lens.prompts import as_dataset, stack_rows

BOS = 1
WORDS = random_tokens(4, 23)
TEXTS = [as_text(row) for row in WORDS]


@pytest.fixture(scope="module")
def model() -> Any:
    """Takes BOS."""
    model = tiny_model("llama", n_layers=2)
    model.tokenizer = tiny_tokenizer()
    return model


@pytest.fixture(scope="module")
def model_without_bos() -> Any:
    model = tiny_model("qwen2", n_layers=2)
    model.tokenizer = tiny_tokenizer()
    model.cfg.default_prepend_bos = False
    return model


def rows(dataset: ml.PromptDataset) -> list[tuple[list[int], Any]]:
    return [(prompt.tokens.tolist(), prompt.group) for prompt in dataset]


@pytest.mark.parametrize("max_length", [2, 5, 12, 23, 24, 25, 256])
def test_windows_cover_the_text_once_keep_its_group_and_begin_with_bos(
    model: Any, max_length: int
) -> None:
    windows = rows(ml.PromptDataset.from_texts(model, TEXTS, max_length=max_length, groups="abcd"))
    for group, words in zip("abcd", WORDS.tolist(), strict=True):
        mine = [tokens for tokens, label in windows if label == group]
        assert all(tokens[0] == BOS and tokens.count(BOS) == 1 for tokens in mine)
        assert all(len(tokens) == max_length for tokens in mine[:-1])
        assert 2 <= len(mine[-1]) <= max_length
        assert [token for tokens in mine for token in tokens[1:]] == words


@pytest.mark.parametrize("max_length", [2, 23, 24])
def test_windows_without_bos_where_the_model_takes_none(
    model_without_bos: Any, max_length: int
) -> None:
    windows = rows(ml.PromptDataset.from_texts(model_without_bos, TEXTS, max_length=max_length))
    for index, words in enumerate(WORDS.tolist()):
        mine = [tokens for tokens, label in windows if label == index]
        assert all(len(tokens) == max_length for tokens in mine[:-1])
        assert [token for tokens in mine for token in tokens] == words


def test_a_tokenizer_that_adds_bos_itself_does_not_double_it() -> None:
    model = tiny_model("llama", n_layers=2)
    model.tokenizer = tiny_tokenizer.__wrapped__()
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert model.tokenizer("w9")["input_ids"] == [1, 9, 2]
    assert rows(ml.PromptDataset.from_texts(model, ["w9 w8"])) == [([1, 9, 8], 0)]


def test_every_text_is_a_group_of_its_own_unless_told(model: Any) -> None:
    own = ml.PromptDataset.from_texts(model, TEXTS, max_length=12)
    assert Counter(group for _, group in rows(own)) == {0: 3, 1: 3, 2: 3, 3: 3}
    told = ml.PromptDataset.from_texts(model, TEXTS, groups=["x", "x", "y", "y"])
    assert [group for _, group in rows(told)] == ["x", "x", "y", "y"]


@pytest.mark.parametrize("groups", [["a"], list("abcde"), iter("abcde")])
def test_texts_and_groups_must_agree_in_number(model: Any, groups: Any) -> None:
    with pytest.raises(ValueError, match="groups must have one label per text"):
        list(ml.PromptDataset.from_texts(model, TEXTS, groups=groups))


@pytest.mark.parametrize("max_length", [-1, 0, 1, 257])
def test_max_length_must_fit_the_model(model: Any, max_length: int) -> None:
    with pytest.raises(ValueError, match=rf"max_length.*between 2 and .*\(256\), got {max_length}"):
        ml.PromptDataset.from_texts(model, TEXTS, max_length=max_length)


def test_a_model_without_tokenizer_is_told_what_to_use(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"PromptDataset\.from_tokens"):
        list(ml.PromptDataset.from_texts(tiny("llama"), TEXTS))


def test_a_single_string_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"one string: pass \[text\]"):
        ml.PromptDataset.from_texts(model, TEXTS[0])
    with pytest.raises(TypeError, match=r"one string: pass \[text\]"):
        ml.profile_layers(model, TEXTS[0])


@pytest.mark.parametrize("thing", [None, 7, ["w9"], b"w9"])
def test_what_is_no_string_is_refused_by_index(model: Any, thing: Any) -> None:
    with pytest.raises(TypeError, match=f"got {type(thing).__name__} at index 1"):
        list(ml.PromptDataset.from_texts(model, ["w9", thing]))


def test_blank_texts_are_left_out_with_a_warning(model: Any) -> None:
    dataset = ml.PromptDataset.from_texts(model, ["w9", "", "w8", " \n\t"])
    with pytest.warns(UserWarning, match="2 blank texts"):
        windows = rows(dataset)
    assert windows == [([BOS, 9], 0), ([BOS, 8], 2)]


# ------------------------------------------------------------------------------- laziness


def counted(texts: list[str], taken: list[int]) -> Iterator[str]:
    for index, text in enumerate(texts):
        taken.append(index)
        yield text


def test_an_iterator_is_read_one_text_at_a_time(model: Any) -> None:
    taken: list[int] = []
    dataset = ml.PromptDataset.from_texts(model, counted(TEXTS, taken), max_length=12)
    assert taken == []
    stream = iter(dataset)
    assert taken == []
    seen = [next(stream).group for _ in range(4)]
    assert (seen, taken) == ([0, 0, 0, 1], [0, 1])


def test_groups_are_read_along_with_texts(model: Any) -> None:
    taken: list[int] = []
    dataset = ml.PromptDataset.from_texts(model, TEXTS, groups=counted(list("abcd"), taken))
    stream = iter(dataset)
    assert (next(stream).group, taken) == ("a", [0])


@pytest.mark.parametrize(
    "dataset",
    [
        lambda model: ml.PromptDataset.from_texts(model, iter(TEXTS)),
        lambda model: ml.PromptDataset.from_texts(model, TEXTS, groups=iter("abcd")),
        lambda model: ml.PromptDataset.from_huggingface(model, iter([{"text": "w9"}])),
    ],
    ids=["texts", "groups", "rows"],
)
def test_a_second_reading_of_an_iterator_is_an_error(
    model: Any, dataset: Callable[[Any], ml.PromptDataset]
) -> None:
    prompts = dataset(model)
    assert list(prompts)
    with pytest.raises(ValueError, match="iterator, which can be read once"):
        list(prompts)


def test_a_list_can_be_read_again(model: Any) -> None:
    dataset = ml.PromptDataset.from_texts(model, TEXTS, groups=list("abcd"))
    assert rows(dataset) == rows(dataset) != []


# ------------------------------------------------------------------- Hugging Face data sets


def test_rows_of_mappings(model: Any) -> None:
    data = [{"body": "w9 w8", "doc": "x"}, {"body": "w7", "doc": "x"}, {"body": "w6", "doc": "y"}]
    by_row = ml.PromptDataset.from_huggingface(model, data, column="body")
    assert rows(by_row) == [([1, 9, 8], 0), ([1, 7], 1), ([1, 6], 2)]
    by_doc = ml.PromptDataset.from_huggingface(model, data, column="body", group_column="doc")
    assert rows(by_doc) == rows(by_doc) == [([1, 9, 8], "x"), ([1, 7], "x"), ([1, 6], "y")]


def test_real_data_sets_whole_and_streaming(model: Any) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"text": TEXTS, "doc": [7, 7, 8, 8]})
    expected = rows(ml.PromptDataset.from_texts(model, TEXTS, max_length=9, groups=[7, 7, 8, 8]))
    for data in (whole, whole.to_iterable_dataset()):
        prompts = ml.PromptDataset.from_huggingface(model, data, group_column="doc", max_length=9)
        assert rows(prompts) == expected


@pytest.mark.parametrize("names", [{"column": "text"}, {"column": "body", "group_column": "text"}])
def test_a_missing_column_lists_those_there_are(model: Any, names: dict[str, str]) -> None:
    data = [{"body": "w9", "doc": 1}]
    with pytest.raises(KeyError, match=r"'text' is missing; row 0 has \['body', 'doc'\]"):
        list(ml.PromptDataset.from_huggingface(model, data, **names))


def test_a_column_of_something_else_than_text_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="got NoneType at index 0"):
        list(ml.PromptDataset.from_huggingface(model, [{"text": None}]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [], "test": []}, r"one split.*dict of train, test.*dataset\['train'\]"),
        ({}, r"one split"),
        (["w9"], "rows that are mappings, got str at index 0.*from_texts"),
    ],
    ids=["splits", "nothing", "texts"],
)
def test_what_gives_no_rows_is_told_what_to_give(model: Any, data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        list(ml.PromptDataset.from_huggingface(model, data))


def test_splits_of_a_real_data_set_and_tables_are_told(model: Any) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    with pytest.raises(TypeError, match=r"DatasetDict of train: choose one, such as .*'train'"):
        ml.PromptDataset.from_huggingface(model, splits)
    table = pandas.DataFrame({"text": TEXTS})
    with pytest.raises(TypeError, match=r"got str at index 0.*to_dict\('records'\)"):
        list(ml.PromptDataset.from_huggingface(model, table))
    rows_of = ml.PromptDataset.from_huggingface(model, table.to_dict("records"))
    assert rows(rows_of) == rows(ml.PromptDataset.from_texts(model, TEXTS))


MISSING = [None, float("nan"), np.float64("nan"), np.datetime64("NaT"), torch.tensor(torch.nan)]


@pytest.mark.parametrize("label", MISSING, ids=lambda x: type(x).__name__)
def test_a_missing_group_is_named_by_index(model: Any, label: Any) -> None:
    groups = ["a", label, "b", label]
    given: list[Callable[[], Any]] = [
        lambda: ml.PromptDataset.from_tokens(WORDS, groups=groups),
        lambda: list(ml.PromptDataset.from_texts(model, TEXTS, groups=groups)),
        lambda: list(
            ml.PromptDataset.from_huggingface(
                model,
                [{"text": t, "g": g} for t, g in zip(TEXTS, groups, strict=True)],
                group_column="g",
            )
        ),
        lambda: ml.PromptPairs.from_tokens(WORDS, WORDS, range(4), range(4), groups=groups),
    ]
    for make in given:
        with pytest.raises(ValueError, match=r"groups must label.*index 1 has .*leave groups out"):
            make()


@pytest.mark.parametrize("label", [None, float("nan")])
def test_a_missing_group_is_named_wherever_arrays_are_given(label: Any) -> None:
    z = np.random.default_rng(0).normal(size=(40, 2))
    groups = [*range(39), label]
    given: list[Callable[[], Any]] = [
        lambda: ml.mutual_information(z, z, groups=groups),
        lambda: ml.arrays.bottleneck_frontier(z, z, groups=groups),
        lambda: ml.arrays.fit_hvib_arrays(z[None], {"local": z}, groups, progress=False),
    ]
    for make in given:
        with pytest.raises(ValueError, match=r"groups must label.*index 39 has"):
            make()


def test_groups_are_compared_by_value_and_must_be_hashable(model: Any) -> None:
    groups = torch.tensor([0, 0, 1, 1])
    for labels in (groups, groups.numpy(), list(groups)):
        data = ml.PromptDataset.from_tokens(WORDS, groups=labels)
        assert [prompt.group for prompt in data] == [0, 0, 1, 1]
        assert len({prompt.group for prompt in data}) == 2
        pairs = ml.PromptPairs.from_tokens(WORDS, WORDS, range(4), range(4), groups=labels)
        assert len(set(pairs.groups)) == 2
    with pytest.raises(TypeError, match=r"can be hashed.*index 0 has \[1\]"):
        ml.PromptDataset.from_tokens(WORDS, groups=[[1], [2], [3], [4]])


# ---------------------------------------------------------------------------------- tokens


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Prompts of lengths 6, 2 and 4 as a batch padded on one side with an ordinary token."""
    lengths = [6, 2, 4]
    tokens, mask = torch.full((3, 6), 50), torch.zeros(3, 6, dtype=torch.bool)
    for index, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(6 - length, 6)
        tokens[index, at] = WORDS[index, :length]
        mask[index, at] = True
    return tokens, mask, [WORDS[i, :n].tolist() for i, n in enumerate(lengths)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.int()]
)
def test_padding_on_either_side_gives_the_same_prompts(
    side: str, form: Callable[[torch.Tensor], Any]
) -> None:
    tokens, mask, expected = padded(side)
    dataset = ml.PromptDataset.from_tokens(form(tokens), form(mask), groups="aab")
    assert rows(dataset) == list(zip(expected, "aab", strict=True))
    assert rows(dataset) == rows(ml.PromptDataset.from_tokens(expected, groups="aab"))


def test_tokens_without_a_mask_are_all_text() -> None:
    dataset = ml.PromptDataset.from_tokens(WORDS)
    assert rows(dataset) == [(row, index) for index, row in enumerate(WORDS.tolist())]


def test_a_hole_in_the_mask_is_refused_by_prompt() -> None:
    mask = torch.ones(4, 23, dtype=torch.bool)
    mask[2, 10] = False
    with pytest.raises(ValueError, match="at the ends only; prompt 2 has it inside"):
        ml.PromptDataset.from_tokens(WORDS, mask)


@pytest.mark.parametrize("shape", [(4, 22), (3, 23), (4, 23, 1)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mask must have the shape of tokens"):
        ml.PromptDataset.from_tokens(WORDS, torch.ones(shape, dtype=torch.bool))


def test_an_empty_prompt_is_refused_by_index() -> None:
    with pytest.raises(ValueError, match="prompt 1 has"):
        ml.PromptDataset.from_tokens([[5, 6], []])
    mask = torch.ones(4, 23, dtype=torch.bool)
    mask[3] = False
    with pytest.raises(ValueError, match="prompt 3 has"):
        ml.PromptDataset.from_tokens(WORDS, mask)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("tokens", [WORDS[0], WORDS[None]], ids=["one prompt", "three axes"])
def test_tokens_are_prompts_by_positions(tokens: torch.Tensor, with_mask: bool) -> None:
    mask = torch.ones_like(tokens, dtype=torch.bool) if with_mask else None
    with pytest.raises(ValueError, match=r"\[prompt, pos\]"):
        ml.PromptDataset.from_tokens(tokens, mask)


def test_fractions_are_no_tokens() -> None:
    with pytest.raises((TypeError, ValueError), match="tokens"):
        ml.PromptDataset.from_tokens(torch.tensor([[5.5, 6.9]]))


@pytest.mark.parametrize("groups", [[], [1, 2, 3], iter(range(5))])
def test_tokens_and_groups_must_agree_in_number(groups: Any) -> None:
    with pytest.raises(ValueError, match=r"one label per prompt \(4\), got"):
        ml.PromptDataset.from_tokens(WORDS, groups=groups)


def test_what_profile_layers_takes(model: Any) -> None:
    dataset = ml.PromptDataset.from_tokens(WORDS)
    assert as_dataset(dataset, model) is dataset
    assert rows(as_dataset(TEXTS, model)) == rows(ml.PromptDataset.from_texts(model, TEXTS))
    with pytest.raises(TypeError, match=r"PromptDataset\.from_tokens"):
        as_dataset(WORDS, model)


def test_rows_are_stacked_with_padding_on_the_right() -> None:
    tokens, mask = stack_rows([np.array([7, 8]), np.array([9]), np.array([4, 5, 6])])
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == [
        [7, 8],
        [9],
        [4, 5, 6],
    ]


def test_hashes_are_the_same_in_every_process() -> None:
    # BLAKE2b with 8 bytes of b"'sea'\x000\x00", the least significant byte first.
    assert stable_hash("sea", 0) == 597214695987759179
    different = [("a", "b"), ("ab",), ("a", b"b"), ("b", "a"), ("a", "b", 0), (1,), ("1",)]
    assert len({stable_hash(*parts) for parts in different}) == len(different)


# -------------------------------------------------------------------------------- passages


def test_passages_are_many_and_spread_over_topics() -> None:
    passages = ml.load_passages()
    topics = Counter(passage.topic for passage in passages)
    assert len(passages) == 120
    assert len(topics) >= 10
    assert min(topics.values()) >= 8
    forms = {"narrative", "explanation", "dialogue", "instructions"}
    assert {passage.form for passage in passages} == forms


def test_every_passage_is_180_to_260_words_of_plain_ascii() -> None:
    for passage in ml.load_passages():
        assert 180 <= len(passage.text.split()) <= 260, passage.text[:60]
        assert passage.text.isascii()
        assert passage.text == passage.text.strip()
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", passage.text)


def test_no_passage_repeats_another() -> None:
    passages = ml.load_passages()
    assert len({passage.text for passage in passages}) == len(passages)
    # Nor does one share a run of eight words with another.
    first_with: dict[tuple[str, ...], int] = {}
    for index, passage in enumerate(passages):
        words = re.findall(r"[a-z']+", passage.text.lower())
        for run in zip(*(words[k:] for k in range(8)), strict=False):
            other = first_with.setdefault(run, index)
            assert other == index, f"{' '.join(run)!r} is in passages {other} and {index}"


def test_an_error_in_the_texts_is_not_taken_for_a_wrong_number_of_groups(model):
    def texts():
        yield TEXTS[0]
        raise ValueError("line 2 is no JSON")

    with pytest.raises(ValueError, match="line 2 is no JSON"):
        list(ml.PromptDataset.from_texts(model, texts(), groups=["a", "b"]))
