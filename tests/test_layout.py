"""The layout's rules: modules import in one direction, and one package knows TransformerLens."""

import ast
from pathlib import Path

import pytest

import mspgt_lens

ROOT = Path(mspgt_lens.__file__).parent
# Each may import from itself and from those before it.
ORDER = [
    "results",
    "storage",
    "statistics",
    "models",
    "partition",
    "prompts",
    "targets",
    "moments",
    "gathering",
    "information",
    "estimators",
    "profile",
    "scales",
    "hvib",
    "perturbation",
    "patching",
    "generation",
    "theory",
    "studies",
    "plots",
    "report",
    "cli",
]
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def place(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_in_one_direction(path):
    mine = place(path)
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "mspgt_lens":
            assert rest, f"{path} imports the top level, which only exports"
            assert ORDER.index(rest[0]) <= ORDER.index(mine), f"{path} imports {name}"
        if package == "transformer_lens":
            assert mine == "models", f"{path} knows TransformerLens"
        if package == "plotly":
            assert mine in ("plots", "report", "cli"), f"{path} computes and plots"
        assert package != "pickle", f"{path} pickles"


def test_every_module_has_its_place():
    assert {place(path) for path in MODULES} == set(ORDER)


def test_every_name_that_is_exported_is_listed():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == set(mspgt_lens.__all__)
    assert not [name for name in names if name.startswith("test_")]
