"""``mspgt-lens analyze``: everything about one or many models, then their comparison."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable
from typing import Any

from mspgt_lens.cli.arguments import new_folder
from mspgt_lens.cli.placing import load_placed
from mspgt_lens.contract import aligned
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.report.tables import verdict_rows
from mspgt_lens.report.writing import write_report
from mspgt_lens.studies.analysis import Analysis, analyze
from mspgt_lens.studies.comparison import compare_models
from mspgt_lens.theory.evaluation import evaluate_predictions


def add_analyze_command(
    commands: Any,
    add_prompts: Callable[[argparse.ArgumentParser], None],
    add_run: Callable[[argparse.ArgumentParser], None],
    prompts_of: Callable[[argparse.Namespace, Any], PromptDataset],
) -> None:
    """Add ``analyze`` to the command's subparsers.

    Args:
        commands: The subparsers.
        add_prompts: Adds the prompts.
        add_run: Adds what every pass takes.
        prompts_of: Reads the prompts.
    """
    command = commands.add_parser(
        "analyze",
        help="everything about one or many models, and the theory's predictions",
        description="Profile each model, seek its scale boundaries beside those of random weights "
        "and shuffled text, perturb every segment, and give the theory's predictions a verdict. "
        "Models are taken one after the other; an interrupted analysis goes on where it stopped.",
        epilog="example: mspgt-lens analyze gpt2 Qwen/Qwen2.5-0.5B --out analysis",
    )
    command.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="hub names, local folders or GGUF files, or 'demo' (SmolLM2-135M)",
    )
    add_prompts(command)
    command.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="what a model shares with others, once per model and in their order; default: the "
        "architecture",
    )
    command.add_argument(
        "--n-documents",
        type=int,
        default=12,
        metavar="N",
        help="documents that perturbations run on (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=new_folder,
        default="analysis",
        metavar="FOLDER",
        help="where results and reports go, one folder per model (default: %(default)s)",
    )
    add_run(command)
    command.set_defaults(run=lambda options: _analyze(options, prompts_of), shares_work=True)


def _analyze(
    options: argparse.Namespace, prompts_of: Callable[[argparse.Namespace, Any], PromptDataset]
) -> int:
    families = options.family or [None] * len(options.models)
    if len(families) != len(options.models):
        raise ValueError(
            f"--family must be given once per model ({len(options.models)}), or not at all; got "
            f"{len(families)}"
        )
    done: list[Analysis] = []
    failed = []
    for name, family in zip(options.models, families, strict=True):
        try:
            done.append(_one(options, name, family, prompts_of))
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


def _one(
    options: argparse.Namespace,
    name: str,
    family: str | None,
    prompts_of: Callable[[argparse.Namespace, Any], PromptDataset],
) -> Analysis:
    folder = options.out / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model")
    model = load_placed(options, name)
    prompts = prompts_of(options, model)
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
