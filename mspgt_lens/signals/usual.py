"""The signals that profiles gather where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mspgt_lens.signals.record import Signal

_ALL = (
    Signal(
        name="attention_span",
        unit="tokens",
        guarantee="Expected distance to the attended key, first key excluded and the rest "
        "renormalized, mean over heads and valid queries.",
        title="Attention span",
        sentence="heads attend {value} back on average",
        of="span",
    ),
    Signal(
        name="attention_entropy",
        unit="nats",
        guarantee="Entropy of the attended key, first key excluded and the rest renormalized, mean "
        "over heads and valid queries.",
        title="Attention entropy",
        sentence="attention is spread over {value}",
        of="entropy",
    ),
    Signal(
        name="novelty",
        unit="1 - CKA",
        guarantee="1 - linear CKA between the residual stream before and after the block.",
        title="Novelty",
        sentence="the block changes the geometry by {number}",
        of="novelty",
    ),
    Signal(
        name="inter_layer_information",
        unit="nats",
        guarantee="Information between the sites around the block, both seen through the "
        "compression channel: an upper bound for Gaussian activations only.",
        title="Inter-layer information",
        sentence="the sites around the block share {value}",
        of="inter_layer",
        from_zero=False,
    ),
    Signal(
        name="update_ratio",
        unit="ratio",
        guarantee="Mean length of the block's update over that of the residual it adds to.",
        title="Update ratio",
        sentence="the block's update is {number} times the residual's length",
        of="update",
        logarithmic=True,
    ),
    Signal(
        name="effective_rank",
        unit="dimensions",
        guarantee="Participation ratio of the spectrum after the block.",
        title="Effective rank",
        sentence="the spectrum is as wide as {value}",
        of="effective_rank",
    ),
)
# In the order in which profiles hold them.
SIGNALS: Mapping[str, Signal] = MappingProxyType({signal.name: signal for signal in _ALL})
