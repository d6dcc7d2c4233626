"""``mspgt-lens patch``: patch a task's prompts and write a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from mspgt_lens.cli.arguments import add_seed, new_file
from mspgt_lens.cli.placing import add_placing, load_placed
from mspgt_lens.cli.reading import read_records, record_group
from mspgt_lens.contract import aligned
from mspgt_lens.models import PatchPlace
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.layers import PatchMethod, patch_layers
from mspgt_lens.patching.metrics import DEFAULT_METRIC, MetricName
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.scales import patch_scales
from mspgt_lens.patching.sweeping import Direction
from mspgt_lens.patching.tasks import TASKS
from mspgt_lens.report.tables import strongest_cells
from mspgt_lens.report.writing import write_report


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
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a hub name, a local folder or GGUF file, or 'demo' (SmolLM2-135M)",
    )
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
        "--n-pairs", type=int, default=16, metavar="N", help="pairs of a task (default: 16)"
    )
    for flag, choices, default in (
        ("--place", get_args(PatchPlace), "resid_pre"),
        ("--metric", get_args(MetricName), DEFAULT_METRIC),
        ("--direction", get_args(Direction), "denoise"),
        ("--method", get_args(PatchMethod), "exact"),
        ("--positions", ("all", "last"), "all"),
    ):
        command.add_argument(flag, choices=choices, default=default, help=f"default: {default}")
    command.add_argument(
        "--window", type=int, default=1, metavar="N", help="blocks patched together (default: 1)"
    )
    command.add_argument(
        "--partition",
        type=Path,
        metavar="PATH",
        help="a saved partition: its segments are marked, and each is patched whole",
    )
    command.add_argument(
        "--out", type=new_file, default="patch.html", metavar="HTML", help="default: %(default)s"
    )
    command.add_argument("--save", type=new_file, metavar="PATH", help="also save the sweep")
    add_seed(command)
    add_placing(command)
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    command.set_defaults(run=_patch, shares_work=True)


def _patch(options: argparse.Namespace) -> int:
    partition = None if options.partition is None else ScalePartition.load(options.partition)
    records = None if options.pairs is None else _records(options.pairs)
    model = load_placed(options, options.model)
    if records is None:
        pairs = TASKS[options.task](model, options.n_pairs, options.seed)
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


_FIELDS = ("clean", "corrupted", "answer", "foil")


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
