"""The fewest nats per token that a site must pass on, per scale, by what predictions lose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.information.ridge import spread_sites
from mspgt_lens.models import ModelAdapter, as_adapter, provenance
from mspgt_lens.processes import Processes, Turns, joined
from mspgt_lens.prompts import PromptDataset
from mspgt_lens.rates.channel import Axes, Directions, find_directions, principal_axes
from mspgt_lens.rates.ladder import Ladder
from mspgt_lens.rates.measuring import Installed, measure
from mspgt_lens.rates.results import SHOWN, ChannelRun, RateDistortion
from mspgt_lens.rates.shaping import Shape, find_shapes
from mspgt_lens.rates.windows import Parts, Plan, Recorded, split_prompts
from mspgt_lens.storage import package_versions
from mspgt_lens.targets import DEFAULT_BANDS, check_bands

DEFAULT_DISTORTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
_N_SITES = 10
# Shares of the Fisher information that may be replaced by a multiple of the identity.
_SHRINKAGES = (0.1, 0.3, 0.6, 0.9)
# The one that says at which rate they are compared.
_MIDDLE = 1
# Rounds of channels beyond one for each distortion; each passes on more than the one before.
_MORE_ROUNDS = 12
# Groups to measure on below which intervals are too narrow.
_FEW_GROUPS = 10
_GUARANTEE = (
    "An upper bound on the nats per token that the site must pass on for a prediction to move by D "
    "nats of KL on average: Gaussian channels that pass on no more were run there, one for each "
    "position of the band, and the KL was measured on groups that shaped none of them; rates "
    "between two of them are those of using each for a share of the predictions. Where the lesser "
    "of shaped channels and noise of one correlation is taken, the same measurement chooses it, "
    "which can flatter it by a part of its interval."
)


@in_own_state
def rate_distortion(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    *,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    sites: Sequence[int] | None = None,
    distortions: Sequence[float] = DEFAULT_DISTORTIONS,
    n_targets: int = 8,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> RateDistortion:
    """The fewest nats per token that one site must pass on for predictions to move by at most D.

    For a band of offsets (a, b) and a prediction made at position t (of the token at t + 1), the
    residuals of one site at the positions ``t + 1 - b`` to ``t + 1 - a`` go through a channel each,
    all other positions and sites are left as they are, and the KL divergence from the clean
    prediction at t to the changed one is measured. So the local band says what a prediction needs
    of the position where it is made, and farther bands what it needs of those before.

    A channel mixes every direction of the residual with an independent Gaussian draw and keeps
    mean and covariance: ``rho_i`` of its own, ``sqrt(1 - rho_i^2)`` of the draw, at a rate of
    ``-1/2 sum log(1 - rho_i^2)`` nats (a little more where the measured activations have more power
    than those that shaped it; then that is what counts). Directions are the eigenvectors of
    ``Sigma^(1/2) F Sigma^(1/2)``, Sigma the residual's covariance and F the Fisher information of
    the prediction about the band's positions, from gradients of log-probabilities of tokens that
    are sampled from the model's own predictions; reverse water-filling over them says how much of
    each is kept. F is shrunk towards a multiple of the identity, by as much as makes the measured
    KL least. Half of the groups shape the channels, a sixth choose the shrinkage, and a third
    measure.

    Noise that keeps one correlation in every direction is run as well, for it needs less at some
    sites: the Fisher information is sampled, and tells of small changes only. The rate at a scale,
    site and distortion is that of whichever of the two needs less there.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts; at least 12 groups with prompts as long as the
            farthest offset and ``skip_first`` together, and two positions for each coordinate of
            the residual in half of them. Shorter prompts are left out.
        bands: Scale name to offsets ``(a, b)``.
        sites: Which sites, rising; by default 10, spread from the first to the last.
        distortions: D, how far predictions may move: KL in nats, above 0 and rising.
        n_targets: Predictions of each prompt that shape the channels of the farthest band; nearer
            ones get more, up to 64. An eighth as many are measured.
        skip_first: Tokens at the beginning of each prompt that are left alone.
        batch_size: Prompts per forward pass; by default a fixed number of tokens. Prompts that run
            together are read at the same positions, so that it also decides which.
        seed: Decides the split, the positions, the sampled tokens and the noise.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        Rates in nats per token, ``[scale, site, distortion]``, with 95% intervals over groups, the
        same of each of the two kinds of noise alone, and every channel that was run with the KL
        measured under it.

    Raises:
        ValueError: If an argument is out of range, or a prompt does not fit the model; or if
            processes were given different arguments.
        CannotMeasure: If the model is an encoder, cannot be run block by block or differentiated;
            if prompts are too few or too short; or if rounding alone moves predictions by as much
            as the least distortion.
        FloatingPointError: If activations or logits are NaN or infinite.
        RuntimeError: If another process of the group failed; says which one, and why. Or torch's
            own (``torch.OutOfMemoryError``), if a batch does not fit into memory.

    Example:
        >>> found = ml.rate_distortion(
        ...     model, prompts, bands={"near": (1, 1), "far": (2, 8)}, sites=(0, 4), n_targets=4,
        ...     distortions=(0.03, 0.1), progress=False,
        ... )
        >>> found.rate.shape  # scale, site, distortion
        (2, 2, 2)
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        adapter.require_causal("the rate that predictions need")
        plan = Plan(
            sites=_checked_sites(adapter, sites),
            bands=check_bands(bands),
            n_targets=n_targets,
            skip_first=skip_first,
            batch_size=batch_size,
            seed=seed,
        )
        levels = _checked_distortions(distortions)
        if n_targets < 1:
            raise ValueError(
                f"n_targets must be at least 1 prediction of each prompt, got {n_targets}"
            )
        parts = split_prompts(adapter, prompts, plan)
        processes.agree(_described(adapter, parts, plan, levels))
        with tqdm(unit="run", disable=not progress or processes.rank > 0) as bar:
            bar.set_description("shaping channels")
            shapes = find_shapes(adapter, parts.shaping, plan, bar, processes)
            own = _own_places(adapter, plan, processes)
            bar.set_description("choosing shrinkage")
            starts = _starts(adapter, parts, plan, own, shapes, levels, bar, processes)
            bar.set_description("measuring channels")
            _climb(adapter, parts, plan, starts, bar, processes)
        found = _result(adapter, parts, plan, levels, _gathered(starts, processes))
    for note in found.warnings:
        tell(note)
    return found


