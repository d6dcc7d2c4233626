"""Token processes with known information at every offset, and activations that carry parts of it.

``Made`` stands in for a model: its activations are built from the tokens, and everything downstream
of the forward pass is the package's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mspgt_lens import gathering
from mspgt_lens import moments as sums
from mspgt_lens.gathering import add_batch, make_batches
from mspgt_lens.information.lens import ridge_lens_relevance
from mspgt_lens.information.readers import read_targets
from mspgt_lens.information.sampled import SampledReadings
from mspgt_lens.information.tokens import TokenReading
from mspgt_lens.models import ModelAdapter
from mspgt_lens.moments import Moments, plan_moments
from mspgt_lens.prompts import Prompt

N_TOKENS, HALF, N_POS, N_FOLDS = 16, 16, 40, 5
OFFSETS = (1, 2, 4)
BANDS = {str(offset): (offset, offset) for offset in OFFSETS}
# Sites carry one token each, so many places from the position; the last is the prediction. Few
# enough that each has a say in the choice of ridge strengths.
BACK, AHEAD = (0, -1, -3), (1, 2, 4)
SPREAD = 1.2


@dataclass(frozen=True)
class Process:
    """A hidden Markov model of tokens; a Markov chain where every state has a token of its own.

    Attributes:
        name: What tables call it.
        states: Transition probabilities, shape ``[state, state]``.
        emits: Token probabilities, shape ``[state, token]``.
    """

    name: str
    states: np.ndarray
    emits: np.ndarray

    @property
    def stationary(self) -> np.ndarray:
        """Share of each state."""
        power, vectors = np.linalg.eig(self.states.T)
        share = np.real(vectors[:, np.argmax(np.real(power))])
        return share / share.sum()

    @property
    def shares(self) -> np.ndarray:
        """Share of each token."""
        return self.stationary @ self.emits

    def later(self, offset: int) -> np.ndarray:
        """``p(x[t + offset] | x[t])``, shape ``[token, token]``; negative offsets look back."""
        joint = (
            (self.stationary[:, None] * self.emits).T
            @ np.linalg.matrix_power(self.states, abs(offset))
            @ self.emits
        )
        joint = joint.T if offset < 0 else joint
        return joint / joint.sum(axis=1, keepdims=True)

    def draw(self, rng: np.random.Generator, n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[sequence, pos]`` and ``p(state now | tokens so far)``."""
        state = _draw(rng, np.repeat(self.stationary[None], n, axis=0))
        belief = np.repeat(self.stationary[None], n, axis=0)
        tokens, beliefs = [], []
        for _ in range(length):
            token = _draw(rng, self.emits[state])
            belief = belief * self.emits[:, token].T
            belief /= belief.sum(axis=1, keepdims=True)
            tokens.append(token)
            beliefs.append(belief)
            state, belief = _draw(rng, self.states[state]), belief @ self.states
        return np.stack(tokens, axis=1), np.stack(beliefs, axis=1)

    def ahead(self, belief: np.ndarray, offset: int) -> np.ndarray:
        """``p(x[t + offset] | tokens so far)`` from the belief in each state."""
        return belief @ np.linalg.matrix_power(self.states, offset) @ self.emits


def markov_chain() -> Process:
    """Sixteen tokens of unequal shares that follow one another in steps."""
    rng = np.random.default_rng(0)
    reach = np.exp(-np.abs(np.subtract.outer(np.arange(N_TOKENS), np.arange(N_TOKENS))))
    step = reach * rng.gamma(1.0, size=(N_TOKENS, N_TOKENS)) * np.linspace(1, 3, N_TOKENS)
    return Process("Markov chain", step / step.sum(axis=1, keepdims=True), np.eye(N_TOKENS))


def hidden_markov_model() -> Process:
    """Three topics that last, each with tokens that it prefers."""
    rng = np.random.default_rng(1)
    stay = np.full((3, 3), 0.05) + 0.85 * np.eye(3)
    emits = rng.gamma(0.4, size=(3, N_TOKENS)) + 0.01
    return Process("hidden Markov model", stay, emits / emits.sum(axis=1, keepdims=True))


PROCESSES = (markov_chain(), hidden_markov_model())


