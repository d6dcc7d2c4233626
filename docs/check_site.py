"""See that the reference of the built site has an entry for every public name.

    python docs/check_site.py build/site

Reads what mkdocstrings wrote (``objects.inv``) and the package's ``__all__``, and imports nothing.
"""

from __future__ import annotations

import ast
import sys
import zlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mspgt_lens"


def public_names() -> list[str]:
    """Every public name with its room, such as ``theory.water_fill``."""
    top = _exported(PACKAGE / "__init__.py")
    names = []
    for name in top:
        room = _room(name)
        names += [name] if room is None else [f"{name}.{inner}" for inner in _exported(room)]
    return names


def missing(site: Path) -> list[str]:
    """Public names that the site's reference lacks."""
    inventory = (site / "objects.inv").read_bytes()
    # Four lines of header, then one line an entry.
    entries = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    known = {entry.split()[0] for entry in entries}
    # A function in a module of its own name is entered as the module's.
    return [
        name
        for name in public_names()
        if not {f"mspgt_lens.{name}", f"mspgt_lens.{name}.{name.split('.')[-1]}"} & known
    ]


def _room(name: str) -> Path | None:
    """The file of a room: a module of the package that the top level exports."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            place = PACKAGE.parent.joinpath(*str(node.module).split("."), name)
            files = (place.with_suffix(".py"), place / "__init__.py")
            return next((file for file in files if file.exists()), None)
    return None


def _exported(file: Path) -> list[str]:
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    # Without a list, a room offers the functions that it defines.
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in named if not name.startswith("_")]


if __name__ == "__main__":
    absent = missing(Path(sys.argv[1]))
    if absent:
        raise SystemExit(f"the reference lacks: {', '.join(absent)}")
    print(f"the reference has all {len(public_names())} public names")
