"""What tests of several processes run in each of them; what comes of it is left in a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from profiles import LENGTH, RAGGED, SMALL, prompts_of, run
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor, distributed

import mspgt_lens as ml
from mspgt_lens import processes as processes_module
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.patching import scales as scales_module
from mspgt_lens.patching import walking as walking_module
from mspgt_lens.perturbation import block_runs as block_runs_module
from mspgt_lens.perturbation import brittleness as brittleness_module
from mspgt_lens.perturbation import dependence as dependence_module
from mspgt_lens.perturbation import responding as responding_module
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
    three = distributed.new_group([0, 2, 3])
    for name, ranks, group in (("two", (1, 3), two), ("three", (0, 2, 3), three)):
        if rank not in ranks:
            continue
        with counted() as counts:
            for kind, result in interventions(group).items():
                result.save(folder / f"{kind}-{name}-{rank}")
        (folder / f"counts-{name}-{rank}.json").write_text(json.dumps(counts))


def interventions(group: Any = None) -> dict[str, Any]:
    """What is perturbed and patched by several processes, and by one."""
    model = tiny_model("llama")
    common: dict[str, Any] = {"progress": False, "process_group": group}
    prompts = prompts_of([row[:17] for row in RAGGED[:7]])
    clean, other = random_tokens(5, 9), random_tokens(5, 9, seed=1)
    corrupted = torch.where(torch.arange(9) < 2, clean, other)
    pairs = ml.PromptPairs.from_tokens(clean, corrupted, *random_tokens(5, 2, seed=2).T)

    def last_mean(logits: Tensor) -> Tensor:
        return logits[:, -1, :7].mean()

    bands = {"local": (1, 1), "intermediate": (2, 4), "global": (5, 9)}
    with patch.object(dependence_module, "_BATCH_TOKENS", 64):
        classes = ml.classify_tokens(model, prompts, bands=bands, n_tokens=40, **common)
    # Whatever they depend on.
    dealt = replace(classes, classes=np.arange(len(classes.classes)) % 3)
    mean = ml.Perturbation("mean")
    noise: dict[str, Any] = {"levels": (0.1, 0.5), "shapes": ["covariance"], "batch_size": 3}
    kinds = [ml.Perturbation("resample"), ml.Perturbation("temperature")]
    several: dict[str, Any] = {"perturbations": kinds, "n_controls": 2, "batch_size": 3}
    return {
        "brittleness": ml.measure_brittleness(model, prompts, (1, 3), **noise, **common),
        "classes": classes,
        "dissociation": ml.measure_dissociation(
            model, prompts, (1, 3), dealt, perturbation=mean, batch_size=2, **common
        ),
        "blocks": ml.studies.block_effects(model, prompts, batch_size=3, **common),
        "effects": ml.perturb_scales(model, prompts, (1, 3), **several, **common),
        "patched": ml.patch_layers(model, pairs, batch_size=4, **common),
        "heads": ml.patch_layers(model, pairs, "kl", place="z", batch_size=7, **common),
        "attributed": ml.patch_layers(model, pairs, method="attribution", batch_size=3, **common),
        "called": ml.patch_layers(model, pairs, last_mean, positions=[2, 5, 8], **common),
        "scales": ml.patch_scales(model, pairs, (1, 3), n_controls=20, batch_size=10, **common),
    }


def assert_same_table(first: Any, second: Any) -> None:
    """Two results of one kind, up to the order of additions."""
    tables = [result.to_dataframe() for result in (first, second)]
    one, other = (t.select_dtypes("number").to_numpy(float, na_value=np.nan) for t in tables)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9, err_msg=type(first).__name__)
    assert (
        tables[0].select_dtypes(exclude="number").equals(tables[1].select_dtypes(exclude="number"))
    )


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many runs there are inside, by what is done in them."""
    counts = {"perturbed": 0, "patched": 0, "segments": 0, "blocks": 0, "windows": 0}
    with ExitStack() as stack:
        for name, owner, method in (
            ("perturbed", responding_module.CleanRun, "changed"),
            ("patched", walking_module._Walk, "run"),
            ("segments", scales_module, "_run_sets"),
            ("blocks", block_runs_module.BlockRuns, "widely"),
            ("windows", dependence_module, "stack_rows"),
        ):
            original = getattr(owner, method)

            def counting(*args: Any, name: str = name, original: Any = original) -> Any:
                counts[name] += 1
                return original(*args)

            stack.enter_context(patch.object(owner, method, counting))
        yield counts


