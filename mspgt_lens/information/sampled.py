"""All that is read at the sampled positions: single tokens, and what Gaussian readings forge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.information.channel import pooled_scale
from mspgt_lens.information.forging import forged
from mspgt_lens.information.lens import TokenRelevance
from mspgt_lens.information.site_reader import Predictions, SampledRows
from mspgt_lens.information.tokens import TokenReader, TokenReading
from mspgt_lens.models import ModelAdapter
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.targets import single_targets


class SampledReadings:
    """Takes in what readers predict at the sampled positions, site by site.

    Args:
        moments: The sums, with their sample.
        adapter: The model.
        coordinates: The reader's coordinates.
        relevance: The ridge lens at the first positions of the sample.

    Attributes:
        forged: How much each target's Gaussian reading may owe to the target not being Gaussian
            (nats), shape ``[target, site]``; 0 for targets of one token, which have no such one.
    """

    def __init__(
        self,
        moments: Moments,
        adapter: ModelAdapter,
        coordinates: Coordinates,
        relevance: TokenRelevance,
    ) -> None:
        if not moments.sample.read.any():
            raise CannotMeasure(
                f"none of {len(moments.sample.read)} sampled positions has half of every band "
                "before and after it: use longer prompts, or bands= with smaller offsets"
            )
        self._moments, self._coordinates = moments, coordinates
        self._rows, self._device = torch.stack(moments.sample.rows), moments.zz_read.device
        self._tokens = TokenReader(moments, adapter, relevance)
        n_targets = 2 * len(moments.plan.bands)
        single = single_targets(moments.plan.bands)
        self._several = [t for t in range(n_targets) if t not in single]
        self.forged = np.zeros((n_targets, moments.z_read.shape[1]))

    def rows(self, site: int) -> SampledRows:
        """The sampled positions of a site, in the reader's coordinates."""
        reference = self._moments.reference
        assert reference is not None
        scale = pooled_scale(self._moments, site, self._coordinates)
        z = reference.apply(site, self._rows[:, site].to(self._device)).to(scale) / scale
        return SampledRows(z, self._moments.sample.fold)

    def read(self, site: int, told: Predictions) -> dict[str, np.ndarray]:
        """What is seen in what the readers of one site predict."""
        owed = [forged(told, self._moments.sample, target) for target in self._several]
        return {"forged": np.array(owed), **self._tokens.read(site, told)}

    def keep(self, site: int, seen: Mapping[str, np.ndarray]) -> None:
        """Take in what was seen of one site, perhaps by another process."""
        self.forged[self._several, site] = seen["forged"]
        self._tokens.keep(site, seen)

    def tokens(self) -> dict[int, TokenReading]:
        """Readings of the targets that are one token, once every site was read."""
        return self._tokens.readings()
