"""``mspgt-lens scales``: boundaries of a model, of a saved profile or of a table of curves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mspgt_lens.cli.curves import read_curves
from mspgt_lens.cli.options import (
    DEFAULT_LENGTH,
    add_checkpoint,
    add_files,
    add_length,
    add_model,
    add_prompts,
    add_run,
    prompts_for,
)
from mspgt_lens.cli.placing import PLACING, load_placed
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.settings import Control
from mspgt_lens.report.writing import write_report
from mspgt_lens.scales.detection import (
    METHODS,
    PUBLISHED_METHODS,
    check_depth,
    detect_scales,
    signals_for,
)
from mspgt_lens.scales.segments import Rows, segment_blocks

# What only a pass over prompts takes.
_OF_A_PASS = ("prompts", "max_length", "control", "checkpoint", *PLACING)


def add_scales_command(commands: Any) -> None:
    """Add ``scales`` to the command's subparsers."""
    command = commands.add_parser(
        "scales",
        help="find scale boundaries, tested against gradual drift",
        description="Find the boundaries between Local, Intermediate and Global blocks, or find "
        "that the data do not support any; print the partition and write its figures.",
        epilog="examples: mspgt-lens scales gpt2 --prompts texts.jsonl --out scales.html; "
        "mspgt-lens scales --profile kept.safetensors --out scales.html; "
        "mspgt-lens scales --curves table.csv --out scales.html",
    )
    add_model(command, required=False)
    add_prompts(command)
    add_length(command)
    command.add_argument(
        "--profile",
        type=Path,
        metavar="PATH",
        help="a saved profile to start from, instead of a pass over the prompts: the model is not "
        "loaded, and MODEL may be left out",
    )
    command.add_argument(
        "--curves",
        type=Path,
        metavar="CSV",
        help="a table of per-layer numbers to test instead of a model: one row per block or site, "
        "one named column per curve, separated by commas; a column called site, block or layer "
        "numbers the rows from 0",
    )
    command.add_argument(
        "--rows",
        choices=get_args(Rows),
        help="what a row of --curves is: a block, or a site (one row more: before every "
        "block, then after the last one); default: sites where a column is called so, else blocks",
    )
    command.add_argument(
        "--method",
        choices=(*METHODS, *PUBLISHED_METHODS),
        default="fused",
        help="what places them (default: %(default)s)",
    )
    command.add_argument(
        "--control",
        choices=get_args(Control),
        help="a null: the same with random weights, or with shuffled tokens",
    )
    add_files(command, "scales.html", "partition, for --partition of other commands")
    add_checkpoint(command)
    add_run(command)
    command.set_defaults(run=_scales, shares_work=True)


def _scales(options: argparse.Namespace) -> int:
    has_pass = options.curves is None and options.profile is None
    if not has_pass and not options.launch.is_first:
        return 0
    if options.curves is not None:
        return _scales_of_curves(options)
    if options.rows is not None:
        raise ValueError("--rows says what the rows of --curves are: leave it out")
    profile = _profile_of_model(options) if has_pass else _saved_profile(options)
    if not options.launch.is_first:
        return 0
    partition = detect_scales(profile=profile, method=options.method, seed=options.seed)
    print(f"\n{partition.summary()}\n\nby method")
    for name, boundaries in partition.by_method.items():
        places = ", ".join(map(str, boundaries)) if boundaries else "none found"
        print(f"{name:20}{places}")
    if options.save is not None:
        print(f"\npartition: {partition.save(options.save).resolve()}")
    path = write_report(options.out, profile, partition)
    print(f"\nreport: {path.resolve()}")
    return 0


def _profile_of_model(options: argparse.Namespace) -> LayerProfile:
    if options.model is None:
        raise ValueError(
            "scales needs a MODEL, or --curves with a table, or --profile with a saved profile"
        )
    model = load_placed(options, options.model)
    check_depth(model)
    return profile_layers(
        model,
        prompts_for(options, model),
        signals=signals_for(options.method),
        control=options.control,
        seed=options.seed,
        progress=not options.no_progress,
        process_group=options.launch.group(model),
        checkpoint=options.checkpoint,
    )


def _saved_profile(options: argparse.Namespace) -> LayerProfile:
    given = _given(options, _OF_A_PASS)
    if given:
        raise ValueError(f"--profile holds a pass already: leave out {given}")
    return LayerProfile.load(options.profile)


def _scales_of_curves(options: argparse.Namespace) -> int:
    given = _given(options, ("model", "profile", *_OF_A_PASS))
    if given:
        raise ValueError(f"--curves holds the numbers already: leave out {given}")
    if options.method != "fused":
        raise ValueError(f"--method {options.method} needs a model, not --curves")
    table, rows = read_curves(options.curves, options.rows)
    print(f"{options.curves}: {table.shape[1]} curves over {len(table)} {rows}")
    found = segment_blocks(table, rows=rows, seed=options.seed)
    partition = replace(found, model_name=options.curves.stem)
    print(f"\n{partition.summary()}\n")
    if options.save is not None:
        print(f"partition: {partition.save(options.save).resolve()}")
    print(f"report: {write_report(options.out, partition).resolve()}")
    return 0


def _given(options: argparse.Namespace, names: Sequence[str]) -> str:
    """Those of some options that were given, as they are written."""
    nothing = {"max_length": DEFAULT_LENGTH}
    given = [name for name in names if getattr(options, name) != nothing.get(name)]
    return ", ".join(name if name == "model" else f"--{name.replace('_', '-')}" for name in given)
