"""The trained H-VIB probe: what stochastic, hierarchical readers of a site find at which rate."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.folds import stable_hash
from mspgt_lens.hvib.activations import CollectionPlan, collect_activations
from mspgt_lens.hvib.data import split_groups, token_labels
from mspgt_lens.hvib.fitting import FitJob, FitPlan, digest_of, run_fit
from mspgt_lens.hvib.results import HvibFit
from mspgt_lens.models import ModelAdapter, as_adapter, unembedding_rows, weight_digest
from mspgt_lens.partition import Segments, as_segments
from mspgt_lens.profile.run import LOOKAHEAD
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset, check_prompt, group_label
from mspgt_lens.targets import DEFAULT_BANDS, check_bands

HVIB_BETAS = (1.5, 3.0, 6.0, 12.0, 25.0, 50.0)


@in_own_state
def fit_hvib(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    partition: Segments | None = None,
    *,
    betas: Sequence[float] = HVIB_BETAS,
    sites: Sequence[int] | None = None,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    latent: int = 8,
    hidden: int = 32,
    width: int = 128,
    n_steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    weight_decay: float = 0.3,
    skip_first: int = 4,
    max_positions: int = 16_384,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HvibFit:
    """Train a hierarchical variational information bottleneck on every site, at every beta.

    Encoders ``q(t_s | z)`` (Gaussian, two hidden layers), priors ``N(0, I)`` for the coarsest t and
    ``r(t_s | t_coarser)`` for the others, Gaussian decoders of the future band means ``Y_s`` and of
    the next token through the model's own unembedding (its most frequent tokens, all others as one
    class). Training minimizes ``-log p(next token | t) - sum_s log p(Y_s | t) + sum_s KL_s / beta``
    (Alemi et al. 2017). Where a band is (1, 1) the next token counts twice, once as a feature.

    Activations are collected once into a bounded file. Three fifths of the groups are trained on,
    one fifth decides when each site and beta stops, and the last is reported.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts; the first 10,000 windows are considered.
        partition: Reads each scale at the last site of its own segment: one fit for the whole
            model instead of one per site. Needs a segment for every band: a
            :class:`ScalePartition`, a mapping from scale names to blocks, or two boundaries.
        betas: Weights of relevance against rate; small ones keep nothing.
        sites: Sites to read; all by default. Not together with a partition.
        bands: Scale name to its band of token offsets ``(a, b)``, finest first.
        latent: Dimensions of each scale's t.
        hidden: Units of each of an encoder's two hidden layers.
        width: Principal directions of each standardized site that the encoders see.
        n_steps: Training steps.
        batch_size: Positions per step.
        learning_rate: Of Adam at the start; it falls to 0 along a half cosine.
        weight_decay: Pull of all maps towards 0, as a share of the learning rate. A few dozen
            documents need it, or the probe learns them by heart; where groups are plenty it costs
            a little of the relevance.
        skip_first: Tokens at the beginning of each prompt that are left out.
        max_positions: Positions kept at most, drawn at random.
        folder: Where activations and checkpoints go, and where an interrupted fit goes on; by
            default a temporary one, removed at the end.
        seed: Decides positions, groups, first weights, batches and noise.
        progress: Show progress bars.

    Returns:
        Rates, relevances and free energies, in nats per token.

    Raises:
        ValueError: If an argument does not fit, there are too few groups, or ``folder`` is of
            another model, other prompts or other settings.
        FloatingPointError: If an activation is NaN or infinite, or training diverges.
        RuntimeError: Torch's own (``torch.OutOfMemoryError``), if one prompt does not fit into
            memory.

    Example:
        >>> fit = ml.fit_hvib(model, prompts, sites=[0, 8], betas=[2.0, 50.0], n_steps=20)
        >>> fit.relevance["local"].values.shape  # site, beta
        (2, 2)
    """
    adapter, bands = as_adapter(model), check_bands(bands)
    adapter.require_causal("the trained probe")
    adapter.require_every_logit("the trained probe")
    plan = FitPlan(betas, latent, hidden, width, n_steps, batch_size, learning_rate, weight_decay)
    taps = {} if partition is None else _taps(adapter, partition, bands, sites)
    chosen = tuple(taps.values())[::-1] if taps else _checked_sites(adapter, sites)
    for name, value, least in (("max_positions", max_positions, 1), ("skip_first", skip_first, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    windows = _windows(adapter, as_dataset(prompts, model))
    collection = CollectionPlan(chosen, bands, skip_first, max_positions, seed)
    identity = digest_of(weight_digest(adapter), repr(collection), *_prompt_parts(windows))
    with _folder(folder) as path:
        activations = collect_activations(
            adapter, windows, collection, path, fingerprint=identity, progress=progress
        )
        split = split_groups(activations.group, seed)
        job = FitJob(
            read=lambda number: activations.rows[number].astype(np.float32),
            n_inputs=len(chosen),
            targets=activations.targets,
            classes=token_labels(
                activations.next_token, split, lambda ids: unembedding_rows(adapter, ids)
            ),
            groups=activations.group,
            split=split,
            identity=identity,
            sites=(max(chosen),) if taps else chosen,
            taps=taps,
            model_name=adapter.name,
            settings={
                "bands": {name: list(band) for name, band in bands.items()},
                "skip_first": skip_first,
                "max_positions": max_positions,
                "weights": adapter.weight_processing,
            },
        )
        return _warned(run_fit(job, plan, path, seed, progress))


@in_own_state
def fit_hvib_arrays(
    z: Float[np.ndarray, "site sample d"],
    targets: Mapping[str, Float[np.ndarray, "sample feature"]],
    groups: Sequence[Hashable] | None = None,
    *,
    betas: Sequence[float] = HVIB_BETAS,
    latent: int = 8,
    hidden: int = 32,
    width: int = 128,
    n_steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    weight_decay: float = 0.1,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HvibFit:
    """The same on plain arrays: every slice of ``z`` is a site, read for every target.

    Args:
        z: What the encoders see.
        targets: Scale name to what its decoder should tell, finest scale first.
        groups: One label per sample; samples that belong together share one, and are never split
            between training and reporting. By default every sample is a group of its own.
        betas, latent, hidden, width, n_steps, batch_size: As in :func:`fit_hvib`.
        learning_rate, weight_decay, seed, progress: As in :func:`fit_hvib`.
        folder: Where checkpoints go, and where an interrupted fit goes on; none by default.

    Returns:
        Rates, relevances and free energies, in nats per sample.

    Raises:
        ValueError: If arrays do not fit, are not finite or do not vary, if there are too few
            groups, or ``folder`` is of other data or settings.
        FloatingPointError: If training diverges.

    Example:
        >>> z = np.random.default_rng(0).standard_normal((1, 300, 4))
        >>> fit = ml.arrays.fit_hvib_arrays(z, {"local": z[0, :, :1]}, betas=[50.0], n_steps=20)
        >>> fit.total_rate["local"].values.shape  # site, beta
        (1, 1)
    """
    plan = FitPlan(betas, latent, hidden, width, n_steps, batch_size, learning_rate, weight_decay)
    z = np.asarray(z)
    if z.ndim != 3 or not np.isfinite(z).all():
        raise ValueError(f"z must be finite, of shape [site, sample, d], got shape {z.shape}")
    if not targets:
        raise ValueError("targets must name at least one target, got none")
    checked = {}
    for name, values in targets.items():
        checked[str(name)] = np.asarray(values)
        if checked[str(name)].ndim != 2 or len(values) != z.shape[1]:
            raise ValueError(
                f"targets[{name!r}] must have shape [{z.shape[1]}, feature], got "
                f"{checked[str(name)].shape}"
            )
        if not np.isfinite(checked[str(name)]).all():
            raise ValueError(f"targets[{name!r}] holds NaN or infinite values")
    labels = np.arange(z.shape[1])
    if groups is not None:
        own = [group_label(label, index) for index, label in enumerate(groups)]
        labels = np.array([stable_hash(label) for label in own], dtype=np.uint64)
    if len(labels) != z.shape[1]:
        raise ValueError(f"groups needs one label per sample ({z.shape[1]}), got {len(labels)}")
    identity = digest_of(z, labels, *itertools.chain(*checked.items()))
    job = FitJob(
        read=lambda number: z[number],
        n_inputs=len(z),
        targets=checked,
        classes=None,
        groups=labels,
        split=split_groups(labels, seed),
        identity=identity,
        sites=tuple(range(len(z))),
    )
    if folder is None:
        path = None
    else:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
    return _warned(run_fit(job, plan, path, seed, progress))


def _warned(fit: HvibFit) -> HvibFit:
    """The result, its warnings told to whoever called the public function."""
    for note in fit.warnings:
        tell(note)
    return fit


def _windows(adapter: ModelAdapter, prompts: PromptDataset) -> list[Prompt]:
    """The prompts that are considered, each of them fit for the model."""
    windows = list(itertools.islice(iter(prompts), LOOKAHEAD))
    if not windows:
        raise ValueError("prompts holds no prompt with a token")
    for index, prompt in enumerate(windows):
        check_prompt(adapter, prompt, index)
    return windows


def _checked_sites(adapter: ModelAdapter, sites: Sequence[int] | None) -> tuple[int, ...]:
    if sites is None:
        return tuple(range(adapter.n_layers + 1))
    checked = tuple(int(site) for site in sites)
    if not checked or list(checked) != sorted(set(checked)):
        raise ValueError(f"sites must be different sites in rising order, got {sites!r}")
    if not 0 <= checked[0] <= checked[-1] <= adapter.n_layers:
        raise ValueError(f"sites must lie in 0 ... {adapter.n_layers}, got {sites!r}")
    return checked


def _taps(
    adapter: ModelAdapter,
    partition: Segments,
    bands: Mapping[str, tuple[int, int]],
    sites: Sequence[int] | None,
) -> dict[str, int]:
    """The last site of each scale's segment, finest scale first."""
    if sites is not None:
        raise ValueError("sites must be None where a partition is given: it names the sites")
    segments = as_segments(partition, adapter.n_layers)
    if set(segments) != set(bands):
        raise ValueError(
            f"partition must have one segment per band ({', '.join(bands)}), got "
            f"{', '.join(segments)}"
        )
    return {name: max(segments[name]) + 1 for name in bands}


def _prompt_parts(prompts: Sequence[Prompt]) -> Iterator[Any]:
    for prompt in prompts:
        yield prompt.tokens
        yield repr(prompt.group)


@contextmanager
def _folder(folder: str | Path | None) -> Iterator[Path]:
    """The user's folder, which stays, or a temporary one, which goes."""
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mspgt_lens-") as temporary:
        yield Path(temporary)
