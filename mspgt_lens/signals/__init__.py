"""Curves over depth that are gathered in a profile's pass: what they are, and how to add one."""

from mspgt_lens.signals.choosing import choose_signals
from mspgt_lens.signals.record import BlockRows, Signal, SignalWords, SiteRows
from mspgt_lens.signals.rivals import RIVAL_SIGNALS
from mspgt_lens.signals.summing import SignalSums
from mspgt_lens.signals.usual import SIGNALS

__all__ = [
    "RIVAL_SIGNALS",
    "SIGNALS",
    "BlockRows",
    "Signal",
    "SignalSums",
    "SignalWords",
    "SiteRows",
    "choose_signals",
]
