"""Massive activations taken away where they appear, and what becomes of sinks and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, interval, named, tidy
from mspgt_lens.estimates import CannotMeasure, Curve, Estimate
from mspgt_lens.models import (
    Edit,
    ModelAdapter,
    as_adapter,
    edited,
    own_attention,
    require_acted,
)
from mspgt_lens.perturbation.batches import Batch, Batches, make_batches
from mspgt_lens.perturbation.block_runs import SHIFTS, Shift, prediction_shifts
from mspgt_lens.perturbation.responding import log_probabilities
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.signals.traits import (
    N_MASSIVE,
    SINK_THRESHOLD,
    largest_share,
    prompt_entropy,
    sink_rate,
)
from mspgt_lens.statistics import mean_interval
from mspgt_lens.storage import package_versions

Trait = Literal["massive_share", "sink_rate", "prompt_entropy"]
TRAITS: tuple[Trait, ...] = get_args(Trait)
_PLACES = ("site", "block")
# A position is massive if its power in the massive coordinates exceeds the prompt's median by this
# factor (its size by 10). Fixed before any result was seen.
_MASSIVE = 100.0
_UNITS = {
    "massive_share": "share of power",
    "sink_rate": "share of heads",
    "prompt_entropy": "nats",
}
_MEANING = {
    "massive_share": "Share of the residual's power, over all positions of a prompt, in its three "
    "largest coordinates",
    "sink_rate": "Share of heads whose attention to the prompt's first token is above "
    f"{SINK_THRESHOLD:g} on average",
    "prompt_entropy": "Renyi entropy of order 2 of the prompt's Gram matrix: rows less their mean, "
    "at unit length, negative cosines taken as 0; sinks are in",
}
_SHIFTED = {
    "kl": ("nats", "KL divergence of the prediction without what is massive from the clean one."),
    "top1_kept": ("share", "Share of positions that keep their most likely token."),
    "entropy": ("nats", "Rise of the prediction's entropy."),
}


@dataclass(frozen=True, eq=False, repr=False)
class MassiveAblation(Result):
    """What becomes of a model without the massive activations that one block writes.

    Attributes:
        model_name: The model's name.
        n_layers: Number of blocks, L.
        block: The block whose writing was taken away.
        coordinates: The coordinates that it was taken from, those of most power first.
        n_massive: Massive positions per prompt, on average.
        at_first: Share of them that are their prompt's first token.
        massive_share: Share of the residual's power in each prompt's three largest coordinates,
            clean and ablated, ``[run, site, group]``.
        sink_rate: Share of heads whose mean attention to the first token is above 0.3, ``[run,
            block, group]``.
        prompt_entropy: Renyi entropy of order 2 of the prompt's Gram matrix, nats, ``[run, site,
            group]``.
        shifts: How far predictions move, ``[measure, group]``: KL (nats), share of positions that
            keep their most likely token, rise of the entropy (nats).
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    n_layers: int
    block: int
    coordinates: tuple[int, ...]
    n_massive: float
    at_first: float
    massive_share: Float[np.ndarray, "run site group"]
    sink_rate: Float[np.ndarray, "run block group"]
    prompt_entropy: Float[np.ndarray, "run site group"]
    shifts: Float[np.ndarray, "measure group"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def curve(self, trait: Trait, *, ablated: bool = False) -> Curve:
        """A trait of the model along depth, with its interval over groups.

        Args:
            trait: ``"massive_share"`` or ``"prompt_entropy"``, at the L + 1 sites, or
                ``"sink_rate"``, in the L blocks.
            ablated: Of the run without what is massive; of the clean run by default.

        Returns:
            One point per site or block; ``by_fold`` holds every group, and groups count alike.

        Raises:
            ValueError: If there is no such trait.
        """
        if trait not in TRAITS:
            raise ValueError(f"trait must be one of {', '.join(TRAITS)}, got {trait!r}")
        by_group = getattr(self, trait)[int(ablated)].T
        which = "without what is massive" if ablated else "in the clean run"
        return Curve(
            *mean_interval(by_group), _UNITS[trait], f"{_MEANING[trait]}; {which}.", by_group
        )

    def shift(self, measure: Shift = "kl") -> Estimate:
        """How far predictions move, with a 95% interval over groups.

        Args:
            measure: ``"kl"``, ``"top1_kept"`` or ``"entropy"``.

        Returns:
            Nats, or a share.

        Raises:
            ValueError: If there is no such measure.
        """
        if measure not in SHIFTS:
            raise ValueError(f"measure must be one of {', '.join(SHIFTS)}, got {measure!r}")
        mean, low, high = mean_interval(self.shifts[SHIFTS.index(measure)])
        unit, guarantee = _SHIFTED[measure]
        return Estimate(float(mean), float(low), float(high), unit, guarantee)

    def heading(self) -> str:
        """The model, the block and the coordinates."""
        return (
            f"MassiveAblation{named(self.model_name)}: block {self.block}, coordinates "
            f"{', '.join(map(str, self.coordinates))}, {counted(self.shifts.shape[1], 'document')}"
        )

    def rows(self) -> Rows:
        """Every trait behind the block, clean and ablated, and the shifts of predictions."""
        rows: Rows = [("", "clean", "without")]
        for name, trait, pick in self._traits():
            ends = []
            for ablated in (False, True):
                by_group = pick(getattr(self, trait)[int(ablated), self.block + 1 :])
                ends.append(interval(*(float(x) for x in mean_interval(by_group))))
            rows.append((name, *ends))
        for measure in SHIFTS:
            estimate = self.shift(measure)
            rows.append((measure, "", interval(estimate.value, estimate.low, estimate.high)))
        return rows

    def findings(self) -> list[str]:
        """Where what is massive appears, and where it stands."""
        share = self.curve("massive_share").values
        return [
            f"Block {self.block} raises the share of power in the largest three coordinates from "
            f"{share[self.block]:.0%} to {share[self.block + 1]:.0%}; {self.n_massive:.3g} "
            f"positions per prompt are massive after it, {self.at_first:.0%} of them first tokens."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per trait, run and site or block, then the shifts of predictions.

        Returns:
            Columns ``model, quantity, condition, site, block, value, low, high, unit``;
            ``condition`` is ``"clean"`` or ``"ablated"``; shifts have no site and no block.
        """
        tables = []
        for trait in TRAITS:
            for ablated in (False, True):
                curve = self.curve(trait, ablated=ablated)
                points = np.arange(len(curve))
                where = {"block": points} if trait == "sink_rate" else {"site": points}
                tables.append(self._table(trait, ablated, curve, curve.values, where))
        for measure in SHIFTS:
            estimate = self.shift(measure)
            tables.append(self._table(measure, True, estimate, [estimate.value], {}))
        return pd.concat(tables, ignore_index=True)

    def _table(
        self, quantity: str, ablated: bool, found: Curve | Estimate, value: Any, where: Any
    ) -> pd.DataFrame:
        none = pd.array([pd.NA] * len(value), dtype="Int64")
        places = {name: pd.array(where.get(name, none), dtype="Int64") for name in _PLACES}
        columns: dict[str, Any] = {
            "model": self.model_name,
            "quantity": quantity,
            "condition": "ablated" if ablated else "clean",
            **places,
            "value": value,
            "low": found.low,
            "high": found.high,
            "unit": found.unit,
        }
        return tidy(columns)

    def _traits(self) -> Iterator[tuple[str, Trait, Any]]:
        """What sums up a trait behind the block, per group."""
        yield "largest massive share behind it", "massive_share", lambda x: x.max(axis=0)
        if self.block + 1 < self.n_layers:
            yield "mean sink rate behind it", "sink_rate", lambda x: x.mean(axis=0)
        yield "lowest prompt entropy behind it", "prompt_entropy", lambda x: x.min(axis=0)


@in_own_state
def ablate_massive(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    block: int | None = None,
    *,
    skip_first: int = 4,
    batch_size: int | None = None,
    progress: bool = True,
) -> MassiveAblation:
    """Take away the massive activations that a block writes, and see what goes with them.

    In most large models one early block writes values into a few coordinates of one token, mostly
    the first, that are hundreds of times as large as all others; later blocks attend to it (an
    attention sink), and the entropy of the prompt's Gram matrix falls into a valley (2510.06477).
    Here what the block writes into its three largest coordinates is taken away, at the positions
    whose power there is more than 100 times the prompt's median. What later blocks write stays.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        block: The block; by default the onset, the block that most raises the share of power of the
            three largest coordinates, over all positions of a prompt.
        skip_first: Tokens at the beginning of each prompt whose predictions are not read; all else
            is read at every position, first tokens included.
        batch_size: Prompts per forward pass; by default a fixed number of tokens, or what fits.
        progress: Show a progress bar.

    Returns:
        Share of massive power, sink rate and prompt entropy along depth, clean and ablated, and how
        far predictions move.

    Raises:
        CannotMeasure: If no position is massive after the block, the model is an encoder, or there
            are fewer than 3 groups.
        FloatingPointError: If activations or logits are NaN or infinite.
        RuntimeError: If the model does not compute what is to be read or changed under its hook.
        ValueError: If there is no such block, or a prompt does not fit the model.
    """
    adapter = as_adapter(model)
    if block is not None and not 0 <= block < adapter.n_layers:
        raise ValueError(
            f"block must be 0 to {adapter.n_layers - 1} in {adapter.name}, or None for the onset, "
            f"got {block}"
        )
    batches = make_batches(adapter, prompts, skip_first=skip_first, batch_size=batch_size)
    total = 3 * batches.n_prompts
    with adapter.inference(), tqdm(total=total, desc="ablating", disable=not progress) as bar:
        onset, coordinates = _onset(adapter, batches, block, bar)
        n_groups = len(batches.groups)

        def run(batch: Batch) -> _Ablated:
            own = _Ablated(adapter, n_groups, onset, coordinates)
            own.add(batch)
            bar.update(2 * batch.n_rows)
            return own

        found = _Ablated(adapter, n_groups, onset, coordinates)
        for own in batches.each(run, bar):
            found.take(own)
    taking = found.taking
    if not taking.n_massive:
        raise CannotMeasure(
            f"model: after block {onset} of {adapter.name} no position holds {_MASSIVE:g} times "
            "the median power in the largest three coordinates, so nothing is massive there; "
            "give another block"
        )
    traits = {t: np.stack([reading.means(t) for reading in found.readings]) for t in TRAITS}
    return MassiveAblation(
        model_name=adapter.name,
        n_layers=adapter.n_layers,
        block=onset,
        coordinates=tuple(coordinates.tolist()),
        n_massive=taking.n_massive / taking.n_prompts,
        at_first=taking.n_first / taking.n_massive,
        massive_share=traits["massive_share"],
        sink_rate=traits["sink_rate"],
        prompt_entropy=traits["prompt_entropy"],
        shifts=(found.shifts / found.n_shifts).T,
        settings={
            "block": block,
            "n_groups": n_groups,
            "n_positions": batches.n_positions,
            "skip_first": skip_first,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": batches.fingerprint,
        },
        versions=package_versions(),
    )


def _onset(
    adapter: ModelAdapter, batches: Batches, block: int | None, bar: Any
) -> tuple[int, Int[Tensor, " coordinate"]]:
    """The block after which power is most concentrated anew, and its largest coordinates."""
    n_groups = len(batches.groups)
    power = torch.zeros(adapter.n_layers + 1, adapter.d_model, dtype=torch.float64)
    share = np.zeros((adapter.n_layers + 1, n_groups))
    prompts = np.zeros(n_groups)

    def run(batch: Batch) -> tuple[Tensor, np.ndarray]:
        own_power, own_share = torch.zeros_like(power), np.zeros_like(share)

        def on_site(site: int, residual: Tensor) -> None:
            of_prompt = _power(residual, batch.mask)
            own_power[site] = of_prompt.sum(dim=0)
            np.add.at(own_share[site], batch.groups, largest_share(of_prompt).numpy())

        adapter.run(batch.tokens, batch.mask, on_site)
        bar.update(batch.n_rows)
        return own_power, own_share

    # Only what stands in the stream is read: no patterns are needed.
    with own_attention(adapter):
        for own_power, own_share in batches.each(run, bar):
            power += own_power
            share += own_share
    for batch in batches:
        np.add.at(prompts, batch.groups, 1.0)
    if block is None:
        block = int(np.diff((share / prompts).mean(axis=1)).argmax())
    return block, power[block + 1].topk(min(N_MASSIVE, adapter.d_model)).indices


class _Ablated:
    """What the clean and the ablated runs of some batches say."""

    def __init__(
        self,
        adapter: ModelAdapter,
        n_groups: int,
        block: int,
        coordinates: Int[Tensor, " coordinate"],
    ) -> None:
        self.readings = [_Reading(adapter, n_groups) for _ in range(2)]
        self.taking = _TakingAway(block, coordinates)
        self.shifts, self.n_shifts = np.zeros((n_groups, len(SHIFTS))), np.zeros((n_groups, 1))

    def add(self, batch: Batch) -> None:
        """Run a batch clean and ablated."""
        clean, changed = (
            reading.add(batch, edits)
            for reading, edits in zip(self.readings, ((), self.taking.edits(batch)), strict=True)
        )
        owner = batch.groups[torch.nonzero(batch.valid)[:, 0].numpy()]
        np.add.at(self.shifts, owner, prediction_shifts(clean, changed))
        np.add.at(self.n_shifts, owner, 1.0)

    def take(self, others: _Ablated) -> None:
        """Add what other batches say."""
        for own, other in zip(self.readings, others.readings, strict=True):
            own.take(other)
        self.taking.take(others.taking)
        self.shifts += others.shifts
        self.n_shifts += others.n_shifts


class _Reading:
    """Traits of one kind of run, summed over the prompts of every group."""

    def __init__(self, adapter: ModelAdapter, n_groups: int) -> None:
        self.adapter = adapter
        n_sites = adapter.n_layers + 1
        self._sums = {
            trait: np.zeros((n_sites - (trait == "sink_rate"), n_groups)) for trait in TRAITS
        }
        self._prompts = np.zeros(n_groups)

    def add(self, batch: Batch, edits: Sequence[Edit]) -> Float[Tensor, "position vocab"]:
        """Run a batch under edits; log-probabilities of its valid positions."""
        final: list[Tensor] = []

        def on_site(site: int, residual: Tensor) -> None:
            shares = largest_share(_power(residual, batch.mask)).numpy()
            self._add("massive_share", site, batch, shares)
            self._add("prompt_entropy", site, batch, _prompt_entropies(residual, batch.mask))
            if site == self.adapter.n_layers:
                final.append(residual[batch.valid.to(residual.device)])

        def on_pattern(block: int, pattern: Tensor) -> None:
            self._add("sink_rate", block, batch, _sink_rates(pattern, batch.mask))

        with edited(self.adapter, edits) as counts:
            self.adapter.run(batch.tokens, batch.mask, on_site, on_pattern)
        require_acted(self.adapter, edits, counts)
        np.add.at(self._prompts, batch.groups, 1.0)
        run = "the run without what is massive" if edits else "the clean run"
        return log_probabilities(self.adapter, final.pop(), run)

    def take(self, other: _Reading) -> None:
        """Add the sums of other batches."""
        for trait, total in self._sums.items():
            total += other._sums[trait]
        self._prompts += other._prompts

    def means(self, trait: Trait) -> Float[np.ndarray, "point group"]:
        """A trait's mean over the prompts of every group."""
        mean: np.ndarray = self._sums[trait] / self._prompts
        return mean

    def _add(
        self, trait: Trait, point: int, batch: Batch, values: Float[np.ndarray, " prompt"]
    ) -> None:
        np.add.at(self._sums[trait][point], batch.groups, values)


class _TakingAway:
    """Edits that put back what a block wrote into some coordinates of massive positions."""

    def __init__(self, block: int, coordinates: Int[Tensor, " coordinate"]) -> None:
        self.block, self.coordinates = block, coordinates
        self.n_massive = self.n_first = self.n_prompts = 0

    def take(self, other: _TakingAway) -> None:
        """Add the counts of other batches."""
        self.n_massive += other.n_massive
        self.n_first += other.n_first
        self.n_prompts += other.n_prompts

    def edits(self, batch: Batch) -> list[Edit]:
        """For one run of a batch."""
        before: list[Tensor] = []

        def keep(residual: Tensor) -> Tensor:
            before[:] = [residual]
            return residual

        def take_away(residual: Tensor) -> Tensor:
            chosen = self.coordinates.to(residual.device)
            real = batch.mask.to(residual.device)
            power = residual[..., chosen].double().square().sum(dim=-1)
            median = torch.where(real, power, torch.nan).nanmedian(dim=1, keepdim=True).values
            massive = real & (power > _MASSIVE * median)
            self.n_massive += int(massive.sum())
            self.n_first += int(massive[:, 0].sum())
            self.n_prompts += len(massive)
            changed = residual.clone()
            changed[..., chosen] = torch.where(
                massive[..., None], before.pop()[..., chosen], residual[..., chosen]
            )
            return changed

        return [
            Edit(self.block, "resid_pre", keep),
            Edit(self.block, "resid_post", take_away),
        ]


def _power(
    residual: Float[Tensor, "prompt pos d_model"], mask: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt d_model"]:
    """Each coordinate's sum of squares over a prompt's tokens, on the CPU."""
    rows = residual.cpu().double() * mask[..., None]
    power = rows.square().sum(dim=1)
    if not bool(torch.isfinite(power.sum())):
        raise FloatingPointError("activations are NaN or infinite; load the model in float32")
    return power


def _prompt_entropies(
    residual: Float[Tensor, "prompt pos d_model"], mask: Bool[Tensor, "prompt pos"]
) -> Float[np.ndarray, " prompt"]:
    pairs = zip(residual.cpu(), mask, strict=True)
    return np.array([float(prompt_entropy(rows[real])) for rows, real in pairs])


def _sink_rates(
    pattern: Float[Tensor, "prompt head query key"], mask: Bool[Tensor, "prompt pos"]
) -> Float[np.ndarray, " prompt"]:
    pairs = zip(pattern.cpu().double(), mask, strict=True)
    return np.array([float(sink_rate(own[:, real].transpose(0, 1))) for own, real in pairs])
