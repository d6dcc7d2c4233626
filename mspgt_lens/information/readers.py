"""What linear-Gaussian readers of a site find about the past and the future, held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.information.channel import pooled_scale
from mspgt_lens.information.ridge import FoldSums, matching, ring, spread_sites
from mspgt_lens.information.site_reader import (
    Predictions,
    SampledRows,
    SiteReader,
    Strengths,
    log_determinant,
    log_ratio,
)
from mspgt_lens.moments import Coordinates, MomentPlan, Moments
from mspgt_lens.processes import ALONE, Processes
from mspgt_lens.statistics import fold_interval

# From nearly unpenalized to nearly silent; infinity is the null reader, which predicts the mean.
RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0, np.inf)
SELECTION_SITES = 4
# The upper end uses fits whose optimism (training minus held-out score) is at most this per
# feature: then a third of the directions fitted are noise, and the correction still holds.
MAX_OPTIMISM = 0.5


@dataclass(frozen=True)
class Reading:
    """Held-out information that linear-Gaussian readers find about every target at every site.

    Attributes:
        values: Mean held-out log-likelihood ratio (nats per token), shape ``[target, site]``.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        by_fold: The score on each fold, shape ``[fold, target, site]``.
    """

    values: Float[np.ndarray, "target site"]
    low: Float[np.ndarray, "target site"]
    high: Float[np.ndarray, "target site"]
    by_fold: Float[np.ndarray, "fold target site"]


@dataclass(frozen=True)
class TargetReadings:
    """All that is read of a model's targets.

    Attributes:
        targets: Those of ``scored``, by their Gaussian log-likelihood ratios.
        scored: Which of all targets (the past of every band, then the future of every band): all,
            or those of several tokens where single ones are read otherwise.
        added: What the future of each of ``added_bands`` adds to those of the coarser of them.
        added_bands: Which bands these are: all, or those of several tokens, as ``scored``.
        correlations: Held-out canonical correlations with the future of each band, shape
            ``[fold, band, site, component]``.
        ridge: The ridge strength chosen for each fold and target, shape ``[fold, target]``.
    """

    targets: Reading
    scored: tuple[int, ...]
    added: Reading
    added_bands: tuple[int, ...]
    correlations: Float[np.ndarray, "fold band site component"]
    ridge: Float[np.ndarray, "fold target"]


class SampleReader(Protocol):
    """What reads the sampled positions of every site beside the moments."""

    def rows(self, site: int) -> SampledRows:
        """The sampled positions of a site, in the reader's coordinates."""

    def read(self, site: int, told: Predictions) -> Mapping[str, np.ndarray]:
        """What is seen in what the readers of one site predict."""

    def keep(self, site: int, seen: Mapping[str, np.ndarray]) -> None:
        """Take in what was seen of one site, perhaps by another process."""


def read_targets(
    moments: Moments,
    coordinates: Coordinates,
    sampled: SampleReader | None = None,
    processes: Processes = ALONE,
) -> TargetReadings:
    """What a linear-Gaussian reader of each site can use about each target.

    ``E_test[log N(y; W z + b, S) - log N(y; m, S_0)]``, with W by ridge, cross-fitted over folds of
    groups. For outer fold k, strengths and residual covariances come from inner fits that leave out
    k and one neighbor, tested on the neighbor; one strength per target serves all sites. The null
    reader is in the grid and reads exactly 0.

    The value is conservative: a reader fitted on a finite sample is worse than the best one. The
    interval reaches from the held-out score down by its sampling error, and up to what the best
    reader may reach: the training score less its optimism. For Gaussian data fitted with x
    directions per position, training exceeds held-out scores by ``R x / (1 - x)`` and the truth by
    ``-R/2 log(1 - x)``, so the gap between the two tells the optimism, whatever the dependence
    between neighboring positions. It is taken at the weakest strength whose gap is small enough.

    What a band adds to the coarser ones is read off the same readers taken together: the joint
    log-likelihood ratio splits by the chain rule, coarse to fine, and the parts sum to it.

    Args:
        moments: The sums.
        coordinates: The reader's coordinates.
        sampled: Given what readers predict at the sampled positions, site by site; it reads targets
            of one token, of which a Gaussian says nothing fair, so that they get no ratio here.
        processes: Those that share the sites.
    """
    n_sites, n_bands = moments.z_read.shape[1], len(moments.plan.bands)
    bands = list(moments.plan.bands.values())
    # Where single tokens are read otherwise, they get no Gaussian log-likelihood ratio.
    gaussian = [i for i, (first, last) in enumerate(bands) if first < last or sampled is None]
    scored = [*gaussian, *(n_bands + i for i in gaussian)]
    # Coarse to fine: from the band that reaches farthest to the one nearest.
    coarse_to_fine = sorted(gaussian, key=lambda i: bands[i], reverse=True)
    chain = [n_bands + i for i in coarse_to_fine]
    futures = [n_bands + i for i in range(n_bands)]
    _require_variety(_site_reader(moments, 0, coordinates), moments.plan)
    chosen_at = spread_sites(n_sites, SELECTION_SITES)
    strengths = choose_strengths(
        lambda index: _site_reader(moments, chosen_at[index], coordinates),
        len(chosen_at),
        processes,
    )

    def read(site: int) -> dict[str, np.ndarray]:
        score, correlations, told = _site_reader(moments, site, coordinates).score(
            strengths,
            scored=scored,
            chain=chain,
            correlated=futures,
            rows=None if sampled is None else sampled.rows(site),
        )
        seen = {} if sampled is None or told is None else sampled.read(site, told)
        return {**vars(score), "correlations": correlations, **seen}

    found = processes.each(n_sites, read)
    for site, seen in enumerate(found):
        if sampled is not None:
            sampled.keep(site, seen)
    weights = moments.n_read.astype(float)
    held_out, light, corrected = (
        np.stack([seen[name] for seen in found], axis=-1)
        for name in ("held_out", "light", "corrected")
    )
    everything = summarize(held_out, light, corrected, weights)
    in_band_order = np.argsort(np.array(coarse_to_fine, dtype=int))
    return TargetReadings(
        targets=_pick(everything, np.arange(len(scored))),
        scored=tuple(scored),
        added=_pick(everything, len(scored) + in_band_order),
        added_bands=tuple(gaussian),
        correlations=np.stack([seen["correlations"] for seen in found], axis=2),
        ridge=strengths.chosen,
    )


