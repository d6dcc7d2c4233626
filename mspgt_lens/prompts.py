"""Prompt data sets: windows of tokens with the group (document) that each came from."""

from __future__ import annotations

import json
import reprlib
import textwrap
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from dataclasses import dataclass, replace
from importlib import resources
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.contract import counted
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.padding import real_spans

DEFAULT_LENGTH = 128
_SHOWN = 12


@dataclass(frozen=True, repr=False)
class Prompt:
    """One window of tokens.

    Attributes:
        tokens: Token ids without padding, BOS included where the model takes one.
        group: What the window belongs to; folds and intervals resample groups.
    """

    tokens: Int[np.ndarray, " pos"]
    group: Hashable

    def __repr__(self) -> str:
        return f"Prompt of {_extent([self])}: {shown_tokens(self.tokens)}"


@dataclass(frozen=True, repr=False)
class Passage:
    """One built-in passage.

    Attributes:
        topic: One of 12 topics, such as ``"sea"``.
        form: ``"narrative"``, ``"explanation"``, ``"dialogue"`` or ``"instructions"``.
        text: 180 to 260 words about one thing from start to end.
    """

    topic: str
    form: str
    text: str

    def __repr__(self) -> str:
        beginning = textwrap.shorten(self.text, 60, placeholder=" ...")
        return f"Passage, {self.form} about {self.topic}: {beginning}"


