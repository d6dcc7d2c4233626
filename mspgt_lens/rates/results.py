"""Rates that predictions need of every site, and the channels that were run to find them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.contract import Result, Rows, counted, interval, named, tidy
from mspgt_lens.estimates import Curve

# The distortion that tables and figures show first.
SHOWN = 0.1


class ChannelRun(NamedTuple):
    """One channel that was run, with what it did to predictions that shaped no channel.

    Attributes:
        scale: The band of positions before a target that went through it.
        site: Where it was.
        shaped: Whether the Fisher information shaped it; else it keeps one correlation in every
            direction.
        rate: What it passes on, in nats per token.
        kl: Mean KL divergence from the clean prediction to the changed one, in nats.
        low: Lower end of the 95% interval of ``kl``, over groups.
        high: Upper end.
        expected: The KL that the Fisher information says, to the second order.
    """

    scale: str
    site: int
    shaped: bool
    rate: float
    kl: float
    low: float
    high: float
    expected: float


@dataclass(frozen=True, eq=False, repr=False)
class RateDistortion(Result):
    """How little one site must pass on for the model's predictions to move by no more than D.

    Attributes:
        model_name: The model's name.
        n_layers: Number of blocks, L.
        sites: The sites measured, rising.
        bands: Scale name to the offsets of the positions that go through the channel: a target that
            is predicted at position t has position ``t + 1 - k`` at offset k.
        distortions: D: KL divergences from the clean predictions, in nats, rising.
        rate: The least rate found, in nats per token, ``[scale, site, distortion]``.
        low: Lower ends of its 95% intervals: where the interval of the measured KL meets D.
        high: Upper ends.
        covariance_rate: The same of covariance-shaped noise, which keeps one correlation in every
            direction.
        covariance_low: Lower ends.
        covariance_high: Upper ends.
        shrinkage: Share of the Fisher information that was replaced by a multiple of the identity,
            chosen by measured KL, ``[scale, site]``.
        runs: Every channel that was run to find the rates.
        guarantee: One sentence: what the rates are, and what they bound.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    n_layers: int
    sites: tuple[int, ...]
    bands: Mapping[str, tuple[int, int]]
    distortions: tuple[float, ...]
    rate: Float[np.ndarray, "scale site distortion"]
    low: Float[np.ndarray, "scale site distortion"]
    high: Float[np.ndarray, "scale site distortion"]
    covariance_rate: Float[np.ndarray, "scale site distortion"]
    covariance_low: Float[np.ndarray, "scale site distortion"]
    covariance_high: Float[np.ndarray, "scale site distortion"]
    shrinkage: Float[np.ndarray, "scale site"]
    runs: tuple[ChannelRun, ...]
    guarantee: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def over_sites(self, scale: str, distortion: float, *, shaped: bool = True) -> Curve:
        """The rate over depth at one distortion.

        Args:
            scale: Which band of positions goes through the channel.
            distortion: One of ``distortions``, in nats.
            shaped: Of the channel that the Fisher information shaped; else of covariance-shaped
                noise.

        Returns:
            One point per site of ``sites``, in nats.

        Raises:
            ValueError: If there is no such scale or distortion.
        """
        if distortion not in self.distortions:
            raise ValueError(
                f"distortion must be one of {', '.join(f'{d:g}' for d in self.distortions)}, got "
                f"{distortion!r}: pass distortions= that hold it to rate_distortion"
            )
        column = self.distortions.index(distortion)
        return self._curve(np.s_[self._scale(scale), :, column], shaped)

    def over_distortions(self, scale: str, site: int, *, shaped: bool = True) -> Curve:
        """The rate-distortion function R(D) of one site.

        Args:
            scale: Which band of positions goes through the channel.
            site: One of ``sites``.
            shaped: Of the channel that the Fisher information shaped; else of covariance-shaped
                noise.

        Returns:
            One point per entry of ``distortions``, in nats.

        Raises:
            ValueError: If there is no such scale or site.
        """
        if site not in self.sites:
            raise ValueError(f"site must be one of {', '.join(map(str, self.sites))}, got {site!r}")
        return self._curve(np.s_[self._scale(scale), self.sites.index(site)], shaped)

    def heading(self) -> str:
        """The model and what was measured."""
        return (
            f"RateDistortion{named(self.model_name)}: {counted(len(self.sites), 'site')}, "
            f"{counted(len(self.bands), 'scale')}, {counted(len(self.runs), 'channel')} run"
        )

    def rows(self) -> Rows:
        """The rate of every scale and site at the distortion nearest to 0.1 nats."""
        at = self.shown
        parts = (self.rate, self.low, self.high)
        return [
            (f"nats at D = {self.distortions[at]:g}", *self.bands),
            *(
                (
                    f"site {site}",
                    *(interval(*(x[i, j, at] for x in parts)) for i in range(len(self.bands))),
                )
                for j, site in enumerate(self.sites)
            ),
        ]

    def findings(self) -> list[str]:
        """Where each scale is needed most, and what the numbers bound."""
        peaks = self.rate[:, :, self.shown]
        words = ", ".join(
            f"{scale} at site {self.sites[int(np.argmax(peak))]}"
            for scale, peak in zip(self.bands, peaks, strict=True)
        )
        return [f"Needed most: {words}.", self.guarantee]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per rate that was read off, and one per channel that was run.

        Returns:
            Columns ``model, quantity, scale, site, distortion, value, low, high, unit, rate``.
            Quantities ``rate`` and ``covariance_rate`` are read off at ``distortion``;
            ``channel_kl`` and ``covariance_channel_kl`` are the KL that was measured under a
            channel, whose rate stands in ``rate``.
        """
        read = [
            tidy(
                {
                    "model": self.model_name,
                    "quantity": name,
                    "scale": scale,
                    "site": np.repeat(self.sites, len(self.distortions)),
                    "distortion": np.tile(self.distortions, len(self.sites)),
                    **{key: part[i].ravel() for key, part in parts.items()},
                    "unit": "nats",
                }
            )
            for name, parts in self._parts().items()
            for i, scale in enumerate(self.bands)
        ]
        ran = [
            {
                "model": self.model_name,
                "quantity": "channel_kl" if run.shaped else "covariance_channel_kl",
                "scale": run.scale,
                "site": run.site,
                "rate": run.rate,
                "value": run.kl,
                "low": run.low,
                "high": run.high,
                "unit": "nats",
            }
            for run in self.runs
        ]
        return pd.concat([*read, pd.DataFrame(ran)], ignore_index=True)

    @property
    def shown(self) -> int:
        """Number of the distortion nearest to 0.1 nats."""
        return int(np.abs(np.log(np.array(self.distortions) / SHOWN)).argmin())

    def _scale(self, scale: str) -> int:
        if scale not in self.bands:
            raise ValueError(f"scale must be one of {', '.join(self.bands)}, got {scale!r}")
        return list(self.bands).index(scale)

    def _curve(self, where: Any, shaped: bool) -> Curve:
        parts = self._parts()["rate" if shaped else "covariance_rate"]
        values, low, high = (part[where] for part in parts.values())
        return Curve(values, low, high, "nats", self.guarantee)

    def _parts(self) -> dict[str, dict[str, Float[np.ndarray, "scale site distortion"]]]:
        """Name of each kind of rate to its values and interval."""
        return {
            "rate": {"value": self.rate, "low": self.low, "high": self.high},
            "covariance_rate": {
                "value": self.covariance_rate,
                "low": self.covariance_low,
                "high": self.covariance_high,
            },
        }
