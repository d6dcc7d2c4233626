"""Padding that nobody declared: token rows of one length that came without a mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mspgt_lens.models import ModelAdapter

_REMEDY = (
    "give mask=, True where a token is not padding (all True if there is none; a tokenizer's "
    "attention_mask is one)"
)


def real_spans(
    adapter: ModelAdapter, rows: Sequence[Int[np.ndarray, " pos"]], *, ends_matter: bool = False
) -> list[slice]:
    """Where each row's own tokens are: what is left without the padding at its ends.

    Padding is the tokenizer's pad id at the ends of rows. Where that id also begins or ends texts
    (GPT-2 has one for BOS, EOS and padding), every row beginning with it shows a BOS, the last of
    the run, and every row ending with it once an EOS.

    Args:
        adapter: The model whose tokenizer padded the rows.
        rows: Token rows of one length, from one call.
        ends_matter: Whether something is read at a row's last token, so that an EOS there must
            not be guessed at.

    Raises:
        ValueError: If padding cannot be told from text, or a row holds nothing else.
    """
    pad = adapter.pad_id
    if pad is None:
        _refuse_runs(adapter, rows)
        return [slice(0, len(row)) for row in rows]
    lead, trail = (np.array([_run(row[::step], pad) for row in rows]) for step in (1, -1))
    for index, row in enumerate(rows):
        if lead[index] == len(row):
            raise ValueError(
                f"tokens must hold a token in every prompt; prompt {index} is nothing but the pad "
                f"id {pad} of {adapter.name}"
            )
    inside = any(
        (row[a : len(row) - b] == pad).any() for row, a, b in zip(rows, lead, trail, strict=True)
    )
    if pad in _separators(adapter):
        if lead.min() > 0 and (lead.max() == 1 or adapter.prefix == (pad,)):
            lead -= 1
        elif lead.max() == 1:
            raise ValueError(
                f"tokens: {adapter.name} pads with the id that separates texts ({pad}), and some "
                f"prompts begin with it: it may be either; {_REMEDY}"
            )
        if ends_matter and trail.min() > 0:
            raise ValueError(
                f"tokens: {adapter.name} pads with the id that ends texts ({pad}), and every "
                f"prompt ends with it: the last token may be either; {_REMEDY}"
            )
        if trail.min() == trail.max() == 1:
            trail[:] = 0
    elif inside and (lead.any() or trail.any()):
        raise ValueError(
            f"tokens: the pad id of {adapter.name} ({pad}) is at the ends of some prompts and "
            f"inside of some, so it may be padding or text; {_REMEDY}"
        )
    spans = [slice(int(a), len(row) - int(b)) for row, a, b in zip(rows, lead, trail, strict=True)]
    _refuse_runs(adapter, [row[span] for row, span in zip(rows, spans, strict=True)])
    return spans


def _separators(adapter: ModelAdapter) -> set[int]:
    """Ids that begin or end texts."""
    tokenizer = getattr(adapter.model, "tokenizer", None)
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return {int(i) for i in (getattr(tokenizer, name, None) for name in names) if i is not None}


def _run(row: Int[np.ndarray, " pos"], token: int) -> int:
    """How often a token is repeated from the row's first place on."""
    other = np.flatnonzero(row != token)
    return int(other[0]) if len(other) else len(row)


def _refuse_runs(adapter: ModelAdapter, rows: Sequence[Int[np.ndarray, " pos"]]) -> None:
    """Raise where rows seem to be padded with a token that is not known as padding.

    One token is repeated at the same end of many different rows: at least twice in a tenth of them
    (and in three), or five times in a twentieth. Texts hardly ever do that; padded batches do.
    """
    different = list({row.tobytes(): row for row in rows}.values())
    for end, step in (("begin", 1), ("end", -1)):
        twice, often = Counter[int](), Counter[int]()
        for row in different:
            token = int(row[::step][0])
            run = _run(row[::step], token)
            if 2 <= run < len(row):
                twice[token] += 1
                often[token] += run >= 5
        n = len(different)
        for token, count in twice.items():
            if count >= max(3, n / 10) or often[token] >= max(1, n / 20):
                known = "no pad id is known" if adapter.pad_id is None else "its pad id is another"
                raise ValueError(
                    f"tokens: {count} of {n} different prompts {end} with token {token} over and "
                    f"over, as if padded with it, but for {adapter.name} {known}; {_REMEDY}"
                )
