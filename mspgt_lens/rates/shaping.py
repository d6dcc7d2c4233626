"""What shapes a channel: covariances of activations, and the Fisher information of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import ModelAdapter, RecordedRun, differentiable, in_float64
from mspgt_lens.perturbation.batches import Batch, Batches
from mspgt_lens.processes import ALONE, Processes, Turns
from mspgt_lens.rates.windows import (
    Band,
    Plan,
    Recorded,
    Window,
    draw_windows,
    fitting,
    log_probabilities,
)

# Tokens whose graphs are kept at once: about 2 MB each in a model of 135 million weights.
_TOKENS_PER_GRAPH = 512
# Positions per coordinate that a covariance is estimated from, at the least.
_ROWS_PER_COORDINATE = 2


@dataclass(frozen=True)
class Shape:
    """One site as the shaping prompts show it.

    Attributes:
        mean: Mean of the residual stream over valid positions.
        covariance: Its covariance.
        fisher: Band to the Fisher information of one prediction about the residuals at all of the
            band's positions before it, added up over them: noise of covariance N, drawn anew for
            each of these positions, costs ``1/2 tr(F N)`` where it is small.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    fisher: Mapping[str, Float[Tensor, "d d"]]


def find_shapes(
    adapter: ModelAdapter, batches: Batches, plan: Plan, bar: Any, processes: Processes = ALONE
) -> dict[int, Shape]:
    """Covariance and Fisher information at every site, from one pass over the shaping prompts.

    Args:
        adapter: The model.
        batches: The shaping prompts, the same in every process.
        plan: What is measured.
        bar: Moves on by one for every window.
        processes: Those that share the work, and all end with the same.

    Raises:
        CannotMeasure: If there are too few positions for a covariance, or the model cannot be
            differentiated or resumed.
        PeerError: If another process failed.
        RuntimeError: If a batch does not fit into memory.
    """
    least = _ROWS_PER_COORDINATE * adapter.d_model
    if batches.n_positions < least:
        raise CannotMeasure(
            f"prompts need at least {least} positions ({_ROWS_PER_COORDINATE} for each of the "
            f"{adapter.d_model} coordinates of {adapter.name}) in the half of the groups that "
            f"shapes the channels, got {batches.n_positions}: give more or longer prompts"
        )
    own = _own_scales(batches, plan, processes)
    sums: dict[int, _Sums] = {}
    with fitting(batches.batches), adapter.inference():
        runs = Recorded(adapter, [batch for batch, _ in own])
        for (batch, run), (_, scales) in zip(runs, own, strict=True):
            sums = sums or _begun(plan, processes, batch, run)
            if next(iter(plan.bands)) in scales:
                valid = batch.valid.to(run.mask.device)
                for site in plan.sites:
                    sums[site].add_rows(run.residual[site][valid])
            for scale in scales:
                n_targets = plan.shaping_targets(scale)
                for part in draw_windows(run, batch, plan, scale, n_targets, "shaping"):
                    processes.check()
                    for prompts, found in gradients(run, batch, part, plan.sites, plan.seed):
                        touched = part.touched[prompts.cpu()]
                        for site in plan.sites:
                            sums[site].add_gradients(scale, found[site][touched], len(prompts))
                    bar.update()
    sums = sums or _begun(plan, processes)
    for of_site in sums.values():
        of_site.merge_over_(processes)
    return {site: of_site.finish() for site, of_site in sums.items()}


def _own_scales(
    batches: Batches, plan: Plan, processes: Processes
) -> list[tuple[Batch, list[str]]]:
    """Which scales of which batch this process differentiates; the first are process 0's."""
    turns, own = Turns(processes), []
    for batch in batches:
        tokens = batch.tokens.numel()
        work = {name: b * plan.shaping_targets(name) for name, (_, b) in plan.bands.items()}
        scales = [name for name in plan.bands if turns.is_mine(tokens * work[name])]
        if scales:
            own.append((batch, scales))
    return own


