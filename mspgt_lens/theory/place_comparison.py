"""How near a partition's boundaries are to the places that theories name: the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from mspgt_lens.contract import Result, Rows, counted, named
from mspgt_lens.statistics import SIGNIFICANCE


class PlacedTheory(NamedTuple):
    """How near boundaries are to one theory's places.

    Attributes:
        theory: Whose places.
        what: What is there, with its source.
        places: Blocks, real numbers where they are shares of the depth.
        distance: Between boundaries and places, as a share of the depth.
        chance: Median distance over all placements of as many boundaries.
        chance_low: Lower end of the middle 95% of them.
        chance_high: Upper end.
        p_value: Share of placements that are as near as the boundaries, or nearer.
        p_holm: The same after Holm's correction over the theories.
        least_p: What ``p_value`` is for the placements that are nearest.
    """

    theory: str
    what: str
    places: tuple[float, ...]
    distance: float
    chance: float
    chance_low: float
    chance_high: float
    p_value: float
    p_holm: float
    least_p: float


@dataclass(frozen=True, eq=False, repr=False)
class PlaceComparison(Result):
    """A partition's boundaries against every theory's places, and against chance.

    Attributes:
        model_name: The model's name, or ``""`` for bare arrays.
        n_layers: Number of blocks, L.
        boundaries: The partition's boundaries.
        supported: Whether the data ask for these boundaries.
        n_placements: Number of placements that they are held against.
        min_size: Fewest blocks of a segment in them.
        theories: Every theory that names places for this model.
        left_out: Theory to why it names none.
    """

    model_name: str
    n_layers: int
    boundaries: tuple[int, ...]
    supported: bool
    n_placements: int
    min_size: int
    theories: tuple[PlacedTheory, ...]
    left_out: Mapping[str, str]

    def __getitem__(self, theory: str) -> PlacedTheory:
        """What was found for a theory.

        Args:
            theory: Its name.

        Returns:
            Its places, distance and p-values.

        Raises:
            KeyError: If it was not compared; the message says why, or lists the names.
        """
        for one in self.theories:
            if one.theory == theory:
                return one
        names = ", ".join(one.theory for one in self.theories)
        raise KeyError(f"no theory {theory!r}: {self.left_out.get(theory, f'there are {names}')}")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the comparison cannot reach, and where the boundaries are not supported."""
        notes = []
        n = len(self.theories)
        out_of_reach = [t.theory for t in self.theories if n * t.least_p >= SIGNIFICANCE]
        if out_of_reach:
            notes.append(
                f"with {counted(self.n_placements, 'placement')} of {len(self.boundaries)} in "
                f"{self.n_layers} blocks, no place of the boundaries alone gives a p-value below "
                f"{SIGNIFICANCE:g} after Holm's correction for {', '.join(out_of_reach)}"
            )
        if not self.supported:
            notes.append("the data do not support these boundaries: their places may mean nothing")
        return tuple(notes)

    def heading(self) -> str:
        """The model, and how many boundaries and blocks."""
        count = len(self.boundaries)
        placed = f"{count} boundar{'y' if count == 1 else 'ies'} in {self.n_layers} blocks"
        return f"PlaceComparison{named(self.model_name)}: {placed}"

    def rows(self) -> Rows:
        """Every theory's places, the distance, what is usual by chance, and p."""
        return [
            ("theory", "places", "distance", "by chance", "p", "p (Holm)"),
            *(
                (
                    one.theory,
                    ", ".join(f"{place:.3g}" for place in one.places),
                    f"{one.distance:.1%}",
                    f"{one.chance:.1%} ({one.chance_low:.1%} to {one.chance_high:.1%})",
                    f"{one.p_value:.3g}",
                    f"{one.p_holm:.3g}",
                )
                for one in self.theories
            ),
        ]

    def findings(self) -> list[str]:
        """Whose places the boundaries are nearer to than chance, and who names none."""
        at = ", ".join(map(str, self.boundaries))
        near = [one.theory for one in self.theories if one.p_holm < SIGNIFICANCE]
        said = f"nearer than chance to the places of {', '.join(near)}"
        lines = [f"Boundaries at {at} are {said if near else 'near no places beyond chance'}."]
        return lines + [f"{name}: {why}." for name, why in self.left_out.items()]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per theory's distance, then one per place.

        Returns:
            Columns ``model, theory, quantity, block, value, unit, control, control_low,
            control_high, p_value``: a ``"distance"``, with that of chance placements and the
            p-value after Holm's correction; or a ``"place"``, in blocks, with the whole block
            that it is nearest to.
        """
        rows: list[dict[str, object]] = [
            {
                "theory": one.theory,
                "quantity": "distance",
                "value": one.distance,
                "unit": "share of the depth",
                "control": one.chance,
                "control_low": one.chance_low,
                "control_high": one.chance_high,
                "p_value": one.p_holm,
            }
            for one in self.theories
        ]
        rows += [
            {
                "theory": one.theory,
                "quantity": "place",
                "block": round(place),
                "value": place,
                "unit": "blocks",
            }
            for one in self.theories
            for place in one.places
        ]
        names = ["theory", "quantity", "block", "value", "unit"]
        names += ["control", "control_low", "control_high", "p_value"]
        table = pd.DataFrame(rows).reindex(columns=names).astype({"block": "Int64"})
        table.insert(0, "model", self.model_name)
        return table
