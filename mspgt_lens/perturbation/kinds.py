"""A perturbation as a plain object: its kind by name, its strength, and the edits it makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt64
from torch import Tensor

from mspgt_lens.folds import stable_hash
from mspgt_lens.models import Edit
from mspgt_lens.perturbation.draws import Draws, Shape
from mspgt_lens.perturbation.registry import PerturbationKind, perturbation_kind
from mspgt_lens.perturbation.residuals import ResidualStatistics


@dataclass(frozen=True, eq=False, repr=False)
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

            Others can be added with :func:`~mspgt_lens.extending.register_perturbation`.
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
            at other strengths, shapes and block sets (common random numbers); of residuals wider
            than 1,024, covariance noise has draws of its own.

    Example:
        >>> ml.Perturbation("noise", strength=0.2, shape="isotropic").label
        'isotropic noise 0.2'
        >>> ml.Perturbation("translation", direction=torch.ones(32)).label
        'translation 0.1'
    """

    kind: str
    strength: float | None = None
    shape: Shape = "covariance"
    direction: Float[Tensor, " d_model"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        behavior = perturbation_kind(self.kind)
        if self.shape not in get_args(Shape):
            raise ValueError(
                f"Perturbation: shape must be one of {', '.join(get_args(Shape))}, got "
                f"{self.shape!r}"
            )
        if self.strength is None:
            object.__setattr__(self, "strength", behavior.default)
        if not (np.isfinite(self.amount) and behavior.least <= self.amount <= behavior.most):
            raise ValueError(
                f"Perturbation: strength of {self.kind!r} must be {behavior.range_words}, got "
                f"{self.strength}"
            )
        if (self.direction is None) == behavior.needs_direction:
            needed = "needs a" if self.direction is None else "takes no"
            raise ValueError(f"Perturbation: kind {self.kind!r} {needed} direction")
        if self.direction is not None:
            direction = torch.as_tensor(self.direction)
            if direction.ndim != 1 or not float(direction.norm()) > 0:
                raise ValueError(
                    "Perturbation: direction must be a vector [d_model] other than zero, got shape "
                    f"{tuple(direction.shape)}"
                )

    def __repr__(self) -> str:
        along = "" if self.direction is None else f", along a vector of {len(self.direction):,}"
        return f"Perturbation: {self.label}{along}, seed {self.seed}"

    @property
    def amount(self) -> float:
        """``strength``, the kind's usual one where None was given."""
        assert self.strength is not None
        return self.strength

    @property
    def behavior(self) -> PerturbationKind:
        """What the kind does, and what is asked of its strength."""
        return perturbation_kind(self.kind)

    @property
    def title(self) -> str:
        """Kind and shape in words, without the strength."""
        return self.behavior.title(self.shape)

    @property
    def label(self) -> str:
        """Kind, shape and strength in words."""
        has_strength = self.behavior.least < self.behavior.most
        return f"{self.title} {self.amount:g}" if has_strength else self.title

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
        draws = Draws(
            statistics, self.amount, self.shape, self.direction, self.seed, where, keys, groups
        )
        return [edit for block in blocks for edit in self.behavior.edits(draws, int(block))]


def described(perturbation: Perturbation) -> list[str | float]:
    """All that decides what a perturbation does, as JSON would hold it."""
    direction = perturbation.direction
    along = () if direction is None else torch.as_tensor(direction).tolist()
    return [repr(perturbation), perturbation.amount, stable_hash(along)]
