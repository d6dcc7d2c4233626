"""Readings of single tokens on processes whose information is known at every offset.

    python -m benchmarks.tokens --out docs/tokens.csv

writes the table and, beside it, its rendering after the mark in information.md. Processes,
activations and truths are those of tests/information/token_processes.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.table import Comparison

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "information"))

from token_processes import (  # noqa: E402
    AHEAD,
    BACK,
    PROCESSES,
    Process,
    fits,
    limits,
    read,
    truths,
)

_ENDS = ("values", "low", "high")
START, END = "<!-- table of benchmarks/tokens.py -->", "<!-- end of it -->"


def rows(process: Process, steps: tuple[int, ...], n_prompts: int, n_seeds: int) -> pd.DataFrame:
    """One row per site and target."""
    readings = [read(process, steps, n_prompts, seed) for seed in range(n_seeds)]
    usable = limits(process, steps)
    found = []
    for (side, offset, site), truth in truths(process, steps).items():
        of = [reading[side, offset] for reading in readings]
        value, low, high = (np.array([getattr(r, n)[site] for r in of]) for n in _ENDS)
        limit, _ = usable[side, offset, site]
        place = "prediction" if site == len(steps) else f"token at {steps[site]:+d}"
        asked = offset if side == "future" else 1 - offset
        found.append(
            {
                "process": process.name,
                "site": place,
                "asked": f"token at {asked:+d}",
                "carried": fits(steps, side, offset, site),
                "truth": truth,
                "limit": limit,
                "estimate": value.mean(),
                "holds": np.mean((low <= limit) & (limit <= high)),
                "above": np.mean(low > truth),
            }
        )
    return pd.DataFrame(found)


def compare() -> Iterator[Comparison]:
    """What a site's reader can say all of: two draws of 200 sequences."""
    for process in PROCESSES:
        for steps in (BACK, AHEAD):
            readings = [read(process, steps, 200, seed) for seed in range(2)]
            for (side, offset, site), truth in truths(process, steps).items():
                if not fits(steps, side, offset, site):
                    continue
                value = float(np.mean([reading[side, offset].values[site] for reading in readings]))
                asked = offset if side == "future" else 1 - offset
                what = f"{process.name}, site {site}, asked for the token at {asked:+d}"
                yield Comparison(what, value, "truth", truth, "nats", "about 1")


def page(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = [
        "| process | site carries | asked for | truth | limit | estimate | interval holds limit | "
        "interval above truth |",
        "| --- | --- | --- | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {r.process} | {r.site} | {r.asked} | {r.truth:.3f} | {r.limit:.3f} | {r.estimate:.3f} "
        f"| {r.holds:.0%} | {r.above:.0%} |"
        for r in table[table.carried].itertuples()
    ]
    rest = table[~table.carried]
    for name, part in rest.groupby("process", sort=False):
        limit, share = part.limit / part.truth, part.estimate / part.truth
        lines.append(
            f"| {name} | another token, or the prediction | {len(part)} farther ones | "
            f"{part.truth.min():.3f} to {part.truth.max():.3f} | "
            f"{limit.min():.0%} to {limit.max():.0%} of the truth | "
            f"{share.min():.0%} to {share.max():.0%} of the truth | "
            f"{part.holds.mean():.0%}, least {part.holds.min():.0%} | "
            f"{part.above.mean():.0%}, most {part.above.max():.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the table (CSV)")
    parser.add_argument("--prompts", type=int, default=400, help="sequences of 40 tokens")
    parser.add_argument("--seeds", type=int, default=20, help="draws of text and noise")
    options = parser.parse_args()
    table = pd.concat(
        rows(process, steps, options.prompts, options.seeds)
        for process in PROCESSES
        for steps in (BACK, AHEAD)
    )
    print(page(table))
    if options.out:
        table.round(4).to_csv(options.out, index=False)
        beside = options.out.with_name("information.md")
        head, rest = beside.read_text().split(START)
        beside.write_text(f"{head}{START}\n\n{page(table)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
