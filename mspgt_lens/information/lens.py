"""The ridge lens, an affine map to the final residual in closed form: its fit and its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.information.channel import pooled_scale
from mspgt_lens.information.ridge import FoldSums, ring, spread_sites
from mspgt_lens.information.tilting import log_total
from mspgt_lens.information.unigram import unigram_log_probability
from mspgt_lens.models import ModelAdapter
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.processes import ALONE, Processes
from mspgt_lens.statistics import cluster_interval

LENS_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Strengths are chosen at so many sites, and on about so many of the outputs, evenly spread.
SELECTION_SITES = 4
SELECTION_OUTPUTS = 96
MIN_POSITIONS = 256
# Share of the forward pass's operations that decoding sampled positions may take.
DECODING_SHARE = 0.06
# Products as large as can be while their 30 MB come from memory that the process already holds.
LOGITS_PER_CHUNK = 7_500_000


@dataclass(frozen=True)
class TokenRelevance:
    """Cross-entropy gain over the unigram model at each site, nats per token.

    Attributes:
        values: Mean over the sampled held-out positions, shape ``[site]``.
        low: Lower end of the 95% interval, resampling groups.
        high: Upper end of the 95% interval.
        by_fold: Mean over each fold's positions, shape ``[fold, site]``; None if one has none.
        n_positions: Positions decoded.
        unigram: Held-out cross-entropy of the unigram model (nats per token).
        gain: The gain at each position, shape ``[position, site]``.
    """

    values: Float[np.ndarray, " site"]
    low: Float[np.ndarray, " site"]
    high: Float[np.ndarray, " site"]
    by_fold: Float[np.ndarray, "fold site"] | None
    n_positions: int
    unigram: float
    gain: Float[np.ndarray, "position site"]


@dataclass(frozen=True)
class LensMaps:
    """From the normalized residual at each site but the last to the final normalized residual.

    Attributes:
        center: What is taken off the normalized residual, shape ``[site, d_model]``.
        weights: The linear part, shape ``[site, width, d_model]``.
        bias: What is added, shape ``[site, d_model]``.
        spread: Where the residual is wider than ``width``: what each coordinate is divided by
            before it is projected, shape ``[site, d_model]``; else None.
        axes: The directions projected on, shape ``[d_model, width]``; else None.
    """

    center: Float[Tensor, "site d_model"]
    weights: Float[Tensor, "site width d_model"]
    bias: Float[Tensor, "site d_model"]
    spread: Float[Tensor, "site d_model"] | None
    axes: Float[Tensor, "d_model width"] | None

    def final(
        self, site: int, normalized: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """The final normalized residual as predicted from a site's; the last site's is its own."""
        if site == len(self.weights):
            return normalized
        rows = normalized.to(self.weights.dtype) - self.center[site]
        if self.axes is not None and self.spread is not None:
            rows = (rows / self.spread[site]) @ self.axes
        return rows @ self.weights[site] + self.bias[site]

    def to(self, device: torch.device) -> LensMaps:
        """The same maps on a device."""
        return LensMaps(
            self.center.to(device),
            self.weights.to(device),
            self.bias.to(device),
            None if self.spread is None else self.spread.to(device),
            None if self.axes is None else self.axes.to(device),
        )


@dataclass(frozen=True)
class LensScores:
    """How well the ridge lens predicts at sampled held-out positions, in nats.

    Attributes:
        log_likelihood: Of the token to be predicted, shape ``[position, site]``.
        kl: Divergence of the lens from the model's own prediction, shape ``[position, site]``.
        entropy: Of the lens's prediction, shape ``[position, site]``.
    """

    log_likelihood: Float[np.ndarray, "position site"]
    kl: Float[np.ndarray, "position site"]
    entropy: Float[np.ndarray, "position site"]


def ridge_lens_relevance(
    moments: Moments,
    adapter: ModelAdapter,
    coordinates: Coordinates,
    processes: Processes = ALONE,
) -> TokenRelevance:
    """Relevance of every site through the ridge lens.

    The lens is the affine map from a site to the final normalized residual that ridge regression
    gives from the cross-moments, fitted without the position's own fold of groups and decoded by
    the model's own unembedding: a tuned lens (Belrose et al. 2023) without gradient descent. At the
    last site it is the identity, so relevance there is the model's own gain. The strength is chosen
    on inner folds, one for all sites.

    Args:
        moments: The sums, with their sample.
        adapter: The model.
        coordinates: Of the lens.
        processes: Those that share the sites.
    """
    count = _positions_to_decode(moments, adapter)
    final = _held_out_final(moments, adapter, coordinates, count, processes)
    return _decoded_relevance(moments, adapter, count, final, processes)


def logit_lens_relevance(
    moments: Moments, adapter: ModelAdapter, processes: Processes = ALONE
) -> TokenRelevance:
    """Relevance of every site decoded as if it were the last: the raw logit lens."""
    count = _positions_to_decode(moments, adapter)
    rows = torch.stack(moments.sample.rows[:count])
    return _decoded_relevance(moments, adapter, count, lambda site: rows[:, site], processes)


def fit_lens_maps(moments: Moments, coordinates: Coordinates) -> tuple[LensMaps, float]:
    """The lens fitted on all folds, and the strength of its penalty.

    The strength has the least squared error over all inner folds together.
    """
    reference = moments.reference
    assert reference is not None
    strength = LENS_GRID[int(_strength_costs(moments, coordinates).sum(axis=0).argmin())]
    center = reference.center[:-1]
    weights, bias = [], []
    for site in range(len(center)):
        scale = pooled_scale(moments, site, coordinates)
        fit = _lens_sums(moments, site, scale).fit([])
        solved = fit.weights(strength)
        shift = fit.mean_t + reference.center[-1].to(fit.mean_t) - fit.mean_z @ solved
        bias.append(shift.to(center.dtype))
        weights.append((solved / scale[:, None]).to(center.dtype))
    maps = LensMaps(
        center,
        torch.stack(weights).to(center),
        torch.stack(bias).to(center),
        None if reference.spread is None else reference.spread[:-1],
        reference.axes,
    )
    return maps, strength


def score_lens(
    moments: Moments, adapter: ModelAdapter, coordinates: Coordinates, *, every: bool = True
) -> LensScores:
    """Scores at sampled positions, each by the lens of the other folds.

    Args:
        moments: What was gathered.
        adapter: The model.
        coordinates: Of the lens.
        every: At every sampled position; else at those that relevance is read at.
    """
    tokens = moments.sample.next_token
    count = len(tokens) if every else _positions_to_decode(moments, adapter)
    tokens = tokens[:count]
    final = _held_out_final(moments, adapter, coordinates, count)
    finals = [final(site) for site in range(moments.z_read.shape[1])]
    log_likelihood, kl, entropy = np.zeros((3, count, len(finals)))
    for at in _chunks(count, adapter):
        own = adapter.decode(finals[-1][at]).log_softmax(dim=1)
        share = own.exp()
        for site, mapped in enumerate(finals):
            told = adapter.decode(mapped[at]).log_softmax(dim=1)
            wanted = torch.from_numpy(tokens[at]).to(told.device)[:, None]
            log_likelihood[at, site] = told.gather(1, wanted)[:, 0].cpu().double().numpy()
            kl[at, site] = (share * (own - told)).sum(dim=1).cpu().double().numpy()
            unsure = -(told.exp() * told).sum(dim=1)
            entropy[at, site] = unsure.cpu().double().numpy()
    return LensScores(log_likelihood, kl, entropy)


def lens_relevance(
    moments: Moments, log_likelihood: Float[np.ndarray, "position site"]
) -> TokenRelevance:
    """Gain over the unigram model of what a lens says at the first sampled positions."""
    count, sample = len(log_likelihood), moments.sample
    unigram = np.zeros(count)
    for k in range(moments.plan.n_folds):
        mine = sample.fold[:count] == k
        unigram[mine] = unigram_log_probability(moments, [k])[sample.next_token[:count][mine]]
    gain = log_likelihood - unigram[:, None]
    return TokenRelevance(*mean_over_sample(moments, gain), count, float(-unigram.mean()), gain)


def mean_over_sample(
    moments: Moments, scores: Float[np.ndarray, "position site"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean over the first sampled positions, its 95% interval by groups, and each fold's mean.

    The last is None where a fold has no position.
    """
    count = len(scores)
    fold, folds = moments.sample.fold[:count], range(moments.plan.n_folds)
    values, low, high = cluster_interval(scores, moments.sample.group[:count])
    by_fold = (
        np.stack([scores[fold == k].mean(axis=0) for k in folds])
        if all((fold == k).any() for k in folds)
        else None
    )
    return values, low, high, by_fold


