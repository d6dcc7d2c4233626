"""Rates that predictions need of every site, and the channels that were run to find them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from mspgt_lens.contract import Result, Rows, counted, interval, named, tidy
from mspgt_lens.estimates import Curve

# The distortion that tables and figures show first.
SHOWN = 0.1
# Whichever needs less, or one of the two.
Noise = Literal["either", "shaped", "covariance"]


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
        shaped_rate: The rate that channels need which the Fisher information shaped, in nats per
            token, ``[scale, site, distortion]``.
        shaped_low: Lower ends of its 95% intervals: where the interval of the measured KL meets D.
        shaped_high: Upper ends.
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
    shaped_rate: Float[np.ndarray, "scale site distortion"]
    shaped_low: Float[np.ndarray, "scale site distortion"]
    shaped_high: Float[np.ndarray, "scale site distortion"]
    covariance_rate: Float[np.ndarray, "scale site distortion"]
    covariance_low: Float[np.ndarray, "scale site distortion"]
    covariance_high: Float[np.ndarray, "scale site distortion"]
    shrinkage: Float[np.ndarray, "scale site"]
    runs: tuple[ChannelRun, ...]
    guarantee: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def is_shaped(self) -> Bool[np.ndarray, "scale site distortion"]:
        """Whether shaped channels need no more than covariance-shaped noise does."""
        no_more: np.ndarray = self.shaped_rate <= self.covariance_rate
        return no_more

    @property
    def rate(self) -> Float[np.ndarray, "scale site distortion"]:
        """The least rate found, in nats per token: that of the kind of noise that needs less there.

        Both kinds bound from above what is needed, and so does the lesser at every scale, site and
        distortion. It is chosen by the same measurement that tells it, which flatters it where the
        two need alike: with independent errors by a seventh of its interval's width on average, and
        by less with these, for both are measured at the same targets.
        """
        return self._parts()["rate"]["value"]

    @property
    def low(self) -> Float[np.ndarray, "scale site distortion"]:
        """Lower ends of the 95% intervals of :attr:`rate`, each of the same kind of noise."""
        return self._parts()["rate"]["low"]

    @property
    def high(self) -> Float[np.ndarray, "scale site distortion"]:
        """Upper ends."""
        return self._parts()["rate"]["high"]

    def over_sites(self, scale: str, distortion: float, *, noise: Noise = "either") -> Curve:
        """The rate over depth at one distortion.

        Args:
            scale: Which band of positions goes through the channel.
            distortion: One of ``distortions``, in nats.
            noise: ``"shaped"`` for channels that the Fisher information shaped, ``"covariance"``
                for covariance-shaped noise, ``"either"`` for whichever needs less at each site.

        Returns:
            One point per site of ``sites``, in nats.

        Raises:
            ValueError: If there is no such scale, distortion or noise.
        """
        if distortion not in self.distortions:
            raise ValueError(
                f"distortion must be one of {', '.join(f'{d:g}' for d in self.distortions)}, got "
                f"{distortion!r}: pass distortions= that hold it to rate_distortion"
            )
        column = self.distortions.index(distortion)
        return self._curve(np.s_[self._scale(scale), :, column], noise)

    def over_distortions(self, scale: str, site: int, *, noise: Noise = "either") -> Curve:
        """The rate-distortion function R(D) of one site.

        Args:
            scale: Which band of positions goes through the channel.
            site: One of ``sites``.
            noise: ``"shaped"`` for channels that the Fisher information shaped, ``"covariance"``
                for covariance-shaped noise, ``"either"`` for whichever needs less at each
                distortion.

        Returns:
            One point per entry of ``distortions``, in nats.

        Raises:
            ValueError: If there is no such scale, site or noise.
        """
        if site not in self.sites:
            raise ValueError(f"site must be one of {', '.join(map(str, self.sites))}, got {site!r}")
        return self._curve(np.s_[self._scale(scale), self.sites.index(site)], noise)

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
        said = [f"Needed most: {words}."]
        if n_plain := int((~self.is_shaped[:, :, self.shown]).sum()):
            said.append(
                "Noise of one correlation in every direction needs less than shaped noise at "
                f"{n_plain} of {peaks.size} scales and sites, and is what counts there."
            )
        return [*said, self.guarantee]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per rate that was read off, and one per channel that was run.

        Returns:
            Columns ``model, quantity, scale, site, distortion, value, low, high, unit, rate``.
            Quantities ``shaped_rate``, ``covariance_rate`` and the lesser of the two, ``rate``, are
            read off at ``distortion``; ``shaped_channel_kl`` and ``covariance_channel_kl`` are the
            KL that was measured under a channel, whose rate stands in ``rate``.
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
                "quantity": f"{'shaped' if run.shaped else 'covariance'}_channel_kl",
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

    def _curve(self, where: Any, noise: Noise) -> Curve:
        if noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {noise!r}")
        parts = self._parts()["rate" if noise == "either" else f"{noise}_rate"]
        values, low, high = (part[where] for part in parts.values())
        return Curve(values, low, high, "nats", self.guarantee)

    def _parts(self) -> dict[str, dict[str, Float[np.ndarray, "scale site distortion"]]]:
        """Name of each kind of rate to its values and interval; the lesser of the two first."""
        shaped = {"value": self.shaped_rate, "low": self.shaped_low, "high": self.shaped_high}
        covariance = {
            "value": self.covariance_rate,
            "low": self.covariance_low,
            "high": self.covariance_high,
        }
        lesser = {
            name: np.where(self.is_shaped, part, covariance[name]) for name, part in shaped.items()
        }
        return {"rate": lesser, "shaped_rate": shaped, "covariance_rate": covariance}
