"""``mspgt-lens rate-distortion``: the rate that predictions need of every site, as a report."""

from __future__ import annotations

import argparse
from typing import Any

from mspgt_lens.cli.arguments import numbers, whole_number
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
from mspgt_lens.rates.distortion import DEFAULT_DISTORTIONS, rate_distortion
from mspgt_lens.rates.windows import MIN_GROUPS
from mspgt_lens.report.writing import write_report
from mspgt_lens.targets import DEFAULT_BANDS

_SKIP_FIRST = 4
# What the farthest offset needs before a prediction.
_SHORTEST = _SKIP_FIRST + max(b for _, b in DEFAULT_BANDS.values())


def add_rates_command(commands: Any) -> None:
    """Add ``rate-distortion`` to the command's subparsers."""
    command = commands.add_parser(
        "rate-distortion",
        help="how little every site can pass on before predictions move",
        description="Find the fewest nats per token that a site must pass on for predictions one, "
        "a few and many tokens ahead to move by at most D nats, by running noisy channels there, "
        "and write the rates as one HTML report. The first window of every document is used.",
        epilog="example: mspgt-lens rate-distortion gpt2 --sites 0,6,12 --out rates.html",
    )
    add_model(command)
    add_prompts(command)
    command.add_argument(
        "--sites",
        type=numbers(int, "0,10,20"),
        metavar="N,N",
        help="sites to measure, rising (default: 10, spread from the first to the last)",
    )
    command.add_argument(
        "--distortions",
        type=numbers(float, "0.05,0.2"),
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
    add_documents(command, least=MIN_GROUPS, default=120)
    add_length(
        command,
        least=_SHORTEST,
        default=80,
        said=f"tokens of each document; shorter ones than {_SHORTEST} are left out",
    )
    add_files(command, "rates.html", "numbers")
    add_run(command)
    command.set_defaults(run=_rates, shares_work=True)


def _rates(options: argparse.Namespace) -> int:
    model = load_placed(options, options.model)
    found = rate_distortion(
        model,
        first_windows(prompts_for(options, model, options.n_documents), options.n_documents),
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
