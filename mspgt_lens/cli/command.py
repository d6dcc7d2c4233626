"""The ``mspgt-lens`` command."""

from __future__ import annotations

import argparse
import io
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from mspgt_lens.cli.analyze import add_analyze_command
from mspgt_lens.cli.brittleness import add_brittleness_command
from mspgt_lens.cli.launching import Launch, launched
from mspgt_lens.cli.patch import add_patch_command
from mspgt_lens.cli.plan import add_plan_command
from mspgt_lens.cli.profile import add_profile_command
from mspgt_lens.cli.rates import add_rates_command
from mspgt_lens.cli.reading import read_documents
from mspgt_lens.cli.scales import add_scales_command
from mspgt_lens.processes import PeerError
from mspgt_lens.storage import result_file

# What a command reads, and what it writes.
_READ = ("prompts", "pairs", "profile", "partition", "curves")
_WRITTEN = ("out", "save")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show must not cost the run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with launched() as launch:
            return launch.end(*_outcome(arguments, launch))
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"mspgt-lens: {error}", file=sys.stderr)
        return 2


def _outcome(arguments: Sequence[str] | None, launch: Launch) -> tuple[int, str]:
    """Exit code of this process, and the error that stopped it."""
    options = _parser().parse_args(arguments)
    options.launch = launch
    # One line per warning: where in the package it was raised says nothing to a reader.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        if launch.size > 1 and not hasattr(options, "shares_work"):
            raise ValueError(
                f"{options.command} runs in one process, and {launch.size} were started: start it "
                "without torchrun; commands that measure share their work"
            )
        _check_places(options)
        if getattr(options, "prompts", None) is not None:
            # Before the model is loaded, which may take long.
            options.prompts = read_documents(options.prompts)
            print(f"{options.prompts.path}: {options.prompts}")
        return int(options.run(options)), ""
    except KeyboardInterrupt:
        return 130, f"interrupted; {_kept(options)}"
    except PeerError:
        return 2, ""
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        ImportError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ) as error:
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        # Some say nothing, and the end must not be silent.
        return 2, said or type(error).__name__
    except Exception:
        if launch.size == 1:
            raise
        return 1, traceback.format_exc()


def _check_places(options: argparse.Namespace) -> None:
    """See that nothing is written over what is read, or over what else is written."""
    taken: dict[Path, str] = {}
    for name in (*_READ, *_WRITTEN):
        given = getattr(options, name, None)
        if given is None:
            continue
        is_result = name in ("profile", "partition") and not given.is_file()
        path = (result_file(given) if is_result else given).resolve()
        if name in _WRITTEN and path in taken:
            raise ValueError(
                f"--{name} would be written over --{taken[path]}, {given}: give another name"
            )
        taken[path] = name


def _kept(options: argparse.Namespace) -> str:
    """What there is of a run that was interrupted."""
    if options.command == "analyze" or getattr(options, "checkpoint", None) is not None:
        return "start it again in the same way to go on"
    return "nothing was written"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mspgt-lens",
        description="How a language model's layers divide the work: what each one compresses, "
        "keeps of the past and predicts of the future.",
    )
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    for add in (
        add_profile_command,
        add_scales_command,
        add_patch_command,
        add_brittleness_command,
        add_rates_command,
        add_plan_command,
        add_analyze_command,
    ):
        add(commands)
    return parser
