"""Matrix-based Renyi information, from kernel matrices that are never stored whole."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mspgt_lens.estimates import Estimate
from mspgt_lens.estimators.samples import Samples
from mspgt_lens.statistics import jackknife_interval

MAX_SAMPLES = 20_000
N_BLOCKS = 20

RENYI = (
    "matrix-based Renyi information of order 2 (Gaussian kernels) beyond that of shuffled pairs: "
    "0 for independence, grows with dependence, no estimate of Shannon's information and no bound"
)


def renyi(samples: Samples) -> Estimate:
    """Matrix-based Renyi mutual information of order 2 (Giraldo et al. 2015), above its null.

    With A and B the kernel matrices of z and y, each of unit trace, ``S(A) + S(B) - S(A * B)``,
    ``S(A) = -log tr(A^2)`` and ``A * B`` their entrywise product at unit trace. The order 2 needs
    squared entries alone, no eigenvalues; orders near 1, as Skean et al. (2025) use for entropies,
    need the whole spectrum. Kernels are Gaussian, their variance that of one column times the
    number of columns (half the mean squared distance); labels share a kernel of 1 if equal, else 0.

    Independent samples do not read 0, since every sample is close to itself. So what pairs of
    shuffled groups give on average is subtracted; it follows from the sums, without shuffling.
    The interval is a jackknife over blocks of groups.
    """
    n = len(samples)
    if n > MAX_SAMPLES:
        raise ValueError(
            f"estimator='renyi' compares all pairs of at most {MAX_SAMPLES} samples, got {n}; "
            "pass a random subset of the groups"
        )
    n_blocks = min(N_BLOCKS, int(samples.groups.max()) + 1)
    order = np.random.default_rng(samples.seed).permutation(samples.groups.max() + 1)
    block = (order % n_blocks)[samples.groups]
    sums = _pair_sums(samples, block, n_blocks)
    value = _information(sums.sum(axis=(1, 2)))
    without = [
        _information(np.delete(np.delete(sums, b, axis=1), b, axis=2).sum(axis=(1, 2)))
        for b in range(n_blocks)
    ]
    low, high = jackknife_interval(np.array([value]), np.array(without)[:, None])
    return Estimate(value, float(low[0]), float(high[0]), "nats", RENYI)


def _pair_sums(
    samples: Samples, block: np.ndarray, n_blocks: int
) -> Float[np.ndarray, "sum block block"]:
    """Over pairs of samples from two blocks: kernels squared, summed, and counted.

    Rows: product of both over all pairs; then z's, y's and the count over pairs of different
    groups, and the same over different samples of one group; samples with themselves.
    """
    members = [np.flatnonzero(block == b) for b in range(n_blocks)]
    sums = np.zeros((8, n_blocks, n_blocks))
    for a in range(n_blocks):
        for b in range(a, n_blocks):
            rows, columns = members[a], members[b]
            of_z = _squared_kernel(samples.z[rows], samples.z[columns])
            if samples.y is None:
                assert samples.labels is not None
                of_y = (samples.labels[rows, None] == samples.labels[None, columns]).astype(float)
            else:
                of_y = _squared_kernel(samples.y[rows], samples.y[columns])
            sums[0, a, b] = (of_z * of_y).sum()
            sums[1:4, a, b] = of_z.sum(), of_y.sum(), of_z.size
            if a == b:
                alike = samples.groups[rows, None] == samples.groups[None, rows]
                inside = np.array([of_z[alike].sum(), of_y[alike].sum(), alike.sum()])
                sums[1:4, a, a] -= inside
                sums[4:7, a, a] = inside - len(rows)
                sums[7, a, a] = len(rows)
            sums[:, b, a] = sums[:, a, b]
    return sums


def _squared_kernel(
    rows: Float[np.ndarray, "row d"], columns: Float[np.ndarray, "column d"]
) -> Float[np.ndarray, "row column"]:
    """``exp(-|a - b|^2 / d)``: the square of a Gaussian kernel of variance d."""
    cross = 2 * rows @ columns.T - (rows**2).sum(1)[:, None] - (columns**2).sum(1)[None]
    kernel: np.ndarray = np.exp(np.minimum(cross, 0.0) / rows.shape[1])
    return kernel


def _information(sums: Float[np.ndarray, " sum"]) -> float:
    both, z, y, pairs, z_inside, y_inside, pairs_inside, selves = sums
    shuffled = z * y / pairs + selves
    if pairs_inside:
        shuffled += z_inside * y_inside / pairs_inside
    return float(np.log(both / shuffled))
