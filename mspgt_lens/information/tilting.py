"""Distributions over given targets: a prior, tilted by what a linear-Gaussian reader says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Beside 0, which is the prior itself and gains exactly nothing.
TEMPERATURES = (0.1, 0.2, 0.35, 0.6, 1.0)


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
        return (predicted @ self.precision) @ targets.T - self._own_part(targets)

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
        chosen = logits.gather(1, self.wanted[:, None])[:, 0]
        return chosen - _log_total(logits) - self.log_prior[self.wanted]


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
        average = _log_total(temperature * self.scores) - math.log(self.scores.shape[1])
        return temperature * self.own - average


def mean_gain(asked: Sequence[AmongTokens] | Sequence[AmongDraws], temperature: float) -> float:
    """Over all positions together; 0 where there are none."""
    gains = [part.gain(temperature) for part in asked]
    return float(torch.cat(gains).mean()) if gains else 0.0


def best_temperature(asked: Sequence[AmongTokens] | Sequence[AmongDraws]) -> tuple[float, float]:
    """The temperature of the largest mean gain, which is concave in it; and that gain."""
    best, most = 0.0, 0.0
    for temperature in TEMPERATURES:
        gain = mean_gain(asked, temperature)
        if gain <= most:
            break
        best, most = temperature, gain
    return best, most


def _log_total(logits: Float[Tensor, "position target"]) -> Float[Tensor, " position"]:
    """``log sum exp``, in place: another temporary would cost more than the exponentials."""
    highest = logits.amax(dim=1)
    return highest + logits.sub_(highest[:, None]).exp_().sum(dim=1).log()
