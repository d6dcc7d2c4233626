"""Held-out scores of a trained H-VIB probe, with intervals over groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from mspgt_lens.folds import stable_hash
from mspgt_lens.hvib.network import Network
from mspgt_lens.hvib.results import Grid
from mspgt_lens.hvib.training import Samples, draw_noise
from mspgt_lens.statistics import cluster_interval

# Draws of the latents' noise that every held-out position is scored with.
N_DRAWS = 4
# Positions that are told apart by contrast; the logarithm is the ceiling of the information.
CONTRASTED = 512
# Powers of the decoder's likelihood that are tried as critics; 0 tells nothing.
SHARPNESS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
_SCORED_AT_ONCE = 256

GUARANTEES = {
    "rate": "KL from this scale's encoder to its prior given the next coarser t, held out. All "
    "rates together are an upper bound on the information that the latents take from z.",
    "total_rate": "Rates of this scale and all coarser ones: an upper bound on the information "
    "that these latents take from z.",
    "relevance": "Held-out log-likelihood of Y_s given the latents beyond the best Gaussian "
    "without them: usable information. A variational lower bound on Shannon's where Y_s itself is "
    "Gaussian; elsewhere it may exceed that by what a Gaussian misses of Y_s.",
    "information": "InfoNCE with a power of the decoder as critic, held out: a lower bound on the "
    "latents' Shannon information about Y_s, which cannot exceed {ceiling:.2f} nats.",
    "token_relevance": "Held-out log-likelihood of the next token's class given the latents beyond "
    "its frequency: a variational lower bound on the information about the next token, up to how "
    "well the frequencies are known.",
    "distortion": "Held-out negative log-likelihood of the next token's class and of every Y_s "
    "given the latents; of densities, so only differences mean something.",
    "free_energy": "Distortion plus the sum of all rates over beta, held out: an upper bound on "
    "the least that any encoder of this site reaches at this beta.",
}


@dataclass(frozen=True)
class Scored:
    """Grids of every quantity; lists run over scales, coarse to fine.

    ``ceiling`` is the most that ``information`` can say (nats).
    """

    rate: list[Grid]
    total_rate: list[Grid]
    relevance: list[Grid]
    information: list[Grid]
    token_relevance: Grid | None
    distortion: Grid
    free_energy: Grid
    ceiling: float


def score_network(
    network: Network,
    samples: Samples,
    stop: Int[Tensor, " stop"],
    index: Int[Tensor, " test"],
    groups: Integer[np.ndarray, " test"],
    cost_without: Float[Tensor, " test"],
    seed: int,
) -> Scored:
    """Score the positions of ``index``.

    Args:
        network: The trained probe.
        samples: Everything.
        stop: Positions that training has not seen; they choose the contrast's sharpness.
        index: Positions that neither training nor stopping has seen.
        groups: Their groups.
        cost_without: Negative log-likelihood of all targets without z at each of them (nats).
        seed: Decides the noise and which positions are contrasted with which.
    """
    generator = torch.Generator().manual_seed(stable_hash(seed, "test") % 2**63)
    kl, gain, token_gain = _mean_scores(network, samples, index, generator)
    n_blocks = -(-len(index) // CONTRASTED)
    ceiling = float(np.log(-(-len(index) // n_blocks)))
    sharpness = _best_sharpness(network, samples, stop, generator)
    contrast = _contrast(network, samples, index, sharpness, generator)[0]
    price = 1 / torch.tensor(network.plan.betas, dtype=torch.float64)[:, None]
    distortion = cost_without.double() - gain.sum(0)
    if token_gain is not None:
        distortion = distortion - token_gain

    def grid(name: str, scores: Float[Tensor, "row beta test"]) -> Grid:
        points = scores.reshape(-1, scores.shape[-1]).T.numpy()
        value, low, high = (
            part.reshape(network.plan.cells) for part in cluster_interval(points, groups)
        )
        return Grid(value, low, high, "nats", GUARANTEES[name].format(ceiling=ceiling))

    return Scored(
        rate=[grid("rate", part) for part in kl],
        total_rate=[grid("total_rate", part) for part in kl.cumsum(0)],
        relevance=[grid("relevance", part) for part in gain],
        information=[grid("information", part) for part in contrast],
        token_relevance=None if token_gain is None else grid("token_relevance", token_gain),
        distortion=grid("distortion", distortion),
        free_energy=grid("free_energy", distortion + kl.sum(0) * price),
        ceiling=ceiling,
    )


def _mean_scores(
    network: Network, samples: Samples, index: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per position, averaged over draws of the noise, float64."""
    parts = []
    with torch.no_grad():
        for part in torch.split(index, _SCORED_AT_ONCE):
            taken = samples.take(part)
            draws = [
                network(*taken, draw_noise(network, len(part), generator, samples.z.dtype))
                for _ in range(N_DRAWS)
            ]
            kl = torch.stack([draw.kl for draw in draws]).double().mean(0)
            gain = torch.stack([draw.gain for draw in draws]).double().mean(0)
            tokens = [draw.token_gain for draw in draws if draw.token_gain is not None]
            parts.append((kl, gain, torch.stack(tokens).double().mean(0) if tokens else None))
    kls, gains, told = zip(*parts, strict=True)
    token_gain = None if told[0] is None else torch.cat(told, dim=-1)
    return torch.cat(kls, dim=-1), torch.cat(gains, dim=-1), token_gain


def _contrast(
    network: Network,
    samples: Samples,
    index: Tensor,
    sharpness: Float[Tensor, "#sharpness scale row beta"],
    generator: torch.Generator,
) -> Float[Tensor, "sharpness scale row beta test"]:
    """``a log p(y_i | t_i) - log mean_j p(y_i | t_j)^a`` over blocks of positions, i among the j.

    With any a this is a critic, and so a bound; a decoder that is too sure of itself needs a small
    one. Sharpness 0 gives 0.
    """
    n_blocks = -(-len(index) // CONTRASTED)
    order = torch.randperm(len(index), generator=generator)
    out = torch.zeros((*sharpness.shape, len(index)), dtype=torch.float64)
    with torch.no_grad():
        for places in order.tensor_split(n_blocks):
            z, targets, _ = samples.take(index[places])
            noise = draw_noise(network, len(places), generator, samples.z.dtype)
            seen = network.draw(z, noise)
            for scale, target in enumerate(targets):
                ahead, code = network.compare(scale, seen, target)
                for row, (a, c) in enumerate(zip(ahead, code, strict=True)):
                    # The square of a is the same for every t, so it cancels.
                    fit = a @ c.mT - c.square().sum(-1)[:, None] / 2
                    for number, power in enumerate(sharpness[:, scale, row]):
                        sharp = fit * power[:, None, None]
                        score = sharp.diagonal(dim1=1, dim2=2) - sharp.logsumexp(2)
                        out[number, scale, row, :, places] = score.double() + np.log(len(places))
    return out


def _best_sharpness(
    network: Network, samples: Samples, stop: Tensor, generator: torch.Generator
) -> Float[Tensor, "1 scale row beta"]:
    """The sharpness that tells most on a few of the stopping positions, for every cell."""
    grid = torch.tensor(SHARPNESS, dtype=samples.z.dtype)
    cells = (network.plan.n_scales, *network.plan.cells)
    chosen = stop[torch.randperm(len(stop), generator=generator)[:CONTRASTED]]
    tried = grid[:, None, None, None].expand(-1, *cells)
    score = _contrast(network, samples, chosen, tried, generator).mean(-1)
    return grid[score.argmax(dim=0)][None]
