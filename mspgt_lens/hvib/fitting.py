"""One fit of the H-VIB probe: from inputs and targets to the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from mspgt_lens.hvib.data import Classes, Split, reduce_inputs, whiten_target
from mspgt_lens.hvib.network import Network, NetworkPlan
from mspgt_lens.hvib.results import Grid, HvibFit
from mspgt_lens.hvib.scoring import Scored, score_network
from mspgt_lens.hvib.training import Samples, TrainingPlan, train
from mspgt_lens.storage import package_versions

# Looks at the stopping groups over the training.
LOOKS = 20
# Nats below its ceiling from which on a bound by contrast is too tight to trust.
NEAR_CEILING = 0.5


@dataclass(frozen=True)
class FitPlan:
    """Sizes of the probe and of its training; see :func:`~mspgt_lens.fit_hvib`.

    Raises:
        ValueError: If one is out of range; the message names it.
    """

    betas: Sequence[float]
    latent: int
    hidden: int
    width: int
    n_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def __post_init__(self) -> None:
        betas = tuple(float(beta) for beta in self.betas)
        if not betas or not all(0 < beta < np.inf for beta in betas):
            raise ValueError(f"betas must be at least one number above 0, got {self.betas!r}")
        if list(betas) != sorted(set(betas)):
            raise ValueError(f"betas must rise, got {self.betas!r}")
        object.__setattr__(self, "betas", betas)
        for name in ("latent", "hidden", "width", "n_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.learning_rate * self.weight_decay < 1:
            raise ValueError(
                "weight_decay must be at least 0 and less than 1 / learning_rate, got "
                f"{self.weight_decay}"
            )


@dataclass(frozen=True)
class FitJob:
    """What is fitted, and what the result says of where it comes from.

    Attributes:
        read: Gives the rows of one input, by its number in the order of the network.
        n_inputs: Number of inputs.
        targets: Finest scale first.
        classes: Classes of the next token, or None.
        groups: Group of every position.
        split: What every position is for.
        identity: Tells data sets apart.
        sites: See :class:`HvibFit`.
        taps: See :class:`HvibFit`.
        model_name: See :class:`HvibFit`.
        settings: What else decided the data.
    """

    read: Callable[[int], Float[np.ndarray, "position d"]]
    n_inputs: int
    targets: Mapping[str, Float[np.ndarray, "position feature"]]
    classes: Classes | None
    groups: Integer[np.ndarray, " position"]
    split: Split
    identity: str
    sites: tuple[int, ...]
    taps: Mapping[str, int] = field(default_factory=dict)
    model_name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def run_fit(job: FitJob, plan: FitPlan, folder: Path | None, seed: int, progress: bool) -> HvibFit:
    """Train, score and describe.

    Args:
        job: The data.
        plan: Sizes.
        folder: Where reduced inputs and checkpoints go; None keeps everything in memory.
        seed: Decides first weights, batches and noise.
        progress: Show a progress bar.
    """
    split = job.split
    samples, cost = _samples(job, plan.width, folder)
    network = _network(job, plan, samples, seed)
    stop, test = torch.from_numpy(split.stop), torch.from_numpy(split.test)
    best_step = train(
        network,
        samples,
        torch.from_numpy(split.train),
        stop,
        TrainingPlan(
            n_steps=plan.n_steps,
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            weight_decay=plan.weight_decay,
            evaluate_every=max(1, plan.n_steps // LOOKS),
            seed=seed,
        ),
        checkpoint=None if folder is None else folder / "checkpoint.safetensors",
        fingerprint=digest_of(job.identity, repr(plan), repr(seed)),
        progress=progress,
    )
    scored = score_network(network, samples, stop, test, job.groups[split.test], cost[test], seed)
    return _result(job, plan, scored, best_step, seed)


def _samples(
    job: FitJob, width: int, folder: Path | None
) -> tuple[Samples, Float[Tensor, " position"]]:
    """Reduced inputs and whitened targets, coarse to fine, and all targets' cost without z."""
    split, classes = job.split, job.classes
    path = None if folder is None else folder / "inputs.rows"
    z = reduce_inputs(job.read, job.n_inputs, width, split, path)
    coarsest_first = list(job.targets)[::-1]
    white, costs = zip(
        *(whiten_target(name, job.targets[name], split) for name in coarsest_first), strict=True
    )
    cost = torch.stack(costs).sum(0)
    if classes is not None:
        cost = cost - classes.log_probability[classes.labels]
    return Samples(z, list(white), None if classes is None else classes.labels), cost


def _network(job: FitJob, plan: FitPlan, samples: Samples, seed: int) -> Network:
    classes = job.classes
    return Network(
        NetworkPlan(
            n_inputs=job.n_inputs,
            width=samples.z.shape[2],
            betas=tuple(plan.betas),
            n_features=tuple(target.shape[1] for target in samples.targets),
            latent=plan.latent,
            hidden=plan.hidden,
            tapped=bool(job.taps),
            n_classes=0 if classes is None else len(classes.rows),
            rank=0 if classes is None else classes.rows.shape[1],
        ),
        None if classes is None else classes.rows,
        None if classes is None else classes.log_probability,
        seed=seed,
    )


def _result(
    job: FitJob, plan: FitPlan, scored: Scored, best_step: Int[np.ndarray, "row beta"], seed: int
) -> HvibFit:
    scales, classes = list(job.targets), job.classes

    def by_scale(grids: Sequence[Grid]) -> dict[str, Grid]:
        """Grids come coarse to fine; results run from fine to coarse."""
        return dict(zip(scales, grids[::-1], strict=True))

    return HvibFit(
        model_name=job.model_name,
        sites=job.sites,
        taps=job.taps,
        betas=tuple(plan.betas),
        rate=by_scale(scored.rate),
        total_rate=by_scale(scored.total_rate),
        relevance=by_scale(scored.relevance),
        information=by_scale(scored.information),
        token_relevance=scored.token_relevance,
        distortion=scored.distortion,
        free_energy=scored.free_energy,
        best_step=best_step,
        n_positions=job.split.counts(),
        n_groups=job.split.group_counts(job.groups),
        settings={
            **job.settings,
            **{name: value for name, value in vars(plan).items() if name != "betas"},
            "seed": seed,
            "fingerprint": job.identity,
            **({} if classes is None else {"share_of_classes": classes.share}),
        },
        versions=package_versions(),
        warnings=tuple(_notes(scored, scales[::-1])),
    )


def digest_of(*parts: Any) -> str:
    """A text that differs where any array or other part differs."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(repr((part.shape, part.dtype)).encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()


def _notes(scored: Scored, names: Sequence[str]) -> Iterator[str]:
    """What a reader has to know; names run from coarse to fine."""
    for name, grid in zip(names, scored.relevance, strict=True):
        if (grid.low <= 0).all():
            row, beta = np.unravel_index(int(grid.values.argmax()), grid.values.shape)
            yield (
                f"relevance at scale {name!r} cannot be told from 0 anywhere (at most "
                f"{grid.values[row, beta]:.3g} nats, 95% interval {grid.low[row, beta]:.3g} to "
                f"{grid.high[row, beta]:.3g}); more groups may be needed to see it"
            )
    for name, grid in zip(names, scored.information, strict=True):
        if grid.high.max() > scored.ceiling - NEAR_CEILING:
            yield (
                f"information at scale {name!r} comes near its ceiling of {scored.ceiling:.2f} "
                "nats, the logarithm of the positions contrasted: there may be more"
            )
