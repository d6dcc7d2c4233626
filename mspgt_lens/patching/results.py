"""Results of patching: frozen, saved as safetensors with a JSON header."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, named, tidy
from mspgt_lens.models import SweptValues, patching_result, read_patching_result
from mspgt_lens.patching.significance import kept_labels, tested_effects
from mspgt_lens.prompts import group_label
from mspgt_lens.storage import package_versions

PerPair = Float[Tensor, " pair"] | Float[np.ndarray, " pair"] | Sequence[float]


@dataclass(frozen=True, eq=False, repr=False)
class PatchSweep(Result):
    """What patching each block and position does to the answer.

    ``cell`` stands for ``block pos``, or ``block pos head`` where single heads were patched. With a
    window of w blocks, row ``l`` holds the patch of blocks l ... l + w - 1.

    Attributes:
        model_name: The model's name.
        place: ``"resid_pre"``, ``"attn_out"``, ``"mlp_out"`` or ``"z"``; from TransformerLens also
            ``"resid_mid"``, ``"q"``, ``"k"`` or ``"v"``.
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
        p_values: Of the null hypothesis that the patch changes nothing, by flipping signs,
            two-sided, Holm-corrected over all cells where it could change anything (1 at the
            others), or None. Shape ``[cell]``.
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
        clean_by_pair: The metric on each pair's clean run, unpatched, or None where the metric
            gives one number for all pairs, or the file is of an earlier version. Shape ``[pair]``.
        corrupted_by_pair: The same on the corrupted runs.
        groups: The group of each pair, or None where the file is of an earlier version.
    """

    model_name: str
    place: str
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
    p_values: Float[np.ndarray, "*cell"] | None
    by_pair: Float[np.ndarray, "pair *cell"] | None
    positions: Int[np.ndarray, " pos"]
    tokens: tuple[str, ...]
    checked_cells: Int[np.ndarray, "checked axis"] | None = None
    checked_metric: Float[np.ndarray, " checked"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    clean_by_pair: Float[np.ndarray, " pair"] | None = None
    corrupted_by_pair: Float[np.ndarray, " pair"] | None = None
    groups: tuple[str | float, ...] | None = None

    @classmethod
    @in_own_state
    def from_transformer_lens(
        cls,
        result: Any,
        *,
        place: str,
        clean: PerPair | None = None,
        corrupted: PerPair | None = None,
        direction: str = "denoise",
        metric: str | None = None,
        groups: Iterable[Hashable] | None = None,
        tokens: Sequence[str] | None = None,
        model_name: str = "",
        seed: int = 0,
    ) -> PatchSweep:
        """A sweep that TransformerLens has run, with intervals and p-values over groups of pairs.

        Cells whose patch changes no pair's metric are no tests. Needs TransformerLens 4.2 or later.

        Args:
            result: A ``PatchingResult`` of ``transformer_lens.patching`` that was swept by block
                and position (and head) with ``reduce="none"``.
            place: What was patched: ``"resid_pre"``, ``"resid_mid"``, ``"attn_out"``,
                ``"mlp_out"``, or of single heads ``"z"``, ``"q"``, ``"k"``, ``"v"``. From a result
                that holds several, the one to take.
            clean: The metric on the unpatched clean runs, one value per pair.
            corrupted: The same on the corrupted runs. The runs that were patched are the result's
                own where it was swept with ``baseline=True``, and must be left out then.
            direction: ``"denoise"`` if the corrupted run was patched, ``"noise"`` if the clean one.
            metric: Which of the result's metrics, where there are several.
            groups: One label per pair; by default every pair is a group of its own.
            tokens: The token at each position that was swept, for tables and figures.
            model_name: The model's name, likewise.
            seed: Decides the sign flips where there are too many to count.

        Returns:
            The sweep, with the numbers of :func:`~mspgt_lens.patch_layers` on the same pairs.

        Raises:
            ImportError: If TransformerLens is older.
            TypeError: If ``result`` is no ``PatchingResult``.
            ValueError: If it holds only means, or other axes than these; if an argument does not
                fit it; or if clean and corrupted runs have the same mean.
        """
        swept = read_patching_result(result, place, metric)
        values, n_pairs = swept.values, len(swept.values)
        if not np.isfinite(values).all():
            raise ValueError("result must hold finite values; leave out pairs that have none")
        if direction not in ("denoise", "noise"):
            raise ValueError(f"direction must be denoise or noise, got {direction!r}")
        patched = "corrupted" if direction == "denoise" else "clean"
        runs = {
            name: _unpatched(name, given, swept.baseline if name == patched else None, n_pairs)
            for name, given in (("clean", clean), ("corrupted", corrupted))
        }
        labels = range(n_pairs) if groups is None else groups
        labels = tuple(group_label(label, index) for index, label in enumerate(labels))
        words = ("position",) * len(swept.positions) if tokens is None else tuple(tokens)
        for name, count, wanted, what in (
            ("groups", len(labels), n_pairs, "label per pair"),
            ("tokens", len(words), len(swept.positions), "token per position of the result"),
        ):
            if count != wanted:
                raise ValueError(f"{name} must have one {what} ({wanted}), got {count}")
        able: np.ndarray = np.any(runs[patched] != values.T, axis=-1).T
        if able.any() and runs["clean"].mean() == runs["corrupted"].mean():
            raise ValueError(
                f"clean and corrupted must differ in their means, got {runs['clean'].mean():g} of "
                "both, so effects have no scale; choose a metric that tells them apart"
            )
        effects, p_values = tested_effects(
            values, **runs, groups=labels, direction=direction, able=able, seed=seed
        )
        return cls(
            model_name=model_name,
            place=place,
            direction=direction,
            method="exact",
            window=1,
            metric_name=swept.metric_name,
            metric=values.mean(axis=0),
            clean=effects.clean,
            corrupted=effects.corrupted,
            effect=effects.effect,
            low=effects.low,
            high=effects.high,
            p_values=p_values,
            by_pair=values,
            positions=swept.positions,
            tokens=words,
            settings={"n_pairs": n_pairs, "n_groups": effects.n_groups, "seed": seed},
            versions=package_versions(),
            warnings=effects.warnings,
            clean_by_pair=runs["clean"],
            corrupted_by_pair=runs["corrupted"],
            groups=kept_labels(labels),
        )

    @in_own_state
    def to_transformer_lens(self) -> Any:
        """The sweep as a ``PatchingResult`` of ``transformer_lens.patching``, in float64.

        Its baseline is the patched run's. Where other positions than all from 0 were patched, cells
        are listed in ``index_df`` instead of having axes, with ``pos`` -1 for each pair's last
        token. Needs TransformerLens 4.2 or later.

        Returns:
            The result; :meth:`from_transformer_lens` reads the same numbers from it.

        Raises:
            ImportError: If TransformerLens is older.
            ValueError: If the sweep is no exact one of single blocks with a value per pair, which
                such a result cannot tell from others.
        """
        if self.method != "exact" or self.window != 1 or self.by_pair is None:
            kept = "one number for all pairs" if self.by_pair is None else "a value per pair"
            raise ValueError(
                "a PatchingResult holds exact patches of one block with a value per pair, got "
                f"method {self.method!r}, window {self.window} and {kept}; sweep with "
                "method='exact', window=1 and a metric that returns one value per pair"
            )
        baseline = self.corrupted_by_pair if self.direction == "denoise" else self.clean_by_pair
        return patching_result(
            SweptValues(self.metric_name, self.by_pair, self.positions, baseline)
        )

    @property
    def n_layers(self) -> int:
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

    def heading(self) -> str:
        """The model, what was patched, and the unpatched runs."""
        heads = ", single heads" if self.metric.ndim == 3 else ""
        window = f", {self.window} blocks at once" if self.window > 1 else ""
        return (
            f"PatchSweep{named(self.model_name)}: {self.place}{heads}{window}, {self.direction}, "
            f"{self.method}; {self.metric_name.replace('_', ' ')} {self.clean:.3g} clean, "
            f"{self.corrupted:.3g} corrupted"
        )

    def rows(self) -> Rows:
        """The cells that move the answer most."""
        return self.strongest(5)

    def findings(self) -> list[str]:
        """What the effect is, and how far attribution errs."""
        lines = ["Effect: 0 is the corrupted run, 1 the clean one; 95% intervals over groups."]
        error = self.attribution_error
        if error is not None:
            lines.append(
                f"Attribution errs by {error['mean']:.3g} on average on {error['n_cells']:g} cells "
                "that were patched exactly."
            )
        return lines

    def strongest(self, n_cells: int) -> Rows:
        """The cells that move the answer most, as text: a header row, then one row per cell.

        Args:
            n_cells: How many, at most.

        Returns:
            Block, token with its position, effect with its 95% interval, and corrected p-value.
        """
        start = 0.0 if self.direction == "denoise" else 1.0
        order = np.argsort(-np.abs(self.effect - start), axis=None, kind="stable")[:n_cells]
        heads = ("head",) if self.effect.ndim == 3 else ()
        rows: Rows = [("block", "token", *heads, "effect", "95% interval", "p (Holm)")]
        for flat in order:
            cell = np.unravel_index(int(flat), self.effect.shape)
            block, pos, *head = (int(i) for i in cell)
            column = int(self.positions[pos])
            reach = ""
            if self.low is not None and self.high is not None:
                reach = f"{self.low[cell]:.3g} to {self.high[cell]:.3g}"
            rows.append(
                (
                    str(block),
                    f"{self.tokens[pos].strip()} ({'last' if column < 0 else column})",
                    *(str(i) for i in head),
                    f"{self.effect[cell]:.3g}",
                    reach,
                    "" if self.p_values is None else f"{self.p_values[cell]:.3g}",
                )
            )
        return rows

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell.

        Returns:
            Columns ``model, quantity, place, block, position, token, head, metric, value, low,
            high, unit, p_value``; ``value`` is the effect. ``head`` is there for single heads only;
            ``low``, ``high`` and ``p_value`` where they are known.
        """
        index = np.indices(self.metric.shape).reshape(self.metric.ndim, -1)
        columns: dict[str, Any] = {
            "model": self.model_name,
            "quantity": "effect",
            "place": self.place,
            "block": index[0],
            "position": self.positions[index[1]],
            "token": [self.tokens[i] for i in index[1]],
        }
        if self.metric.ndim == 3:
            columns["head"] = index[2]
        columns |= {"metric": self.metric.ravel(), "value": self.effect.ravel()}
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name).ravel()
        columns["unit"] = "share of the way"
        if self.p_values is not None:
            columns["p_value"] = self.p_values.ravel()
        return tidy(columns)


