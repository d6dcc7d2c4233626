"""Compare saved profiles of one model across TransformerLens versions and model classes.

Run as ``python tests/compat/compare.py REFERENCE OTHER...``; fails if a curve differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mspgt_lens.results import Curve, LayerProfile

# Relative to the curve's largest absolute value; float32 forward passes differ by less.
TOLERANCE = 1e-3


def named_curves(profile: LayerProfile) -> dict[str, Curve]:
    """Every curve of a profile by its full name."""
    return {f"{name} {scale}".strip(): curve for name, scale, curve in profile.curves()}


def difference(reference: Curve, other: Curve) -> float:
    """Largest difference of values and interval ends, relative to the largest reference value."""
    if len(reference) != len(other) or reference.unit != other.unit:
        return float("inf")
    # A curve that is 0 everywhere has no size but its interval's.
    sizes = (np.abs(part).max() for part in (reference.values, reference.low, reference.high))
    largest = next((size for size in sizes if size > 0), np.finfo(float).tiny)
    return max(
        float(np.abs(getattr(other, part) - getattr(reference, part)).max() / largest)
        for part in ("values", "low", "high")
    )


def agree(reference: LayerProfile, other: LayerProfile) -> bool:
    """Print each curve's difference; True if all are within the tolerance."""
    prompts = reference.settings["prompts_fingerprint"], other.settings["prompts_fingerprint"]
    same = prompts[0] == prompts[1]
    if not same:
        print(f"  the prompts' tokens differ: fingerprint {prompts[1]}, reference {prompts[0]}")
    expected, found = named_curves(reference), named_curves(other)
    for name in sorted(expected.keys() ^ found.keys()):
        print(f"  {name:<28} missing in {'the reference' if name in found else 'this profile'}")
        same = False
    for name in (name for name in expected if name in found):
        worst = difference(expected[name], found[name])
        within = worst <= TOLERANCE
        same &= within
        print(f"  {name:<28} {worst:.1e}{'' if within else f'  above {TOLERANCE:g}'}")
    return same


def main(reference_path: str, *other_paths: str) -> int:
    """Compare each profile with the reference; the number that disagree."""
    reference = LayerProfile.load(reference_path)
    print(f"reference: {_described(reference_path, reference)}")
    failed = 0
    for path in other_paths:
        other = LayerProfile.load(path)
        print(_described(path, other))
        same = agree(reference, other)
        print(f"  {'passed' if same else 'FAILED'}")
        failed += not same
    print(f"{len(other_paths) - failed} passed, {failed} failed")
    return failed


def _described(path: str, profile: LayerProfile) -> str:
    versions = profile.versions
    return (
        f"{Path(path).stem} (transformer-lens {versions['transformer-lens']}, "
        f"transformers {versions['transformers']}, numpy {versions['numpy']}; "
        f"{profile.settings['weights']})"
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(f"usage: {sys.argv[0]} REFERENCE OTHER...")
    raise SystemExit(1 if main(*sys.argv[1:]) else 0)
