"""Which channels to run next until every distortion lies between two that were run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mspgt_lens.rates.channel import Directions
from mspgt_lens.rates.measuring import Installed, Reading
from mspgt_lens.rates.reading import read_rates
from mspgt_lens.rates.results import ChannelRun
from mspgt_lens.statistics import bootstrap_interval

# A channel cannot be asked to cost more than nothing passed on does; nearly as much tells little.
_MOST_SHARE = 0.9
# The step of the last rungs, below the least distortion.
_STEP = 0.6
_TRIFLE = 1e-9


class Ladder:
    """Channels of one site, scale and kind of noise, from nothing passed on to ever more.

    Each distortion in turn, from the largest, is aimed at with the channel whose expected cost is
    the distortion times what the last channel cost less than was measured. After the least of them,
    more is passed on until the measured KL is below it with its whole interval.

    Attributes:
        runs: The channels that were run, with what they did.
    """

    def __init__(
        self,
        site: int,
        scale: str,
        shaped: bool,
        directions: Directions,
        distortions: Sequence[float],
        excess: float,
    ) -> None:
        """Start one.

        Args:
            site: The site.
            scale: The band.
            shaped: Whether the Fisher information shapes the channels.
            directions: What the channels act along.
            distortions: What is to be reached, rising.
            excess: Measured KL over the expected one, of any channel that was run before.
        """
        self.site, self.scale, self.shaped = site, scale, shaped
        self.directions, self.distortions = directions, tuple(distortions)
        self.runs: list[ChannelRun] = []
        self._excess = excess
        self._left = list(distortions)

    @property
    def done(self) -> bool:
        """Whether every distortion lies between channels that were run, with the whole interval."""
        return bool(self.runs) and self.runs[-1].high <= self.distortions[0]

    def next(self) -> Installed:
        """What is to be run next."""
        if not self.runs:
            channel = self.directions.closed()
        else:
            # What nothing passed on does not reach, nothing has to be run for.
            while self._left and self._left[-1] >= self.runs[0].kl:
                self._left.pop()
            last = self.runs[-1]
            aim = self._left.pop() if self._left else _STEP * min(last.kl, self.distortions[0])
            ceiling = _MOST_SHARE * (last.expected if len(self.runs) > 1 else self.directions.most)
            channel = self.directions.at_cost(min(aim / self._excess, ceiling))
        return Installed(self.site, self.scale, channel)

    def tell(
        self,
        installed: Installed,
        reading: Reading,
        seed: int,
    ) -> None:
        """Take what a channel did."""
        kl, low, high = (
            float(end[0])
            for end in bootstrap_interval(reading.kl[:, None], reading.groups, seed=seed)
        )
        expected = self.directions.expected_cost(installed.channel)
        self.runs.append(
            ChannelRun(self.scale, self.site, self.shaped, reading.rate, kl, low, high, expected)
        )
        self._excess = max(kl, _TRIFLE) / max(expected, _TRIFLE)

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rate at every distortion, with the rates at which the ends of the KL's interval meet it.

        Returns:
            ``(rate, low, high)``, each ``[distortion]``.
        """
        rates = [run.rate for run in self.runs]
        rate, low, high = (
            read_rates(rates, [getattr(run, end) for run in self.runs], self.distortions)
            for end in ("kl", "low", "high")
        )
        return rate, low, high
