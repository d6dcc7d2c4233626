"""Results as rows of text, for reports and for the terminal: a header row, then the rest."""

from __future__ import annotations

import numpy as np

from mspgt_lens.contract import interval
from mspgt_lens.estimates import Curve
from mspgt_lens.patching.results import PatchSweep
from mspgt_lens.perturbation.brittleness import Brittleness, Mode
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.studies.comparison import records
from mspgt_lens.theory.verdicts import Verdicts

MODES: tuple[Mode, ...] = ("equal_energy", "per_block")
_STRONGEST = 8


def summary_rows(profile: LayerProfile) -> list[tuple[str, ...]]:
    """A few sites and the best one per curve, as text: a header row, then one row per curve."""
    last = profile.n_layers
    sites = [0, round(last / 4), round(last / 2), round(3 * last / 4), last]
    rows = [("nats per token", *(f"site {site}" for site in sites), "highest (95% interval)")]
    for quantity, scale, curve in profile.curves():
        if len(curve) <= profile.n_layers or curve.unit != "nats":
            continue
        name = f"{quantity} {scale}".strip().replace("_", " ")
        rows.append((name, *(f"{curve.values[site]:.3g}" for site in sites), _best(curve)))
    return rows


def strongest_cells(sweep: PatchSweep) -> list[tuple[str, ...]]:
    """The cells that move the answer most, as text: a header row, then one row per cell."""
    return sweep.strongest(_STRONGEST)


def slope_rows(found: Brittleness) -> list[tuple[str, ...]]:
    """Initial slopes, and the levels that halve top-1 agreement: a header row first."""
    rows: list[tuple[str, ...]] = [
        ("noise", "segment", "mode", "slope (nats / level²)", "level that halves top 1")
    ]
    for shape in found.shapes:
        for segment in found.segments:
            for mode in MODES:
                half = found.half_level(segment, shape, mode)
                slope = found.slope(segment, shape, mode)
                reached = "not reached"
                if half is not None:
                    reached = interval(half.value, half.low, half.high)
                words = mode.replace("_", " ")
                rows.append(
                    (
                        shape,
                        segment,
                        words,
                        interval(slope.value, slope.low, slope.high),
                        reached,
                    )
                )
    return rows


def ratio_rows(found: Brittleness) -> list[tuple[str, ...]]:
    """Ratios of slopes between segments: a header row first."""
    rows: list[tuple[str, ...]] = [("noise", "segments", "mode", "ratio of slopes", "p (Holm)")]
    for row in records(found.ratios()):
        rows.append(
            (
                str(row["shape"]),
                f"{row['segment']} / {row['against']}",
                str(row["mode"]).replace("_", " "),
                interval(row["ratio"], row["low"], row["high"]),
                f"{row['p_value']:.3g}",
            )
        )
    return rows


def verdict_rows(verdicts: Verdicts) -> list[tuple[str, ...]]:
    """Every prediction with its verdict and figures, theory by theory: a header row first."""
    rows: list[tuple[str, ...]] = [
        ("theory", "prediction", "verdict", "measured (95% interval)", "held against", "published")
    ]
    for v in (v for own in verdicts.theories.values() for v in own):
        value = "not measured"
        if v.statistic is not None:
            figure = interval(v.statistic, *v.interval) if v.interval else f"{v.statistic:.3g}"
            value = f"{figure}, {v.quantity}"
        rows.append((v.theory, v.name, v.verdict, value, f"{v.threshold:g}", v.published))
    return rows


def _best(curve: Curve) -> str:
    site = int(np.argmax(curve.values))
    return f"{interval(curve.values[site], curve.low[site], curve.high[site])} at site {site}"