def _decoded_relevance(
    moments: Moments,
    adapter: ModelAdapter,
    count: int,
    final: Callable[[int], Float[Tensor, "position d_model"]],
    processes: Processes,
) -> TokenRelevance:
    """Relevance of every site by what is decoded of it."""
    tokens = moments.sample.next_token[:count]

    def scored(site: int) -> dict[str, np.ndarray]:
        return {"score": _log_likelihood(adapter, final(site), tokens)}

    found = processes.each(moments.z_read.shape[1], scored)
    return lens_relevance(moments, np.stack([one["score"] for one in found], axis=1))


def _held_out_final(
    moments: Moments,
    adapter: ModelAdapter,
    coordinates: Coordinates,
    count: int,
    processes: Processes = ALONE,
) -> Callable[[int], Float[Tensor, "position d_model"]]:
    """Of a site, the final residual at sampled positions as the lens of other folds has it."""
    sample, reference = moments.sample, moments.reference
    assert reference is not None
    strengths = _choose_strength(moments, coordinates, processes)
    rows, folds = torch.stack(sample.rows[:count]), sample.fold[:count]
    n_sites = moments.z_read.shape[1]
    device = moments.zz_read.device

    def final(site: int) -> Float[Tensor, "position d_model"]:
        if site == n_sites - 1:
            return rows[:, -1]
        predicted = torch.zeros(count, adapter.d_model, dtype=rows.dtype)
        scale = pooled_scale(moments, site, coordinates)
        sums = _lens_sums(moments, site, scale)
        for k in sorted(set(folds.tolist())):
            fit = sums.fit([k])
            mine = torch.from_numpy(folds == k)
            z = reference.apply(site, rows[mine, site].to(device))
            out = fit.predict(strengths[k], z / scale)
            predicted[mine] = out.to(rows.dtype).cpu() + reference.center[-1].cpu()
        return predicted

    return final


