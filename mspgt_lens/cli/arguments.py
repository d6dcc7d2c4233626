"""Arguments that are checked while they are parsed: numbers in a range, places to write to."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The largest seed that torch takes.
MOST_SEED = 2**63 - 1


def add_seed(command: argparse.ArgumentParser) -> None:
    """Add the seed."""
    command.add_argument(
        "--seed",
        type=whole_number(0, MOST_SEED),
        default=0,
        metavar="N",
        help="default: %(default)s",
    )


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


def numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """What reads numbers of a kind, separated by commas."""

    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    return numbers


def new_file(text: str) -> Path:
    """A file that can be written, or replaced; seen before a run, which may take long.

    Raises:
        ArgumentTypeError: If it cannot.
    """
    path = Path(text)
    if path.is_dir() or not path.name:
        raise argparse.ArgumentTypeError(f"must be a file, and {text!r} is a folder: add a name")
    return _writable(path, path.parent)


def new_folder(text: str) -> Path:
    """A folder that can be made, or written into.

    Raises:
        ArgumentTypeError: If it cannot.
    """
    return _writable(Path(text), Path(text))


def _writable(path: Path, folder: Path) -> Path:
    try:
        # Nothing is made yet: the run may fail.
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{str(path)!r} cannot be written: {error}") from error
    return path
