"""What somebody's own script does with the package, in types that a checker can follow.

Run and type-checked by ``release.py`` where nothing of the repository is on the path.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from typing_extensions import assert_type

import mspgt_lens as ml

print(Path(ml.__file__).parent)
assert len(ml.load_passages()) == 120

steps = np.repeat([0.0, 4.0, 8.0], 6)
noise = np.random.default_rng(0).standard_normal((18, 5))
partition = ml.segment_blocks(pd.DataFrame(steps[:, None] + 0.3 * noise), seed=1)
assert_type(partition, ml.results.ScalePartition)
assert_type(partition.summary(), str)
assert_type(partition.to_dataframe(), pd.DataFrame)
print(partition.summary())

z, unrelated = np.random.default_rng(1).standard_normal((2, 400, 2))
estimate = ml.mutual_information(z, z + unrelated, estimator="gaussian")
assert_type(estimate, ml.results.Estimate)
assert_type(estimate.value, float)

kept = partition.save("partition")
assert_type(kept, Path)
assert_type(ml.results.load_result(kept), ml.results.Result)
assert ml.results.load_result(kept) == partition
assert_type(ml.write_report("report.html", partition), Path)


def mistaken() -> None:
    """A checker that saw no types would find nothing to ignore here."""
    ml.write_report(3)  # type: ignore[arg-type]
    ml.segment_blocks(partition, seed="one")  # type: ignore[arg-type]
