"""Memory as planned against memory as measured, on the demo model.

    python -m benchmarks.plan

Each run is a process of its own: its peak, less what it held before, against what
``plan_profile`` says from the configuration alone, less the weights. Needs Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import mspgt_lens as ml
from benchmarks.table import Comparison

RUNS = ((60, 96), (30, 384))


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def print_peak(n_prompts: int, length: int) -> None:
    model = ml.load_demo_model()
    texts = [passage.text for passage in ml.load_passages()]
    windows = ml.PromptDataset.from_texts(model, texts, max_length=length)
    full = [window.tokens for window in windows if len(window.tokens) == length]
    # Rotations of the same windows: prompts of their own.
    rows = [torch.tensor(full[i % len(full)]).roll(i).tolist() for i in range(n_prompts)]
    prompts = ml.PromptDataset.from_tokens(rows)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    ml.profile_layers(model, prompts, progress=False)
    print(resident("VmHWM") - before)


def compare() -> Iterator[Comparison]:
    """Every run."""
    for n_prompts, length in RUNS:
        plan = ml.studies.plan_profile("demo", n_prompts, length, device="cpu")
        weights = sum(term.n_bytes for term in plan.memory if term.term == "weights")
        planned = (plan.peaks["cpu"] - weights) / 1e9
        command = [sys.executable, "-m", "benchmarks.plan", "--peak", str(n_prompts), str(length)]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        what = f"memory planned, {n_prompts} prompts of {length} tokens"
        yield Comparison(what, planned, "measured", int(ran.stdout) / 1e9, "GB", "0.8 to 1.2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
    else:
        print(*compare(), sep="\n")


if __name__ == "__main__":
    main()
