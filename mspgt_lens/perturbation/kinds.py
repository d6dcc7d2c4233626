"""Kinds of interventions, as plain objects that turn into edits for a set of blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import Edit
from mspgt_lens.perturbation.residuals import ResidualStatistics

Kind = Literal["noise", "scaling", "mean", "resample", "translation", "temperature", "skip"]
Shape = Literal["covariance", "diagonal", "isotropic"]
_STRENGTHS = {
    "noise": 0.1,
    "scaling": 0.5,
    "mean": 1.0,
    "resample": 1.0,
    "translation": 0.1,
    "temperature": 2.0,
    "skip": 1.0,
}


@dataclass(frozen=True, eq=False)
class Perturbation:
    """One kind of intervention, with its strength.

    Noise and translation act on the residual stream at the entry of every block they are given;
    scaling, the ablations and skipping act on what every such block adds to it (its update);
    temperature on its attention. All act at valid positions only, so that attention sinks and
    massive activations at a prompt's beginning stay as they are.

    Attributes:
        kind: What is done.

            - ``"noise"``: Gaussian noise is added, ``strength`` times the activations' own spread
              at that site (see ``shape``).
            - ``"scaling"``: the update is multiplied by ``strength``; 1 changes nothing.
            - ``"mean"``: the update is replaced by its mean over the data; ``strength`` is the
              share replaced, 0 to 1.
            - ``"resample"``: the update is replaced by that at a random valid position of another
              group, the same one for all blocks; ``strength`` as for the mean.
            - ``"translation"``: ``direction``, at ``strength`` times the residual's
              root-mean-square length at that site, is added.
            - ``"temperature"``: attention scores (soft cap included) are divided by ``strength``;
              1 changes nothing.
            - ``"skip"``: the block adds nothing; no strength.
        strength: In the kind's own unit; None for 0.1 (noise, translation), 0.5 (scaling),
            1 (ablations), 2 (temperature).
        shape: Of noise, strengths being comparable within a shape and not between shapes.

            - ``"covariance"``: drawn with the activations' covariance at the site, times
              ``strength`` squared: every direction gets ``strength`` of its own standard deviation.
            - ``"diagonal"``: every coordinate gets ``strength`` of its own standard deviation.
            - ``"isotropic"``: every coordinate gets ``strength`` times the residual's
              root-mean-square, so the noise has ``strength`` squared of the residual's energy, mean
              and massive coordinates included.
        direction: For translation, shape ``[d_model]``; its length is of no matter.
        seed: Decides the draws, together with the prompt and the block: the same draws come back
            at other strengths, shapes and block sets (common random numbers).

    Example:
        >>> ml.Perturbation("noise", strength=0.2, shape="isotropic").label
        'isotropic noise 0.2'
        >>> ml.Perturbation("translation", direction=torch.ones(32)).label
        'translation 0.1'
    """

    kind: Kind
    strength: float | None = None
    shape: Shape = "covariance"
    direction: Float[Tensor, " d_model"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"Perturbation: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}"
            )
        if self.shape not in get_args(Shape):
            raise ValueError(
                f"Perturbation: shape must be one of {', '.join(get_args(Shape))}, got "
                f"{self.shape!r}"
            )
        if self.strength is None:
            object.__setattr__(self, "strength", _STRENGTHS[self.kind])
        low, high = {
            "noise": (0.0, np.inf),
            "mean": (0.0, 1.0),
            "resample": (0.0, 1.0),
            "temperature": (math.ulp(0.0), np.inf),
            "skip": (1.0, 1.0),
        }.get(self.kind, (-np.inf, np.inf))
        if not (np.isfinite(self.amount) and low <= self.amount <= high):
            needed = {"skip": "left out", "temperature": "above 0"}.get(
                self.kind, f"finite, {low:g} to {high:g}"
            )
            raise ValueError(
                f"Perturbation: strength of {self.kind!r} must be {needed}, got {self.strength}"
            )
        if (self.direction is None) == (self.kind == "translation"):
            needed = "needs a" if self.direction is None else "takes no"
            raise ValueError(f"Perturbation: kind {self.kind!r} {needed} direction")
        if self.direction is not None:
            direction = torch.as_tensor(self.direction)
            if direction.ndim != 1 or not float(direction.norm()) > 0:
                raise ValueError(
                    "Perturbation: direction must be a vector [d_model] other than zero, got shape "
                    f"{tuple(direction.shape)}"
                )

    @property
    def amount(self) -> float:
        """``strength``, the kind's usual one where None was given."""
        assert self.strength is not None
        return self.strength

    @property
    def label(self) -> str:
        """Kind, shape and strength in words."""
        if self.kind == "skip":
            return "skip"
        kind = f"{self.shape} noise" if self.kind == "noise" else self.kind
        return f"{kind} {self.amount:g}"

    def edits(
        self,
        statistics: ResidualStatistics,
        blocks: Iterable[int],
        *,
        where: Bool[Tensor, "prompt pos"] | None = None,
        keys: Sequence[int] | None = None,
        groups: UInt64[np.ndarray, " prompt"] | None = None,
    ) -> list[Edit]:
        """The edits of one run under this perturbation.

        Args:
            statistics: Of the model on text like that of the run.
            blocks: Blocks to act on.
            where: Positions of the first pass to act on; all by default. In later passes, which a
                run that generates with a cache makes, every position (a new token) is acted on.
            keys: A seed per prompt; its number in the batch by default.
            groups: ``stable_hash`` of each prompt's group, so that resampling takes another.

        Returns:
            What is changed at which hook, block by block.
        """
        draw = _Draws(self, statistics, where, keys, groups)
        return [edit for block in blocks for edit in self._edits(draw, int(block))]

    def _edits(self, draw: _Draws, block: int) -> list[Edit]:
        statistics, amount = draw.statistics, self.amount
        if self.kind == "temperature":
            return [Edit(block, "attn_scores", draw.on_queries(lambda scores: scores / amount))]
        if self.kind in ("noise", "translation"):
            # Draws are made once and scaled, so that strengths differ in nothing else.
            shift = draw.noise(block) if self.kind == "noise" else draw.translation(block)
            return [Edit(block, "resid_pre", draw.on_rows(lambda rows, ask: rows + shift(ask)))]
        entered: list[Tensor] = []

        def keep(residual: Tensor) -> Tensor:
            entered[:] = [residual]
            return residual

        def changed(rows: Tensor, ask: _Ask) -> Tensor:
            before = entered.pop()[ask.where]
            if self.kind in ("scaling", "skip"):
                # Exact at 0 (nothing is added) and at 1 (nothing changes).
                return torch.lerp(before, rows, 0.0 if self.kind == "skip" else amount)
            if self.kind == "mean":
                update = statistics.update_mean[block].expand(len(rows), -1)
            else:
                update = statistics.updates[block][draw.donors(ask)]
            return torch.lerp(rows, before + update.to(before), amount)

        return [Edit(block, "resid_pre", keep), Edit(block, "resid_post", draw.on_rows(changed))]


