"""Profiles and boundaries along training: when do they appear?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, named
from mspgt_lens.partition import ScalePartition
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.scales.detection import detect_scales, signals_for
from mspgt_lens.scales.segments import MIN_BLOCKS

Step = int | str


@dataclass(frozen=True, eq=False, repr=False)
class Emergence(Result):
    """Profiles and partitions of one model at several points of its training.

    Attributes:
        steps: What names the checkpoints, in the order given: steps, or revisions.
        profiles: The profile at each.
        partitions: The partition at each; None for models of fewer than 6 blocks, where boundaries
            cannot be told from drift.
    """

    steps: tuple[Step, ...]
    profiles: tuple[LayerProfile, ...]
    partitions: tuple[ScalePartition | None, ...]

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.profiles) == len(self.partitions):
            raise ValueError("Emergence: steps, profiles and partitions must be as many")
        super().__post_init__()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of every checkpoint, each once, with the checkpoint's name."""
        named_ones = (
            f"{step}: {note}"
            for step, *parts in zip(self.steps, self.profiles, self.partitions, strict=True)
            for part in parts
            if part is not None
            for note in part.warnings
        )
        return tuple(dict.fromkeys(named_ones))

    def heading(self) -> str:
        """The model and how many checkpoints."""
        return (
            f"Emergence{named(self.profiles[0].model_name if self.profiles else '')}: "
            f"{counted(len(self.steps), 'checkpoint')}"
        )

    def rows(self) -> Rows:
        """Relevance and boundaries at every checkpoint."""
        rows: Rows = [("step", "relevance", "best two places", "supported", "p of two")]
        for step, profile, partition in zip(
            self.steps, self.profiles, self.partitions, strict=True
        ):
            cells = ("", "", "")
            if partition is not None:
                places = ", ".join(map(str, partition.boundaries))
                cells = (places, str(partition.n_boundaries), f"{partition.p_value:.3g}")
            rows.append((str(step), f"{profile.relevance.values[-1]:.3g}", *cells))
        return rows

    @property
    def table(self) -> pd.DataFrame:
        """One row per checkpoint: relevance, predicted information and boundaries.

        ``relevance`` is that of the last site; ``predicted_<scale>`` is that of the site where it
        is largest, ``_low`` and ``_high`` its interval there, so that where all sites are noise it
        leans upward (nats per token). ``n_boundaries`` is how many boundaries the data support.
        """
        rows = []
        for step, profile, partition in zip(
            self.steps, self.profiles, self.partitions, strict=True
        ):
            row: dict[str, Any] = {"step": step, "relevance": profile.relevance.values[-1]}
            for scale, curve in profile.predicted.items():
                best = int(curve.values.argmax())
                row[f"predicted_{scale}"] = curve.values[best]
                row[f"predicted_{scale}_low"] = curve.low[best]
                row[f"predicted_{scale}_high"] = curve.high[best]
            if partition is not None:
                row |= {
                    "boundaries": partition.boundaries,
                    "intervals": partition.intervals,
                    "n_boundaries": partition.n_boundaries,
                    "p_value": partition.p_value,
                }
            rows.append(row)
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """All curves at all checkpoints: as ``LayerProfile.to_dataframe`` with ``step``."""
        frames = [
            profile.to_dataframe().assign(step=step)
            for step, profile in zip(self.steps, self.profiles, strict=True)
        ]
        return pd.concat(frames, ignore_index=True)


@in_own_state
def emergence(
    checkpoints: Iterable[tuple[Step, Any]] | Iterable[Step],
    prompts: PromptDataset | Iterable[str],
    *,
    load: Callable[[Any], Any] | None = None,
    profile_settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Emergence:
    """Profiles and boundaries along a model's training, one checkpoint in memory at a time.

    Either pairs of a step and a model, made one after the other by a generator, or names of
    checkpoints with the function that loads one::

        emergence(
            ["step0", "step512", "step143000"],
            texts,
            load=lambda revision: load_model("EleutherAI/pythia-70m", revision=revision),
        )

    A generator may yield the same model again after training it further.

    Args:
        checkpoints: Pairs of a step and a ``HookedTransformer`` or ``TransformerBridge``; with
            ``load``, steps or revisions.
        prompts: A :class:`PromptDataset`, or texts; the same at every checkpoint.
        load: Makes the model of a checkpoint. Each is let go before the next is loaded.
        profile_settings: For :func:`~mspgt_lens.profile_layers`, such as ``{"n_folds": 3}``.
        seed: Seed of every profile and partition.
        progress: Show progress bars.
        **settings: For :func:`~mspgt_lens.detect_scales`.

    Returns:
        A profile per checkpoint, and its partition; None for models of fewer than 6 blocks.

    Raises:
        ValueError: If there are no checkpoints, or two of the same name.
    """
    # Texts may come from an iterator, and every checkpoint reads them.
    data = prompts if isinstance(prompts, PromptDataset) else list(prompts)
    signals = signals_for(settings.get("method", "fused"))
    steps: list[Step] = []
    profiles: list[LayerProfile] = []
    partitions: list[ScalePartition | None] = []
    for checkpoint in checkpoints:
        step, model = _loaded(checkpoint, load)
        if step in steps:
            raise ValueError(f"checkpoints must have different names, got {step!r} twice")
        chosen = {"signals": signals, **(profile_settings or {})}
        profile = profile_layers(model, data, seed=seed, progress=progress, **chosen)
        enough = profile.n_layers >= MIN_BLOCKS
        steps.append(step)
        profiles.append(profile)
        partitions.append(detect_scales(profile=profile, seed=seed, **settings) if enough else None)
        # Or this model would stay in memory while the next is made.
        del checkpoint, model
    if not steps:
        raise ValueError("checkpoints must hold at least one checkpoint, got none")
    return Emergence(tuple(steps), tuple(profiles), tuple(partitions))


def _loaded(checkpoint: Any, load: Callable[[Any], Any] | None) -> tuple[Step, Any]:
    if load is not None:
        return checkpoint, load(checkpoint)
    if not isinstance(checkpoint, tuple) or len(checkpoint) != 2:
        raise ValueError(
            f"checkpoints must be pairs of a step and a model, got {checkpoint!r}: give pairs, "
            "or load= to make models from names"
        )
    return checkpoint
