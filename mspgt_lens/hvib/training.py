"""Training of the H-VIB probe: all cells at once, each at its own best step, resumable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.folds import stable_hash
from mspgt_lens.hvib.network import Network, Scores, cell_mask
from mspgt_lens.storage import read_result, write_result

# Share of the steps over which the price of information rises to its full height: a latent that
# has to pay before it is of use never comes to be used.
WARM_UP = 0.2
# Share of a batch whose next token is decoded, the dearest part of a step.
DECODED_SHARE = 0.25
# Stopping positions looked at, at most, drawn from all stopping groups.
LOOKED_AT = 4096
_EVALUATED_AT_ONCE = 256
_KIND = "HvibCheckpoint"
# What the optimizer keeps of each parameter.
_KEPT = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Samples:
    """What the probe is trained and tested on.

    Attributes:
        z: Input coordinates, shape ``[position, input, width]``; may lie on disk.
        targets: Whitened targets of each scale, coarse to fine.
        labels: Class of the next token, or None.
    """

    z: Float[Tensor, "position input width"]
    targets: list[Float[Tensor, "position feature"]]
    labels: Int[Tensor, " position"] | None

    def take(self, index: Int[Tensor, " chosen"]) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Inputs first, targets and labels of some positions."""
        z = self.z[index].transpose(0, 1)
        labels = None if self.labels is None else self.labels[index]
        return z, [target[index] for target in self.targets], labels


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast.

    Attributes:
        n_steps: Steps; none is left out, since cells go on improving while the rate falls to 0.
        batch_size: Positions per step.
        learning_rate: Of Adam at the start; it falls to 0 along a half cosine.
        weight_decay: Share of the learning rate by which the maps shrink at each step.
        evaluate_every: Steps between two looks at the stopping groups.
        seed: Decides batches and noise.
    """

    n_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    evaluate_every: int
    seed: int


@dataclass
class _State:
    """Everything that a resumed run needs."""

    step: int
    best: dict[str, Tensor]
    best_loss: Float[Tensor, "row beta"]
    best_step: Int[Tensor, "row beta"]


def train(
    network: Network,
    samples: Samples,
    train_index: Int[Tensor, " train"],
    stop_index: Int[Tensor, " stop"],
    plan: TrainingPlan,
    *,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
) -> Int[np.ndarray, "row beta"]:
    """Train every cell and leave in it the parameters that did best on the stopping positions.

    Batches and noise are drawn anew from the seed and the step alone, and are the same in every
    cell: a cell comes out the same alone, among others, and after an interruption.

    Returns:
        The step at which each cell was best.
    """
    trainer = _Trainer(network, samples, plan)
    if len(stop_index) > LOOKED_AT:
        generator = torch.Generator().manual_seed(stable_hash(plan.seed, "looks") % 2**63)
        stop_index = stop_index[torch.randperm(len(stop_index), generator=generator)[:LOOKED_AT]]
    state = _load(checkpoint, fingerprint, network, trainer.optimizer) or trainer.begin()
    with tqdm(total=plan.n_steps, initial=state.step, desc="H-VIB", disable=not progress) as bar:
        while state.step < plan.n_steps:
            until = min(state.step + plan.evaluate_every, plan.n_steps)
            while state.step < until:
                trainer.advance(state, train_index)
                bar.update()
            trainer.keep_best(state, stop_index)
            if checkpoint is not None:
                _save(checkpoint, fingerprint, network, trainer.optimizer, state)
    with torch.no_grad():
        for name, value in network.parameters.items():
            value.copy_(state.best[name])
    steps: np.ndarray = state.best_step.numpy()
    return steps


def objective(scores: Scores, price: Float[Tensor, " beta"]) -> Float[Tensor, "row beta"]:
    """Free energy less that of ignoring z: ``sum KL * price - gains``, mean over positions."""
    cost = scores.kl.sum(0).mean(-1) * price - scores.gain.sum(0).mean(-1)
    return cost if scores.token_gain is None else cost - scores.token_gain.mean(-1)


def draw_noise(
    network: Network, n_positions: int, generator: torch.Generator, dtype: torch.dtype
) -> Float[Tensor, "scale position latent"]:
    """One draw of every scale's noise, the same for all cells."""
    shape = (network.plan.n_scales, n_positions, network.plan.latent)
    return torch.randn(shape, generator=generator, dtype=dtype)


