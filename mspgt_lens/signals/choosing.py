"""Which signals a profile gathers."""

from __future__ import annotations

from collections.abc import Iterable

from mspgt_lens.signals.record import Signal
from mspgt_lens.signals.rivals import RIVAL_SIGNALS
from mspgt_lens.signals.usual import SIGNALS

_NAMED = {**SIGNALS, **RIVAL_SIGNALS}


def choose_signals(signals: Iterable[str | Signal] | None) -> tuple[Signal, ...]:
    """The signals that a profile gathers.

    Args:
        signals: Names of the package's own, and signals of one's own; None for those of
            ``SIGNALS``.

    Raises:
        TypeError: If this is no sequence of names and signals.
        ValueError: If a name is not known, or given twice.
    """
    if signals is None:
        return tuple(SIGNALS.values())
    if isinstance(signals, str | Signal):
        raise TypeError(f"signals must be a sequence of names and signals, got {signals!r} alone")
    chosen: dict[str, Signal] = {}
    for given in signals:
        if isinstance(given, str) and given not in _NAMED:
            raise ValueError(
                f"signals must be among {', '.join(_NAMED)}, or Signal objects of your own "
                f"(mspgt_lens.extending.Signal), got {given!r}"
            )
        if not isinstance(given, str | Signal):
            raise TypeError(f"signals must hold names and Signal objects, got {given!r}")
        signal = _NAMED[given] if isinstance(given, str) else given
        if signal.name in chosen or signal != _NAMED.get(signal.name, signal):
            raise ValueError(
                f"signals must all have names of their own, got {signal.name!r} twice or for "
                "another signal than the package's"
            )
        chosen[signal.name] = signal
    return tuple(chosen.values())
