"""The signals of blocks, each with all that is known of it: gathering, unit, guarantee, words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from jaxtyping import Float, Int
from torch import Tensor

# What the moments hold of blocks, and which of it comes from attention patterns.
_GATHERED = ("span", "entropy", "update", "novelty", "inter_layer", "effective_rank")
_OF_PATTERNS = ("span", "entropy")
# A profile's other curves, which are told apart from signals by their names.
_CURVES = ("compression", "relevance", "logit_lens", "retained", "predicted", "added")


@dataclass(frozen=True)
class BlockRows:
    """What a signal of one's own is computed from: one block in one batch, a row per position.

    Rows are the valid positions (no special tokens, none of the first ``skip_first``); numbers are
    as the model has them, in float32 at least.

    Attributes:
        block: The block, 0 ... L - 1.
        before: The residual stream before the block.
        after: The residual stream after it.
        position: Each row's place in its prompt, from 0.
        pattern: What each head of the row attends to, 0 for keys that it does not see; None where
            the signal does not ask for ``patterns``.
    """

    block: int
    before: Float[Tensor, "row d_model"]
    after: Float[Tensor, "row d_model"]
    position: Int[Tensor, " row"]
    pattern: Float[Tensor, "row head key"] | None


# One number per row.
PerRow = Callable[[BlockRows], Float[Tensor, " row"]]


@dataclass(frozen=True, kw_only=True)
class SignalWords:
    """How figures show a signal, and what they say of it.

    Attributes:
        title: Of its panel.
        sentence: What hovering says of a block; ``{number}`` is the number, ``{value}`` the number
            with its unit.
        from_zero: Whether its axis begins at 0; else its changes are small against its size.
        logarithmic: Whether its axis is logarithmic.
    """

    title: str
    sentence: str
    from_zero: bool = True
    logarithmic: bool = False


@dataclass(frozen=True, kw_only=True)
class Signal(SignalWords):
    """One number per block, gathered while a profile's pass runs.

    Attributes:
        title: Of its panel in figures.
        sentence: What hovering says of a block; ``{number}`` is the number, ``{value}`` the number
            with its unit.
        from_zero: Whether figures show it from 0 on; else its changes are small against its size.
        logarithmic: Whether figures show its logarithm.
        name: What ``LayerProfile.signals`` calls it.
        unit: Its unit.
        guarantee: What the number is, and what it bounds.
        of: A function from :class:`BlockRows` to one number per row; the signal is their mean over
            all rows, with its interval over folds of groups. The package's own name what the
            moments hold.
        patterns: Whether the function reads attention patterns.

    Raises:
        ValueError: If a profile could not hold it by this name, or say its sentence.
    """

    name: str
    unit: str
    guarantee: str
    of: str | PerRow
    patterns: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name in _CURVES:
            raise ValueError(
                "name of a signal must be a text other than those of a profile's other curves "
                f"({', '.join(_CURVES)}), got {self.name!r}"
            )
        if not callable(self.of) and self.of not in _GATHERED:
            raise ValueError(
                f"of: signal {self.name!r} must be computed by a function of BlockRows, or be one "
                f"of {', '.join(_GATHERED)}, got {self.of!r}"
            )
        try:
            self.sentence.format(number="1", value="1 nat")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"sentence of signal {self.name!r} must have no fields but {{number}} and "
                f"{{value}} (write {{{{ for a brace), got {self.sentence!r}"
            ) from error

    @property
    def needs_patterns(self) -> bool:
        """Whether attention patterns must be gathered for it."""
        return self.patterns or self.of in _OF_PATTERNS

    @property
    def words(self) -> SignalWords:
        """What a profile keeps of it for figures."""
        return SignalWords(**{item.name: getattr(self, item.name) for item in fields(SignalWords)})


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


def choose_signals(signals: Iterable[str | Signal] | None) -> tuple[Signal, ...]:
    """The signals that a profile gathers.

    Args:
        signals: Names of the package's own, and signals of one's own; None for all of the
            package's.

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
        if isinstance(given, str) and given not in SIGNALS:
            raise ValueError(
                f"signals must be among {', '.join(SIGNALS)}, or Signal objects of your own "
                f"(mspgt_lens.extending.Signal), got {given!r}"
            )
        if not isinstance(given, str | Signal):
            raise TypeError(f"signals must hold names and Signal objects, got {given!r}")
        signal = SIGNALS[given] if isinstance(given, str) else given
        if signal.name in chosen or signal != SIGNALS.get(signal.name, signal):
            raise ValueError(
                f"signals must all have names of their own, got {signal.name!r} twice or for "
                "another signal than the package's"
            )
        chosen[signal.name] = signal
    return tuple(chosen.values())
