"""One table of comparisons: what was measured, beside what, where and with which versions."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from mspgt_lens.storage import package_versions


@dataclass(frozen=True)
class Comparison:
    """A number of the package's beside the one it is held against.

    Attributes:
        measured: What the number is of.
        value: The number.
        against: What the other number is of.
        reference: The other number.
        unit: Of both.
        wanted: What is asked of the ratio, in words; empty where nothing is.
    """

    measured: str
    value: float
    against: str
    reference: float
    unit: str
    wanted: str = ""

    @property
    def ratio(self) -> float | None:
        """The number over the other one; None where that is 0."""
        return self.value / self.reference if self.reference else None


def surroundings() -> dict[str, str]:
    """The day, the machine, and the versions of what decides the numbers."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
        **package_versions(),
    }


def table_of(benchmark: str, found: Iterable[Comparison]) -> pd.DataFrame:
    """One row per comparison."""
    rows = [{"benchmark": benchmark, **vars(one), "ratio": one.ratio} for one in found]
    columns = ["benchmark", "measured", "value", "against", "reference", "unit", "ratio", "wanted"]
    return pd.DataFrame(rows, columns=columns)


def _processor() -> str:
    """The processor's name, which Python tells on few systems."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
