"""The result of a profile: curves over depth, their settings, and files that keep them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.information.frontier import DEFAULT_BETAS, Frontier
from mspgt_lens.results import Curve, Unit
from mspgt_lens.storage import read_result, write_result


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
        added: Per scale, what its future adds to that of the coarser scales: ``I(z; Y_global)``,
            ``I(z; Y_intermediate | Y_global)`` and so on (nats per token). The parts sum to the
            information about all scales' futures together.
        signals: Name to the curve over blocks of a per-block signal.
        correlations: Per scale, held-out canonical correlations of each site with its future, shape
            ``[fold, site, component]``: what :meth:`frontier` is computed from.
        fold_weights: Positions of each fold, shape ``[fold]``.
        logit_lens: As ``relevance`` for the raw logit lens, or None where it was not asked for.
        control: ``"random_weights"`` or ``"shuffled_tokens"`` if this is a null to compare with;
            None for the model itself.
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
    added: Mapping[str, Curve] = field(default_factory=dict)
    correlations: Mapping[str, Float[np.ndarray, "fold site component"]] = field(
        default_factory=dict, compare=False
    )
    fold_weights: tuple[float, ...] = ()
    logit_lens: Curve | None = None
    control: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        mappings = "bands retained predicted added correlations signals settings versions"
        for name in mappings.split():
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
        for quantity in ("retained", "predicted", "added"):
            by_scale: Mapping[str, Curve] = getattr(self, quantity)
            for scale, curve in by_scale.items():
                yield quantity, scale, curve
        for name, curve in self.signals.items():
            yield name, "", curve

    def frontier(
        self, site: int, scale: str, betas: Float[np.ndarray, " beta"] = DEFAULT_BETAS
    ) -> Frontier:
        """The Gaussian information bottleneck between one site and one scale's future.

        Args:
            site: 0 ... L.
            scale: One of ``scales``.
            betas: Weights of relevance against rate, at least 1.

        Raises:
            ValueError: If there is no such site or scale, or the profile was saved by a version
                that kept no correlations.
        """
        if not self.correlations:
            raise ValueError(
                "this profile holds no canonical correlations (versions before 0.3 did not save "
                "them): run profile_layers again"
            )
        if scale not in self.correlations:
            raise ValueError(f"scale must be one of {', '.join(self.scales)}, got {scale!r}")
        if not 0 <= site <= self.n_layers:
            raise ValueError(f"site must be 0 to {self.n_layers}, got {site}")
        by_fold = self.correlations[scale][:, site]
        return Frontier(np.asarray(betas, dtype=float), by_fold, np.array(self.fold_weights))

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
        arrays |= {f"correlations.{name}": value for name, value in self.correlations.items()}
        header = {
            "model_name": self.model_name,
            "n_layers": self.n_layers,
            "n_tokens": self.n_tokens,
            "n_groups": self.n_groups,
            "bands": {name: list(band) for name, band in self.bands.items()},
            "control": self.control,
            "curves": described,
            "fold_weights": list(self.fold_weights),
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
        by_scale: dict[str, dict[str, Curve]] = {"retained": {}, "predicted": {}, "added": {}}
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
            control=header.get("control"),
            signals=signals,
            correlations={
                scale: arrays[f"correlations.{scale}"]
                for scale in header["bands"]
                if f"correlations.{scale}" in arrays
            },
            fold_weights=tuple(header.get("fold_weights", ())),
            settings=header["settings"],
            versions=header["versions"],
            warnings=tuple(header["warnings"]),
            **by_scale,
        )
