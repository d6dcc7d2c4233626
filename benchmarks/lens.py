"""The ridge lens against a tuned lens trained by SGD, on the same activations and tokens.

    python benchmarks/lens.py               # eight sites
    python benchmarks/lens.py --sites 30    # all of them: the better part of an hour on two cores

Both are fitted on four fifths of the built-in passages and decode the same positions of the rest.
The time of the ridge lens is what fit_lens takes beyond the forward passes, its own held-out scores
included; that of the tuned lens is SGD alone, on activations that are already there. The tuned lens
is trained as its authors publish: a residual affine map, initialized at the identity, decoded by
the model's final norm and unembedding; Kullback-Leibler divergence from the model's own prediction;
SGD with Nesterov momentum 0.9, learning rate 1 - momentum decaying linearly to 0, weight decay
1e-3, gradients clipped to norm 1, 250 steps (Belrose et al. 2023).
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this folder would stand in for the standard library's module "profile".
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).parent]

import argparse  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

import mspgt_lens as ml  # noqa: E402
from mspgt_lens.information.ridge import spread_sites  # noqa: E402
from mspgt_lens.models import ModelAdapter, as_adapter  # noqa: E402
from mspgt_lens.prompts import Prompt, stack_rows  # noqa: E402

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=8, help="sites compared, evenly spread")
    parser.add_argument("--batch-size", type=int, default=128, help="tokens per step of SGD")
    options = parser.parse_args()
    adapter = as_adapter(ml.load_demo_model())
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    texts = [passage.text for passage in ml.load_passages()]
    prompts = list(ml.PromptDataset.from_texts(adapter.model, texts, max_length=128))
    training = [prompt for prompt in prompts if prompt.group % N_PARTS]
    held_out = [prompt for prompt in prompts if not prompt.group % N_PARTS]

    start = time.perf_counter()
    lens = ml.fit_lens(adapter, ml.PromptDataset(lambda: iter(training)), progress=False)
    fitting = time.perf_counter() - start
    start = time.perf_counter()
    rows, _ = gather(adapter, training)
    forward = time.perf_counter() - start
    ridge_seconds = (fitting - forward) / adapter.n_layers
    tested, answers = gather(adapter, held_out)
    pick = torch.from_numpy(np.random.default_rng(0).permutation(len(answers))[:N_TESTED])
    tested, answers = [part[pick] for part in tested], answers[pick]
    print(
        f"{len(rows[0]):,} training positions, {len(answers)} held out; "
        f"{options.batch_size * N_STEPS:,} positions of SGD per site; forward passes {forward:.0f} "
        f"s, fit_lens {fitting:.0f} s in all; cross-entropy of the model "
        f"{cross_entropy(lens.logits(adapter.n_layers, tested[-1]), answers):.3f} nats",
        flush=True,
    )
    print("site  ridge lens  tuned lens  difference  seconds of SGD", flush=True)
    sites = spread_sites(adapter.n_layers - 1, options.sites)
    worst, total = -np.inf, 0.0
    for site in sites:
        start = time.perf_counter()
        weight, bias = train_tuned_lens(adapter, rows[site], rows[-1], options.batch_size)
        spent = time.perf_counter() - start
        h = tested[site]
        with adapter.inference():
            told = adapter.decode(adapter.normalize(h + h @ weight + bias))
        tuned = cross_entropy(told, answers)
        ridged = cross_entropy(lens.logits(site, h), answers)
        worst, total = max(worst, ridged - tuned), total + spent
        print(
            f"{site:4d}  {ridged:10.3f}  {tuned:10.3f}  {ridged - tuned:+10.3f}  {spent:8.1f}",
            flush=True,
        )
    print(f"largest excess of the ridge lens: {worst:+.3f} nats (0.1 allowed)")
    print(
        f"time per site: {total / len(sites):.1f} s against {ridge_seconds:.2f} s, "
        f"{total / len(sites) / ridge_seconds:.0f}x (20x wanted)"
    )


if __name__ == "__main__":
    main()
