"""The ``mspgt-lens`` command."""

from __future__ import annotations

import argparse
import io
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mspgt_lens.cli.analyze import add_analyze_command
from mspgt_lens.cli.arguments import add_seed, new_file, new_folder, whole_number
from mspgt_lens.cli.brittleness import add_brittleness_command
from mspgt_lens.cli.curves import read_curves
from mspgt_lens.cli.launching import Launch, launched
from mspgt_lens.cli.patch import add_patch_command
from mspgt_lens.cli.placing import PLACING, add_placing, load_placed
from mspgt_lens.cli.plan import add_plan_command
from mspgt_lens.cli.rates import add_rates_command
from mspgt_lens.cli.reading import read_documents
from mspgt_lens.contract import aligned
from mspgt_lens.models import as_adapter
from mspgt_lens.processes import PeerError
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.settings import Control
from mspgt_lens.prompts import PromptDataset, load_passages
from mspgt_lens.report.tables import summary_rows
from mspgt_lens.report.writing import write_report
from mspgt_lens.scales.detection import METHODS, PUBLISHED_METHODS, detect_scales
from mspgt_lens.scales.segments import Rows, segment_blocks
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS

MODEL_HELP = "a hub name, a local folder or GGUF file, or 'demo' (SmolLM2-135M)"


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
    ) as error:
        return 2, str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception:
        if launch.size == 1:
            raise
        return 1, traceback.format_exc()


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
    _add_profile_command(commands)
    _add_scales_command(commands)
    add_patch_command(commands)
    add_brittleness_command(commands, _add_model, _prompts)
    add_rates_command(commands, _add_model, _prompts)
    add_plan_command(commands, MODEL_HELP)
    add_analyze_command(commands, _add_prompts, _add_run, _prompts)
    return parser


def _add_profile_command(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        help="profile a model's layers and write a report",
        description="Profile a model's layers on your texts (or on the built-in passages) and "
        "write one self-contained HTML report.",
        epilog="example: mspgt-lens profile gpt2 --prompts texts.jsonl --out report.html",
    )
    _add_model(profile)
    profile.add_argument(
        "--out", type=new_file, default="report.html", metavar="HTML", help="default: %(default)s"
    )
    profile.add_argument(
        "--save", type=new_file, metavar="PATH", help="also save the profile, for LayerProfile.load"
    )
    profile.add_argument(
        "--scale-map",
        action="store_true",
        help="also read every offset 1, 2, 4 ... 64 on its own, in the same pass; what is read of "
        "then has 64 tokens on both sides, for all curves",
    )
    profile.add_argument(
        "--n-documents",
        type=int,
        metavar="N",
        help="read N documents at most, evenly spaced (default: all)",
    )
    profile.add_argument(
        "--scales",
        action="store_true",
        help="also seek scale boundaries and show them in the report",
    )
    _add_checkpoint(profile)
    _add_run(profile)
    profile.set_defaults(run=_profile, shares_work=True)


def _add_scales_command(commands: Any) -> None:
    scales = commands.add_parser(
        "scales",
        help="find scale boundaries, tested against gradual drift",
        description="Find the boundaries between Local, Intermediate and Global blocks, or find "
        "that the data do not support any; print the partition and write its figures.",
        epilog="examples: mspgt-lens scales gpt2 --prompts texts.jsonl --out scales.html; "
        "mspgt-lens scales --curves table.csv --out scales.html",
    )
    _add_model(scales, required=False)
    scales.add_argument(
        "--profile",
        type=Path,
        metavar="PATH",
        help="a saved profile to start from, instead of a pass over the prompts",
    )
    scales.add_argument(
        "--curves",
        type=Path,
        metavar="CSV",
        help="a table of per-layer numbers to test instead of a model: one row per block or site, "
        "one named column per curve, separated by commas; a column called site, block or layer "
        "numbers the rows from 0",
    )
    scales.add_argument(
        "--rows",
        choices=get_args(Rows),
        help="what a row of --curves is: a block, or a site (one row more: before every "
        "block, then after the last one); default: sites where a column is called so, else blocks",
    )
    scales.add_argument(
        "--method",
        choices=(*METHODS, *PUBLISHED_METHODS),
        default="fused",
        help="what places them (default: fused)",
    )
    scales.add_argument(
        "--control",
        choices=get_args(Control),
        help="a null: the same with random weights, or with shuffled tokens",
    )
    scales.add_argument(
        "--out", type=new_file, default="scales.html", metavar="HTML", help="default: %(default)s"
    )
    scales.add_argument("--save", type=new_file, metavar="PATH", help="also save the partition")
    _add_checkpoint(scales)
    _add_run(scales)
    scales.set_defaults(run=_scales, shares_work=True)


