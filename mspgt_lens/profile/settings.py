"""What decides a profile's numbers, besides the model and its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mspgt_lens.information.channel import check_noise
from mspgt_lens.moments import Coordinates
from mspgt_lens.signals import SIGNALS, Signal
from mspgt_lens.targets import check_bands

Control = Literal["random_weights", "shuffled_tokens"]


@dataclass(frozen=True)
class ProfileSettings:
    """Arguments of :func:`~mspgt_lens.profile_layers`, checked when they are put together.

    Raises:
        ValueError: If one is out of range; the message names it.
    """

    bands: Mapping[str, tuple[int, int]]
    noise: float
    coordinates: Coordinates
    n_folds: int
    skip_first: int
    seed: int
    control: Control | None = None
    signals: tuple[Signal, ...] = tuple(SIGNALS.values())

    def __post_init__(self) -> None:
        if self.control not in (None, *get_args(Control)):
            raise ValueError(
                f"control must be None or one of {', '.join(get_args(Control))}, got "
                f"{self.control!r}"
            )
        check_noise(self.noise)
        if self.coordinates not in ("standardized", "raw"):
            raise ValueError(
                f"coordinates must be 'standardized' or 'raw', got {self.coordinates!r}"
            )
        if self.n_folds < 3:
            raise ValueError(
                "n_folds must be at least 3 (strengths are chosen on inner folds), got "
                f"{self.n_folds}"
            )
        if self.skip_first < 0:
            raise ValueError(f"skip_first must be 0 or more tokens, got {self.skip_first}")
        object.__setattr__(self, "bands", check_bands(self.bands))
