"""Results of patching: frozen, saved as safetensors with a JSON header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mspgt_lens.storage import SavedResult


@dataclass(frozen=True, eq=False)
class PatchSweep(SavedResult):
    """What patching each block and position does to the answer.

    ``cell`` stands for ``block pos``, or ``block pos head`` where single heads were patched. With a
    window of w blocks, row ``l`` holds the patch of blocks l ... l + w - 1.

    Attributes:
        model_name: The model's name.
        site: ``"resid_pre"``, ``"attn_out"``, ``"mlp_out"`` or ``"z"``.
        direction: ``"denoise"`` (clean activations into the corrupted run) or ``"noise"``.
        method: ``"exact"`` or ``"attribution"``.
        window: Consecutive blocks patched together.
        metric_name: The metric's name.
        metric: Its value after each patch, mean over pairs, shape ``[cell]``; as the functions of
            ``transformer_lens.patching`` return it.
        clean: Its mean on the clean runs, unpatched.
        corrupted: Its mean on the corrupted runs, unpatched.
        effect: ``(metric - corrupted) / (clean - corrupted)``: 0 is the corrupted run, 1 the clean
            one, in both directions; a ratio of means over pairs. Shape ``[cell]``.
        low: Lower end of the effect's 95% interval over groups of pairs, or None where there is
            none (see ``warnings``). Shape ``[cell]``.
        high: Upper end of it.
        p_value: Sign-flip p-value of the null hypothesis that the patch changes nothing, two-sided,
            Holm-corrected over all cells where it could change anything (1 at the others), or None.
            Shape ``[cell]``.
        by_pair: The metric after each patch, pair by pair, shape ``[pair, cell]``, or None where
            the metric gives one number for all pairs.
        positions: Positions that were patched, shape ``[pos]``; -1 stands for each pair's last.
        tokens: The token at each of them: the clean prompts' one, or two examples where they
            differ.
        checked_cells: For attribution, the cells that were also patched exactly, as indices into
            ``metric``, shape ``[checked, axis]``; None for exact sweeps.
        checked_metric: The exact metric there, shape ``[checked]``.
        settings: Everything else that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    site: str
    direction: str
    method: str
    window: int
    metric_name: str
    metric: Float[np.ndarray, "*cell"]
    clean: float
    corrupted: float
    effect: Float[np.ndarray, "*cell"]
    low: Float[np.ndarray, "*cell"] | None
    high: Float[np.ndarray, "*cell"] | None
    p_value: Float[np.ndarray, "*cell"] | None
    by_pair: Float[np.ndarray, "pair *cell"] | None
    positions: Int[np.ndarray, " pos"]
    tokens: tuple[str, ...]
    checked_cells: Int[np.ndarray, "checked axis"] | None = None
    checked_metric: Float[np.ndarray, " checked"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.metric) + self.window - 1

    @property
    def attribution_error(self) -> dict[str, float] | None:
        """How far attribution is from exact patching on the checked cells; None for exact sweeps.

        ``mean`` and ``largest`` absolute difference of the effect, ``correlation`` of the two
        effects (0 where either is constant), and ``n_cells``.
        """
        if self.checked_cells is None or self.checked_metric is None:
            return None
        scale = self.clean - self.corrupted
        exact = (self.checked_metric - self.corrupted) / scale
        estimated = self.effect[tuple(self.checked_cells.T)]
        constant = min(np.ptp(exact), np.ptp(estimated)) == 0
        difference = np.abs(estimated - exact)
        return {
            "mean": float(difference.mean()),
            "largest": float(difference.max()),
            "correlation": 0.0 if constant else float(np.corrcoef(exact, estimated)[0, 1]),
            "n_cells": float(len(exact)),
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: model, site, block, position, token, head, metric, effect and so on.

        ``head`` is there for single heads only; ``low``, ``high`` and ``p_value`` where they are
        known.
        """
        index = np.indices(self.metric.shape).reshape(self.metric.ndim, -1)
        table = pd.DataFrame(
            {
                "model": self.model_name,
                "site": self.site,
                "block": index[0],
                "position": self.positions[index[1]],
                "token": [self.tokens[i] for i in index[1]],
            }
        )
        if self.metric.ndim == 3:
            table["head"] = index[2]
        for name in ("metric", "effect", "low", "high", "p_value"):
            values = getattr(self, name)
            if values is not None:
                table[name] = values.ravel()
        return table


@dataclass(frozen=True, eq=False)
class ScalePatch(SavedResult):
    """What patching every block of a segment at once does, against random blocks.

    Attributes:
        model_name: The model's name.
        direction: ``"denoise"`` or ``"noise"``.
        metric_name: The metric's name.
        segments: Names of the segments, in order.
        blocks: First and last block of each segment, shape ``[segment, 2]``.
        metric: The metric after each segment's patch, mean over pairs, shape ``[segment]``.
        clean: Its mean on the clean runs, unpatched.
        corrupted: Its mean on the corrupted runs, unpatched.
        effect: ``(metric - corrupted) / (clean - corrupted)``, shape ``[segment]``.
        low: Lower end of the effect's 95% interval over groups of pairs, or None.
        high: Upper end of it.
        random_effect: The same effect for random sets of as many blocks, shape
            ``[segment, draw]``.
        p_value: Two-sided rank of each segment's effect among those of random sets, Holm-corrected
            over the segments: whether it matters which blocks they are. Shape ``[segment]``.
        settings: Everything else that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    direction: str
    metric_name: str
    segments: tuple[str, ...]
    blocks: Int[np.ndarray, "segment 2"]
    metric: Float[np.ndarray, " segment"]
    clean: float
    corrupted: float
    effect: Float[np.ndarray, " segment"]
    low: Float[np.ndarray, " segment"] | None
    high: Float[np.ndarray, " segment"] | None
    random_effect: Float[np.ndarray, "segment draw"]
    p_value: Float[np.ndarray, " segment"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per segment, with the random sets' median and central 95%."""
        low, middle, high = np.quantile(self.random_effect, [0.025, 0.5, 0.975], axis=1)
        table = pd.DataFrame(
            {
                "model": self.model_name,
                "segment": list(self.segments),
                "first": self.blocks[:, 0],
                "last": self.blocks[:, 1],
                "metric": self.metric,
                "effect": self.effect,
            }
        )
        if self.low is not None and self.high is not None:
            table["low"], table["high"] = self.low, self.high
        return table.assign(
            random_low=low, random_median=middle, random_high=high, p_value=self.p_value
        )
