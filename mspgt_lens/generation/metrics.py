"""Measures of a text, each a plain function of it; what is undefined is None, never a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import regex
import sentencex
from jaxtyping import Float

MTLD_THRESHOLD = 0.72
TEXT_EXTRA = 'pip install "mspgt-lens[text]"'
SPACY_PIPELINE = "en_core_web_sm"
SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# From sentences to one row each.
Embed = Callable[[Sequence[str]], Float[np.ndarray, "sentence feature"]]
Parse = Callable[[str], Any]

_SPLIT = regex.compile(r"\b", flags=regex.V1 | regex.WORD)
_HAS_LETTER = regex.compile(r"\p{L}")
_HAS_LETTER_OR_DIGIT = regex.compile(r"[\p{L}\p{N}]")


@dataclass(frozen=True)
class TextMetric:
    """One measure of a text.

    Attributes:
        name: Its name in results.
        scale: The scale whose interventions move it, as MSPGT's first version predicts: local
            ones lexical diversity, intermediate ones sentence structure and length, global ones
            discourse coherence.
        measure: From the text to its value, or None where it is undefined.
    """

    name: str
    scale: str
    measure: Callable[[str], float | None]


def words(text: str) -> list[str]:
    """The words of a text, in lower case; punctuation and emoji are none.

    By Unicode's rules of word boundaries (UAX 29): scripts without spaces are cut between
    characters (Han, Hiragana) or not at all (a run of Katakana is one word).
    """
    return [part.casefold() for part in _SPLIT.split(text) if _HAS_LETTER_OR_DIGIT.search(part)]


def mtld(text: str) -> float | None:
    """Measure of textual lexical diversity: words per factor (McCarthy and Jarvis 2010).

    A factor is a run of words whose share of different words has fallen to 0.72; what is left at
    the end counts in part. The mean of both reading directions. It varies little with
    the text's length from about 100 words on, and is noisy below: compare texts of one length.

    Returns:
        Words per factor; None where no word returns, so that there is no factor (short texts, or
        none at all): then nothing is known but that diversity is high for the length.
    """
    text_words = words(text)
    factors = [_factors(text_words), _factors(text_words[::-1])]
    if min(factors) == 0:
        return None
    return sum(len(text_words) / count for count in factors) / 2


def distinct(text: str, n: int) -> float | None:
    """Share of the runs of ``n`` words that differ (distinct-n, Li et al. 2016), in (0, 1].

    Returns:
        The share; None for fewer than ``n`` words.
    """
    runs = _runs(words(text), n)
    return len(set(runs)) / len(runs) if runs else None


def repetition(text: str, n: int = 4) -> float | None:
    """Share of the runs of ``n`` words that stood in the text before (Welleck et al. 2020), 0 to 1.

    Returns:
        The share; None for fewer than ``n`` words.
    """
    share = distinct(text, n)
    return None if share is None else 1.0 - share


def sentences(text: str) -> list[str]:
    """The sentences of a text (by ``sentencex``, with English abbreviations).

    A piece without a letter (a list's number, a blank line, emoji) is no sentence.
    """
    pieces = (str(piece).strip() for piece in sentencex.segment("en", text))
    return [piece for piece in pieces if _HAS_LETTER.search(piece)]


def sentence_count(text: str) -> float:
    """Number of sentences, the last one whether finished or not; 0 for a text without letters."""
    return float(len(sentences(text)))


def sentence_length(text: str) -> float | None:
    """Mean number of words per sentence; None for a text without sentences."""
    lengths = [len(words(sentence)) for sentence in sentences(text)]
    return float(np.mean(lengths)) if lengths else None


def coherence(text: str, embed: Embed) -> float | None:
    """Mean cosine between the embeddings of adjacent sentences, -1 to 1.

    What it means hangs on ``embed``.

    Args:
        text: The text.
        embed: From sentences to one vector each.

    Returns:
        The mean; None for fewer than two sentences, or where an embedding is zero.

    Raises:
        ValueError: If an embedding is not finite.
    """
    parts = sentences(text)
    if len(parts) < 2:
        return None
    vectors = np.asarray(embed(parts), dtype=float)
    if not np.isfinite(vectors).all():
        raise ValueError("embed must give finite vectors, got NaN or infinity")
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths == 0).any():
        return None
    unit = vectors / lengths[:, None]
    return float((unit[:-1] * unit[1:]).sum(axis=1).mean())


def dependency_depth(text: str, parse: Parse) -> float | None:
    """Mean over sentences of the deepest word's distance from the root of its dependency tree.

    Args:
        text: The text.
        parse: A spaCy pipeline with a parser.

    Returns:
        The mean, in arcs; None for a text without sentences.
    """
    parsed = [part for sentence in sentences(text) for part in parse(sentence).sents]
    return float(np.mean([_depth(part.root) for part in parsed])) if parsed else None


def text_metrics(embed: Embed | None = None) -> tuple[tuple[TextMetric, ...], dict[str, str]]:
    """The measures that this installation offers, and those that it leaves out.

    Dependency depth needs spaCy with its small English pipeline; semantic coherence needs
    sentence-transformers with its small general model.

    Args:
        embed: Sentence embeddings that need no extra package, for ``"embedding_coherence"``, which
            is left out without.

    Returns:
        ``(metrics, left_out)``: the measures; and why each missing one is, with the command
        that mends it.
    """
    metrics = [
        TextMetric("mtld", "local", mtld),
        TextMetric("distinct_1", "local", partial(distinct, n=1)),
        TextMetric("distinct_2", "local", partial(distinct, n=2)),
        TextMetric("repetition", "local", repetition),
        TextMetric("sentence_count", "intermediate", sentence_count),
        TextMetric("sentence_length", "intermediate", sentence_length),
    ]
    left_out = {}
    try:
        depth = partial(dependency_depth, parse=_spacy_parser())
        metrics.append(TextMetric("dependency_depth", "intermediate", depth))
    except (ImportError, OSError) as error:
        left_out["dependency_depth"] = (
            f"{_first_line(error)}: {TEXT_EXTRA} && python -m spacy download {SPACY_PIPELINE}"
        )
    if embed is not None:
        metrics.append(TextMetric("embedding_coherence", "global", partial(coherence, embed=embed)))
    try:
        similar = partial(coherence, embed=_sentence_embedder())
        metrics.append(TextMetric("semantic_coherence", "global", similar))
    except (ImportError, OSError) as error:
        left_out["semantic_coherence"] = (
            f"{_first_line(error)}: {TEXT_EXTRA} && python -c 'from sentence_transformers import "
            f'SentenceTransformer as S; S("{SENTENCE_MODEL}")\''
        )
    return tuple(metrics), left_out


def _factors(text_words: Sequence[str]) -> float:
    """Factors of MTLD in one direction; 0 where no word returns."""
    count, seen, length = 0.0, set[str](), 0
    for word in text_words:
        seen.add(word)
        length += 1
        if len(seen) / length <= MTLD_THRESHOLD:
            count, seen, length = count + 1, set(), 0
    if length:
        count += (1 - len(seen) / length) / (1 - MTLD_THRESHOLD)
    return count


def _runs(text_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text_words[start:] for start in range(n)), strict=False))


def _depth(root: Any) -> int:
    """Arcs from the root to its deepest word, level by level (deep trees need no recursion)."""
    depth, level = -1, [root]
    while level:
        depth += 1
        level = [child for word in level for child in word.children]
    return depth


def _spacy_parser() -> Parse:
    import spacy

    parse: Parse = spacy.load(SPACY_PIPELINE, exclude=["ner", "lemmatizer"])
    return parse


def _sentence_embedder() -> Embed:
    from sentence_transformers import SentenceTransformer

    # Measuring never downloads: the command that left_out gives does, once.
    model = SentenceTransformer(SENTENCE_MODEL, local_files_only=True)

    def embed(parts: Sequence[str]) -> Float[np.ndarray, "sentence feature"]:
        vectors: np.ndarray = model.encode(list(parts), show_progress_bar=False)
        return vectors

    return embed


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].rstrip(". ")
