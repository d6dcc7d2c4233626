"""Mutual information by small trained networks, held out: a variational decoder and InfoNCE."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.estimates import Estimate
from mspgt_lens.estimators.fold_training import BATCH, FoldMLP, FoldSplit, split_folds, train
from mspgt_lens.estimators.linear import check_width, negentropy
from mspgt_lens.estimators.samples import N_FOLDS, Samples, normal_scores, score_interval
from mspgt_lens.information.readers import RIDGE_GRID

NEGATIVES = 512
EMBEDDING = 32
N_COMPONENTS = 8

_Score = Callable[[Int[Tensor, "fold row"]], Float[Tensor, "fold row"]]

VIB_LABELS = (
    "held-out log-likelihood of a trained classifier against class frequencies (Barber and "
    "Agakov): a lower bound in expectation"
)
VIB_NUMBERS = (
    "held-out log-likelihood of a trained decoder of y's normal scores against their "
    "Gaussian (Barber and Agakov): a lower bound in expectation for one-dimensional y; with more "
    "columns where their scores are jointly Gaussian, and the lower end gives back what they lack"
)
INFONCE = (
    "held-out InfoNCE with batches of {batch}: a lower bound in expectation for any data, which "
    "cannot exceed log({batch}) = {ceiling:.2f} nats"
)


def vib(samples: Samples) -> Estimate:
    """Barber and Agakov's bound (2003), the relevance term of a variational bottleneck.

    ``E[log q(y | z) - log r(y)]`` on groups that q was not trained on. For labels q is a network's
    softmax and r the class frequencies. For numbers, q takes a ridge reader's whitened residual,
    direction by direction, for a mixture of normals that a network sets, and r is the Gaussian of
    y; both of normal scores, so that r is exact for one-dimensional y. Training starts at the ridge
    reader (class frequencies) and stops on held-out groups, so the result is about as good as the
    linear reader's where nothing else is to be found.
    """
    check_width(samples)
    split = split_folds(samples)
    z = torch.from_numpy(normal_scores(samples.z)).float()
    if samples.labels is not None:
        scores, lacking = _classifier_scores(z, samples, split), 0.0
    else:
        assert samples.y is not None
        y = normal_scores(samples.y)
        scores = _decoder_scores(normal_scores(samples.z), y, split, samples.seed)
        lacking = negentropy(y, samples.seed)
    value, reach = score_interval(scores, samples.groups)
    warnings: tuple[str, ...] = ()
    if lacking > 0:
        warnings = (
            f"y's normal scores are not jointly Gaussian (negentropy at least {lacking:.2g} nats), "
            "so this is no strict lower bound; the lower end allows for it",
        )
    return Estimate(
        value=value,
        low=value - reach - lacking,
        high=max(value + reach, 0.0),
        unit="nats",
        guarantee=VIB_NUMBERS if samples.labels is None else VIB_LABELS,
        warnings=warnings,
    )


def _classifier_scores(
    z: Float[Tensor, "sample d_z"], samples: Samples, split: FoldSplit
) -> Float[np.ndarray, " sample"]:
    assert samples.labels is not None
    labels = torch.from_numpy(samples.labels).long()
    n_labels = int(labels.max()) + 1
    prior = torch.stack(
        [(labels[rows].bincount(minlength=n_labels) + 0.5).log() for rows in split.train]
    )[:, None]
    generator = torch.Generator().manual_seed(samples.seed)
    network = FoldMLP(z.shape[1], n_labels, generator)

    def likelihood(rows: Int[Tensor, "fold row"]) -> Float[Tensor, "fold row"]:
        log_q = (prior + network(z[rows])).log_softmax(dim=-1)
        chosen: Tensor = log_q.gather(-1, labels[rows][..., None])[..., 0]
        return chosen

    train(
        [network],
        lambda rows: -likelihood(rows).mean(dim=1),
        lambda: _means(likelihood, split.validation),
        split,
        samples.seed,
    )
    frequency = np.bincount(samples.labels) / len(labels)
    scores: np.ndarray = _scatter(likelihood, split.test, len(labels))
    scores -= np.log(frequency[samples.labels])
    return scores


def _decoder_scores(
    z: Float[np.ndarray, "sample d_z"],
    y: Float[np.ndarray, "sample d_y"],
    split: FoldSplit,
    seed: int,
) -> Float[np.ndarray, " sample"]:
    readers = [
        _ridge_reader(z, y, rows, held)
        for rows, held in zip(split.train, split.validation, strict=True)
    ]
    inputs = torch.from_numpy(z).float()
    left = torch.from_numpy(np.stack([white for white, _ in readers])).float()
    ratio = np.stack([constant for _, constant in readers])
    width = 3 * N_COMPONENTS * y.shape[1]
    network = FoldMLP(z.shape[1], width, torch.Generator().manual_seed(seed))
    folds = torch.arange(N_FOLDS)[:, None]
    # Together a standard normal but for 1e-5 nats, and apart so that they learn different things.
    offsets = torch.linspace(-0.45, 0.45, N_COMPONENTS)
    start = (1 - offsets.pow(2).mean()).log() / 2

    def gain(rows: Int[Tensor, "fold row"]) -> Float[Tensor, "fold row"]:
        """Log-likelihood of the network's mixture less that of the ridge reader."""
        error = left[folds, rows]
        raw = rearrange(network(inputs[rows]), "f r (p d k) -> p f r d k", p=3, k=N_COMPONENTS)
        log_scale = raw[1] + start
        away = (error[..., None] - offsets - raw[0]) * torch.exp(-log_scale)
        mixed = raw[2].log_softmax(dim=-1) - log_scale - away**2 / 2
        better: Tensor = (mixed.logsumexp(dim=-1) + error**2 / 2).sum(dim=-1)
        return better

    train(
        [network],
        lambda rows: -gain(rows).mean(dim=1),
        lambda: _means(gain, split.validation),
        split,
        seed,
    )
    scores = _scatter(gain, split.test, len(z))
    for k, rows in enumerate(split.test):
        scores[rows] += ratio[k, rows]
    return scores


