"""The layout's rules: modules import in one direction, and one package knows TransformerLens."""

import ast
import importlib
import inspect
import re
import typing
from pathlib import Path

import jaxtyping
import pytest

import mspgt_lens

ROOT = Path(mspgt_lens.__file__).parent
# Each may import from itself and from those before it.
ORDER = [
    "ambient",
    "processes",
    "storage",
    "products",
    "contract",
    "statistics",
    "estimates",
    "folds",
    "models",
    "halving",
    "partition",
    "padding",
    "prompts",
    "targets",
    "signals",
    "moments",
    "gathering",
    "information",
    "estimators",
    "profile",
    "lens",
    "scales",
    "hvib",
    "perturbation",
    "rates",
    "patching",
    "generation",
    "theory",
    "studies",
    "synthetic",
    "arrays",
    "extending",
    "plots",
    "report",
    "results",
    "cli",
    "__main__",
]
# What one takes in at a glance.
MOST_NAMES = 36
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


def test_the_top_level_can_be_surveyed():
    """Few names, each grouped in the docstring by what one wants to do."""
    rooms = {name for name in mspgt_lens.__all__ if inspect.ismodule(getattr(mspgt_lens, name))}
    names = set(mspgt_lens.__all__) - rooms
    assert len(names) <= MOST_NAMES
    assert mspgt_lens.__doc__ is not None
    grouped = set(re.findall(r"\w+", mspgt_lens.__doc__))
    assert set(mspgt_lens.__all__) - grouped == set()


def annotated(module):
    """Functions and classes that a module defines, with the methods of the classes."""
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield thing
            for method in vars(thing).values():
                method = getattr(method, "fget", None) or getattr(method, "func", method)
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method) and method.__module__ == module.__name__:
                    yield method
        elif inspect.isfunction(thing):
            yield thing


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_annotation_means_something_at_run_time(path):
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    for thing in annotated(module):
        typing.get_type_hints(thing)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_are_strings(path):
    """In functions within functions, too, whose annotations nothing evaluates."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            kind = getattr(node.value, "attr", getattr(node.value, "id", None))
            if kind in {name for name in dir(jaxtyping) if name[0].isupper()}:
                axes = node.slice.elts[-1]
                assert isinstance(axes, ast.Constant), f"{path}:{node.lineno}"
                assert isinstance(axes.value, str), f"{path}:{node.lineno}"


def constants(path):
    """Names that a module gives a value of its own, and the value as it is written."""
    for node in ast.parse(path.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper():
                yield target.id, ast.unparse(node.value)


@pytest.mark.parametrize("room", ORDER)
def test_a_constant_has_one_value_in_its_room(room):
    shared = dict(constants(ROOT / "statistics.py"))
    values = {}
    for path in MODULES:
        if place(path) == room:
            for name, value in constants(path):
                # What all rooms take from statistics means the same everywhere.
                assert room == "statistics" or name not in shared, f"{path}: {name}"
                if not name.startswith("_"):
                    values.setdefault(name, set()).add(value)
    assert not {name: found for name, found in values.items() if len(found) > 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_private_is_used_where_it_is(path):
    tree = ast.parse(path.read_text("utf-8"))
    named = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    named |= {name for name, _ in constants(path)}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and type(n.ctx) is ast.Load}
    assert not {name for name in named - used if name.startswith("_")}
