"""What a site is read for: the tokens just read and the tokens to come, band by band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse.linalg import eigsh
from torch import Tensor

DEFAULT_BANDS: Mapping[str, tuple[int, int]] = {
    "local": (1, 1),
    "intermediate": (2, 16),
    "global": (17, 48),
}
OFFSET_BANDS: Mapping[str, tuple[int, int]] = {
    str(offset): (offset, offset) for offset in (1, 2, 4, 8, 16, 32, 64)
}
_DENSE_EIGEN_WIDTH = 1024


def check_bands(bands: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Bands as given, once they are seen to be whole offsets ``1 <= a <= b``.

    Raises:
        ValueError: If they are not.
    """
    if not bands:
        raise ValueError("bands must name at least one band of token offsets, got none")
    checked = {}
    for name, band in bands.items():
        if len(band) != 2 or not 1 <= band[0] <= band[1] or any(x != int(x) for x in band):
            raise ValueError(
                f"bands[{name!r}] must be two offsets (a, b) with 1 <= a <= b, got {band!r}"
            )
        checked[str(name)] = (int(band[0]), int(band[1]))
    return checked


def token_features(
    embedding: Float[Tensor, "vocab d_model"],
    counts: Int[np.ndarray, " vocab"],
    n_features: int,
) -> Float[Tensor, "vocab feature"]:
    """The features phi of every token: the input embedding on its principal directions.

    The embedding is centered, projected on its leading principal directions under the data set's
    token frequencies, so that features spread where the data do, and scaled to unit variance. No
    forward pass is needed.

    Args:
        embedding: The model's input embedding.
        counts: How often each token occurs in the data set as ordinary text.
        n_features: Number of directions, R; fewer where the tokens seen do not span so many.

    Returns:
        Features, shape ``[vocab, <= n_features]``, float32, on the CPU.
    """
    seen = np.flatnonzero(counts)
    if not len(seen):
        raise ValueError("prompts hold special tokens only: there is nothing to read")
    share = counts[seen] / counts[seen].sum()
    rows = embedding[torch.from_numpy(seen).to(embedding.device)].cpu().double().numpy()
    if not np.isfinite(rows).all():
        bad = int(seen[~np.isfinite(rows).all(axis=1)][0])
        raise FloatingPointError(f"the model's embedding of token {bad} is NaN or infinite")
    mean = share @ rows
    rows -= mean
    covariance = (rows * share[:, None]).T @ rows
    width = len(covariance)
    if width <= _DENSE_EIGEN_WIDTH:
        power, directions = np.linalg.eigh(covariance)
    else:
        power, directions = eigsh(covariance, k=n_features, v0=np.ones(width))
    order = np.argsort(power)[::-1][:n_features]
    # Directions weaker than float32 products resolve would only add noise.
    order = order[power[order] > 1e-6 * power.max()]
    if not len(order):
        raise ValueError("prompts hold one token only, over and over: there is nothing to read")
    # Unit variance each: readers do not care, but the sums keep their digits.
    basis = torch.from_numpy(directions[:, order] / np.sqrt(power[order])).float()
    return embedding.float().cpu() @ basis - torch.from_numpy(mean).float() @ basis


@dataclass(frozen=True)
class BatchTargets:
    """Targets of one batch of prompts.

    Attributes:
        valid: Positions that enter the moments.
        read: Valid positions where every target is defined; all readers use these.
        answered: Valid positions whose answer is known ordinary text.
        answers: What the model is to predict at each position: the next token, or the hidden one.
        values: Targets at the ``read`` positions: for each band the past (X), then for each band
            the future (Y), features side by side.
        single: The tokens that targets of one offset are, a column per target of
            :func:`single_targets` and side; -1 where there is none.
    """

    valid: Bool[Tensor, "prompt pos"]
    read: Bool[Tensor, "prompt pos"]
    answered: Bool[Tensor, "prompt pos"]
    answers: Int[Tensor, "prompt pos"]
    values: Float[Tensor, "read column"]
    single: Int[Tensor, "prompt pos target side"]


def single_targets(bands: Mapping[str, tuple[int, int]]) -> list[int]:
    """Which targets are one token, in the order of all: the past of every band, then the future."""
    single = [i for i, (first, last) in enumerate(bands.values()) if first == last]
    return single + [len(bands) + i for i in single]


def far_targets(bands: Mapping[str, tuple[int, int]]) -> list[int]:
    """Targets that are one token after the next one."""
    ahead = enumerate(bands.values(), start=len(bands))
    return [index for index, (first, last) in ahead if first == last > 1]


