"""Pairs of prompts that differ in what decides the answer, for activation patching."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import counted
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.padding import real_spans
from mspgt_lens.prompts import extent_words, group_label, group_words, shown_tokens, stack_rows


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """Clean and corrupted prompts, token by token alike in length, with the answers at stake.

    Attributes:
        clean: Tokens of the prompts whose next token is the answer, shape ``[pair, pos]``.
        corrupted: Tokens of the prompts whose next token is the foil, shape ``[pair, pos]``.
        mask: True where a token is not padding; padding is at one end, shape ``[pair, pos]``.
        answer: The token that continues the clean prompt, shape ``[pair]``.
        foil: The token that continues the corrupted prompt, shape ``[pair]``.
        groups: What each pair belongs to; intervals and tests resample groups. By default every
            pair is a group of its own.
        padding_known: Whether ``mask`` tells all padding; else :meth:`for_model` finds it.
    """

    clean: Int[Tensor, "pair pos"]
    corrupted: Int[Tensor, "pair pos"]
    mask: Bool[Tensor, "pair pos"]
    answer: Int[Tensor, " pair"]
    foil: Int[Tensor, " pair"]
    groups: tuple[Hashable, ...]
    padding_known: bool = True

    def __post_init__(self) -> None:
        shape = self.clean.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"clean must have shape [pair, pos], got {tuple(shape)}")
        for name in ("corrupted", "mask"):
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(
                    f"{name} must have the shape of clean, {tuple(shape)}, got {tuple(got)}"
                )
        for name in ("answer", "foil"):
            got = getattr(self, name).shape
            if got != shape[:1]:
                raise ValueError(
                    f"{name} must hold one token per pair ({shape[0]}), got shape {tuple(got)}"
                )
        if len(self.groups) != shape[0]:
            raise ValueError(
                f"groups must have one label per pair ({shape[0]}), got {len(self.groups)}"
            )
        labels = tuple(group_label(label, index) for index, label in enumerate(self.groups))
        object.__setattr__(self, "groups", labels)
        for index, row in enumerate(self.mask.numpy()):
            real = np.flatnonzero(row)
            if not len(real) or (np.diff(real) != 1).any():
                raise ValueError(
                    f"mask must leave a token, and have padding at the ends only; pair {index} "
                    f"has {row.astype(int).tolist()}"
                )
        differ = (self.clean != self.corrupted) & ~self.mask
        if differ.any():
            raise ValueError(
                f"clean and corrupted must have the same padding; pair "
                f"{int(differ.nonzero()[0, 0])} differs where the mask is False"
            )

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        first = self.mask[0].numpy()
        clean, corrupted = (
            shown_tokens(tokens[0].numpy()[first]) for tokens in (self.clean, self.corrupted)
        )
        lengths = extent_words([int(n) for n in self.mask.sum(dim=1)])
        lines = [
            f"PromptPairs of {counted(len(self), 'pair')}, {lengths}, {group_words(self.groups)}",
            f"First: clean {clean}, answer {int(self.answer[0])}",
            f"       corrupted {corrupted}, foil {int(self.foil[0])}",
        ]
        if not self.padding_known:
            lines.append("Padding is told apart when the pairs meet a model.")
        return "\n".join(lines)

    @property
    def last(self) -> Int[Tensor, " pair"]:
        """Position of each pair's last token, where the answer is read."""
        position = torch.arange(self.mask.shape[1])
        return torch.where(self.mask, position, -1).max(dim=1).values

    @property
    def first_difference(self) -> Int[Tensor, " pair"]:
        """First position where clean and corrupted differ; the number of positions if none."""
        position = torch.arange(self.mask.shape[1])
        return torch.where(self.clean != self.corrupted, position, self.mask.shape[1]).amin(dim=1)

    def for_model(self, model: Any) -> PromptPairs:
        """The same pairs with a mask for the padding that their tokens brought and nobody declared.

        Which id pads is known to the model's tokenizer. Patching does this by itself.

        Args:
            model: The TransformerLens model, for its tokenizer.

        Returns:
            The pairs themselves where all padding is known; else a copy with a mask for it.

        Raises:
            ValueError: If padding cannot be told from text (give a mask to :meth:`from_tokens`), or
                the prompts of a pair differ in length without it.
        """
        if self.padding_known:
            return self
        adapter = as_adapter(model)
        clean, corrupted = (
            real_spans(adapter, list(tokens.numpy()), ends_matter=True)
            for tokens in (self.clean, self.corrupted)
        )
        mask = torch.zeros_like(self.mask)
        for index, (a, b) in enumerate(zip(clean, corrupted, strict=True)):
            if a != b:
                raise ValueError(
                    f"clean and corrupted must have as many tokens; without padding, pair {index} "
                    f"has {a.stop - a.start} and {b.stop - b.start}: give mask= if nothing is "
                    "padding"
                )
            mask[index, a] = True
        return replace(self, mask=mask, padding_known=True)

    @classmethod
    @in_own_state
    def from_tokens(
        cls,
        clean: Int[Tensor, "pair pos"] | Sequence[Sequence[int]],
        corrupted: Int[Tensor, "pair pos"] | Sequence[Sequence[int]],
        answer: Int[Tensor, " pair"] | Sequence[int],
        foil: Int[Tensor, " pair"] | Sequence[int],
        *,
        mask: Bool[Tensor, "pair pos"] | None = None,
        groups: Iterable[Hashable] | None = None,
    ) -> PromptPairs:
        """Pairs that are already tokens.

        Args:
            clean: Token ids, one row per pair; rows of a list may differ in length from pair to
                pair, and are padded on the right.
            corrupted: Token ids; each row as long as its clean one.
            answer: One token per pair.
            foil: One token per pair.
            mask: True (or 1) where a token is not padding, on either side; only with rows of one
                length. By default it is what the model's tokenizer pads with, at the ends of rows
                of one length, found when the pairs meet the model.
            groups: One label per pair; by default every pair is a group of its own.

        Returns:
            The pairs, their prompts as two tensors ``[pair, pos]``.

        Raises:
            ValueError: If the two prompts of a pair differ in length (shows the pair), or shapes do
                not agree.

        Example:
            >>> pairs = ml.PromptPairs.from_tokens([[11, 12, 13]], [[11, 14, 13]], [15], [16])
            >>> pairs.first_difference
            tensor([1])
        """
        rows = [_token_rows(name, x) for name, x in (("clean", clean), ("corrupted", corrupted))]
        if len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"corrupted must have one prompt per clean one ({len(rows[0])}), got {len(rows[1])}"
            )
        if not rows[0]:
            raise ValueError("clean must hold at least one prompt, got none")
        for index, (a, b) in enumerate(zip(*rows, strict=True)):
            if len(a) != len(b):
                raise ValueError(
                    f"clean and corrupted must have as many tokens; pair {index} has {len(a)} and "
                    f"{len(b)}: {a.tolist()} and {b.tolist()}"
                )
        stacked, real = stack_rows(rows[0])
        if mask is not None:
            real = torch.as_tensor(mask).cpu().bool()
        return cls(
            clean=stacked,
            corrupted=stack_rows(rows[1])[0],
            mask=real,
            answer=_single_tokens("answer", answer),
            foil=_single_tokens("foil", foil),
            groups=tuple(range(len(rows[0]))) if groups is None else tuple(groups),
            # Rows that differ in length were not padded to one.
            padding_known=mask is not None or bool((~real).any()),
        )

    @classmethod
    @in_own_state
    def from_texts(
        cls,
        model: Any,
        clean: Sequence[str],
        corrupted: Sequence[str],
        answer: Sequence[str],
        foil: Sequence[str],
        *,
        groups: Iterable[Hashable] | None = None,
    ) -> PromptPairs:
        """Pairs of texts; every prompt starts with BOS where the model takes one.

        Args:
            model: The TransformerLens model, for its tokenizer.
            clean: Texts whose next token is the answer.
            corrupted: Texts whose next token is the foil; as many tokens as the clean one each.
            answer: What continues each clean text, with its leading space if it has one: the one
                token that it adds when both are tokenized together.
            foil: What continues each corrupted text, likewise.
            groups: One label per pair; by default every pair is a group of its own.

        Returns:
            The pairs, tokenized, their prompts as two tensors ``[pair, pos]``.

        Raises:
            ValueError: If the two prompts of a pair differ in length, or an answer is not a single
                token; shows the texts and their tokens.
            TypeError: If texts are given as one string instead of a list.

        Example:
            >>> pairs = ml.PromptPairs.from_texts(
            ...     model, clean=["w4 w5 w6"], corrupted=["w4 w7 w6"], answer=[" w8"], foil=[" w9"]
            ... )
            >>> pairs.answer, pairs.foil
            (tensor([8]), tensor([9]))
        """
        adapter = as_adapter(model)
        by_argument = {"clean": clean, "corrupted": corrupted, "answer": answer, "foil": foil}
        for name, texts in by_argument.items():
            if isinstance(texts, str):
                raise TypeError(f"{name} must be a list of strings, got one string: pass [text]")
            if len(texts) != len(clean):
                raise ValueError(
                    f"{name} must have one text per pair ({len(clean)}), got {len(texts)}"
                )
        prefix = list(adapter.prefix)
        rows = {
            name: [prefix + adapter.tokenize(text) for text in by_argument[name]]
            for name in ("clean", "corrupted")
        }
        for index, (a, b) in enumerate(zip(rows["clean"], rows["corrupted"], strict=True)):
            if len(a) != len(b):
                raise ValueError(
                    f"clean and corrupted must have as many tokens; pair {index} has {len(a)} and "
                    f"{len(b)}:\n  {clean[index]!r}\n    {adapter.token_texts(a)}\n"
                    f"  {corrupted[index]!r}\n    {adapter.token_texts(b)}"
                )
        ends = {
            name: [
                _one_token(adapter, name, index, *texts)
                for index, texts in enumerate(
                    zip(by_argument[prompts], by_argument[name], strict=True)
                )
            ]
            for name, prompts in (("answer", "clean"), ("foil", "corrupted"))
        }
        pairs = cls.from_tokens(
            rows["clean"], rows["corrupted"], ends["answer"], ends["foil"], groups=groups
        )
        return replace(pairs, padding_known=True)


