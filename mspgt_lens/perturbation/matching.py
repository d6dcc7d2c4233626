"""One effect for all: strengths at which different interventions move predictions equally far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mspgt_lens.models import ModelAdapter
from mspgt_lens.perturbation.batches import Batches
from mspgt_lens.perturbation.kinds import Perturbation
from mspgt_lens.perturbation.perturbing import perturbed
from mspgt_lens.perturbation.residuals import ResidualStatistics
from mspgt_lens.perturbation.responding import MEASURES, respond
from mspgt_lens.perturbation.rounding import beyond_rounding, rounding

TOLERANCE = 0.05
KL = MEASURES.index("kl")
_MAX_STEPS = 16
_START = 0.1


@dataclass(frozen=True)
class Matched:
    """A perturbation of some blocks at its own strength.

    Attributes:
        perturbation: The perturbation.
        blocks: The blocks it acts on.
        kl: How far it moves predictions beyond rounding: KL divergence from the clean ones, nats
            per token.
    """

    perturbation: Perturbation
    blocks: tuple[int, ...]
    kl: float


def match_strengths(
    adapter: ModelAdapter,
    batches: Batches,
    statistics: ResidualStatistics,
    pairs: Sequence[tuple[Perturbation, Iterable[int]]],
    target_kl: float | None,
) -> list[Matched]:
    """Strengths at which every perturbation of its blocks moves predictions by the same KL.

    The effort of each (noise, share replaced, 1 - scaling, or the logarithm of a temperature) is
    found by false position on logarithms, in which small effects follow a line, until its KL is
    within 5%. A kind that cannot do as much (blocks left out altogether move predictions less) is
    given at its full effort; its KL says so.

    Args:
        adapter: The model.
        batches: Text on which the KL is measured.
        statistics: Of the residual stream.
        pairs: Each perturbation with its blocks.
        target_kl: How far each is to move predictions, in nats per token; None takes every
            perturbation at its own strength.

    Raises:
        ValueError: If a perturbation has no strength to match, or the target is not above rounding.
    """
    asked = [(kind, tuple(int(block) for block in blocks)) for kind, blocks in pairs]
    floors = _floors(adapter, batches, [blocks for _, blocks in asked])
    most = max(float(floor[:, KL].mean()) for floor in floors.values())
    if target_kl is not None and most > target_kl / 2:
        raise ValueError(
            f"target_kl must be above what rounding in {adapter.dtype} does to {adapter.name}'s "
            f"predictions, {most:.2g} nats per token, got {target_kl:g}: ask for at least "
            f"{4 * most:.1g}, or load the model in float32"
        )
    if target_kl is None:
        measured = _divergences(adapter, batches, statistics, asked, floors)
        return [
            Matched(*pair, measured_kl) for pair, measured_kl in zip(asked, measured, strict=True)
        ]
    searches = [_Search(kind, target_kl) for kind, _ in asked]
    for _ in range(_MAX_STEPS):
        unmatched = [i for i, search in enumerate(searches) if not search.done]
        if not unmatched:
            break
        tried = [(searches[i].perturbation, asked[i][1]) for i in unmatched]
        measured = _divergences(adapter, batches, statistics, tried, floors)
        for i, kl in zip(unmatched, measured, strict=True):
            searches[i].tell(kl)
    return [
        Matched(search.best, blocks, search.best_kl)
        for search, (_, blocks) in zip(searches, asked, strict=True)
    ]


class _Search:
    """The effort of one perturbation whose KL is the target."""

    def __init__(self, asked: Perturbation, target: float) -> None:
        self.asked, self.target = asked, target
        self.most = asked.behavior.full_effort
        self.effort = min(_START, self.most)
        # Logarithms of effort and of KL over target on either side of the target.
        self.below: tuple[float, float] | None = None
        self.above: tuple[float, float] | None = None
        self.done = False
        self.best, self.best_kl = self.perturbation, np.inf

    @property
    def perturbation(self) -> Perturbation:
        return replace(self.asked, strength=self.asked.behavior.strength_at(self.effort))

    def tell(self, kl: float) -> None:
        """Take the KL of the present effort, and choose the next."""
        miss = abs(np.log(max(kl, 1e-12) / self.target))
        if not np.isfinite(self.best_kl) or miss < abs(
            np.log(max(self.best_kl, 1e-12) / self.target)
        ):
            self.best, self.best_kl = self.perturbation, kl
        point = float(np.log(self.effort)), float(np.log(max(kl, 1e-12) / self.target))
        if point[1] < 0:
            self.below = point
        else:
            self.above = point
        at_end = point[1] < 0 and self.effort >= self.most
        self.done = miss <= TOLERANCE or at_end
        if not self.done:
            self.effort = float(min(np.exp(self._next(point)), self.most))

    def _next(self, last: tuple[float, float]) -> float:
        if self.below is None or self.above is None:
            # KL grows with the square of a small effort; no step beyond a factor of 8.
            return last[0] + float(np.clip(-last[1] / 2, -np.log(8), np.log(8)))
        (low, under), (high, over) = self.below, self.above
        share = -under / (over - under)
        # Kept off the ends, so that the bracket shrinks from both sides.
        return low + float(np.clip(share, 0.1, 0.9)) * (high - low)


def _floors(
    adapter: ModelAdapter, batches: Batches, block_sets: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], Float[np.ndarray, "group measure"]]:
    """What rounding does where it is met first in each set of blocks."""
    different = list(dict.fromkeys(block_sets))
    floors = respond(adapter, batches, [rounding(blocks) for blocks in different])
    return dict(zip(different, floors, strict=True))


def _divergences(
    adapter: ModelAdapter,
    batches: Batches,
    statistics: ResidualStatistics,
    asked: Sequence[tuple[Perturbation, tuple[int, ...]]],
    floors: Mapping[tuple[int, ...], Float[np.ndarray, "group measure"]],
) -> list[float]:
    conditions = [perturbed(kind, statistics, blocks) for kind, blocks in asked]
    by_group = respond(adapter, batches, conditions)
    above = beyond_rounding(by_group, np.stack([floors[blocks] for _, blocks in asked]))
    return [float(mean) for mean in above[..., KL].mean(axis=1)]
