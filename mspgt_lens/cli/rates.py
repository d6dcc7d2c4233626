"""``mspgt-lens rate-distortion``: the rate that predictions need of every site, as a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mspgt_lens.cli.arguments import add_seed, new_file, numbers, whole_number
from mspgt_lens.cli.placing import add_placing, load_placed
from mspgt_lens.cli.reading import first_windows
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.rates.distortion import DEFAULT_DISTORTIONS, rate_distortion
from mspgt_lens.rates.windows import MIN_GROUPS
from mspgt_lens.report.writing import write_report
from mspgt_lens.targets import DEFAULT_BANDS

_SKIP_FIRST = 4
# What the farthest offset needs before a prediction.
_SHORTEST = _SKIP_FIRST + max(b for _, b in DEFAULT_BANDS.values())


def add_rates_command(
    commands: Any,
    add_model: Callable[[argparse.ArgumentParser], None],
    prompts_of: Callable[[argparse.Namespace, Any, int | None], PromptDataset],
) -> None:
    """Add ``rate-distortion`` to the command's subparsers.

    Args:
        commands: The subparsers.
        add_model: Adds the model and its prompts.
        prompts_of: Reads the prompts of so many documents.
    """
    command = commands.add_parser(
        "rate-distortion",
        help="how little every site can pass on before predictions move",
        description="Find the fewest nats per token that a site must pass on for predictions one, "
        "a few and many tokens ahead to move by at most D nats, by running noisy channels there, "
        "and write the rates as one HTML report. The first window of every document is used.",
        epilog="example: mspgt-lens rate-distortion gpt2 --sites 0,6,12 --out rates.html",
    )
    add_model(command)
    command.add_argument(
        "--sites",
        type=numbers(int),
        metavar="N,N",
        help="sites to measure, rising (default: 10, spread from the first to the last)",
    )
    command.add_argument(
        "--distortions",
        type=numbers(float),
        default=DEFAULT_DISTORTIONS,
        metavar="D,D",
        help="how far predictions may move, in nats of KL, rising (default: "
        f"{','.join(f'{x:g}' for x in DEFAULT_DISTORTIONS)})",
    )
    command.add_argument(
        "--n-targets",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="predictions of each document that shape the channels of the farthest band; fewer "
        "take less time (default: %(default)s)",
    )
    command.add_argument(
        "--n-documents",
        type=whole_number(MIN_GROUPS),
        default=120,
        metavar="N",
        help="read N documents at most, evenly spaced (default: %(default)s)",
    )
    command.add_argument(
        "--max-length",
        type=whole_number(_SHORTEST),
        default=80,
        metavar="N",
        help=f"tokens of each document; shorter ones than {_SHORTEST} are left out (default: "
        "%(default)s)",
    )
    command.add_argument(
        "--out", type=new_file, default="rates.html", metavar="HTML", help="default: %(default)s"
    )
    command.add_argument("--save", type=new_file, metavar="PATH", help="also save the numbers")
    add_seed(command)
    add_placing(command)
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    command.set_defaults(run=lambda options: _rates(options, prompts_of), shares_work=True)


def _rates(
    options: argparse.Namespace,
    prompts_of: Callable[[argparse.Namespace, Any, int | None], PromptDataset],
) -> int:
    model = load_placed(options, options.model)
    found = rate_distortion(
        model,
        first_windows(prompts_of(options, model, options.n_documents), options.n_documents),
        sites=options.sites,
        distortions=options.distortions,
        n_targets=options.n_targets,
        skip_first=_SKIP_FIRST,
        seed=options.seed,
        progress=not options.no_progress,
        process_group=options.launch.group(model),
    )
    if not options.launch.is_first:
        return 0
    print(f"\n{found.summary()}\n")
    if options.save is not None:
        print(f"numbers: {found.save(options.save).resolve()}")
    print(f"report: {write_report(options.out, found).resolve()}")
    return 0
