"""Gaussian data with known information, and their moments gathered the plain way."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from mspgt_lens.information.channel import channel_rate

N_FOLDS = 5


def moments_of(sites: list[np.ndarray], targets: np.ndarray, fold: np.ndarray) -> SimpleNamespace:
    """The sums that a pass would gather: one band, so two targets side by side in ``targets``."""
    n_sites, width = len(sites), sites[0].shape[1]
    columns = targets.shape[1]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(N_FOLDS, *shape, dtype=torch.float64)

    moments = SimpleNamespace(
        plan=SimpleNamespace(
            bands={"one": (1, 1)}, features=torch.zeros(1, columns // 2), n_folds=N_FOLDS
        ),
        n_read=np.bincount(fold, minlength=N_FOLDS),
        n_rest=np.zeros(N_FOLDS, dtype=int),
        n_valid=np.bincount(fold, minlength=N_FOLDS),
        z_read=zeros(n_sites, width),
        zz_read=zeros(n_sites, width, width),
        z_rest=zeros(n_sites, width),
        zz_rest=zeros(n_sites, width, width),
        zy=zeros(n_sites, width, columns),
        y=zeros(columns),
        yy=zeros(columns, columns),
        z_next=zeros(n_sites - 1, width, width),
    )
    y = torch.from_numpy(targets)
    z = [torch.from_numpy(site) for site in sites]
    for k in range(N_FOLDS):
        rows = torch.from_numpy(np.flatnonzero(fold == k))
        moments.y[k], moments.yy[k] = y[rows].sum(0), y[rows].T @ y[rows]
        for s in range(n_sites):
            moments.z_read[k, s] = z[s][rows].sum(0)
            moments.zz_read[k, s] = z[s][rows].T @ z[s][rows]
            moments.zy[k, s] = z[s][rows].T @ y[rows]
            if s:
                moments.z_next[k, s - 1] = z[s - 1][rows].T @ z[s][rows]
    return moments


def draw(
    rng: np.random.Generator,
    n: int,
    width: int,
    n_features: int,
    power: float,
    group_size: int = 1,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two sites and two targets, jointly Gaussian; positions of a group may resemble each other.

    Returns:
        ``(sites, targets, fold, information [target, site], rate [site])``: data and their truths.
    """

    def normal(d: int) -> np.ndarray:
        if group_size == 1:
            return rng.standard_normal((n, d))
        shared = np.repeat(rng.standard_normal((n // group_size, d)), group_size, axis=0)
        return (shared + rng.standard_normal((n, d))) / np.sqrt(2)

    mixing = rng.standard_normal((width, width)) / np.sqrt(width) + np.eye(width)
    source = normal(width)
    first = source @ mixing
    second = first + normal(width)
    loading = rng.standard_normal((width, 2 * n_features)) * np.sqrt(power / width)
    targets = source @ loading + normal(2 * n_features)

    covariances = [mixing.T @ mixing, mixing.T @ mixing + np.eye(width)]
    cross = mixing.T @ loading
    total = loading.T @ loading + np.eye(2 * n_features)
    information = np.zeros((2, 2))
    for s, covariance in enumerate(covariances):
        left = total - cross.T @ np.linalg.solve(covariance, cross)
        for t in range(2):
            block = slice(t * n_features, (t + 1) * n_features)
            information[t, s] = 0.5 * (
                np.linalg.slogdet(total[block, block])[1] - np.linalg.slogdet(left[block, block])[1]
            )
    rate = []
    for covariance in covariances:
        deviation = np.sqrt(np.diag(covariance))
        rate.append(channel_rate(covariance / np.outer(deviation, deviation), 0.1))
    fold = (np.arange(n) // group_size) % N_FOLDS
    return [first, second], targets, fold, information, np.array(rate)
