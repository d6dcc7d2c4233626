"""The command in several processes that torchrun started: one voice, one end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from launched import commands
from profiles import assert_same
from sharing import assert_same_table
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.cli import command
from mspgt_lens.cli.launching import Launch
from mspgt_lens.gathering import finish_batch
from mspgt_lens.profile import passing
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.results import Brittleness, PatchSweep

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]
HERE = Path(__file__).parent


def filled(folder: Path) -> Path:
    """A folder with a model that can be loaded, prompts, and pairs of prompts."""
    inner = tiny_model("llama").original_model
    # Saved without the bridge around it.
    getattr(transformers, type(inner).__name__)(inner.config).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    rows = random_tokens(30, 140)
    (folder / "texts.txt").write_text("\n".join(as_text(row) for row in rows))
    pairs = [
        {
            "clean": as_text(row[:6]),
            "corrupted": as_text(torch.cat([row[:2], row[40:44]])),
            "answer": as_text(row[6:7]),
            "foil": as_text(row[7:8]),
        }
        for row in rows[:8]
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what a command needs."""
    return filled(tmp_path)


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "--nproc-per-node", "2", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=300)
        finally:
            # Told so, and not killed, it ends those that it started.
            process.terminate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_torchrun_gives_what_one_process_gives(folder: Path) -> None:
    files = ["--prompts", "texts.txt", "--out", "report.html", "--save", "kept"]
    sizes = ["--max-length", "140", "--checkpoint", "sums"]
    done = torchrun("-m", "mspgt_lens", "profile", "tiny", *files, *sizes, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == done.stdout.count("texts.txt: 30 documents") == 1
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == len(set(warned)) > 0
    model = ml.load_model(str(folder / "tiny"))
    texts = (folder / "texts.txt").read_text().splitlines()
    prompts = ml.PromptDataset.from_texts(model, texts, max_length=140)
    one = ml.profile_layers(model, prompts, progress=False)
    several = LayerProfile.load(folder / "kept")
    assert_same(several, one, rtol=1e-6, atol=1e-9)
    assert several.n_tokens == one.n_tokens
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    parts = sorted(path.name for path in (folder / "sums").iterdir())
    assert parts == ["part-0-of-2.safetensors", "part-1-of-2.safetensors"]


def test_the_script_of_the_page_runs_as_it_stands(folder: Path) -> None:
    page = (HERE.parent / "docs" / "clusters.md").read_text("utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert script.count('"gpt2"') == 1
    (folder / "script.py").write_text(script.replace('"gpt2"', '"./tiny"'))
    done = torchrun("script.py", folder=folder)
    assert done.returncode == 0, done.stderr
    assert LayerProfile.load(folder / "profile").n_groups == 30


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with what two processes came to under many commands, and their end."""
    folder = filled(tmp_path_factory.mktemp("launched"))
    return folder, torchrun(str(HERE / "launched.py"), str(folder), folder=folder)


def came_to(folder: Path) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Per command: exit code, output and errors of the first and of the second process."""
    first, second = (json.loads((folder / f"came-to-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def test_what_stops_one_process_is_said_once_and_ends_all(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = launched
    first, second = came_to(folder)
    said = {
        "loading": (2, "mspgt-lens: process 1 of 2: this disk is gone"),
        "bug": (1, "mspgt-lens: process 1 of 2: Traceback (most recent call last):"),
        "pass": (2, "mspgt-lens: process 1 of 2: activations at site 1 are NaN or infinite"),
        "writing": (2, "mspgt-lens: process 0 of 2: no place to write"),
        "alike": (2, "mspgt-lens: scales needs a MODEL, or --curves with a table, or --profile"),
        "shallow": (2, "mspgt-lens: model must have at least 6 blocks, got 4"),
        "usage": (2, "mspgt-lens profile: error: the following arguments are required: MODEL"),
        "unshared": (2, "mspgt-lens: plan runs in one process, and 2 were started"),
    }
    assert {name: first[name][0] for name in said} == {
        name: code for name, (code, _) in said.items()
    }
    for name, (_, expected) in said.items():
        assert first[name][2].count("mspgt-lens: ") == (name != "usage")
        assert expected in first[name][2]
    assert "AssertionError: a bug" in first["bug"][2]
    assert (first["unhurt"][0], LayerProfile.load(folder / "kept").n_groups) == (0, 30)
    for name, one in second.items():
        # The same end, without a word.
        assert one == [first[name][0], "", ""]
    assert done.returncode != 0
    assert done.stderr.count("mspgt-lens: ") == 1
    assert "nowhere" in done.stderr


def test_brittleness_and_patch_share_their_work(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = launched
    first, _ = came_to(folder)
    for name, kind in (("brittle", Brittleness), ("patched", PatchSweep)):
        code, out, _ = first[name]
        assert (code, out.count("report: ")) == (0, 1)
        assert (folder / f"{name}.html").read_text().startswith("<!DOCTYPE html>")
        alone = tmp_path / name
        arguments = commands(folder)[name]
        assert command.main([*arguments, "--out", f"{alone}.html", "--save", str(alone)]) == 0
        several, one = kind.load(folder / name), kind.load(alone)
        assert several.settings == one.settings
        assert_same_table(several, one)


_KILLED = """
import os, signal, sys
from mspgt_lens.cli import main
from mspgt_lens.profile import checkpoint, passing

checkpoint.SECONDS_BETWEEN = checkpoint._SHARE_OF_WRITING = 0
finish, left = passing.finish_batch, [2]

def finish_batch(*batch):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    finish(*batch)

passing.finish_batch = finish_batch
main(sys.argv[1:])
"""


def test_a_command_that_was_killed_goes_on_to_the_same_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["--prompts", str(folder / "texts.txt"), "--max-length", "140", "--no-progress"]
    whole = ["profile", str(folder / "tiny"), *texts, "--out", str(folder / "report.html")]
    started = [*whole, "--save", str(folder / "kept"), "--checkpoint", str(folder / "sums")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(HERE.parent)}
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *started], env=os.environ | threads, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert not list(folder.glob("kept*"))
    done: list[int] = []

    def counting(*batch: Any) -> None:
        done.append(1)
        finish_batch(*batch)

    monkeypatch.setattr(passing, "finish_batch", counting)
    assert command.main(started) == 0
    n_left = len(done)
    assert command.main([*whole, "--save", str(folder / "whole")]) == 0
    assert len(done) == 2 * n_left + 2
    kept, uninterrupted = (folder / f"{name}.safetensors" for name in ("kept", "whole"))
    assert kept.read_bytes() == uninterrupted.read_bytes()


def test_processes_must_be_able_to_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert command.main(["profile", "demo"]) == 2
    assert "RANK, MASTER_ADDR, MASTER_PORT are not set: start them by" in capsys.readouterr().err


def test_processes_that_cannot_meet_are_told_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(backend: str) -> None:
        raise RuntimeError("the client socket has timed out\nException raised from ...")

    given = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", nobody)
    assert command.main(["profile", "demo"]) == 2
    error = capsys.readouterr().err
    assert "could not meet at node0, port 29500 (the client socket has timed out)" in error
    assert len(error.splitlines()) == 1


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Launch]:
    """The second of two processes on a machine with so many GPUs."""

    def launch(number: int) -> Launch:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        processes: Any = SimpleNamespace(size=2, rank=1)
        return Launch(processes)

    return launch


def test_every_process_takes_a_gpu_of_its_own(gpus: Callable[[int], Launch]) -> None:
    assert gpus(2).device(None, False) == gpus(4).device("cuda", False) == "cuda:1"
    assert gpus(2).device("cpu", False) == "cpu"
    assert gpus(0).device(None, False) is None
    with pytest.raises(ValueError, match=r"share its GPUs \(1\): start as many as there"):
        gpus(1).device(None, False)
    with pytest.raises(ValueError, match="--device cuda:0 is one GPU, and 2 processes were"):
        gpus(2).device("cuda:0", False)
    with pytest.raises(ValueError, match="2 processes were started on this one: start one per"):
        gpus(2).device(None, True)


def test_processes_that_no_launcher_numbered_cannot_take_gpus(
    gpus: Callable[[int], Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = gpus(2)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="LOCAL_RANK and LOCAL_WORLD_SIZE are not set: start the"):
        launch.device(None, False)
    assert gpus(0).device("cpu", False) == "cpu"


def test_one_process_per_machine_may_spread_its_model(
    gpus: Callable[[int], Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = gpus(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert launch.device(None, True) is None
    assert launch.device("cuda:0", False) == "cuda:0"
