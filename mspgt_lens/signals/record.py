"""What a signal is: how it is gathered, its unit, what it guarantees, and its words in figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

Place = Literal["block", "site"]
# What the moments hold of blocks, and which of it comes from attention patterns.
_GATHERED = ("span", "entropy", "update", "novelty", "inter_layer", "effective_rank")
_OF_PATTERNS = ("span", "entropy")
# What sampled positions give of sites.
_SAMPLED = ("lens_entropy", "lens_kl", "dimension")
# A profile's other curves, which are told apart from signals by their names.
_CURVES = ("compression", "relevance", "logit_lens", "retained", "predicted", "added")


@dataclass(frozen=True)
class BlockRows:
    """What a signal of one's own is computed from: one block in one batch, a row per position.

    Rows are the valid positions (no special tokens, none of the first ``skip_first``), or all of
    one prompt where the signal is of ``whole`` prompts; numbers are as the model has them, in
    float32 at least.

    Attributes:
        block: The block, 0 ... L - 1.
        before: The residual stream before the block.
        after: The residual stream after it.
        position: Each row's place in its prompt, from 0.
        pattern: What each head of the row attends to, 0 for keys that it does not see; None where
            the signal does not ask for ``patterns``.
        attention: What attention adds to the residual stream; None where the signal does not ask
            for ``updates``.
        mlp: What the MLP adds; None where the signal does not ask for ``updates``.
        between: What the MLP's is added to: ``before + attention``, or ``before`` where both read
            the same stream; None where the signal does not ask for ``updates``.
    """

    block: int
    before: Float[Tensor, "row d_model"]
    after: Float[Tensor, "row d_model"]
    position: Int[Tensor, " row"]
    pattern: Float[Tensor, "row head key"] | None
    attention: Float[Tensor, "row d_model"] | None = None
    mlp: Float[Tensor, "row d_model"] | None = None
    between: Float[Tensor, "row d_model"] | None = None


@dataclass(frozen=True)
class SiteRows:
    """What a signal of sites is computed from: one site in one batch, a row per position.

    Rows are as those of :class:`BlockRows`.

    Attributes:
        site: The site, 0 ... L.
        residual: The residual stream there.
        position: Each row's place in its prompt, from 0.
    """

    site: int
    residual: Float[Tensor, "row d_model"]
    position: Int[Tensor, " row"]


# One number per row, or one of all rows where the signal is of whole prompts.
PerRow = Callable[[BlockRows], Tensor] | Callable[[SiteRows], Tensor]


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
    """One number per block or per site, gathered while a profile's pass runs.

    Attributes:
        title: Of its panel in figures.
        sentence: What hovering says of a block; ``{number}`` is the number, ``{value}`` the number
            with its unit.
        from_zero: Whether figures show it from 0 on; else its changes are small against its size.
        logarithmic: Whether figures show its logarithm.
        name: What ``LayerProfile.signals`` calls it.
        unit: Its unit.
        guarantee: What the number is, and what it bounds.
        of: A function from :class:`BlockRows` (of blocks) or :class:`SiteRows` (of sites) to one
            number per row; the signal is their mean over all rows, with its interval over folds of
            groups. The package's own may name what the moments or the sampled positions hold.
        place: ``"block"``, L values, or ``"site"``, L + 1.
        whole: Whether the function takes one whole prompt at a time, special tokens and the first
            positions too, and gives one number of it; the signal is then the mean over prompts.
        patterns: Whether the function reads attention patterns.
        updates: Whether the function reads what attention and MLP add.

    Raises:
        ValueError: If a profile could not hold it by this name, or say its sentence.
    """

    name: str
    unit: str
    guarantee: str
    of: str | PerRow
    place: Place = "block"
    whole: bool = False
    patterns: bool = False
    updates: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name in _CURVES:
            raise ValueError(
                "name of a signal must be a text other than those of a profile's other curves "
                f"({', '.join(_CURVES)}), got {self.name!r}"
            )
        if self.place not in get_args(Place):
            raise ValueError(
                f"place of signal {self.name!r} must be 'block' or 'site', got {self.place!r}"
            )
        held, rows = (_GATHERED, "Block") if self.place == "block" else (_SAMPLED, "Site")
        if not callable(self.of) and self.of not in held:
            raise ValueError(
                f"of: signal {self.name!r} must be computed by a function of {rows}Rows, or be one "
                f"of {', '.join(held)}, got {self.of!r}"
            )
        if self.place == "site" and (self.patterns or self.updates):
            raise ValueError(
                f"patterns and updates of signal {self.name!r} must be False: sites have neither; "
                "make it a signal of blocks"
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
        return self.patterns or self.needs_spans

    @property
    def needs_spans(self) -> bool:
        """Whether it is computed from the sums over patterns that the moments hold."""
        return self.of in _OF_PATTERNS

    @property
    def source(self) -> str:
        """Its name, and that of what computes it."""
        by = getattr(self.of, "__qualname__", type(self.of).__name__)
        return f"{self.name} by {self.of if isinstance(self.of, str) else by}"

    @property
    def words(self) -> SignalWords:
        """What a profile keeps of it for figures."""
        return SignalWords(**{item.name: getattr(self, item.name) for item in fields(SignalWords)})
