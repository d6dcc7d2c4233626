"""The ridge lens against a tuned lens trained by SGD, on the same activations and tokens.

    python -m benchmarks.lens               # eight sites
    python -m benchmarks.lens --sites 30    # all of them: the better part of an hour on two cores

Both are fitted on four fifths of the built-in passages and decode the same positions of the rest.
The time of the ridge lens is what fit_lens takes beyond the forward passes, with the model's layers
as fast as there, its own held-out scores included; that of the tuned lens is SGD alone, on
activations that are already there. The tuned lens is trained as its authors publish: a residual
affine map, initialized at the identity, decoded by the model's final norm and unembedding;
Kullback-Leibler divergence from the model's own prediction; SGD with Nesterov momentum 0.9,
learning rate 1 - momentum decaying linearly to 0, weight decay 1e-3, gradients clipped to norm 1,
250 steps (Belrose et al. 2023).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import mspgt_lens as ml
from benchmarks.table import Comparison
from mspgt_lens.information.ridge import spread_sites
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.products import faster_layers
from mspgt_lens.prompts import Prompt, stack_rows

N_PARTS = 5
SKIP_FIRST = 4
N_TESTED = 512
N_STEPS = 250
MOMENTUM = 0.9
PROMPTS_PER_BATCH = 16


def gather(adapter: ModelAdapter, prompts: list[Prompt]) -> tuple[list[Tensor], Tensor]:
    """Every site's residuals at positions whose next token is known, and those tokens."""
    rows: list[list[Tensor]] = [[] for _ in range(adapter.n_layers + 1)]
    answers = []
    with adapter.inference():
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            tokens, mask = stack_rows(
                [p.tokens for p in prompts[start : start + PROMPTS_PER_BATCH]]
            )
            chosen = torch.zeros_like(mask)
            chosen[:, SKIP_FIRST:-1] = mask[:, SKIP_FIRST + 1 :]

            def keep(site: int, residual: Tensor, chosen: Tensor = chosen) -> None:
                rows[site].append(residual[chosen].float())

            adapter.run(tokens, mask, keep)
            prompt, position = torch.nonzero(chosen, as_tuple=True)
            answers.append(tokens[prompt, position + 1])
    return [torch.cat(parts) for parts in rows], torch.cat(answers)


def train_tuned_lens(
    adapter: ModelAdapter, rows: Tensor, final: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the residual affine map."""
    d_model = adapter.d_model
    weight = torch.zeros(d_model, d_model, requires_grad=True)
    bias = torch.zeros(d_model, requires_grad=True)
    optimizer = torch.optim.SGD(
        [weight, bias], lr=1 - MOMENTUM, momentum=MOMENTUM, nesterov=True, weight_decay=1e-3
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / N_STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        index = torch.randint(len(rows), (batch_size,), generator=generator)
        with torch.no_grad():
            wanted = adapter.decode(adapter.normalize(final[index])).log_softmax(dim=-1)
        h = rows[index]
        told = adapter.decode(adapter.normalize(h + h @ weight + bias)).log_softmax(dim=-1)
        loss = functional.kl_div(told, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        optimizer.step()
        decay.step()
    return weight.detach(), bias.detach()


def cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    return float(functional.cross_entropy(logits.double(), tokens))


@dataclass(frozen=True)
class Site:
    """One site's two lenses: nats of cross-entropy on held-out tokens, and seconds of SGD."""

    site: int
    ridge: float
    tuned: float
    seconds: float


class Fitted:
    """The ridge lens, with the activations that the tuned lens is trained and both are tried on.

    Attributes:
        seconds: Of the ridge lens at one site, beyond the forward passes.
    """

    def __init__(self) -> None:
        self.adapter = adapter = as_adapter(ml.load_demo_model())
        for parameter in adapter.model.parameters():
            parameter.requires_grad_(False)
        texts = [passage.text for passage in ml.load_passages()]
        prompts = list(ml.PromptDataset.from_texts(adapter.model, texts, max_length=128))
        training = [prompt for prompt in prompts if prompt.group % N_PARTS]
        held_out = [prompt for prompt in prompts if not prompt.group % N_PARTS]
        start = time.perf_counter()
        self.lens = ml.fit_lens(adapter, ml.PromptDataset(lambda: iter(training)), progress=False)
        fitting = time.perf_counter() - start
        start = time.perf_counter()
        with faster_layers():
            self.rows, _ = gather(adapter, training)
        forward = time.perf_counter() - start
        self.seconds = (fitting - forward) / adapter.n_layers
        tested, answers = gather(adapter, held_out)
        pick = torch.from_numpy(np.random.default_rng(0).permutation(len(answers))[:N_TESTED])
        self.tested, self.answers = [part[pick] for part in tested], answers[pick]
        print(
            f"{len(self.rows[0]):,} training positions, {len(self.answers)} held out; forward "
            f"passes {forward:.0f} s, fit_lens {fitting:.0f} s in all; cross-entropy of the model "
            f"{self.cross_entropy(adapter.n_layers):.3f} nats",
            flush=True,
        )

    def cross_entropy(self, site: int) -> float:
        """Of what the ridge lens reads at a site."""
        return cross_entropy(self.lens.logits(site, self.tested[site]), self.answers)

    def sites(self, number: int, batch_size: int) -> Iterator[Site]:
        """Both lenses at so many sites, evenly spread."""
        adapter = self.adapter
        for site in spread_sites(adapter.n_layers - 1, number):
            start = time.perf_counter()
            weight, bias = train_tuned_lens(adapter, self.rows[site], self.rows[-1], batch_size)
            spent = time.perf_counter() - start
            h = self.tested[site]
            with adapter.inference():
                told = adapter.decode(adapter.normalize(h + h @ weight + bias))
            tuned = cross_entropy(told, self.answers)
            yield Site(int(site), self.cross_entropy(site), tuned, spent)


def compare() -> Iterator[Comparison]:
    """Three sites: cross-entropy and seconds."""
    fitted = Fitted()
    for one in fitted.sites(3, 128):
        what = f"cross-entropy of the ridge lens, site {one.site}"
        yield Comparison(what, one.ridge, "tuned lens", one.tuned, "nats", "0.1 nats more at most")
        what = f"fitting one site, site {one.site}"
        yield Comparison(what, fitted.seconds, "tuned lens", one.seconds, "s", "at most 0.05")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=8, help="sites compared, evenly spread")
    parser.add_argument("--batch-size", type=int, default=128, help="tokens per step of SGD")
    options = parser.parse_args()
    fitted = Fitted()
    print(f"{options.batch_size * N_STEPS:,} positions of SGD per site")
    print("site  ridge lens  tuned lens  difference  seconds of SGD", flush=True)
    found = []
    for one in fitted.sites(options.sites, options.batch_size):
        found.append(one)
        print(
            f"{one.site:4d}  {one.ridge:10.3f}  {one.tuned:10.3f}  {one.ridge - one.tuned:+10.3f}  "
            f"{one.seconds:8.1f}",
            flush=True,
        )
    worst = max(one.ridge - one.tuned for one in found)
    print(f"largest excess of the ridge lens: {worst:+.3f} nats (0.1 allowed)")
    mean = sum(one.seconds for one in found) / len(found)
    print(
        f"time per site: {mean:.1f} s against {fitted.seconds:.2f} s, {mean / fitted.seconds:.0f}x "
        "(20x wanted)"
    )


if __name__ == "__main__":
    main()
