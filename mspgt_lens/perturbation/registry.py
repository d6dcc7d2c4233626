"""One class per kind of perturbation, and the names that they are found by."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mspgt_lens.models import Edit
from mspgt_lens.perturbation.draws import Ask, Draws, Shape

_KINDS: dict[str, PerturbationKind] = {}


class PerturbationKind:
    """What one kind of perturbation does to a block; derive from it and register the class.

    Attributes:
        name: What :class:`~mspgt_lens.Perturbation` calls it.
        default: The strength where none is given.
        least: The lowest strength.
        most: The highest; the same as ``least`` for a kind without a strength.
        needs_direction: Whether it takes a direction, without which it is nothing.
        adds_energy: Whether the squares of its strengths add up over blocks, as those of noise do,
            so that a strength can be shared out between them.
    """

    name: ClassVar[str]
    default: ClassVar[float] = 1.0
    least: ClassVar[float] = -np.inf
    most: ClassVar[float] = np.inf
    needs_direction: ClassVar[bool] = False
    adds_energy: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"PerturbationKind {self.name!r}"

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        """The edits of one block in one run.

        Args:
            draws: The strength, and all else that is needed.
            block: The block.

        Returns:
            The edits, to be installed together.

        Raises:
            NotImplementedError: If a class does not say.
        """
        raise NotImplementedError

    def title(self, shape: Shape) -> str:
        """What it is in words, without its strength.

        Args:
            shape: The shape of noise.

        Returns:
            The words.
        """
        return self.name

    @property
    def range_words(self) -> str:
        """What its strength must be, in words."""
        return f"finite, {self.least:g} to {self.most:g}"

    @property
    def full_effort(self) -> float:
        """The effort at which nothing is left to do."""
        return self.most

    def strength_at(self, effort: float) -> float:
        """The strength at an effort: nothing is done at 0, and more with every effort above.

        Strengths that match a KL are searched for by their effort.

        Args:
            effort: At least 0, ``full_effort`` at most.

        Returns:
            The strength.

        Raises:
            ValueError: If the kind has no strength to search for.
        """
        return effort


def register_perturbation(kind: type[PerturbationKind]) -> type[PerturbationKind]:
    """Let :class:`~mspgt_lens.Perturbation` find a kind by its name; a decorator of its class.

    Args:
        kind: The class.

    Returns:
        The class, as it is.

    Raises:
        ValueError: If the name is missing or another kind's, or the range or default is none.
    """
    name = getattr(kind, "name", "")
    if not name:
        raise ValueError(f"kind must have a name, which {kind.__qualname__} lacks: set `name`")
    if not kind.least <= kind.default <= kind.most:
        raise ValueError(
            f"kind: default of {name!r} must be {kind.least:g} to {kind.most:g}, its least and "
            f"most, got {kind.default:g}"
        )
    other = type(_KINDS[name]) if name in _KINDS else kind
    # Run again, as in a notebook, the same class takes its own place.
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"kind: the name {name!r} is that of {other.__module__}.{other.__qualname__} already; "
            "choose another"
        )
    _KINDS[name] = kind()
    return kind


def perturbation_kind(name: str) -> PerturbationKind:
    """The kind of this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in _KINDS:
        raise ValueError(f"Perturbation: kind must be one of {', '.join(_KINDS)}, got {name!r}")
    return _KINDS[name]


@register_perturbation
class Noise(PerturbationKind):
    """Gaussian noise at the block's entry."""

    name = "noise"
    default = 0.1
    least = 0.0
    adds_energy = True

    def title(self, shape: Shape) -> str:
        return f"{shape} noise"

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        statistics = draws.statistics
        # Draws are made once and scaled, so that strengths differ in nothing else.
        spread = {
            "isotropic": statistics.rms[block],
            "diagonal": statistics.deviation[block],
            "covariance": statistics.factor[block],
        }[draws.shape] * draws.strength

        def noisy(rows: Tensor, ask: Ask) -> Tensor:
            if draws.shape == "covariance":
                normal = draws.normal(block, ask, width=len(spread))
                return rows + normal @ spread.to(normal.device)
            normal = draws.normal(block, ask)
            return rows + normal * spread.to(normal.device)

        return [Edit(block, "resid_pre", draws.on_rows(noisy))]


@register_perturbation
class Scaling(PerturbationKind):
    """The block's update, multiplied."""

    name = "scaling"
    default = 0.5

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        # Exact at 0 (nothing is added) and at 1 (nothing changes).
        return draws.on_update(
            block, lambda before, rows, ask: torch.lerp(before, rows, draws.strength)
        )

    @property
    def full_effort(self) -> float:
        return 1.0

    def strength_at(self, effort: float) -> float:
        return 1.0 - effort


class _Replacing(PerturbationKind):
    """The block's update, replaced by another; the strength is the share replaced."""

    least, most = 0.0, 1.0

    def update(self, draws: Draws, block: int, ask: Ask) -> Tensor:
        """What replaces it: ``[row, d_model]`` or ``[d_model]``."""
        raise NotImplementedError

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        def replaced(before: Tensor, rows: Tensor, ask: Ask) -> Tensor:
            update = self.update(draws, block, ask)
            return torch.lerp(rows, before + update.to(before), draws.strength)

        return draws.on_update(block, replaced)


@register_perturbation
class Mean(_Replacing):
    """The block's update, replaced by its mean."""

    name = "mean"

    def update(self, draws: Draws, block: int, ask: Ask) -> Tensor:
        return draws.statistics.update_mean[block]


@register_perturbation
class Resample(_Replacing):
    """The block's update, replaced by that at a position of another group."""

    name = "resample"

    def update(self, draws: Draws, block: int, ask: Ask) -> Tensor:
        return draws.statistics.updates[block][draws.donors(ask)]


@register_perturbation
class Translation(PerturbationKind):
    """A shift at the block's entry."""

    name = "translation"
    default = 0.1
    needs_direction = True
    adds_energy = True

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        direction = torch.as_tensor(draws.direction).float()
        width = draws.statistics.deviation.shape[1]
        if len(direction) != width:
            raise ValueError(
                f"Perturbation: direction must have d_model ({width}) entries, got {len(direction)}"
            )
        length = draws.strength * float(draws.statistics.rms[block]) * width**0.5
        shift = direction * (length / direction.norm())
        shifted = draws.on_rows(lambda rows, ask: rows + shift.to(rows.device))
        return [Edit(block, "resid_pre", shifted)]


@register_perturbation
class Temperature(PerturbationKind):
    """The block's attention scores, divided."""

    name = "temperature"
    default = 2.0
    least = math.ulp(0.0)

    @property
    def range_words(self) -> str:
        return "above 0"

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        cooled = draws.on_queries(lambda scores: scores / draws.strength)
        return [Edit(block, "attn_scores", cooled)]

    @property
    def full_effort(self) -> float:
        # The logarithm of a temperature at which attention is uniform for all purposes.
        return 8.0

    def strength_at(self, effort: float) -> float:
        return float(np.exp(effort))


@register_perturbation
class Skip(PerturbationKind):
    """A block that adds nothing."""

    name = "skip"
    least = most = 1.0

    @property
    def range_words(self) -> str:
        return "left out"

    def edits(self, draws: Draws, block: int) -> list[Edit]:
        return draws.on_update(block, lambda before, rows, ask: torch.lerp(before, rows, 0.0))

    def strength_at(self, effort: float) -> float:
        raise ValueError(
            "perturbations: 'skip' has no strength that could be matched; use "
            "Perturbation('scaling'), of which it is the extreme, or target_kl=None"
        )
