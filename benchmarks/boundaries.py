"""The boundary test: its time, and how often it is right and wrong.

    python -m benchmarks.boundaries                 # seconds of one detection at 30 blocks
    python -m benchmarks.boundaries --calibration   # false positives and power, as tables
    python -m benchmarks.boundaries --apart         # signals that change a block apart

The tables in docs/boundaries.md come from the second, what is said there of signals that change a
block apart from the third.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

import mspgt_lens as ml
from benchmarks.table import Comparison
from mspgt_lens.scales.evidence import Change, change_curves
from mspgt_lens.scales.seeking import seek_changes, standardized

SHAPES = ((6, 5), (12, 8), (16, 5), (24, 8), (30, 14), (48, 8), (80, 8))
EFFECTS = (1, 2, 4, 8, 16, 32, 64, 100)
APART_SHAPES = ((16, 5), (24, 5), (24, 8))
APART_SIZES = (0, 8, 16, 32, 64)
NULLS: dict[str, dict[str, object]] = {
    "white": {},
    "white, correlation 0.5": {"correlation": 0.5},
    "autocorrelation 0.4": {"autocorrelation": 0.4},
    "autocorrelation 0.6": {"autocorrelation": 0.6},
    **{drift: {"drift": drift} for drift in ("ramp", "quadratic", "exponential", "sigmoid")},
    **{
        f"{drift}, autocorrelation 0.6": {"drift": drift, "autocorrelation": 0.6}
        for drift in ("exponential", "logarithm")
    },
    "logarithm, walk": {"drift": "logarithm", "noise": "random_walk"},
    "walk beside noise": {"drift": "random_walk"},
    "random walk": {"noise": "random_walk"},
    "random walk, correlation 0.5": {"noise": "random_walk", "correlation": 0.5},
    "t(3)": {"tails": "heavy"},
    "t(3) walk": {"tails": "heavy", "noise": "random_walk"},
    "larger at the ends": {"noise_size": "ends"},
    "walk, larger at the ends": {"noise_size": "ends", "noise": "random_walk"},
    "growing with an exponential": {"noise_size": "growing", "drift": "exponential"},
}
PLANTED: dict[str, dict[str, object]] = {
    "16 x 5, one jump": {"n_layers": 16, "n_signals": 5, "n_boundaries": 1},
    "16 x 5, two jumps": {"n_layers": 16, "n_signals": 5},
    "16 x 5, one jump, walk": {
        "n_layers": 16,
        "n_signals": 5,
        "n_boundaries": 1,
        "noise": "random_walk",
    },
    "24 x 8, one jump": {"n_layers": 24, "n_boundaries": 1},
    "24 x 8, two jumps": {"n_layers": 24},
    "24 x 8, two jumps, walk": {"n_layers": 24, "noise": "random_walk"},
    "24 x 8, three jumps": {"n_layers": 24, "n_boundaries": 3},
    "24 x 6, two jumps, a third": {"n_layers": 24, "n_signals": 6, "share": 1 / 3},
    "24 x 6, two jumps, two thirds": {"n_layers": 24, "n_signals": 6, "share": 2 / 3},
    "24 x 8, two jumps over 2 blocks": {"n_layers": 24, "width": 2},
    "24 x 8, one jump over 3 blocks": {"n_layers": 24, "n_boundaries": 1, "width": 3},
    "24 x 8, one jump over 3 blocks, walk": {
        "n_layers": 24,
        "n_boundaries": 1,
        "width": 3,
        "noise": "random_walk",
    },
    **{
        f"24 x 8, two jumps, {drift}": {"n_layers": 24, "drift": drift}
        for drift in ("ramp", "quadratic", "exponential", "sigmoid")
    },
    "30 x 8, one bend": {"n_layers": 30, "n_boundaries": 1, "kind": "bends"},
    "30 x 8, jump and bend": {"n_layers": 30, "kind": "both"},
    "12 x 3, one jump": {"n_layers": 12, "n_signals": 3, "n_boundaries": 1},
    "48 x 14, two jumps": {"n_layers": 48, "n_signals": 14},
    "80 x 8, two jumps": {"n_layers": 80},
}


def compare() -> Iterator[Comparison]:
    """Seconds of a detection, and false positives at 0.05 from 400 draws of four nulls."""
    first, later = seconds()
    what = "segment_blocks, 30 blocks, 14 signals, later calls"
    yield Comparison(what, later, "first call, plans made", first, "s")
    for name in ("white", "ramp", "random walk", "t(3)"):
        found = ml.synthetic.power(16, 5, n_boundaries=0, n_simulations=400, **NULLS[name])
        what = f"false positives, 16 blocks, 5 signals, {name}"
        yield Comparison(what, found.rejected, "level", 0.05, "share", "at most 1.6")


def seconds() -> tuple[float, float]:
    """Of the first detection at 30 blocks and 14 signals, and of a later one."""
    signals = ml.synthetic.synthetic_signals(30, 14, effect=3.0, seed=1).signals
    spent = []
    for _ in range(2):
        start = time.perf_counter()
        ml.segment_blocks(signals, n_bootstraps=200)
        spent.append(time.perf_counter() - start)
    return spent[0], spent[1]


def null_row(name: str, n_draws: int) -> str:
    shares = []
    for n_layers, n_signals in SHAPES:
        draws = n_draws if n_layers < 48 else max(n_draws // 2, 1)
        seen = ml.synthetic.power(
            n_layers, n_signals, n_boundaries=0, n_simulations=draws, **NULLS[name]
        )
        shares.append(f"{seen.rejected:.3f}")
    return f"| {name} | {' | '.join(shares)} |"


def planted_row(name: str, n_draws: int) -> str:
    case = PLANTED[name]
    draws = n_draws if int(str(case["n_layers"])) < 48 else max(n_draws // 2, 1)
    seen = [ml.synthetic.power(effect=e, n_simulations=draws, **case) for e in EFFECTS]
    found = " | ".join(f"{one.rejected:.2f}, {one.located:.2f}" for one in seen)
    return f"| {name} | {found} |"


def apart_row(shape: tuple[int, int], n_draws: int) -> str:
    """Found, and exactly one within two blocks; of walks without transitions, found only."""
    cells = []
    for size in APART_SIZES:
        found, right = 0, 0
        for draw in range(n_draws):
            series, row = changing_apart(*shape, size, draw)
            search = seek_changes(standardized(series))
            found += search.first.p_value < 0.05
            right += len(search.shared) == 1 and abs(search.shared[0].lead.row - row) <= 2
        cells.append(f"{found / n_draws:.2f}" + f", {right / n_draws:.2f}" * bool(size))
    return f"| {shape[0]} x {shape[1]} | {' | '.join(cells)} |"


def changing_apart(n_layers: int, n_signals: int, size: float, draw: int) -> tuple[np.ndarray, int]:
    """Walks with a common half, without the first and the last block, and where they change.

    Every signal has a transition of its own size, over one to three blocks, and up to a block early
    or late.
    """
    n_rows = n_layers - 2
    rng = np.random.default_rng([n_rows, n_signals, int(size), draw])
    steps = rng.standard_normal((n_rows, 1)) + rng.standard_normal((n_rows, n_signals))
    series = np.cumsum(steps, axis=0)
    row = int(rng.integers(4, n_rows - 6))
    for signal in range(n_signals):
        change = Change("jump", row + int(rng.integers(-1, 2)), int(rng.integers(1, 4)))
        own = rng.choice([-1, 1]) * size * np.exp(rng.standard_normal())
        series[:, signal] += own * change_curves(n_rows, [change])[:, 0]
    return series, row


def print_apart(n_draws: int) -> None:
    print(f"| apart | {' | '.join(map(str, APART_SIZES))} |\n|{' --- |' * (len(APART_SIZES) + 1)}")
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(apart_row, APART_SHAPES, itertools.repeat(n_draws)):
            print(line, flush=True)


def print_calibration(n_nulls: int, n_planted: int) -> None:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        shapes = " | ".join(f"{n} x {m}" for n, m in SHAPES)
        print(f"| null | {shapes} |\n|{' --- |' * (len(SHAPES) + 1)}")
        for line in pool.map(null_row, NULLS, itertools.repeat(n_nulls)):
            print(line, flush=True)
        print(f"\n| planted | {' | '.join(map(str, EFFECTS))} |\n|{' --- |' * (len(EFFECTS) + 1)}")
        for line in pool.map(planted_row, PLANTED, itertools.repeat(n_planted)):
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--simulations", type=int, default=1000, help="draws of each null")
    parser.add_argument("--planted", type=int, default=500, help="draws of each planted case")
    options = parser.parse_args()
    # One thread each, read when the new processes start.
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.apart:
        print_apart(options.planted)
    elif options.calibration:
        print_calibration(options.simulations, options.planted)
    else:
        first, later = seconds()
        print(f"30 blocks, 14 signals, first call, plans made: {first:.2f} s")
        print(f"30 blocks, 14 signals, later calls: {later:.2f} s")


if __name__ == "__main__":
    main()