class PromptDataset:
    """Prompts as windows of tokens, made by one of the ``from_*`` constructors.

    A data set built from a list can be read again and again. One built from an iterator is read
    once, lazily, so that a corpus larger than memory streams through.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | Callable[[], Iterator[Prompt]],
        *,
        padding_known: bool = True,
        about: str = "prompts that are made as they are read",
    ) -> None:
        self._prompts, self._padding_known, self._about = prompts, padding_known, about

    def __iter__(self) -> Iterator[Prompt]:
        return self._prompts() if callable(self._prompts) else iter(self._prompts)

    def __repr__(self) -> str:
        # What is read lazily is not read for this: it may be read once only.
        if callable(self._prompts):
            return f"PromptDataset: {self._about}"
        held = counted(len(self._prompts), "prompt")
        if not self._prompts:
            return f"PromptDataset of {held}"
        lines = [
            f"PromptDataset of {held}, {_extent(self._prompts)}",
            f"First: {shown_tokens(self._prompts[0].tokens)}",
        ]
        if not self._padding_known:
            lines.append("Padding is told apart when the prompts meet a model.")
        return "\n".join(lines)

    def for_model(self, model: Any) -> PromptDataset:
        """The same prompts without the padding that their tokens brought and no mask declared.

        Which id pads is known to the model's tokenizer. Every function of this package that takes
        prompts and a model does this by itself.

        Args:
            model: The TransformerLens model, for its tokenizer.

        Returns:
            The data set itself where no padding is unknown; else one whose prompts lack it, read
            lazily.

        Raises:
            ValueError: If padding cannot be told from text: give a mask to :meth:`from_tokens`.
        """
        if self._padding_known:
            return self
        prompts = list(self)
        spans = real_spans(as_adapter(model), [prompt.tokens for prompt in prompts])
        own = [replace(p, tokens=p.tokens[at]) for p, at in zip(prompts, spans, strict=True)]
        if all(len(a.tokens) == len(b.tokens) for a, b in zip(prompts, own, strict=True)):
            return self
        return PromptDataset(own)

    def shuffled(self, special: Collection[int], *, seed: int = 0) -> PromptDataset:
        """The same prompts with each one's ordinary tokens in random order.

        Args:
            special: Ids of tokens that keep their places.
            seed: Decides the order, together with the prompt's own tokens.

        Returns:
            A data set of as many prompts, as long and in the same groups, read lazily.
        """

        def windows() -> Iterator[Prompt]:
            for prompt in self:
                tokens = prompt.tokens.copy()
                free = np.flatnonzero(~np.isin(tokens, sorted(special)))
                rng = np.random.default_rng(stable_hash(tokens.tobytes(), seed))
                tokens[free] = tokens[rng.permutation(free)]
                yield replace(prompt, tokens=tokens)

        return PromptDataset(windows, about="prompts whose tokens are shuffled as they are read")

    @classmethod
    def from_texts(
        cls,
        model: Any,
        texts: Iterable[str],
        *,
        max_length: int = DEFAULT_LENGTH,
        groups: Iterable[Hashable] | None = None,
    ) -> PromptDataset:
        """Tokenize texts and cut long ones into windows that keep their text's group.

        Args:
            model: The TransformerLens model, for its tokenizer; every window starts with BOS where
                the model takes one (an encoder's with its classification token, and ends with its
                separator).
            texts: Texts; a list, or any iterable of strings, which is read lazily.
            max_length: Longest window in tokens, BOS included.
            groups: One label per text; by default every text is a group of its own.

        Returns:
            The windows, tokenized anew whenever they are read.

        Raises:
            TypeError: If ``texts`` is a single string, or holds something else than strings; or if
                a label cannot be hashed.
            ValueError: If ``max_length`` does not fit the model, or texts and groups differ in
                number, or a label is missing (None, NaN).

        Example:
            >>> prompts = ml.PromptDataset.from_texts(model, ["w4 w5 w6 w7", "w8 w9"], max_length=4)
            >>> [prompt.tokens.tolist() for prompt in prompts]
            [[1, 4, 5, 6], [1, 7], [1, 8, 9]]
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of strings, got one string: pass [text]")
        return cls._from_pairs(
            lambda: _pair(texts, groups),
            isinstance(texts, Iterator) or isinstance(groups, Iterator),
            model,
            max_length,
            counted(len(texts), "text") if isinstance(texts, Sized) else "texts",
        )

    @classmethod
    def from_huggingface(
        cls,
        model: Any,
        dataset: Iterable[Any],
        *,
        column: str = "text",
        group_column: str | None = None,
        max_length: int = DEFAULT_LENGTH,
    ) -> PromptDataset:
        """Prompts from a column of a Hugging Face data set, streaming ones included.

        Args:
            model: The TransformerLens model, for its tokenizer.
            dataset: A ``datasets.Dataset`` or ``IterableDataset``, or any iterable of mappings.
            column: The column with the text.
            group_column: The column with the group; by default every row is a group of its own.
            max_length: Longest window in tokens.

        Returns:
            The windows of all rows, read lazily, as by :meth:`from_texts`.

        Raises:
            TypeError: If the data set is several splits, or does not give rows.
            KeyError: If a row lacks a column; the message lists those it has.
            ValueError: If a row's group is missing (None, NaN).

        Example:
            >>> rows = [{"text": "w4 w5 w6", "author": "A"}, {"text": "w7 w8", "author": "B"}]
            >>> prompts = ml.PromptDataset.from_huggingface(model, rows, group_column="author")
            >>> [prompt.group for prompt in prompts]
            ['A', 'B']
        """
        if isinstance(dataset, Mapping):
            names = [str(name) for name in dataset]
            raise TypeError(
                f"dataset must be one split, whose rows are mappings; got a "
                f"{type(dataset).__name__} of {', '.join(names)}: choose one, such as "
                f"dataset[{(names or ['train'])[0]!r}] (columns become rows by "
                "datasets.Dataset.from_dict)"
            )

        def pairs() -> Iterator[tuple[str, Hashable]]:
            for index, row in enumerate(dataset):
                if not isinstance(row, Mapping):
                    raise TypeError(
                        f"dataset must give rows that are mappings, got {type(row).__name__} at "
                        f"index {index}; texts go to from_texts, a table's to_dict('records') "
                        "gives rows"
                    )
                for name in (column, group_column):
                    if name is not None and name not in row:
                        raise KeyError(f"column {name!r} is missing; row {index} has {list(row)}")
                yield row[column], index if group_column is None else row[group_column]

        rows = counted(len(dataset), "row") if isinstance(dataset, Sized) else "rows"
        source = f"column {column!r} of {rows}"
        return cls._from_pairs(pairs, isinstance(dataset, Iterator), model, max_length, source)

    @classmethod
    def _from_pairs(
        cls,
        pairs: Callable[[], Iterator[tuple[str, Hashable]]],
        one_shot: bool,
        model: Any,
        max_length: int,
        source: str,
    ) -> PromptDataset:
        adapter = as_adapter(model)
        prefix, suffix = list(adapter.prefix), list(adapter.suffix)
        least = max(2, len(prefix) + len(suffix) + 1)
        if not least <= max_length <= adapter.n_ctx:
            raise ValueError(
                f"max_length must be between {least} and the context of {adapter.name} "
                f"({adapter.n_ctx}), got {max_length}"
            )
        step = max_length - len(prefix) - len(suffix)
        used = False

        def windows() -> Iterator[Prompt]:
            nonlocal used
            if one_shot and used:
                raise ValueError(
                    "prompts were built from an iterator, which can be read once and has been; "
                    "build them again, or from a list"
                )
            used = True
            blank = 0
            for index, (text, group) in enumerate(pairs()):
                if not isinstance(text, str):
                    raise TypeError(
                        f"texts must hold strings, got {type(text).__name__} at index {index}"
                    )
                try:
                    ids = adapter.tokenize(text) if text.strip() else []
                except ValueError as error:
                    raise ValueError(f"{error} (text {index})") from error
                label = group_label(group, index)
                blank += not ids
                for start in range(0, len(ids), step):
                    yield Prompt(np.array(prefix + ids[start : start + step] + suffix), label)
            if blank:
                tell(f"{blank} blank texts hold no token and were left out")

        about = (
            f"windows of up to {max_length} tokens from {source}, tokenized for {adapter.name} as "
            "they are read"
        )
        return cls(windows, about=about + (", once" if one_shot else ""))

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, "prompt pos"] | Sequence[Sequence[int]],
        mask: Bool[Tensor, "prompt pos"] | None = None,
        groups: Iterable[Hashable] | None = None,
    ) -> PromptDataset:
        """Prompts that are already tokens.

        Args:
            tokens: Token ids, one row per prompt; rows of a list may differ in length.
            mask: True (or 1) where a token is not padding, on either side. By default the padding
                of rows of one length is what the model's tokenizer pads with, at their ends, found
                when the prompts meet the model.
            groups: One label per prompt; by default every prompt is a group of its own.

        Returns:
            One prompt per row, without padding where the mask tells it.

        Raises:
            ValueError: If shapes do not agree, a prompt is empty, or a label is missing (None,
                NaN).

        Example:
            >>> prompts = ml.PromptDataset.from_tokens([[11, 12, 13], [14, 15]], groups=["a", "b"])
            >>> [prompt.tokens.tolist() for prompt in prompts]
            [[11, 12, 13], [14, 15]]
        """
        rows = [_token_row(row, index) for index, row in enumerate(_on_cpu(tokens))]
        if mask is not None:
            keep = [np.asarray(row).astype(bool) for row in _on_cpu(mask)]
            shapes = [row.shape for row in rows], [row.shape for row in keep]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"mask must have the shape of tokens, got {len(keep)} rows for {len(rows)} "
                    "or rows of other lengths"
                )
            for index, k in enumerate(keep):
                if (np.diff(np.flatnonzero(k)) != 1).any():
                    raise ValueError(
                        f"mask must have padding at the ends only; prompt {index} has it inside"
                    )
            rows = [row[k] for row, k in zip(rows, keep, strict=True)]
        for index, row in enumerate(rows):
            if not row.size:
                raise ValueError(
                    f"tokens must hold a token in every prompt; prompt {index} has none after "
                    "removing padding"
                )
        labels: list[Hashable] = list(range(len(rows))) if groups is None else list(groups)
        if len(labels) != len(rows):
            raise ValueError(
                f"groups must have one label per prompt ({len(rows)}), got {len(labels)}"
            )
        labels = [group_label(label, index) for index, label in enumerate(labels)]
        prompts = [Prompt(row, label) for row, label in zip(rows, labels, strict=True)]
        # Rows that differ in length were not padded to one.
        padding_known = mask is not None or len({len(row) for row in rows}) > 1
        return cls(prompts, padding_known=padding_known)


