"""Relevance in tokens: the ridge lens, an affine map to the final residual in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.information.channel import pooled_scale
from mspgt_lens.information.ridge import FoldSums, ring, spread_sites
from mspgt_lens.models import ModelAdapter
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.statistics import cluster_interval

LENS_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Strengths are chosen at so many sites, and on about so many of the outputs, evenly spread.
SELECTION_SITES = 4
SELECTION_OUTPUTS = 96
MIN_POSITIONS = 256
# Share of the forward pass's operations that decoding sampled positions may take.
DECODING_SHARE = 0.06
UNIGRAM_GRID = tuple(10.0 ** np.arange(-4.0, 1.0, 0.5))
# Products as large as can be while their 30 MB come from memory that the process already holds.
_LOGITS_PER_CHUNK = 7_500_000


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
    """

    values: Float[np.ndarray, " site"]
    low: Float[np.ndarray, " site"]
    high: Float[np.ndarray, " site"]
    by_fold: Float[np.ndarray, "fold site"] | None
    n_positions: int
    unigram: float


def ridge_lens_relevance(
    moments: Moments, adapter: ModelAdapter, coordinates: Coordinates
) -> TokenRelevance:
    """Relevance of every site through the ridge lens.

    The lens is the affine map from a site to the final normalized residual that ridge regression
    gives from the cross-moments, fitted without the position's own fold of groups and decoded by
    the model's own unembedding: a tuned lens (Belrose et al. 2023) without gradient descent. At the
    last site it is the identity, so relevance there is the model's own gain. The strength is chosen
    on inner folds, one for all sites.
    """
    count = _positions_to_decode(moments, adapter)
    sample, reference = moments.sample, moments.reference
    assert reference is not None
    rows, folds = torch.stack(sample.rows[:count]), sample.fold[:count]
    n_sites = moments.z_read.shape[1]
    device = moments.zz_read.device
    strengths = _choose_strength(moments, coordinates)
    log_likelihood = np.zeros((count, n_sites))
    for site in range(n_sites):
        if site == n_sites - 1:
            predicted = rows[:, site]
        else:
            predicted = torch.zeros(count, adapter.d_model, dtype=rows.dtype)
            scale = pooled_scale(moments, site, coordinates)
            sums = _lens_sums(moments, site, scale)
            for k in sorted(set(folds.tolist())):
                fit = sums.fit([k])
                mine = torch.from_numpy(folds == k)
                z = reference.apply(site, rows[mine, site].to(adapter.device)).to(device)
                out = fit.predict(strengths[k], z / scale)
                predicted[mine] = out.to(rows.dtype).cpu() + reference.center[-1].cpu()
        log_likelihood[:, site] = _log_likelihood(adapter, predicted, sample.next_token[:count])
    return _relevance(moments, log_likelihood)


def logit_lens_relevance(moments: Moments, adapter: ModelAdapter) -> TokenRelevance:
    """Relevance of every site decoded as if it were the last: the raw logit lens."""
    count = _positions_to_decode(moments, adapter)
    rows, tokens = torch.stack(moments.sample.rows[:count]), moments.sample.next_token[:count]
    scores = [_log_likelihood(adapter, rows[:, site], tokens) for site in range(rows.shape[1])]
    return _relevance(moments, np.stack(scores, axis=1))


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


def _choose_strength(moments: Moments, coordinates: Coordinates) -> Float[np.ndarray, " fold"]:
    """Per outer fold, the strength with the least inner held-out squared error.

    Each output counts in units of its own variance, so that massive coordinates do not decide.
    """
    n_folds, n_sites = moments.z_read.shape[:2]
    d_model = moments.final.shape[1]
    outputs = tuple(range(0, d_model, max(1, d_model // SELECTION_OUTPUTS)))
    cost = np.zeros((n_folds, len(LENS_GRID)))
    for site in spread_sites(n_sites - 1, SELECTION_SITES):
        sums = _lens_sums(moments, site, pooled_scale(moments, site, coordinates))
        for pair in ring(n_folds):
            fit = sums.fit(pair)
            for outer, inner in (pair, pair[::-1]):
                about = fit.about(inner)
                zf = about.zt[:, list(outputs)]
                mean = moments.final[inner] / sums.count[inner]
                power = moments.final_square[inner] / sums.count[inner] - mean**2
                unit = torch.where(power > 0, power, 1.0)[list(outputs)]
                for index, strength in enumerate(LENS_GRID):
                    weights = fit.weights(strength, outputs)
                    # The part of the squared error that depends on the weights.
                    change = (weights * (about.zz_times(weights) - 2 * zf)).sum(dim=0)
                    cost[outer, index] += float((change / unit).mean())
    chosen: np.ndarray = np.array(LENS_GRID)[cost.argmin(axis=1)]
    return chosen


def _positions_to_decode(moments: Moments, adapter: ModelAdapter) -> int:
    n_sites = moments.z_read.shape[1]
    per_position = n_sites * adapter.d_model * adapter.d_vocab
    forward = int(moments.token_counts.sum()) * adapter.n_forward_weights
    affordable = int(DECODING_SHARE * forward / per_position)
    return min(max(MIN_POSITIONS, affordable), len(moments.sample.next_token))


def _log_likelihood(
    adapter: ModelAdapter, final: Float[Tensor, "position d_model"], tokens: np.ndarray
) -> Float[np.ndarray, " position"]:
    scores = []
    size = max(1, _LOGITS_PER_CHUNK // adapter.d_vocab)
    for start in range(0, len(tokens), size):
        logits = adapter.decode(final[start : start + size])
        wanted = torch.from_numpy(tokens[start : start + size]).to(logits.device)
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        # In place: as large a temporary again would cost more than the exponentials.
        highest = logits.amax(dim=1)
        total = logits.sub_(highest[:, None]).exp_().sum(dim=1)
        scores.append((chosen - highest - total.log()).double().cpu().numpy())
        del logits  # Freed before the next are made.
    return np.concatenate(scores)


def _relevance(moments: Moments, log_likelihood: np.ndarray) -> TokenRelevance:
    count = len(log_likelihood)
    sample = moments.sample
    unigram = np.zeros(count)
    for k in range(moments.plan.n_folds):
        mine = sample.fold[:count] == k
        unigram[mine] = _unigram(moments, k)[sample.next_token[:count][mine]]
    gain, fold = log_likelihood - unigram[:, None], sample.fold[:count]
    values, low, high = cluster_interval(gain, sample.group[:count])
    folds = range(moments.plan.n_folds)
    by_fold = (
        np.stack([gain[fold == k].mean(axis=0) for k in folds])
        if all((fold == k).any() for k in folds)
        else None
    )
    return TokenRelevance(values, low, high, by_fold, count, float(-unigram.mean()))


def _unigram(moments: Moments, fold: int) -> Float[np.ndarray, " vocab"]:
    """Log-probabilities from the other folds' counts, smoothed by a strength chosen among them."""
    counts = moments.token_counts.astype(float)
    n_folds, d_vocab = counts.shape
    tested = (fold + 1) % n_folds
    inner = counts.sum(0) - counts[fold] - counts[tested]
    likelihood = [
        counts[tested] @ np.log((inner + a) / (inner.sum() + a * d_vocab)) for a in UNIGRAM_GRID
    ]
    smoothing = UNIGRAM_GRID[int(np.argmax(likelihood))]
    outer = counts.sum(0) - counts[fold]
    log_probability: np.ndarray = np.log((outer + smoothing) / (outer.sum() + smoothing * d_vocab))
    return log_probability
