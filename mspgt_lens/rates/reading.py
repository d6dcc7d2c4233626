"""Rates read off between channels that were run, and never beyond them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def read_rate(
    rates: Float[np.ndarray, " channel"], kl: Float[np.ndarray, " channel"], distortion: float
) -> float:
    """The least rate of two channels used in turn that move predictions by this much on average.

    Used for a share of the targets each, two channels pass on the mean of their rates and move
    predictions by the mean of their KL: what is read off between them can be built, too.

    Args:
        rates: Of the channels that were run, in nats.
        kl: How far each moves predictions, in nats.
        distortion: How far they may be moved, in nats.

    Returns:
        A rate, in nats.

    Raises:
        ValueError: If no channel moves predictions by so little: nothing is extrapolated.
    """
    enough, more = kl <= distortion, kl > distortion
    if not enough.any():
        raise ValueError(f"kl must reach down to {distortion:g} nats, got {kl.min():g} at least")
    best = float(rates[enough].min())
    if not more.any():
        return best
    share = (kl[more][:, None] - distortion) / (kl[more][:, None] - kl[enough][None, :])
    mixed = rates[more][:, None] + share * (rates[enough][None, :] - rates[more][:, None])
    return min(best, float(mixed.min()))


def read_rates(
    rates: Sequence[float], kl: Sequence[float], distortions: Sequence[float]
) -> Float[np.ndarray, " distortion"]:
    """:func:`read_rate` at several distortions."""
    return np.array([read_rate(np.array(rates), np.array(kl), at) for at in distortions])