def as_dataset(prompts: PromptDataset | Iterable[str], model: Any) -> PromptDataset:
    """A data set without padding; texts through :meth:`PromptDataset.from_texts`."""
    if isinstance(prompts, PromptDataset):
        return prompts.for_model(model)
    if isinstance(prompts, Tensor):
        raise TypeError("prompts must be texts or a PromptDataset: use PromptDataset.from_tokens")
    longest = min(DEFAULT_LENGTH, as_adapter(model).n_ctx)
    return PromptDataset.from_texts(model, prompts, max_length=longest)


@in_own_state
def load_passages() -> list[Passage]:
    """The built-in prompts: 120 passages of connected English prose, 10 on each of 12 topics.

    Written for this package. Each is 180 to 260 words about one thing from start to end, so that
    its beginning tells a reader something about its end.

    Returns:
        The passages, topic by topic.

    Example:
        >>> passages = ml.load_passages()
        >>> len(passages), len({passage.topic for passage in passages})
        (120, 12)
    """
    text = resources.files("mspgt_lens").joinpath("data/passages.jsonl").read_text("utf-8")
    return [Passage(**json.loads(line)) for line in text.splitlines()]


def check_prompt(adapter: ModelAdapter, prompt: Prompt, index: int) -> None:
    """See that a model can read a prompt.

    Raises:
        ValueError: If it is longer than the context, or holds tokens outside the vocabulary.
    """
    tokens = prompt.tokens
    if len(tokens) > adapter.n_ctx:
        raise ValueError(
            f"prompt {index} has {len(tokens)} tokens, more than the context of {adapter.name} "
            f"({adapter.n_ctx}): cut it into windows"
        )
    if tokens.min() < 0 or tokens.max() >= adapter.d_vocab:
        raise ValueError(
            f"prompt {index} has a token outside the vocabulary of {adapter.name} (0 to "
            f"{adapter.d_vocab - 1}): {tokens.min()} to {tokens.max()}; was it made by another "
            "tokenizer?"
        )