def added_tokens(adapter: ModelAdapter, text: str, more: str) -> list[int] | None:
    """The tokens that a continuation adds to a text's own when both are tokenized together.

    A continuation on its own may become other tokens: many tokenizers put a space before every
    text.

    Returns:
        None if the text itself is split otherwise before this continuation.
    """
    before, together = adapter.tokenize(text), adapter.tokenize(text + more)
    return together[len(before) :] if together[: len(before)] == before else None


def _token_rows(name: str, rows: Any) -> list[np.ndarray]:
    rows = rows.cpu() if isinstance(rows, Tensor) else rows
    arrays = []
    for index, row in enumerate(rows):
        array = np.asarray(row)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{name} must hold token ids [pair, pos]; pair {index} has shape {array.shape} of "
                f"{array.dtype}"
            )
        arrays.append(array.astype(np.int64))
    return arrays


def _single_tokens(name: str, tokens: Any) -> Tensor:
    ids = torch.as_tensor(tokens).cpu()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be token ids, got {ids.dtype}; texts go to from_texts")
    return ids.long()


def _one_token(adapter: ModelAdapter, name: str, index: int, prompt: str, text: str) -> int:
    added = added_tokens(adapter, prompt, text)
    if (added is None or len(added) != 1) and _ignores_spaces(adapter, prompt):
        added = added_tokens(adapter, prompt, f" {text}")
    if added is not None and len(added) == 1:
        return added[0]
    problem = f"{name} must be a single token; pair {index} has {text!r} after {prompt[-40:]!r}"
    if added is not None:
        raise ValueError(
            f"{problem}, which is {len(added)} tokens: {adapter.token_texts(added)}; choose a word "
            "that the tokenizer keeps whole, or give the tokens to from_tokens"
        )
    if prompt[-1:].isspace():
        hint = "move the space from the prompt's end to the beginning of the " + name
    elif not text[:1].isspace():
        hint = f"begin the {name} with a space if it is a word of its own"
    else:
        hint = "end the prompt elsewhere, or give the tokens to from_tokens"
    together = adapter.token_texts(adapter.tokenize(prompt + text)[-6:])
    raise ValueError(
        f"{problem}, and together they are split otherwise than the prompt alone: they end in "
        f"{together}; {hint}"
    )


def _ignores_spaces(adapter: ModelAdapter, text: str) -> bool:
    """Whether a space is no part of any token: then answers are given without it."""
    return adapter.tokenize(f"{text} ") == adapter.tokenize(text)
