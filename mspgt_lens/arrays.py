"""The same mathematics on arrays of your own: activations, covariances, tables of signals."""

from mspgt_lens.estimators.interface import mutual_information
from mspgt_lens.hvib.probe import fit_hvib_arrays
from mspgt_lens.information.bottleneck import bottleneck_frontier
from mspgt_lens.information.channel import channel_rate
from mspgt_lens.scales.detection import boundary_signals
from mspgt_lens.scales.segments import segment_blocks

__all__ = [
    "bottleneck_frontier",
    "boundary_signals",
    "channel_rate",
    "fit_hvib_arrays",
    "mutual_information",
    "segment_blocks",
]
