"""Intrinsic dimension from the two nearest neighbors of every point."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure

# Points closer than this share of their root mean square length are one: the same token at the
# first site differs by what another batch makes of rounding.
_SAME = 1e-5


def two_nearest_dimension(points: Float[Tensor, "point d"]) -> float:
    """Dimension by maximum likelihood of the ratios of the two nearest distances.

    Where density is even at the scale of the second neighbor, the ratio mu of its distance to that
    of the first follows ``d mu^-(d + 1)`` (Facco et al. 2017, Sci. Rep. 7:12140), so that ``d`` is
    1 over the mean of ``log mu``; with as many points as one can have, high dimensions come out
    too low. Equal points count once.

    Raises:
        CannotMeasure: If there are fewer than three different points, or no distances differ.
    """
    return _of_distances(_distances(points))


def without_each(
    points: Float[Tensor, "point d"], parts: Int[Tensor, " point"], n_parts: int
) -> tuple[float, list[float]]:
    """The dimension of all points, and of those outside each part.

    Args:
        points: The points.
        parts: The part of each point, 0 ... ``n_parts - 1``.
        n_parts: How many parts there are.
    """
    distances = _distances(points)
    left = [distances[parts != part][:, parts != part] for part in range(n_parts)]
    return _of_distances(distances), [_of_distances(one) for one in left]


def _distances(points: Float[Tensor, "point d"]) -> Float[Tensor, "point point"]:
    """In units of the points' root mean square length."""
    wide = points.double()
    wide = wide - wide.mean(dim=0)
    size = wide.pow(2).sum(dim=1).mean().sqrt()
    return torch.cdist(wide, wide) / size


def _of_distances(distances: Float[Tensor, "point point"]) -> float:
    same = distances <= _SAME
    first = ~same.tril(diagonal=-1).any(dim=1)
    between = distances[first][:, first]
    if len(between) < 3:
        raise CannotMeasure(
            f"intrinsic_dimension: two nearest neighbors need at least 3 different positions, got "
            f"{len(between)}; give more prompts or leave it out of signals="
        )
    nearest = between.fill_diagonal_(torch.inf).topk(2, dim=1, largest=False).values
    return float(1 / torch.log(nearest[:, 1] / nearest[:, 0]).mean())
