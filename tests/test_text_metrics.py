"""Text measures against values worked out by hand, and on texts that have none."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import numpy as np
import pytest

from mspgt_lens.generation.metrics import (
    coherence,
    dependency_depth,
    distinct,
    mtld,
    repetition,
    sentence_count,
    sentence_length,
    sentences,
    text_metrics,
    words,
)
from mspgt_lens.prompts import load_passages


def test_words_by_unicodes_boundaries():
    assert words("Don't STOP, naïve café! 3.5 😀") == ["don't", "stop", "naïve", "café", "3.5"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("今日は晴れ") == ["今", "日", "は", "晴", "れ"]


def test_mtld_by_hand():
    # Forward: shares 1, 1, 1, 3/4, 3/5: a factor; then c b b a b: 1, 1, 2/3: a factor; a b is left.
    text = "a b c a b c b b a b"
    forward = 10 / 2
    # Backward: b a b (2/3): a factor; b c b (2/3): another; a c b a: shares 1, 1, 1, 3/4.
    backward = 10 / (2 + 0.25 / 0.28)
    assert mtld(text) == pytest.approx((forward + backward) / 2)


def test_mtld_of_prose_is_that_of_the_published_algorithm():
    """Values by LexicalRichness 0.5.1 on the same words."""
    found = [mtld(passage.text) for passage in load_passages()[:3]]
    np.testing.assert_allclose(
        found, [133.30618376230132, 109.08664690572586, 93.23066190015868], rtol=1e-9
    )


def test_distinct_and_repetition_by_hand():
    text = "the cat saw the cat saw the dog"
    assert distinct(text, 1) == 4 / 8
    assert distinct(text, 2) == 4 / 7
    # the cat saw the, cat saw the cat, saw the cat saw, the cat saw the (again), cat saw the dog
    assert repetition(text) == pytest.approx(1 / 5)
    assert repetition("a b c d") == 0.0


def test_sentences_are_found_and_pieces_without_letters_are_none():
    text = 'Dr. Smith left. "Why?" he said.\n\n1. 😀\nYes'
    assert sentences(text)[0] == "Dr. Smith left."
    assert sentence_count("One. Two words! Three more words?") == 3
    assert sentence_length("One. Two words! Three more words?") == 2
    assert sentence_count("今日は晴れです。明日は雨でしょう。") == 2


@pytest.mark.parametrize("text", ["", "   \n", "😀😀 😀", "?! ..."])
def test_texts_without_words_have_no_properties_but_no_sentences(text):
    metrics, _ = text_metrics(lambda found: np.ones((len(found), 2)))
    values = {metric.name: metric.measure(text) for metric in metrics}
    assert values.pop("sentence_count") == 0
    assert set(values.values()) == {None}


def test_one_word_has_no_pairs_and_no_factor():
    assert mtld("word") is None
    assert distinct("word", 1) == 1.0
    assert distinct("word", 2) is None
    assert repetition("word") is None
    assert sentence_length("word") == 1.0


def test_long_repeated_text_is_measured():
    text = "again and " * 20_000
    assert mtld(text) == pytest.approx(3.0, abs=0.01)
    assert repetition(text) > 0.999
    assert sentence_length(text) == 40_000


def test_coherence_is_the_mean_cosine_of_neighbors():
    vectors = {"A one.": [1.0, 0.0], "B two.": [3.0, 3.0], "C three.": [-2.0, 0.0]}
    value = coherence("A one. B two. C three.", lambda found: [vectors[one] for one in found])
    assert value == pytest.approx((np.sqrt(0.5) - np.sqrt(0.5)) / 2)
    assert coherence("A one. B two.", lambda found: np.array([[1.0, 1.0], [2.0, 2.0]])) == (
        pytest.approx(1.0)
    )
    assert coherence("A one.", lambda found: pytest.fail("nothing to compare")) is None
    assert coherence("A one. B two.", lambda found: np.zeros((2, 2))) is None
    with pytest.raises(ValueError, match="finite"):
        coherence("A one. B two.", lambda found: np.full((2, 2), np.nan))


def tree(*children):
    return SimpleNamespace(children=children)


def test_dependency_depth_is_the_mean_of_the_deepest_words():
    roots = {"Dogs bark.": tree(tree()), "The old cat slept.": tree(tree(tree(), tree()), tree())}
    parse = lambda one: SimpleNamespace(sents=[SimpleNamespace(root=roots[one])])  # noqa: E731
    assert dependency_depth("Dogs bark. The old cat slept.", parse) == 1.5
    assert dependency_depth("", parse) is None
    deep = tree()
    for _ in range(5000):
        deep = tree(deep)
    assert (
        dependency_depth("Deep.", lambda _: SimpleNamespace(sents=[SimpleNamespace(root=deep)]))
        == 5000
    )


def test_what_is_left_out_is_said_with_its_command(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("spacy", "sentence_transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    metrics, left_out = text_metrics()
    assert set(left_out) == {"dependency_depth", "semantic_coherence"}
    for reason in left_out.values():
        assert 'pip install "mspgt-lens[text]"' in reason
    assert {m.scale for m in metrics} == {"local", "intermediate"}
    assert "embedding_coherence" in {m.name for m in text_metrics(lambda s: np.ones((1, 1)))[0]}
