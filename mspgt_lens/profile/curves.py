"""From moments and readings to curves with intervals, and what each of them guarantees."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from mspgt_lens.estimates import CannotMeasure, Curve
from mspgt_lens.information.channel import site_statistics
from mspgt_lens.information.lens import TokenRelevance
from mspgt_lens.information.readers import Reading
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.signals import Signal
from mspgt_lens.statistics import fold_interval, jackknife_interval, pseudo_values

GUARANTEES = {
    "compression": "Gaussian channel rate of the residual stream: an upper bound on its "
    "information about the input, given its covariance and the noise.",
    "relevance": "Held-out cross-entropy of a unigram model minus that of the ridge lens: usable "
    "information about the next token; may rise with depth.",
    "logit_lens": "Held-out cross-entropy of a unigram model minus that of the raw logit lens.",
    "retained": "Held-out information that a linear-Gaussian reader finds about tokens already "
    "read: usable information, no bound on Shannon's.",
    "predicted": "Held-out information that a linear-Gaussian reader finds about tokens to come: "
    "usable information, no bound on Shannon's.",
    "added": "Held-out information about this scale's future that a linear-Gaussian reader adds to "
    "the futures of the coarser scales: usable information, no bound on Shannon's.",
}

# An encoder is read where tokens are hidden from it.
_ENCODER_GUARANTEES = {
    "relevance": "Held-out cross-entropy of a unigram model minus that of the ridge lens, for "
    "hidden tokens: usable information; may rise with depth.",
    "logit_lens": "Held-out cross-entropy of a unigram model minus that of the raw logit lens, for "
    "hidden tokens.",
    "retained": "Held-out information that a linear-Gaussian reader of a hidden token's place "
    "finds about visible tokens around it: usable information, no bound on Shannon's.",
    "predicted": "Held-out information that a linear-Gaussian reader of a hidden token's place "
    "finds about hidden tokens: usable information, no bound on Shannon's.",
    "added": "Held-out information about this scale's hidden tokens that a linear-Gaussian reader "
    "adds to those of the coarser scales: usable information, no bound on Shannon's.",
}


def guarantee(name: str, masked: bool) -> str:
    """What a curve's number is, and what it bounds."""
    return _ENCODER_GUARANTEES.get(name, GUARANTEES[name]) if masked else GUARANTEES[name]


def site_curves(
    moments: Moments, noise: float, coordinates: Coordinates
) -> tuple[Curve, dict[str, Curve]]:
    """Compression over the sites and every signal over the blocks, with jackknife intervals."""
    folds = range(moments.plan.n_folds)
    n_layers = moments.span.shape[1]
    value = site_statistics(moments, folds, noise, coordinates)
    without = [
        site_statistics(moments, [k for k in folds if k != left], noise, coordinates)
        for left in folds
    ]

    def jackknifed(attribute: str, unit: str, guarantee: str) -> Curve:
        values = getattr(value, attribute)
        left = np.stack([getattr(w, attribute) for w in without])
        low, high = jackknife_interval(values, left)
        pseudo = pseudo_values(values, left)
        return Curve(values, low, high, unit, guarantee, pseudo)

    def averaged(sums: np.ndarray, counts: np.ndarray, unit: str, guarantee: str) -> Curve:
        columns = [
            fold_interval((sums[:, [block]] / counts[:, [block]]), counts[:, block])
            for block in range(sums.shape[1])
        ]
        values, low, high = np.concatenate(columns, axis=1)
        return Curve(values, low, high, unit, guarantee, sums / counts)

    valid = np.repeat(moments.n_valid[:, None], n_layers, axis=1).astype(float)

    def gathered(signal: Signal) -> Curve:
        said = signal.unit, signal.guarantee
        if callable(signal.of):
            index = list(moments.plan.per_row).index(signal.name)
            return averaged(moments.per_row[:, index], valid, *said)
        if signal.of == "update":
            return averaged(moments.update, valid, *said)
        if signal.of in ("span", "entropy"):
            return averaged(getattr(moments, signal.of), _attended(moments), *said)
        return jackknifed(signal.of, *said)

    signals = {signal.name: gathered(signal) for signal in moments.plan.signals}
    return jackknifed("compression", "nats", GUARANTEES["compression"]), signals


def _attended(moments: Moments) -> Float[np.ndarray, "fold block"]:
    """How many queries of each block attend to more than the first key."""
    if not moments.n_attended.all():
        raise CannotMeasure(
            f"block {int(np.argmin(moments.n_attended.min(0)))} attends to nothing but the first "
            "token in at least one fold, so its attention span is undefined; leave "
            "'attention_span' and 'attention_entropy' out of signals="
        )
    return moments.n_attended


def by_scale(reading: Reading, scales: list[str], first: int, guarantee: str) -> dict[str, Curve]:
    """Curves of successive targets from ``first`` on, one per scale."""
    return {
        scale: Curve(
            reading.values[first + i],
            reading.low[first + i],
            reading.high[first + i],
            "nats",
            guarantee,
            reading.by_fold[:, first + i],
        )
        for i, scale in enumerate(scales)
    }


def token_curve(relevance: TokenRelevance, guarantee: str) -> Curve:
    """A lens's relevance as a curve."""
    return Curve(
        relevance.values,
        relevance.low,
        relevance.high,
        "nats",
        guarantee,
        relevance.by_fold,
    )


def small_sample_warnings(
    retained: Mapping[str, Curve], predicted: Mapping[str, Curve]
) -> list[str]:
    """What the sample is too small to tell from 0."""
    notes = []
    for name, curves in (("retained", retained), ("predicted", predicted)):
        for scale, curve in curves.items():
            if (curve.low <= 0).all():
                best = int(np.argmax(curve.values))
                notes.append(
                    f"{name} information at scale {scale!r} cannot be told from 0 at any site "
                    f"(at most {curve.values[best]:.3g} nats, 95% interval "
                    f"{curve.low[best]:.3g} to {curve.high[best]:.3g}, at site {best}); "
                    "if there is any, more groups of text are needed to see it"
                )
    return notes
