"""``mspgt-lens brittleness``: noise in every block and segment, as a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mspgt_lens.cli.arguments import add_seed, new_file, numbers, whole_number
from mspgt_lens.cli.placing import add_placing, load_placed
from mspgt_lens.cli.reading import first_windows
from mspgt_lens.contract import aligned
from mspgt_lens.partition import ScalePartition, Segments
from mspgt_lens.perturbation.brittleness import (
    DEFAULT_LEVELS,
    measure_brittleness,
)
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.report.tables import ratio_rows, slope_rows
from mspgt_lens.report.writing import write_report


def add_brittleness_command(
    commands: Any,
    add_model: Callable[[argparse.ArgumentParser], None],
    prompts_of: Callable[[argparse.Namespace, Any], PromptDataset],
) -> None:
    """Add ``brittleness`` to the command's subparsers.

    Args:
        commands: The subparsers.
        add_model: Adds the model and its prompts.
        prompts_of: Reads the prompts.
    """
    command = commands.add_parser(
        "brittleness",
        help="noise in every block and segment: which one breaks first",
        description="Add noise of several strengths, in the activations' own covariance and "
        "isotropic, to every block and to every segment of blocks, and write how far predictions "
        "move as one HTML report. The first window of every document is used.",
        epilog="example: mspgt-lens brittleness gpt2 --blocks 4,8 --out brittleness.html",
    )
    add_model(command)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--partition", type=Path, metavar="PATH", help="a saved partition")
    what.add_argument(
        "--blocks",
        type=numbers(int),
        metavar="N,N",
        help="first block of every segment but the first, such as 10,20",
    )
    command.add_argument(
        "--levels",
        type=numbers(float),
        default=DEFAULT_LEVELS,
        metavar="X,X",
        help=f"noise levels, rising (default: {','.join(f'{x:g}' for x in DEFAULT_LEVELS)})",
    )
    command.add_argument(
        "--n-documents", type=int, default=24, metavar="N", help="at most (default: 24)"
    )
    command.add_argument(
        "--max-length",
        type=whole_number(2),
        default=64,
        metavar="N",
        help="tokens of each document (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=new_file,
        default="brittleness.html",
        metavar="HTML",
        help="default: %(default)s",
    )
    command.add_argument("--save", type=new_file, metavar="PATH", help="also save the numbers")
    add_seed(command)
    add_placing(command)
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    command.set_defaults(run=lambda options: _brittleness(options, prompts_of), shares_work=True)


def _brittleness(
    options: argparse.Namespace, prompts_of: Callable[[argparse.Namespace, Any], PromptDataset]
) -> int:
    if options.n_documents < 3:
        raise ValueError(f"--n-documents must be at least 3, got {options.n_documents}")
    partition: Segments = options.blocks
    if options.partition is not None:
        partition = ScalePartition.load(options.partition)
    model = load_placed(options, options.model)
    brittleness = measure_brittleness(
        model,
        first_windows(prompts_of(options, model), options.n_documents),
        partition,
        levels=options.levels,
        seed=options.seed,
        progress=not options.no_progress,
        process_group=options.launch.group(model),
    )
    if not options.launch.is_first:
        return 0
    print(f"\n{brittleness.model_name}: {brittleness.settings['n_groups']} documents\n")
    print(f"{aligned(slope_rows(brittleness))}\n\n{aligned(ratio_rows(brittleness))}\n")
    for note in brittleness.warnings:
        print(f"note: {note}")
    if options.save is not None:
        print(f"numbers: {brittleness.save(options.save).resolve()}")
    path = write_report(options.out, brittleness)
    print(f"report: {path.resolve()}")
    return 0