def _ridge_reader(
    z: np.ndarray, y: np.ndarray, rows: np.ndarray, held: np.ndarray
) -> tuple[Float[np.ndarray, "sample d_y"], Float[np.ndarray, " sample"]]:
    """What the best ridge reader leaves of y, whitened, and its log-likelihood ratio.

    The strength is the one with the best log-likelihood on validation groups.
    """
    mean_z, mean_y = z[rows].mean(axis=0), y[rows].mean(axis=0)
    null = y - mean_y
    root_null, log_null = _log_normal(null, null[rows])
    power, axes = np.linalg.eigh(np.cov(z[rows].T, bias=True).reshape(z.shape[1], -1))
    turned = (z - mean_z) @ axes
    cross = turned[rows].T @ null[rows] / len(rows)
    best, best_score = (root_null, np.zeros(len(z))), 0.0
    for strength in RIDGE_GRID[:-1]:
        left = null - turned @ (cross / (power.clip(min=0.0) + strength)[:, None])
        white, log_reader = _log_normal(left, left[rows])
        ratio = log_reader - log_null
        if ratio[held].mean() > best_score:
            best, best_score = (white, ratio), float(ratio[held].mean())
    return best


def _log_normal(
    left: Float[np.ndarray, "sample d"], seen: Float[np.ndarray, "row d"]
) -> tuple[Float[np.ndarray, "sample d"], Float[np.ndarray, " sample"]]:
    """Rows whitened by the second moments of those seen, and their log density."""
    root = np.linalg.cholesky(seen.T @ seen / len(seen))
    white = np.linalg.solve(root, left.T).T
    return white, -0.5 * (white**2).sum(axis=1) - np.log(root.diagonal()).sum()