def fail(rank: int, folder: Path) -> None:
    """One process meets activations that are no numbers, one wrong arguments, one other ones."""
    everyone = distributed.group.WORLD
    model = tiny_model("gpt2", **SMALL)
    told = []
    for name in ("nan", "arguments", "others", "perturbed", "patched"):
        settings: dict[str, Any] = {"batch_size": 2, "process_group": everyone}
        if name == "nan" and rank == 1:
            model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda x, hook: x * torch.nan)
        if name == "arguments" and rank == 2:
            settings["noise"] = -1.0
        if name == "others" and rank == 1:
            settings["skip_first"] = 3
        try:
            if name == "perturbed":
                settings = {"seed": int(rank == 1), "process_group": everyone}
                ml.measure_brittleness(model, prompts_of(), (1,), progress=False, **settings)
            elif name == "patched":
                failing_patches(model, rank)
            else:
                run(model, **settings)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        if name == "nan":
            model.reset_hooks()
    (folder / f"told-{rank}").write_text("\n".join(told))


def unread(rank: int, folder: Path) -> None:
    """One process cannot read its prompts, whatever they are for."""
    # Nobody may wait for what has been told already.
    processes_module._FAREWELL = 3600.0
    model = tiny_model("llama", n_layers=6)
    model.tokenizer = tiny_tokenizer()
    common: dict[str, Any] = {"progress": False, "process_group": distributed.group.WORLD}

    def texts() -> Iterator[str]:
        for number, row in enumerate(random_tokens(30, 140)):
            if rank == 1 and number == 5:
                raise OSError("this disk is gone")
            yield as_text(row)

    told = {}
    for measure, more in (
        (ml.profile_layers, ()),
        (ml.measure_brittleness, [(2, 4)]),
        (ml.perturb_scales, [(2, 4)]),
        (ml.studies.block_effects, ()),
        (ml.classify_tokens, ()),
        (ml.rate_distortion, ()),
        (ml.analyze, ()),
    ):
        try:
            measure(model, texts(), *more, **common)
        except Exception as error:
            told[measure.__name__] = f"{type(error).__name__}: {error}"
    (folder / f"told-{rank}").write_text(json.dumps(told))


def leave(rank: int, folder: Path) -> None:
    """One process ends before it comes to what the others compute."""
    if rank == 1:
        os._exit(4)
    try:
        run(tiny_model("gpt2", **SMALL), process_group=distributed.group.WORLD)
    except RuntimeError as error:
        (folder / f"told-{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def failing_patches(model: Any, rank: int) -> None:
    """Patches with a metric that fails in one process."""
    tokens = random_tokens(3, 6)
    pairs = ml.PromptPairs.from_tokens(tokens, tokens.flip(1), tokens[:, 0], tokens[:, 1])
    called: list[int] = []

    def metric(logits: Tensor) -> Tensor:
        called.append(1)
        if rank == 2 and len(called) == 4:
            raise ArithmeticError("no such number")
        return logits[:, -1, 5]

    everyone = distributed.group.WORLD
    ml.patch_layers(model, pairs, metric, process_group=everyone, progress=False)


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

    broken = patch.object(brittleness_module, "respond", side_effect=ValueError("broken"))
    try:
        with broken if rank == 0 else nullcontext():
            analysis()
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    told.append(" ".join(sorted(path.name for path in (folder / "into").iterdir())))
    # What the folder holds is not taken again.
    with patch.object(analysis_module, "profile_layers", side_effect=AssertionError):
        analysis().save(folder / f"analysis-{rank}")
    (folder / f"told-{rank}").write_text("\n".join(told))
