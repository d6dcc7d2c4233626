"""Boundaries in a matrix of signals, tested against gradual drift with depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.partition import ScalePartition, Support
from mspgt_lens.scales.drift import Fit, legendre, steps
from mspgt_lens.scales.evidence import Search, SearchPlan, search_plan
from mspgt_lens.scales.mixture import Mixture, describe
from mspgt_lens.scales.normalizing import Normalizer, choose_normalizer, rank_normalize
from mspgt_lens.statistics import LEVEL, SIGNIFICANCE

MIN_BLOCKS = 6
# Against two jumps of twice the noise, power stays under 0.9 below so many blocks, and below so
# many blocks times signals (docs/boundaries.md).
FEW_BLOCKS = 24
FEW_VALUES = 140
FEW_BLOCKS_WHERE_DRIFT_BENDS = 48
HIGH_CORRELATION = 0.35
_STRAIGHT = ("none", "linear")
_DRAWS_PER_SIGNAL = 200
_DRAWS_PER_LOOK = 25


@in_own_state
def segment_blocks(
    signals: Float[np.ndarray, "block signal"],
    *,
    n_boundaries: int | None = None,
    n_draws: int = 1000,
    n_bootstraps: int = 200,
    min_size: int = 2,
    names: Sequence[str] | None = None,
    replicates: Float[np.ndarray, "draw block signal"] | None = None,
    seed: int = 0,
) -> ScalePartition:
    """Segments of blocks that share all signals, tested against gradual drift with depth.

    Columns enter in units of their noise, or by their ranks where noise is larger at some depths
    than at others. Drift (a polynomial or a logistic in depth, free for every column), jumps
    (shared in place by all columns) and noise (autoregressive, or wandering) are weighed together,
    every placement of the jumps among them; the boundaries are the likeliest places. The p-values
    compare the evidence for jumps with the same on series regenerated from what the matrix may be
    without any, with the same correlations between columns.

    Args:
        signals: One row per block, one column per signal, in any units.
        n_boundaries: How many boundaries to place, 1 to 3. None places the theory's two, whatever
            number the test chooses: ``result.n_boundaries`` is the finding.
        n_draws: Series regenerated for each test.
        n_bootstraps: Matrices regenerated for intervals and probabilities.
        min_size: Fewest blocks of a segment, at least 1.
        names: One name per column.
        replicates: The same matrix from resampled groups of prompts; their spread is added to that
            of the blocks' own noise in intervals and probabilities.
        seed: Decides every draw.

    Returns:
        The partition. ``boundaries`` are the best places whether or not the data support any; read
        ``n_boundaries`` and ``p_value`` first, or ``summary()``.

    Raises:
        ValueError: If there are fewer than 6 blocks, signals that are constant, NaN or infinite, or
            not enough blocks for so many segments.

    Example:
        >>> made = ml.synthetic.synthetic_signals(24, effect=4.0)
        >>> partition = ml.segment_blocks(made.signals)
        >>> partition.boundaries == made.boundaries, partition.n_boundaries
        (True, 2)
    """
    matrix, labels = _checked(signals, names)
    n_layers, n_signals = matrix.shape
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1 block, got {min_size}")
    if n_draws < 99 or n_bootstraps < 20:
        raise ValueError(
            "n_draws must be at least 99 and n_bootstraps at least 20 for a p-value of 0.05 and a "
            f"95% interval to mean anything, got {n_draws} and {n_bootstraps}"
        )
    plan = search_plan(n_layers, min_size)
    place = 2 if n_boundaries is None else n_boundaries
    if not 1 <= place <= plan.max_jumps or plan.max_jumps < 2:
        raise ValueError(
            f"n_boundaries must be 1 to {plan.max_jumps} for {n_layers} blocks in segments of at "
            f"least {min_size}, got {place}: lower min_size or n_boundaries"
        )
    rng = np.random.default_rng(seed)
    tested = compare_with_drift(matrix, min_size, n_draws, rng)
    drift, boundaries = tested.drift.best, tested.boundaries(place)
    jumps = describe(plan, tested.matrix, boundaries)
    # Jumps that are there make what drift leaves look correlated.
    described = jumps.best if tested.n_boundaries else drift
    places = _bootstrap(plan, jumps, tested.normalize, replicates, n_bootstraps, rng)
    intervals, probability = summarize_places(places, n_layers)
    weights = _weights(jumps.best, tested.matrix)
    return ScalePartition(
        model_name="",
        n_layers=n_layers,
        boundaries=boundaries,
        intervals=tuple(
            (min(low, b), max(high, b))
            for (low, high), b in zip(intervals, boundaries, strict=True)
        ),
        p_values=tested.p_values,
        n_boundaries=tested.n_boundaries,
        explained=_explained(drift, boundaries, tested.matrix),
        probability=probability,
        sharpness=_sharpness(plan, rank_normalize(matrix), place),
        by_method={"fused": boundaries},
        by_signal={
            label: Support(float(weights[i]), *_without(tested, i, min_size, seed))
            for i, label in enumerate(labels)
        },
        signals=matrix,
        drift=drift.drift,
        autocorrelation=drift.noise.autocorrelation(n_layers),
        settings={
            "n_draws": n_draws,
            "n_bootstraps": n_bootstraps,
            "min_size": min_size,
            "seed": seed,
            "placed": place,
            "by_ranks": tested.normalize is rank_normalize,
        },
        warnings=tuple(_cautions(described, n_signals)),
    )


@dataclass(frozen=True)
class Comparison:
    """Jumps against gradual drift, for one matrix of signals.

    Attributes:
        normalize: How the signals were made comparable.
        matrix: The signals so made.
        search: The evidence in them.
        drift: What they may be without jumps.
        p_values: Number of jumps to p-value against that drift.
        n_boundaries: The number of jumps that the data ask for.
    """

    normalize: Normalizer
    matrix: Float[np.ndarray, "block signal"]
    search: Search
    drift: Mixture
    p_values: dict[int, float]
    n_boundaries: int

    def boundaries(self, n_jumps: int) -> tuple[int, ...]:
        """The likeliest places of so many jumps."""
        return tuple(int(b) for b in self.search.places[n_jumps][0])


def compare_with_drift(
    signals: Float[np.ndarray, "block signal"],
    min_size: int,
    n_draws: int,
    rng: np.random.Generator,
    *,
    decide_only: bool = False,
) -> Comparison:
    """Test 1, 2 and 3 jumps against drift, then choose their number step by step.

    The statistic is the evidence for so many jumps over that for drift alone; the reference is the
    same on series regenerated from the drift alone, with either kind of noise. Jumps are asked for
    only if the best of all numbers beats the drift. Then the smallest number is chosen that beats
    the drift itself and is not beaten by a larger one, against series regenerated with so many
    jumps.

    With ``decide_only``, no more series are drawn once no p-value can be significant any more;
    p-values from 0.05 on are then lower bounds.
    """
    plan = search_plan(len(signals), min_size)
    normalize = choose_normalizer(signals)
    matrix = normalize(signals)
    every = range(1, plan.max_jumps + 1)
    search = plan.search(matrix[None], place=every)
    drift = describe(plan, matrix)
    reference = _Reference(plan, drift, normalize, n_draws, rng)
    *single, of_any = reference.p_values(
        search, [*((k,) for k in every), tuple(every)], decide_only=decide_only
    )
    p_values = dict(zip(every, single, strict=True))
    n_boundaries = 0
    if of_any < SIGNIFICANCE:
        for chosen in (k for k in every if p_values[k] < SIGNIFICANCE):
            more = tuple(range(chosen + 1, plan.max_jumps + 1))
            places = tuple(int(b) for b in search.places[chosen][0])
            # More jumps have to explain more than they do on series that have just these.
            if more:
                jumps = describe(plan, matrix, places)
                against = _Reference(plan, jumps, normalize, n_draws, rng)
                (beaten,) = against.p_values(search, [more], fewer=chosen, decide_only=True)
                if beaten < SIGNIFICANCE:
                    continue
            n_boundaries = chosen
            break
    return Comparison(normalize, matrix, search, drift, p_values, n_boundaries)


@dataclass(frozen=True)
class _Reference:
    """Series regenerated from one mixture, with either kind of noise."""

    plan: SearchPlan
    mixture: Mixture
    normalize: Normalizer
    n_draws: int
    rng: np.random.Generator

    def p_values(
        self,
        search: Search,
        tests: Sequence[tuple[int, ...]],
        *,
        fewer: int = 0,
        decide_only: bool = False,
    ) -> list[float]:
        """Share of draws whose gain reaches the observed one; the larger of both kinds of noise.

        Noise that is as large at every block gives more power, noise that keeps each block's size
        is right where a few blocks (often the first and the last) are unlike the rest.

        Args:
            search: The evidence observed.
            tests: Numbers of jumps, the best of which has to beat ``fewer``; one p-value each.
            fewer: Number of jumps of the mixture.
            decide_only: Stop as soon as every p-value is known to be at least 0.05; they are then
                lower bounds.
        """
        most = max(max(test) for test in tests)
        # Matrices are searched in float32; what it cannot tell apart counts as equal.
        observed = np.array([_gain(search, fewer, *test)[0] - 1e-3 for test in tests])
        reached = np.zeros((2, len(tests)))
        p_values = np.zeros(len(tests))
        for count in self._portions(decide_only):
            for flip in (0, 1):
                drawn = self.mixture.regenerate(count, self.rng, flip=bool(flip))
                found = self.plan.search(self.normalize(drawn), most)
                gains = np.array([_gain(found, fewer, *test) for test in tests])
                reached[flip] += (gains >= observed[:, None]).sum(axis=1)
            p_values = ((1 + reached) / (1 + self.n_draws)).max(axis=0)
            if decide_only and (p_values >= SIGNIFICANCE).all():
                break
        return [float(p) for p in p_values]

    def _portions(self, decide_only: bool) -> list[int]:
        """Numbers of draws between two looks."""
        if not decide_only:
            return [self.n_draws]
        full, rest = divmod(self.n_draws, _DRAWS_PER_LOOK)
        return [_DRAWS_PER_LOOK] * full + [rest] * (rest > 0)


def summarize_places(
    places: np.ndarray, n_layers: int
) -> tuple[list[tuple[int, int]], Float[np.ndarray, " block"]]:
    """95% interval of every boundary, and the share of draws with a boundary at each block."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(places, [tail, 1 - tail], axis=0, method="inverted_cdf").astype(int)
    probability = np.bincount(places.ravel(), minlength=n_layers) / len(places)
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)], probability


