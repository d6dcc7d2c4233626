"""What came out, one sentence for each result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mspgt_lens.estimates import Curve
from mspgt_lens.partition import ScalePartition
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.theory.verdicts import Verdicts


def findings(
    profile: LayerProfile | None,
    partition: ScalePartition | None,
    controls: Sequence[ScalePartition],
    brittleness: Brittleness | None,
    dissociation: Dissociation | None,
    verdicts: Verdicts | None,
) -> list[str]:
    """What came out, one sentence each."""
    found = []
    if profile is not None:
        for scale, curve in profile.predicted.items():
            found.append(f"Predicted information, {scale}: {_course(curve)}.")
    if partition is not None:
        found.append(" ".join(partition.changes_in_words()))
    found += [f"{one.model_name}: {' '.join(one.changes_in_words())}" for one in controls]
    if brittleness is not None:
        # The last says what slopes are, which the report tells elsewhere.
        found += brittleness.findings()[:-1]
    if dissociation is not None:
        found += dissociation.findings()
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
