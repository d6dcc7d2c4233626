"""Curves from elsewhere: read from a table, tested and drawn without a model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mspgt_lens as ml
from mspgt_lens.cli import main
from mspgt_lens.cli.curves import read_curves

GOOD = "site,loss,span\n" + "\n".join(f"{i},{0.5 * i},{i % 3}" for i in range(9))


def written(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("site", "sites"),
        ("Sites", "sites"),
        ("block", "blocks"),
        ("layer", "blocks"),
        ("Layer", "blocks"),
        ("", "blocks"),
    ],
)
def test_a_column_that_numbers_the_rows_is_no_curve(tmp_path, header, rows):
    table, told = read_curves(written(tmp_path, GOOD.replace("site", header)))
    assert told == rows
    assert list(table.columns) == ["loss", "span"]
    np.testing.assert_array_equal(table["loss"], 0.5 * np.arange(9))


def test_the_numbering_column_may_stand_anywhere_and_layers_may_be_sites(tmp_path):
    frame = pd.DataFrame({"a": [1.0, 2.0, 4.0], "layer": [0, 1, 2], "b": [3.0, 2.0, 2.0]})
    path = tmp_path / "table.csv"
    frame.to_csv(path, index=False)
    table, rows = read_curves(path, "sites")
    assert (list(table.columns), rows) == (["a", "b"], "sites")
    frame[["a", "b"]].to_csv(path)
    pd.testing.assert_frame_equal(read_curves(path)[0], frame[["a", "b"]])
    frame[["a", "b"]].to_csv(path, index=False)
    table, rows = read_curves(written(tmp_path, b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n"))
    assert (list(table.columns), rows) == (["a", "b"], "blocks")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("\n4,", "\n3,"), "'site' of .* got 3 where 4 is due"),
        (GOOD.replace("\n4,", "\n5,"), "got 5 where 4 is due"),
        (GOOD.replace("\n0,0.0,0", ""), "got 1 where 0 is due: .* count from 0"),
        (GOOD.replace("site", "").replace("\n4,", "\n40,"), "the first, unnamed column"),
        (GOOD.replace("1.5", "about 1"), "'loss' in line 5 .* finite number, got 'about 1'"),
        (GOOD.replace("1.5", ""), "'loss' in line 5 .* got nothing"),
        (GOOD.replace("1.5", "NaN"), "'loss' in line 5 .* got NaN"),
        (GOOD.replace("1.5", "-inf"), "'loss' in line 5 .* got -inf"),
        (GOOD.replace("loss", "span"), "two columns called 'span'"),
        (GOOD.replace("loss", "block"), "'site' and 'block' .* keep one"),
        (GOOD.replace("span", ""), "column 3 .* has no name"),
        (GOOD.replace(",", ";"), "separated by commas"),
        (GOOD.replace("1.5,0", "1.5"), "line 5 .* has 2 cells where the header has 3"),
        (GOOD.replace("1.5,0", "1.5,0,7"), "line 5 .* has 4 cells"),
        ("site\n0\n1", "no curve beside 'site'"),
        ("loss" + "\n1" * 501, "500 at most, got 501: give one number per layer"),
        ("site,loss\n", "got no row"),
        ("", "got no row"),
        (GOOD.encode("utf-16"), "is UTF-16"),
        (GOOD.replace("loss", "\xe9").encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_is_no_such_table_is_named(tmp_path, capsys, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        read_curves(path)
    assert main(["scales", "--curves", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mspgt-lens: --curves: ")
    assert len(shown.splitlines()) == 1


def test_what_does_not_go_together_is_named(tmp_path, capsys):
    curves = ["scales", "--curves", str(written(tmp_path, GOOD))]
    prompts = ["--prompts", str(written(tmp_path, "a text", "texts.txt"))]
    for arguments, message in (
        (["scales", "--curves", str(tmp_path / "none.csv")], "no file at"),
        (["scales", "--curves", str(tmp_path)], "is a folder"),
        ([*curves, "--rows", "blocks"], "--rows blocks, but the column 'site'"),
        (["scales", "demo", *curves[1:]], "leave out model"),
        ([*curves, "--device", "cpu", *prompts], "leave out --prompts, --device"),
        ([*curves, "--method", "thirds"], "--method thirds needs a model"),
        (["scales", "demo", "--rows", "sites"], "--rows says what the rows of --curves are"),
        (["scales"], "needs a MODEL, or --curves"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_curves_are_tested_and_drawn_without_a_model(tmp_path, capsys):
    levels = pd.DataFrame(
        np.random.default_rng(0).standard_normal((21, 4)), columns=["a", "b", "c", "<i>d</i>"]
    )
    levels.iloc[10:] += 40.0
    path, out, kept = tmp_path / "mine.csv", tmp_path / "curves.html", tmp_path / "kept"
    levels.to_csv(path, index_label="site")
    files = ["--curves", str(path), "--out", str(out), "--save", str(kept)]
    assert main(["scales", *files]) == 0
    shown = capsys.readouterr().out
    assert "4 curves over 21 sites" in shown
    assert "A sharp change at block 9, shared by 4 of 4 signals" in shown
    found = ml.results.ScalePartition.load(kept)
    assert (found.model_name, found.n_layers) == ("mine", 20)
    assert [change.block for change in found.found] == [9]
    page = out.read_text()
    assert "jump, block 9" in page
    assert "A sharp change at block 9, shared by 4 of 4 signals" in page
    assert "<i>d" not in page
    levels.to_csv(path, index=False)
    assert main(["scales", *files]) == 0
    assert "A sharp change at block 10, shared by 4 of 4 signals" in capsys.readouterr().out


def test_the_how_to_runs_and_finds_what_it_says(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "curves.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        exec(block, scope)
    told = capsys.readouterr().out

    def changes(text):
        return re.findall(r"^(A [a-z ]+) at block (\d+)", text, flags=re.MULTILINE)

    # What the page says was made.
    assert changes(told) == [
        ("A sharp change", "6"),
        ("A bend", "15"),
        ("A sharp change of span alone", "11"),
    ]
    assert changes(page) == changes(told)
    assert main(["scales", "--curves", "curves.csv", "--out", "curves.html"]) == 0
    assert changes(capsys.readouterr().out) == changes(told)
