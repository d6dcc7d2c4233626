"""Cost of ``profile_layers`` against the bare forward pass over the same batches.

    python -m benchmarks.profile            # time, on the built-in passages
    python -m benchmarks.profile --memory   # peak memory, 64 against 4,096 prompts

Both are ratios or differences within one run on one machine, on the demo model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import mspgt_lens as ml
from benchmarks.plan import resident
from benchmarks.table import Comparison
from mspgt_lens.folds import balanced_folds
from mspgt_lens.gathering import make_batches
from mspgt_lens.profile.passing import TOKENS_PER_BATCH


def passage_prompts(model: object, max_length: int, n_prompts: int | None) -> ml.PromptDataset:
    """Windows of the built-in passages, repeated as often as it takes."""
    texts = [passage.text for passage in ml.load_passages()]
    windows = list(ml.PromptDataset.from_texts(model, texts, max_length=max_length))
    if n_prompts is None:
        return ml.PromptDataset(lambda: iter(windows))
    full = [window for window in windows if len(window.tokens) == max_length]
    chosen = [full[i % len(full)] for i in range(n_prompts)]
    # Repeats would share folds and priorities; a rotation makes each a prompt of its own.
    return ml.PromptDataset.from_tokens(
        [[int(t) for t in torch.tensor(w.tokens).roll(i)] for i, w in enumerate(chosen)]
    )


def bare_forward(model: torch.nn.Module, prompts: ml.PromptDataset) -> None:
    """The model's own forward pass, logits included, over the batches of the profile."""
    sizes: dict[object, int] = {}
    for prompt in prompts:
        sizes[prompt.group] = sizes.get(prompt.group, 0) + len(prompt.tokens)
    folds = balanced_folds(sizes, 5, 0)
    windows = [(prompt, folds[prompt.group]) for prompt in prompts]
    with torch.no_grad():
        for batch in make_batches(windows, None, TOKENS_PER_BATCH["cpu"]):
            model(batch.tokens, attention_mask=batch.mask.long())


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare() -> Iterator[Comparison]:
    """Time in five rounds, on the passages and on 96 x 128 tokens; then peak memory."""
    model = ml.load_demo_model()
    yield timed(model, passage_prompts(model, 384, None), "passages", 5, "at most 1.3")
    yield timed(model, passage_prompts(model, 128, 96), "96 x 128 tokens", 5, "at most 1.5")
    (few, least), (many, most) = peaks().items()
    yield Comparison(f"profile of {many} prompts", most, f"of {few}", least, "MB", "at most 1.05")


def timed(
    model: torch.nn.Module, prompts: ml.PromptDataset, name: str, n_rounds: int, wanted: str = ""
) -> Comparison:
    """Seconds of the round whose ratio is the median."""
    bare_forward(model, passage_prompts(model, 384, 4))
    rounds = []
    for number in range(n_rounds):
        bare = seconds(lambda: bare_forward(model, prompts))
        profiled = seconds(lambda: ml.profile_layers(model, prompts, progress=False))
        found = f"profile_layers, {name}", profiled, "bare forward pass", bare, "s", wanted
        rounds.append(Comparison(*found))
        print(f"round {number + 1}: bare {bare:.1f} s, profile {profiled:.1f} s", flush=True)
    return sorted(rounds, key=lambda one: one.value / one.reference)[len(rounds) // 2]


def peaks() -> dict[int, int]:
    """Number of prompts to the peak memory of their profile in MB, in a process of its own.

    Of short prompts, in batches of the same size: it is their number that differs.
    """
    found = {}
    for n_prompts in (64, 4096):
        command = [sys.executable, "-m", "benchmarks.profile", "--peak", str(n_prompts)]
        found[n_prompts] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def print_peak(n_prompts: int) -> None:
    model = ml.load_demo_model()
    prompts = passage_prompts(model, 24, n_prompts)
    ml.profile_layers(model, prompts, bands={"near": (1, 8)}, batch_size=8, progress=False)
    # getrusage would tell of the process that started this one, where that held more.
    print(resident("VmHWM") // 10**6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--rounds", type=int, default=1, help="rounds to take the median of")
    parser.add_argument("--peak", type=int, metavar="PROMPTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak)
    elif options.memory:
        for n_prompts, peak in peaks().items():
            print(f"{n_prompts} prompts: peak {peak} MB")
    else:
        model = ml.load_demo_model()
        found = timed(model, passage_prompts(model, 384, None), "passages", options.rounds)
        print(f"profile_layers / bare forward: {found.ratio:.2f} (median)")


if __name__ == "__main__":
    main()
