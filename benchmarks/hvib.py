"""The trained H-VIB probe: all sites and betas at once against one at a time.

    python -m benchmarks.hvib               # 31 sites x 6 betas, a few of them one at a time
    python -m benchmarks.hvib --every       # ... all 186 of them one at a time
    python -m benchmarks.hvib --model       # the demo model on the built-in passages, end to end

Both ways run the same code on the same data in one run; the ratio and the largest difference
between their results are printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

import mspgt_lens as ml
from benchmarks.table import Comparison
from mspgt_lens.hvib.probe import HVIB_BETAS

N_SITES = 31
# What the demo model's passages give, in the coordinates that the probe sees by default.
N_POSITIONS, WIDTH, N_FEATURES, N_GROUPS = 16_384, 128, 32, 120


def made_data() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Sites that tell the more of three targets the deeper they lie."""
    rng = np.random.default_rng(0)
    targets = {
        name: rng.standard_normal((N_POSITIONS, N_FEATURES), dtype=np.float32)
        for name in ("local", "intermediate", "global")
    }
    every = np.concatenate(list(targets.values()), axis=1)
    sites = []
    for site in range(N_SITES):
        noise = rng.standard_normal((N_POSITIONS, WIDTH), dtype=np.float32)
        map_ = rng.standard_normal((every.shape[1], WIDTH), dtype=np.float32)
        sites.append(noise + site / N_SITES * 0.1 * np.tanh(every) @ map_)
    return np.stack(sites), targets, np.arange(N_POSITIONS) % N_GROUPS


N_CELLS = N_SITES * len(HVIB_BETAS)


def compare() -> Iterator[Comparison]:
    """Seconds of all cells at once and one at a time."""
    batched, each, _ = timed(400, every=False)
    what = f"fit_hvib_arrays, {N_CELLS} cells at once"
    yield Comparison(what, batched, "one at a time", each * N_CELLS, "s", "below 1")


def timed(n_steps: int, *, every: bool) -> tuple[float, float, float]:
    """Seconds of all cells at once and of each alone, and the largest difference in nats."""
    z, targets, groups = made_data()
    settings = {"n_steps": n_steps, "progress": False}
    start = time.perf_counter()
    together = ml.arrays.fit_hvib_arrays(z, targets, groups, **settings)
    batched = time.perf_counter() - start
    print(f"{N_CELLS} cells, {n_steps} steps: all at once {batched:.1f} s", flush=True)
    cells = [(site, b) for site in range(N_SITES) for b in range(len(HVIB_BETAS))]
    chosen = cells if every else cells[:: len(cells) // 8]
    start, worst = time.perf_counter(), 0.0
    for site, b in chosen:
        betas = HVIB_BETAS[b : b + 1]
        alone = ml.arrays.fit_hvib_arrays(
            z[site : site + 1], targets, groups, betas=betas, **settings
        )
        for (_, _, grid), (_, _, shared) in zip(alone.grids(), together.grids(), strict=True):
            worst = max(worst, abs(grid.values[0, 0] - shared.values[site, b]))
    each = (time.perf_counter() - start) / len(chosen)
    print(f"one at a time: {each:.2f} s each, from {len(chosen)} of them")
    return batched, each, worst


def time_model() -> None:
    model = ml.load_demo_model()
    texts = [passage.text for passage in ml.load_passages()]
    prompts = ml.PromptDataset.from_texts(model, texts, max_length=320)
    start = time.perf_counter()
    fit = ml.fit_hvib(model, prompts)
    print(f"{time.perf_counter() - start:.0f} s with the forward pass")
    print(dict(fit.n_positions), dict(fit.n_groups))
    for name, _, grid in fit.grids():
        print(name, _, np.round(grid.values[:: N_SITES // 3], 2).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--every", action="store_true", help="one at a time on every cell")
    parser.add_argument("--model", action="store_true", help="the demo model end to end")
    options = parser.parse_args()
    if options.model:
        time_model()
    else:
        batched, each, worst = timed(options.steps, every=options.every)
        print(f"one at a time / all at once: {each * N_CELLS / batched:.1f}")
        print(f"largest difference of any reported number: {worst:.2g} nats")


if __name__ == "__main__":
    main()
