"""The trained H-VIB probe's result: rates, relevances and free energy of every site and beta."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mspgt_lens.results import Curve
from mspgt_lens.storage import read_result, write_result

_KIND = "HvibFit"


@dataclass(frozen=True, eq=False)
class Grid:
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and all(
            np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def over_sites(self, beta: int) -> Curve:
        """The curve over depth at the beta of this index."""
        parts = (self.values[:, beta], self.low[:, beta], self.high[:, beta])
        return Curve(*parts, self.unit, self.guarantee)

    def along_path(self, site: int) -> Curve:
        """The curve over betas at the site of this index."""
        parts = (self.values[site], self.low[site], self.high[site])
        return Curve(*parts, self.unit, self.guarantee)


@dataclass(frozen=True, eq=False)
class HvibFit:
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

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, f.name, MappingProxyType(dict(value)))
        steps = np.array(self.best_step)
        steps.flags.writeable = False
        object.__setattr__(self, "best_step", steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HvibFit) and all(
            np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs
            for mine, theirs in (
                (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
            )
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def scales(self) -> tuple[str, ...]:
        """Scale names, finest first."""
        return tuple(self.rate)

    def grids(self) -> Iterator[tuple[str, str, Grid]]:
        """``(quantity, scale, grid)`` of everything; the scale is empty where there is none."""
        for name in ("rate", "total_rate", "relevance", "information"):
            for scale, grid in getattr(self, name).items():
                yield name, scale, grid
        if self.token_relevance is not None:
            yield "token_relevance", "", self.token_relevance
        yield "distortion", "", self.distortion
        yield "free_energy", "", self.free_energy

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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one ``.safetensors`` file with a JSON header.

        Args:
            path: Where to write; the suffix is added where it is missing.

        Returns:
            The path that was written.
        """
        header: dict[str, Any] = {
            name: getattr(self, name) for name in ("model_name", "sites", "betas", "warnings")
        }
        for name in ("taps", "n_positions", "n_groups", "settings", "versions"):
            header[name] = dict(getattr(self, name))
        arrays = {"best_step": self.best_step}
        described = []
        for index, (quantity, scale, grid) in enumerate(self.grids()):
            arrays[f"grid{index}"] = np.stack([grid.values, grid.low, grid.high])
            described.append([quantity, scale, grid.unit, grid.guarantee])
        return write_result(path, _KIND, header | {"grids": described}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HvibFit:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no saved result of this kind.
        """
        header, arrays = read_result(path, _KIND)
        by_scale: dict[str, dict[str, Grid]] = {}
        single: dict[str, Grid] = {}
        for index, (quantity, scale, unit, guarantee) in enumerate(header["grids"]):
            value, low, high = arrays[f"grid{index}"]
            grid = Grid(value, low, high, unit, guarantee)
            if scale:
                by_scale.setdefault(quantity, {})[scale] = grid
            else:
                single[quantity] = grid
        return cls(
            model_name=header["model_name"],
            sites=tuple(header["sites"]),
            taps=header["taps"],
            betas=tuple(header["betas"]),
            token_relevance=single.get("token_relevance"),
            distortion=single["distortion"],
            free_energy=single["free_energy"],
            best_step=arrays["best_step"],
            n_positions=header["n_positions"],
            n_groups=header["n_groups"],
            settings=header["settings"],
            versions=header["versions"],
            warnings=tuple(header["warnings"]),
            **by_scale,
        )
