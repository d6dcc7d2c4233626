"""A checker for jaxtyping's import hook that looks at arrays only: their shapes and dtypes.

Functions that are public, or say what they raise, name what is wrong with their arguments
themselves, and tests see to that: of those only what they return is checked.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import AbstractArray

_PACKAGE = Path(__file__).parent.parent / "mspgt_lens"
# By name, since the hook hands over copies without docstrings.
_CHECK_THEMSELVES = {
    alias.name
    for room in ("__init__.py", "arrays.py")
    for node in ast.walk(ast.parse((_PACKAGE / room).read_text("utf-8")))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
} | {
    node.name
    for path in _PACKAGE.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    and "Raises:" in (ast.get_docstring(node) or "")
}


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its annotated arrays checked at every call."""
    hints = typing.get_type_hints(function)
    arrays = {name: hint for name, hint in hints.items() if _holds_arrays(hint)}
    if _CHECK_THEMSELVES & set(function.__qualname__.split(".")):
        arrays = {name: hint for name, hint in arrays.items() if name == "return"}
    if not arrays:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name in arrays and not _fits(value, arrays[name]):
                raise TypeError(f"{function.__qualname__}: {name} is no {arrays[name]}")
        result = function(*args, **kwargs)
        if "return" in arrays and not _fits(result, arrays["return"]):
            raise TypeError(f"{function.__qualname__} does not return {arrays['return']}")
        return result

    return checked


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _holds_arrays(hint: Any) -> bool:
    return _is_array(hint) or any(map(_holds_arrays, typing.get_args(hint)))


def _fits(value: Any, hint: Any) -> bool:
    if _is_array(hint):
        return isinstance(value, hint)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(
            _fits(value, one) if _holds_arrays(one) else _is_one(value, one) for one in arguments
        )
    if typing.get_origin(hint) is tuple and isinstance(value, tuple) and ... not in arguments:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return True


def _is_one(value: Any, hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
