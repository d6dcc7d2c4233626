"""``mspgt-lens patch``: patch a task's prompts and write a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from mspgt_lens.cli.arguments import whole_number
from mspgt_lens.cli.options import add_files, add_model, add_run
from mspgt_lens.cli.placing import load_placed
from mspgt_lens.cli.reading import read_records, record_group
from mspgt_lens.contract import aligned
from mspgt_lens.models import PatchPlace, as_adapter
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.layers import PatchMethod, patch_layers
from mspgt_lens.patching.metrics import DEFAULT_METRIC, MetricName
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.scales import contiguous_segments, patch_scales
from mspgt_lens.patching.sweeping import Direction
from mspgt_lens.patching.tasks import TASKS
from mspgt_lens.report.tables import strongest_cells
from mspgt_lens.report.writing import write_report

_N_PAIRS = 16
_FIELDS = ("clean", "corrupted", "answer", "foil")


def add_patch_command(commands: Any) -> None:
    """Add ``patch`` to the command's subparsers."""
    command = commands.add_parser(
        "patch",
        help="patch activations by block, position and scale",
        description="Put the activations of clean prompts into corrupted ones (or the reverse), "
        "one block and position at a time, and write what becomes of the answer as one HTML "
        "report.",
        epilog="example: mspgt-lens patch gpt2 --task indirect_objects --out patch.html",
    )
    add_model(command)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS, help="a built-in task")
    what.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="JSON records, one per line or in one array, with the fields clean, corrupted, "
        "answer, foil and, if you like, group",
    )
    command.add_argument(
        "--n-pairs",
        type=whole_number(1),
        metavar="N",
        help=f"pairs that a --task draws (default: {_N_PAIRS})",
    )
    for flag, choices, default, said in (
        ("--place", get_args(PatchPlace), "resid_pre", "what is patched; z is single heads"),
        ("--metric", get_args(MetricName), DEFAULT_METRIC, "what is measured of the answer"),
        (
            "--direction",
            get_args(Direction),
            "denoise",
            "put clean activations into corrupted runs (denoise), or the reverse (noise)",
        ),
        (
            "--method",
            get_args(PatchMethod),
            "exact",
            "run every patch (exact), or estimate them from gradients (attribution)",
        ),
        ("--positions", ("all", "last"), "all", "where to patch"),
    ):
        command.add_argument(
            flag, choices=choices, default=default, help=f"{said} (default: %(default)s)"
        )
    command.add_argument(
        "--window",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="blocks patched together (default: %(default)s)",
    )
    command.add_argument(
        "--partition",
        type=Path,
        metavar="PATH",
        help="a saved partition: its segments are marked, and each is patched whole",
    )
    add_files(command, "patch.html", "sweep")
    add_run(command)
    command.set_defaults(run=_patch, shares_work=True)


def _patch(options: argparse.Namespace) -> int:
    partition = None if options.partition is None else ScalePartition.load(options.partition)
    records = None if options.pairs is None else _records(options.pairs)
    if records is not None and options.n_pairs is not None:
        raise ValueError("--n-pairs says how many pairs a --task draws: leave it out with --pairs")
    model = load_placed(options, options.model)
    if partition is not None:
        # Before the sweep, which may take long.
        contiguous_segments(partition, as_adapter(model).n_layers)
    if records is None:
        pairs = TASKS[options.task](model, options.n_pairs or _N_PAIRS, options.seed)
    else:
        texts = [[record[name] for record in records] for name in _FIELDS]
        pairs = PromptPairs.from_texts(
            model, *texts, groups=[record["group"] for record in records]
        )
    common = {
        "direction": options.direction,
        "seed": options.seed,
        "progress": not options.no_progress,
        "process_group": options.launch.group(model),
    }
    sweep = patch_layers(
        model,
        pairs,
        options.metric,
        place=options.place,
        positions=options.positions,
        window=options.window,
        method=options.method,
        **common,
    )
    by_scale = None
    if partition is not None:
        by_scale = patch_scales(model, pairs, partition, options.metric, **common)
    if not options.launch.is_first:
        return 0
    print(
        f"\n{sweep.model_name}: {sweep.metric_name} {sweep.clean:.3g} clean, "
        f"{sweep.corrupted:.3g} corrupted, {len(pairs)} pairs\n"
    )
    print(aligned(strongest_cells(sweep)))
    for note in sweep.warnings:
        print(f"note: {note}")
    if options.save is not None:
        print(f"\nsweep: {sweep.save(options.save).resolve()}")
    shown = [result for result in (sweep, by_scale, partition) if result is not None]
    path = write_report(options.out, *shown)
    print(f"\nreport: {path.resolve()}")
    return 0


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, (where, record) in enumerate(read_records("--pairs", path)):
        lacking = [name for name in _FIELDS if not isinstance(record.get(name), str)]
        if lacking:
            raise ValueError(f"--pairs: {where} lacks {', '.join(lacking)}")
        records.append({**record, "group": record_group("--pairs", where, record, number)})
    if not records:
        raise ValueError(f"--pairs: {path} holds no pair")
    return records
