"""Activations of a bounded number of positions, collected once into a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.folds import stable_hash
from mspgt_lens.gathering import make_batch, make_batches
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
            for batch in make_batches(taken, None, _TOKENS_PER_BATCH):
                places = [chosen[names[i]] for i in batch.numbers]
                slots = np.concatenate([first_slot[i] + np.arange(sizes[i]) for i in batch.numbers])
                row = np.repeat(np.arange(len(places)), [len(p) for p in places])
                position = np.concatenate(places)
                self._keep_targets(batch.tokens, batch.mask, row, position, slots)
                self.next_token[slots] = batch.tokens.numpy()[row, position + 1]
                self.group[slots] = batch.groups[row]
                self._keep_rows(batch.tokens, batch.mask, row, position, slots, rows)
                bar.update(int(batch.mask.sum()))

    def _keep_targets(
        self, tokens: Tensor, mask: Tensor, row: np.ndarray, position: np.ndarray, slots: np.ndarray
    ) -> None:
        targets = self._targets(tokens, mask)
        index = torch.full(tokens.shape, -1)
        index[targets.read] = torch.arange(len(targets.values))
        future = targets.values.chunk(2, dim=1)[1].chunk(len(self.targets), dim=1)
        for values, part in zip(self.targets.values(), future, strict=True):
            values[slots] = part[index[row, position]].numpy()

    def _keep_rows(
        self,
        tokens: Tensor,
        mask: Tensor,
        row: np.ndarray,
        position: np.ndarray,
        slots: np.ndarray,
        rows: np.memmap,
    ) -> None:
        at = torch.from_numpy(row), torch.from_numpy(position)

        def on_site(site: int, residual: Tensor) -> None:
            if site not in self.plan.sites:
                return
            z = self.adapter.normalize(residual.detach()[at])
            if site not in self.center:
                spread = z.std(dim=0, correction=0)
                self.center[site] = z.mean(dim=0)
                self.spread[site] = torch.where(spread > 0, spread, 1.0)
            stored = ((z - self.center[site]) / self.spread[site]).half().cpu()
            if not bool(torch.isfinite(stored).all()):
                raise FloatingPointError(
                    f"activations at site {site} are NaN, infinite or beyond 65,504 deviations; "
                    "load the model in float32 or leave the prompt out"
                )
            rows[self.plan.sites.index(site), slots] = stored.numpy()

        self.adapter.run(tokens, mask, on_site)

    def _targets(self, tokens: Tensor, mask: Tensor) -> BatchTargets:
        return batch_targets(
            tokens,
            mask,
            features=self.features,
            special=self.special,
            bands=self.plan.bands,
            skip_first=self.plan.skip_first,
        )