def _checked_sites(adapter: ModelAdapter, sites: Sequence[int] | None) -> tuple[int, ...]:
    if sites is None:
        return tuple(spread_sites(adapter.n_layers + 1, _N_SITES))
    checked = tuple(int(site) for site in sites)
    if not checked or list(checked) != sorted(set(checked)):
        raise ValueError(f"sites must be different sites in rising order, got {sites!r}")
    if not 0 <= checked[0] <= checked[-1] <= adapter.n_layers:
        raise ValueError(f"sites must lie in 0 ... {adapter.n_layers}, got {sites!r}")
    return checked


def _checked_distortions(distortions: Sequence[float]) -> tuple[float, ...]:
    checked = tuple(float(distortion) for distortion in distortions)
    if not checked or not all(0 < distortion < np.inf for distortion in checked):
        raise ValueError(f"distortions must be at least one KL above 0 nats, got {distortions!r}")
    if list(checked) != sorted(set(checked)):
        raise ValueError(f"distortions must rise, got {distortions!r}")
    return checked


def _described(
    adapter: ModelAdapter, parts: Parts, plan: Plan, distortions: Sequence[float]
) -> dict[str, Any]:
    """What decides the numbers, as JSON would hold it."""
    return {
        **provenance(adapter),
        "prompts": parts.identity,
        **vars(plan),
        "bands": list(plan.bands.items()),
        "distortions": distortions,
    }


class _Place(NamedTuple):
    """A scale and a site, of which one process runs all channels."""

    scale: str
    site: int


def _places(plan: Plan) -> list[_Place]:
    return [_Place(scale, site) for scale in plan.bands for site in plan.sites]


def _own_places(adapter: ModelAdapter, plan: Plan, processes: Processes) -> list[_Place]:
    """Those that this process measures."""

    def work(place: _Place) -> int:
        n_blocks = adapter.n_layers - place.site + 1
        return n_blocks * plan.bands[place.scale][1] * plan.measured_targets(place.scale)

    turns = Turns(processes)
    # The largest first, so that the small ones even out.
    largest_first = sorted(_places(plan), key=work, reverse=True)
    mine = {place for place in largest_first if turns.is_mine(work(place))}
    return [place for place in _places(plan) if place in mine]


class _Start(NamedTuple):
    """Where to begin at a place.

    Attributes:
        place: The place.
        shrinkage: The one that was chosen.
        shaped: The ladder of shaped channels.
        plain: The one of covariance-shaped noise.
    """

    place: _Place
    shrinkage: float
    shaped: Ladder
    plain: Ladder


def _starts(
    adapter: ModelAdapter,
    parts: Parts,
    plan: Plan,
    places: Sequence[_Place],
    shapes: Mapping[int, Shape],
    distortions: Sequence[float],
    bar: Any,
    processes: Processes,
) -> list[_Start]:
    """Where to begin at every place.

    All shrinkages are compared at one rate, at which the middle one is expected to cost as much as
    is shown first.
    """
    tried: list[Installed] = []
    along: list[Directions] = []
    axes = {
        site: principal_axes(shapes[site].mean, shapes[site].covariance)
        for site in dict.fromkeys(place.site for place in places)
    }
    for scale, site in places:
        candidates = list(_candidates(axes[site], shapes[site].fisher[scale]))
        middle = candidates[_MIDDLE]
        rate = middle.at_cost(min(SHOWN, middle.most / 2)).rate
        tried += [Installed(site, scale, one.at_rate(rate)) for one in candidates]
        along += candidates
    runs = Recorded(adapter, parts.choosing)
    readings = measure(adapter, runs, tried, plan, bar, processes)
    kl = np.array([reading.kl.mean() for reading in readings])
    expected = [one.expected_cost(at.channel) for one, at in zip(along, tried, strict=True)]
    starts = []
    each = len(_SHRINKAGES) + 1
    for number, place in enumerate(places):
        first = number * each
        best = first + int(np.argmin(kl[first : first + each - 1]))
        shaped, plain = (
            Ladder(
                place.site,
                place.scale,
                index == best,
                along[index],
                distortions,
                (expected[index], kl[index]),
            )
            for index in (best, first + each - 1)
        )
        starts.append(_Start(place, _SHRINKAGES[best - first], shaped, plain))
    return starts


