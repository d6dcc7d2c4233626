"""Mutual information by linear readers: Gaussian for numbers, logistic for labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from scipy import optimize, special, stats

from mspgt_lens.estimates import Estimate
from mspgt_lens.estimators.samples import N_FOLDS, Samples, normal_scores, score_interval
from mspgt_lens.information.readers import RIDGE_GRID
from mspgt_lens.information.ridge import FoldSums

# Below so many training samples per column, the correction for optimism is no longer exact.
SAMPLES_PER_COLUMN = 3
LOGISTIC_GRID = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
GAUSSIAN_DRAWS = 100

GAUSSIAN = (
    "best linear-Gaussian reader of z against the best Gaussian for y: equals the mutual "
    "information for jointly Gaussian data, a lower bound where y is Gaussian; the lower end "
    "gives back what y's columns lack of being Gaussian"
)
COPULA = (
    "best linear-Gaussian reader between the columns' normal scores: equals the mutual "
    "information under a Gaussian copula, a lower bound for one-dimensional y of any "
    "distribution; with more columns, where their scores are jointly Gaussian"
)
LOGISTIC = "held-out linear logistic reader against class frequencies: a lower bound in expectation"


def gaussian(samples: Samples) -> Estimate:
    """Linear-Gaussian reader of numbers, or linear logistic reader of labels, cross-fitted.

    Of numbers: ``E[log N(y; W z + b, S) - log N(y; m, S_0)]`` of the best reader, which is
    ``-1/2 sum log(1 - rho_i^2)`` over the canonical correlations. Training scores are too high and
    held-out scores too low by amounts that their gap tells; the value is the training score less
    its optimism. With fewer than three training samples per column it is the held-out score of a
    ridge reader, which is too low rather than too high, and a warning says so.

    For y that is not Gaussian the reader may find more than there is: the best Gaussian for y is
    itself wrong, by y's negentropy. What of it shows in y's principal directions is taken from the
    lower end.
    """
    if samples.labels is not None:
        return _logistic(samples)
    assert samples.y is not None
    check_width(samples)
    scores, corrected = _linear_scores(samples.z, samples.y, samples.fold)
    held_out, reach = score_interval(scores, samples.groups)
    value = held_out if corrected is None else corrected
    lacking = negentropy(samples.y, samples.seed)
    warnings = []
    if corrected is None:
        warnings.append(
            f"{len(samples)} samples of {samples.width} columns are too few to correct the "
            "held-out score, which is too low: the information may lie above the interval"
        )
    if lacking > 0:
        warnings.append(
            f"y is not Gaussian (negentropy at least {lacking:.2g} nats), so the reader's "
            "information is no bound on Shannon's; the lower end allows for it"
        )
    return Estimate(
        value=value,
        low=value - reach - lacking,
        high=max(value + reach, 0.0),
        unit="nats",
        guarantee=GAUSSIAN,
        warnings=tuple(warnings),
    )


def copula(samples: Samples) -> Estimate:
    """As :func:`gaussian`, between normal scores: each column mapped to a normal by its ranks.

    Information does not change under monotone maps of single columns, so heavy tails, units and
    monotone distortions drop out (Ince et al. 2017).
    """
    if samples.y is None:
        raise ValueError(
            "estimator='copula' needs a continuous y, got labels; use 'gaussian' (linear logistic "
            "reader), 'vib' or 'ksg'"
        )
    scored = replace(samples, z=normal_scores(samples.z), y=normal_scores(samples.y))
    return replace(gaussian(scored), guarantee=COPULA)


def _linear_scores(
    z: Float[np.ndarray, "sample d_z"],
    y: Float[np.ndarray, "sample d_y"],
    fold: np.ndarray,
) -> tuple[Float[np.ndarray, " sample"], float | None]:
    """Held-out log-likelihood ratio of each sample, and the corrected mean where there is one."""
    sums = _fold_sums(z, y, fold)
    n_train = int(sums.count.sum() - sums.count.max())
    width = y.shape[1]
    plain = n_train >= SAMPLES_PER_COLUMN * (z.shape[1] + width)
    scores, training = np.zeros(len(z)), 0.0
    for k in range(N_FOLDS):
        test = fold == k
        strength = RIDGE_GRID[0]
        if not plain:
            strength, spread = _inner_choice(sums, z, y, fold, k)
        left = _left(sums, [k], strength, z, y)
        left_null = y - y[~test].mean(axis=0)
        null = _covariance(left_null[~test])
        if plain:
            spread = _covariance(left[~test])
        scores[test] = _log_normal(left[test], spread) - _log_normal(left_null[test], null)
        if plain:
            training += test.mean() * (_log_det(null) - _log_det(spread)) / 2
    if not plain:
        return scores, None
    # Over all folds together: the gap of one is mostly the luck of its samples.
    return scores, float(training - _optimism(float(training - scores.mean()), z.shape[1], width))


def _optimism(gap: float, d_z: int, d_y: int) -> float:
    """How far a training score is above the truth, given how far it is above the held-out one.

    Both follow from the number of samples for independent Gaussian ones (moments of Wishart
    matrices and of their inverses and log-determinants). The gap tells the number that the samples
    are worth, which is smaller where those of a group are alike; the number tells the optimism.
    """

    def expected(n: float) -> float:
        free = n - d_z - 2
        return d_y * (n + 1) / 2 * ((n - 2) / (free * (free - d_y)) - 1 / (n - d_y - 2))

    fewest, most = d_z + d_y + 2 + 1e-6, 1e9
    if gap <= expected(most):
        # Luck alone; with ever more samples the optimism becomes half the gap.
        return gap / 2
    worth = optimize.brentq(lambda n: expected(n) - gap, fewest, most)
    lost = np.arange(d_y)
    difference = special.digamma((worth - 1 - lost) / 2) - special.digamma(
        (worth - 1 - d_z - lost) / 2
    )
    return float(difference.sum() / 2)


def check_width(samples: Samples) -> None:
    """Raise ``ValueError`` where y has more columns than a fold has samples."""
    size = int(np.bincount(samples.fold).min())
    if samples.y is not None and size <= samples.y.shape[1]:
        raise ValueError(
            f"y has {samples.y.shape[1]} columns, more than a fold of {size} samples can tell the "
            "covariance of; project y on fewer principal directions"
        )


def _fold_sums(z: np.ndarray, y: np.ndarray, fold: np.ndarray) -> FoldSums:
    parts = [(z[fold == k], y[fold == k]) for k in range(N_FOLDS)]
    return FoldSums(
        np.array([len(a) for a, _ in parts], dtype=float),
        torch.from_numpy(np.stack([a.sum(0) for a, _ in parts])),
        torch.from_numpy(np.stack([a.T @ a for a, _ in parts])),
        torch.from_numpy(np.stack([b.sum(0) for _, b in parts])),
        torch.from_numpy(np.stack([a.T @ b for a, b in parts])),
    )


def _left(
    sums: FoldSums, left_out: list[int], strength: float, z: np.ndarray, y: np.ndarray
) -> Float[np.ndarray, "sample d_y"]:
    """What a reader fitted without these folds leaves of every sample; infinity is the null."""
    fit = sums.fit(left_out)
    null: np.ndarray = y - fit.mean_t.numpy()
    if np.isinf(strength):
        return null
    left: np.ndarray = null - (z - fit.mean_z.numpy()) @ fit.weights(strength).numpy()
    return left


def _inner_choice(
    sums: FoldSums, z: np.ndarray, y: np.ndarray, fold: np.ndarray, outer: int
) -> tuple[float, Float[np.ndarray, "d_y d_y"]]:
    """The strength with the least error on inner folds, and the covariance of that error."""
    best: tuple[float, float, np.ndarray] | None = None
    inner = [j for j in range(N_FOLDS) if j != outer]
    rows = [fold == j for j in inner]
    for strength in RIDGE_GRID:
        left = [
            _left(sums, [outer, j], strength, z[at], y[at])
            for j, at in zip(inner, rows, strict=True)
        ]
        errors = np.concatenate(left)
        spread = errors.T @ errors / len(errors)
        cost = _log_det(spread)
        if best is None or cost < best[0]:
            best = cost, strength, spread
    assert best is not None
    return best[1], best[2]


def _covariance(rows: Float[np.ndarray, "sample d"]) -> Float[np.ndarray, "d d"]:
    centered = rows - rows.mean(axis=0)
    covariance: np.ndarray = centered.T @ centered / len(rows)
    return covariance


def _log_det(matrix: Float[np.ndarray, "d d"]) -> float:
    return float(np.linalg.slogdet(matrix)[1])


def _log_normal(
    rows: Float[np.ndarray, "sample d"], covariance: Float[np.ndarray, "d d"]
) -> Float[np.ndarray, " sample"]:
    """Log density of a normal of zero mean, without its constant."""
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, rows.T)
    density: np.ndarray = -0.5 * (white**2).sum(axis=0) - np.log(root.diagonal()).sum()
    return density


def negentropy(y: Float[np.ndarray, "sample d_y"], seed: int) -> float:
    """What y's principal directions visibly lack of being Gaussian, summed (nats).

    ``1/2 log(2 pi e var) - h`` of each direction by spacings (scipy's differential entropy), less
    its mean on Gaussian samples of the same size; 0 for directions within the range that such
    samples show.
    """
    n = len(y)
    left = np.linalg.svd(y - y.mean(axis=0), full_matrices=False)[0]
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((n, GAUSSIAN_DRAWS))
    null = _lack(drawn / drawn.std(axis=0))
    excess = _lack(left * np.sqrt(n)) - null.mean()
    # Four standard errors, so that one in thousands of Gaussian directions is called otherwise.
    return float(excess[excess > 4 * null.std()].sum())


def _lack(columns: Float[np.ndarray, "sample d"]) -> Float[np.ndarray, " d"]:
    entropy = stats.differential_entropy(columns, axis=0)
    lack: np.ndarray = 0.5 * np.log(2 * np.pi * np.e) - entropy
    return lack


def _logistic(samples: Samples) -> Estimate:
    assert samples.labels is not None
    labels, fold = samples.labels, samples.fold
    frequency = np.bincount(labels) / len(labels)
    scores = np.zeros(len(labels))
    for k in range(N_FOLDS):
        test, inner = fold == k, fold == (k + 1) % N_FOLDS
        path = _logistic_path(samples, ~test & ~inner, LOGISTIC_GRID)
        held_out = [_log_likelihood(w, samples.z[inner], labels[inner]).mean() for w in path]
        chosen = LOGISTIC_GRID[: int(np.argmax(held_out)) + 1]
        weights = _logistic_path(samples, ~test, chosen)[-1]
        scores[test] = _log_likelihood(weights, samples.z[test], labels[test])
    value, reach = score_interval(scores - np.log(frequency[labels]), samples.groups)
    return Estimate(value, value - reach, max(value + reach, 0.0), "nats", LOGISTIC)


def _logistic_path(
    samples: Samples, rows: np.ndarray, strengths: tuple[float, ...]
) -> list[Float[np.ndarray, "width label"]]:
    """Weights and intercept at each penalty on squared weights, each started from the last."""
    assert samples.labels is not None
    z, labels = samples.z[rows], samples.labels[rows]
    shape = z.shape[1] + 1, int(samples.labels.max()) + 1
    weights = np.zeros(shape)
    # A label that these rows lack is not impossible.
    weights[-1] = np.log(np.bincount(labels, minlength=shape[1]) + 0.5)
    path = []
    for strength in strengths:

        def loss(flat: np.ndarray, strength: float = strength) -> tuple[float, np.ndarray]:
            w = flat.reshape(shape)
            logits = z @ w[:-1] + w[-1]
            log_q = special.log_softmax(logits, axis=1)
            error = np.exp(log_q)
            error[np.arange(len(z)), labels] -= 1
            slope = np.vstack([z.T @ error / len(z) + strength * w[:-1], error.mean(axis=0)])
            cost = -log_q[np.arange(len(z)), labels].mean() + strength / 2 * (w[:-1] ** 2).sum()
            return cost, slope.ravel()

        options = {"maxiter": 200}
        found = optimize.minimize(
            loss, weights.ravel(), jac=True, method="L-BFGS-B", options=options
        )
        weights = found.x.reshape(shape)
        path.append(weights)
    return path


def _log_likelihood(
    weights: Float[np.ndarray, "width label"],
    z: Float[np.ndarray, "sample d_z"],
    labels: np.ndarray,
) -> Float[np.ndarray, " sample"]:
    log_q = special.log_softmax(z @ weights[:-1] + weights[-1], axis=1)
    likelihood: np.ndarray = log_q[np.arange(len(z)), labels]
    return likelihood
