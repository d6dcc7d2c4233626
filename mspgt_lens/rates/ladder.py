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
# The step of the last rungs, below the least KL that was seen.
_STEP = 0.6
_TRIFLE = 1e-12
# Powers of the measured cost that the expected one is taken to go with.
_SLOPES = (0.5, 2.0)


class Ladder:
    """Channels of one site, scale and kind of noise, from nothing passed on to ever more.

    Each distortion in turn is aimed at, from the largest. After the least of them, more is passed
    on until the measured KL is below it with its whole interval.

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
        known: tuple[float, float],
    ) -> None:
        """Start one.

        Args:
            site: The site.
            scale: The band.
            shaped: Whether the Fisher information shapes the channels.
            directions: What the channels act along.
            distortions: What is to be reached, rising.
            known: Expected and measured cost of a channel that was run elsewhere, in nats.
        """
        self.site, self.scale, self.shaped = site, scale, shaped
        self.directions, self.distortions = directions, tuple(distortions)
        self.runs: list[ChannelRun] = []
        self._elsewhere = known
        self._left = list(distortions)

    @property
    def done(self) -> bool:
        """Whether every distortion lies between channels that were run, with the whole interval."""
        return bool(self.runs) and self.runs[-1].high <= self.distortions[0]

    def next(self) -> Installed:
        """What is to be run next."""
        if self.runs:
            # What moves by less when nothing is passed on needs no channel.
            self._left = [level for level in self._left if level < self.runs[0].kl]
            least = min(run.kl for run in self.runs)
            known = [(run.expected, run.kl) for run in self.runs]
            if self._left:
                aim = self._left.pop()
                if self._elsewhere < min(known):
                    known.append(self._elsewhere)
            else:
                aim = _STEP * min(least, self.distortions[0])
            cost = min(_likely_cost(known, aim), _MOST_SHARE * self.directions.most)
            channel = self.directions.at_cost(cost)
        else:
            channel = self.directions.closed()
        return Installed(self.site, self.scale, channel)

    def tell(self, installed: Installed, reading: Reading, seed: int) -> None:
        """Take what a channel did."""
        kl, low, high = (
            float(end[0])
            for end in bootstrap_interval(reading.kl[:, None], reading.groups, seed=seed)
        )
        expected = self.directions.expected_cost(installed.channel)
        self.runs.append(
            ChannelRun(self.scale, self.site, self.shaped, reading.rate, kl, low, high, expected)
        )

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


def _likely_cost(known: Sequence[tuple[float, float]], measured: float) -> float:
    """The expected cost at which so much is likely to be measured, by what other channels did."""
    logs = np.log(np.maximum(sorted(known), _TRIFLE))
    expected, kl = logs[:, 0], np.maximum.accumulate(logs[:, 1])
    # Below what is known: on as the last two tell, or in proportion, as small noise costs.
    rise = float(np.ptp(kl[:2]))
    slope = float(np.clip(np.ptp(expected[:2]) / rise, *_SLOPES)) if rise else 1.0
    below = slope * min(0.0, np.log(measured) - kl[0])
    return float(np.exp(np.interp(np.log(measured), kl, expected) + below))
