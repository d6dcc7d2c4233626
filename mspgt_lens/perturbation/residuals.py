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
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.perturbation.batches import Batch, Batches, make_batches
from mspgt_lens.prompts import PromptDataset

_N_DONORS = 512


@dataclass(frozen=True, eq=False, repr=False)
class ResidualStatistics(Result):
    """What the residual stream of a model is like at every block's entry, at valid positions.

    Attributes:
        deviation: Standard deviation of each coordinate, ``[block, d_model]``.
        factor: Symmetric square root of the covariance, ``[block, d_model, d_model]``.
        rms: Root-mean-square over positions and coordinates, ``[block]``.
        update_mean: Mean of what each block adds, ``[block, d_model]``.
        updates: What each block adds at sampled positions, ``[block, donor, d_model]``.
        groups: ``stable_hash`` of the group of each sampled position, ``[donor]``.
        n_positions: Valid positions that entered.
    """

    deviation: Float[Tensor, "block d_model"]
    factor: Float[Tensor, "block d_model d_model"]
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
    """Gather, in one pass, what :meth:`Perturbation.edits` needs; memory is L x d_model squared.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        skip_first: Tokens at the beginning of each prompt that are no valid positions.
        batch_size: Prompts per forward pass; by default a fixed number of tokens.
        seed: Decides the positions whose updates are kept for resampling.

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
    rng = np.random.default_rng([seed, 1])
    chosen = np.sort(
        rng.choice(batches.n_positions, min(_N_DONORS, batches.n_positions), replace=False)
    )
    gathering = _Gathering(adapter)
    with adapter.inference():
        for batch in batches:
            gathering.add(batch, chosen)
    return gathering.finish()


class _Gathering:
    """Sums of one pass."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        shape = (adapter.n_layers, adapter.d_model)
        self.n = 0
        self.center: list[Tensor] = []
        self.sums = torch.zeros(shape, dtype=torch.float64)
        self.products = torch.zeros((*shape, adapter.d_model), dtype=torch.float64)
        self.update_sums = torch.zeros(shape, dtype=torch.float64)
        self.donors: list[Tensor] = []
        self.groups: list[np.ndarray] = []

    def add(self, batch: Batch, chosen: Int[np.ndarray, " donor"]) -> None:
        n_valid = int(batch.valid.sum())
        inside = chosen[(chosen >= batch.first) & (chosen < batch.first + n_valid)] - batch.first
        donors = torch.from_numpy(inside)
        updates: list[Tensor] = []
        before: list[Tensor] = []

        def on_site(site: int, residual: Tensor) -> None:
            rows = residual.detach()[batch.valid.to(residual.device)].float().cpu()
            if not bool(torch.isfinite(rows.sum())):
                raise FloatingPointError(
                    f"activations at site {site} of {self.adapter.name} are NaN or infinite; load "
                    "the model in float32"
                )
            if before:
                update = rows - before.pop()
                self.update_sums[site - 1] += update.double().sum(dim=0)
                updates.append(update[donors])
            before.append(rows)
            if site < self.adapter.n_layers:
                if len(self.center) == site:
                    self.center.append(rows.mean(dim=0))
                # Near their mean, products of float32 keep their digits.
                z = rows - self.center[site]
                self.sums[site] += z.double().sum(dim=0)
                self.products[site] += z.T @ z

        self.adapter.run(batch.tokens, batch.mask, on_site)
        self.n += n_valid
        self.donors.append(torch.stack(updates))
        owner = torch.nonzero(batch.valid)[:, 0].numpy()[inside]
        self.groups.append(batch.group_hashes[owner])

    def finish(self) -> ResidualStatistics:
        shift = self.sums / self.n
        covariance = self.products / self.n - shift[:, :, None] * shift[:, None, :]
        mean = torch.stack(self.center).double() + shift
        variance = covariance.diagonal(dim1=1, dim2=2)
        factor = []
        for of_block in covariance:
            power, axes = torch.linalg.eigh(of_block)
            # Rounding leaves powers of empty directions a little below 0.
            factor.append(((axes * power.clamp(min=0.0).sqrt()) @ axes.T).float())
        return ResidualStatistics(
            deviation=variance.clamp(min=0.0).sqrt().float(),
            factor=torch.stack(factor),
            rms=(variance + mean**2).mean(dim=1).sqrt().float(),
            update_mean=(self.update_sums / self.n).float(),
            updates=torch.cat(self.donors, dim=1),
            groups=np.concatenate(self.groups),
            n_positions=self.n,
        )