def summarize(
    held_out: Float[np.ndarray, "fold part site"],
    light: Float[np.ndarray, "fold part site"],
    corrected: Float[np.ndarray, "fold part site"],
    weights: Float[np.ndarray, " fold"],
) -> Reading:
    """Scores of folds as values with intervals: see :func:`read_targets`."""
    n_folds, *shape = held_out.shape
    value, low, high = fold_interval(held_out.reshape(n_folds, -1), weights)
    mean_light, _, high_light = fold_interval(light.reshape(n_folds, -1), weights)
    best = weights @ corrected.reshape(n_folds, -1) / weights.sum()
    return Reading(
        values=value.reshape(shape),
        low=low.reshape(shape),
        high=np.maximum(high, best + high_light - mean_light).reshape(shape),
        by_fold=held_out,
    )


def choose_strengths(
    reader_of: Callable[[int], SiteReader], count: int, processes: Processes = ALONE
) -> Strengths:
    """Strengths from inner fits at a few sites: the least held-out log-determinant decides.

    Args:
        reader_of: Gives the reader of each of these sites.
        count: How many sites there are.
        processes: Those that share them.
    """

    def tried(index: int) -> dict[str, np.ndarray]:
        reader = reader_of(index)
        n_folds, n_targets = len(reader.count), reader.n_targets
        pairs = matching(n_folds)
        cost = np.zeros((n_folds, len(RIDGE_GRID), n_targets))
        optimism = np.zeros((len(RIDGE_GRID), n_targets))
        for pair in pairs:
            fit = reader.sums.fit(pair)
            for at, strength in enumerate(RIDGE_GRID):
                everywhere = np.full(n_targets, strength)
                trained = reader.trained(fit, everywhere)
                training = log_ratio(trained, trained)
                for outer, inner in (pair, pair[::-1]):
                    left = reader.tested(fit, inner, everywhere)
                    cost[outer, at] += reader.count[inner] * log_determinant(left)
                    optimism[at] += training - log_ratio(left, trained)
        return {"cost": cost, "optimism": optimism / (2 * len(pairs) * reader.n_features)}

    found, grid = processes.each(count, tried), np.array(RIDGE_GRID)
    cost = np.sum([one["cost"] for one in found], axis=0)
    bearable = np.mean([one["optimism"] for one in found], axis=0) <= MAX_OPTIMISM
    # The null reader shows no optimism, so there always is a first bearable strength.
    return Strengths(chosen=grid[cost.argmin(axis=1)], weakest=grid[bearable.argmax(axis=0)])


def _require_variety(reader: SiteReader, plan: MomentPlan) -> None:
    """See that every target differs from one position to another wherever readers are fitted.

    Raises:
        CannotMeasure: If one does not.
    """
    for left_out in ring(len(reader.count)):
        constant = reader.constant_targets(left_out)
        if constant:
            bands = list(plan.bands)
            names = [*bands, *bands, *(bands[index - len(bands)] for index in plan.far)]
            raise CannotMeasure(
                f"prompts are too much alike: in all folds but {left_out[0]} and {left_out[1]}, "
                f"the tokens of the band {names[constant[0]]!r} are the same everywhere, and "
                "nothing can be told of them; give texts that differ more, or more of those that do"
            )


def _site_reader(moments: Moments, site: int, coordinates: Coordinates) -> SiteReader:
    """The readable positions of one site, in the reader's coordinates."""
    scale = pooled_scale(moments, site, coordinates)
    sums = FoldSums(
        moments.n_read.astype(float),
        moments.z_read[:, site] / scale,
        moments.zz_read[:, site] / torch.outer(scale, scale),
        moments.y,
        moments.zy[:, site] / scale[:, None],
        # As wide as the products that were summed.
        rough=moments.z_next.dtype == torch.float32,
    )
    n_features = moments.plan.features.shape[1]
    return SiteReader(sums, moments.yy, moments.yy.shape[1] // n_features)


def _pick(reading: Reading, parts: Int[np.ndarray, " part"]) -> Reading:
    return Reading(
        reading.values[parts], reading.low[parts], reading.high[parts], reading.by_fold[:, parts]
    )
