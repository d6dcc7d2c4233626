"""Distributions over given targets: a prior, tilted by what a linear-Gaussian reader says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.products import product

# Beside 0, which is the prior itself and gains exactly nothing.
TEMPERATURES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.6, 1.0)
# Where the search for the best begins if nothing is known.
FIRST_TRIED = 0.1
# A logarithm of a share that is taken for no less.
_NOTHING = -80.0


@dataclass(frozen=True)
class Tilt:
    """``q(y | z)`` in proportion to ``p(y) exp(t s(y, z))``, over targets y that are given.

    ``s(y, z) = log N(y; W z, S) - log N(y; 0, S_0)`` up to what does not depend on y: Bayes' rule
    for a linear-Gaussian channel of y with any prior p, not only a Gaussian one. ``t`` takes back
    what the channel overstates where it is none; 0 leaves the prior.

    Attributes:
        precision: ``S^-1``, shape ``[feature, feature]``.
        gained: ``S^-1 - S_0^-1``, shape ``[feature, feature]``; None leaves the second term out.
    """

    precision: Float[Tensor, "feature feature"]
    gained: Float[Tensor, "feature feature"] | None

    def to(self, like: Tensor) -> Tilt:
        """The same tilt in another tensor's precision and place."""
        gained = None if self.gained is None else self.gained.to(like)
        return Tilt(self.precision.to(like), gained)

    def scores(
        self,
        predicted: Float[Tensor, "position feature"],
        targets: Float[Tensor, "target feature"],
    ) -> Float[Tensor, "position target"]:
        """Of every target at every position; both about the mean of the targets."""
        return product(predicted @ self.precision, targets.T, -self._own_part(targets))

    def gain(
        self,
        predicted: Float[Tensor, "position feature"],
        targets: Float[Tensor, "target feature"],
        log_prior: Float[Tensor, " target"],
        wanted: Int[Tensor, " position"],
        temperature: float,
    ) -> Float[Tensor, " position"]:
        """That of :class:`AmongTokens` with these scores, in a third of the time if asked once."""
        bias = torch.sub(log_prior, self._own_part(targets), alpha=temperature)
        logits = product((predicted * temperature) @ self.precision, targets.T, bias)
        return _gain(logits, log_prior, wanted)

    def own_scores(
        self,
        predicted: Float[Tensor, "position feature"],
        targets: Float[Tensor, "position feature"],
    ) -> Float[Tensor, " position"]:
        """Of one target at each position."""
        own: Tensor = ((predicted @ self.precision) * targets).sum(dim=1)
        return own - self._own_part(targets)

    def _own_part(self, targets: Float[Tensor, "target feature"]) -> Tensor:
        if self.gained is None:
            return torch.zeros(len(targets)).to(targets)
        return ((targets @ self.gained) * targets).sum(dim=1) / 2


def channel(reader: Float[Tensor, "f f"], null: Float[Tensor, "f f"]) -> Tilt:
    """The tilt of a reader that leaves one covariance unexplained where the null leaves another."""
    precision = torch.linalg.inv(reader)
    return Tilt(precision, precision - torch.linalg.inv(null))


@dataclass(frozen=True)
class AmongTokens:
    """Positions whose tokens are asked for among given ones with a known prior.

    Attributes:
        scores: Of every token at every position, shape ``[position, token]``.
        log_prior: Shape ``[token]``.
        wanted: The token that is right, shape ``[position]``.
    """

    scores: Float[Tensor, "position token"]
    log_prior: Float[Tensor, " token"]
    wanted: Int[Tensor, " position"]

    def gain(self, temperature: float) -> Float[Tensor, " position"]:
        """``log q(x | z) - log p(x)``; at most ``-log p(x)`` at every position."""
        logits = torch.add(self.log_prior, self.scores, alpha=temperature)
        return _gain(logits, self.log_prior, self.wanted)


@dataclass(frozen=True)
class AmongDraws:
    """Positions whose targets are asked for among draws, to which they do not belong.

    Attributes:
        own: The score of each position's own target, shape ``[position]``.
        scores: Of every draw at every position, shape ``[position, draw]``.
    """

    own: Float[Tensor, " position"]
    scores: Float[Tensor, "position draw"]

    def gain(self, temperature: float) -> Float[Tensor, " position"]:
        """``log q(y | z) - log p(y)``, the normalization averaged over the draws.

        Its mean is the bound of Donsker and Varadhan (1983) on the information.
        """
        if not self.scores.shape[1]:
            return torch.zeros_like(self.own)
        average = log_total(temperature * self.scores) - math.log(self.scores.shape[1])
        return temperature * self.own - average


def mean_gain(asked: Sequence[AmongTokens] | Sequence[AmongDraws], temperature: float) -> float:
    """Over all positions together; 0 where there are none."""
    gains = [part.gain(temperature) for part in asked]
    return float(torch.cat(gains).mean()) if gains else 0.0


def best_temperature(
    gain_at: Callable[[float], float], start: float = FIRST_TRIED
) -> tuple[float, float]:
    """The temperature of the largest gain, which is concave in it; and that gain.

    Args:
        gain_at: The mean gain at a temperature; not asked for that at 0, which is 0.
        start: Where to begin: the nearer to the best, the sooner it is found.
    """
    grid = (0.0, *TEMPERATURES)
    best = grid.index(start)
    most = gain_at(start) if best else 0.0
    rises = True
    while rises and best + 1 < len(grid):
        gain = gain_at(grid[best + 1])
        rises = gain > most
        if rises:
            best, most = best + 1, gain
    if grid[best] > start:
        return grid[best], most
    falls = True
    while falls and best:
        gain = gain_at(grid[best - 1]) if best > 1 else 0.0
        falls = gain >= most
        if falls:
            best, most = best - 1, gain
    return grid[best], most


def _gain(
    logits: Float[Tensor, "position target"],
    log_prior: Float[Tensor, " target"],
    wanted: Int[Tensor, " position"],
) -> Float[Tensor, " position"]:
    """How much more likely the right target is than it was before; in place."""
    chosen = logits.gather(1, wanted[:, None])[:, 0]
    return chosen - log_total(logits) - log_prior[wanted]


def log_total(logits: Float[Tensor, "position target"]) -> Float[Tensor, " position"]:
    """``log sum exp``, in place: another temporary would cost more than the exponentials."""
    highest = logits.amax(dim=1)
    # What is this far below adds nothing that even float64 resolves, but numbers next to the least
    # that float32 holds are ten times as slow.
    about = logits.sub_(highest[:, None]).clamp_(min=_NOTHING)
    return highest + about.exp_().sum(dim=1).log()
