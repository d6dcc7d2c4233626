"""Every estimator of mutual information on data whose information is known.

    python -m benchmarks.information --out docs/information.csv

writes the table and, beside it, its rendering between the marks of information.md. With
``--estimators vib infonce`` only their rows are made anew. The tasks are those of
tests/information/known.py.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import mspgt_lens as ml
from benchmarks.table import Comparison

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "information"))

from known import TASKS, Task  # noqa: E402

# Samples and seeds: fewer where an estimate takes seconds.
SIZES = {
    "gaussian": (10_000, 20),
    "copula": (10_000, 20),
    "ksg": (2_000, 20),
    "renyi": (2_000, 20),
    "vib": (2_000, 5),
    "infonce": (2_000, 5),
}
MARK = "<!-- table of benchmarks/information.py -->"


def compare() -> Iterator[Comparison]:
    """Every estimator on every task, three draws; those that it refuses are left out."""
    for estimator in SIZES:
        for task in TASKS:
            found = row(task, estimator, 3)
            if "estimate" in found:
                what = f"{estimator}, {task.name}, mean of 3"
                yield Comparison(what, found["estimate"], "truth", task.truth, "nats", "about 1")


def row(task: Task, estimator: str, n_seeds: int) -> dict[str, Any]:
    """Mean estimate over seeds, its error, and how often the interval held or passed the truth."""
    n = SIZES[estimator][0]
    found, start = [], time.process_time()
    head = {"task": task.name, "family": task.family, "estimator": estimator, "samples": n}
    head |= {"seeds": n_seeds, "truth": round(task.truth, 4)}
    for seed in range(n_seeds):
        z, y = task.draw(np.random.default_rng(seed), n)
        try:
            found.append(ml.mutual_information(z, y, estimator=estimator, seed=seed))
        except ValueError as error:
            return head | {"refused": str(error).split(":")[0].split(", got")[0]}
    value = np.array([e.value for e in found])
    low, high = np.array([e.low for e in found]), np.array([e.high for e in found])
    return head | {
        "estimate": round(value.mean(), 4),
        "error": round(value.mean() - task.truth, 4),
        "spread": round(value.std(ddof=1), 4),
        "holds_truth": np.mean((low <= task.truth) & (task.truth <= high)),
        "above_truth": np.mean(low > task.truth),
        "half_width": round(float((high - low).mean() / 2), 4),
        "warned": np.mean([bool(e.warnings) for e in found]),
        "seconds": round((time.process_time() - start) / n_seeds, 2),
    }


def render(table: pd.DataFrame) -> str:
    """The table in Markdown, one section per estimator."""
    parts = []
    for estimator in SIZES:
        rows = table[table.estimator == estimator]
        if not len(rows):
            continue
        first = rows.iloc[0]
        parts.append(
            f"### `{estimator}`, {first.samples:,} samples, {first.seeds} seeds\n\n"
            "| task | truth | estimate | error | interval holds truth | interval above truth | "
            "half width | warned |\n| --- | --: | --: | --: | --: | --: | --: | --: |\n"
        )
        for r in rows.itertuples():
            if isinstance(r.refused, str):
                parts[-1] += f"| {r.task} | {r.truth:.3f} | refused: {r.refused}{' |' * 6}\n"
                continue
            parts[-1] += (
                f"| {r.task} | {r.truth:.3f} | {r.estimate:.3f} | {r.error:+.3f} | "
                f"{r.holds_truth:.0%} | {r.above_truth:.0%} | {r.half_width:.3f} | "
                f"{r.warned:.0%} |\n"
            )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "information.csv")
    parser.add_argument("--estimators", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, object]] = []
    for estimator in options.estimators:
        for task in TASKS:
            rows.append(row(task, estimator, SIZES[estimator][1]))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if options.out.exists():
        kept = pd.read_csv(options.out)
        table = pd.concat([kept[~kept.estimator.isin(options.estimators)], table])
    order = {name: place for place, name in enumerate(SIZES)}
    table = table.sort_values("estimator", key=lambda c: c.map(order), kind="stable")
    table.to_csv(options.out, index=False)
    page = options.out.with_suffix(".md")
    if page.exists():
        before, _, after = page.read_text().split(MARK)
        page.write_text(f"{before}{MARK}\n\n{render(table)}\n{MARK}{after}")


if __name__ == "__main__":
    main()
