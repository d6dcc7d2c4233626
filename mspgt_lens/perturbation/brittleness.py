"""How much noise each scale and each block bears: response curves, slopes, ratios."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, interval, named
from mspgt_lens.estimates import CannotMeasure, Curve, Estimate
from mspgt_lens.models import as_adapter
from mspgt_lens.partition import Segments, as_segments
from mspgt_lens.perturbation.batches import make_batches
from mspgt_lens.perturbation.draws import Shape
from mspgt_lens.perturbation.kinds import Perturbation
from mspgt_lens.perturbation.perturbing import perturbed
from mspgt_lens.perturbation.residuals import ResidualStatistics, residual_statistics
from mspgt_lens.perturbation.responding import MEASURES, agree, respond
from mspgt_lens.perturbation.rounding import NEGLIGIBLE, rounding
from mspgt_lens.processes import joined
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.statistics import LEVEL, holm, jackknife_interval, mean_interval, sign_flip_p_values
from mspgt_lens.storage import package_versions

Mode = Literal["per_block", "equal_energy"]
DEFAULT_LEVELS = (0.05, 0.1, 0.5, 1.0)
_N_BOOTSTRAPS = 2000
# KL over squared level may change by this factor between the two lowest levels.
_QUADRATIC = 1.5
_SLOPE = (
    "KL from the clean prediction, less that of rounding alone, over the squared noise level, at "
    "the lowest level"
)
_LOG_SLOPE = "Logarithm of the initial slope of KL over the squared noise level."
_SLOPES = "Initial slopes of KL at equal energy, nats per squared level; 95% intervals."
_HALF = "Noise level at which half of the positions keep their most likely token, interpolated."


@dataclass(frozen=True, eq=False, repr=False)
class Brittleness(Result):
    """Response of predictions to noise in each block and each segment.

    Two modes: ``"per_block"``, noise at the entry of one block at a time, averaged over the
    segment's blocks; ``"equal_energy"``, noise at the entries of all the segment's blocks at once,
    each at the level over the square root of their number, so that long and short segments get the
    same total variance in the shape's own unit (see :class:`~mspgt_lens.Perturbation`).

    Attributes:
        model_name: The model's name.
        n_layers: Number of blocks, L.
        segments: Segment name to its blocks.
        shapes: Noise shapes.
        levels: Noise levels, rising; strengths of :class:`~mspgt_lens.Perturbation`.
        by_group: KL (nats per token), rise in cross-entropy (nats) and agreement of the most likely
            token, per group (document), ``[shape, level, target, group, measure]``; targets are the
            L blocks, then the segments at equal energy.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
        floor: The same measures where the activations of a target's blocks were changed by no more
            than rounding, ``[target, group, measure]``: every level's KL holds that of the floor,
            whatever the level. Slopes are without it. None in results of versions before 0.4.
    """

    model_name: str
    n_layers: int
    segments: Mapping[str, tuple[int, ...]]
    shapes: tuple[Shape, ...]
    levels: tuple[float, ...]
    by_group: Float[np.ndarray, "shape level target group measure"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    floor: Float[np.ndarray, "target group measure"] | None = None

    def response(
        self, segment: str, shape: Shape, mode: Mode = "per_block", measure: str = "kl"
    ) -> Curve:
        """A segment's mean response at every level, with its interval over groups.

        As measured: what rounding adds to KL (``floor``) is in it.

        Args:
            segment: Name of a segment.
            shape: Noise shape, one of ``shapes``.
            mode: ``"per_block"`` or ``"equal_energy"``.
            measure: ``"kl"`` or ``"cross_entropy"`` (nats per token), or ``"agreement"`` (share of
                positions that keep their most likely token).

        Returns:
            One point per level, in nats or as a share.

        Raises:
            ValueError: If there is no such segment, shape, mode or measure.
        """
        values = self._of(segment, shape, mode, measure).T
        mean, low, high = mean_interval(values)
        unit = "share" if measure == "agreement" else "nats"
        return Curve(mean, low, high, unit, f"{measure} under {shape} noise, {mode}")

    def slope(self, segment: str, shape: Shape, mode: Mode = "per_block") -> Estimate:
        """Initial slope: KL ~ slope * level ** 2 for small levels.

        It is KL at the lowest level, less that of rounding alone, over that level squared: KL has
        its minimum, 0, at no noise, so its first term is quadratic. ``warnings`` says where the
        lowest level is not small enough, or not large enough against rounding. What was taken off
        for rounding is known to a factor of about two: the interval reaches that much farther.

        Args:
            segment: Name of a segment.
            shape: Noise shape, one of ``shapes``.
            mode: ``"per_block"`` or ``"equal_energy"``.

        Returns:
            Nats per token and squared noise level, with a 95% interval over groups.

        Raises:
            ValueError: If there is no such segment, shape or mode.
        """
        slopes = self.slopes(segment, shape, mode)
        mean, low, high = (float(x) for x in mean_interval(slopes))
        unsure = abs(float(self._rounded(segment, mode).mean())) / self.levels[0] ** 2
        low, high = low - unsure, high + unsure
        return Estimate(mean, low, high, "nats per squared level", f"{_SLOPE}, {mode}.")

    def slopes(
        self, segment: str, shape: Shape, mode: Mode = "per_block"
    ) -> Float[np.ndarray, " group"]:
        """The slope of every group (document), of which :meth:`slope` is the mean.

        Args:
            segment: Name of a segment.
            shape: Noise shape, one of ``shapes``.
            mode: ``"per_block"`` or ``"equal_energy"``.

        Returns:
            Nats per token and squared noise level, ``[group]``.

        Raises:
            ValueError: If there is no such segment, shape or mode.
        """
        values: np.ndarray = self._beyond_rounding(segment, shape, mode)[0] / self.levels[0] ** 2
        return values

    def log_brittleness(self, mode: Mode = "per_block") -> dict[str, dict[str, Estimate]]:
        """Logarithms of every segment's initial slope, as ``ModelResults.brittleness`` holds them.

        Intervals are jackknifed over groups, in logarithms, so that they stay above 0 as slopes do.

        Args:
            mode: ``"per_block"`` or ``"equal_energy"``.

        Returns:
            Noise shape to segment to its estimate, in logarithms of nats per squared level.

        Raises:
            ValueError: If a segment does not respond to noise beyond rounding.
        """
        logarithms: dict[str, dict[str, Estimate]] = {shape: {} for shape in self.shapes}
        for shape, segment in itertools.product(self.shapes, self.segments):
            slopes = self.slopes(segment, shape, mode)
            without = (slopes.sum() - slopes) / (len(slopes) - 1)
            if not (without > 0).all():
                raise ValueError(
                    f"segment {segment!r} of {self.model_name} does not respond to {shape} noise "
                    f"at level {self.levels[0]:g} beyond rounding, so its brittleness has no "
                    "logarithm; measure from a higher level on"
                )
            value = np.log(slopes.mean())
            (low,), (high,) = jackknife_interval(np.array([value]), np.log(without)[:, None])
            logarithms[shape][segment] = Estimate(
                float(value), float(low), float(high), "log nats per squared level", _LOG_SLOPE
            )
        return logarithms

    def half_level(self, segment: str, shape: Shape, mode: Mode = "per_block") -> Estimate | None:
        """The level at which agreement of the most likely token falls to one half.

        Interpolated in the logarithm of the level (linearly below the lowest); None where the
        highest level does not reach it. The interval is the bootstrap's over groups; its upper end
        is infinite where more than 2.5% of draws do not reach it.

        Args:
            segment: Name of a segment.
            shape: Noise shape, one of ``shapes``.
            mode: ``"per_block"`` or ``"equal_energy"``.

        Returns:
            A noise level, or None.

        Raises:
            ValueError: If there is no such segment, shape or mode.
        """
        agreement = self._of(segment, shape, mode, "agreement")
        value = self._crossing(agreement.mean(axis=1))
        if not np.isfinite(value):
            return None
        rng = np.random.default_rng(0)
        n_groups = agreement.shape[1]
        drawn = rng.integers(n_groups, size=(_N_BOOTSTRAPS, n_groups))
        crossings = np.sort([self._crossing(agreement[:, index].mean(axis=1)) for index in drawn])
        tail = int((1 - LEVEL) / 2 * _N_BOOTSTRAPS)
        low, high = float(crossings[tail]), float(crossings[-1 - tail])
        return Estimate(value, min(low, value), max(high, value), "noise level", _HALF)

    def ratios(self) -> pd.DataFrame:
        """Ratios of slopes between every two segments, for each shape and mode.

        Returns:
            Columns ``shape, mode, segment, against, ratio, low, high, p_value``: the interval is
            the jackknife's over groups, of the logarithm; the p-value, of equal slopes, flips the
            signs of whole groups' differences and is corrected (Holm) over the table.

        Raises:
            CannotMeasure: If a segment does not respond beyond rounding.
        """
        rows, differences = [], []
        modes: tuple[Mode, ...] = get_args(Mode)
        for shape, mode in itertools.product(self.shapes, modes):
            for first, second in itertools.combinations(self.segments, 2):
                a, b = (self.slopes(name, shape, mode) for name in (first, second))
                if not (a.mean() > 0 and b.mean() > 0):
                    raise CannotMeasure(
                        f"segments {first!r} and {second!r} have no ratio: one does not respond to "
                        f"{shape} noise of level {self.levels[0]:g} beyond rounding; measure from "
                        "a higher level on, or load the model in float32"
                    )
                low, high = _log_ratio_interval(a, b)
                row = {"shape": shape, "mode": mode, "segment": first, "against": second}
                rows.append(row | {"ratio": a.mean() / b.mean(), "low": low, "high": high})
                differences.append(a - b)
        table = pd.DataFrame(rows)
        if rows:
            table["p_value"] = holm(sign_flip_p_values(np.stack(differences, axis=1)))
        return table

    def signals(self, n_folds: int = 5) -> dict[str, Curve]:
        """Slope of every block under each shape, as curves that can join the boundary signals.

        They go where the profile's own signals are::

            joined = replace(profile, signals={**profile.signals, **brittle.signals()})
            partition = detect_scales(profile=joined)

        Args:
            n_folds: Folds that groups are dealt to, for the intervals of the boundaries; those of
                the profile (5 by default).

        Returns:
            ``"brittleness_"`` and the noise shape to its curve over blocks, nats per squared level.

        Raises:
            ValueError: If there are fewer groups than folds.
        """
        n_groups = self.by_group.shape[3]
        if not 2 <= n_folds <= n_groups:
            raise ValueError(
                f"n_folds must be 2 to the number of groups ({n_groups}), got {n_folds}"
            )
        curves = {}
        for index, shape in enumerate(self.shapes):
            above = self.by_group[index, 0, : self.n_layers, :, 0]
            if self.floor is not None:
                above = above - self.floor[: self.n_layers, :, 0]
            slopes = above.T / self.levels[0] ** 2
            folds = np.stack([slopes[k::n_folds].mean(axis=0) for k in range(n_folds)])
            unit = "nats per squared level"
            curves[f"brittleness_{shape}"] = Curve(
                *mean_interval(slopes), unit, f"{_SLOPE}, noise at one block's entry.", folds
            )
        return curves

    def heading(self) -> str:
        """The model and how much was perturbed."""
        return (
            f"Brittleness{named(self.model_name)}: {counted(self.n_layers, 'block')}, "
            f"{counted(len(self.levels), 'level')}, {counted(self.by_group.shape[3], 'document')}"
        )

    def rows(self) -> Rows:
        """The slope of every segment under every shape, at equal energy."""
        rows: Rows = [("noise", *self.segments)]
        for shape in self.shapes:
            slopes = [self.slope(name, shape, "equal_energy") for name in self.segments]
            rows.append((shape, *(interval(e.value, e.low, e.high) for e in slopes)))
        return rows

    def findings(self) -> list[str]:
        """Per noise shape, the two segments whose brittleness differs most at equal energy."""
        lines = []
        try:
            table = self.ratios()
        except CannotMeasure as error:
            return [f"{str(error).capitalize()}.", _SLOPES]
        for shape in self.shapes if len(table) else ():
            part = table[(table["shape"] == shape) & (table["mode"] == "equal_energy")]
            row = part.iloc[int(np.log(part["ratio"]).abs().argmax())]
            first, second = row["segment"], row["against"]
            ratio, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
            if ratio < 1:
                first, second, ratio, low, high = second, first, 1 / ratio, 1 / high, 1 / low
            lines.append(
                f"Under {shape} noise of the same energy, {first} blocks are {ratio:.3g} times "
                f"({low:.3g} to {high:.3g}) as brittle as {second} blocks."
            )
        return [*lines, _SLOPES]

    def to_dataframe(self) -> pd.DataFrame:
        """Every response as a tidy table.

        Returns:
            Columns ``model, quantity, segment, shape, mode, level, block, value, low, high, unit``.
            First come single blocks, whose ``segment`` is empty, then the segments in both modes,
            whose ``block`` is missing.
        """
        rows = []
        for shape, measure in itertools.product(self.shapes, MEASURES):
            i, k = self.shapes.index(shape), MEASURES.index(measure)
            unit = "share" if measure == "agreement" else "nats"
            entries: list[tuple[str, int | None, Mode, np.ndarray]] = [
                ("", b, "per_block", self.by_group[i, :, b, :, k]) for b in range(self.n_layers)
            ]
            modes: tuple[Mode, ...] = get_args(Mode)
            for mode in modes:
                entries += [
                    (s, None, mode, self._of(s, shape, mode, measure)) for s in self.segments
                ]
            for segment, block, mode, values in entries:
                for level, *ends in zip(self.levels, *mean_interval(values.T), strict=True):
                    about = (self.model_name, measure, segment, shape, mode, level, block)
                    rows.append((*about, *ends, unit))
        names = ["model", "quantity", "segment", "shape", "mode", "level", "block"]
        table = pd.DataFrame(rows, columns=[*names, "value", "low", "high", "unit"])
        return table.astype({"block": "Int64"})

    def _of(
        self, segment: str, shape: Shape, mode: Mode, measure: str
    ) -> Float[np.ndarray, "level group"]:
        for name, value, known in (
            ("segment", segment, tuple(self.segments)),
            ("shape", shape, self.shapes),
            ("mode", mode, get_args(Mode)),
            ("measure", measure, MEASURES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        values = self.by_group[self.shapes.index(shape), ..., MEASURES.index(measure)]
        return self._of_segment(values, segment, mode)

    def _of_segment(
        self, values: Float[np.ndarray, "level target group"], segment: str, mode: Mode
    ) -> Float[np.ndarray, "level group"]:
        rows = list(self.segments[segment])
        if mode == "equal_energy":
            rows = [self.n_layers + list(self.segments).index(segment)]
        mean: np.ndarray = values[:, rows].mean(axis=1)
        return mean

    def _beyond_rounding(
        self, segment: str, shape: Shape, mode: Mode
    ) -> Float[np.ndarray, "level group"]:
        """KL of a segment that is not rounding's."""
        values: np.ndarray = self._of(segment, shape, mode, "kl") - self._rounded(segment, mode)
        return values

    def _rounded(self, segment: str, mode: Mode) -> Float[np.ndarray, " group"]:
        """KL of a segment that is rounding's; 0 where that was not measured."""
        if self.floor is None:
            return np.zeros(self.by_group.shape[3])
        floor = self.floor[None, ..., MEASURES.index("kl")]
        values: np.ndarray = self._of_segment(floor, segment, mode)[0]
        return values

    def _crossing(self, agreement: Float[np.ndarray, " level"]) -> float:
        below = np.flatnonzero(agreement <= 0.5)
        if not len(below):
            return float("inf")
        at = int(below[0])
        if not at:
            return float(self.levels[0] * 0.5 / (1.0 - agreement[0]))
        share = (agreement[at - 1] - 0.5) / (agreement[at - 1] - agreement[at])
        low, high = np.log(self.levels[at - 1]), np.log(self.levels[at])
        return float(np.exp(low + share * (high - low)))