class Made(ModelAdapter):
    """Sites: the noisy embedding of one token each, then the logits of the true prediction."""

    name = "made"

    def __init__(self, process: Process, steps: tuple[int, ...], seed: int) -> None:
        rng = np.random.default_rng(2)
        self.process, self.steps = process, steps
        self.rng = np.random.default_rng([3, seed])
        self.table = rng.standard_normal((N_TOKENS, HALF))
        self.model = torch.nn.Module()
        self.model.unembed = torch.nn.Linear(2 * HALF, N_TOKENS, bias=False)
        self.model.unembed.weight.data = torch.eye(N_TOKENS, 2 * HALF)
        self.cfg = SimpleNamespace(
            n_layers=len(steps), d_model=2 * HALF, d_vocab=N_TOKENS, n_heads=1
        )
        self.n_layers, self.d_model, self.d_vocab = len(steps), 2 * HALF, N_TOKENS
        self.mask_id, self.beliefs = None, {}
        self._scale, self._shift = torch.ones(2 * HALF), torch.zeros(2 * HALF)

    special_ids = frozenset()
    device = torch.device("cpu")
    dtype = torch.float32
    n_forward_weights = 10_000

    def embedding(self) -> Tensor:
        return torch.from_numpy(self.table).float()

    def normalize(self, residual: Tensor) -> Tensor:
        return residual

    def decode(self, normalized: Tensor) -> Tensor:
        return normalized[:, :N_TOKENS].float()

    def run(self, tokens, mask, on_site, on_pattern, on_part=None):
        ids = tokens.numpy()
        beliefs = np.stack([self.beliefs[row.tobytes()] for row in ids])
        for site in range(len(self.steps) + 1):
            rows = SPREAD * self.rng.standard_normal((*ids.shape, 2 * HALF))
            if site < len(self.steps):
                rows[..., :HALF] += self.table[np.roll(ids, -self.steps[site], axis=1)]
            else:
                rows[..., :N_TOKENS] = np.log(self.process.ahead(beliefs, 1))
            on_site(site, torch.from_numpy(rows).float())
        pattern = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]).tril()
        for block in range(self.n_layers):
            on_pattern(block, pattern / pattern.sum(dim=-1, keepdim=True))


