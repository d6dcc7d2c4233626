"""Run all comparisons and write them as one table.

    python -m benchmarks                              # all of them, which takes long
    python -m benchmarks --only profile patching      # some of them
    python -m benchmarks --out build/benchmarks.csv

The table is written anew after every benchmark, so that nothing is lost of a run that is stopped.
"""

from __future__ import annotations

import argparse
import warnings
from importlib import import_module
from pathlib import Path

import pandas as pd

from benchmarks.table import surroundings, table_of

# Each a module with ``compare``, which yields comparisons.
NAMES = (
    "profile",
    "plan",
    "processes",
    "patching",
    "lens",
    "hvib",
    "rate_distortion",
    "information",
    "tokens",
    "boundaries",
    "boundary_limits",
    "theory",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.csv"), metavar="CSV")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    where = surroundings()
    print(*(f"{name}: {value}" for name, value in where.items()), "", sep="\n", flush=True)
    table = pd.DataFrame()
    for name in options.only:
        found = table_of(name, import_module(f"benchmarks.{name}").compare())
        print(found.to_string(index=False, float_format="{:.3g}".format), "", sep="\n", flush=True)
        table = pd.concat([table, found], ignore_index=True)
        table.assign(**where).to_csv(options.out, index=False)
    print(options.out)


if __name__ == "__main__":
    main()
