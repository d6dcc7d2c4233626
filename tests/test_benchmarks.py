"""Benchmarks are one table: each is found, and no column is lost."""

import ast
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def defined(module: str) -> set[str]:
    tree = ast.parse((FOLDER / f"{module}.py").read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_comparison_is_in_the_table():
    helpers = {"__init__", "__main__", "table", "chance"}
    modules = {path.stem for path in FOLDER.glob("*.py")} - helpers
    main = ast.parse((FOLDER / "__main__.py").read_text("utf-8"))
    (named,) = (
        ast.literal_eval(node.value)
        for node in main.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES"
    )
    assert set(named) == modules
    for module in modules:
        assert "compare" in defined(module), module


def test_a_table_of_comparisons(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    from benchmarks.table import Comparison, surroundings, table_of

    rows = [
        Comparison("ours", 1.0, "theirs", 4.0, "s", "below 1"),
        Comparison("rate", 0.5, "none", 0.0, "nats"),
    ]
    table = table_of("made up", rows)
    assert table.ratio.iloc[0] == 0.25
    assert table.ratio.isna().tolist() == [False, True]
    assert table.benchmark.unique().tolist() == ["made up"]
    told = surroundings()
    assert {"date", "processor", "threads", "torch", "transformer-lens", "python"} <= set(told)
    assert all(told.values())
    assert len(table_of("made up", [])) == 0