def _lens_sums(moments: Moments, site: int, scale: Float[Tensor, " width"]) -> FoldSums:
    """One site's positions with the final residual as target: all valid ones, or hidden ones."""
    count, z, zz = moments.n_read, moments.z_read[:, site], moments.zz_read[:, site]
    if not moments.plan.masked:
        count = moments.n_valid
        z, zz = z + moments.z_rest[:, site], zz + moments.zz_rest[:, site]
    return FoldSums(
        count.astype(float),
        z / scale,
        zz / torch.outer(scale, scale),
        moments.final,
        moments.z_final[:, site].double() / scale[:, None],
    )


def _choose_strength(
    moments: Moments, coordinates: Coordinates, processes: Processes
) -> Float[np.ndarray, " fold"]:
    """Per outer fold, the strength with the least inner held-out squared error."""
    costs = _strength_costs(moments, coordinates, processes)
    chosen: np.ndarray = np.array(LENS_GRID)[costs.argmin(axis=1)]
    return chosen


def _strength_costs(
    moments: Moments, coordinates: Coordinates, processes: Processes = ALONE
) -> Float[np.ndarray, "fold strength"]:
    """Per outer fold and strength, the inner held-out squared error, up to a constant.

    Each output counts in units of its own variance, so that massive coordinates do not decide.
    """
    n_folds, n_sites = moments.z_read.shape[:2]
    d_model = moments.final.shape[1]
    outputs = tuple(range(0, d_model, max(1, d_model // SELECTION_OUTPUTS)))
    sites = spread_sites(n_sites - 1, SELECTION_SITES)

    def costs_at(index: int) -> dict[str, np.ndarray]:
        site, costs = sites[index], np.zeros((n_folds, len(LENS_GRID)))
        sums = _lens_sums(moments, site, pooled_scale(moments, site, coordinates))
        for pair in ring(n_folds):
            fit = sums.fit(pair)
            for outer, inner in (pair, pair[::-1]):
                about = fit.about(inner)
                zf = about.zt[:, list(outputs)]
                mean = moments.final[inner] / sums.count[inner]
                power = moments.final_square[inner] / sums.count[inner] - mean**2
                unit = torch.where(power > 0, power, 1.0)[list(outputs)]
                for at, strength in enumerate(LENS_GRID):
                    weights = fit.weights(strength, outputs)
                    # The part of the squared error that depends on the weights.
                    change = (weights * (about.zz_times(weights) - 2 * zf)).sum(dim=0)
                    costs[outer, at] += float((change / unit).mean())
        return {"costs": costs}

    found = processes.each(len(sites), costs_at)
    return sum((one["costs"] for one in found), np.zeros((n_folds, len(LENS_GRID))))


def _positions_to_decode(moments: Moments, adapter: ModelAdapter) -> int:
    count = affordable_positions(
        forward=int(moments.token_counts.sum()) * adapter.n_forward_weights,
        per_position=moments.z_read.shape[1] * adapter.d_model * adapter.d_vocab,
    )
    return min(count, len(moments.sample.next_token))


def affordable_positions(*, forward: int, per_position: int) -> int:
    """Sampled positions to decode, from the products of the pass and of decoding one position."""
    return max(MIN_POSITIONS, int(DECODING_SHARE * forward / per_position))


def _log_likelihood(
    adapter: ModelAdapter, final: Float[Tensor, "position d_model"], tokens: np.ndarray
) -> Float[np.ndarray, " position"]:
    scores = []
    for at in _chunks(len(tokens), adapter):
        logits = adapter.decode(final[at])
        wanted = torch.from_numpy(tokens[at]).to(logits.device)
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        scores.append((chosen - log_total(logits)).cpu().double().numpy())
        del logits  # Freed before the next are made.
    return np.concatenate(scores)


def _chunks(count: int, adapter: ModelAdapter) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // adapter.d_vocab)
    return [slice(start, start + size) for start in range(0, count, size)]
