"""Well-known tasks as pairs of prompts, made for the tokenizer of the model at hand.

Each task takes words that the tokenizer keeps whole, so that the two prompts of a pair, and all
prompts of a task, line up token by token. Whether the model can do the task is not looked at:
see ``PatchSweep.clean`` and ``.corrupted``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mspgt_lens.ambient import in_own_state
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.patching.pairs import PromptPairs, added_tokens

__all__ = ["capitals", "indirect_objects", "induction", "subject_verb_agreement", "topic_cue"]

_NAMES = (
    "Mary John Tom James Anna Paul Sarah David Emma Jack Kate Mark Lucy Peter Alice Henry "
    "Laura Simon Jane Adam Rose Frank Helen George Julia Martin Susan Robert Grace Daniel "
    "Linda Michael"
)
_PLACES = "store park school station office beach library garden hospital market museum"
_THINGS = "book drink ring letter ball key gift ticket box map hat cup coat phone"
_NOUNS = (
    "key keys, dog dogs, teacher teachers, car cars, picture pictures, child children, friend "
    "friends, door doors, tree trees, letter letters, student students, house houses, doctor "
    "doctors, book books, box boxes, horse horses, woman women, man men, window windows, "
    "farmer farmers, writer writers, cat cats, bird birds, bottle bottles"
)
_NEAR = "river table wall road garden station bridge kitchen church lake gate tower"
_CAPITALS = (
    "France Paris, Italy Rome, Japan Tokyo, Spain Madrid, Germany Berlin, England London, "
    "Egypt Cairo, Russia Moscow, China Beijing, Greece Athens, Cuba Havana, Austria Vienna, "
    "Portugal Lisbon, Norway Oslo, Sweden Stockholm, Ireland Dublin, Poland Warsaw, Turkey "
    "Ankara, Peru Lima, Iran Tehran, Iraq Baghdad, Kenya Nairobi, Thailand Bangkok, Vietnam "
    "Hanoi, Hungary Budapest, Belgium Brussels, Denmark Copenhagen, Chile Santiago, India "
    "Delhi, Lebanon Beirut, Scotland Edinburgh, Ukraine Kyiv, Syria Damascus"
)
_WORKPLACES = (
    "doctor hospital, teacher school, farmer farm, judge court, priest church, actor theater, "
    "chef restaurant, soldier army, pilot airport, librarian library, banker bank, miner "
    "mine, sailor ship, clerk office, gardener garden, monk temple, guard prison, singer "
    "opera, painter studio, politician parliament, scientist laboratory"
)
_EVENING = (
    "My neighbor is a {}. It was late when I came home, and the rain had not stopped all evening. "
    "There was a light in the window, so I knocked and asked how the day had been. The answer was "
    "a long sigh: nothing but trouble, from early morning on, at the"
)
_MAX_TRIES = 200


@in_own_state
def indirect_objects(model: Any, n_pairs: int = 16, seed: int = 0) -> PromptPairs:
    """Who is given something: "Then Mary and John went to the store. John gave a book to" Mary.

    Corrupted: the other name gives, so the answer is the other one.

    Args:
        model: The TransformerLens model, for its tokenizer.
        n_pairs: Number of pairs.
        seed: Decides the names, places and things, and which name comes first.

    Returns:
        The pairs, ``n_pairs`` of them, all different.

    Raises:
        ValueError: If too few of the words are single tokens.
    """
    task = _Task("indirect_objects", model, n_pairs, seed)
    names, places = task.whole(_NAMES.split(), 4), task.whole(_PLACES.split(), 1)
    things = task.whole(_THINGS.split(), 1)

    def draw() -> tuple[str, str, str, str]:
        first, second = (str(n) for n in task.rng.choice(names, 2, replace=False))
        place, thing = task.pick(places), task.pick(things)
        start = f"Then {first} and {second} went to the {place}. "
        giver, other = (second, first) if task.rng.random() < 0.5 else (first, second)
        end = f" gave a {thing} to"
        return start + giver + end, start + other + end, f" {other}", f" {giver}"

    return task.pairs(draw)


@in_own_state
def subject_verb_agreement(model: Any, n_pairs: int = 16, seed: int = 0) -> PromptPairs:
    """The verb's number: "The keys that he saw near the river" are; corrupted: "The key ..." is.

    Half of the clean prompts are plural.

    Args:
        model: The TransformerLens model, for its tokenizer.
        n_pairs: Number of pairs.
        seed: Decides nouns, places and numbers.

    Returns:
        The pairs, ``n_pairs`` of them, all different.

    Raises:
        ValueError: If too few of the words are single tokens.
    """
    task = _Task("subject_verb_agreement", model, n_pairs, seed)
    nouns = task.whole_pairs(_NOUNS, 2)
    places = task.whole(_NEAR.split(), 1)

    def draw() -> tuple[str, str, str, str]:
        singular, plural = nouns[int(task.rng.integers(len(nouns)))]
        end = f" that he saw near the {task.pick(places)}"
        texts, verbs = (f"The {singular}{end}", f"The {plural}{end}"), (" is", " are")
        i = int(task.rng.integers(2))
        return texts[i], texts[1 - i], verbs[i], verbs[1 - i]

    return task.pairs(draw)


@in_own_state
def capitals(model: Any, n_pairs: int = 16, seed: int = 0) -> PromptPairs:
    """A fact: "The capital of France is the city of" Paris; corrupted: another country.

    Each country is the clean one of a pair at most once while there are enough, but pairs may share
    countries across their two sides.

    Args:
        model: The TransformerLens model, for its tokenizer.
        n_pairs: Number of pairs.
        seed: Decides which countries meet.

    Returns:
        The pairs, ``n_pairs`` of them, all different.

    Raises:
        ValueError: If too few countries with their capitals are single tokens.
    """
    task = _Task("capitals", model, n_pairs, seed)
    return task.pairs(task.two_of(_CAPITALS, "The capital of {} is the city of"))


@in_own_state
def topic_cue(model: Any, n_pairs: int = 16, seed: int = 0) -> PromptPairs:
    """A cue far back: "My neighbor is a doctor. (50 words of evening rain) ... at the" hospital.

    Nothing in between depends on the cue. Corrupted: another profession.

    Args:
        model: The TransformerLens model, for its tokenizer.
        n_pairs: Number of pairs.
        seed: Decides which professions meet.

    Returns:
        The pairs, ``n_pairs`` of them, all different.

    Raises:
        ValueError: If too few professions with their workplaces are single tokens.
    """
    task = _Task("topic_cue", model, n_pairs, seed)
    return task.pairs(task.two_of(_WORKPLACES, _EVENING))


@in_own_state
def induction(model: Any, n_pairs: int = 16, seed: int = 0, length: int = 8) -> PromptPairs:
    """Repeated random tokens: ``a b ... y z a b ... y`` z; corrupted: the first z is another token.

    Needs no tokenizer. BOS comes first where the model takes one.

    Args:
        model: The TransformerLens model.
        n_pairs: Number of pairs.
        seed: Decides the tokens.
        length: Tokens before they repeat, at least 2.

    Returns:
        The pairs, each prompt of ``2 * length - 1`` tokens, after BOS where the model takes one.

    Raises:
        ValueError: If the vocabulary has too few ordinary tokens, ``length`` is below 2, or
            ``n_pairs`` below 1.

    Example:
        >>> pairs = ml.tasks.induction(model, n_pairs=4, length=5)
        >>> pairs.clean.shape, bool((pairs.clean[:, -5] == pairs.answer).all())
        (torch.Size([4, 10]), True)
    """
    adapter = as_adapter(model)
    if length < 2 or n_pairs < 1:
        raise ValueError(
            f"induction: length must be at least 2 and n_pairs at least 1, got {length}, {n_pairs}"
        )
    ordinary = np.setdiff1d(np.arange(adapter.d_vocab), sorted(adapter.special_ids))
    if len(ordinary) <= length:
        raise ValueError(
            f"induction: length must be below the {len(ordinary)} ordinary tokens, got {length}"
        )
    rng = np.random.default_rng(seed)
    prefix = list(adapter.prefix)
    rows: list[list[list[int]]] = [[], []]
    ends: list[list[int]] = [[], []]
    for _ in range(n_pairs):
        *start, answer, foil = rng.choice(ordinary, length + 1, replace=False).tolist()
        for side, end in enumerate((answer, foil)):
            rows[side].append([*prefix, *start, end, *start])
            ends[side].append(end)
    mask = torch.ones(n_pairs, len(rows[0][0]), dtype=torch.bool)
    return PromptPairs.from_tokens(rows[0], rows[1], ends[0], ends[1], mask=mask)


TASKS: Mapping[str, Callable[..., PromptPairs]] = {
    "indirect_objects": indirect_objects,
    "subject_verb_agreement": subject_verb_agreement,
    "capitals": capitals,
    "topic_cue": topic_cue,
    "induction": induction,
}


class _Task:
    """Words that stay whole, and pairs drawn from them without repeating."""

    def __init__(self, name: str, model: Any, n_pairs: int, seed: int) -> None:
        if n_pairs < 1:
            raise ValueError(f"{name}: n_pairs must be at least 1, got {n_pairs}")
        self.name, self.model, self.n_pairs = name, model, n_pairs
        self.adapter: ModelAdapter = as_adapter(model)
        self.rng = np.random.default_rng(seed)

    def whole(self, words: Sequence[str], needed: int) -> list[str]:
        """The words that are one token each after a space."""
        usable = [word for word in words if self._is_whole(word)]
        self._require(usable, needed, len(words), "words")
        return usable

    def whole_pairs(self, words: str, needed: int) -> list[tuple[str, str]]:
        """Entries, of two words each, of which both are one token each after a space."""
        listed = [tuple(entry.split()) for entry in words.split(", ")]
        usable = [(a, b) for a, b in listed if self._is_whole(a) and self._is_whole(b)]
        self._require(usable, needed, len(listed), "pairs of words")
        return usable

    def pick(self, words: Sequence[str]) -> str:
        return words[int(self.rng.integers(len(words)))]

    def two_of(self, answers: str, text: str) -> Callable[[], tuple[str, ...]]:
        """Draws of two cues: clean and corrupted text, and what each asks for."""
        entries = self.whole_pairs(answers, 2)
        order: list[int] = []

        def draw() -> tuple[str, ...]:
            if not order:
                order.extend(self.rng.permutation(len(entries)).tolist())
            first = order.pop()
            other = int(self.rng.integers(len(entries) - 1))
            a, b = entries[first], entries[other + (other >= first)]
            return text.format(a[0]), text.format(b[0]), f" {a[1]}", f" {b[1]}"

        return draw

    def pairs(self, draw: Callable[[], tuple[str, ...]]) -> PromptPairs:
        """As many different pairs as asked for."""
        drawn: dict[tuple[str, ...], None] = {}
        for _ in range(_MAX_TRIES * self.n_pairs):
            if len(drawn) == self.n_pairs:
                break
            drawn.setdefault(draw())
        self._require(list(drawn), self.n_pairs, len(drawn), "different pairs")
        clean, corrupted, answer, foil = (list(column) for column in zip(*drawn, strict=True))
        return PromptPairs.from_texts(self.model, clean, corrupted, answer, foil)

    def _is_whole(self, word: str) -> bool:
        added = added_tokens(self.adapter, "the", f" {word}")
        return added is not None and len(added) == 1

    def _require(self, usable: Sequence[Any], needed: int, n: int, what: str) -> None:
        if len(usable) < needed:
            raise ValueError(
                f"{self.name}: needs at least {needed} {what} that the tokenizer of "
                f"{self.adapter.name} keeps whole, found {len(usable)} of {n}; ask for fewer pairs "
                "(n_pairs), choose another task, or bring your own pairs"
            )