def infonce(samples: Samples) -> Estimate:
    """InfoNCE (van den Oord et al. 2018; Poole et al. 2019) with a separable critic.

    ``E[log(exp f(z_i, y_i) / mean_j exp f(z_i, y_j))]`` over batches of held-out samples, with
    ``f(z, y) = g(z) h(y) + c(y)`` and networks trained on other groups. The bound holds for any
    critic and any data. Samples of one group in a batch make it lower, never higher.
    """
    split = split_folds(samples)
    z = torch.from_numpy(normal_scores(samples.z)).float()
    if samples.labels is None:
        assert samples.y is not None
        y = torch.from_numpy(normal_scores(samples.y)).float()
    else:
        y = torch.nn.functional.one_hot(torch.from_numpy(samples.labels).long()).float()
    generator = torch.Generator().manual_seed(samples.seed)
    of_z = FoldMLP(z.shape[1], EMBEDDING, generator)
    of_y = FoldMLP(y.shape[1], EMBEDDING + 1, generator)
    # If both embeddings were 0, neither would have a slope.
    with torch.no_grad():
        of_z.weights[3].normal_(generator=generator)
    size = min(NEGATIVES, *(len(rows) for rows in split.test))

    def score(rows: Int[Tensor, "fold row"]) -> Float[Tensor, "fold row"]:
        """Each row's log-ratio against all rows of its batch, itself among them."""
        keys = of_y(y[rows])
        logits = of_z(z[rows]) @ keys[..., :-1].mT / EMBEDDING**0.5 + keys[..., -1][:, None]
        own: Tensor = logits.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1)
        return own + float(np.log(rows.shape[1]))

    rng = np.random.default_rng(samples.seed)
    held = _batches(split.validation, min(NEGATIVES, *map(len, split.validation)), rng)
    train(
        [of_z, of_y],
        lambda rows: -score(rows).mean(dim=1),
        lambda: torch.stack([score(rows).mean(dim=1) for rows in held]).mean(dim=0),
        split,
        samples.seed,
        batch=min(BATCH, *map(len, split.train)),
    )
    scores = np.zeros(len(z))
    with torch.no_grad():
        # The last batch is filled up with rows that came before; the later score stands.
        for rows in _batches(split.test, size, rng):
            scores[rows.numpy().ravel()] = score(rows).double().numpy().ravel()
    value, reach = score_interval(scores, samples.groups)
    ceiling = float(np.log(size))
    warnings: tuple[str, ...] = ()
    if value > ceiling - 1:
        warnings = (
            f"InfoNCE is within 1 nat of its ceiling, log({size}) = {ceiling:.2f} nats; the "
            "information may be far above; use 'vib', or more samples if the batch is below "
            f"{NEGATIVES}",
        )
    return Estimate(
        value=value,
        low=value - reach,
        high=max(value + reach, 0.0),
        unit="nats",
        guarantee=INFONCE.format(batch=size, ceiling=ceiling),
        warnings=warnings,
    )


def _batches(
    parts: list[np.ndarray], size: int, rng: np.random.Generator
) -> list[Int[Tensor, "fold row"]]:
    """Batches of ``size`` distinct rows of each fold that together hold every row."""
    shuffled = [rng.permutation(part) for part in parts]
    count = -(-max(map(len, parts)) // size)
    starts = [np.linspace(0, len(part) - size, count).astype(int) for part in parts]
    return [
        torch.from_numpy(
            np.stack([p[s[b] : s[b] + size] for p, s in zip(shuffled, starts, strict=True)])
        )
        for b in range(count)
    ]


def _padded(parts: list[np.ndarray]) -> tuple[Int[Tensor, "fold row"], Tensor]:
    """Rows of unequal parts side by side, and which of them are no padding."""
    rows = torch.zeros(len(parts), max(map(len, parts)), dtype=torch.long)
    real = torch.zeros_like(rows, dtype=torch.bool)
    for k, part in enumerate(parts):
        rows[k, : len(part)] = torch.from_numpy(part)
        real[k, : len(part)] = True
    return rows, real


def _means(score: _Score, parts: list[np.ndarray]) -> Float[Tensor, " fold"]:
    rows, real = _padded(parts)
    return torch.where(real, score(rows), 0.0).sum(dim=1) / real.sum(dim=1)


@torch.no_grad()
def _scatter(score: _Score, parts: list[np.ndarray], n: int) -> Float[np.ndarray, " sample"]:
    """Scores of every fold's rows, each at its sample."""
    rows, real = _padded(parts)
    scores = np.zeros(n)
    scores[rows[real].numpy()] = score(rows)[real].double().numpy()
    return scores