def _add_model(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    command.add_argument("model", metavar="MODEL", nargs=None if required else "?", help=MODEL_HELP)
    _add_prompts(command)


def _add_prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="UTF-8 text with one document per line, or per block between blank lines; or JSON "
        "records with a 'text' field and, if you like, a 'group' field, one per line (.jsonl) or "
        "in one array; what was read is printed; default: the built-in passages",
    )


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        type=new_folder,
        metavar="FOLDER",
        help="keep sums there every few minutes: started again in the same way, a pass that was "
        "stopped goes on; delete it once you have the report",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-length",
        type=whole_number(2),
        default=384,
        metavar="N",
        help="longest window in tokens (default: %(default)s, or the model's context if shorter)",
    )
    add_seed(command)
    add_placing(command)
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def _profile(options: argparse.Namespace) -> int:
    if options.n_documents is not None and options.n_documents < 3:
        raise ValueError(f"--n-documents must be at least 3, got {options.n_documents}")
    model = load_placed(options, options.model)
    prompts = _prompts(options, model, options.n_documents)
    whole = profile_layers(
        model,
        prompts,
        bands={**DEFAULT_BANDS, **OFFSET_BANDS} if options.scale_map else DEFAULT_BANDS,
        seed=options.seed,
        progress=not options.no_progress,
        process_group=options.launch.group(model),
        checkpoint=options.checkpoint,
    )
    if not options.launch.is_first:
        return 0
    profile = _of_bands(whole, DEFAULT_BANDS)
    scale_map = _of_bands(whole, OFFSET_BANDS) if options.scale_map else None
    partition = detect_scales(profile=profile, seed=options.seed) if options.scales else None
    print(
        f"\n{profile.model_name}: {profile.n_layers} blocks, {profile.n_tokens:,} tokens "
        f"from {profile.n_groups:,} groups\n"
    )
    print(aligned(summary_rows(profile)))
    if partition is not None:
        print("", *partition.findings(), sep="\n")
    if options.save is not None:
        print(f"\nprofile: {profile.save(options.save).resolve()}")
    shown = [profile] if partition is None else [profile, partition]
    path = write_report(options.out, *shown, scale_map=scale_map)
    print(f"\nreport: {path.resolve()}")
    return 0


def _of_bands(profile: LayerProfile, bands: Mapping[str, tuple[int, int]]) -> LayerProfile:
    """A profile's curves of some of its bands, and those of none."""
    by_scale = ("retained", "predicted", "added", "correlations")
    parts: dict[str, Any] = {
        name: {scale: one for scale, one in getattr(profile, name).items() if scale in bands}
        for name in by_scale
    }
    return replace(profile, bands=dict(bands), **parts)


def _scales(options: argparse.Namespace) -> int:
    has_pass = options.curves is None and options.profile is None
    if not has_pass and not options.launch.is_first:
        return 0
    if options.curves is not None:
        return _scales_of_curves(options)
    if options.model is None:
        raise ValueError("scales needs a MODEL, or --curves with a table")
    if options.rows is not None:
        raise ValueError("--rows says what the rows of --curves are: leave it out")
    if options.profile is not None:
        superfluous = [
            n for n in ("prompts", "control", "checkpoint") if getattr(options, n) is not None
        ]
        if superfluous:
            raise ValueError(f"--profile holds a pass already: leave out --{superfluous[0]}")
        profile = LayerProfile.load(options.profile)
    else:
        model = load_placed(options, options.model)
        prompts = _prompts(options, model)
        profile = profile_layers(
            model,
            prompts,
            control=options.control,
            seed=options.seed,
            progress=not options.no_progress,
            process_group=options.launch.group(model),
            checkpoint=options.checkpoint,
        )
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


def _scales_of_curves(options: argparse.Namespace) -> int:
    given = [
        n
        for n in ("model", "profile", "prompts", "control", "checkpoint", *PLACING)
        if getattr(options, n) is not None
    ]
    if given:
        names = ", ".join(n if n == "model" else f"--{n.replace('_', '-')}" for n in given)
        raise ValueError(f"--curves holds the numbers already: leave out {names}")
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


def _prompts(
    options: argparse.Namespace, model: Any, n_documents: int | None = None
) -> PromptDataset:
    max_length = min(options.max_length, as_adapter(model).n_ctx)
    if options.prompts is None:
        texts = [passage.text for passage in load_passages()]
        chosen = texts if n_documents is None else _spaced(texts, len(texts), n_documents)
        return PromptDataset.from_texts(model, chosen, max_length=max_length)
    rows = options.prompts
    return PromptDataset.from_huggingface(
        model,
        rows if n_documents is None else _spaced(rows, rows.number, n_documents),
        group_column="group",
        max_length=max_length,
    )


def _spaced(documents: Iterable[Any], number: int, wanted: int) -> list[Any]:
    """As many documents as wanted, evenly spaced: neighbors in a file may be alike."""
    kept = {i * number // wanted for i in range(wanted)}
    return [document for i, document in enumerate(documents) if i in kept]
