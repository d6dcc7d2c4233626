"""Results: frozen, self-describing, saved as safetensors with a JSON header (never pickled)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.contract import Result, interval, tidy
from mspgt_lens.statistics import jackknife_interval

Unit = Literal["nats", "bits"]
NATS_PER_BIT = float(np.log(2.0))


class CannotMeasure(ValueError):  # noqa: N818 - says what is so, as the name of a finding
    """The model, or the text, does not admit what was asked: nothing is wrong with the call.

    An encoder has no next token to perturb; prompts may be too short, or documents too few. Callers
    that measure many things skip what raises this, and nothing else.
    """


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Result):
    """One quantity along depth, with its 95% interval.

    Attributes:
        values: The estimate at each point, shape ``[point]``.
        low: Lower end of the 95% interval, shape ``[point]``.
        high: Upper end of the 95% interval, shape ``[point]``.
        unit: Unit of all three, such as ``"nats"`` or ``"tokens"``.
        guarantee: One sentence: what the number is, and what it bounds.
        by_fold: What each fold of groups says on its own (a jackknife pseudo-value where the
            quantity is not a mean), shape ``[fold, point]``; None where that is not known.

    Raises:
        ValueError: If an array is no finite vector, lengths differ, or an interval lacks its value.
    """

    values: Float[np.ndarray, " point"]
    low: Float[np.ndarray, " point"]
    high: Float[np.ndarray, " point"]
    unit: str
    guarantee: str
    by_fold: Float[np.ndarray, "fold point"] | None = None

    def __post_init__(self) -> None:
        for name in ("values", "low", "high"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.ndim != 1 or not np.isfinite(array).all():
                raise ValueError(f"Curve: {name} must be a finite vector, got {array!r}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.by_fold is not None:
            folds = np.array(self.by_fold, dtype=np.float64)
            if folds.ndim != 2 or folds.shape[1] != len(self.values):
                raise ValueError(
                    f"Curve: by_fold must have shape [fold, {len(self.values)}], got {folds.shape}"
                )
            folds.flags.writeable = False
            object.__setattr__(self, "by_fold", folds)
        if not len(self.values) == len(self.low) == len(self.high):
            raise ValueError("Curve: values, low and high must have the same length")
        if (self.low > self.values).any() or (self.values > self.high).any():
            raise ValueError("Curve: the interval must hold the value at every point")

    def __len__(self) -> int:
        return len(self.values)

    def heading(self) -> str:
        """Length, unit and range."""
        return f"Curve of {len(self)} points in {self.unit}"

    def findings(self) -> list[str]:
        """The ends, the highest point, and what the numbers are."""
        if not len(self):
            return [self.guarantee]
        top = int(np.argmax(self.values))
        first, highest, last = (
            interval(self.values[i], self.low[i], self.high[i]) for i in (0, top, -1)
        )
        return [
            f"First {first}, highest {highest} at point {top}, last {last}; 95% intervals.",
            self.guarantee,
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per point: ``point, value, low, high, unit``."""
        columns = {"value": self.values, "low": self.low, "high": self.high, "unit": self.unit}
        return tidy({"point": np.arange(len(self)), **columns})

    def to(self, unit: Unit) -> Curve:
        """The same curve in nats or bits.

        Args:
            unit: ``"nats"`` or ``"bits"``; a nat is 1 / log 2 bits.

        Returns:
            A curve of the same points, its interval and folds converted too.

        Raises:
            ValueError: If the unit is neither, or the curve is not an information quantity.
        """
        if unit not in ("nats", "bits"):
            raise ValueError(f"unit must be 'nats' or 'bits', got {unit!r}")
        if self.unit not in ("nats", "bits"):
            raise ValueError(f"only information converts to {unit}; this curve is in {self.unit!r}")
        if unit == self.unit:
            return self
        factor = NATS_PER_BIT if unit == "nats" else 1.0 / NATS_PER_BIT
        return Curve(
            self.values * factor,
            self.low * factor,
            self.high * factor,
            unit,
            self.guarantee,
            None if self.by_fold is None else self.by_fold * factor,
        )

    def half_depth(self) -> Estimate | None:
        """The relative depth at which the curve first reaches half its maximum.

        Between points by straight lines; 0 where the first point has reached it. The interval is
        the jackknife over folds of groups, kept within 0 and 1.

        Returns:
            The depth as a share of the curve's length, or None where the curve cannot be told from
            0 or has no values per fold.
        """
        if self.by_fold is None or (self.low <= 0).all():
            return None
        value = _first_half(self.values)
        # Folds shift the curve as a whole, so that their weights do not matter here.
        moved = self.values - self.by_fold.mean(axis=0)
        n_folds = len(self.by_fold)
        without = [np.delete(self.by_fold, k, axis=0).mean(axis=0) + moved for k in range(n_folds)]
        if any(curve.max() <= 0 for curve in without):
            return None
        folds = np.array([[_first_half(curve)] for curve in without])
        (low,), (high,) = jackknife_interval(np.array([value]), folds)
        return Estimate(
            value,
            float(min(max(low, 0.0), value)),
            float(max(min(high, 1.0), value)),
            "share of depth",
            "Relative depth at which the curve first reaches half its maximum.",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result):
    """One number with its 95% interval.

    Attributes:
        value: The estimate.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        unit: Unit of all three, such as ``"nats"``.
        guarantee: One sentence: what the number is, and what it bounds.
        p_value: Of the null hypothesis that ``guarantee`` names, or None where none was tested.
        warnings: What a reader has to know before trusting the number.
    """

    value: float
    low: float
    high: float
    unit: str
    guarantee: str
    p_value: float | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"Estimate: the interval must hold the value, got {self.value} outside "
                f"{self.low} to {self.high}"
            )

    def __str__(self) -> str:
        return f"{self.value:.4g} {self.unit} ({self.low:.4g} to {self.high:.4g})"

    def heading(self) -> str:
        """The number with its interval."""
        tested = "" if self.p_value is None else f", p = {self.p_value:.3g}"
        return f"Estimate: {self}{tested}"

    def findings(self) -> list[str]:
        """What the number is."""
        return [self.guarantee]

    def to_dataframe(self) -> pd.DataFrame:
        """One row: ``value, low, high, unit, p_value``."""
        names = ("value", "low", "high", "unit", "p_value")
        table = tidy({name: getattr(self, name) for name in names}, 1)
        return table.astype({"p_value": "float64"})


def _first_half(values: Float[np.ndarray, " point"]) -> float:
    half = values.max() / 2
    point = int(np.argmax(values >= half))
    if point == 0:
        return 0.0
    before, after = values[point - 1], values[point]
    return float(point - 1 + (half - before) / (after - before)) / (len(values) - 1)
