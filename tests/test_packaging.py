"""What is installed with the package is what it imports."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

from declared import PROJECT

import mspgt_lens

ROOT = Path(mspgt_lens.__file__).parent


def named(requirement: str) -> str:
    return normalized(re.split(r"[\[<>=!~; ]", requirement)[0])


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_packages() -> dict[str, set[str]]:
    """Name of a package outside the standard library to the modules that import it."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "mspgt_lens":
                    found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    return found


def test_whatever_is_imported_is_required() -> None:
    required = {named(one) for one in PROJECT["dependencies"]}
    # What these bring for certain, and what is asked for where it is used.
    brought = {"markupsafe": "jinja2", "transformers": "transformer-lens"}
    optional = {
        named(one) for extra in ("demo", "text") for one in PROJECT["optional-dependencies"][extra]
    }
    of_module = metadata.packages_distributions()
    for module, where in imported_packages().items():
        names = {normalized(name) for name in of_module.get(module, [module])}
        known = required | optional | {name for name in brought if brought[name] in required}
        assert names & known, f"{module} is imported by {sorted(where)[:3]} and not required"


def test_whatever_is_required_is_imported() -> None:
    of_module = metadata.packages_distributions()
    used = {normalized(name) for top in imported_packages() for name in of_module.get(top, [top])}
    assert {named(one) for one in PROJECT["dependencies"]} - used == set()


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]
