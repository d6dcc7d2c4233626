"""What predictions of the demo model need of every site, how long it takes, and whether it holds.

    python -m benchmarks.rate_distortion                          # 120 prompts, 10 sites
    python -m benchmarks.rate_distortion --prompts 48 --sites 1 12 27 --save rates

The first takes at most 15 minutes on two cores. Prints the rate at every distortion, scale and site
beside those of shaped noise and of noise with one correlation in every direction, and for every
channel the KL that was expected and the one that was measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import mspgt_lens as ml
from benchmarks.table import Comparison
from mspgt_lens.contract import interval
from mspgt_lens.rates.results import Noise

N_TOKENS = 80
KINDS: tuple[Noise, ...] = ("shaped", "covariance")


def prompts(model: object, count: int) -> ml.PromptDataset:
    """The beginnings of the built-in passages, of all topics alike."""
    passages = ml.load_passages()
    spread = [passages[int(i * len(passages) / count)] for i in range(count)]
    whole = ml.PromptDataset.from_texts(model, [p.text for p in spread], max_length=N_TOKENS)
    first = {prompt.group: prompt.tokens for prompt in reversed(list(whole))}
    return ml.PromptDataset.from_tokens(
        [tokens.tolist() for tokens in first.values()], groups=list(first)
    )


def compare() -> Iterator[Comparison]:
    """48 prompts, one site: what shaped noise passes on, and whether its KL is as expected."""
    model = ml.load_demo_model()
    found = ml.rate_distortion(model, prompts(model, 48), sites=[12], progress=False)
    for scale in found.bands:
        for distortion in found.distortions:
            shaped, plain = (
                float(found.over_sites(scale, distortion, noise=noise).values[0]) for noise in KINDS
            )
            what = f"rate of shaped noise, {scale}, KL {distortion:g}"
            yield Comparison(what, shaped, "noise of one correlation", plain, "nats", "at most 1")
    for run in found.runs:
        if run.shaped:
            what = f"KL of a channel, {run.scale}, rate {run.rate:.3g}"
            yield Comparison(what, run.kl, "expected", run.expected, "nats", "about 1")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=120, help="passages, 120 at most")
    parser.add_argument("--sites", type=int, nargs="+", default=None)
    parser.add_argument("--targets", type=int, default=8, help="predictions that shape, a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default=None, help="file for the result")
    options = parser.parse_args()
    model = ml.load_demo_model()
    texts = prompts(model, options.prompts)
    start, used = time.perf_counter(), time.process_time()
    found = ml.rate_distortion(
        model, texts, sites=options.sites, n_targets=options.targets, seed=options.seed
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    print(f"{wall:.0f} s, {cpu:.0f} s of processor time, {len(found.runs)} channels")
    if options.save:
        print(found.save(options.save))
    print("D,scale,site,rate,shaped_rate,covariance_rate")
    for distortion in found.distortions:
        for scale in found.bands:
            of_kind = [found.over_sites(scale, distortion, noise=noise) for noise in KINDS]
            curves = [found.over_sites(scale, distortion), *of_kind]
            for i, site in enumerate(found.sites):
                cells = [interval(c.values[i], c.low[i], c.high[i]) for c in curves]
                print(f"{distortion:g},{scale},{site}", *cells, sep=",")
    print("scale,site,shaped,rate,expected KL,measured KL")
    for run in found.runs:
        measured = interval(run.kl, run.low, run.high)
        print(
            f"{run.scale},{run.site},{run.shaped},{run.rate:.1f},{run.expected:.3g},{measured}",
            flush=True,
        )


if __name__ == "__main__":
    main()
