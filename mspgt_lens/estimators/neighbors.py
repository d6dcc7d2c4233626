"""Mutual information from distances to nearest neighbors."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer
from scipy.spatial import cKDTree
from scipy.special import digamma

from mspgt_lens.estimates import Estimate
from mspgt_lens.estimators.samples import Samples, normal_scores
from mspgt_lens.statistics import fold_interval, pseudo_values

N_NEIGHBORS = 4
MAX_WIDTH = 8
MAX_REPEATED = 0.01
N_PARTS = 10
_LEAST_PER_LABEL = 4 * N_NEIGHBORS

KSG = (
    "k-nearest-neighbor estimate (k = 4) of Shannon's mutual information: consistent, no bound; "
    "too low where the information is high for the sample or the columns are many"
)


def ksg(samples: Samples) -> Estimate:
    """Kraskov, Stoegbauer and Grassberger's first estimator (2004), for labels Ross's (2014).

    On normal scores of every column, which leaves the information as it is and makes distances
    comparable. Neighbors are sought in other groups only, since those of the same group would
    pass for dependence; where groups are tight clumps it then reads too low, even below 0. It
    cannot exceed ``digamma(n) - digamma(k)``, and is too low long before where dimensions are many
    (Gao et al. 2015).

    The interval is a jackknife over tenths of the groups, on the wide side; the spread of the
    samples' own shares would be too narrow, since neighbors share their neighborhoods. It also
    reaches to what the change from half the samples to all of them points to, if the error falls
    as ``1 / sqrt(n)``.

    scikit-learn's estimator reads one column at a time, and infomeasure is under the AGPL; this
    one is a few lines on scipy's k-d tree.
    """
    _check(samples)
    z = normal_scores(samples.z)
    y = samples.labels if samples.y is None else normal_scores(samples.y)
    assert y is not None
    value = float(_local(z, y, samples.groups).mean())
    parts = _parts(samples, N_PARTS)
    without = [_local(z[~at], y[~at], samples.groups[~at]).mean() for at in parts]
    pseudo = pseudo_values(np.array([value]), np.array(without)[:, None])
    _, low, high = fold_interval(pseudo, np.ones(N_PARTS))
    reach = float(high[0] - low[0]) / 2
    of_half = [_local(z[at], y[at], samples.groups[at]).mean() for at in _parts(samples, 2)]
    to_come = float((value - np.mean(of_half)) / (np.sqrt(2) - 1))
    warnings = []
    ceiling = float(digamma(len(z)) - digamma(N_NEIGHBORS))
    if value > ceiling - 1:
        warnings.append(
            f"the estimate is within 1 nat of its ceiling of {ceiling:.2f} nats for {len(z)} "
            "samples; the information may be far above"
        )
    elif abs(to_come) > 2 * reach:
        warnings.append(
            f"the estimate still changes with the number of samples (by {to_come:+.2g} nats to "
            "come, if its error falls as 1 / sqrt(n)); the interval reaches that far"
        )
    return Estimate(
        value=value,
        low=value - reach + min(to_come, 0.0),
        high=value + reach + max(to_come, 0.0),
        unit="nats",
        guarantee=KSG,
        warnings=tuple(warnings),
    )


def _check(samples: Samples) -> None:
    if samples.width > MAX_WIDTH:
        raise ValueError(
            f"estimator='ksg' takes at most {MAX_WIDTH} columns of z and y together, got "
            f"{samples.width}: neighbors are too far in more; project on a few principal "
            "directions, or use 'gaussian', 'vib' or 'infonce'"
        )
    if samples.labels is not None and np.bincount(samples.labels).min() < _LEAST_PER_LABEL:
        raise ValueError(
            f"estimator='ksg' needs at least {_LEAST_PER_LABEL} samples of every label, got "
            f"{np.bincount(samples.labels).min()}; merge or leave out rare labels, or use 'vib'"
        )
    for name, rows in (("z", samples.z), ("y", samples.y)):
        if rows is None:
            continue
        repeated = 1 - len(np.unique(rows, axis=0)) / len(rows)
        if repeated > MAX_REPEATED:
            raise ValueError(
                f"estimator='ksg' needs continuous data, but {repeated:.0%} of the rows of {name} "
                "repeat others; drop copies, add noise of the size of the rounding, or use 'vib'"
            )


def _parts(samples: Samples, count: int) -> list[np.ndarray]:
    """Disjoint parts of the groups, each with a like share of every label, as masks."""
    n_groups = int(samples.groups.max()) + 1
    order = np.random.default_rng(samples.seed).permutation(n_groups)
    if samples.labels is not None:
        label = np.zeros(n_groups)
        label[samples.groups] = samples.labels
        order = order[np.argsort(label[order], kind="stable")]
    part = np.empty(n_groups, dtype=int)
    part[order] = np.arange(n_groups) % count
    return [part[samples.groups] == p for p in range(count)]


def _local(
    z: Float[np.ndarray, "sample d_z"],
    y: np.ndarray,
    groups: Integer[np.ndarray, " sample"],
) -> Float[np.ndarray, " sample"]:
    """Each sample's share of the estimate; their mean is the estimate."""
    _, group = np.unique(groups, return_inverse=True)
    others = len(z) - np.bincount(group)[group]
    if y.ndim == 2:
        radius = _radius(np.hstack([z, y]), group)
        shared = digamma(_count_within(y, radius, group) + 1)
    else:
        radius, alike = np.zeros(len(z)), np.zeros(len(z))
        for label in np.unique(y):
            at = np.flatnonzero(y == label)
            radius[at] = _radius(z[at], group[at])
            own = np.unique(group[at], return_inverse=True)[1]
            alike[at] = len(at) - np.bincount(own)[own]
        shared = digamma(alike + 1)
    inside = digamma(_count_within(z, radius, group) + 1)
    local: np.ndarray = digamma(N_NEIGHBORS) + digamma(others + 1) - inside - shared
    return local


