"""Results: frozen, self-describing, saved as safetensors with a JSON header (never pickled)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.storage import read_result, write_result

Unit = Literal["nats", "bits"]
NATS_PER_BIT = float(np.log(2.0))


@dataclass(frozen=True, eq=False)
class Curve:
    """One quantity along depth, with its 95% interval.

    Attributes:
        values: The estimate at each point, shape ``[point]``.
        low: Lower end of the 95% interval, shape ``[point]``.
        high: Upper end of the 95% interval, shape ``[point]``.
        unit: Unit of all three, such as ``"nats"`` or ``"tokens"``.
        guarantee: One sentence: what the number is, and what it bounds.
        by_fold: What each fold of groups says on its own (a jackknife pseudo-value where the
            quantity is not a mean), shape ``[fold, point]``; None where that is not known.
    """

    values: Float[np.ndarray, " point"]
    low: Float[np.ndarray, " point"]
    high: Float[np.ndarray, " point"]
    unit: str
    guarantee: str
    by_fold: Float[np.ndarray, "fold point"] | None = None

    def __post_init__(self) -> None:
        for name in ("values", "low", "high"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.ndim != 1 or not np.isfinite(array).all():
                raise ValueError(f"Curve: {name} must be a finite vector, got {array!r}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.by_fold is not None:
            folds = np.array(self.by_fold, dtype=np.float64)
            if folds.ndim != 2 or folds.shape[1] != len(self.values):
                raise ValueError(
                    f"Curve: by_fold must have shape [fold, {len(self.values)}], got {folds.shape}"
                )
            folds.flags.writeable = False
            object.__setattr__(self, "by_fold", folds)
        if not len(self.values) == len(self.low) == len(self.high):
            raise ValueError("Curve: values, low and high must have the same length")
        if (self.low > self.values).any() or (self.values > self.high).any():
            raise ValueError("Curve: the interval must hold the value at every point")

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Curve)
            and (self.unit, self.guarantee) == (other.unit, other.guarantee)
            and all(
                np.array_equal(getattr(self, name), getattr(other, name))
                for name in ("values", "low", "high", "by_fold")
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def to(self, unit: Unit) -> Curve:
        """The same curve in nats or bits.

        Raises:
            ValueError: If the curve is not an information quantity.
        """
        if unit not in ("nats", "bits"):
            raise ValueError(f"unit must be 'nats' or 'bits', got {unit!r}")
        if self.unit not in ("nats", "bits"):
            raise ValueError(f"only information converts to {unit}; this curve is in {self.unit!r}")
        if unit == self.unit:
            return self
        factor = NATS_PER_BIT if unit == "nats" else 1.0 / NATS_PER_BIT
        return Curve(
            self.values * factor,
            self.low * factor,
            self.high * factor,
            unit,
            self.guarantee,
            None if self.by_fold is None else self.by_fold * factor,
        )


@dataclass(frozen=True)
class LayerProfile:
    """What each layer of one model keeps of the past and predicts of the future.

    Site ``l`` is the residual stream before block ``l`` (0 ... L - 1); site ``L`` is after the last
    block. Information curves run over the ``L + 1`` sites, ``signals`` over the ``L`` blocks.

    Attributes:
        model_name: The model's name as TransformerLens knows it.
        n_layers: Number of blocks, L.
        n_tokens: Valid positions that entered the moments.
        n_groups: Groups (documents) that they came from.
        bands: Scale name to its band of token offsets ``(a, b)``.
        compression: Channel rate of the standardized residual stream (nats per token).
        relevance: Held-out cross-entropy gain of the ridge lens over a unigram model (nats per
            token), on a sample of positions.
        retained: Per scale, information about what was read (nats per token).
        predicted: Per scale, information about what is to come (nats per token).
        signals: Name to the curve over blocks of a per-block signal.
        logit_lens: As ``relevance`` for the raw logit lens, or None where it was not asked for.
        settings: Everything that decides the numbers: bands, noise, folds, seed and so on.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting the curves.
    """

    model_name: str
    n_layers: int
    n_tokens: int
    n_groups: int
    bands: Mapping[str, tuple[int, int]]
    compression: Curve
    relevance: Curve
    retained: Mapping[str, Curve]
    predicted: Mapping[str, Curve]
    signals: Mapping[str, Curve]
    logit_lens: Curve | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("bands", "retained", "predicted", "signals", "settings", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for quantity, _, curve in self.curves():
            expected = self.n_layers + (quantity not in self.signals)
            if len(curve) != expected:
                raise ValueError(
                    f"LayerProfile: {quantity} needs {expected} points for {self.n_layers} blocks, "
                    f"got {len(curve)}"
                )

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the scales, in the order of ``bands``."""
        return tuple(self.bands)

    def curves(self) -> Iterator[tuple[str, str, Curve]]:
        """Every curve as ``(quantity, scale, curve)``; scale is ``""`` where there is none."""
        yield "compression", "", self.compression
        yield "relevance", "", self.relevance
        if self.logit_lens is not None:
            yield "logit_lens", "", self.logit_lens
        for quantity, by_scale in (("retained", self.retained), ("predicted", self.predicted)):
            for scale, curve in by_scale.items():
                yield quantity, scale, curve
        for name, curve in self.signals.items():
            yield name, "", curve

    def to_dataframe(self, unit: Unit = "nats") -> pd.DataFrame:
        """All curves as a tidy table.

        Args:
            unit: Unit of the information quantities; the other signals keep theirs.

        Returns:
            One row per curve and point: ``model, quantity, scale, site, value, low, high, unit``.
            For a signal, ``site`` is the block.
        """
        frames = []
        for quantity, scale, curve in self.curves():
            shown = curve.to(unit) if curve.unit in ("nats", "bits") else curve
            frames.append(
                pd.DataFrame(
                    {
                        "model": self.model_name,
                        "quantity": quantity,
                        "scale": scale,
                        "site": np.arange(len(shown)),
                        "value": shown.values,
                        "low": shown.low,
                        "high": shown.high,
                        "unit": shown.unit,
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the profile to one ``.safetensors`` file with a JSON header.

        Args:
            path: Where to write; the suffix is added where it is missing.

        Returns:
            The path that was written.
        """
        arrays: dict[str, np.ndarray] = {}
        described = []
        for index, (quantity, scale, curve) in enumerate(self.curves()):
            arrays[f"curve{index}"] = np.stack([curve.values, curve.low, curve.high])
            if curve.by_fold is not None:
                arrays[f"folds{index}"] = curve.by_fold
            described.append(
                {
                    "quantity": quantity,
                    "scale": scale,
                    "unit": curve.unit,
                    "guarantee": curve.guarantee,
                    "signal": quantity in self.signals,
                }
            )
        header = {
            "model_name": self.model_name,
            "n_layers": self.n_layers,
            "n_tokens": self.n_tokens,
            "n_groups": self.n_groups,
            "bands": {name: list(band) for name, band in self.bands.items()},
            "curves": described,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "warnings": list(self.warnings),
        }
        return write_result(path, "LayerProfile", header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerProfile:
        """Read a profile that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no saved profile.
        """
        header, arrays = read_result(path, "LayerProfile")
        single: dict[str, Curve] = {}
        by_scale: dict[str, dict[str, Curve]] = {"retained": {}, "predicted": {}}
        signals: dict[str, Curve] = {}
        for index, item in enumerate(header["curves"]):
            values, low, high = arrays[f"curve{index}"]
            curve = Curve(
                values, low, high, item["unit"], item["guarantee"], arrays.get(f"folds{index}")
            )
            if item["signal"]:
                signals[item["quantity"]] = curve
            elif item["quantity"] in by_scale:
                by_scale[item["quantity"]][item["scale"]] = curve
            else:
                single[item["quantity"]] = curve
        return cls(
            model_name=header["model_name"],
            n_layers=header["n_layers"],
            n_tokens=header["n_tokens"],
            n_groups=header["n_groups"],
            bands={name: (band[0], band[1]) for name, band in header["bands"].items()},
            compression=single["compression"],
            relevance=single["relevance"],
            logit_lens=single.get("logit_lens"),
            signals=signals,
            settings=header["settings"],
            versions=header["versions"],
            warnings=tuple(header["warnings"]),
            **by_scale,
        )
