"""Run the tutorials' setup cell where nothing is installed, then execute tutorials/*.ipynb here.

Run as ``python tests/run_tutorials.py [NOTEBOOK...]``; notebooks that are named run alone, without
the setup cell's own run. Fails if anything does, or there is no notebook.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from setup_cell import run_without_package

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
TIMEOUT = 1800  # Seconds per notebook.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def execute(path: Path) -> None:
    """Run every cell; raises what the notebook raises."""
    notebook = nbformat.read(path, as_version=4)
    deadline = time.monotonic() + TIMEOUT
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute()


def main(named: list[Path]) -> int:
    """Run the notebooks; the exit code."""
    paths = named or sorted(TUTORIALS.glob("*.ipynb"))
    if not paths:
        print(f"no notebook in {TUTORIALS}")
        return 1
    jobs = [(path.name, partial(execute, path)) for path in paths]
    if not named:
        jobs.insert(0, ("setup cell, without the package", run_without_package))
    # The kernel inherits both: the model that needs no network, and this environment's Python.
    os.environ["MSPGT_LENS_TUTORIAL_MODEL"] = "demo"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    failed = 0
    for name, job in jobs:
        start = time.monotonic()
        try:
            job()
            outcome = "passed"
        except Exception as error:  # Whatever it is, it is this job's failure.
            print(_COLORS.sub("", f"{type(error).__name__}: {error}"))
            outcome = "FAILED"
            failed += 1
        print(f"{name}: {outcome} in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(jobs) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main([Path(p) for p in sys.argv[1:]]))
