"""Odd arguments and files get one message and exit code 2 from the command, never a traceback."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_profile import made_profile

from mspgt_lens.cli import arguments, command, placing
from mspgt_lens.cli.reading import read_documents, read_records
from mspgt_lens.models.placing import Placement

NEEDED = {"brittleness": ["--blocks", "1,3"], "patch": ["--task", "induction"]}
COMMANDS = ("profile", "scales", "brittleness", "rate-distortion", "patch", "analyze")
NUMBERS = ("", "x", "-1", "1.5", "1e3", "nan", "inf", "9" * 40, "\u0663\u00bd", "0x10", "1,2")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and no model is ever loaded."""
    monkeypatch.chdir(tmp_path)

    def load(name: str, **given: Any) -> Any:
        Placement(**given)
        raise OSError("no model here")

    monkeypatch.setattr(placing, "load_model", load)


def outcome(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of arguments that it must refuse."""
    try:
        code = command.main(given)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2, (given, error)
    assert "Traceback" not in error
    assert "mspgt-lens" in error.splitlines()[-1]
    return error


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("value", NUMBERS)
def test_odd_numbers(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seed", "--n-devices"]
    flags += [] if name == "patch" else ["--max-length"]
    flags += {
        "patch": ["--n-pairs", "--window"],
        "brittleness": ["--levels"],
        "rate-distortion": ["--n-targets", "--sites", "--distortions"],
    }.get(name, [])
    flags += ["--n-documents"] if name not in ("scales", "patch") else []
    for flag in flags:
        error = outcome([name, "some/name", *NEEDED.get(name, []), f"{flag}={value}"], capsys)
        if flag == "--seed":
            assert "argument --seed: must be a whole number, at least 0" in error


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("value", ["", "nowhere", "cuda:99", "meta:x", "\U0001f40d", "cpu:-2", "0"])
def test_odd_devices(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = outcome([name, "some/name", *NEEDED.get(name, []), "--device", value], capsys)
    if value != "cpu:-2" and not torch.cuda.is_available():
        assert f"device: {value!r} cannot be used here" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_places_that_cannot_be_written_are_told_before_anything_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    flags = ["--out"] if name == "analyze" else ["--out", "--save"]
    for flag in flags:
        given = [name, "some/name", *NEEDED.get(name, [])]
        odd = ["file/inside/x"] + ([] if name == "analyze" else ["", ".", str(tmp_path)])
        for path in odd:
            assert f"argument {flag}: " in outcome([*given, flag, path], capsys)
        assert "no model here" in outcome([*given, flag, "new/folder/x.html"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_place_is_tried_without_leaving_anything(tmp_path: Path) -> None:
    assert arguments.new_folder("a/b") == Path("a/b")
    assert arguments.new_file("a/b.html") == Path("a/b.html")
    (tmp_path / "there.html").write_text("old")
    assert arguments.new_file("there.html") == Path("there.html")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder: add a name"):
        arguments.new_file(str(tmp_path))


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_files_of_prompts_profiles_and_tables(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever bytes there are: what is no text, no JSON, no table, no result."""
    rng = np.random.default_rng(0)
    contents = [
        b"",
        b"\0",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf",
        b"[" * 100_000,
        b'{"text": ' * 30_000,
        b"[1, 2",
        b'["a", 3]',
        b'{"text": 3}',
        b'{"text": "a", "group": [1]}',
        b'{"text": "a", "group": {}}',
        b'{"n": ' + b"1" * 5000 + b"}",
        b'a,b\n1,"' + b"x" * 200_000,
        b"a,b\n1,2\n1",
        b"a,b\r\rc\r1,2",
        "\u2028\u2029\x85".encode(),
        *(rng.bytes(200) for _ in range(20)),
    ]
    given = [name, "some/name", *NEEDED.get(name, [])]
    flags = {
        "profile": ["--prompts"],
        "scales": ["--prompts", "--profile", "--curves"],
        "brittleness": ["--prompts"],
        "rate-distortion": ["--prompts"],
        "patch": ["--pairs", "--partition"],
        "analyze": ["--prompts"],
    }[name]
    for number, content in enumerate(contents):
        for suffix in (".txt", ".jsonl", ".json", ".csv"):
            path = tmp_path / f"odd{number}{suffix}"
            path.write_bytes(content)
            for flag in flags:
                drop = {"--curves": ["some/name"], "--pairs": ["--task", "induction"]}.get(flag, [])
                outcome([x for x in given if x not in drop] + [flag, str(path)], capsys)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"text": ' * 30_000, '{"a": ' + "1" * 5000])
def test_json_that_python_cannot_hold_is_no_json(content: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"line 1 of .*deep\.jsonl is not JSON"):
        read_documents(path)
    with pytest.raises(ValueError, match=r"--pairs: .*deep\.jsonl is not|--pairs: line 1 of"):
        read_records("--pairs", path)


def test_a_saved_result_of_another_kind_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = made_profile(n_layers=6).save(tmp_path / "profile")
    given = ["brittleness", "some/name", "--partition", str(saved)]
    assert "must hold a ScalePartition" in outcome(given, capsys)
    saved.write_bytes(saved.read_bytes()[:100])
    assert "is not a saved LayerProfile" in outcome(
        ["scales", "some/name", "--profile", str(saved)], capsys
    )


@pytest.mark.parametrize(
    "given",
    [[], ["--"], ["nothing"], ["profile"], ["scales"], ["patch", "m"], ["analyze"], ["\U0001f40d"]],
)
def test_commands_that_are_none(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    outcome(given, capsys)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), RecursionError("deep")])
def test_what_fails_while_it_runs_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str, **given: Any) -> Any:
        raise error

    monkeypatch.setattr(placing, "load_model", load)
    assert outcome(["profile", "some/name"], capsys) == f"mspgt-lens: {error}\n"


def test_what_the_terminal_cannot_show_is_shown_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "\u0436.jsonl"
    path.write_text(json.dumps({"text": "a"}))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert command.main(["profile", "some/name", "--prompts", str(path)]) == 2
    sys.stdout.flush()
    assert rb"\u0436.jsonl: 1 document" in shown.getvalue()
