"""The ridge lens against a tuned lens trained by SGD, on the same activations and tokens.

    python benchmarks/lens.py               # eight sites
    python benchmarks/lens.py --sites 30    # all of them: the better part of an hour on two cores

Both are fitted on four folds of the built-in passages and decode the same held-out positions of the
fifth. The tuned lens is trained as its authors publish: a residual affine map, initialized at the
identity, decoded by the model's final norm and unembedding; Kullback-Leibler divergence from the
model's own prediction; SGD with Nesterov momentum 0.9, learning rate 1 - momentum decaying
linearly to 0, weight decay 1e-3, gradients clipped to norm 1, 250 steps (Belrose et al. 2023).
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
from mspgt_lens.gathering import add_batch, make_batches  # noqa: E402
from mspgt_lens.information import lens  # noqa: E402
from mspgt_lens.information.ridge import spread_sites  # noqa: E402
from mspgt_lens.models import ModelAdapter, as_adapter  # noqa: E402
from mspgt_lens.moments import Moments, Sample  # noqa: E402
from mspgt_lens.profile.run import ProfileRun  # noqa: E402
from mspgt_lens.profile.settings import ProfileSettings  # noqa: E402
from mspgt_lens.targets import DEFAULT_BANDS  # noqa: E402

HELD_OUT = 0
N_TESTED = 512
N_STEPS = 250
MOMENTUM = 0.9


def gather(adapter: ModelAdapter) -> tuple[Moments, list[Tensor], list[Tensor]]:
    """Moments of all folds, and every site's residuals at training and at held-out positions.

    The held-out positions take the place of the profile's own sample.
    """
    texts = [passage.text for passage in ml.load_passages()]
    prompts = list(ml.PromptDataset.from_texts(adapter.model, texts, max_length=128))
    run = ProfileRun(adapter, ProfileSettings(DEFAULT_BANDS, 0.1, "standardized", 5, 4, 0))
    run.begin(prompts)
    n_sites = adapter.n_layers + 1
    training: list[list[Tensor]] = [[] for _ in range(n_sites)]
    tested: list[list[Tensor]] = [[] for _ in range(n_sites)]
    tokens, groups = [], []
    with adapter.inference():
        for batch in make_batches(run.assign(prompts), None, 2048):
            add_batch(run.moments, adapter, batch)
            chosen = batch.mask.clone()
            chosen[:, :4] = False
            # A last position has no next token.
            chosen[:, :-1] &= batch.mask[:, 1:]
            chosen[:, -1] = False
            rows = tested if batch.fold == HELD_OUT else training

            def keep(site: int, residual: Tensor, rows=rows, chosen=chosen) -> None:  # type: ignore[no-untyped-def]
                rows[site].append(residual[chosen].float())

            adapter.run(batch.tokens, batch.mask, keep)
            if batch.fold == HELD_OUT:
                prompt, position = torch.nonzero(chosen, as_tuple=True)
                tokens.append(batch.tokens[prompt, position + 1].numpy())
                groups.append(batch.groups[prompt.numpy()])
    pick = np.random.default_rng(0).permutation(sum(map(len, tokens)))[:N_TESTED]
    held_out = [torch.cat(parts)[pick] for parts in tested]
    run.moments.sample = Sample(
        priority=np.arange(N_TESTED, dtype=np.uint64),
        rows=tuple(adapter.normalize(torch.stack(held_out, dim=1))),
        next_token=np.concatenate(tokens)[pick],
        fold=np.full(N_TESTED, HELD_OUT),
        group=np.concatenate(groups)[pick],
    )
    return run.moments, [torch.cat(parts) for parts in training], held_out


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=8, help="sites compared, evenly spread")
    parser.add_argument("--batch-size", type=int, default=128, help="tokens per step of SGD")
    options = parser.parse_args()
    adapter = as_adapter(ml.load_demo_model())
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    moments, rows, tested = gather(adapter)
    sites = spread_sites(adapter.n_layers - 1, options.sites)

    # Decode every held-out position; that time counts for the ridge lens, and not for SGD.
    lens.DECODING_SHARE = 10.0
    start = time.perf_counter()
    with adapter.inference():
        ridge = lens.ridge_lens_relevance(moments, adapter, "standardized")
    solving = (time.perf_counter() - start) / (adapter.n_layers + 1)
    start = time.perf_counter()
    final = rows[-1] - rows[-1].mean(dim=0)
    for site in sites:
        z = rows[site] - rows[site].mean(dim=0)
        torch.mm(z.T, z)
        torch.mm(z.T, final)
    ridge_seconds = solving + (time.perf_counter() - start) / len(sites)
    tokens = moments.sample.next_token
    print(
        f"{len(rows[0]):,} training positions, {N_TESTED} held out; "
        f"{options.batch_size * N_STEPS:,} positions of SGD per site; cross-entropy of the model "
        f"{ridge.unigram - ridge.values[-1]:.3f}, of the unigram model {ridge.unigram:.3f} nats",
        flush=True,
    )
    print("site  ridge lens  tuned lens  difference  seconds of SGD", flush=True)
    worst, total = -np.inf, 0.0
    for site in sites:
        start = time.perf_counter()
        weight, bias = train_tuned_lens(adapter, rows[site], rows[-1], options.batch_size)
        spent = time.perf_counter() - start
        h = tested[site]
        with adapter.inference():
            predicted = adapter.normalize(h + h @ weight + bias)
            tuned = -lens._log_likelihood(adapter, predicted, tokens).mean()
        ridged = ridge.unigram - ridge.values[site]
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
