"""A pass that was killed goes on where it was, to the bit; another one is refused."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from profiles import LENGTH, RAGGED, SMALL, TOKENS, prompts_of, run
from sharing import in_processes
from tiny import tiny_model

from mspgt_lens.gathering import finish_batch
from mspgt_lens.moments import Moments
from mspgt_lens.profile import checkpoint as checkpoint_module
from mspgt_lens.profile import passing as passing_module
from mspgt_lens.signals import SIGNALS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]
POINTS = 20


@pytest.fixture(autouse=True)
def _always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint_module, "_SHARE_OF_WRITING", 0)


def profiled(folder: Path, model: Any = None, prompts: Any = None, **settings: Any) -> Any:
    chosen = {"batch_size": 2, "signals": [*SIGNALS, LENGTH], "checkpoint": folder, **settings}
    return run(tiny_model("llama", **SMALL) if model is None else model, prompts, **chosen)


def file_hash(profile: Any, folder: Path) -> str:
    return hashlib.sha256(profile.save(folder / "profile").read_bytes()).hexdigest()


class Killed(BaseException):
    """What no cleaning up catches; the folder is then as it was at that moment."""


def stop_at(
    calls: int, monkeypatch: pytest.MonkeyPatch, folder: Path, model: Any, prompts: Any = None
) -> None:
    """A pass that is stopped before its given batch is added."""
    left = [calls]

    def counting(moments: Moments, adapter: Any, reader: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        finish_batch(moments, adapter, reader)

    with monkeypatch.context() as patched:
        patched.setattr(passing_module, "finish_batch", counting)
        with pytest.raises(Killed):
            profiled(folder, model, prompts)


@pytest.mark.parametrize("max_width", [1024, 8])
def test_a_pass_that_was_stopped_anywhere_ends_with_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_width: int
) -> None:
    monkeypatch.setattr("mspgt_lens.profile.run.MAX_WIDTH", max_width)
    model, prompts = tiny_model("llama", **SMALL), prompts_of(RAGGED)
    whole = file_hash(profiled(None, model, prompts), tmp_path)
    for point in (0, 1, 5, 11):
        folder = tmp_path / str(point)
        stop_at(point, monkeypatch, folder, model, prompts)
        done: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(
                passing_module,
                "finish_batch",
                lambda m, a, reader, done=done: (done.append(1), finish_batch(m, a, reader)),
            )
            again = profiled(folder, model, prompts)
        assert len(done) == 12 - point
        assert file_hash(again, tmp_path) == whole
        with monkeypatch.context() as patched:
            # Nothing is left to run a third time.
            patched.setattr(passing_module, "finish_batch", None)
            assert file_hash(profiled(folder, model, prompts), tmp_path) == whole


def killed(rank: int, folder: Path) -> None:
    """Profiles that are killed after a random time, twenty of them one after the other."""
    checkpoint_module.SECONDS_BETWEEN = checkpoint_module._SHARE_OF_WRITING = 0
    draw = random.Random(0)
    model = tiny_model("llama", **SMALL)
    profiled(None, model)
    for point in range(POINTS):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        signal.setitimer(signal.ITIMER_REAL, draw_at(draw, point))
        # The signal's own action: no handler, no cleaning up.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        profiled(folder / str(point), model)
        os._exit(0)
    (folder / "left").write_text(
        " ".join(str(len(list((folder / str(p)).glob("*.safetensors")))) for p in range(POINTS))
    )


def draw_at(draw: random.Random, point: int) -> float:
    """Seconds until a kill: the first points come before anything was written."""
    return 0.005 + 0.4 * draw.random() * (point + 1) / POINTS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_pass_that_was_killed_at_a_random_time_ends_with_the_same_file(tmp_path: Path) -> None:
    model = tiny_model("llama", **SMALL)
    whole = file_hash(profiled(None, model), tmp_path)
    assert in_processes(killed, 1, tmp_path) == [0]
    assert "1" in (tmp_path / "left").read_text()
    for point in range(POINTS):
        folder = tmp_path / str(point)
        assert file_hash(profiled(folder, model), tmp_path) == whole, point
        assert not list(folder.glob("*.partial"))


def test_another_pass_is_refused_with_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny_model("llama", **SMALL), tmp_path / "kept"
    stop_at(5, monkeypatch, folder, model)
    other = TOKENS.clone()
    other[3, 5] = 50
    for match, changed in {
        r"seed \(0 there, 1 here\)": {"seed": 1},
        r"batch_size \(2 there, 3 here\)": {"batch_size": 3},
        r"bands \(.* there, .* here\)": {"bands": {"local": (1, 1), "intermediate": (2, 5)}},
        r"signals \(": {"signals": list(SIGNALS)},
        r"prompts \(": {"prompts": prompts_of(other)},
        r"in prompts \(": {"prompts": prompts_of(TOKENS, groups=[i // 2 for i in range(24)])},
        r"weights \(": {"model": tiny_model("llama", **SMALL, seed=1)},
    }.items():
        with pytest.raises(ValueError, match=rf"checkpoint: .*kept holds a pass.*{match}"):
            profiled(folder, **{"model": model, **changed})
    (folder / "part-0-of-1.safetensors").rename(folder / "part-0-of-2.safetensors")
    with pytest.raises(ValueError, match=r"processes \(2 there, 1 here\)"):
        profiled(folder, model)


def test_other_prompts_further_on_in_a_stream_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mspgt_lens.profile.run.LOOKAHEAD", 12)
    monkeypatch.setattr(passing_module, "_CHUNK", 4)
    model = tiny_model("llama", **SMALL)
    stop_at(9, monkeypatch, tmp_path, model)
    other = TOKENS.clone()
    other[13, 5] = 50
    for prompts in (prompts_of(other), prompts_of(TOKENS[:14])):
        with pytest.raises(ValueError, match="holds a pass that differs in prompts"):
            profiled(tmp_path, model, prompts)
    whole = profiled(None, model)
    assert file_hash(profiled(tmp_path, model), tmp_path) == file_hash(whole, tmp_path)


def test_a_damaged_part_and_a_file_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", **SMALL)
    profiled(tmp_path / "kept", model)
    part = tmp_path / "kept" / "part-0-of-1.safetensors"
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint: .*part-0-of-1.*delete .* to start anew"):
        profiled(tmp_path / "kept", model)
    with pytest.raises(ValueError, match="checkpoint must be a folder, got the file"):
        profiled(part, model)


_HOLDING = """
import sys
from pathlib import Path
from mspgt_lens.storage import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="no locks of this kind")
def test_two_runs_never_write_into_one_folder(tmp_path: Path) -> None:
    model, folder = tiny_model("llama", **SMALL), tmp_path / "kept"
    folder.mkdir()
    partial = folder / "part-0-of-1-x.partial"
    partial.write_text("of a run that is alive")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDING, str(folder / "part-0-of-1.lock")],
        stdin=pipe,
        stdout=pipe,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=r"checkpoint: another run writes into .*kept"):
                profiled(folder, model)
            assert partial.exists()
        finally:
            # However it ends, it holds nothing any more.
            other.kill()
    profiled(folder, model)
    assert [path.name for path in folder.iterdir()] == ["part-0-of-1.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(**given: Any) -> Any:
        raise PermissionError("closed")

    monkeypatch.setattr(checkpoint_module.tempfile, "TemporaryFile", no_room)
    with pytest.raises(PermissionError, match=r"checkpoint: .*kept cannot be written \(closed\)"):
        profiled(tmp_path / "kept")


def test_moments_are_written_only_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "SECONDS_BETWEEN", 300.0)
    written: list[int] = []
    write = checkpoint_module.write_result

    def counting(path: Any, kind: str, header: Any, arrays: Any) -> Any:
        written.append(header["n_batches"])
        return write(path, kind, header, arrays)

    monkeypatch.setattr(checkpoint_module, "write_result", counting)
    profiled(tmp_path)
    assert written == [12]
