"""Where the command puts a model: arguments that every subcommand with a model takes."""

from __future__ import annotations

import argparse
from typing import Any

from mspgt_lens.cli.arguments import whole_number
from mspgt_lens.models.loading import load_model
from mspgt_lens.models.placing import DTYPES

PLACING = ("device", "dtype", "device_map", "n_devices", "max_memory")


def add_placing(command: argparse.ArgumentParser) -> None:
    """Add the device, or the devices, and the precision."""
    command.add_argument(
        "--device", metavar="NAME", help="such as cuda or cpu (default: as TransformerLens chooses)"
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the weights (default: float32; quantized weights stay as they are)",
    )
    command.add_argument(
        "--device-map",
        metavar="HOW",
        help="spread a model that is too large for one device: auto, balanced or sequential",
    )
    command.add_argument(
        "--n-devices",
        type=whole_number(1),
        metavar="N",
        help="or: spread it over so many CUDA devices",
    )
    command.add_argument(
        "--max-memory",
        type=_max_memory,
        metavar="D=SIZE,...",
        help="what each device may take, such as 0=20GiB,1=20GiB,cpu=60GiB",
    )


def load_placed(options: argparse.Namespace, name: str) -> Any:
    """The model of this name, where the options say."""
    given = {n: getattr(options, n) for n in PLACING if getattr(options, n) is not None}
    is_spread = "device_map" in given or "n_devices" in given
    device = options.launch.device(options.device, is_spread)
    if device is not None:
        given["device"] = device
    return load_model(name, **given)


def _max_memory(text: str) -> dict[int | str, str]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(device and size for device, _, size in parts):
        raise argparse.ArgumentTypeError(
            f"must be devices with sizes, such as 0=20GiB,cpu=60GiB, got {text!r}"
        )
    return {int(device) if device.isdigit() else device: size for device, _, size in parts}
