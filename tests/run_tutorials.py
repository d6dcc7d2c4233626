"""Run the tutorials' setup cell where nothing is installed, then every tutorial here.

Run as ``python tests/run_tutorials.py [TUTORIAL...]``; tutorials that are named run alone, without
the setup cell's own run. Two run side by side. Fails if anything does, if there is no tutorial, or
if a notebook that shows anything shows other things (text, tables, figures) than its cells do now.
``--write`` writes the notebooks instead, for which Chromium must be on the path.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from notebooks import TEXTS, notebook_of, shown, solutions, write
from setup_cell import run_without_package

TIMEOUT = 2700  # Seconds per notebook, of two at a time.
SIDE_BY_SIDE = 2
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def execute(path: Path, rewrite: bool) -> None:
    """Run every cell, then what solves the exercises; raises what the notebook raises."""
    notebook = notebook_of(path)
    n_cells = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    deadline = time.monotonic() + TIMEOUT
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute()
    del notebook.cells[n_cells:]
    target = path.with_suffix(".ipynb")
    if rewrite:
        write(notebook, target)
        return
    kept = shown(nbformat.read(target, as_version=4))
    if any(kept) and kept != shown(notebook):
        raise AssertionError(
            f"{target.name} shows {kept}, its cells now {shown(notebook)}: make tutorials"
        )


def timed(job: Callable[[], None]) -> float:
    """How many seconds it took."""
    start = time.monotonic()
    job()
    return time.monotonic() - start


def main(arguments: list[str]) -> int:
    """Run the tutorials; the exit code."""
    rewrite = "--write" in arguments
    named = [Path(argument) for argument in arguments if argument != "--write"]
    paths = named or TEXTS
    if not paths:
        print("no tutorial to run")
        return 1
    jobs = [(path.name, partial(execute, path, rewrite)) for path in paths]
    if not named and not rewrite:
        jobs.insert(0, ("setup cell, without the package", run_without_package))
    # Kernels inherit them: the model that needs no network, and this environment's Python.
    os.environ["MSPGT_LENS_TUTORIAL_MODEL"] = "demo"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # Figures as data, which is drawn when a notebook is written.
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    # More threads than cores wait for one another.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE))
    failed = 0
    with ProcessPoolExecutor(SIDE_BY_SIDE) as pool:
        for name, run in [(name, pool.submit(timed, job)) for name, job in jobs]:
            # Whatever it is, it is this job's failure.
            error = run.exception()
            if error is None:
                print(f"{name}: passed in {run.result():.0f} s", flush=True)
            else:
                failed += 1
                print(_COLORS.sub("", f"{type(error).__name__}: {error}"))
                print(f"{name}: FAILED", flush=True)
    print(f"{len(jobs) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
