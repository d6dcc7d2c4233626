"""Cost of ``profile_layers`` against the bare forward pass over the same batches.

    python benchmarks/profile.py            # time, on the built-in passages
    python benchmarks/profile.py --memory   # peak memory, 64 against 512 prompts

Both are ratios or differences within one run on one machine, on the demo model.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this file would stand in for the standard library's module of the same name.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).parent]

import argparse  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402

import mspgt_lens as ml  # noqa: E402
from mspgt_lens.folds import balanced_folds  # noqa: E402
from mspgt_lens.gathering import make_batches  # noqa: E402
from mspgt_lens.profile.passing import TOKENS_PER_BATCH  # noqa: E402


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


def compare_time(n_rounds: int) -> None:
    model = ml.load_demo_model()
    prompts = passage_prompts(model, 384, None)
    warm = passage_prompts(model, 384, 4)
    bare_forward(model, warm)
    ratios = []
    for number in range(n_rounds):
        bare = seconds(lambda: bare_forward(model, prompts))
        profiled = seconds(lambda: ml.profile_layers(model, prompts, progress=False))
        ratios.append(profiled / bare)
        print(f"round {number + 1}: bare {bare:.1f} s, profile {profiled:.1f} s", flush=True)
    print(f"profile_layers / bare forward: {sorted(ratios)[len(ratios) // 2]:.2f} (median)")


def compare_memory() -> None:
    peaks = {}
    for n_prompts in (64, 512):
        command = [sys.executable, __file__, "--peak", str(n_prompts)]
        peaks[n_prompts] = [
            int(subprocess.run([*command, kind], check=True, capture_output=True).stdout)
            for kind in ("bare", "profile")
        ]
    for n_prompts, (bare, profiled) in peaks.items():
        print(f"{n_prompts} prompts: peak {profiled} MB, {profiled - bare} MB above bare forward")


def print_peak(n_prompts: int, kind: str) -> None:
    model = ml.load_demo_model()
    prompts = passage_prompts(model, 96, n_prompts)
    if kind == "bare":
        bare_forward(model, prompts)
    else:
        ml.profile_layers(model, prompts, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--rounds", type=int, default=1, help="rounds to take the median of")
    parser.add_argument("--peak", nargs=2, metavar=("PROMPTS", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(int(options.peak[0]), options.peak[1])
    elif options.memory:
        compare_memory()
    else:
        compare_time(options.rounds)


if __name__ == "__main__":
    main()
