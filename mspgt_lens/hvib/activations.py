"""Activations of a bounded number of positions, collected once into a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.folds import stable_hash
from mspgt_lens.gathering import BatchPlan, FoldBatch, make_batch, plan_batches
from mspgt_lens.halving import Halving
from mspgt_lens.models import ModelAdapter, own_attention
from mspgt_lens.moments import N_FEATURES
from mspgt_lens.prompts import Prompt, count_tokens
from mspgt_lens.storage import read_result, reserve, write_result
from mspgt_lens.targets import BatchTargets, batch_targets, token_features

# Prompts are run until they hold so many times the positions that are kept: neighbors tell little
# that is new, so half of them and twice the text is the better sample.
SPREAD = 2
_TOKENS_PER_BATCH = 2048
_PROMPTS_AT_ONCE = 64
_KIND = "Activations"
_ROWS = "activations.rows"
_REST = "activations.safetensors"


@dataclass(frozen=True)
class CollectionPlan:
    """What is collected.

    Attributes:
        sites: Sites to read, in the order of the result.
        bands: Scale name to offsets.
        skip_first: Tokens at a prompt's beginning that are left out.
        max_positions: Positions kept at most.
        seed: Decides which.
    """

    sites: tuple[int, ...]
    bands: Mapping[str, tuple[int, int]]
    skip_first: int
    max_positions: int
    seed: int


@dataclass(frozen=True)
class Activations:
    """Positions at which every target and the next token are defined.

    Attributes:
        rows: Normalized residual, each coordinate about 0 with unit variance on the first batch; on
            disk, in half precision, shape ``[site, position, d_model]``.
        targets: Scale name to ``Y_s``, shape ``[position, feature]``.
        next_token: The token to be predicted.
        group: A hash of each position's group.
    """

    rows: np.memmap
    targets: dict[str, Float[np.ndarray, "position feature"]]
    next_token: Int[np.ndarray, " position"]
    group: UInt[np.ndarray, " position"]


def collect_activations(
    adapter: ModelAdapter,
    prompts: Sequence[Prompt],
    plan: CollectionPlan,
    folder: Path,
    *,
    fingerprint: str = "",
    progress: bool = True,
) -> Activations:
    """Run the model over the prompts and keep a sample of positions in ``folder``.

    Memory holds one batch; the file takes ``2 * max_positions * sites * d_model`` bytes. What is in
    the folder already is used again if it is of the same model, prompts and plan.

    Args:
        adapter: The model.
        prompts: Prompts; taken in random order until they hold enough positions.
        plan: What is collected.
        folder: Where the files go.
        fingerprint: Tells models, prompts and plans apart.
        progress: Show a progress bar.

    Raises:
        ValueError: If no position has every band, or the folder is of something else.
        FloatingPointError: If an activation is NaN or infinite.
        RuntimeError: Torch's own, if one prompt does not fit into memory.
    """
    if (folder / _REST).exists():
        return _reopen(folder, fingerprint)
    counts = count_tokens(adapter, prompts)
    collector = _Collector(adapter, plan, token_features(adapter.embedding(), counts, N_FEATURES))
    chosen = collector.choose(prompts)
    shape = (len(plan.sites), sum(map(len, chosen.values())), adapter.d_model)
    partial = folder / f"{_ROWS}.partial"
    reserve(partial, math.prod(shape) * np.dtype(np.float16).itemsize)
    rows = np.memmap(partial, dtype=np.float16, mode="r+", shape=shape)
    collector.run(prompts, chosen, rows, progress)
    rows.flush()
    del rows
    os.replace(partial, folder / _ROWS)
    arrays = {f"target.{name}": value for name, value in collector.targets.items()}
    arrays |= {"next_token": collector.next_token, "group": collector.group}
    header = {"fingerprint": fingerprint, "shape": shape, "scales": list(plan.bands)}
    write_result(folder / _REST, _KIND, header, arrays)
    return _reopen(folder, fingerprint)


def _reopen(folder: Path, fingerprint: str) -> Activations:
    header, arrays = read_result(folder / _REST, _KIND)
    if header["fingerprint"] != fingerprint:
        raise ValueError(
            f"folder: {folder} holds activations of another model, other prompts or other settings;"
            " give another folder, or empty this one"
        )
    shape = tuple(header["shape"])
    return Activations(
        rows=np.memmap(folder / _ROWS, dtype=np.float16, mode="r", shape=shape),
        targets={name: arrays[f"target.{name}"] for name in header["scales"]},
        next_token=arrays["next_token"],
        group=arrays["group"],
    )


@dataclass(frozen=True)
class _Read:
    """What the model made of one batch.

    Attributes:
        batch: The batch.
        row: The prompt of each position that is kept, by its place in the batch.
        position: Its place in that prompt.
        slots: Where it goes.
        z: Normalized residuals there, at every site, shape ``[position, d_model]``.
    """

    batch: FoldBatch
    row: Int[np.ndarray, " position"]
    position: Int[np.ndarray, " position"]
    slots: Int[np.ndarray, " position"]
    z: Mapping[int, Float[Tensor, "position d_model"]]


class _Collector:
    def __init__(
        self, adapter: ModelAdapter, plan: CollectionPlan, features: Float[Tensor, "vocab feature"]
    ) -> None:
        self.adapter, self.plan, self.features = adapter, plan, features
        self.special = torch.tensor(sorted(adapter.special_ids), dtype=torch.long)
        self.center: dict[int, Tensor] = {}
        self.spread: dict[int, Tensor] = {}
        self.targets: dict[str, np.ndarray] = {}
        self.next_token = np.zeros(0, dtype=np.int64)
        self.group = np.zeros(0, dtype=np.uint64)

    def choose(self, prompts: Sequence[Prompt]) -> dict[int, Int[np.ndarray, " position"]]:
        """Prompt to the positions that are kept of it; needs the tokens only."""
        rng = np.random.default_rng([self.plan.seed, stable_hash("positions") % 2**32])
        order = rng.permutation(len(prompts))
        candidates: list[np.ndarray] = []
        n_found = 0
        for start in range(0, len(order), _PROMPTS_AT_ONCE):
            numbers = [int(i) for i in order[start : start + _PROMPTS_AT_ONCE]]
            batch = make_batch([prompts[i] for i in numbers], 0, numbers)
            targets = self._targets(batch.tokens, batch.mask)
            row, position = torch.nonzero(targets.read & targets.answered).numpy().T
            candidates.append(np.stack([np.array(numbers)[row], position], axis=1))
            n_found += len(row)
            if n_found >= SPREAD * self.plan.max_positions:
                break
        places = np.concatenate(candidates)
        if not len(places):
            raise ValueError(
                f"prompts are too short for the bands {dict(self.plan.bands)}: no position has "
                "half of every band before and after it; use longer prompts, or smaller offsets"
            )
        if len(places) > self.plan.max_positions:
            places = rng.permutation(places)[: self.plan.max_positions]
        return {
            int(number): np.sort(places[places[:, 0] == number, 1])
            for number in np.unique(places[:, 0])
        }

    def run(
        self,
        prompts: Sequence[Prompt],
        chosen: Mapping[int, Int[np.ndarray, " position"]],
        rows: np.memmap,
        progress: bool,
    ) -> None:
        """Fill ``rows`` and everything beside them."""
        names = sorted(chosen)
        sizes = [len(chosen[number]) for number in names]
        first_slot = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        n_features = self.features.shape[1]
        self.targets = {
            name: np.zeros((rows.shape[1], n_features), dtype=np.float32)
            for name in self.plan.bands
        }
        self.next_token = np.zeros(rows.shape[1], dtype=np.int64)
        self.group = np.zeros(rows.shape[1], dtype=np.uint64)
        taken = [(prompts[number], 0) for number in names]
        total = sum(len(prompt.tokens) for prompt, _ in taken)

        def read(planned: BatchPlan) -> _Read:
            kept = [chosen[names[i]] for i in planned.numbers]
            return self._read(
                planned.batch(),
                row=np.repeat(np.arange(len(kept)), [len(positions) for positions in kept]),
                position=np.concatenate(kept),
                slots=np.concatenate(
                    [first_slot[i] + np.arange(sizes[i]) for i in planned.numbers]
                ),
            )

        halving = Halving()
        with (
            self.adapter.inference(),
            own_attention(self.adapter),
            tqdm(
                total=total,
                unit="tok",
                unit_scale=True,
                desc=self.adapter.name,
                disable=not progress,
            ) as bar,
        ):
            for planned in plan_batches(taken, None, _TOKENS_PER_BATCH):
                parts: Iterable[_Read] = halving.each(planned, read)
                if not self.center:
                    # The first batch decides as a whole, also where it came in parts.
                    parts = list(parts)
                    self._standardize(parts)
                for part in parts:
                    self._keep(part, rows)
                    bar.update(int(part.batch.mask.sum()))

    def _read(
        self, batch: FoldBatch, row: np.ndarray, position: np.ndarray, slots: np.ndarray
    ) -> _Read:
        at = torch.from_numpy(row), torch.from_numpy(position)
        z: dict[int, Tensor] = {}

        def on_site(site: int, residual: Tensor) -> None:
            if site in self.plan.sites:
                z[site] = self.adapter.normalize(residual.detach()[at]).cpu()

        self.adapter.run(batch.tokens, batch.mask, on_site)
        return _Read(batch, row, position, slots, z)

    def _standardize(self, parts: Sequence[_Read]) -> None:
        """Where coordinates are centered, and how much they vary, in one batch."""
        for site in self.plan.sites:
            z = torch.cat([part.z[site] for part in parts])
            spread = z.std(dim=0, correction=0)
            self.center[site] = z.mean(dim=0)
            self.spread[site] = torch.where(spread > 0, spread, 1.0)

    def _keep(self, part: _Read, rows: np.memmap) -> None:
        batch, slots = part.batch, part.slots
        targets = self._targets(batch.tokens, batch.mask)
        index = torch.full(batch.tokens.shape, -1)
        index[targets.read] = torch.arange(len(targets.values))
        future = targets.values.chunk(2, dim=1)[1].chunk(len(self.targets), dim=1)
        for values, own in zip(self.targets.values(), future, strict=True):
            values[slots] = own[index[part.row, part.position]].numpy()
        self.next_token[slots] = batch.tokens.numpy()[part.row, part.position + 1]
        self.group[slots] = batch.groups[part.row]
        for number, site in enumerate(self.plan.sites):
            stored = ((part.z[site] - self.center[site]) / self.spread[site]).half()
            if not bool(torch.isfinite(stored).all()):
                raise FloatingPointError(
                    f"activations at site {site} are NaN, infinite or beyond 65,504 deviations; "
                    "load the model in float32 or leave the prompt out"
                )
            rows[number, slots] = stored.numpy()

    def _targets(self, tokens: Tensor, mask: Tensor) -> BatchTargets:
        return batch_targets(
            tokens,
            mask,
            features=self.features,
            special=self.special,
            bands=self.plan.bands,
            skip_first=self.plan.skip_first,
        )
