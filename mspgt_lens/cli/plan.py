"""``mspgt-lens plan``: what a profile will take, before any weights are loaded."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from mspgt_lens.cli.arguments import whole_number
from mspgt_lens.cli.options import add_model
from mspgt_lens.models.placing import DTYPES
from mspgt_lens.profile.planning import PlannedDevice, plan_profile


def add_plan_command(commands: Any) -> None:
    """Add ``plan`` to the command's subparsers."""
    command = commands.add_parser(
        "plan",
        help="say what a profile will take, without loading the model",
        description="Say what a profile at its defaults will take: memory on every device, "
        "operations, and bytes on disk, from the model's configuration alone.",
        epilog="example: mspgt-lens plan gpt2 --prompts 1000 --length 512",
    )
    add_model(command)
    command.add_argument(
        "--prompts",
        dest="n_prompts",
        type=whole_number(5),
        required=True,
        metavar="N",
        help="number of prompts: windows of texts, at least 5",
    )
    command.add_argument(
        "--length", type=whole_number(2), required=True, metavar="T", help="tokens per prompt"
    )
    command.add_argument(
        "--devices",
        type=whole_number(1),
        default=1,
        metavar="D",
        help="devices that the model is spread over (default: %(default)s)",
    )
    command.add_argument(
        "--device",
        choices=get_args(PlannedDevice),
        default="cuda",
        help="their kind (default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="precision of the weights (default: %(default)s)",
    )
    command.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    plan = plan_profile(
        options.model,
        options.n_prompts,
        options.length,
        n_devices=options.devices,
        device=options.device,
        dtype=options.dtype,
    )
    print(plan.summary())
    return 0
