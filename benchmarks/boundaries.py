"""The boundary test: its time, and how often it is right and wrong.

    python benchmarks/boundaries.py                 # seconds of one detection at 30 blocks
    python benchmarks/boundaries.py --calibration   # power and false positives, as CSV
    python benchmarks/boundaries.py --limits        # what knowing drift and noise would give

The tables and the picture in docs/boundaries.md come from the last two.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Next to this file lies profile.py, which would stand in for the standard library's.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).parent]

import argparse  # noqa: E402
import itertools  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402

import numpy as np  # noqa: E402

import mspgt_lens as ml  # noqa: E402
from mspgt_lens.scales.drift import legendre, steps  # noqa: E402
from mspgt_lens.scales.synthetic import DRIFTS, Drift  # noqa: E402


def print_seconds() -> None:
    signals = ml.synthetic.synthetic_signals(30, 8, seed=1).signals
    for label in ("first call, plans made", "later calls"):
        start = time.perf_counter()
        ml.segment_blocks(signals, n_draws=1000, n_bootstraps=200)
        print(f"30 blocks, 8 signals, {label}: {time.perf_counter() - start:.2f} s")


def cases() -> list[dict[str, object]]:
    """Nulls of every kind, then planted boundaries, over depth, noise and autocorrelation."""
    nulls: list[dict[str, object]] = [
        {"n_layers": n, "drift": drift, "n_boundaries": 0}
        for n, drift in itertools.product((12, 24, 30, 48), DRIFTS)
    ]
    nulls += [
        {"n_layers": n, "autocorrelation": rho, "n_boundaries": 0}
        for n, rho in itertools.product((12, 24, 30, 48), (0.2, 0.4, 0.6))
    ]
    nulls += [{"n_layers": 30, "correlation": 0.5, "n_boundaries": 0}]
    planted: list[dict[str, object]] = [
        {"n_layers": n, "n_signals": m, "drift": drift}
        for n, m, drift in itertools.product((24, 30, 48, 80), (6, 8), ("flat", "quadratic"))
    ]
    planted += [{"n_layers": n} for n in (8, 12, 16, 20)]
    planted += [{"n_layers": 30, "effect": effect} for effect in (0.5, 1.0, 1.5, 3.0)]
    planted += [{"n_layers": 30, "autocorrelation": rho} for rho in (0.2, 0.4, 0.6)]
    planted += [{"n_layers": 30, "n_signals": m} for m in (2, 4, 14)]
    planted += [{"n_layers": 30, "n_boundaries": k} for k in (1, 3)]
    return [*nulls, *planted]


def one(case: dict[str, object], n_simulations: int) -> str:
    result = ml.synthetic.power(**case, n_simulations=n_simulations)
    chosen = " ".join(f"{share:.3f}" for share in result.chosen.values())
    full = {"n_signals": 8, "effect": 2.0, "n_boundaries": 2, "drift": "flat"}
    full |= {"autocorrelation": 0.0, "correlation": 0.0} | case
    return ",".join(
        str(x)
        for x in (
            full["n_layers"],
            full["n_signals"],
            full["n_boundaries"],
            full["effect"] if full["n_boundaries"] else "",
            full["drift"],
            full["autocorrelation"],
            full["correlation"],
            n_simulations,
            f"{result.rejected:.3f}",
            chosen,
            f"{result.located:.3f}" if full["n_boundaries"] else "",
        )
    )


def print_calibration(n_simulations: int, n_planted: int) -> None:
    names = "blocks,signals,planted,effect,drift,autocorrelation,correlation,draws"
    print(f"{names},rejected,K 0-3,located")
    # One thread each, read when the new processes start.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        chosen = cases()
        counts = [n_simulations if case.get("n_boundaries") == 0 else n_planted for case in chosen]
        for line in pool.map(one, chosen, counts):
            print(line, flush=True)


def print_limits(n_simulations: int) -> None:
    """Power and accuracy of a test that is told the drift's order and that noise is white."""
    print("blocks,signals,drift,draws,rejected,located")
    for n_layers, n_signals in itertools.product((24, 30, 48), (6, 8)):
        for order, drift in enumerate(("flat", "ramp", "quadratic")):
            rejected, located = _told(n_layers, n_signals, order, drift, n_simulations)
            row = (n_layers, n_signals, drift, n_simulations, f"{rejected:.3f}", f"{located:.3f}")
            print(",".join(map(str, row)), flush=True)


def _told(
    n_layers: int, n_signals: int, order: int, drift: Drift, n_simulations: int
) -> tuple[float, float]:
    """Share of draws with two jumps found at 5%, and share with both within one block.

    The statistic is what the best two jumps take of the squares beyond a polynomial of this order;
    noise has variance 1, so its distribution without jumps is drawn from noise alone.
    """
    drift_axes, _ = np.linalg.qr(legendre(n_layers, order))
    places = [
        (first, second)
        for first, second in itertools.combinations(range(2, n_layers - 1), 2)
        if second - first >= 2
    ]
    axes = []
    for pair in places:
        jumps = steps(n_layers, pair)
        axes.append(np.linalg.qr(jumps - drift_axes @ (drift_axes.T @ jumps))[0].T)
    jump_axes = np.stack(axes)

    def taken(signals: np.ndarray) -> np.ndarray:
        squares: np.ndarray = ((jump_axes @ signals) ** 2).sum(axis=(1, 2))
        return squares

    rng = np.random.default_rng(1)
    nulls = [taken(rng.standard_normal((n_layers, n_signals))).max() for _ in range(1000)]
    critical = np.quantile(nulls, 0.95)
    rejected = located = 0
    for seed in range(n_simulations):
        made = ml.synthetic.synthetic_signals(n_layers, n_signals, drift=drift, seed=seed)
        squares = taken(made.signals)
        rejected += squares.max() > critical
        found = np.array(places[int(squares.argmax())])
        located += bool((np.abs(found - made.boundaries) <= 1).all())
    return rejected / n_simulations, located / n_simulations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--simulations", type=int, default=1000, help="draws of each null")
    parser.add_argument("--planted", type=int, default=500, help="draws of each planted case")
    options = parser.parse_args()
    if options.calibration:
        print_calibration(options.simulations, options.planted)
    elif options.limits:
        print_limits(options.planted)
    else:
        print_seconds()


if __name__ == "__main__":
    main()
