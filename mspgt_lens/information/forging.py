"""How much of a Gaussian reading its target may owe to not being Gaussian."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.information.site_reader import Predictions
from mspgt_lens.information.tilting import (
    AmongDraws,
    Tilt,
    best_temperature,
    channel,
    mean_gain,
)
from mspgt_lens.moments import Sample


def forged(told: Predictions, sample: Sample, target: int) -> float:
    """How far a Gaussian reading lies above one that knows how its target is distributed.

    The Gaussian log-likelihood ratio counts how badly a Gaussian describes the target. A reader
    that tilts the target's own distribution (:class:`~mspgt_lens.information.tilting.Tilt`), known
    by the sampled draws of other folds, does not: it bounds Shannon's information from below
    whatever the target is like, and says as much as the Gaussian one of a Gaussian target.

    Args:
        told: What one site's readers predict at the sampled positions.
        sample: The sampled positions.
        target: Which target.

    Returns:
        Mean difference over the sampled positions at which targets are defined (nats), at least 0.
    """
    n_features = told.left[0].n_features
    columns = slice(target * n_features, (target + 1) * n_features)
    targets = torch.from_numpy(sample.targets[:, columns]).to(told.held_out)
    lead = []
    for fold, left in enumerate(told.left):
        center = told.mean[fold, columns]
        reader, null = left.covariances(target)
        tilt, about = channel(reader, null), targets - center
        inner = []
        for neighbor, position, predicted in told.inner[fold]:
            known = sample.read[position]
            drawn = about[sample.read & ~np.isin(sample.fold, (fold, neighbor))]
            shown = predicted[known][:, columns] - center
            inner.append(_asked(tilt, shown, about[position[known]], drawn))
        temperature, _ = best_temperature(partial(mean_gain, [p for p in inner if len(p.own)]))
        mine = np.flatnonzero(sample.read & (sample.fold == fold))
        shown = told.held_out[mine][:, columns] - center
        drawn = about[sample.read & (sample.fold != fold)]
        asked = _asked(tilt, shown, about[mine], drawn)
        # The rest of log N(y; W z, S) - log N(y; 0, S_0), which does not depend on y.
        rest = ((shown @ tilt.precision) * shown).sum(dim=1) + reader.logdet() - null.logdet()
        lead.append(asked.own - rest / 2 - asked.gain(temperature))
    return max(0.0, float(torch.cat(lead).mean()))


def _asked(
    tilt: Tilt,
    predicted: Float[Tensor, "position feature"],
    targets: Float[Tensor, "position feature"],
    drawn: Float[Tensor, "draw feature"],
) -> AmongDraws:
    return AmongDraws(tilt.own_scores(predicted, targets), tilt.scores(predicted, drawn))
