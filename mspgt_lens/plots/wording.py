"""How figures of profiles say things: bands, places, intervals, colors of scales."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mspgt_lens.estimates import Curve, Unit
from mspgt_lens.plots.look import NEUTRAL, OTHER_COLORS, SCALE_COLORS, digits, transparent
from mspgt_lens.profile.results import LayerProfile


def in_unit(curve: Curve, unit: Unit) -> Curve:
    """Information in this unit; other curves as they are."""
    return curve.to(unit) if curve.unit in ("nats", "bits") else curve


def scale_color(profile: LayerProfile, scale: str) -> str:
    """A scale's own color; other scales take turns, and what has no scale is neutral."""
    if not scale:
        return NEUTRAL
    others = [s for s in profile.scales if s not in SCALE_COLORS]
    if scale in SCALE_COLORS:
        return SCALE_COLORS[scale]
    return OTHER_COLORS[others.index(scale) % len(OTHER_COLORS)]


def scale_title(profile: LayerProfile, scale: str) -> str:
    """A scale and its offsets."""
    first, last = profile.bands[scale]
    offsets = f"offset {first}" if first == last else f"offsets {first} to {last}"
    return f"{escape(scale.capitalize())}: {offsets}"


def past_words(profile: LayerProfile, scale: str) -> str:
    """What a scale's band holds of what was read."""
    band = profile.bands[scale]
    if is_masked(profile):
        return f"visible tokens {_distance(*band)} away"
    if band == (1, 1):
        return "the current token"
    if band[0] == band[1]:
        return f"the token {band[0] - 1} back"
    return f"tokens {band[0] - 1} to {band[1] - 1} back"


def future_words(profile: LayerProfile, scale: str) -> str:
    """What a scale's band holds of what is to be predicted."""
    band = profile.bands[scale]
    if is_masked(profile):
        if band == (1, 1):
            return "the hidden token"
        return f"hidden tokens {_distance(band[0] - 1, band[1] - 1)} away"
    if band == (1, 1):
        return "the next token"
    if band[0] == band[1]:
        return f"the token {band[0]} ahead"
    return f"tokens {band[0]} to {band[1]} ahead"


def is_masked(profile: LayerProfile) -> bool:
    """Whether the model is an encoder, which was read where tokens were hidden from it."""
    return bool(profile.settings.get("hidden_share"))


def _distance(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def beyond_words(profile: LayerProfile, scale: str) -> str:
    """Which coarser scales an added curve goes beyond."""
    coarser = [s for s in profile.scales if profile.bands[s] > profile.bands[scale]]
    return f"beyond {escape(' and '.join(coarser))}" if coarser else "the coarsest scale"


def place_words(profile: LayerProfile, point: int, at_sites: bool) -> str:
    """A site or a block in words."""
    if not at_sites:
        return f"block {point} of {profile.n_layers}"
    if point == 0:
        return "site 0, before the first block"
    return f"site {point}, after block {point - 1}"


def interval_words(curve: Curve, point: int) -> str:
    """A point's interval in words."""
    return f"95% interval {digits(curve.low[point])} to {digits(curve.high[point])}"


def sample_words(profiles: Sequence[LayerProfile], intervals: str) -> str:
    """How much text, and what shows its uncertainty."""
    parts = dict.fromkeys(f"{p.n_tokens:,} tokens from {p.n_groups:,} groups" for p in profiles)
    return f"{'; '.join(parts)}; {intervals}"


def error_bars(curve: Curve) -> dict[str, object]:
    """A curve's intervals as error bars."""
    return {
        "type": "data",
        "symmetric": False,
        "array": curve.high - curve.values,
        "arrayminus": curve.values - curve.low,
        "color": transparent(NEUTRAL, 0.45),
        "thickness": 1,
        "width": 0,
    }