@dataclass(frozen=True)
class _Ask:
    """One pass: the positions acted on, prompt by prompt, and the number of the pass."""

    where: Bool[Tensor, "prompt pos"]
    call: int


class _Draws:
    """What one run draws: for each prompt, pass and block, whatever else runs beside it."""

    def __init__(
        self,
        perturbation: Perturbation,
        statistics: ResidualStatistics,
        where: Bool[Tensor, "prompt pos"] | None,
        keys: Sequence[int] | None,
        groups: UInt64[np.ndarray, " prompt"] | None,
    ) -> None:
        self.perturbation, self.statistics = perturbation, statistics
        self.where, self.keys, self.groups = where, keys, groups

    def on_rows(self, change: Callable[[Tensor, _Ask], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of the residual at the positions acted on."""
        calls = itertools.count()

        def changed(residual: Tensor) -> Tensor:
            ask = self._ask(residual.shape[0], residual.shape[1], next(calls), residual.device)
            result = residual.clone()
            result[ask.where] = change(residual[ask.where], ask).to(result.dtype)
            return result

        return changed

    def on_queries(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of attention scores at the queries acted on, masked keys left alone."""
        calls = itertools.count()

        def changed(scores: Tensor) -> Tensor:
            ask = self._ask(scores.shape[0], scores.shape[2], next(calls), scores.device)
            seen = scores > torch.finfo(scores.dtype).min / 2
            return torch.where(ask.where[:, None, :, None] & seen, change(scores), scores)

        return changed

    def noise(self, block: int) -> Callable[[_Ask], Tensor]:
        """Noise rows of a block at the perturbation's shape and strength."""
        statistics, shape = self.statistics, self.perturbation.shape
        spread = {
            "isotropic": statistics.rms[block],
            "diagonal": statistics.deviation[block],
            "covariance": statistics.factor[block],
        }[shape] * self.perturbation.amount
        width = statistics.deviation.shape[1]

        def rows(ask: _Ask) -> Tensor:
            drawn = [
                torch.randn(count, width, generator=self._generator(index, ask, block))
                for index, count in enumerate(ask.where.sum(dim=1).tolist())
            ]
            normal = torch.cat(drawn).to(ask.where.device)
            scale = spread.to(normal.device)
            return normal @ scale if shape == "covariance" else normal * scale

        return rows

    def translation(self, block: int) -> Callable[[_Ask], Tensor]:
        """The shift along the perturbation's direction."""
        direction = torch.as_tensor(self.perturbation.direction).float()
        width = self.statistics.deviation.shape[1]
        if len(direction) != width:
            raise ValueError(
                f"Perturbation: direction must have d_model ({width}) entries, got {len(direction)}"
            )
        length = self.perturbation.amount * float(self.statistics.rms[block]) * width**0.5
        shift = direction * (length / direction.norm())
        return lambda ask: shift.to(ask.where.device)

    def donors(self, ask: _Ask) -> Int[Tensor, " row"]:
        """For every position acted on, one sampled position of another group."""
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

    def _ask(self, n_prompts: int, n_pos: int, call: int, device: torch.device) -> _Ask:
        if self.where is None or call:
            return _Ask(torch.ones(n_prompts, n_pos, dtype=torch.bool, device=device), call)
        if self.where.shape != (n_prompts, n_pos):
            raise ValueError(
                f"where must have the first pass's shape {(n_prompts, n_pos)}, got "
                f"{tuple(self.where.shape)}"
            )
        return _Ask(self.where.to(device), call)

    def _generator(self, index: int, ask: _Ask, block: int) -> torch.Generator:
        key = index if self.keys is None else self.keys[index]
        seed = stable_hash(key, ask.call, block, self.perturbation.seed)
        return torch.Generator().manual_seed(seed % 2**63)