@dataclass(frozen=True, eq=False, repr=False)
class ScalePatch(Result):
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
        controls: The same effect for random sets of as many blocks, shape
            ``[segment, draw]``.
        p_values: Two-sided rank of each segment's effect among those of random sets, Holm-corrected
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
    controls: Float[np.ndarray, "segment draw"]
    p_values: Float[np.ndarray, " segment"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def heading(self) -> str:
        """The model, the direction and the unpatched runs."""
        return (
            f"ScalePatch{named(self.model_name)}: {self.direction}; "
            f"{self.metric_name.replace('_', ' ')} {self.clean:.3g} clean, "
            f"{self.corrupted:.3g} corrupted"
        )

    def rows(self) -> Rows:
        """The effect of every segment beside random sets."""
        rows: Rows = [("segment", "blocks", "effect", "random sets", "p (Holm)")]
        low, middle, high = self._random()
        for i, name in enumerate(self.segments):
            effect = f"{self.effect[i]:.3g}"
            if self.low is not None and self.high is not None:
                effect += f" ({self.low[i]:.3g} to {self.high[i]:.3g})"
            first, last = self.blocks[i]
            random = f"{middle[i]:.3g} ({low[i]:.3g} to {high[i]:.3g})"
            rows.append((name, f"{first} to {last}", effect, random, f"{self.p_values[i]:.3g}"))
        return rows

    def findings(self) -> list[str]:
        """What the effect and p are."""
        return [
            "Effect: 0 is the corrupted run, 1 the clean one. p: whether it matters which blocks "
            "they are."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per segment, with the random sets' median and central 95%.

        Returns:
            Columns ``model, quantity, segment, metric, value, low, high, unit, p_value, control,
            control_low, control_high``; ``value`` is the effect, and ``low`` and ``high`` are there
            where they are known.
        """
        low, middle, high = self._random()
        columns: dict[str, Any] = {
            "model": self.model_name,
            "quantity": "effect",
            "segment": list(self.segments),
            "metric": self.metric,
            "value": self.effect,
        }
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low, "high": self.high}
        columns |= {"unit": "share of the way", "p_value": self.p_values}
        return tidy(columns | {"control": middle, "control_low": low, "control_high": high})

    def _random(self) -> Float[np.ndarray, "3 segment"]:
        ends: np.ndarray = np.quantile(self.controls, [0.025, 0.5, 0.975], axis=1)
        return ends


def _unpatched(
    name: str,
    given: PerPair | None,
    baseline: Float[np.ndarray, " pair"] | None,
    n_pairs: int,
) -> Float[np.ndarray, " pair"]:
    """The metric on unpatched runs: what is given, or the baseline of those that were patched."""
    if baseline is not None:
        if given is not None:
            raise ValueError(
                f"{name} must be left out: result holds it, as it was swept with baseline=True; if "
                "these are other runs, say which ones were patched by direction="
            )
        return baseline
    if given is None:
        raise ValueError(
            f"{name} must hold the metric of every pair's unpatched {name} run, got None; it is "
            f"metric(model({name}_tokens))"
        )
    if isinstance(given, Tensor):
        given = given.detach().cpu().double().numpy()
    values = np.asarray(given, dtype=float)
    if values.shape != (n_pairs,) or not np.isfinite(values).all():
        raise ValueError(
            f"{name} must hold one finite value per pair ({n_pairs}), got shape {values.shape}"
        )
    return values
