"""``mspgt-lens brittleness``: noise in every block and segment, as a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mspgt_lens.cli.arguments import numbers
from mspgt_lens.cli.options import (
    add_documents,
    add_files,
    add_length,
    add_model,
    add_prompts,
    add_run,
    prompts_for,
)
from mspgt_lens.cli.placing import load_placed
from mspgt_lens.cli.reading import first_windows
from mspgt_lens.contract import aligned
from mspgt_lens.partition import ScalePartition, Segments
from mspgt_lens.perturbation.brittleness import DEFAULT_LEVELS, measure_brittleness
from mspgt_lens.report.tables import ratio_rows, slope_rows
from mspgt_lens.report.writing import write_report


def add_brittleness_command(commands: Any) -> None:
    """Add ``brittleness`` to the command's subparsers."""
    command = commands.add_parser(
        "brittleness",
        help="noise in every block and segment: which one breaks first",
        description="Add noise of several strengths, in the activations' own covariance and "
        "isotropic, to every block and to every segment of blocks, and write how far predictions "
        "move as one HTML report. The first window of every document is used.",
        epilog="example: mspgt-lens brittleness gpt2 --blocks 4,8 --out brittleness.html",
    )
    add_model(command)
    add_prompts(command)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--partition", type=Path, metavar="PATH", help="a saved partition")
    what.add_argument(
        "--blocks",
        type=numbers(int, "10,20"),
        metavar="N,N",
        help="first block of every segment but the first, such as 10,20",
    )
    command.add_argument(
        "--levels",
        type=numbers(float, "0.1,0.5"),
        default=DEFAULT_LEVELS,
        metavar="X,X",
        help="noise levels, rising, in units of the activations' own spread (default: "
        f"{','.join(f'{x:g}' for x in DEFAULT_LEVELS)})",
    )
    add_documents(command, least=3, default=24)
    add_length(command, default=64, said="tokens of each document")
    add_files(command, "brittleness.html", "numbers")
    add_run(command)
    command.set_defaults(run=_brittleness, shares_work=True)


def _brittleness(options: argparse.Namespace) -> int:
    partition: Segments = options.blocks
    if options.partition is not None:
        partition = ScalePartition.load(options.partition)
    model = load_placed(options, options.model)
    brittleness = measure_brittleness(
        model,
        first_windows(prompts_for(options, model, options.n_documents), options.n_documents),
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
