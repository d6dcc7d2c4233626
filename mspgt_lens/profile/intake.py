"""Activations that runs from elsewhere bring: which prompts they are, and what is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.gathering import (
    BatchReader,
    begin_batch,
    calibrate,
    finish_batch,
    make_batch,
)
from mspgt_lens.models import ModelAdapter, Part
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.prompts import Prompt

# Masked keys get exactly nothing; this leaves room for what half precision makes of that.
_ATTENDED = 1e-4


@dataclass(frozen=True)
class _Part:
    """The rows of one pass that belong to one fold."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    reader: BatchReader

    def take(self, tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
        """These rows from their first real token on."""
        length = self.reader.batch.tokens.shape[1]
        chosen = []
        for row, start in zip(self.rows, self.starts, strict=True):
            aligned = tensor[row]
            for axis in axes:
                aligned = aligned.roll(-start, dims=axis).narrow(axis, 0, length)
            chosen.append(aligned)
        return torch.stack(chosen)


class Intake:
    """Adds passes that were run elsewhere to a profile's moments.

    Args:
        run: The profile, not yet begun.
        prompts: All prompts that will come, without padding, in any order.
    """

    def __init__(self, run: ProfileRun, prompts: Sequence[Prompt]) -> None:
        self.run = run
        run.begin(prompts)
        self._waiting: dict[bytes, deque[tuple[int, Prompt]]] = {}
        for number, prompt in enumerate(prompts):
            self._waiting.setdefault(_key(prompt.tokens), deque()).append((number, prompt))
        self._lengths = sorted({len(prompt.tokens) for prompt in prompts}, reverse=True)
        self._parts: list[_Part] = []
        self._n_sites = self._n_patterns = 0

    @property
    def adapter(self) -> ModelAdapter:
        """The model."""
        return self.run.adapter

    @property
    def n_missing(self) -> int:
        """Prompts that no pass has brought yet."""
        return sum(len(alike) for alike in self._waiting.values())

    def notes(self) -> list[str]:
        """What a reader has to know of the passes."""
        if not self.n_missing:
            return []
        n_prompts = self.run.moments.n_prompts
        return [
            f"{self.n_missing} of {self.n_missing + n_prompts} prompts were never run: the folds "
            "and the features were chosen with them"
        ]

    def calibrate(self, prompts: Sequence[Prompt]) -> None:
        """Fix the axes of wide residuals by a run over the first prompts, as every profile does."""
        if self.run.projects:
            batch = make_batch(self.run.first_tokens(prompts), 0, range(len(prompts)))
            moments = self.run.moments
            moments.reference = calibrate(moments.plan, self.adapter, batch)

    def begin(
        self,
        tokens: Int[Tensor, "prompt pos"],
        mask: Bool[Tensor, "prompt pos"] | None = None,
    ) -> None:
        """A pass over these rows begins.

        Args:
            tokens: Token ids, padded with anything at either end.
            mask: True where a token is not padding; by default the rows are told by the prompts.

        Raises:
            ValueError: If a row holds none of the prompts, or the pass before did not reach the
                last site.
        """
        self.require_whole()
        by_fold: dict[int, list[tuple[int, int, int, Prompt]]] = {}
        for row, ids in enumerate(tokens.detach().cpu().numpy()):
            start, number, prompt = self._told(row, ids, None if mask is None else mask[row])
            fold = self.run.assign([prompt])[0][1]
            by_fold.setdefault(fold, []).append((row, start, number, prompt))
        for fold, rows in sorted(by_fold.items()):
            numbers = [number for _, _, number, _ in rows]
            batch = make_batch([prompt for *_, prompt in rows], fold, numbers)
            reader = begin_batch(self.run.moments, self.adapter, batch)
            places = tuple(row for row, *_ in rows), tuple(start for _, start, *_ in rows)
            self._parts.append(_Part(*places, reader))
        self._n_sites = self._n_patterns = 0

    def on_site(self, site: int, residual: Float[Tensor, "prompt pos d_model"]) -> None:
        """One site of the pass."""
        with torch.no_grad():
            for part in self._parts:
                part.reader.on_site(site, part.take(residual.detach(), (0,)))
        self._n_sites += 1

    @property
    def needs_patterns(self) -> bool:
        """Whether a pass must bring attention patterns."""
        return self.run.moments.plan.needs_patterns

    def on_pattern(self, block: int, pattern: Float[Tensor, "prompt head query key"]) -> None:
        """One block's attention pattern of the pass; before the site after the block."""
        with torch.no_grad():
            for part in self._parts:
                _check_padding(block, pattern, part)
                part.reader.on_pattern(block, part.take(pattern.detach(), (1, 2)))
        self._n_patterns += 1

    @property
    def needs_updates(self) -> bool:
        """Whether a pass must bring what attention and MLP add."""
        return self.run.moments.plan.needs_updates

    def on_part(self, block: int, name: Part, update: Float[Tensor, "prompt pos d_model"]) -> None:
        """What a part of one block adds; before the site after the block."""
        with torch.no_grad():
            for part in self._parts:
                part.reader.on_part(block, name, part.take(update.detach(), (0,)))

    def end(self) -> None:
        """The pass is over: add it.

        Raises:
            ValueError: If it did not bring every site.
            RuntimeError: If it did not bring every attention pattern, where they are needed.
        """
        if self._n_sites <= self.adapter.n_layers:
            self.require_whole()
        if self.needs_patterns and self._n_patterns < self.adapter.n_layers:
            raise RuntimeError(
                f"model: {self.adapter.name} formed {self._n_patterns} of {self.adapter.n_layers} "
                "attention patterns under their hooks; load it with attn_implementation='eager', "
                "or leave signals of attention out of signals="
            )
        with torch.no_grad():
            for part in self._parts:
                finish_batch(self.run.moments, self.adapter, part.reader)
        self._parts = []

    def require_whole(self) -> None:
        """Raise ``ValueError`` if a pass has begun and was not added."""
        if self._parts:
            raise ValueError(
                f"recording: a pass over {sum(len(p.rows) for p in self._parts)} prompts ended "
                f"after {self._n_sites} of {self.adapter.n_layers + 1} sites: run whole prompts "
                "through all blocks, without stop_at_layer"
            )

    def _told(
        self, row: int, ids: Int[np.ndarray, " pos"], mask: Tensor | None
    ) -> tuple[int, int, Prompt]:
        """Where a row's prompt starts, its number, and the prompt."""
        spans = []
        if mask is not None:
            real = np.flatnonzero(mask.cpu().numpy())
            spans = [(int(real[0]), int(real[-1]) + 1)]
        else:
            for length in self._lengths:
                if length <= len(ids):
                    spans += [(0, length), (len(ids) - length, len(ids))]
        for start, stop in spans:
            key = _key(ids[start:stop])
            if self._waiting.get(key):
                return (start, *self._waiting[key].popleft())
        again = any(_key(ids[start:stop]) in self._waiting for start, stop in spans)
        raise ValueError(
            f"tokens: row {row} of a pass ({ids[:8].tolist()} ...) holds "
            + ("a prompt that was run before" if again else "none of the prompts")
            + ": give prompts= all that will be run, each as often as it is, as windows of the "
            "same tokens (BOS included where the model takes one)"
        )


def _key(ids: Int[np.ndarray, " pos"]) -> bytes:
    return np.ascontiguousarray(ids, dtype=np.int64).tobytes()


def _check_padding(block: int, pattern: Tensor, part: _Part) -> None:
    """Raise ``ValueError`` if a real token attends to the padding before it."""
    for row, start in zip(part.rows, part.starts, strict=True):
        if not start:
            continue
        stop = start + part.reader.batch.tokens.shape[1]
        share = float(pattern[row, :, start:stop, :start].float().sum(dim=-1).max())
        if share > _ATTENDED:
            raise ValueError(
                f"cache: in block {block}, tokens of prompt {row} attend to the {start} positions "
                f"of padding before it (up to {share:.2g} of a head's attention); run the model "
                "with attention_mask=mask, or pad on the right"
            )
