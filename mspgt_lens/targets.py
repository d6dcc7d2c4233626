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
        counts: How often each token occurs in the data set.
        n_features: Number of directions, R; fewer where the tokens seen do not span so many.

    Returns:
        Features, shape ``[vocab, <= n_features]``, float32, on the CPU.
    """
    seen = np.flatnonzero(counts)
    share = counts[seen] / counts[seen].sum()
    rows = embedding[torch.from_numpy(seen).to(embedding.device)].double().cpu().numpy()
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
        next_known: Valid positions whose next token is ordinary text.
        values: Targets at the ``read`` positions: for each band the past (X), then for each band
            the future (Y), features side by side.
    """

    valid: Bool[Tensor, "prompt pos"]
    read: Bool[Tensor, "prompt pos"]
    next_known: Bool[Tensor, "prompt pos"]
    values: Float[Tensor, "read column"]


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
    position = torch.arange(tokens.shape[1])
    valid = ordinary & (position >= skip_first)
    phi = features[tokens] * ordinary[..., None]
    # Differences of running sums over whole prompts: float64 keeps their digits.
    running = torch.nn.functional.pad(phi.double().cumsum(dim=1), (0, 0, 1, 0))
    present = torch.nn.functional.pad(ordinary.long().cumsum(dim=1), (1, 0))

    def window(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = first.clamp(0, len(position)), (last + 1).clamp(0, len(position))
        count = present[:, stop] - present[:, start]
        total = running[:, stop] - running[:, start]
        return total / count.clamp(min=1)[..., None], count

    columns, read = [], valid
    spans = [(1 - b, 1 - a) for a, b in bands.values()] + list(bands.values())
    for first, last in spans:
        mean, count = window(position + first, position + last)
        columns.append(mean)
        read = read & (2 * count >= last - first + 1)
    next_ordinary = torch.nn.functional.pad(ordinary[:, 1:], (0, 1))
    return BatchTargets(
        valid=valid,
        read=read,
        next_known=valid & next_ordinary,
        values=torch.cat([column[read] for column in columns], dim=1).float(),
    )
