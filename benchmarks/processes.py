"""Two processes of one thread each against one process of one thread.

    python -m benchmarks.processes

On the demo model and the built-in passages, in turn within one run on one machine of at least two
cores. The pass is shared, and so are the sites that curves are read from. Processor time says how
the work divides where the cores have other work, too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed, multiprocessing

import mspgt_lens as ml
from benchmarks.table import Comparison

MAX_LENGTH = 384


def compare() -> Iterator[Comparison]:
    """Three rounds."""
    yield compared(3)


def compared(n_rounds: int) -> Comparison:
    """Seconds of the round whose ratio is the median."""
    # Read when the processes start.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, n_rounds), nprocs=2)
        rounds = json.loads((Path(folder) / "rounds.json").read_text())
    one, two = sorted(rounds, key=lambda pair: pair[0] / pair[1])[n_rounds // 2]
    return Comparison("one process", one, "two processes", two, "s", "at least 1.7")


def work(rank: int, folder: str, n_rounds: int) -> None:
    """Both ways in turn; where one process profiles, the other one waits."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'meeting'}", rank=rank, world_size=2
    )
    model = ml.load_demo_model()
    texts = [passage.text for passage in ml.load_passages()]
    prompts = ml.PromptDataset.from_texts(model, texts, max_length=MAX_LENGTH)
    with torch.no_grad():
        model(torch.arange(100)[None])
    rounds = []
    for number in range(n_rounds):
        took, worked = [], []
        for group in (None, distributed.group.WORLD):
            distributed.barrier()
            start, start_work = time.perf_counter(), time.process_time()
            if rank == 0 or group is not None:
                ml.profile_layers(model, prompts, progress=False, process_group=group)
            took.append(time.perf_counter() - start)
            worked.append(time.process_time() - start_work)
        rounds.append(took)
        if rank == 0:
            print(
                f"round {number + 1}: one {took[0]:.1f} s (processor {worked[0]:.1f} s), "
                f"two {took[1]:.1f} s (processor {worked[1]:.1f} s each)",
                flush=True,
            )
    if rank == 0:
        (Path(folder) / "rounds.json").write_text(json.dumps(rounds))
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="rounds to take the median of")
    found = compared(parser.parse_args().rounds)
    print(f"one process / two processes: {found.ratio:.2f} (median)")


if __name__ == "__main__":
    main()