def _candidates(axes: Axes, fisher: Float[Tensor, "d d"]) -> Iterator[Directions]:
    """Directions under every shrinkage, then those of covariance-shaped noise."""
    even = fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=fisher.dtype)
    for share in _SHRINKAGES:
        yield find_directions(axes, (1 - share) * fisher + share * even)
    yield find_directions(axes, fisher).alike()


def _climb(
    adapter: ModelAdapter,
    parts: Parts,
    plan: Plan,
    starts: Sequence[_Start],
    bar: Any,
    processes: Processes,
) -> None:
    """Run channels, one of every unfinished ladder at a time, until all distortions are reached."""
    runs = Recorded(adapter, parts.measuring, again=True)
    closed = [start.shaped.next() for start in starts]
    ladders = []
    for start, reading in zip(
        starts, measure(adapter, runs, closed, plan, bar, processes), strict=True
    ):
        # Where nothing is passed on, it does not matter along which directions.
        for ladder in (start.shaped, start.plain):
            ladder.tell(ladder.next(), reading, plan.seed)
            ladders.append(ladder)
    for _ in range(max((len(one.distortions) for one in ladders), default=0) + _MORE_ROUNDS):
        open_ones = [ladder for ladder in ladders if not ladder.done]
        if not open_ones:
            return
        rung = [ladder.next() for ladder in open_ones]
        readings = measure(adapter, runs, rung, plan, bar, processes)
        for ladder, one, reading in zip(open_ones, rung, readings, strict=True):
            ladder.tell(one, reading, plan.seed)
    for ladder in ladders:
        if not ladder.done:
            last = ladder.runs[-1]
            raise CannotMeasure(
                f"distortions must be above what can be told from rounding in {adapter.dtype}: at "
                f"site {ladder.site}, {ladder.scale}, predictions of {adapter.name} move by "
                f"{last.kl:.2g} nats (95% interval up to {last.high:.2g}) though {last.rate:.0f} "
                f"nats are passed on; ask for more than {ladder.distortions[0]:g}, give more "
                "prompts, or load the model in float32"
            )


class _Found(NamedTuple):
    """What was found at a place: rates ``[kind, end, distortion]``, of shaped channels first."""

    shrinkage: float
    rates: list[list[list[float]]]
    runs: list[ChannelRun]


def _gathered(starts: Sequence[_Start], processes: Processes) -> dict[_Place, _Found]:
    """What all processes found, each at its own places."""
    told = []
    for place, shrinkage, *ladders in starts:
        rates = [[end.tolist() for end in ladder.read()] for ladder in ladders]
        told.append((place, shrinkage, rates, [run for ladder in ladders for run in ladder.runs]))
    return {
        _Place(*place): _Found(shrinkage, rates, [ChannelRun(*run) for run in runs])
        for text in processes.texts(json.dumps(told))
        for place, shrinkage, rates, runs in json.loads(text)
    }


def _result(
    adapter: ModelAdapter,
    parts: Parts,
    plan: Plan,
    distortions: tuple[float, ...],
    found: Mapping[_Place, _Found],
) -> RateDistortion:
    places = [found[place] for place in _places(plan)]
    shape = (len(plan.bands), len(plan.sites))
    read = np.array([one.rates for one in places]).reshape(*shape, 6, len(distortions))
    names = [f"{kind}_{x}" for kind in ("shaped", "covariance") for x in ("rate", "low", "high")]
    groups = parts.group_counts()
    return RateDistortion(
        model_name=adapter.name,
        n_layers=adapter.n_layers,
        sites=plan.sites,
        bands=plan.bands,
        distortions=distortions,
        **dict(zip(names, np.moveaxis(read, 2, 0), strict=True)),
        shrinkage=np.reshape([one.shrinkage for one in places], shape),
        runs=tuple(run for one in places for run in one.runs),
        guarantee=_GUARANTEE,
        settings={
            "n_targets": plan.n_targets,
            "n_groups": groups,
            "skip_first": plan.skip_first,
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": parts.fingerprint,
        },
        versions=package_versions(),
        warnings=tuple(_warnings(groups)),
    )


def _warnings(groups: Mapping[str, int]) -> Iterator[str]:
    if groups["measuring"] < _FEW_GROUPS:
        yield (
            f"only {groups['measuring']} groups (documents) were measured on, so that intervals "
            f"are too narrow: give at least {3 * _FEW_GROUPS} groups in all"
        )