def _checked(
    signals: np.ndarray, names: Sequence[str] | None
) -> tuple[Float[np.ndarray, "block signal"], list[str]]:
    matrix = np.array(signals, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(f"signals must have shape [block, signal], got {np.shape(signals)}")
    if len(matrix) < MIN_BLOCKS:
        raise CannotMeasure(
            f"signals must have at least {MIN_BLOCKS} blocks, got {len(matrix)}: with fewer, two "
            "boundaries cannot be told from drift"
        )
    labels = [f"signal {i}" for i in range(matrix.shape[1])] if names is None else list(names)
    if len(labels) != matrix.shape[1] or len(set(labels)) < len(labels):
        raise ValueError(
            f"names must be {matrix.shape[1]} different names, one per signal, got {labels}"
        )
    bad = np.array(~np.isfinite(matrix).all(axis=0))
    if bad.any():
        raise ValueError(f"signals must be finite; NaN or infinite in {_named(labels, bad)}")
    flat = np.array(np.ptp(matrix, axis=0) == 0)
    if flat.any():
        raise ValueError(
            f"signals must change with depth; constant: {_named(labels, flat)}; leave them out"
        )
    return matrix, labels


def _named(labels: Sequence[str], chosen: np.ndarray) -> str:
    return ", ".join(label for label, c in zip(labels, chosen, strict=True) if c)


def _gain(search: Search, fewer: int, *more: int) -> Float[np.ndarray, " draw"]:
    """What the best of some larger numbers of jumps adds."""
    gain: np.ndarray = np.max([search.evidence[k] for k in more], axis=0) - search.evidence[fewer]
    return gain


def _bootstrap(
    plan: SearchPlan,
    jumps: Mixture,
    normalize: Normalizer,
    replicates: np.ndarray | None,
    n_bootstraps: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Where the boundaries fall on matrices regenerated with jumps."""
    drawn = jumps.regenerate(n_bootstraps, rng)
    if replicates is not None:
        replicates = np.asarray(replicates, dtype=np.float64)
        if replicates.ndim != 3 or replicates.shape[1:] != jumps.matrix.shape:
            n_layers, n_signals = jumps.matrix.shape
            raise ValueError(
                f"replicates must have shape [draw, {n_layers}, {n_signals}], got "
                f"{replicates.shape}"
            )
        if not np.isfinite(replicates).all():
            raise ValueError("replicates must be finite")
        which = rng.integers(len(replicates), size=n_bootstraps)
        drawn = drawn + normalize(replicates[which]) - jumps.matrix
    n_jumps = len(jumps.best.boundaries)
    return plan.search(normalize(drawn), n_jumps, place=(n_jumps,)).places[n_jumps]


def _weights(fit: Fit, matrix: Float[np.ndarray, "block signal"]) -> Float[np.ndarray, " signal"]:
    """Each signal's share of what the jumps explain."""
    drift = Fit(fit.basis[:, : -len(fit.boundaries)], (), fit.noise, fit.drift)
    gain = ((matrix - drift.fitted(matrix)) ** 2).sum(axis=0)
    # Generalized least squares may raise a column's plain error: then it carries nothing.
    gain = (gain - ((matrix - fit.fitted(matrix)) ** 2).sum(axis=0)).clip(min=0.0)
    share: np.ndarray = gain / gain.sum() if gain.sum() > 0 else np.full(len(gain), 1 / len(gain))
    return share


def _explained(
    drift: Fit, boundaries: tuple[int, ...], matrix: Float[np.ndarray, "block signal"]
) -> float:
    """Share of the drift's residual that jumps beside the same drift take."""
    both = np.column_stack([drift.basis, steps(len(matrix), boundaries)])
    total, left = (
        float(((matrix - basis @ np.linalg.lstsq(basis, matrix, rcond=None)[0]) ** 2).sum())
        for basis in (drift.basis, both)
    )
    return 1.0 - left / total if total > 1e-9 * matrix.size else 0.0


def _without(
    tested: Comparison, left_out: int, min_size: int, seed: int
) -> tuple[float | None, tuple[int, ...] | None]:
    """p-value of two jumps and the boundaries with one signal left out."""
    if tested.matrix.shape[1] == 1:
        return None, None
    rest = np.delete(tested.matrix, left_out, axis=1)
    plan = search_plan(len(rest), min_size)
    search = plan.search(rest[None], max_jumps=2, place=(2,))
    rng = np.random.default_rng([seed, left_out])
    reference = _Reference(plan, describe(plan, rest), tested.normalize, _DRAWS_PER_SIGNAL, rng)
    (p_value,) = reference.p_values(search, [(2,)])
    return p_value, tuple(int(b) for b in search.places[2][0])


def _cautions(described: Fit, n_signals: int) -> list[str]:
    n_layers, notes = len(described.basis), []
    correlation = described.noise.autocorrelation(n_layers)
    if n_layers < FEW_BLOCKS or n_layers * n_signals < FEW_VALUES:
        notes.append(
            f"{n_layers} blocks and {n_signals} signals leave little power: not finding boundaries "
            "says little (see mspgt_lens.synthetic.power)"
        )
    if n_layers < FEW_BLOCKS_WHERE_DRIFT_BENDS and described.drift not in _STRAIGHT:
        notes.append(
            f"the signals bend gradually with depth ({described.drift}), which hides jumps at "
            f"{n_layers} blocks: two are found less often, or only one of them, and one place in "
            "ten is off by more than a block"
        )
    if correlation >= HIGH_CORRELATION:
        notes.append(
            f"the signals wander with depth (lag-one autocorrelation {correlation:.2f} beyond the "
            "drift), which hides jumps and can look like them: take p-values near 0.05 with care"
        )
    return notes


@dataclass(frozen=True)
class _LeaveOneOut:
    """Squared error of predicting one block from all others, for every block in turn."""

    plan: SearchPlan
    ranks: Float[np.ndarray, "block signal"]

    def error(self, order: int, n_jumps: int) -> float:
        """Of a polynomial drift with so many jumps, placed anew without the block."""
        n, total = self.plan.n_layers, 0.0
        everything = legendre(n, order)
        candidates = self.plan.candidates
        jumps = steps(n, candidates)
        for left_out in range(n):
            keep = np.arange(n) != left_out
            basis = everything
            if n_jumps:
                q, _ = np.linalg.qr(everything[keep])
                beyond = jumps[keep] - q @ (q.T @ jumps[keep])
                along = beyond.T @ self.ranks[keep]
                placed = _best_placement(
                    self.plan.placements[n_jumps], beyond.T @ beyond, along @ along.T
                )
                basis = np.column_stack([everything, jumps[:, placed]])
            solution = np.linalg.lstsq(basis[keep], self.ranks[keep], rcond=None)[0]
            total += float(((self.ranks[left_out] - basis[left_out] @ solution) ** 2).sum())
        return total


def _best_placement(placements: np.ndarray, overlap: np.ndarray, product: np.ndarray) -> np.ndarray:
    chosen = overlap[placements[:, :, None], placements[:, None, :]]
    wanted = product[placements[:, :, None], placements[:, None, :]]
    inverse = np.linalg.pinv(chosen, rcond=1e-9, hermitian=True)
    gain = np.einsum("pab,pba->p", inverse, wanted)
    placement: np.ndarray = placements[gain.argmax()]
    return placement


def _sharpness(
    plan: SearchPlan, ranks: Float[np.ndarray, "block signal"], n_jumps: int
) -> dict[str, float]:
    """Leave-one-block-out error of stages, drift and both, as shares of the mean's own.

    Drift takes the polynomial order with the least such error, which favors it over stages alone.
    """
    loo = _LeaveOneOut(plan, ranks)
    mean = loo.error(0, 0)
    orders = plan.orders[1:]
    return {
        "stages": loo.error(0, n_jumps) / mean,
        "drift": min(loo.error(order, 0) for order in orders) / mean,
        "both": min(loo.error(order, n_jumps) for order in orders) / mean,
    }
