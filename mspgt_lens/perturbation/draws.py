"""What one run under a perturbation draws and where it acts, the same whatever runs beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import Edit
from mspgt_lens.perturbation.residuals import ResidualStatistics

Shape = Literal["covariance", "diagonal", "isotropic"]


@dataclass(frozen=True)
class Ask:
    """One pass of a run.

    Attributes:
        where: The positions acted on; rows of activations come prompt by prompt in this order.
        call: The number of the pass; passes after the first are of a run that generates.
    """

    where: Bool[Tensor, "prompt pos"]
    call: int


@dataclass(frozen=True, eq=False)
class Draws:
    """One run under a perturbation: its parameters, its positions and its random numbers.

    Attributes:
        statistics: Of the model on text like that of the run.
        strength: In the kind's own unit.
        shape: Of noise.
        direction: Of translation, or None.
        seed: Decides the draws, together with the prompt, the pass and the block.
        where: Positions of the first pass to act on; None for all.
        keys: A seed per prompt; None for its number in the batch.
        groups: ``stable_hash`` of each prompt's group, or None.
    """

    statistics: ResidualStatistics
    strength: float
    shape: Shape
    direction: Float[Tensor, " d_model"] | None
    seed: int
    where: Bool[Tensor, "prompt pos"] | None
    keys: Sequence[int] | None
    groups: UInt64[np.ndarray, " prompt"] | None

    def on_rows(self, change: Callable[[Tensor, Ask], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of activations ``[prompt, pos, d_model]`` at the positions acted on.

        Args:
            change: From rows ``[row, d_model]`` at those positions to what replaces them.

        Returns:
            What an :class:`~mspgt_lens.extending.Edit` takes as its change.
        """
        calls = itertools.count()

        def changed(residual: Tensor) -> Tensor:
            ask = self._ask(residual.shape[0], residual.shape[1], next(calls), residual.device)
            result = residual.clone()
            result[ask.where] = change(residual[ask.where], ask).to(result.dtype)
            return result

        return changed

    def on_queries(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of attention scores at the queries acted on, masked keys left alone.

        Args:
            change: From scores ``[prompt, head, query, key]`` to what replaces them.

        Returns:
            What an :class:`~mspgt_lens.extending.Edit` takes as its change.
        """
        calls = itertools.count()

        def changed(scores: Tensor) -> Tensor:
            ask = self._ask(scores.shape[0], scores.shape[2], next(calls), scores.device)
            seen = scores > torch.finfo(scores.dtype).min / 2
            return torch.where(ask.where[:, None, :, None] & seen, change(scores), scores)

        return changed

    def on_update(self, block: int, change: Callable[[Tensor, Tensor, Ask], Tensor]) -> list[Edit]:
        """Edits of what a block adds to the residual stream at the positions acted on.

        Args:
            block: The block.
            change: From rows ``[row, d_model]`` before and after the block to what replaces those
                after it.

        Returns:
            The edits, to be installed together.
        """
        entered: list[Tensor] = []

        def keep(residual: Tensor) -> Tensor:
            entered[:] = [residual]
            return residual

        def changed(rows: Tensor, ask: Ask) -> Tensor:
            return change(entered.pop().to(rows.device)[ask.where], rows, ask)

        return [Edit(block, "resid_pre", keep), Edit(block, "resid_post", self.on_rows(changed))]

    def normal(self, block: int, ask: Ask, width: int | None = None) -> Float[Tensor, "row width"]:
        """Standard normal numbers for every position acted on: other ones for every block.

        Args:
            block: The block.
            ask: What a change is asked for.
            width: How many for each position; by default ``d_model``.

        Returns:
            Rows of shape ``[row, width]``.
        """
        width = self.statistics.deviation.shape[1] if width is None else width
        drawn = [
            torch.randn(count, width, generator=self._generator(index, ask, block))
            for index, count in enumerate(ask.where.sum(dim=1).tolist())
        ]
        return torch.cat(drawn).to(ask.where.device)

    def donors(self, ask: Ask) -> Int[Tensor, " row"]:
        """For every position acted on, one sampled position of another group.

        Args:
            ask: What a change is asked for.

        Returns:
            Numbers of rows of ``statistics.updates``, the same for all blocks.

        Raises:
            CannotMeasure: If the statistics hold no other group.
        """
        chosen = []
        for index, count in enumerate(ask.where.sum(dim=1).tolist()):
            usable = torch.arange(len(self.statistics.groups))
            if self.groups is not None:
                usable = usable[torch.from_numpy(self.statistics.groups != self.groups[index])]
                if not len(usable):
                    raise CannotMeasure(
                        "statistics hold updates of one group only, so there is no other to "
                        "resample from: gather them from more documents"
                    )
            drawn = torch.randint(
                len(usable), (count,), generator=self._generator(index, ask, block=-1)
            )
            chosen.append(usable[drawn])
        return torch.cat(chosen)

    def _ask(self, n_prompts: int, n_pos: int, call: int, device: torch.device) -> Ask:
        if self.where is None or call:
            return Ask(torch.ones(n_prompts, n_pos, dtype=torch.bool, device=device), call)
        if self.where.shape != (n_prompts, n_pos):
            raise ValueError(
                f"where must have the first pass's shape {(n_prompts, n_pos)}, got "
                f"{tuple(self.where.shape)}"
            )
        return Ask(self.where.to(device), call)

    def _generator(self, index: int, ask: Ask, block: int) -> torch.Generator:
        key = index if self.keys is None else self.keys[index]
        seed = stable_hash(key, ask.call, block, self.seed)
        return torch.Generator().manual_seed(seed % 2**63)
