"""Do a model's boundaries stay, on other prompts, seeds and bands?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, named, tidy
from mspgt_lens.folds import stable_hash
from mspgt_lens.models import as_adapter
from mspgt_lens.partition import ScalePartition
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset
from mspgt_lens.scales.detection import check_depth, detect_scales, signals_for


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Result):
    """Partitions of one model under conditions that should not matter.

    Attributes:
        partitions: Condition to its partition; the first is what the others are compared with.
    """

    partitions: Mapping[str, ScalePartition]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of every condition, each once."""
        return tuple(dict.fromkeys(n for one in self.partitions.values() for n in one.warnings))

    def heading(self) -> str:
        """The model and how many conditions."""
        first = next(iter(self.partitions.values()))
        n = len(self.partitions)
        return (
            f"Stability of the boundaries{named(first.model_name)} under {counted(n, 'condition')}"
        )

    def rows(self) -> Rows:
        """Boundaries under every condition, and how far they agree with the first."""
        rows: Rows = [("condition", "boundaries", "supported", "p of two jumps", "agreement")]
        for label, row in self.table.set_index("condition").iterrows():
            places = ", ".join(map(str, row["boundaries"]))
            shown = (str(row["n_boundaries"]), f"{row['p_value']:.3g}", f"{row['agreement']:.2f}")
            rows.append((str(label), places, *shown))
        return rows

    def findings(self) -> list[str]:
        """How far boundaries move."""
        others = self.table.iloc[1:]
        if others.empty:
            return ["There is nothing to compare the first condition with."]
        alike = others["distance"].dropna()
        found = []
        if len(alike):
            found.append(
                f"Against the first, boundaries move by {alike.mean():.2g} blocks on average, "
                f"{alike.max():.2g} at most."
            )
        if len(alike) < len(others):
            found.append(
                f"{len(others) - len(alike)} of {counted(len(others), 'other condition')} give "
                "another number of boundaries."
            )
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition and boundary, named by the segment that begins there.

        Returns:
            Columns ``model, condition, quantity, segment, value, low, high, unit, p_value``; the
            p-value is that of two jumps under the condition.
        """
        parts = [
            tidy(
                {
                    "model": one.model_name,
                    "condition": label,
                    "quantity": "boundary",
                    "segment": list(one.segments)[1:],
                    "value": np.array(one.boundaries, dtype=float),
                    "low": np.array([low for low, _ in one.intervals], dtype=float),
                    "high": np.array([high for _, high in one.intervals], dtype=float),
                    "unit": "blocks",
                    "p_value": one.p_value,
                }
            )
            for label, one in self.partitions.items()
        ]
        return pd.concat(parts, ignore_index=True)

    @property
    def table(self) -> pd.DataFrame:
        """One row per condition: boundaries, intervals, K, p, and agreement with the first.

        ``agreement`` is the share of blocks in the same segment, ``distance`` the mean distance of
        the boundaries in blocks, missing where there is another number of them.
        """
        first = next(iter(self.partitions.values()))
        blocks = np.arange(first.n_layers)
        rows = []
        for label, one in self.partitions.items():
            mine, other = (np.searchsorted(p.boundaries, blocks, "right") for p in (one, first))
            rows.append(
                {
                    "condition": label,
                    "groups": one.settings.get("n_groups"),
                    "boundaries": one.boundaries,
                    "intervals": one.intervals,
                    "n_boundaries": one.n_boundaries,
                    "p_value": one.p_value,
                    "agreement": float((mine == other).mean()),
                    "distance": _distance(one.boundaries, first.boundaries),
                }
            )
        return pd.DataFrame(rows)


@in_own_state
def stability(
    model: Any,
    prompts: Mapping[str, PromptDataset | Iterable[str]] | Sequence[PromptDataset | Iterable[str]],
    *,
    halves: bool = True,
    seeds: Sequence[int] = (0,),
    bands: Mapping[str, Mapping[str, tuple[int, int]]] | None = None,
    profile_settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Stability:
    """The partition from other prompts, other seeds and other bands: does it stay?

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: Prompt data sets, or names to them; the first is varied in the other ways.
        halves: Also profile two disjoint halves of the first set's groups.
        seeds: Seeds of folds, samples and draws; the first serves everywhere else.
        bands: Names to other bands to try on the first set.
        profile_settings: For :func:`~mspgt_lens.profile_layers`, such as ``{"n_folds": 3}``.
        progress: Show progress bars.
        **settings: For :func:`~mspgt_lens.detect_scales`.

    Returns:
        One partition per condition; see ``Stability.table`` and ``plot_stability``.

    Raises:
        ValueError: If there are no prompts or seeds, or prompts are texts rather than a list of
            data sets.
    """
    named = (
        dict(prompts)
        if isinstance(prompts, Mapping)
        else {f"prompts {i + 1}": one for i, one in enumerate(prompts)}
    )
    if not named or isinstance(prompts, str) or not seeds:
        raise ValueError("stability needs at least one prompt data set and one seed")
    if any(isinstance(one, str) for one in named.values()):
        raise ValueError(
            "prompts must be a list of prompt data sets; for one set of texts give [texts]"
        )
    adapter = as_adapter(model)
    check_depth(adapter)
    gathered = {"signals": signals_for(settings.get("method", "fused"))}
    partitions: dict[str, ScalePartition] = {}

    def add(
        label: str,
        data: PromptDataset | Iterable[str],
        seed: int = seeds[0],
        **changed: Any,
    ) -> None:
        chosen = {**gathered, **(profile_settings or {}), **changed}
        profile = profile_layers(adapter, data, seed=seed, progress=progress, **chosen)
        partitions[label] = detect_scales(profile=profile, seed=seed, **settings)

    first_name = next(iter(named))
    # Prompts may be an iterator, and the first set is read several times.
    first = list(as_dataset(named[first_name], model))
    add(first_name, _dataset(first))
    if halves:
        labels = sorted({p.group for p in first}, key=lambda g: stable_hash(g, seeds[0]))
        for i in range(2):
            part = set(labels[i::2])
            add(f"{first_name}, half {i + 1}", _dataset([p for p in first if p.group in part]))
    for name, data in list(named.items())[1:]:
        add(name, data)
    for seed in seeds[1:]:
        add(f"{first_name}, seed {seed}", _dataset(first), seed)
    for name, chosen in (bands or {}).items():
        add(f"{first_name}, bands {name}", _dataset(first), bands=chosen)
    return Stability(partitions)


def _distance(boundaries: Sequence[int], first: Sequence[int]) -> float:
    if len(boundaries) != len(first):
        return float("nan")
    return float(np.abs(np.subtract(boundaries, first)).mean()) if first else 0.0


def _dataset(prompts: list[Prompt]) -> PromptDataset:
    return PromptDataset(lambda: iter(prompts))