@in_own_state
def measure_brittleness(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    partition: Segments,
    *,
    levels: Sequence[float] = DEFAULT_LEVELS,
    shapes: Sequence[Shape] = ("covariance", "isotropic"),
    statistics: ResidualStatistics | None = None,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> Brittleness:
    """How far predictions move under noise in each block and each segment.

    Cost: ``(len(shapes) * len(levels) + 1) * (blocks + segments)`` runs, each from its first noisy
    block on. On SmolLM2-135M, 16 documents of 52 tokens gave ratios of segments' slopes to some 10%
    (per block) and 20% (at equal energy). All runs use the same standard normal draws, so
    differences between blocks, levels and segments are not the noise's.

    Rounding alone moves predictions (by some .001 nats in bfloat16, by 1e-10 in float32), at every
    level alike. It is measured, in one run more per block and segment, and taken off slopes.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        partition: A :class:`ScalePartition`, a mapping from segment names to blocks, or boundaries.
        levels: Noise levels, rising; the lowest gives the slope.
        shapes: Noise shapes; report both, since one may be a thousandfold of the other.
        statistics: Of the residual stream, from :func:`~mspgt_lens.residual_statistics`; by default
            gathered from these prompts in one pass.
        skip_first: Tokens at the beginning of each prompt that are left alone and not measured.
        batch_size: Prompts per forward pass; by default a fixed number of tokens, or what fits.
        seed: Decides the noise.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        KL, rise of the loss (nats per token) and agreement, per shape, level, block or segment, and
        group.

    Raises:
        ValueError: If levels do not rise from above 0, shapes are unknown, or the partition does
            not fit the model; or processes were given different arguments.
        CannotMeasure: If the model is an encoder, or there are fewer than 3 groups.
        FloatingPointError: If activations or logits are NaN or infinite.
        RuntimeError: If another process of the group failed; says which one, and why.

    Example:
        >>> brittle = ml.measure_brittleness(model, prompts, (3, 6), levels=[0.1])
        >>> brittle.slope("local", "covariance")
        Estimate: ... nats per squared level (... to ...)
        ...
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        segments = as_segments(partition, adapter.n_layers)
        chosen, kinds = tuple(float(level) for level in levels), tuple(shapes)
        if not chosen or any(a >= b for a, b in itertools.pairwise((0.0, *chosen))):
            raise ValueError(f"levels must rise from above 0, got {list(levels)}")
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(get_args(Shape)):
            raise ValueError(
                f"shapes must be different ones of {', '.join(get_args(Shape))}, got {list(shapes)}"
            )
        batches = make_batches(adapter, prompts, skip_first=skip_first, batch_size=batch_size)
        arguments = {
            "segments": list(segments.items()),
            "levels": chosen,
            "shapes": kinds,
            "skip_first": skip_first,
            "batch_size": batch_size,
            "seed": seed,
        }
        agree(processes, adapter, batches, statistics, arguments)
        if statistics is None:
            statistics = residual_statistics(adapter, batches)
        targets: list[tuple[int, ...]] = [(block,) for block in range(adapter.n_layers)]
        targets += segments.values()
        conditions = [
            perturbed(
                Perturbation("noise", level / len(blocks) ** 0.5, shape, seed=seed),
                statistics,
                blocks,
            )
            for shape in kinds
            for level in chosen
            for blocks in targets
        ]
        conditions += [rounding(blocks) for blocks in targets]
        measured = respond(
            adapter,
            batches,
            conditions,
            description="adding noise",
            progress=progress,
            processes=processes,
        )
        by_group, floor = measured[: -len(targets)], measured[-len(targets) :]
    result = Brittleness(
        model_name=adapter.name,
        n_layers=adapter.n_layers,
        segments=segments,
        shapes=kinds,
        levels=chosen,
        by_group=by_group.reshape(len(kinds), len(chosen), len(targets), *by_group.shape[1:]),
        settings={
            "n_groups": len(batches.groups),
            "n_positions": batches.n_positions,
            "skip_first": skip_first,
            "seed": seed,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": batches.fingerprint,
        },
        versions=package_versions(),
        floor=floor,
    )
    notes = (*_mostly_rounding(result, str(adapter.dtype)), *_not_quadratic(result))
    return replace(result, warnings=notes)


def _mostly_rounding(brittleness: Brittleness, dtype: str) -> Iterable[str]:
    """Where rounding is a part of KL at the lowest level that its slope should not hang on."""
    first = brittleness.levels[0]
    for shape, mode in itertools.product(brittleness.shapes, get_args(Mode)):
        for segment in brittleness.segments:
            kl = float(brittleness.response(segment, shape, mode).values[0])
            rounded = float(brittleness._rounded(segment, mode).mean())
            if not rounded > NEGLIGIBLE * kl:
                continue
            least = _least_level(brittleness, segment, shape, mode)
            yield (
                f"{shape} noise, {segment}, {mode}: rounding in {dtype} alone gives {rounded:.2g} "
                f"of the {kl:.2g} nats of KL at level {first:g}; it is taken off, and leaves the "
                "slope uncertain: load the model in float32, or measure from "
                f"{'a higher level' if least is None else f'level {least:.2g}'} on"
            )


def _least_level(brittleness: Brittleness, segment: str, shape: Shape, mode: Mode) -> float | None:
    """The level at which rounding is as little of KL as need not be mentioned, if KL is quadratic.

    None where the lowest level shows nothing but rounding.
    """
    above = float(brittleness._beyond_rounding(segment, shape, mode)[0].mean())
    rounded = float(brittleness._rounded(segment, mode).mean())
    if not above > rounded:
        return None
    return float(brittleness.levels[0] * np.sqrt(max(rounded, 0.0) * (1 / NEGLIGIBLE - 1) / above))


def _not_quadratic(brittleness: Brittleness) -> Iterable[str]:
    """Where the lowest level is too high, or too low, for its KL to go with its square."""
    if len(brittleness.levels) < 2:
        return
    first, second = brittleness.levels[:2]
    for shape, mode in itertools.product(brittleness.shapes, get_args(Mode)):
        for segment in brittleness.segments:
            values = brittleness._beyond_rounding(segment, shape, mode).mean(axis=1)
            least = _least_level(brittleness, segment, shape, mode)
            if not values[0] > 0 or least is None:
                continue
            change = values[1] / values[0] * (first / second) ** 2
            if not 1 / _QUADRATIC < change < _QUADRATIC:
                remedy = "add lower levels"
                if least > first / 2:
                    remedy = "lower levels need the model in float32"
                elif least > first / 10:
                    remedy = f"add lower levels, down to {least:.1g}, where rounding begins to show"
                yield (
                    f"{shape} noise, {segment}, {mode}: KL over squared level changes by a factor "
                    f"{change:.2g} from level {first:g} to {second:g}, so the slope is not yet "
                    f"that of small noise: {remedy}"
                )


def _log_ratio_interval(
    first: Float[np.ndarray, " group"], second: Float[np.ndarray, " group"]
) -> tuple[float, float]:
    """95% jackknife interval of a ratio of means, from its logarithm."""
    n = len(first)
    value = np.array([np.log(first.mean() / second.mean())])
    left = np.log((first.sum() - first) / (second.sum() - second))[:, None]
    if not n > 2 or not np.isfinite(left).all():
        raise CannotMeasure("a ratio needs at least 3 groups that respond")
    low, high = jackknife_interval(value, left)
    return float(np.exp(low[0])), float(np.exp(high[0]))
