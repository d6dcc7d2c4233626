"""What torchrun starts in tests: the command, meeting one trouble after the other.

Every process leaves what each came to in a file of its own; the last one is its end.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed

from mspgt_lens import processes as processes_module
from mspgt_lens.cli import main as run_command
from mspgt_lens.cli import placing
from mspgt_lens.cli import profile as profile_command


def failing(error: Exception) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


def spoiled(load: Callable[..., Any]) -> Callable[..., Any]:
    """Loads a model whose first block makes what is no number."""

    def loads(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda x, hook: x * torch.nan)
        return model

    return loads


# In which process, where, and what is there instead.
TROUBLES: dict[str, tuple[int, Any, str, Callable[..., Any]]] = {
    "loading": (1, placing, "load_model", failing(OSError("this disk is gone"))),
    "bug": (1, placing, "load_model", failing(AssertionError("a bug"))),
    "pass": (1, placing, "load_model", spoiled(placing.load_model)),
    "writing": (0, profile_command, "write_report", failing(PermissionError("no place to write"))),
}


def commands(folder: Path) -> dict[str, list[str]]:
    """Commands that share their work, without what they write."""
    model = [str(folder / "tiny"), "--no-progress"]
    texts = ["--prompts", str(folder / "texts.txt"), "--max-length"]
    few = ["--n-documents", "4", "--levels", "0.1"]
    return {
        "profile": ["profile", *model, *texts, "140"],
        "brittle": ["brittleness", *model, *texts, "16", *few, "--blocks", "1,3"],
        "patched": ["patch", *model, "--pairs", str(folder / "pairs.jsonl")],
    }


def main(folder: Path) -> int:
    """All troubles with the tiny model and the prompts of the folder."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    # Nobody may wait for what has been told already.
    processes_module._FAREWELL = 3600.0
    shared = {
        name: [*words, "--out", str(folder / f"{name}.html")]
        for name, words in commands(folder).items()
    }
    profile = shared.pop("profile")
    changed = {
        "alike": ["scales", "--no-progress"],
        "shallow": ["analyze", *profile[1:-1], str(folder / "analysis")],
        "usage": ["profile"],
        "unshared": ["plan", str(folder / "tiny"), "--prompts", "9", "--length", "64"],
        "unhurt": [*profile, "--save", str(folder / "kept")],
        **{name: [*words, "--save", str(folder / name)] for name, words in shared.items()},
    }
    came_to = {}
    for name in (*TROUBLES, *changed):
        out, err = io.StringIO(), io.StringIO()
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            where, *trouble = TROUBLES.get(name, (None,))
            if rank == where:
                stack.enter_context(patch.object(*trouble))
            try:
                code = run_command(changed.get(name, profile))
            except SystemExit as stopped:
                code = int(str(stopped.code))
        came_to[name] = [code, out.getvalue(), err.getvalue()]
    (folder / f"came-to-{rank}.json").write_text(json.dumps(came_to))
    # As the launcher has it: an error of all, with the exit code of each.
    return run_command(["profile", str(folder / "nowhere")])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
