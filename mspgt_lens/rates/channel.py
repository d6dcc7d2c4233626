"""A channel that passes a site's activations on at a given rate, and keeps their covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

# Directions with less than this share of the largest variance hold rounding of float32.
_RESOLUTION = 1e-10
# The least cost of a direction, in nats and as a share of the largest.
_TRIFLE = 1e-12
# Ends of the search for a weight, as logarithms: from nothing to all that float64 tells from it.
_LEAST, _MOST = -30.0, 30.0


@dataclass(frozen=True)
class Channel:
    """Each direction of the activations, mixed with an independent Gaussian draw.

    ``z' = m + sum_i u_i (rho_i w_i + sqrt(1 - rho_i^2) eps_i)``, where ``w = into (z - m)`` are the
    activation's coordinates, of unit variance each and uncorrelated, and ``eps`` standard normal:
    mean and covariance of ``z'`` are those of ``z``.

    Attributes:
        mean: Mean of the activations, m.
        into: From activations about their mean to coordinates.
        out: Back: its columns are the directions ``u_i``.
        turned: From coordinates along the principal axes of the covariance to these.
        kept: The correlation ``rho_i`` of each coordinate before and after, 0 to below 1.
    """

    mean: Float[Tensor, " d"]
    into: Float[Tensor, "k d"]
    out: Float[Tensor, "d k"]
    turned: Float[Tensor, "k k"]
    kept: Float[np.ndarray, " k"]

    @property
    def rate(self) -> float:
        """``-1/2 sum log(1 - rho_i^2)``, in nats."""
        return channel_rate(self.kept, np.ones_like(self.kept))

    def coordinates(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row k"]:
        """Activations as the channel sees them."""
        return (rows - self.mean.to(rows.device)) @ self.into.to(rows.device).T

    def pass_on(
        self, coordinates: Float[Tensor, "row k"], normal: Float[Tensor, "row k"]
    ) -> Float[Tensor, "row d"]:
        """The activations that come out of the channel.

        Args:
            coordinates: What goes in.
            normal: For each, standard normal numbers along the principal axes: channels of one site
                that are given the same numbers draw the same activation.
        """
        mean, out, turned = (x.to(coordinates.device) for x in (self.mean, self.out, self.turned))
        kept, lost = (torch.from_numpy(x).to(mean) for x in (self.kept, np.sqrt(1 - self.kept**2)))
        return mean + (kept * coordinates + lost * (normal @ turned.T)) @ out.T


@dataclass(frozen=True)
class Directions:
    """Directions of a site's activations, and how much noise in each costs the predictions.

    Attributes:
        mean, into, out, turned: See :class:`Channel`.
        costs: ``mu_i``: half the noise's variance in units of the direction's own, times this, is
            the KL that it costs where noise is small.
    """

    mean: Float[Tensor, " d"]
    into: Float[Tensor, "k d"]
    out: Float[Tensor, "d k"]
    turned: Float[Tensor, "k k"]
    costs: Float[np.ndarray, " k"]

    @property
    def most(self) -> float:
        """What it would cost to the second order to pass nothing on, in nats."""
        return float(self.costs.sum())

    def at_cost(self, nats: float) -> Channel:
        """The channel of least rate that costs so much to the second order, below :attr:`most`."""
        return self._channel(lambda kept: -float(np.log(self.costs @ (1 - kept) / nats)))

    def at_rate(self, nats: float) -> Channel:
        """The channel of this rate that costs least to the second order."""
        return self._channel(lambda kept: channel_rate(kept, np.ones_like(kept)) - nats)

    def alike(self) -> Directions:
        """The same directions, each as costly as they are on average."""
        return replace(self, costs=np.full_like(self.costs, self.costs.mean()))

    def closed(self) -> Channel:
        """The channel that passes nothing on."""
        return self._with(np.zeros_like(self.costs))

    def expected_cost(self, channel: Channel) -> float:
        """What a channel along these directions costs to the second order, in nats."""
        return float(self.costs @ (1 - channel.kept))

    def _channel(self, excess: Callable[[np.ndarray], float]) -> Channel:
        def at(log_weight: float) -> float:
            return excess(kept_correlations(self.costs, float(np.exp(log_weight))))

        scale = float(np.log(self.costs.max()))
        least, most = _LEAST - scale, _MOST - scale
        # Beyond what float64 tells from passing everything on, there is nothing to search.
        weight = brentq(at, least, most, xtol=1e-10) if at(most) > 0 else most
        return self._with(kept_correlations(self.costs, float(np.exp(weight))))

    def _with(self, kept: Float[np.ndarray, " k"]) -> Channel:
        return Channel(self.mean, self.into, self.out, self.turned, kept)


def channel_rate(kept: Float[np.ndarray, " k"], power: Float[np.ndarray, " k"]) -> float:
    """What a channel can pass on of activations of this power, in nats.

    ``1/2 sum log(1 + rho_i^2 v_i / (1 - rho_i^2))``, which is ``-1/2 sum log(1 - rho_i^2)`` where
    every ``v_i`` is 1. The noise is Gaussian, so that this bounds the information that is passed
    on from above, whatever the distribution, and Gaussians meet it (Cover & Thomas 2006, chapter
    9).

    Args:
        kept: The correlation ``rho_i`` of each coordinate.
        power: Mean square ``v_i`` of each coordinate.
    """
    return float(0.5 * np.log1p(kept**2 * power / (1 - kept**2)).sum())


def kept_correlations(costs: Float[np.ndarray, " k"], weight: float) -> Float[np.ndarray, " k"]:
    """Reverse water-filling for a channel that keeps every variance.

    The correlations ``rho_i`` that minimize ``-1/2 sum log(1 - rho_i^2) + weight sum mu_i
    (1 - rho_i)``: the noise in direction i, ``(1 - rho_i)^2 + 1 - rho_i^2 = 2 (1 - rho_i)`` of its
    variance, costs ``mu_i (1 - rho_i)``. Setting the derivative to 0 gives ``rho_i / (1 - rho_i^2)
    = weight mu_i``. Where much is passed on, this is the usual ``d_i = theta / mu_i`` (Cover &
    Thomas 2006, section 10.3) with ``theta = 1 / weight`` and ``rho_i = 1 - d_i / 2``; where little
    is, ``1 - d_i / 2`` would keep a correlation of 1/2 in directions that nothing reads.

    Args:
        costs: ``mu_i``, at least 0.
        weight: Of cost against rate.

    Returns:
        Correlations from 0 to below 1.
    """
    slope = 2 * weight * costs
    kept: np.ndarray = slope / (1 + np.sqrt(1 + slope**2))
    return kept


@dataclass(frozen=True)
class Axes:
    """The principal axes of a site's activations.

    Attributes:
        mean: Mean of the activations.
        axes: Unit vectors, as columns.
        spread: Standard deviation along each, above 0.
    """

    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "d k"]
    spread: Float[Tensor, " k"]


def principal_axes(mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> Axes:
    """The axes along which activations of this covariance vary."""
    power, axes = torch.linalg.eigh(covariance.double())
    real = power > _RESOLUTION * power[-1]
    return Axes(mean, axes[:, real], power[real].sqrt())


def find_directions(along: Axes, fisher: Float[Tensor, "d d"]) -> Directions:
    """The eigenvectors of ``Sigma^(1/2) F Sigma^(1/2)``, which say what matters.

    Args:
        along: Of the covariance Sigma of the activations.
        fisher: F, the Fisher information of the predictions about the activations.
    """
    axes, spread = along.axes, along.spread
    read = (axes * spread).T @ fisher.double() @ (axes * spread)
    costs, turn = torch.linalg.eigh((read + read.T) / 2)
    return Directions(
        mean=along.mean.float(),
        into=((axes / spread) @ turn).T.float(),
        out=((axes * spread) @ turn).float(),
        turned=turn.T.float(),
        # Where no gradient arrives, all directions are alike.
        costs=costs.clamp(min=max(_TRIFLE * float(costs[-1]), _TRIFLE)).cpu().numpy(),
    )
