"""What rounding alone does to predictions: the floor below which no effect can be seen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.folds import stable_hash
from mspgt_lens.models import Edit
from mspgt_lens.perturbation.batches import Batch
from mspgt_lens.perturbation.responding import MEASURES, Condition

# Share of an effect up to which rounding needs no mention.
NEGLIGIBLE = 0.1


def rounding(blocks: Iterable[int]) -> Condition:
    """A change no larger than rounding, at the entry of every given block.

    At valid positions, one coordinate in twelve moves by one step of its dtype, which has the
    variance of rounding once (step squared / 12). Adding exactly nothing would not do: it leaves
    every later rounding as it was in the clean run, while the least noise changes them all. That
    alone moves predictions, by the same amount at every strength.
    """
    chosen = tuple(int(block) for block in blocks)

    def edits(batch: Batch) -> list[Edit]:
        def moved(block: int, residual: Tensor) -> Tensor:
            where = batch.valid.to(residual.device)
            rows = residual[where]
            counts = batch.valid.sum(dim=1).tolist()
            drawn = [
                torch.randint(
                    24,
                    (count, rows.shape[1]),
                    generator=torch.Generator().manual_seed(
                        stable_hash(key, block, "rounding") % 2**63
                    ),
                )
                for count, key in zip(counts, batch.keys, strict=True)
            ]
            result = residual.clone()
            result[where] = _stepped(rows, torch.cat(drawn).to(rows.device))
            return result

        return [Edit(block, "resid_pre", partial(moved, block)) for block in chosen]

    return edits


def beyond_rounding(
    measured: Float[np.ndarray, "*condition target group measure"],
    floor: Float[np.ndarray, "target group measure"],
) -> Float[np.ndarray, "*condition target group measure"]:
    """Measures of ``respond`` less those of :func:`rounding` in the same places.

    A condition that changed nothing at all met no rounding either: its measures stay as they are.
    """
    changed = (measured[..., MEASURES.index("kl")] != 0).any(axis=-1)[..., None, None]
    less: np.ndarray = np.where(changed, measured - floor, measured)
    return less


def _stepped(
    rows: Float[Tensor, "row d_model"], drawn: Int[Tensor, "row d_model"]
) -> Float[Tensor, "row d_model"]:
    """Rows, one step up where 0 was drawn and one down where 1 was."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    steps = (drawn == 0).to(wide.dtype) - (drawn == 1).to(wide.dtype)
    return (wide * (1.0 + torch.finfo(rows.dtype).eps * steps)).to(rows.dtype)
