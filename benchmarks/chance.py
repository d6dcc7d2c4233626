"""Draw the tables that the boundary test's p-values come from.

    python -m benchmarks.chance                # into mspgt_lens/data/chance.safetensors

Every table is kept in build/chance when it is drawn, and not drawn again while it lies there.
Tables hold for the evidence as it is: whoever changes that, empties the folder and draws anew.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mspgt_lens.scales.chance import ROWS, SIGNALS, draw_table, table_name

KEPT = Path("build/chance")
STORED = Path("mspgt_lens/data/chance.safetensors")
# Fewer draws where each takes long.
DRAWS = {30: 600, 46: 400, 78: 250}
MOST_DRAWS = 800
# More of signals that say nearly the same thing.
ALIKE = 240


def draw(cell: tuple[int, int]) -> Path:
    """One table, unless it is kept."""
    n_rows, n_signals = cell
    kept = KEPT / f"{table_name(n_rows, n_signals)}.npy"
    if not kept.exists():
        n_draws = DRAWS.get(n_rows, MOST_DRAWS)
        n_alike = ALIKE if n_signals > 1 else 0
        table = draw_table(n_rows, n_signals, n_draws, n_alike)
        part = kept.with_suffix(".part.npy")
        np.save(part, table.astype(np.float16))
        part.rename(kept)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    # One thread each, read when the new processes start.
    os.environ["OMP_NUM_THREADS"] = "1"
    KEPT.mkdir(parents=True, exist_ok=True)
    # The longest first.
    cells = sorted(itertools.product(ROWS, SIGNALS), reverse=True)
    tables = {}
    with ProcessPoolExecutor(
        parser.parse_args().processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for kept in pool.map(draw, cells):
            tables[kept.stem] = np.load(kept)
            print(kept.stem, flush=True)
    save_file(tables, STORED)


if __name__ == "__main__":
    main()
