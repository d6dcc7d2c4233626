"""``mspgt-lens patch``: patch a task's prompts and write a report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mspgt_lens.loading import load_model
from mspgt_lens.models import Site
from mspgt_lens.patching.layers import Method, patch_layers
from mspgt_lens.patching.metrics import DEFAULT_METRIC, MetricName
from mspgt_lens.patching.pairs import PromptPairs
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.patching.scales import patch_scales
from mspgt_lens.patching.sweeping import Direction
from mspgt_lens.patching.tasks import TASKS
from mspgt_lens.plots.patching import plot_patching, plot_scale_patch
from mspgt_lens.report import section, table, write_page
from mspgt_lens.scales.partition import ScalePartition

_STRONGEST = 8


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
        "model", metavar="MODEL", help="a hub name, a local folder, or 'demo' (SmolLM2-135M)"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS, help="a built-in task")
    what.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help=".jsonl with the fields clean, corrupted, answer, foil and, if you like, group",
    )
    command.add_argument(
        "--n-pairs", type=int, default=16, metavar="N", help="pairs of a task (default: 16)"
    )
    for flag, choices, default in (
        ("--site", get_args(Site), "resid_pre"),
        ("--metric", get_args(MetricName), DEFAULT_METRIC),
        ("--direction", get_args(Direction), "denoise"),
        ("--method", get_args(Method), "exact"),
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
        "--out", type=Path, default=Path("patch.html"), metavar="HTML", help="default: %(default)s"
    )
    command.add_argument("--save", type=Path, metavar="PATH", help="also save the sweep")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.add_argument("--device", metavar="NAME", help="such as cuda or cpu")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    command.set_defaults(run=_patch)


def _patch(options: argparse.Namespace) -> int:
    partition = None if options.partition is None else ScalePartition.load(options.partition)
    records = None if options.pairs is None else _records(options.pairs)
    model = load_model(options.model, device=options.device)
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
    }
    sweep = patch_layers(
        model,
        pairs,
        options.metric,
        site=options.site,
        positions=options.positions,
        window=options.window,
        method=options.method,
        **common,
    )
    by_scale = None
    if partition is not None:
        by_scale = patch_scales(model, pairs, partition, options.metric, **common)
    rows = strongest_cells(sweep)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(
        f"\n{sweep.model_name}: {sweep.metric_name} {sweep.clean:.3g} clean, "
        f"{sweep.corrupted:.3g} corrupted, {len(pairs)} pairs\n"
    )
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    for note in sweep.warnings:
        print(f"note: {note}")
    if options.save is not None:
        print(f"\nsweep: {sweep.save(options.save).resolve()}")
    path = _write(options.out, sweep, by_scale, partition)
    print(f"\nreport: {path.resolve()}")
    return 0


def strongest_cells(sweep: PatchSweep) -> list[tuple[str, ...]]:
    """The cells that move the answer most, as text: a header row, then one row per cell."""
    start = 0.0 if sweep.direction == "denoise" else 1.0
    order = np.argsort(-np.abs(sweep.effect - start), axis=None, kind="stable")[:_STRONGEST]
    heads = ("head",) if sweep.effect.ndim == 3 else ()
    rows = [("block", "token", *heads, "effect", "95% interval", "p (Holm)")]
    for flat in order:
        cell = np.unravel_index(int(flat), sweep.effect.shape)
        block, pos, *head = (int(i) for i in cell)
        known = sweep.low is not None and sweep.high is not None
        rows.append(
            (
                str(block),
                f"{sweep.tokens[pos].strip()} ({_place(sweep, pos)})",
                *(str(i) for i in head),
                f"{sweep.effect[cell]:.3g}",
                f"{sweep.low[cell]:.3g} to {sweep.high[cell]:.3g}"  # type: ignore[index]
                if known
                else "",
                "" if sweep.p_value is None else f"{sweep.p_value[cell]:.3g}",
            )
        )
    return rows


def _place(sweep: PatchSweep, pos: int) -> str:
    position = int(sweep.positions[pos])
    return "last" if position < 0 else str(position)


_FIELDS = ("clean", "corrupted", "answer", "foil")


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"--pairs: no file at {path}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--pairs: line {number + 1} of {path} is not JSON ({error})"
            ) from error
        lacking = [
            name
            for name in _FIELDS
            if not isinstance(record, dict) or not isinstance(record.get(name), str)
        ]
        if lacking:
            raise ValueError(f"--pairs: line {number + 1} of {path} lacks {', '.join(lacking)}")
        records.append({**record, "group": record.get("group", number)})
    if not records:
        raise ValueError(f"--pairs: {path} holds no pair")
    return records


def _write(
    path: Path,
    sweep: PatchSweep,
    by_scale: ScalePatch | None,
    partition: ScalePartition | None,
) -> Path:
    sections = [
        section(
            "By block and position",
            "Each cell is one run with that one activation replaced. The effect is the share of "
            "the way from the corrupted run (0) to the clean one (1). Dots: the change differs "
            "from none by a sign-flip test over pairs, after Holm's correction over all cells.",
            plot_patching(sweep, partition),
        )
    ]
    if by_scale is not None:
        sections.append(
            section(
                "By scale",
                "What every block of a segment writes, replaced at once, against random sets of "
                "as many blocks. p says whether it matters which blocks these are.",
                plot_scale_patch(by_scale),
            )
        )
    notes = dict.fromkeys([*sweep.warnings, *(by_scale.warnings if by_scale else ())])
    details = [("setting", "value")]
    details += [(name, str(value)) for name, value in sweep.settings.items()]
    details += [(f"version of {name}", value) for name, value in sweep.versions.items()]
    return write_page(
        path,
        title=f"{sweep.model_name}: patching",
        heading=f"{sweep.model_name}: which activations carry the answer",
        subtitle=f"{sweep.settings['n_pairs']} pairs; {sweep.metric_name.replace('_', ' ')} "
        f"{sweep.clean:.3g} on clean and {sweep.corrupted:.3g} on corrupted prompts. Made with "
        f"mspgt_lens {sweep.versions['mspgt-lens']}.",
        notes=list(notes),
        body=f"<h2>Strongest cells</h2><div class='wide'>{table(strongest_cells(sweep))}</div>"
        f"{''.join(sections)}<h2>How it was made</h2><div class='wide'>{table(details)}</div>",
    )
