"""What the residual stream of a model is like at every block, gathered in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, counted, tidy
from mspgt_lens.models import ModelAdapter, as_adapter, own_attention
from mspgt_lens.moments import MAX_WIDTH
from mspgt_lens.perturbation.batches import Batch, Batches, make_batches
from mspgt_lens.prompts import PromptDataset

_N_DONORS = 512
# Of residuals too wide for their covariance: 2.7 GB at 80 blocks of width 8,192, not 21.
_N_ROWS = 1024


@dataclass(frozen=True, eq=False, repr=False)
class ResidualStatistics(Result):
    """What the residual stream of a model is like at every block's entry, at valid positions.

    Attributes:
        deviation: Standard deviation of each coordinate, ``[block, d_model]``.
        factor: Of the covariance, ``factor.T @ factor``: standard normal numbers times it have that
            covariance, ``[block, draw, d_model]``. Up to a width of 1,024 it is the symmetric
            square root. Of wider residuals it is their centered values at no more than 1,024
            sampled positions, over the square root of how many, each coordinate as large as it is
            over all positions: their spreads are exact, their correlations those of the sample.
        rms: Root-mean-square over positions and coordinates, ``[block]``.
        update_mean: Mean of what each block adds, ``[block, d_model]``.
        updates: What each block adds at sampled positions, ``[block, donor, d_model]``.
        groups: ``stable_hash`` of the group of each sampled position, ``[donor]``.
        n_positions: Valid positions that entered.
    """

    deviation: Float[Tensor, "block d_model"]
    factor: Float[Tensor, "block draw d_model"]
    rms: Float[Tensor, " block"]
    update_mean: Float[Tensor, "block d_model"]
    updates: Float[Tensor, "block donor d_model"]
    groups: UInt64[np.ndarray, " donor"]
    n_positions: int

    def heading(self) -> str:
        """Sizes."""
        n_layers, width = self.deviation.shape
        return (
            f"ResidualStatistics: {counted(n_layers, 'block')} of width {width}, from "
            f"{counted(self.n_positions, 'position')}"
        )

    def findings(self) -> list[str]:
        """How large the residual stream is."""
        return [
            f"RMS {self.rms[0]:.3g} at the first block's entry, {self.rms[-1]:.3g} at the last."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """The root mean square at every block's entry: ``quantity, block, value, unit``."""
        values = self.rms.double().numpy(force=True)
        blocks = np.arange(len(values))
        return tidy({"quantity": "rms", "block": blocks, "value": values, "unit": "activation"})


@in_own_state
def residual_statistics(
    model: object,
    prompts: PromptDataset | Iterable[str] | Batches,
    *,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
) -> ResidualStatistics:
    """Gather, in one pass, what :meth:`Perturbation.edits` needs.

    Memory is L x d_model x 1,024 numbers at most, and half as many for the updates.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        skip_first: Tokens at the beginning of each prompt that are no valid positions.
        batch_size: Prompts per forward pass; by default a fixed number of tokens, or what fits.
        seed: Decides the positions whose updates are kept for resampling, and those that the
            covariance of residuals wider than 1,024 is taken from.

    Returns:
        Spread, covariance and updates at every block's entry, in the residual stream's own units.

    Raises:
        FloatingPointError: If an activation is NaN or infinite.
        ValueError: If there are too few groups, or a prompt does not fit the model.

    Example:
        >>> statistics = ml.residual_statistics(model, prompts)
        >>> statistics.deviation.shape  # block, d_model
        torch.Size([8, 32])
    """
    adapter = as_adapter(model)
    batches = (
        prompts
        if isinstance(prompts, Batches)
        else make_batches(
            adapter, prompts, skip_first=skip_first, batch_size=batch_size, min_groups=1
        )
    )
    is_wide = adapter.d_model > MAX_WIDTH
    gathering = _Gathering(
        adapter,
        _sampled(batches.n_positions, _N_DONORS, [seed, 1]),
        _sampled(batches.n_positions, _N_ROWS, [seed, 2]) if is_wide else None,
    )
    with adapter.inference(), own_attention(adapter):
        for _ in batches.each(gathering.add):
            pass
    return gathering.finish()


def _sampled(n_positions: int, most: int, seed: list[int]) -> Int[np.ndarray, " sampled"]:
    """Numbers of positions, drawn evenly, in order."""
    drawn = np.random.default_rng(seed).choice(n_positions, min(most, n_positions), replace=False)
    return np.sort(drawn)


