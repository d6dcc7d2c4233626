"""One interface to all estimators of mutual information."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.estimates import Estimate
from mspgt_lens.estimators.kernel import renyi
from mspgt_lens.estimators.linear import copula, gaussian
from mspgt_lens.estimators.neighbors import ksg
from mspgt_lens.estimators.neural import infonce, vib
from mspgt_lens.estimators.samples import Samples, as_samples, check_finite_information

ESTIMATORS: MappingProxyType[str, Callable[[Samples], Estimate]] = MappingProxyType(
    {
        "gaussian": gaussian,
        "copula": copula,
        "vib": vib,
        "infonce": infonce,
        "ksg": ksg,
        "renyi": renyi,
    }
)


@in_own_state
def mutual_information(
    z: Any,
    y: Any,
    *,
    groups: Any = None,
    estimator: str | Callable[..., Estimate] = "gaussian",
    seed: int = 0,
    **options: Any,
) -> Estimate:
    """Mutual information between the columns of z and y, per sample.

    ============  =========================================  ====================================
    estimator     what it is                                 what it bounds
    ============  =========================================  ====================================
    ``gaussian``  linear-Gaussian reader (labels: linear     exact for jointly Gaussian data; a
                  logistic reader), closed form              lower bound for Gaussian y or labels
    ``copula``    the same of each column's normal scores    a lower bound for one-dimensional y
    ``vib``       trained decoder, held out                  a lower bound for labels and
                                                             one-dimensional y
    ``infonce``   trained critic, held out                   a lower bound for any data, at most
                                                             log(batch); warns near it
    ``ksg``       nearest neighbors (labels: Ross), at most  none; consistent, too low where the
                  8 columns                                  information is high
    ``renyi``     matrix-based, order 2, at most 20,000      none; not Shannon's, a measure of
                  samples                                    dependence that is 0 without it
    ============  =========================================  ====================================

    Sources: Ince et al. 2017 (``copula``), Barber and Agakov 2003 (``vib``), van den Oord et al.
    2018 (``infonce``), Kraskov et al. 2004 and Ross 2014 (``ksg``), Giraldo et al. 2015
    (``renyi``).

    ``docs/information.md`` shows the error and coverage of each on data of known information. The
    value may be slightly negative: a reader fitted to chance does worse than none. Intervals of
    readers reach up to 0 at least, since the reader that ignores z is one of them.

    Args:
        z: Numbers of shape ``[sample, d_z]`` or ``[sample]``; array or tensor.
        y: Numbers of shape ``[sample, d_y]`` or ``[sample]``, or labels: integers or booleans of
            shape ``[sample]``. Integers that are quantities must be passed as floats.
        groups: One per sample, shape ``[sample]``: samples of one group are not independent of one
            another. Folds, intervals and nulls keep groups whole. Each sample is its own by
            default.
        estimator: One of the names above, or a function of one's own: called as ``(z, y, *,
            groups, seed, **options)``, it returns an ``extending.Estimate`` in nats. Its z
            ``[sample, d_z]`` and y ``[sample, d_y]`` are checked, with columns of zero mean and
            unit variance; labels (y) and groups are whole numbers from 0, ``[sample]``.
        seed: Decides folds, initial weights and batches.
        **options: For a function of one's own.

    Returns:
        The estimate in nats, its 95% interval, guarantee and warnings.

    Raises:
        ValueError: If shapes do not fit, values are not finite, columns are constant or span fewer
            dimensions, samples, groups or a label's samples are too few, the information is
            infinite (y holds an affine function of z), or the estimator cannot do what is asked.

    Warns:
        UserWarning: With each of the result's ``warnings``.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> z = rng.standard_normal((1000, 1))
        >>> print(ml.mutual_information(z, z + rng.standard_normal((1000, 1))))  # 0.3466 in truth
        0.3... nats (0... to 0...)
    """
    if not callable(estimator) and estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator must be one of {', '.join(ESTIMATORS)}, or a function, got {estimator!r}"
        )
    if options and not callable(estimator):
        raise ValueError(
            f"options are for an estimator of one's own; {estimator!r} takes none, got "
            f"{', '.join(options)}"
        )
    samples = as_samples(z, y, groups, seed)
    if callable(estimator):
        result = _estimated(estimator, samples, options)
    else:
        if estimator != "renyi":
            check_finite_information(samples)
        result = ESTIMATORS[estimator](samples)
    if samples.copies:
        note = (
            f"{samples.copies} of {len(samples)} samples repeat one of another group; leave copies "
            "out or put them into one group, else held-out samples are not new"
        )
        result = replace(result, warnings=(*result.warnings, note))
    for note in result.warnings:
        tell(note)
    return result


def _estimated(
    estimator: Callable[..., Estimate], samples: Samples, options: Mapping[str, Any]
) -> Estimate:
    """What a function of somebody's own makes of the samples."""
    y = samples.labels if samples.y is None else samples.y
    result = estimator(samples.z, y, groups=samples.groups, seed=samples.seed, **options)
    if not isinstance(result, Estimate) or result.unit != "nats":
        raise ValueError(f"estimator must return an Estimate in nats, got {result!r}")
    return result
