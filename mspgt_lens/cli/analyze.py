"""``mspgt-lens analyze``: everything about one or many models, then their comparison."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from pathlib import Path
from typing import Any

from mspgt_lens.cli.arguments import new_folder, whole_number
from mspgt_lens.cli.options import MODEL_HELP, add_length, add_prompts, add_run, prompts_for
from mspgt_lens.cli.placing import load_placed
from mspgt_lens.contract import aligned
from mspgt_lens.report.tables import verdict_rows
from mspgt_lens.report.writing import write_report
from mspgt_lens.studies.analysis import Analysis, analyze
from mspgt_lens.studies.comparison import compare_models
from mspgt_lens.theory.evaluation import evaluate_predictions


def add_analyze_command(commands: Any) -> None:
    """Add ``analyze`` to the command's subparsers."""
    command = commands.add_parser(
        "analyze",
        help="everything about one or many models, and the theory's predictions",
        description="Profile each model, seek its scale boundaries beside those of random weights "
        "and shuffled text, perturb every segment, and give the theory's predictions a verdict. "
        "Models are taken one after the other; an interrupted analysis goes on where it stopped.",
        epilog="example: mspgt-lens analyze gpt2 Qwen/Qwen2.5-0.5B --out analysis",
    )
    command.add_argument("models", metavar="MODEL", nargs="+", help=f"each {MODEL_HELP}")
    add_prompts(command)
    add_length(command)
    command.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="what a model shares with others, once per model and in their order; default: the "
        "architecture",
    )
    command.add_argument(
        "--n-documents",
        type=whole_number(3),
        default=12,
        metavar="N",
        help="run perturbations on N documents at most, evenly spaced (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=new_folder,
        default="analysis",
        metavar="FOLDER",
        help="where results and reports go, one folder per model (default: %(default)s)",
    )
    add_run(command)
    command.set_defaults(run=_analyze, shares_work=True)


def _analyze(options: argparse.Namespace) -> int:
    families = options.family or [None] * len(options.models)
    if len(families) != len(options.models):
        raise ValueError(
            f"--family must be given once per model ({len(options.models)}), or not at all; got "
            f"{len(families)}"
        )
    folders = [options.out / _folder_name(name) for name in options.models]
    if len(set(folders)) < len(folders):
        raise ValueError(
            "every MODEL must be given once, and have a folder of its own in --out, got "
            f"{', '.join(options.models)}: one model given twice is no second witness"
        )
    done: list[Analysis] = []
    failed = []
    for name, family, folder in zip(options.models, families, folders, strict=True):
        try:
            done.append(_one(options, name, family, folder))
        except (
            ValueError,
            TypeError,
            OSError,
            ImportError,
            ArithmeticError,
            RuntimeError,
        ) as error:
            # Of several processes, the others may not have met it.
            if len(options.models) == 1 or options.launch.size > 1:
                raise
            # The others are still worth having.
            print(f"mspgt-lens: {name}: {error}", file=sys.stderr)
            failed.append(name)
        gc.collect()
    if len(done) > 1 and options.launch.is_first:
        results = [analysis.results for analysis in done]
        verdicts, compared = evaluate_predictions(results), compare_models(results)
        print("", *compared.findings(), "", sep="\n")
        print(aligned(verdict_rows(verdicts)))
        verdicts.save(options.out / "verdicts")
        compared.save(options.out / "comparison")
        path = write_report(options.out / "report.html", compared, verdicts)
        print(f"\nreport: {path.resolve()}")
    if failed:
        print(f"mspgt-lens: {len(failed)} of {len(options.models)} models failed", file=sys.stderr)
    return 2 if failed else 0


def _folder_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


def _one(options: argparse.Namespace, name: str, family: str | None, folder: Path) -> Analysis:
    model = load_placed(options, name)
    prompts = prompts_for(options, model)
    analysis = analyze(
        model,
        prompts,
        folder=folder,
        family=family,
        n_documents=options.n_documents,
        seed=options.seed,
        progress=not options.no_progress,
        process_group=options.launch.group(model),
    )
    if not options.launch.is_first:
        return analysis
    verdicts = evaluate_predictions(analysis.results)
    print("", analysis.profile.model_name, *analysis.partition.findings(), "", sep="\n")
    print(aligned(verdict_rows(verdicts)))
    for places in verdicts.places.values():
        print("", *places.findings(), "", aligned(places.rows()), sep="\n")
        for note in places.warnings:
            print(f"note: {note}")
    for step, why in analysis.skipped.items():
        print(f"note: {step.replace('_', ' ')} was skipped: {why}")
    path = write_report(folder / "report.html", analysis, verdicts)
    print(f"\nreport: {path.resolve()}")
    return analysis
