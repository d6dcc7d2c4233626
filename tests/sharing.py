"""What tests of several processes run in each of them; what comes of it is left in a folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from profiles import LENGTH, RAGGED, SMALL, prompts_of, run
from tiny import random_tokens, tiny_model
from torch import distributed

import mspgt_lens as ml
from mspgt_lens import processes as processes_module
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.profile import passing as passing_module
from mspgt_lens.profile import run as run_module
from mspgt_lens.signals import SIGNALS
from mspgt_lens.studies import analysis as analysis_module

# Four processes and batches of two prompts: none has as many as another.
SETTINGS: dict[str, Any] = {"batch_size": 2, "signals": [*SIGNALS, LENGTH], "logit_lens": True}


def in_processes(
    work: Callable[[int, Path], None], size: int, folder: Path, seconds: float = 300.0
) -> list[int | None]:
    """Run ``work(rank, folder)`` in so many processes; their exit codes."""
    # Its threads would come along by a fork, and wait for ever.
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_joined, args=(work, rank, size, folder)) for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in started]


def _joined(work: Callable[[int, Path], None], rank: int, size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=1),
    )
    work(rank, folder)
    distributed.destroy_process_group()


def share(rank: int, folder: Path) -> None:
    """Profiles of all four processes, of two of them, and of prompts for fewer."""
    model, everyone = tiny_model("llama", **SMALL), distributed.group.WORLD
    two = distributed.new_group([1, 3])

    def kept(name: str, prompts: Any = None, **settings: Any) -> None:
        profile = run(model, prompts, **{**SETTINGS, **settings})
        profile.save(folder / f"{name}-{rank}")

    kept("four", process_group=everyone)
    if rank in (1, 3):
        kept("two", process_group=two)
    # A batch for each of three folds: one process has none.
    kept("empty", process_group=everyone, batch_size=24)
    kept("ragged", prompts_of(RAGGED), process_group=everyone, control="random_weights")
    run_module.MAX_WIDTH = 8
    kept("projected", process_group=everyone)


def fail(rank: int, folder: Path) -> None:
    """One process meets activations that are no numbers, one wrong arguments, one other ones."""
    everyone = distributed.group.WORLD
    model = tiny_model("gpt2", **SMALL)
    told = []
    for name in ("nan", "arguments", "others"):
        settings: dict[str, Any] = {"batch_size": 2, "process_group": everyone}
        if name == "nan" and rank == 1:
            model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda x, hook: x * torch.nan)
        if name == "arguments" and rank == 2:
            settings["noise"] = -1.0
        if name == "others" and rank == 1:
            settings["skip_first"] = 3
        try:
            run(model, **settings)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        if name == "nan":
            model.reset_hooks()
    (folder / f"told-{rank}").write_text("\n".join(told))


def die(rank: int, folder: Path) -> None:
    """One process is killed in the middle; it says nothing."""
    processes_module._BEAT, processes_module._SILENCE = 0.2, 4.0
    model = tiny_model("gpt2", **SMALL)
    if rank == 1:
        kill = lambda x, hook: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        model.hook_dict["blocks.1.hook_resid_pre"].add_hook(kill)
    try:
        run(model, batch_size=2, process_group=distributed.group.WORLD)
    except RuntimeError as error:
        (folder / f"told-{rank}").write_text(str(error))
        # Nobody is there to say goodbye to.
        os._exit(3)


def analyze(rank: int, folder: Path) -> None:
    """An analysis in which the second process cannot take one profile; it is stopped once."""
    # Nobody may wait for what has been told already.
    processes_module._FAREWELL = 3600.0
    model, everyone = tiny_model("llama", n_layers=6), distributed.group.WORLD
    original, told = analysis_module.profile_layers, []

    def profile_layers(*args: Any, **kwargs: Any) -> Any:
        if rank == 0 or kwargs["control"] != "shuffled_tokens":
            return original(*args, **kwargs)
        cannot = CannotMeasure("not in this process")
        with patch.object(passing_module, "finish_batch", side_effect=cannot):
            return original(*args, **kwargs)

    analysis_module.profile_layers = profile_layers
    common = {"n_documents": 4, "n_control_documents": 12, "n_tokens": 100, "progress": False}

    def analysis() -> Any:
        prompts = ml.PromptDataset.from_tokens(random_tokens(24, 130))
        return ml.analyze(model, prompts, folder=folder / "into", process_group=everyone, **common)

    failing = patch.object(analysis_module, "measure_brittleness", side_effect=ValueError("broken"))
    try:
        with failing:
            analysis()
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    told.append(" ".join(sorted(path.name for path in (folder / "into").iterdir())))
    # What the folder holds is not taken again.
    with patch.object(analysis_module, "profile_layers", side_effect=AssertionError):
        analysis().save(folder / f"analysis-{rank}")
    (folder / f"told-{rank}").write_text("\n".join(told))