class _Gathering:
    """Sums of one pass.

    Args:
        adapter: The model.
        donors: Positions whose updates are kept.
        rows: Positions that a covariance is taken from; None for sums over all of them.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        donors: Int[np.ndarray, " donor"],
        rows: Int[np.ndarray, " draw"] | None,
    ) -> None:
        self.adapter = adapter
        self.donors, self.rows = donors, rows
        shape = (adapter.n_layers, adapter.d_model)
        self.n = 0
        self.center: list[Tensor] = []
        self.sums, self.squares, self.update_sums = torch.zeros(3, *shape, dtype=torch.float64)
        self.products: Tensor | None = None
        if rows is None:
            self.products = torch.zeros((*shape, adapter.d_model), dtype=torch.float64)
        self.updates: list[Tensor] = []
        self.sampled: list[Tensor] = []
        self.groups: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        """Take in a batch, or nothing of it."""
        n_valid = int(batch.valid.sum())
        donors = _within(self.donors, batch.first, n_valid)
        sampled = None if self.rows is None else _within(self.rows, batch.first, n_valid)
        center, before = list(self.center), list[Tensor]()
        sums, squares, products, update_sums, updates, kept = (list[Tensor]() for _ in range(6))

        def on_site(site: int, residual: Tensor) -> None:
            rows = residual.detach()[batch.valid.to(residual.device)].float().cpu()
            if not bool(torch.isfinite(rows.sum())):
                raise FloatingPointError(
                    f"activations at site {site} of {self.adapter.name} are NaN or infinite; load "
                    "the model in float32"
                )
            if before:
                update = rows - before.pop()
                update_sums.append(update.double().sum(dim=0))
                updates.append(update[donors])
            before.append(rows)
            if site < self.adapter.n_layers:
                if len(center) == site:
                    center.append(rows.mean(dim=0))
                # Near their mean, products of float32 keep their digits.
                z = rows - center[site]
                wide = z.double()
                sums.append(wide.sum(dim=0))
                squares.append(wide.pow(2).sum(dim=0))
                if self.products is not None:
                    products.append(z.T @ z)
                if sampled is not None:
                    kept.append(z[sampled])

        self.adapter.run(batch.tokens, batch.mask, on_site)
        own_updates, own_rows = torch.stack(updates), [torch.stack(kept)] if kept else []
        # Only now: a batch that does not fit into memory has added nothing.
        self.center = center
        totals = (self.sums, sums), (self.squares, squares), (self.update_sums, update_sums)
        for total, added in (*totals, (self.products, products)):
            for of_block, one in zip(() if total is None else total, added, strict=True):
                of_block += one
        self.n += n_valid
        self.updates.append(own_updates)
        self.sampled += own_rows
        owner = torch.nonzero(batch.valid)[:, 0].numpy()[donors.numpy()]
        self.groups.append(batch.group_hashes[owner])

    def finish(self) -> ResidualStatistics:
        shift = self.sums / self.n
        mean = torch.stack(self.center).double() + shift
        variance = (self.squares / self.n - shift**2).clamp(min=0.0)
        return ResidualStatistics(
            deviation=variance.sqrt().float(),
            factor=self._square_roots(shift) if self.rows is None else self._rows(shift, variance),
            rms=(variance + mean**2).mean(dim=1).sqrt().float(),
            update_mean=(self.update_sums / self.n).float(),
            updates=torch.cat(self.updates, dim=1),
            groups=np.concatenate(self.groups),
            n_positions=self.n,
        )

    def _square_roots(self, shift: Float[Tensor, "block d_model"]) -> Tensor:
        """Of every block's covariance, the symmetric ones."""
        assert self.products is not None
        factor = []
        for products, mean in zip(self.products, shift, strict=True):
            power, axes = torch.linalg.eigh(products / self.n - torch.outer(mean, mean))
            # Rounding leaves powers of empty directions a little below 0.
            factor.append(((axes * power.clamp(min=0.0).sqrt()) @ axes.T).float())
        return torch.stack(factor)

    def _rows(
        self, shift: Float[Tensor, "block d_model"], variance: Float[Tensor, "block d_model"]
    ) -> Float[Tensor, "block draw d_model"]:
        """Centered rows at sampled positions, every coordinate with its own variance."""
        rows = torch.cat(self.sampled, dim=1)
        self.sampled.clear()
        for of_block, mean, spread in zip(rows, shift, variance, strict=True):
            of_block -= mean.float()
            found = of_block.double().pow(2).sum(dim=0)
            # Where none of the sampled positions has any, nothing says how to vary.
            scale = torch.where(found > 0, (spread / found.clamp(min=1e-300)).sqrt(), 0.0)
            of_block *= scale.float()
        return rows


def _within(chosen: Int[np.ndarray, " position"], first: int, count: int) -> Int[Tensor, " inside"]:
    """Which of a batch's positions are among those chosen of all, numbered from its first."""
    inside = chosen[(chosen >= first) & (chosen < first + count)] - first
    return torch.from_numpy(inside)
