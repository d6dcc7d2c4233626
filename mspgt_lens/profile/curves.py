"""From moments and readings to curves with intervals, and what each of them guarantees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mspgt_lens.estimates import CannotMeasure, Curve
from mspgt_lens.information.channel import site_statistics
from mspgt_lens.information.lens import TokenRelevance
from mspgt_lens.information.readers import Reading, TargetReadings
from mspgt_lens.information.tokens import TokenReading
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.processes import Processes
from mspgt_lens.signals import Signal
from mspgt_lens.statistics import fold_interval, jackknife_interval, pseudo_values

_GAUSSIAN = (
    "Held-out log-likelihood ratio that a linear-Gaussian reader finds about {}: usable "
    "information, no bound on Shannon's; the lower end gives back what their distribution, which "
    "is not Gaussian, can forge."
)
_TOKEN = (
    "Held-out log-likelihood gain over a unigram model of a reader of {}: usable information "
    "(Xu et al. 2020), at most the unigram model's cross-entropy; on average at most Shannon's and "
    "that model's excess over the tokens' entropy."
)
GUARANTEES = {
    "compression": "Gaussian channel rate of the residual stream: an upper bound on its "
    "information about the input, given its covariance and the noise.",
    "relevance": "Held-out cross-entropy of a unigram model minus that of the ridge lens: usable "
    "information about the next token; may rise with depth.",
    "logit_lens": "Held-out cross-entropy of a unigram model minus that of the raw logit lens.",
    "retained": _GAUSSIAN.format("the mean features of tokens already read"),
    "predicted": _GAUSSIAN.format("the mean features of tokens to come"),
    "added": _GAUSSIAN.format(
        "the mean features of this scale's future beyond those of the coarser scales"
    ),
    "retained token": _TOKEN.format("a token already read"),
    "predicted token": _TOKEN.format("a token to come"),
}

# An encoder is read where tokens are hidden from it.
_ENCODER_GUARANTEES = {
    "relevance": "Held-out cross-entropy of a unigram model minus that of the ridge lens, for "
    "hidden tokens: usable information; may rise with depth.",
    "logit_lens": "Held-out cross-entropy of a unigram model minus that of the raw logit lens, for "
    "hidden tokens.",
    "retained": _GAUSSIAN.format("the mean features of visible tokens around a hidden one"),
    "predicted": _GAUSSIAN.format("the mean features of hidden tokens around a hidden one"),
    "added": _GAUSSIAN.format(
        "the mean features of this scale's hidden tokens beyond those of the coarser scales"
    ),
    "retained token": _TOKEN.format("a visible token near a hidden one"),
    "predicted token": _TOKEN.format("a hidden token"),
}


def guarantee(name: str, masked: bool) -> str:
    """What a curve's number is, and what it bounds."""
    return _ENCODER_GUARANTEES.get(name, GUARANTEES[name]) if masked else GUARANTEES[name]


def site_curves(
    moments: Moments,
    noise: float,
    coordinates: Coordinates,
    sampled: Mapping[str, Callable[[str, str], Curve]],
    processes: Processes,
) -> tuple[Curve, dict[str, Curve]]:
    """Compression over the sites, and every signal over its blocks or sites.

    Args:
        moments: What was gathered.
        noise: Of the channel.
        coordinates: Of the channel.
        sampled: What sampled positions give: a signal's curve by what it is ``of``, given its unit
            and its guarantee.
        processes: Those that share the work.
    """
    folds = range(moments.plan.n_folds)
    n_layers = moments.span.shape[1]

    def statistics(left_out: int) -> dict[str, np.ndarray]:
        kept = [k for k in folds if k != left_out]
        return vars(site_statistics(moments, kept, noise, coordinates))

    # The last leaves out none.
    *without, value = processes.each(len(folds) + 1, statistics)

    def jackknifed(attribute: str, unit: str, guarantee: str) -> Curve:
        values = value[attribute]
        left = np.stack([one[attribute] for one in without])
        low, high = jackknife_interval(values, left)
        pseudo = pseudo_values(values, left)
        return Curve(values, low, high, unit, guarantee, pseudo)

    def averaged(sums: np.ndarray, counts: np.ndarray, unit: str, guarantee: str) -> Curve:
        columns = [
            fold_interval((sums[:, [depth]] / counts[:, [depth]]), counts[:, depth])
            for depth in range(sums.shape[1])
        ]
        values, low, high = np.concatenate(columns, axis=1)
        return Curve(values, low, high, unit, guarantee, sums / counts)

    def everywhere(counts: np.ndarray, n_places: int) -> np.ndarray:
        return np.repeat(counts[:, None], n_places, axis=1).astype(float)

    def gathered(signal: Signal) -> Curve:
        said = signal.unit, signal.guarantee
        if callable(signal.of):
            index = list(moments.plan.per_row).index(signal.name)
            sums = moments.per_row[:, index, : n_layers + (signal.place == "site")]
            counts = moments.n_whole if signal.whole else moments.n_valid
            return averaged(sums, everywhere(counts, sums.shape[1]), *said)
        if signal.of in sampled:
            return sampled[signal.of](*said)
        if signal.of == "update":
            return averaged(moments.update, everywhere(moments.n_valid, n_layers), *said)
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


def target_curves(
    reading: TargetReadings,
    tokens: Mapping[int, TokenReading],
    forged: Float[np.ndarray, "target site"],
    scales: Sequence[str],
    said: Callable[[str], str],
) -> dict[str, dict[str, Curve]]:
    """Retained, predicted and added information by scale.

    A band of one token is read in tokens. The lower end of a Gaussian reading gives back what its
    target's distribution can forge.

    Args:
        reading: By linear-Gaussian readers.
        tokens: Of targets that are one token.
        forged: What each Gaussian reading may owe to its target's distribution (nats).
        scales: Names of the bands.
        said: What a quantity guarantees.
    """

    def gaussian(read: Reading, part: int, target: int, quantity: str) -> Curve:
        low = read.low[part] - forged[target]
        values, high = read.values[part], read.high[part]
        return Curve(values, low, high, "nats", said(quantity), read.by_fold[:, part])

    curves: dict[str, dict[str, Curve]] = {}
    for side, quantity in enumerate(("retained", "predicted")):
        curves[quantity] = {}
        for index, scale in enumerate(scales):
            target = side * len(scales) + index
            curves[quantity][scale] = (
                token_curve(tokens[target], said(f"{quantity} token"))
                if target in tokens
                else gaussian(reading.targets, reading.scored.index(target), target, quantity)
            )
    curves["added"] = {
        scales[band]: gaussian(reading.added, part, len(scales) + band, "added")
        for part, band in enumerate(reading.added_bands)
    }
    return curves


def token_curve(reading: TokenRelevance | TokenReading, guarantee: str) -> Curve:
    """What is read in tokens as a curve."""
    return Curve(reading.values, reading.low, reading.high, "nats", guarantee, reading.by_fold)


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