def _radius(
    points: Float[np.ndarray, "sample d"], group: Integer[np.ndarray, " sample"]
) -> Float[np.ndarray, " sample"]:
    """Just below the distance (largest coordinate) to the k-th neighbor of other groups."""
    _, own, sizes = np.unique(group, return_inverse=True, return_counts=True)
    wanted = N_NEIGHBORS + int(sizes.max())
    if len(points) - int(sizes.max()) < N_NEIGHBORS:
        raise ValueError(
            f"estimator='ksg' needs {N_NEIGHBORS} neighbors in other groups for every sample"
            f"{'' if len(sizes) > 1 else ' and label'}; one group holds {sizes.max()} of "
            f"{len(points)} samples; use smaller groups, or 'vib'"
        )
    distance, neighbor = cKDTree(points).query(points, k=wanted, p=np.inf)
    distance = np.where(own[neighbor] == own[:, None], np.inf, distance)
    kth = np.partition(distance, N_NEIGHBORS - 1, axis=1)[:, N_NEIGHBORS - 1]
    below: np.ndarray = np.nextafter(kth, 0)
    return below


def _count_within(
    points: Float[np.ndarray, "sample d"],
    radius: Float[np.ndarray, " sample"],
    group: Integer[np.ndarray, " sample"],
) -> Integer[np.ndarray, " sample"]:
    """How many samples of other groups lie within each sample's radius."""
    tree = cKDTree(points)
    count = np.asarray(tree.query_ball_point(points, radius, p=np.inf, return_length=True))
    order = np.argsort(group, kind="stable")
    for at in np.split(order, np.cumsum(np.bincount(group))[:-1]):
        if len(at) == 1:
            count[at] -= 1
            continue
        apart = np.abs(points[at, None] - points[None, at]).max(axis=-1)
        count[at] -= (apart <= radius[at, None]).sum(axis=1)
    return count