def _begun(
    plan: Plan,
    processes: Processes,
    batch: Batch | None = None,
    run: RecordedRun | None = None,
) -> dict[int, _Sums]:
    """Sums about the mean of the first batch, which process 0 has."""
    centers = {}
    if batch is not None and run is not None:
        for site in plan.sites:
            rows = run.residual[site][batch.valid.to(run.mask.device)]
            centers[str(site)] = rows.float().mean(dim=0).cpu().numpy()
    given = processes.give(centers, 0)
    return {site: _Sums(torch.from_numpy(given[str(site)]), plan.bands) for site in plan.sites}


class _Sums:
    """Second moments of one site about a center, on the CPU in float64."""

    def __init__(self, center: Float[Tensor, " d"], bands: Mapping[str, Band]) -> None:
        self.n_rows, self.n_targets = 0, dict.fromkeys(bands, 0)
        self.center = center
        width = len(center)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)
        self.fisher = {name: torch.zeros_like(self.products) for name in bands}

    def add_rows(self, rows: Float[Tensor, "row d"]) -> None:
        # Near their mean, products of float32 keep their digits.
        about = rows.float() - self.center.to(rows.device)
        self.n_rows += len(rows)
        self.total += in_float64(about).sum(dim=0).cpu()
        self.products += (about.T @ about).cpu()

    def add_gradients(self, band: str, rows: Float[Tensor, "row d"], n_targets: int) -> None:
        self.n_targets[band] += n_targets
        self.fisher[band] += (rows.T @ rows).cpu()

    def merge_over_(self, processes: Processes) -> None:
        """Put the sums of all processes, about the same center, in the place of one's own."""
        counts = torch.tensor([self.n_rows, *self.n_targets.values()])
        for sums in (counts, self.total, self.products, *self.fisher.values()):
            processes.sum_(sums)
        self.n_rows, *n_targets = counts.tolist()
        self.n_targets = dict(zip(self.n_targets, n_targets, strict=True))

    def finish(self) -> Shape:
        shift = self.total / self.n_rows
        return Shape(
            mean=self.center.double() + shift,
            covariance=self.products / self.n_rows - torch.outer(shift, shift),
            fisher={name: total / self.n_targets[name] for name, total in self.fisher.items()},
        )


def gradients(
    run: RecordedRun, batch: Batch, part: Window, sites: Sequence[int], seed: int
) -> Iterator[tuple[Int[Tensor, " row"], dict[int, Float[Tensor, "row length d_model"]]]]:
    """Gradients of the log-probability of one sampled token, at every site before it.

    Args:
        run: Of the batch, prepared.
        batch: The prompts.
        part: The position whose prediction the token is sampled from, and how far back to go.
        sites: Where to differentiate.
        seed: Decides the samples, together with prompt and window.

    Yields:
        Some prompts, and for each site their gradients at the window's positions.
    """
    first = min(sites)
    every = torch.arange(len(batch.tokens), device=run.mask.device)
    for prompts in torch.split(every, max(1, _TOKENS_PER_GRAPH // part.touched.shape[1])):
        with differentiable(run.adapter, "rate_distortion"):
            residual = run.residual[first][prompts, part.start : part.target + 1].clone()
            seen = {first: residual.requires_grad_()}
            for block in range(first, run.adapter.n_layers):
                seen[block + 1] = run.run_block(block, seen[block], prompts, part.start)
            scores = log_probabilities(run, seen[run.adapter.n_layers][:, -1])
            keys = [batch.keys[i] for i in prompts.tolist()]
            token = _sampled(scores.detach(), keys, part.target, part.number, seed)
            chosen = scores.gather(1, token[:, None]).sum()
            found = torch.autograd.grad(chosen, [seen[site] for site in sites])
        yield prompts, dict(zip(sites, (one.float() for one in found), strict=True))


def _sampled(
    scores: Float[Tensor, "row vocab"], keys: Sequence[int], *seeds: object
) -> Int[Tensor, " row"]:
    """One token from each row of log-probabilities."""
    drawn = [
        torch.rand(
            1,
            generator=torch.Generator().manual_seed(stable_hash(key, "token", *seeds) % 2**63),
            dtype=torch.float64,
        )
        for key in keys
    ]
    upto = in_float64(scores).exp().cpu().cumsum(dim=1)
    # A share of the whole, which rounding keeps from being exactly 1.
    token = torch.searchsorted(upto, torch.cat(drawn)[:, None] * upto[:, -1:], right=True)[:, 0]
    return token.to(scores.device)
