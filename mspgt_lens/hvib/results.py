"""The trained H-VIB probe's result: rates, relevances and free energy of every site and beta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mspgt_lens.contract import Result, Rows, counted, interval, named, tidy
from mspgt_lens.estimates import Curve


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Result):
    """One quantity at every site and beta, with its 95% interval.

    Attributes:
        values: Mean over held-out positions, shape ``[site, beta]``.
        low: Lower end of the 95% interval, resampling groups.
        high: Upper end of the 95% interval.
        unit: Unit of all three.
        guarantee: One sentence: what the number is, and what it bounds.
    """

    values: Float[np.ndarray, "site beta"]
    low: Float[np.ndarray, "site beta"]
    high: Float[np.ndarray, "site beta"]
    unit: str
    guarantee: str

    def __post_init__(self) -> None:
        for name in ("values", "low", "high"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.ndim != 2 or not np.isfinite(array).all():
                raise ValueError(f"Grid: {name} must be finite, [site, beta], got {array!r}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def heading(self) -> str:
        """Size and unit."""
        n_sites, n_betas = self.values.shape
        return f"Grid of {n_sites} sites and {n_betas} betas in {self.unit}"

    def findings(self) -> list[str]:
        """The largest number, and what the numbers are."""
        site, beta = np.unravel_index(int(np.argmax(self.values)), self.values.shape)
        ends = (x[site, beta] for x in (self.values, self.low, self.high))
        return [f"Largest {interval(*ends)} in row {site}, column {beta}.", self.guarantee]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: ``site, beta`` (their indices), ``value, low, high, unit``."""
        site, beta = (index.ravel() for index in np.indices(self.values.shape))
        ends = {name: getattr(self, name).ravel() for name in ("values", "low", "high")}
        return tidy({"site": site, "beta": beta, **ends, "unit": self.unit}).rename(
            columns={"values": "value"}
        )

    def over_sites(self, beta: int) -> Curve:
        """The curve over depth at the beta of this index.

        Args:
            beta: Number of the column, from 0.

        Returns:
            One point per row of the grid, in its unit.

        Raises:
            IndexError: If there is no such column.
        """
        parts = (self.values[:, beta], self.low[:, beta], self.high[:, beta])
        return Curve(*parts, self.unit, self.guarantee)

    def along_path(self, site: int) -> Curve:
        """The curve over betas at the site of this index.

        Args:
            site: Number of the row, from 0.

        Returns:
            One point per column of the grid, in its unit.

        Raises:
            IndexError: If there is no such row.
        """
        parts = (self.values[site], self.low[site], self.high[site])
        return Curve(*parts, self.unit, self.guarantee)


@dataclass(frozen=True, eq=False, repr=False)
class HvibFit(Result):
    """What a hierarchical variational information bottleneck reads off every site at every beta.

    All numbers are means over groups that neither training nor stopping has seen. Scales keep the
    order of the bands, finest first. The decoder of a scale sees its own t and every coarser one.

    Attributes:
        model_name: The model's name, or ``""`` for bare arrays.
        sites: The site of each row. With a partition there is one row, which reads every scale at
            its own tap, and this is the deepest.
        taps: Scale name to the site that it is read at; empty without a partition.
        betas: Weights of relevance against rate, one fit per site and beta.
        rate: Per scale, ``KL(q(t_s | z) || r(t_s | t_coarser))``: what this scale's t costs beyond
            the next coarser one.
        total_rate: Per scale, the rates of this scale and all coarser ones together: what the
            decoder of this scale sees.
        relevance: Per scale, what the decoder knows about ``Y_s`` beyond its best Gaussian.
        information: Per scale, the same t and decoder scored by contrast: a lower bound on
            Shannon's information, whatever the distributions.
        token_relevance: The same about the class of the next token, or None.
        distortion: ``-log p(next token's class | t) - sum_s log p(Y_s | t)``.
        free_energy: Distortion plus the rates over beta: what training minimized.
        best_step: The training step whose parameters are reported, shape ``[site, beta]``; 0 means
            that nothing better than ignoring z was found.
        n_positions: Positions for ``"training"``, ``"stopping"`` and ``"testing"``.
        n_groups: Groups for each of these.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    sites: tuple[int, ...]
    taps: Mapping[str, int]
    betas: tuple[float, ...]
    rate: Mapping[str, Grid]
    total_rate: Mapping[str, Grid]
    relevance: Mapping[str, Grid]
    information: Mapping[str, Grid]
    token_relevance: Grid | None
    distortion: Grid
    free_energy: Grid
    best_step: Int[np.ndarray, "site beta"]
    n_positions: Mapping[str, int]
    n_groups: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def scales(self) -> tuple[str, ...]:
        """Scale names, finest first."""
        return tuple(self.rate)

    def grids(self) -> Iterator[tuple[str, str, Grid]]:
        """``(quantity, scale, grid)`` of everything; the scale is empty where there is none.

        Yields:
            Rates and relevances scale by scale, in nats per position, then those that have no
            scale.
        """
        for name in ("rate", "total_rate", "relevance", "information"):
            for scale, grid in getattr(self, name).items():
                yield name, scale, grid
        if self.token_relevance is not None:
            yield "token_relevance", "", self.token_relevance
        yield "distortion", "", self.distortion
        yield "free_energy", "", self.free_energy

    def heading(self) -> str:
        """The model and the sizes of the fit."""
        return (
            f"HvibFit{named(self.model_name)}: {counted(len(self.sites), 'site')}, "
            f"{counted(len(self.betas), 'beta')}, tested on "
            f"{self.n_positions.get('testing', 0):,} positions in "
            f"{counted(self.n_groups.get('testing', 0), 'group')}"
        )

    def rows(self) -> Rows:
        """Per scale, the most information at the largest beta, and what it costs there."""
        last = int(np.argmax(self.betas))
        rows: Rows = [("scale", "information", "site", "total rate", "relevance")]
        for scale, grid in self.information.items():
            best = int(np.argmax(grid.values[:, last]))
            grids = (grid, self.total_rate[scale], self.relevance[scale])
            cells = [interval(*(x[best, last] for x in (g.values, g.low, g.high))) for g in grids]
            rows.append((scale, cells[0], str(self.sites[best]), *cells[1:]))
        return rows

    def findings(self) -> list[str]:
        """Which beta the numbers are of."""
        return [f"Nats per position at beta {max(self.betas):g}; 95% intervals over groups."]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: ``model, quantity, scale, site, beta, value, low, high, unit``."""
        n_sites, n_betas = len(self.sites), len(self.betas)
        frames = [
            pd.DataFrame(
                {
                    "model": self.model_name,
                    "quantity": quantity,
                    "scale": scale,
                    "site": np.repeat(self.sites, n_betas),
                    "beta": np.tile(self.betas, n_sites),
                    "value": grid.values.ravel(),
                    "low": grid.low.ravel(),
                    "high": grid.high.ravel(),
                    "unit": grid.unit,
                }
            )
            for quantity, scale, grid in self.grids()
        ]
        return pd.concat(frames, ignore_index=True)
