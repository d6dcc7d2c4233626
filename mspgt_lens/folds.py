"""Which fold each group belongs to: the same in every process for groups in one order."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np


def stable_hash(*parts: Any) -> int:
    """A 64-bit hash that is the same in every process (Python's own is not)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little")


def balanced_folds(sizes: Mapping[Hashable, int], n_folds: int, seed: int) -> dict[Hashable, int]:
    """Groups dealt to folds in random order, each to the fold with the fewest tokens so far."""
    groups = list(sizes)
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    # Large groups first, or the last one dealt could outweigh a fold.
    order = sorted(shuffled.tolist(), key=lambda i: -sizes[groups[i]])
    filled = [0] * n_folds
    folds: dict[Hashable, int] = {}
    for i in order:
        fold = int(np.argmin(filled))
        folds[groups[i]] = fold
        filled[fold] += sizes[groups[i]]
    return folds
