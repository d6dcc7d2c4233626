"""Sums of what signals say of the rows of one batch, while its forward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models import Part, in_float64
from mspgt_lens.signals.record import BlockRows, Signal, SiteRows

# Of the block's change, beside what the model's precision loses.
_MISSING = 0.01


class SignalSums:
    """Adds up signals that are functions of rows, in the order in which a pass brings them.

    Args:
        signals: Those whose ``of`` is a function.
        n_layers: Blocks of the model.
        mask: True where a token is not padding, shape ``[prompt, pos]``.
        index: Prompt and place of each valid row, shape ``[row, 2]``.
        numbers: What errors call the prompts.
        parallel: Whether attention and MLP read the same stream.
        eps: Relative rounding of the model's precision.
    """

    def __init__(
        self,
        signals: Sequence[Signal],
        *,
        n_layers: int,
        mask: Bool[Tensor, "prompt pos"],
        index: Int[Tensor, "row 2"],
        numbers: Sequence[int],
        parallel: bool,
        eps: float,
    ) -> None:
        self.signals = signals
        self.index, self.numbers = index, numbers
        self.parallel, self.eps = parallel, eps
        self.lengths = [int(length) for length in mask.sum(dim=1)]
        # The last site is no block's: signals of blocks leave it at 0.
        self.sums: Float[np.ndarray, "signal site"] = np.zeros((len(signals), n_layers + 1))
        self.whole = any(signal.whole for signal in signals)
        self.patterned = any(signal.patterns for signal in signals)
        self.before: tuple[Tensor, Tensor] | None = None
        self.pattern: Tensor | None = None
        self.parts: dict[Part, Tensor] = {}

    def on_pattern(self, block: int, pattern: Float[Tensor, "prompt head query key"]) -> None:
        """One block's attention, before the site after it."""
        if self.patterned:
            self.pattern = pattern.detach().clone()

    def on_part(self, block: int, part: Part, update: Float[Tensor, "prompt pos d_model"]) -> None:
        """What a part of a block adds, before the site after it."""
        self.parts[part] = update.detach().clone()

    def on_site(
        self,
        site: int,
        residual: Float[Tensor, "prompt pos d_model"],
        rows: Float[Tensor, "row d_model"],
    ) -> None:
        """One site, and with it the block before it.

        Args:
            site: 0 ... L, in order.
            residual: The stream itself.
            rows: Its valid rows, in float32 at least.
        """
        if not self.signals:
            return
        # Taken out now: the model may go on in the same memory.
        stream = residual.detach().clone() if self.whole else residual[:0]
        self._add("site", site, stream, rows)
        if self.before is not None:
            self._add("block", site - 1, stream, rows)
        self.before, self.pattern, self.parts = (stream, rows), None, {}

    def _add(self, place: str, depth: int, stream: Tensor, rows: Tensor) -> None:
        mine = [(i, signal) for i, signal in enumerate(self.signals) if signal.place == place]
        of_rows = [(i, signal) for i, signal in mine if not signal.whole]
        if of_rows:
            taken = self._rows(place, depth, rows)
            for index, signal in of_rows:
                values = _asked(signal, taken)
                self._check(signal, depth, values, self.index[:, 0], (len(self.index),))
                self.sums[index, depth] = float(in_float64(values).sum())
        of_prompts = [(i, signal) for i, signal in mine if signal.whole]
        for prompt in range(len(self.lengths)) if of_prompts else ():
            taken = self._prompt(place, depth, stream, prompt)
            for index, signal in of_prompts:
                value = _asked(signal, taken)
                self._check(signal, depth, value, torch.tensor(prompt), ())
                self.sums[index, depth] += float(value)

    def _rows(self, place: str, depth: int, rows: Tensor) -> BlockRows | SiteRows:
        """The valid rows of a block or a site, where the site after it is."""
        device = rows.device
        prompt, position = self.index.to(device).unbind(dim=1)
        if place == "site":
            return SiteRows(depth, rows, position)
        assert self.before is not None
        pattern = None
        if self.pattern is not None:
            pattern = _wide(self.pattern.to(device)[prompt, :, position])
        taken = BlockRows(depth, self.before[1].to(device), rows, position, pattern)
        if not self.parts:
            return taken
        parts = {name: _wide(x.to(device)[prompt, position]) for name, x in self.parts.items()}
        return self._with_parts(taken, parts)

    def _prompt(self, place: str, depth: int, stream: Tensor, prompt: int) -> BlockRows | SiteRows:
        """All rows of one prompt."""
        length = self.lengths[prompt]
        rows = _wide(stream[prompt, :length])
        device = rows.device
        position = torch.arange(length, device=device)
        if place == "site":
            return SiteRows(depth, rows, position)
        assert self.before is not None
        pattern = None
        if self.pattern is not None:
            pattern = self.pattern[prompt, :, :length, :length].to(device)
            pattern = _wide(pattern).transpose(0, 1)
        before = _wide(self.before[0][prompt, :length].to(device))
        taken = BlockRows(depth, before, rows, position, pattern)
        if not self.parts:
            return taken
        own = {name: _wide(x[prompt, :length].to(device)) for name, x in self.parts.items()}
        return self._with_parts(taken, own)

    def _with_parts(self, rows: BlockRows, parts: dict[Part, Tensor]) -> BlockRows:
        attention, mlp = parts["attn_out"], parts["mlp_out"]
        missing = float((rows.after - rows.before - attention - mlp).norm())
        change = float((rows.after - rows.before).norm())
        if not missing <= _MISSING * change + 4 * self.eps * float(rows.after.norm()):
            raise CannotMeasure(
                f"signals: what attention and MLP of block {rows.block} give is not what is added "
                f"to the residual stream ({missing / change:.2g} of the block's change is missing: "
                "a block may normalize or scale their sum, or a hook edit the stream), so leave "
                "attention_ratio, mlp_ratio, attention_cosine and mlp_cosine out of signals="
            )
        between = rows.before if self.parallel else rows.before + attention
        return replace(rows, attention=attention, mlp=mlp, between=between)

    def _check(
        self, signal: Signal, depth: int, values: object, prompts: Tensor, shape: tuple[int, ...]
    ) -> None:
        """Raise an error if a function gave anything but finite numbers, as many as it should."""
        if not isinstance(values, Tensor) or values.shape != shape:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            what = "one number per prompt" if signal.whole else "one number per row"
            raise ValueError(
                f"signal {signal.name!r} must give {what}, a tensor of shape {shape}, got {given}"
            )
        if not bool(torch.isfinite(values).all()):
            bad = int(prompts[~torch.isfinite(values)].flatten()[0])
            raise FloatingPointError(
                f"signal {signal.name!r} is NaN or infinite at {signal.place} {depth}, first in "
                f"prompt {self.numbers[bad]}; let its function give a number at every position"
            )


def _asked(signal: Signal, rows: BlockRows | SiteRows) -> Tensor:
    """What a signal says of rows.

    Of copies: whatever the function does, other signals are computed from what the model gave. Of
    what it did not ask for there is nothing.
    """
    unasked = [] if signal.patterns else ["pattern"]
    unasked += [] if signal.updates else ["attention", "mlp", "between"]
    held = {name: value for name, value in vars(rows).items() if isinstance(value, Tensor)}
    lent: dict[str, Any] = {
        name: None if name in unasked else value.clone() for name, value in held.items()
    }
    assert callable(signal.of)
    of: Callable[[Any], Tensor] = signal.of
    return of(replace(rows, **lent))


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it comes so."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