class Faint(Made):
    """Both sites show the token's embedding under noise, now and then at less than half its length.

    Tokens that are written come in pairs of much alike ones, which only a confident reader tells
    apart. The vocabulary is full of tokens that nobody writes, at less than half the length.
    """

    N_WRITTEN, N_COPIES, WIDTH, FAINT = 24, 50, 8, 0.45

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([6, seed])
        pairs = np.repeat(self.rng.standard_normal((self.N_WRITTEN // 2, self.WIDTH)), 2, axis=0)
        written = pairs + 0.1 * self.rng.standard_normal(pairs.shape)
        never = self.FAINT * np.repeat(written, self.N_COPIES, axis=0)
        never += 0.02 * self.rng.standard_normal(never.shape)
        self.table = np.concatenate([written, never])
        self.model = torch.nn.Module()
        self.d_model, self.d_vocab, self.n_layers = self.WIDTH, len(self.table), 1
        self.cfg = SimpleNamespace(
            n_layers=1, d_model=self.d_model, d_vocab=self.d_vocab, n_heads=1
        )
        self.mask_id = None

    def decode(self, normalized: Tensor) -> Tensor:
        return torch.zeros(len(normalized), self.d_vocab)

    def draw(self, n_prompts: int) -> np.ndarray:
        """Tokens ``[sequence, pos]``, independent of one another."""
        return self.rng.integers(self.N_WRITTEN, size=(n_prompts, N_POS))

    def run(self, tokens, mask, on_site, on_pattern, on_part=None):
        ids = tokens.numpy()
        length = np.where(self.rng.random(ids.shape) < 0.05, self.FAINT, 1.0)
        rows = length[..., None] * self.table[ids]
        rows += 0.1 * self.rng.standard_normal(rows.shape)
        for site in range(2):
            on_site(site, torch.from_numpy(rows).float())
        on_pattern(0, torch.eye(ids.shape[1]).repeat(len(ids), 1, 1, 1))


def truths(
    process: Process, steps: tuple[int, ...], n: int = 100_000
) -> dict[tuple[str, int, int], float]:
    """Information in nats by side (``"past"``, ``"future"``), offset and site, by simulation.

    Where it is not known (what a prediction retains), there is no entry.
    """
    rng = np.random.default_rng(4)
    table = Made(process, steps, 0).table
    tokens, beliefs = process.draw(rng, n // 16, 32)
    now, shares = tokens[:, 8:24].ravel(), process.shares
    noisy = table[now] + SPREAD * rng.standard_normal((len(now), HALF))
    posterior = shares * np.exp(-(((noisy[:, None] - table) / SPREAD) ** 2).sum(axis=2) / 2)
    posterior /= posterior.sum(axis=1, keepdims=True)

    def gain(told: np.ndarray, came: np.ndarray) -> float:
        return float(np.log(told[np.arange(len(came)), came] / shares[came]).mean())

    known = {}
    for site, carried in enumerate(steps):
        for offset in OFFSETS:
            for side, asked in (("past", 1 - offset), ("future", offset)):
                step = asked - carried
                later = process.later(step) if step else np.eye(N_TOKENS)
                known[side, offset, site] = gain(
                    posterior @ later, tokens[:, 8 + step : 24 + step].ravel()
                )
    for offset in OFFSETS:
        told = process.ahead(beliefs[:, 8:24], offset).reshape(-1, N_TOKENS)
        came = tokens[:, 8 + offset : 24 + offset].ravel()
        known["future", offset, len(steps)] = gain(told, came)
    return known


def fits(steps: tuple[int, ...], side: str, offset: int, site: int) -> bool:
    """Whether a reader of this kind can say all that the site tells of the token.

    It can of the token that the site carries, and of the next one from the prediction.
    """
    asked = offset if side == "future" else 1 - offset
    return asked == (1 if site == len(steps) else steps[site])


def read(
    process: Process,
    steps: tuple[int, ...],
    n_prompts: int,
    seed: int,
    n_sampled: int = sums.SAMPLE_CAPACITY,
) -> dict[tuple[str, int], TokenReading]:
    """What the package's readers find, by side and offset; the seed draws text and noise.

    They are tested at ``n_sampled`` positions.
    """
    made = Made(process, steps, seed)
    tokens, beliefs = process.draw(np.random.default_rng([5, seed]), n_prompts, N_POS)
    made.beliefs = {row.tobytes(): belief for row, belief in zip(tokens, beliefs, strict=True)}
    found = read_made(made, tokens, BANDS, seed, n_sampled)
    n = len(OFFSETS)
    return {
        ("past" if target < n else "future", OFFSETS[target % n]): reading
        for target, reading in found.items()
    }


def read_made(
    made: ModelAdapter,
    tokens: np.ndarray,
    bands: dict[str, tuple[int, int]],
    seed: int,
    n_sampled: int = sums.SAMPLE_CAPACITY,
) -> dict[int, TokenReading]:
    """What readers of made activations find, by target; every sequence is a group of its own."""
    counts = np.bincount(tokens.ravel(), minlength=made.d_vocab)
    plan = plan_moments(made, counts, bands=bands, n_folds=N_FOLDS, skip_first=4, seed=seed)
    moments = Moments(plan, made)
    prompts = [(Prompt(row, str(i)), i % N_FOLDS) for i, row in enumerate(tokens)]
    with (
        mock.patch.object(sums, "SAMPLE_CAPACITY", n_sampled),
        mock.patch.object(gathering, "SAMPLE_CAPACITY", n_sampled),
    ):
        for batch in make_batches(prompts, None, max(2048, tokens.size // 8)):
            add_batch(moments, made, batch)
    relevance = ridge_lens_relevance(moments, made, "standardized")
    sampled = SampledReadings(moments, made, "standardized", relevance)
    read_targets(moments, "standardized", sampled)
    return sampled.tokens()


def limits(
    process: Process, steps: tuple[int, ...], n_prompts: int = 8000, n_seeds: int = 4
) -> dict[tuple[str, int, int], tuple[float, float]]:
    """What the package's readers find in endless text, by side, offset and site.

    It is what such readers can use (Xu et al. 2020), by the same code on other and much more text,
    tested at 16 times as many positions: a value's bias falls with the text, its error with the
    positions.

    Returns:
        The mean over seeds, and its standard error.
    """
    # Other seeds than those of the readings that are held against it.
    seeds = range(1000, 1000 + n_seeds)
    found = [read(process, steps, n_prompts, seed, 16 * sums.SAMPLE_CAPACITY) for seed in seeds]
    known = {}
    for side, offset in found[0]:
        values = np.stack([reading[side, offset].values for reading in found])
        error = values.std(axis=0, ddof=1) / np.sqrt(n_seeds)
        for site, (value, off) in enumerate(zip(values.mean(axis=0), error, strict=True)):
            known[side, offset, site] = float(value), float(off)
    return known


def _draw(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    return (probabilities.cumsum(axis=1) < rng.random((len(probabilities), 1))).sum(axis=1)
