"""One text read through a lens: what every site predicts at every position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.contract import Result, Rows, counted, named
from mspgt_lens.halving import Halving, Span
from mspgt_lens.models import ModelAdapter, own_attention
from mspgt_lens.prompts import Prompt, PromptDataset, check_prompt

# Tokens kept of each prediction.
N_TOP = 5
_TOKENS_PER_RUN = 2048
_LOGITS_PER_CHUNK = 50_000_000
_SHOWN_POSITIONS = 5
_REMEDY = "a shorter text, or more devices"
_SHOWN_SITES = 5
Decoder = Callable[[int, Float[Tensor, "pos d_model"]], Float[Tensor, "pos vocab"]]


@dataclass(frozen=True, eq=False, repr=False)
class LensReading(Result):
    """What every site predicts at every position of one text.

    Sites run from 0, before the first block, to L, after the last one, which is the model itself.

    Attributes:
        model_name: The model.
        tokens: The text of each token that was read; for an encoder, of those that were hidden.
        positions: Each one's place in the prompt, from 0, shape ``[pos]``.
        answers: Id of the token to be predicted there: the next one, or the hidden one; -1 where
            the text ends. Shape ``[pos]``.
        top: Ids of the most probable tokens, the first of them first, shape ``[site, pos, top]``.
        probability: Their probabilities, shape ``[site, pos, top]``.
        entropy: Entropy of the whole prediction (nats), shape ``[site, pos]``.
        rank: Rank of the answer among all tokens, 1 for the most probable; 0 where there is no
            answer. Shape ``[site, pos]``.
        texts: Token id to its text, for all of ``answers`` and ``top``.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    tokens: tuple[str, ...]
    positions: Int[np.ndarray, " pos"]
    answers: Int[np.ndarray, " pos"]
    top: Int[np.ndarray, "site pos top"]
    probability: Float[np.ndarray, "site pos top"]
    entropy: Float[np.ndarray, "site pos"]
    rank: Int[np.ndarray, "site pos"]
    texts: Mapping[int, str]
    warnings: tuple[str, ...] = ()

    def heading(self) -> str:
        """How much text, through how many sites."""
        return (
            f"LensReading{named(self.model_name)}: {counted(len(self.tokens), 'token')} at "
            f"{counted(len(self.top), 'site')}"
        )

    def rows(self) -> Rows:
        """The most probable token at a few sites, at the last positions."""
        places = range(len(self.tokens))[-_SHOWN_POSITIONS:]
        last = len(self.top) - 1
        sites = sorted({round(site) for site in np.linspace(0, last, _SHOWN_SITES)})
        rows: Rows = [("most probable", *(repr(self.tokens[pos]) for pos in places))]
        for site in sites:
            best = (
                f"{self.texts[int(self.top[site, pos, 0])]!r} {self.probability[site, pos, 0]:.2f}"
                for pos in places
            )
            rows.append((f"site {site}", *best))
        return rows

    def findings(self) -> list[str]:
        """From which site on the prediction at the last position stays as it is."""
        best = self.top[:, -1, 0]
        other = np.flatnonzero(best != best[-1])
        settled = int(other[-1]) + 1 if len(other) else 0
        return [
            f"At {self.tokens[-1]!r}, the last position, {self.texts[int(best[-1])]!r} is the most "
            f"probable token from site {settled} on."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity, site and position: ``model, quantity, site, position, token``.

        The quantities are the ``probability`` of the most probable token, which ``token`` names,
        the ``entropy``, and the ``rank`` of the answer, where there is one; with ``value, unit``.
        """
        n_sites, n_pos = self.entropy.shape
        site, place = np.divmod(np.arange(n_sites * n_pos), n_pos)
        tokens = [self.texts[int(token)] for token in self.top[:, :, 0].flat]
        quantities = (
            ("probability", self.probability[:, :, 0], "share"),
            ("entropy", self.entropy, "nats"),
            ("rank", self.rank, "rank"),
        )
        frames = [
            pd.DataFrame(
                {
                    "model": self.model_name,
                    "quantity": quantity,
                    "site": site,
                    "position": self.positions[place],
                    "token": tokens,
                    "value": values.flatten().astype(float),
                    "unit": unit,
                }
            )
            for quantity, values, unit in quantities
        ]
        frames[-1] = frames[-1][frames[-1]["value"] > 0]
        return pd.concat(frames, ignore_index=True)


def read_text(
    adapter: ModelAdapter,
    text: str | Sequence[int] | Int[Tensor, " pos"],
    decode: Decoder,
    skip_first: int,
) -> LensReading:
    """What every site predicts at every position of one text.

    Args:
        adapter: The model.
        text: A text, or its token ids as the model takes them.
        decode: From a site and its residual stream to logits.
        skip_first: Positions at the beginning that the lens was not fitted on.
    """
    prompt = _as_prompt(adapter, text)
    tokens = torch.from_numpy(prompt.tokens)
    with adapter.inference(), own_attention(adapter):
        if adapter.mask_id is None:
            places = torch.arange(len(tokens))
            sites = _residuals(adapter, tokens[None], places, whole=True)
            answers = torch.cat([tokens[1:], torch.tensor([-1])])
        else:
            special = torch.tensor(sorted(adapter.special_ids), dtype=torch.long)
            places = torch.nonzero(~torch.isin(tokens, special))[:, 0]
            if not len(places):
                raise ValueError("text holds special tokens only, so there is nothing to hide")
            hidden = tokens.repeat(len(places), 1)
            hidden[torch.arange(len(places)), places] = adapter.mask_id
            sites = _residuals(adapter, hidden, places, whole=False)
            answers = tokens[places]
        decoding = Halving(rows="positions", remedy=_REMEDY)
        seen = [
            _predictions(adapter, decode, site, rows, answers, decoding)
            for site, rows in sites.items()
        ]
    top, probability, entropy, rank = (np.stack(part) for part in zip(*seen, strict=True))
    ids = sorted({int(i) for i in top.flat} | {int(i) for i in answers if i >= 0})
    note = f"the first {skip_first} tokens lie outside of what the lens was fitted on (skip_first)"
    return LensReading(
        model_name=adapter.name,
        tokens=tuple(adapter.token_texts(tokens[places].tolist())),
        positions=places.numpy(),
        answers=answers.numpy(),
        top=top,
        probability=probability,
        entropy=entropy,
        rank=rank,
        texts=dict(zip(ids, adapter.token_texts(ids), strict=True)),
        warnings=(note,) if skip_first and int(places[0]) < skip_first else (),
    )


def _as_prompt(adapter: ModelAdapter, text: Any) -> Prompt:
    if isinstance(text, str):
        windows = list(PromptDataset.from_texts(adapter, [text], max_length=adapter.n_ctx))
        if len(windows) != 1:
            raise ValueError(
                "text must hold a token"
                if not windows
                else f"text must fit the context of {adapter.name}, {adapter.n_ctx} tokens; got "
                f"{sum(len(window.tokens) for window in windows)}: cut it"
            )
        return windows[0]
    ids = torch.as_tensor(text).cpu()
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            "text must be one text, or the token ids of one as a vector of whole numbers; got "
            f"shape {tuple(ids.shape)} of {ids.dtype}"
        )
    prompt = Prompt(ids.long().numpy(), 0)
    check_prompt(adapter, prompt, 0)
    return prompt


def _residuals(
    adapter: ModelAdapter,
    tokens: Int[Tensor, "prompt pos"],
    places: Int[Tensor, " place"],
    *,
    whole: bool,
) -> dict[int, Float[Tensor, "place d_model"]]:
    """Every site's residual stream at some places: of the one prompt, or one place of each."""

    def run(span: Span) -> dict[int, Tensor]:
        rows = tokens[span.rows]
        at = places if whole else places[span.rows]
        prompt = torch.zeros_like(at) if whole else torch.arange(len(rows))
        found: dict[int, Tensor] = {}

        def keep(site: int, residual: Tensor) -> None:
            found[site] = residual[prompt, at]

        adapter.run(rows, torch.ones_like(rows, dtype=torch.bool), keep)
        return found

    kept: dict[int, list[Tensor]] = {}
    halving = Halving(rows="copies of the text", remedy=_REMEDY)
    for batch in Span(0, len(tokens), tokens.shape[1]).parts(_TOKENS_PER_RUN):
        for found in halving.each(batch, run):
            for site, rows in found.items():
                kept.setdefault(site, []).append(rows)
    return {site: torch.cat(parts) for site, parts in kept.items()}


def _predictions(
    adapter: ModelAdapter,
    decode: Decoder,
    site: int,
    rows: Float[Tensor, "pos d_model"],
    answers: Int[Tensor, " pos"],
    halving: Halving,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Most probable tokens, their probabilities, entropy and the answer's rank at one site."""

    def run(span: Span) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = decode(site, rows[span.rows])
        if not bool(torch.isfinite(logits.sum())):
            raise FloatingPointError(
                f"predictions at site {site} are NaN or infinite; load the model in float32"
            )
        log_share = logits.log_softmax(dim=1)
        best = log_share.topk(min(N_TOP, logits.shape[1]), dim=1)
        wanted = answers[span.rows].to(logits.device)[:, None]
        above = (logits > logits.gather(1, wanted.clamp(min=0))).sum(dim=1)
        entropy = -(log_share.exp() * log_share).sum(dim=1)
        rank = torch.where(wanted[:, 0] < 0, 0, 1 + above)
        told = (best.indices, best.values, entropy, rank)
        indices, values, entropy, rank = (part.cpu() for part in told)
        return indices, values.double().exp(), entropy.double(), rank

    whole = Span(0, len(rows), 1).parts(_LOGITS_PER_CHUNK // adapter.d_vocab)
    parts = [found for batch in whole for found in halving.each(batch, run)]
    best_ids, shares, entropies, ranks = (
        torch.cat(part).numpy() for part in zip(*parts, strict=True)
    )
    return best_ids, shares, entropies, ranks
