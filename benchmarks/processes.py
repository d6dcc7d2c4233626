"""Two processes of one thread each against one process of one thread.

    python benchmarks/processes.py

On the demo model and the built-in passages, in turn within one run on one machine of at least two
cores. What is shared is the pass; curves are read from its sums in every process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

import mspgt_lens as ml

MAX_LENGTH = 384


def work(rank: int, folder: str, n_rounds: int) -> None:
    """Rounds of both ways; the first process profiles alone while the second waits."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'meeting'}", rank=rank, world_size=2
    )
    model = ml.load_demo_model()
    texts = [passage.text for passage in ml.load_passages()]
    prompts = ml.PromptDataset.from_texts(model, texts, max_length=MAX_LENGTH)
    with torch.no_grad():
        model(torch.arange(100)[None])
    ratios = []
    for number in range(n_rounds):
        seconds = {}
        for name, group in (("one", None), ("two", distributed.group.WORLD)):
            distributed.barrier()
            start = time.perf_counter()
            if rank == 0 or group is not None:
                ml.profile_layers(model, prompts, progress=False, process_group=group)
            seconds[name] = time.perf_counter() - start
            distributed.barrier()
        ratios.append(seconds["one"] / seconds["two"])
        if rank == 0:
            told = ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
            print(f"round {number + 1}: {told}", flush=True)
    if rank == 0:
        print(f"two processes are {sorted(ratios)[n_rounds // 2]:.2f} x as fast (median)")
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="rounds to take the median of")
    n_rounds = parser.parse_args().rounds
    # Read when the processes start.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, n_rounds), nprocs=2)


if __name__ == "__main__":
    main()
