"""A profile made up for figures and files: smooth curves, no model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mspgt_lens.results import Curve, LayerProfile
from mspgt_lens.targets import DEFAULT_BANDS


def made_profile(
    name: str = "made/up-1B",
    n_layers: int = 12,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    warnings: tuple[str, ...] = (),
    silent: tuple[str, ...] = (),
) -> LayerProfile:
    """Curves that rise or fall with depth; scales in ``silent`` cannot be told from 0."""
    depth = np.linspace(0.0, 1.0, n_layers + 1)

    def curve(values: np.ndarray, unit: str = "nats", spread: float = 0.1) -> Curve:
        reach = spread * np.abs(values) + 0.01
        return Curve(values, values - reach, values + reach, unit, "Made up.")

    def scaled(sign: float) -> dict[str, Curve]:
        return {
            scale: curve((2.0 + sign * depth) / band[1], spread=3.0 if scale in silent else 0.1)
            for scale, band in bands.items()
        }

    blocks = depth[1:]
    return LayerProfile(
        model_name=name,
        n_layers=n_layers,
        n_tokens=12_345,
        n_groups=67,
        bands=bands,
        compression=curve(500 + 50 * depth, spread=0.01),
        relevance=curve(1 + 3 * depth),
        retained=scaled(-1.5),
        predicted=scaled(1.5),
        added=scaled(1.2),
        correlations={
            scale: 0.9
            * np.exp(-np.arange(4) / 2)
            * (0.3 + 0.7 * depth[:, None])
            / band[1] ** 0.3
            * np.linspace(0.98, 1.02, 5)[:, None, None]
            for scale, band in bands.items()
        },
        fold_weights=(100.0,) * 5,
        signals={
            "attention_span": curve(20 + 5 * blocks, "tokens"),
            "attention_entropy": curve(2 + blocks),
            "novelty": curve(0.3 - 0.2 * blocks, "1 - CKA"),
            "inter_layer_information": curve(300 + blocks),
            "update_ratio": curve(0.5 + 0.1 * blocks, "ratio"),
            "effective_rank": curve(100 + 50 * blocks, "dimensions"),
        },
        settings={"seed": 0, "noise": 0.1},
        versions={"mspgt-lens": "0.1.0"},
        warnings=warnings,
    )
