"""Channels run at a site, and how far the predictions move, target by target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import ModelAdapter, RecordedRun
from mspgt_lens.perturbation.batches import Batch
from mspgt_lens.perturbation.responding import divergences
from mspgt_lens.processes import ALONE, Processes
from mspgt_lens.products import faster_layers
from mspgt_lens.rates.channel import Channel, channel_rate
from mspgt_lens.rates.windows import (
    Plan,
    Recorded,
    Window,
    draw_windows,
    fitting,
    log_probabilities,
)


@dataclass(frozen=True)
class Installed:
    """A channel in its place.

    Attributes:
        site: The site whose residual goes through it.
        scale: The band whose positions before a target go through it.
        channel: The channel.
    """

    site: int
    scale: str
    channel: Channel


@dataclass(frozen=True)
class Reading:
    """What one channel did.

    Attributes:
        rate: What it passes on at most of the activations that went through it, in nats each.
        kl: KL divergence from the clean prediction to the changed one, in nats, for every target
            whose band holds a valid position.
        groups: The group of each target.
    """

    rate: float
    kl: Float[np.ndarray, " target"]
    groups: Int[np.ndarray, " target"]


def measure(
    adapter: ModelAdapter,
    runs: Recorded,
    installed: Sequence[Installed],
    plan: Plan,
    bar: Any,
    processes: Processes = ALONE,
) -> list[Reading]:
    """Run every channel on its own and read the predictions after its band.

    All channels see the same targets, and those of one site and scale the same independent draws.

    Args:
        adapter: The model.
        runs: Of the prompts to measure on.
        installed: The channels.
        plan: What is measured.
        bar: Moves on by one for every channel and window.
        processes: Those that measure meanwhile, each channels of its own.

    Raises:
        FloatingPointError: If activations or logits are NaN or infinite.
        PeerError: If another process failed.
        RuntimeError: If a batch does not fit into memory.
    """
    sums = [_Sums(one) for one in installed]
    by_scale: dict[str, list[_Sums]] = {}
    for one in sums:
        by_scale.setdefault(one.installed.scale, []).append(one)
    if not installed:
        return []
    with fitting(runs.batches), adapter.inference(), faster_layers():
        for batch, run in runs:
            for scale, here in by_scale.items():
                n_targets = plan.measured_targets(scale)
                for part in draw_windows(run, batch, plan, scale, n_targets, "measuring"):
                    processes.check()
                    clean = log_probabilities(run, run.residual[-1][:, part.target])
                    for one in here:
                        one.add(run, batch, part, clean, plan.seed)
                        bar.update()
    return [one.finish() for one in sums]


class _Sums:
    """What one channel has done so far."""

    def __init__(self, installed: Installed) -> None:
        self.installed = installed
        self.squares = torch.zeros(len(installed.channel.kept), dtype=torch.float64)
        self.n_rows = 0
        self.kl: list[np.ndarray] = []
        self.groups: list[np.ndarray] = []

    def add(
        self,
        run: RecordedRun,
        batch: Batch,
        part: Window,
        clean: Float[Tensor, "prompt vocab"],
        seed: int,
    ) -> None:
        site, channel = self.installed.site, self.installed.channel
        touched = part.touched.to(run.mask.device)
        residual = run.residual[site][:, part.start : part.target + 1].clone()
        coordinates = channel.coordinates(residual[touched].float())
        self.squares += coordinates.square().sum(dim=0).cpu().double()
        self.n_rows += len(coordinates)
        normal = self._normal(batch, part, seed).to(coordinates.device)
        residual[touched] = channel.pass_on(coordinates, normal).to(residual.dtype)
        every = torch.arange(len(batch.tokens), device=run.mask.device)
        for block in range(site, run.adapter.n_layers):
            residual = run.run_block(block, residual, every, part.start)
        moved = divergences(clean, log_probabilities(run, residual[:, -1]))
        some = part.touched.any(dim=1).numpy()
        self.kl.append(moved.cpu().double().numpy()[some])
        self.groups.append(batch.groups[some])

    def finish(self) -> Reading:
        if not self.n_rows:
            raise CannotMeasure(
                f"prompts hold nothing but special tokens at the offsets of bands"
                f"[{self.installed.scale!r}] before the targets that were drawn: give more prompts"
            )
        power = (self.squares / self.n_rows).numpy()
        return Reading(
            channel_rate(self.installed.channel.kept, power),
            np.concatenate(self.kl),
            np.concatenate(self.groups),
        )

    def _normal(self, batch: Batch, part: Window, seed: int) -> Float[Tensor, "row k"]:
        """Standard normal numbers for every position of the band, prompt by prompt."""
        place = part.target, part.number, self.installed.site, self.installed.scale, seed
        return torch.cat(
            [
                torch.randn(
                    count,
                    len(self.squares),
                    generator=torch.Generator().manual_seed(stable_hash(key, *place) % 2**63),
                )
                for key, count in zip(batch.keys, part.touched.sum(dim=1).tolist(), strict=True)
            ]
        )
