"""Arguments that are checked while they are parsed: numbers in a range, places to write to."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mspgt_lens.storage import result_file

# The largest seed that torch takes.
MOST_SEED = 2**63 - 1


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """What reads a whole number in a range, both ends included."""

    def number(text: str) -> int:
        upper = "" if most is None else f" and at most {most:,}"
        wrong = argparse.ArgumentTypeError(
            f"must be a whole number, at least {least:,}{upper}, got {text!r}"
        )
        try:
            value = int(text)
        except ValueError:
            raise wrong from None
        if value < least or (most is not None and value > most):
            raise wrong
        return value

    return number


def numbers(kind: Callable[[str], Any], example: str) -> Callable[[str], tuple[Any, ...]]:
    """What reads numbers of a kind, separated by commas."""

    def numbers(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(
                f"must be {whole}numbers separated by commas, such as {example}, got {text!r}"
            ) from error

    return numbers


def new_file(text: str) -> Path:
    """A file that can be written, or replaced; seen before a run, which may take long.

    Raises:
        ArgumentTypeError: If it cannot.
    """
    path = Path(text)
    with _asking(text):
        if path.is_dir() or not path.name:
            raise argparse.ArgumentTypeError(
                f"must be a file, and {text!r} is a folder: add a name"
            )
        _check_free(path)
        _check_writable(path.parent)
    return path


def new_result(text: str) -> Path:
    """A file that a result can be saved in, or replace; its suffix may be left out.

    Raises:
        ArgumentTypeError: If it cannot.
    """
    path = result_file(new_file(text))
    with _asking(text):
        _check_free(path)
    return path


def new_folder(text: str) -> Path:
    """A folder that can be made, or written into.

    Raises:
        ArgumentTypeError: If it cannot.
    """
    path = Path(text)
    with _asking(text):
        _check_writable(path)
    return path


def _check_free(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(
            f"must be a file, or nothing yet, and {str(path)!r} is something else: give another "
            "name"
        )


def _check_writable(folder: Path) -> None:
    # Nothing is made yet: the run may fail.
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


@contextmanager
def _asking(text: str) -> Iterator[None]:
    """While the disk is asked about a path: names may be too long, folders closed."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error}") from error
