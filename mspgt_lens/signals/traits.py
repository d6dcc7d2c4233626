"""What whole prompts show of attention sinks and massive activations, wherever it is measured."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.models import in_float64

# A head whose mean attention to the first position exceeds this is a sink (Gu et al. 2024).
SINK_THRESHOLD = 0.3
# Coordinates in which massive activations sit (Sun et al. 2024).
N_MASSIVE = 3


def sink_rate(pattern: Float[Tensor, "query head key"]) -> Float[Tensor, ""]:
    """Share of heads that are sinks on one prompt.

    Args:
        pattern: What the heads attend to, of all of its queries.
    """
    return (pattern[:, :, 0].mean(dim=0) > SINK_THRESHOLD).float().mean()


def largest_share(power: Float[Tensor, "*prompt d_model"]) -> Float[Tensor, "*prompt"]:
    """Share of the largest coordinates in all power.

    Args:
        power: Sum of squares of every coordinate.
    """
    largest: Tensor = power.topk(min(N_MASSIVE, power.shape[-1]), dim=-1).values.sum(dim=-1)
    return largest / power.sum(dim=-1)


def prompt_entropy(residual: Float[Tensor, "row d_model"]) -> Float[Tensor, ""]:
    """Renyi entropy of order 2 of the Gram matrix of one prompt's rows, in nats.

    Rows are centered and brought to unit length; negative cosines count as 0.

    Args:
        residual: All rows of the prompt.
    """
    centered = in_float64(residual)
    centered = centered - centered.mean(dim=0)
    length = centered.norm(dim=1, keepdim=True)
    # Rows that are all the same are one point, whose entropy is 0.
    unit = centered / torch.where(length > 0, length, 1.0)
    gram = (unit @ unit.T).clamp(min=0)
    trace = gram.trace()
    return -torch.log(gram.pow(2).sum() / trace**2) if trace > 0 else trace