class _Trainer:
    def __init__(self, network: Network, samples: Samples, plan: TrainingPlan) -> None:
        self.network, self.samples, self.plan = network, samples, plan
        self.dtype = samples.z.dtype
        self.price = 1 / torch.tensor(network.plan.betas, dtype=self.dtype)
        # Elementwise, so that no cell feels another (Loshchilov and Hutter 2019).
        groups: list[dict[str, Any]] = [
            {
                "params": [v for n, v in network.parameters.items() if _shrinks(n) == shrinks],
                "weight_decay": plan.weight_decay if shrinks else 0.0,
            }
            for shrinks in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, foreach=True)

    def begin(self) -> _State:
        """The best so far is to ignore z: no rate and no gain, exactly."""
        cells = self.network.plan.cells
        return _State(
            step=0,
            best=self.network.ignorant(),
            best_loss=torch.zeros(cells, dtype=torch.float64),
            best_step=torch.zeros(cells, dtype=torch.long),
        )

    def advance(self, state: _State, train_index: Tensor) -> None:
        """One step of Adam in every cell."""
        plan, network = self.plan, self.network
        generator = torch.Generator().manual_seed(stable_hash(plan.seed, state.step) % 2**63)
        drawn = torch.randint(len(train_index), (plan.batch_size,), generator=generator)
        z, targets, labels = self.samples.take(train_index[drawn])
        if labels is not None:
            labels = labels[: math.ceil(DECODED_SHARE * plan.batch_size)]
        noise = draw_noise(network, plan.batch_size, generator, self.dtype)
        warmth = min(1.0, (state.step + 1) / (WARM_UP * plan.n_steps))
        loss = objective(network(z, targets, labels, noise), self.price * warmth).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(state.step)
        self.optimizer.step()
        state.step += 1

    def _rate(self, step: int) -> float:
        """Half a cosine, from the full rate to 0."""
        return self.plan.learning_rate * (1 + math.cos(math.pi * step / self.plan.n_steps)) / 2

    def keep_best(self, state: _State, stop_index: Tensor) -> None:
        """Look at the stopping positions, cell by cell."""
        loss = self._stopping_loss(stop_index)
        if not torch.isfinite(loss).all():
            row, beta = (int(i) for i in torch.nonzero(~torch.isfinite(loss))[0])
            raise FloatingPointError(
                f"the probe diverged at input {row}, beta {self.network.plan.betas[beta]}, step "
                f"{state.step}: lower learning_rate ({self.plan.learning_rate})"
            )
        better = loss < state.best_loss
        state.best_loss = torch.where(better, loss, state.best_loss)
        state.best_step = torch.where(better, state.step, state.best_step)
        for name, value in self.network.parameters.items():
            mask = cell_mask(name, value, better)
            torch.where(mask, value.detach(), state.best[name], out=state.best[name])

    def _stopping_loss(self, stop_index: Tensor) -> Float[Tensor, "row beta"]:
        total = torch.zeros(self.network.plan.cells, dtype=torch.float64)
        generator = torch.Generator().manual_seed(stable_hash(self.plan.seed, "stop") % 2**63)
        with torch.no_grad():
            for part in torch.split(stop_index, _EVALUATED_AT_ONCE):
                noise = draw_noise(self.network, len(part), generator, self.dtype)
                scores = self.network(*self.samples.take(part), noise)
                total += objective(scores, self.price).double() * len(part)
        return total / len(stop_index)


def _shrinks(name: str) -> bool:
    """Maps shrink; offsets and spreads, which say what is known without z, do not."""
    return name in ("enter", "inner", "leave", "prior", "read") or name.startswith("decode")


def _save(
    path: Path, fingerprint: str, network: Network, optimizer: torch.optim.AdamW, state: _State
) -> None:
    arrays = {
        "best_loss": state.best_loss.numpy(),
        "best_step": state.best_step.numpy(),
    }
    for name, value in network.parameters.items():
        arrays[f"parameter.{name}"] = value.detach().numpy()
        arrays[f"best.{name}"] = state.best[name].numpy()
        for part in _KEPT:
            arrays[f"{part}.{name}"] = optimizer.state[value][part].numpy()
    write_result(path, _KIND, {"fingerprint": fingerprint, "step": state.step}, arrays)


def _load(
    path: Path | None, fingerprint: str, network: Network, optimizer: torch.optim.AdamW
) -> _State | None:
    if path is None or not path.exists():
        return None
    header, arrays = read_result(path, _KIND)
    if header["fingerprint"] != fingerprint:
        raise ValueError(
            f"folder: {path} is of other data or settings; give another folder, or remove it to "
            "begin anew"
        )
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    with torch.no_grad():
        for name, value in network.parameters.items():
            value.copy_(tensors[f"parameter.{name}"])
            optimizer.state[value] = {
                "step": torch.tensor(float(header["step"])),
                **{part: tensors[f"{part}.{name}"] for part in _KEPT},
            }
    return _State(
        step=header["step"],
        best={name: tensors[f"best.{name}"] for name in network.parameters},
        best_loss=tensors["best_loss"],
        best_step=tensors["best_step"],
    )