def batch_targets(
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    *,
    features: Float[Tensor, "vocab feature"],
    special: Int[Tensor, " id"],
    bands: Mapping[str, tuple[int, int]],
    skip_first: int,
) -> BatchTargets:
    """Past and future targets of right-padded prompts.

    For a band (a, b): ``Y(t)`` is the mean of ``phi(x[t + k])`` and ``X(t)`` that of
    ``phi(x[t - k + 1])`` over k = a ... b, over those of these tokens that are ordinary text
    inside the prompt. A target is defined where at least half of its band's tokens are.

    Args:
        tokens: Token ids, padded on the right.
        mask: True where a token is not padding.
        features: Features of every token (see :func:`token_features`).
        special: Ids that are no ordinary text.
        bands: Scale name to offsets.
        skip_first: Tokens at a prompt's beginning that are not valid positions.
    """
    ordinary = mask & ~torch.isin(tokens, special)
    valid = ordinary & (torch.arange(tokens.shape[1]) >= skip_first)
    sums = _Windows(features[tokens], ordinary)
    columns, read = [], valid
    spans = [(1 - b, 1 - a) for a, b in bands.values()] + list(bands.values())
    for first, last in spans:
        total, count = sums(first, last)
        columns.append(total / count.clamp(min=1)[..., None])
        read = read & (2 * count >= last - first + 1)
    single = [
        _at_offset(tokens, ordinary, first)[..., None] for first, last in spans if first == last
    ]
    next_ordinary = torch.nn.functional.pad(ordinary[:, 1:], (0, 1))
    return BatchTargets(
        valid=valid,
        read=read,
        answered=valid & next_ordinary,
        answers=tokens.roll(-1, dims=1),
        values=torch.cat([column[read] for column in columns], dim=1).float(),
        single=_stacked(single, tokens, n_sides=1),
    )


def masked_targets(
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    hidden: Bool[Tensor, "prompt pos"],
    *,
    features: Float[Tensor, "vocab feature"],
    special: Int[Tensor, " id"],
    bands: Mapping[str, tuple[int, int]],
    skip_first: int,
) -> BatchTargets:
    """Targets for a model that reads in both directions and predicts hidden tokens.

    Read at hidden positions. For a band (a, b), on both sides: ``X(t)`` is the mean of ``phi`` over
    the visible tokens at distance a ... b, defined where there are at least half as many as one
    side holds; ``Y(t)`` that over the hidden tokens at distance a - 1 ... b - 1, defined where
    there is one. So the local Y is the hidden token itself.

    Args:
        tokens: Token ids before any was hidden, padded on the right.
        mask: True where a token is not padding.
        hidden: True where the model sees the mask token; valid positions only.
        features, special, bands, skip_first: As for :func:`batch_targets`.
    """
    ordinary = mask & ~torch.isin(tokens, special)
    valid = ordinary & (torch.arange(tokens.shape[1]) >= skip_first)
    phi = features[tokens]
    seen, unseen = _Windows(phi, ordinary & ~hidden), _Windows(phi, ordinary & hidden)
    columns, single, read = [], [], valid & hidden
    for sums, shift, counted in ((seen, 0, ordinary & ~hidden), (unseen, 1, ordinary & hidden)):
        for a, b in bands.values():
            total, count = sums(a - shift, b - shift)
            # The position itself, at distance 0, is on one side only.
            if b > shift:
                other, more = sums(shift - b, min(shift - a, -1))
                total, count = total + other, count + more
            columns.append(total / count.clamp(min=1)[..., None])
            read = read & (count >= 1 if shift else 2 * count >= b - a + 1)
            if a == b:
                sides = [_at_offset(tokens, counted, side * (a - shift)) for side in (1, -1)]
                # The position itself is one token, not one on either side.
                sides[1] = sides[1] if a > shift else torch.full_like(tokens, -1)
                single.append(torch.stack(sides, dim=-1))
    return BatchTargets(
        valid=valid,
        read=read,
        answered=valid & hidden,
        answers=tokens,
        values=torch.cat([column[read] for column in columns], dim=1).float(),
        single=_stacked(single, tokens, n_sides=2),
    )


def _at_offset(
    tokens: Int[Tensor, "prompt pos"], counted: Bool[Tensor, "prompt pos"], offset: int
) -> Int[Tensor, "prompt pos"]:
    """The token so many places later, -1 where there is none or it does not count."""
    n_pos = tokens.shape[1]
    place = torch.arange(n_pos) + offset
    inside = (place >= 0) & (place < n_pos)
    place = place.clamp(0, n_pos - 1)
    return torch.where(inside & counted[:, place], tokens[:, place], -1)


def _stacked(
    single: list[Tensor], tokens: Int[Tensor, "prompt pos"], n_sides: int
) -> Int[Tensor, "prompt pos target side"]:
    return torch.stack(single, dim=2) if single else tokens.new_zeros(*tokens.shape, 0, n_sides)


class _Windows:
    """Sums of features over tokens at some offsets from every position."""

    def __init__(
        self, phi: Float[Tensor, "prompt pos feature"], counted: Bool[Tensor, "prompt pos"]
    ) -> None:
        # Differences of running sums over whole prompts: float64 keeps their digits.
        running = (phi * counted[..., None]).double().cumsum(dim=1)
        self.running = torch.nn.functional.pad(running, (0, 0, 1, 0))
        self.present = torch.nn.functional.pad(counted.long().cumsum(dim=1), (1, 0))

    def __call__(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sums ``[prompt, pos, feature]`` and counts ``[prompt, pos]`` over first ... last."""
        n_pos = self.present.shape[1] - 1
        position = torch.arange(n_pos)
        start, stop = (position + first).clamp(0, n_pos), (position + last + 1).clamp(0, n_pos)
        count = self.present[:, stop] - self.present[:, start]
        return self.running[:, stop] - self.running[:, start], count