def count_tokens(adapter: ModelAdapter, prompts: Iterable[Prompt]) -> Int[np.ndarray, " vocab"]:
    """How often each token occurs as ordinary text: special ones (BOS, EOS ...) count 0."""
    counts = np.zeros(adapter.d_vocab, dtype=np.int64)
    for prompt in prompts:
        counts += np.bincount(prompt.tokens, minlength=len(counts))
    counts[sorted(adapter.special_ids)] = 0
    return counts


def n_ordinary(adapter: ModelAdapter, prompt: Prompt) -> int:
    """The number of a prompt's tokens that are ordinary text."""
    return int((~np.isin(prompt.tokens, sorted(adapter.special_ids))).sum())


def group_label(label: Any, index: int) -> Hashable:
    """A group's label as it is compared and hashed.

    Raises:
        ValueError: If it is missing: None, NaN, or what a table has in their place.
        TypeError: If it cannot be hashed.
    """
    if isinstance(label, Tensor):
        # Tensors hash by identity: equal labels would be groups of their own.
        label = label.item()
    missing = not isinstance(label, str) and str(label).lower() in ("none", "nan", "nat", "<na>")
    if missing:
        raise ValueError(
            f"groups must label every prompt; the one at index {index} has {label!r}: fill in what "
            "is missing, or leave groups out, and each is a group of its own"
        )
    try:
        hash(label)
    except TypeError as error:
        raise TypeError(
            f"groups must hold labels that can be hashed, such as strings; index {index} has "
            f"{label!r}"
        ) from error
    labeled: Hashable = label
    return labeled


def stack_rows(
    rows: Sequence[Int[np.ndarray, " pos"]],
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    """Token rows as one batch, padded on the right, with its mask (True = not padding).

    Padding on the right keeps every real token at its own position, whatever a model class does
    with masks; id 0 fills the gaps and no valid position ever reads it.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row)] = True
    return tokens, mask


def shown_tokens(tokens: Int[np.ndarray, " pos"]) -> str:
    """The first tokens, as text."""
    more = " ..." if len(tokens) > _SHOWN else ""
    return " ".join(str(int(token)) for token in tokens[:_SHOWN]) + more


def extent_words(lengths: Sequence[int]) -> str:
    """How long prompts are, in words."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return counted(longest, "token")
    return f"{shortest:,} to {longest:,} tokens"


def group_words(groups: Sequence[Hashable]) -> str:
    """The groups of prompts, in words."""
    names = list(dict.fromkeys(groups))
    return f"group {reprlib.repr(names[0])}" if len(names) == 1 else f"{len(names):,} groups"


def _extent(prompts: Sequence[Prompt]) -> str:
    lengths = extent_words([len(prompt.tokens) for prompt in prompts])
    return f"{lengths}, {group_words([prompt.group for prompt in prompts])}"


def _token_row(row: Any, index: int) -> Int[np.ndarray, " pos"]:
    array = np.asarray(row)
    # An empty list has no integer type of its own.
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"tokens must be whole numbers [prompt, pos]; prompt {index} has shape {array.shape} "
            f"of {array.dtype}"
        )
    return array.astype(np.int64)


def _on_cpu(rows: Any) -> Any:
    return rows.cpu() if isinstance(rows, Tensor) else rows


def _pair(
    texts: Iterable[str], groups: Iterable[Hashable] | None
) -> Iterator[tuple[str, Hashable]]:
    if groups is None:
        for index, text in enumerate(texts):
            yield text, index
        return
    ended: Any = object()
    for text, group in zip_longest(texts, groups, fillvalue=ended):
        # Told by hand: an error that the texts raise themselves may be a ValueError, too.
        if text is ended or group is ended:
            raise ValueError("groups must have one label per text: their numbers differ")
        yield text, group
