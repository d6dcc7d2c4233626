"""What came out, one sentence for each result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mspgt_lens.partition import ScalePartition
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dissociation import ScaleByClass
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.results import Curve
from mspgt_lens.studies.comparison import records
from mspgt_lens.theory.verdicts import Verdicts


def findings(
    profile: LayerProfile | None,
    partition: ScalePartition | None,
    controls: Sequence[ScalePartition],
    brittleness: Brittleness | None,
    dissociation: ScaleByClass | None,
    verdicts: Verdicts | None,
) -> list[str]:
    """What came out, one sentence each."""
    found = []
    if profile is not None:
        for scale, curve in profile.predicted.items():
            found.append(f"Predicted information, {scale}: {_course(curve)}.")
    if partition is not None:
        found.append(partition.summary().split("\n")[0])
    found += [f"{one.model_name}: {one.summary().splitlines()[0]}" for one in controls]
    if brittleness is not None:
        found += _brittle_words(brittleness)
    if dissociation is not None:
        e = dissociation.interaction
        words = "leads" if e.low > 0 else "does not lead" if e.high < 0 else "does not clearly lead"
        found.append(
            f"The diagonal of segments by token classes {words}: interaction {e.value:.2f} "
            f"({e.low:.2f} to {e.high:.2f})."
        )
    if verdicts is not None:
        counts = {
            judged: sum(v.verdict == judged for v in verdicts)
            for judged in ("supported", "refuted", "inconclusive")
        }
        words = ", ".join(f"{n} {judged}" for judged, n in counts.items() if n)
        found.append(f"Of {len(verdicts)} predictions: {words}.")
    return found


def _course(curve: Curve) -> str:
    """From the first site over the highest to the last."""
    top = int(np.argmax(curve.values))
    if (curve.low <= 0).all():
        return "cannot be told from 0 at any site"
    return (
        f"{curve.values[0]:.3g} at the first site, at most {curve.values[top]:.3g} "
        f"({curve.low[top]:.3g} to {curve.high[top]:.3g}) nats at site {top}, "
        f"{curve.values[-1]:.3g} at the last"
    )


def _brittle_words(found: Brittleness) -> list[str]:
    """Per noise shape, the two segments whose brittleness differs most at equal energy."""
    lines = []
    table = found.ratios()
    for shape in found.shapes:
        part = table[(table["shape"] == shape) & (table["mode"] == "equal_energy")]
        rows = records(part)
        if not rows:
            continue
        row = max(rows, key=lambda r: abs(np.log(float(r["ratio"]))))
        first, second = str(row["segment"]), str(row["against"])
        ratio, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
        if ratio < 1:
            first, second, ratio, low, high = second, first, 1 / ratio, 1 / high, 1 / low
        lines.append(
            f"Under {shape} noise of the same energy, {first} blocks are {ratio:.3g} times "
            f"({low:.3g} to {high:.3g}) as brittle as {second} blocks."
        )
    return lines
