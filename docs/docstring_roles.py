"""Sphinx roles in docstrings, as the site's links: help() shows them as they are written."""

from __future__ import annotations

import re
from typing import Any

import griffe

# What griffe knows as a section of examples; under this name it is a box of text.
_EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?\.?([\w.]+)`")


class DocstringRoles(griffe.Extension):
    """Turns ``:func:`name``` into a link where the reference has the name, else into code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring, once all are known."""
        rooms = [name for name in pkg.exports or () if pkg[str(name)].is_module]
        places = {str(name): f"{pkg.path}.{name}" for name in pkg.exports or ()}
        for room in map(str, rooms):
            for name in pkg[room].exports or pkg[room].members:
                place = f"{pkg.path}.{room}.{name}"
                # A function in a module of its own name: griffe calls the module so.
                own = f".{name}" if pkg[f"{room}.{name}"].is_module else ""
                places[f"{room}.{name}"] = f"{place}{own}"
                places.setdefault(str(name), f"{place}{own}")
        _rewrite(pkg, places, set())


def _rewrite(thing: Any, places: dict[str, str], seen: set[str]) -> None:
    if thing.is_alias or thing.path in seen:
        return
    seen.add(thing.path)
    if thing.docstring is not None:
        linked = _ROLE.sub(lambda role: _link(role[1], thing, places), thing.docstring.value)
        thing.docstring.value = _EXAMPLE.sub("Examples:", linked)
    for member in thing.members.values():
        _rewrite(member, places, seen)


def _link(name: str, thing: Any, places: dict[str, str]) -> str:
    parts = [part for part in name.split(".") if part != "mspgt_lens"]
    label = f"`{parts[-1]}`"
    # The longest beginning that is public: what follows are its members.
    for length in range(len(parts), 0, -1):
        if place := places.get(".".join(parts[:length])):
            return f"[{label}][{'.'.join((place, *parts[length:]))}]"
    owner = thing if thing.is_class else thing.parent
    if owner.is_class and owner.name in places and parts[0] in owner.members:
        return f"[{label}][{places[owner.name]}.{parts[0]}]"
    return f"[{label}][{places[parts[-1]]}]" if parts[-1] in places else label
