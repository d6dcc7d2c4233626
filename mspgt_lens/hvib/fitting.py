"""One fit of the H-VIB probe: from inputs and targets to the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer

from mspgt_lens.hvib.data import Classes, Split, reduce_inputs, whiten_target
from mspgt_lens.hvib.network import Network, NetworkPlan
from mspgt_lens.hvib.results import HvibFit
from mspgt_lens.hvib.scoring import Scored, score_network
from mspgt_lens.hvib.training import Samples, TrainingPlan, train
from mspgt_lens.storage import package_versions

# Looks at the stopping groups over the training.
LOOKS = 20
# Nats below its ceiling from which on a bound by contrast is too tight to trust.
NEAR_CEILING = 0.5


@dataclass(frozen=True)
class FitPlan:
    """Sizes of the probe and of its training; see :func:`~mspgt_lens.fit_hvib`."""

    betas: tuple[float, ...]
    latent: int
    hidden: int
    width: int
    n_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def check(self) -> None:
        """Raise a ``ValueError`` that names what is out of range."""
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
    """What is fitted: inputs in the order of the network, targets finest first."""

    read: Callable[[int], Float[np.ndarray, "position d"]]
    n_inputs: int
    targets: Mapping[str, Float[np.ndarray, "position feature"]]
    classes: Classes | None
    groups: Integer[np.ndarray, " position"]
    split: Split
    tapped: bool


def run_fit(
    job: FitJob,
    plan: FitPlan,
    folder: Path | None,
    identity: str,
    seed: int,
    progress: bool,
    *,
    model_name: str,
    sites: tuple[int, ...],
    taps: Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
) -> HvibFit:
    """Train, score and describe.

    Args:
        job: The data.
        plan: Sizes.
        folder: Where reduced inputs and checkpoints go; None keeps everything in memory.
        identity: Tells data sets apart.
        seed: Decides first weights, batches and noise.
        progress: Show a progress bar.
        model_name, sites, taps: See :class:`HvibFit`.
        settings: What else decided the data.
    """
    split, names = job.split, list(job.targets)[::-1]
    z = reduce_inputs(
        job.read,
        job.n_inputs,
        plan.width,
        split,
        None if folder is None else folder / "inputs.rows",
    )
    white, costs = zip(
        *(whiten_target(name, job.targets[name], split) for name in names), strict=True
    )
    cost = torch.stack(costs).sum(0)
    classes = job.classes
    if classes is not None:
        cost = cost - classes.log_probability[classes.labels]
    samples = Samples(z, list(white), None if classes is None else classes.labels)
    network = Network(
        NetworkPlan(
            n_inputs=job.n_inputs,
            width=z.shape[2],
            betas=plan.betas,
            n_features=tuple(target.shape[1] for target in white),
            latent=plan.latent,
            hidden=plan.hidden,
            tapped=job.tapped,
            n_classes=0 if classes is None else len(classes.rows),
            rank=0 if classes is None else classes.rows.shape[1],
        ),
        None if classes is None else classes.rows,
        None if classes is None else classes.log_probability,
        seed=seed,
    )
    stop = torch.from_numpy(split.stop)
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
        fingerprint=digest_of(identity, repr(plan), repr(seed)),
        progress=progress,
    )
    test = torch.from_numpy(split.test)
    scored = score_network(network, samples, stop, test, job.groups[split.test], cost[test], seed)
    finest_first = names[::-1]
    return HvibFit(
        model_name=model_name,
        sites=sites,
        taps=taps,
        betas=plan.betas,
        rate=dict(zip(finest_first, scored.rate[::-1], strict=True)),
        total_rate=dict(zip(finest_first, scored.total_rate[::-1], strict=True)),
        relevance=dict(zip(finest_first, scored.relevance[::-1], strict=True)),
        information=dict(zip(finest_first, scored.information[::-1], strict=True)),
        token_relevance=scored.token_relevance,
        distortion=scored.distortion,
        free_energy=scored.free_energy,
        best_step=best_step,
        n_positions=split.counts(),
        n_groups=split.group_counts(job.groups),
        settings={
            **(settings or {}),
            **{name: value for name, value in vars(plan).items() if name != "betas"},
            "seed": seed,
            "fingerprint": identity,
            **({} if classes is None else {"share_of_classes": classes.share}),
        },
        versions=package_versions(),
        warnings=tuple(_notes(scored, names)),
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
