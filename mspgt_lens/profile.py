"""Layer profiles: one pass over the prompts, every curve from its moments."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.gathering import Batch, Source, add_batch, calibrate, make_batch, make_batches
from mspgt_lens.information import check_noise, site_statistics
from mspgt_lens.layer_profile import LayerProfile
from mspgt_lens.lens import TokenRelevance, logit_lens_relevance, ridge_lens_relevance
from mspgt_lens.models import ModelAdapter, as_adapter, cache_reader
from mspgt_lens.moments import MAX_WIDTH, Coordinates, Moments, plan_moments
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset, balanced_folds, stable_hash
from mspgt_lens.readers import Reading, read_targets
from mspgt_lens.results import Curve
from mspgt_lens.statistics import fold_interval, jackknife_interval, pseudo_values
from mspgt_lens.storage import package_versions
from mspgt_lens.targets import DEFAULT_BANDS, check_bands

# Windows looked at before the pass: they decide the folds and the target features.
LOOKAHEAD = 10_000
_CHUNK = 1024
_CALIBRATION_TOKENS = 2048
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192, "mps": 4096}
Control = Literal["random_weights", "shuffled_tokens"]
_CONTROL_WORDS = {
    None: "",
    "random_weights": " (random weights)",
    "shuffled_tokens": " (shuffled tokens)",
}
_GUARANTEES = {
    "compression": "Gaussian channel rate of the residual stream: an upper bound on its "
    "information about the input, given its covariance and the noise.",
    "relevance": "Held-out cross-entropy of a unigram model minus that of the ridge lens: usable "
    "information about the next token; may rise with depth.",
    "logit_lens": "Held-out cross-entropy of a unigram model minus that of the raw logit lens.",
    "retained": "Held-out information that a linear-Gaussian reader finds about tokens already "
    "read: usable information, no bound on Shannon's.",
    "predicted": "Held-out information that a linear-Gaussian reader finds about tokens to come: "
    "usable information, no bound on Shannon's.",
    "added": "Held-out information about this scale's future that a linear-Gaussian reader adds to "
    "the futures of the coarser scales: usable information, no bound on Shannon's.",
    "attention_span": "Expected distance to the attended key, first key excluded and the rest "
    "renormalized, mean over heads and valid queries.",
    "attention_entropy": "Entropy of the attended key, first key excluded and the rest "
    "renormalized, mean over heads and valid queries.",
    "novelty": "1 - linear CKA between the residual stream before and after the block.",
    "inter_layer_information": "Information between the sites around the block, both seen "
    "through the compression channel: an upper bound for Gaussian activations only.",
    "update_ratio": "Mean length of the block's update over that of the residual it adds to.",
    "effective_rank": "Participation ratio of the spectrum after the block.",
}


def profile_layers(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    *,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    noise: float = 0.1,
    coordinates: Coordinates = "standardized",
    n_folds: int = 5,
    skip_first: int = 4,
    batch_size: int | None = None,
    logit_lens: bool = False,
    control: Control | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerProfile:
    """What every layer compresses, retains and predicts, from one pass over the prompts.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts.
        bands: Scale name to its band of token offsets ``(a, b)``.
        noise: Variance of the compression channel's noise, in units of a coordinate's variance.
        coordinates: ``"standardized"`` gives every residual coordinate unit variance, so that a few
            massive ones do not own every number; ``"raw"`` shows the difference.
        n_folds: Folds of groups for cross-fitting and intervals, at least 3.
        skip_first: Tokens at the beginning of each prompt that are left out: attention sinks and
            massive activations sit there.
        batch_size: Prompts per forward pass; by default as many as fill a fixed number of tokens.
        logit_lens: Also decode the raw logit lens; about as much work again as relevance.
        control: A null to compare with. ``"random_weights"`` draws all weights anew for the time of
            the profile, as large as trained ones of the same kind but the same in every block;
            ``"shuffled_tokens"`` puts each prompt's tokens in random order.
        seed: Decides the folds, the sampled positions, the projection of wide residuals, and what
            a control draws.
        progress: Show a progress bar with tokens per second.

    Returns:
        The profile. Information is in nats per token.

    Raises:
        ValueError: If there are no prompts, fewer groups than folds, too few positions, prompts
            longer than the context, or tokens outside the vocabulary.
        FloatingPointError: If an activation is NaN or infinite.
        TypeError: If the model is none of TransformerLens's, or lacks a hook.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
    if control not in (None, *get_args(Control)):
        raise ValueError(
            f"control must be None or one of {', '.join(get_args(Control))}, got {control!r}"
        )
    adapter = as_adapter(model)
    dataset = as_dataset(prompts, model)
    if control == "shuffled_tokens":
        dataset = dataset.shuffled(adapter.special_ids, seed)
    weights = adapter.random_weights(seed) if control == "random_weights" else nullcontext()
    with weights:
        run = _Run(adapter, bands, noise, coordinates, n_folds, skip_first, seed, control)
        return _warned(_profile(run, dataset, batch_size, logit_lens, progress))


def _profile(
    run: _Run, prompts: PromptDataset, batch_size: int | None, logit_lens: bool, progress: bool
) -> LayerProfile:
    adapter, stream = run.adapter, iter(prompts)
    first = list(itertools.islice(stream, LOOKAHEAD))
    run.begin(first)
    total = sum(len(prompt.tokens) for prompt in first) if len(first) < LOOKAHEAD else None
    per_batch = _TOKENS_PER_BATCH.get(adapter.device.type, _TOKENS_PER_BATCH["cuda"])
    with (
        adapter.inference(),
        tqdm(
            total=total, unit="tok", unit_scale=True, desc=adapter.name, disable=not progress
        ) as bar,
    ):
        if run.projects:
            batch = make_batch(run.first_tokens(first), 0, range(len(first)))
            run.moments.reference = calibrate(run.moments.plan, adapter, batch)
        for chunk in itertools.chain([first], _chunks(stream)):
            number = run.n_seen
            for batch in make_batches(run.assign(chunk), batch_size, per_batch, number):
                add_batch(run.moments, adapter, batch)
                bar.update(int(batch.mask.sum()))
        return run.finish(logit_lens)


def profile_cache(
    model: Any,
    cache: Mapping[str, Tensor],
    tokens: Int[Tensor, "prompt pos"],
    *,
    mask: Bool[Tensor, "prompt pos"] | None = None,
    groups: Sequence[Hashable] | None = None,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    noise: float = 0.1,
    coordinates: Coordinates = "standardized",
    n_folds: int = 5,
    skip_first: int = 4,
    logit_lens: bool = False,
    seed: int = 0,
) -> LayerProfile:
    """The same curves from an ``ActivationCache`` that is already there.

    Args:
        model: The model that made the cache.
        cache: From ``model.run_with_cache(tokens, names_filter=needed_hooks(model))``.
        tokens: The tokens that were run.
        mask: True where a token is not padding; padding may be on either side.
        groups: One label per prompt; by default every prompt is a group of its own.
        bands, noise, coordinates, n_folds, skip_first, logit_lens, seed: As in
            :func:`profile_layers`.

    Returns:
        The profile that :func:`profile_layers` gives for these prompts.

    Raises:
        KeyError: If the cache lacks a needed hook; the message gives the ``names_filter`` to use.
        ValueError: As :func:`profile_layers`, or if cache and tokens differ in shape.
    """
    adapter = as_adapter(model)
    sites, patterns = cache_reader(adapter, cache)
    tokens = torch.as_tensor(tokens)
    tokens = (tokens[None] if tokens.ndim == 1 else tokens).cpu()
    if sites[0].shape[:2] != tokens.shape:
        raise ValueError(
            f"tokens must be those that the cache was made from, of shape "
            f"{tuple(sites[0].shape[:2])}, got {tuple(tokens.shape)}"
        )
    run = _Run(adapter, bands, noise, coordinates, n_folds, skip_first, seed)
    prompts = list(PromptDataset.from_tokens(tokens, mask, groups))
    run.begin(prompts)
    assigned = run.assign(prompts)
    start = (
        torch.zeros(len(tokens), dtype=torch.long)
        if mask is None
        else torch.as_tensor(mask).cpu().long().argmax(dim=1)
    )

    def read(index: Sequence[int], fold: int) -> tuple[Batch, Source]:
        batch = make_batch([prompts[i] for i in index], fold, index)
        length = batch.tokens.shape[1]

        def taken(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
            rows = [_shifted(tensor[i], int(start[i]), length, axes) for i in index]
            return torch.stack(rows).to(adapter.device)

        return batch, ([taken(s, (0,)) for s in sites], [taken(p, (1, 2)) for p in patterns])

    with adapter.inference():
        if run.projects:
            chosen = range(len(run.first_tokens(prompts)))
            run.moments.reference = calibrate(run.moments.plan, adapter, *read(chosen, 0))
        for fold in sorted({fold for _, fold in assigned}):
            index = [i for i, (_, f) in enumerate(assigned) if f == fold]
            add_batch(run.moments, adapter, *read(index, fold))
        return _warned(run.finish(logit_lens))


class _Run:
    """One profile from its first prompts to its curves."""

    def __init__(
        self,
        adapter: ModelAdapter,
        bands: Mapping[str, tuple[int, int]],
        noise: float,
        coordinates: Coordinates,
        n_folds: int,
        skip_first: int,
        seed: int,
        control: Control | None = None,
    ) -> None:
        check_noise(noise)
        if coordinates not in ("standardized", "raw"):
            raise ValueError(f"coordinates must be 'standardized' or 'raw', got {coordinates!r}")
        if n_folds < 3:
            raise ValueError(
                f"n_folds must be at least 3 (strengths are chosen on inner folds), got {n_folds}"
            )
        if skip_first < 0:
            raise ValueError(f"skip_first must be 0 or more tokens, got {skip_first}")
        self.adapter, self.bands = adapter, check_bands(bands)
        self.noise, self.coordinates = noise, coordinates
        self.n_folds, self.skip_first, self.seed = n_folds, skip_first, seed
        self.control = control
        self.folds: dict[Hashable, int] = {}
        self.n_seen = 0
        self.last_group: Hashable = None
        self.moments: Moments

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Folds and target features from the first prompts; checks what can be checked early."""
        if not prompts:
            raise ValueError("prompts holds no prompt with a token")
        for index, prompt in enumerate(prompts):
            self._check(prompt, index)
        sizes: dict[Hashable, int] = {}
        for prompt in prompts:
            sizes[prompt.group] = sizes.get(prompt.group, 0) + len(prompt.tokens)
        if len(sizes) < self.n_folds:
            raise ValueError(
                f"prompts need at least as many groups as folds ({self.n_folds}), got "
                f"{len(sizes)}: give more documents, or groups= that tell them apart"
                + (f", or n_folds={len(sizes)}" if len(sizes) >= 3 else "")
            )
        self.folds = balanced_folds(sizes, self.n_folds, self.seed)
        counts = np.zeros(self.adapter.d_vocab, dtype=np.int64)
        for prompt in prompts:
            counts += np.bincount(prompt.tokens, minlength=len(counts))
        plan = plan_moments(
            self.adapter,
            counts,
            bands=self.bands,
            n_folds=self.n_folds,
            skip_first=self.skip_first,
            seed=self.seed,
            max_width=MAX_WIDTH,
            coordinates=self.coordinates,
        )
        self.moments = Moments(plan, self.adapter)
        if len(prompts) < LOOKAHEAD:
            # Nobody should wait for a pass that cannot be enough.
            self._check_enough(*self._most_positions(prompts))
        self.adapter.check_decoding(torch.from_numpy(prompts[0].tokens[:16]))

    @property
    def projects(self) -> bool:
        """Whether residuals are projected, so that their axes need a calibration first."""
        return self.adapter.d_model > self.moments.plan.width

    def first_tokens(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The first prompts to calibrate on: as many as fit one padded batch, at least one."""
        longest = itertools.accumulate((len(prompt.tokens) for prompt in prompts), max)
        padded = (count * length for count, length in enumerate(longest, start=1))
        count = sum(
            1 for _ in itertools.takewhile(lambda size: size <= _CALIBRATION_TOKENS, padded)
        )
        return list(prompts[: max(1, count)])

    def assign(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
        """Each prompt with its fold; groups that the first prompts lacked go by hash."""
        assigned = []
        for prompt in prompts:
            if self.n_seen >= LOOKAHEAD:
                self._check(prompt, self.n_seen)
            fold = self.folds.get(prompt.group)
            if fold is None:
                fold = stable_hash(prompt.group, self.seed) % self.n_folds
                # A group's windows follow one another, so a change of label is a new group.
                self.moments.n_groups += prompt.group != self.last_group
                self.last_group = prompt.group
            self.n_seen += 1
            assigned.append((prompt, fold))
        return assigned

    def finish(self, logit_lens: bool) -> LayerProfile:
        """All curves from the moments."""
        moments = self.moments
        self._check_enough(moments.n_read, int(moments.n_valid.sum()))
        reading = read_targets(moments, self.coordinates)
        relevance = ridge_lens_relevance(moments, self.adapter, self.coordinates)
        raw_lens = logit_lens_relevance(moments, self.adapter) if logit_lens else None
        compression, signals = self._site_curves()
        scales = list(self.bands)
        retained = _by_scale(reading.targets, scales, 0, "retained")
        predicted = _by_scale(reading.targets, scales, len(scales), "predicted")
        notes = _small_sample_warnings(retained, predicted)
        return LayerProfile(
            model_name=self.adapter.name + _CONTROL_WORDS[self.control],
            n_layers=self.adapter.n_layers,
            n_tokens=int(moments.n_valid.sum()),
            n_groups=len(self.folds) + moments.n_groups,
            bands=self.bands,
            compression=compression,
            relevance=_token_curve(relevance, "relevance"),
            retained=retained,
            predicted=predicted,
            added=_by_scale(reading.added, scales, 0, "added"),
            correlations=dict(zip(scales, reading.correlations.swapaxes(0, 1), strict=True)),
            fold_weights=tuple(moments.n_read.astype(float).tolist()),
            signals=signals,
            logit_lens=None if raw_lens is None else _token_curve(raw_lens, "logit_lens"),
            settings={
                "noise": self.noise,
                "coordinates": self.coordinates,
                "n_folds": self.n_folds,
                "skip_first": self.skip_first,
                "seed": self.seed,
                "control": self.control,
                "n_prompts": moments.n_prompts,
                "n_read": int(moments.n_read.sum()),
                "n_features": int(moments.plan.features.shape[1]),
                "width": moments.plan.width,
                "n_decoded": relevance.n_positions,
                "unigram_cross_entropy": relevance.unigram,
                "ridge": [[None if np.isinf(x) else x for x in row] for row in reading.ridge],
                "weights": self.adapter.weight_processing,
                "prompts_fingerprint": f"{moments.fingerprint:016x}",
            },
            versions=package_versions(),
            warnings=tuple(notes),
        )

    def _site_curves(self) -> tuple[Curve, dict[str, Curve]]:
        moments, folds = self.moments, range(self.n_folds)
        value = site_statistics(moments, folds, self.noise, self.coordinates)
        without = [
            site_statistics(moments, [k for k in folds if k != left], self.noise, self.coordinates)
            for left in folds
        ]

        def jackknifed(attribute: str, unit: str, name: str) -> Curve:
            values = getattr(value, attribute)
            left = np.stack([getattr(w, attribute) for w in without])
            low, high = jackknife_interval(values, left)
            pseudo = pseudo_values(values, left)
            return Curve(values, low, high, unit, _GUARANTEES[name], pseudo)

        def averaged(sums: np.ndarray, counts: np.ndarray, unit: str, name: str) -> Curve:
            columns = [
                fold_interval((sums[:, [block]] / counts[:, [block]]), counts[:, block])
                for block in range(sums.shape[1])
            ]
            values, low, high = np.concatenate(columns, axis=1)
            return Curve(values, low, high, unit, _GUARANTEES[name], sums / counts)

        valid = np.repeat(moments.n_valid[:, None], self.adapter.n_layers, axis=1).astype(float)
        attended = moments.n_attended
        if not attended.all():
            raise ValueError(
                f"block {int(np.argmin(attended.min(0)))} attends to nothing but the first token "
                "in at least one fold, so its attention span is undefined"
            )
        signals = {
            "attention_span": averaged(moments.span, attended, "tokens", "attention_span"),
            "attention_entropy": averaged(moments.entropy, attended, "nats", "attention_entropy"),
            "novelty": jackknifed("novelty", "1 - CKA", "novelty"),
            "inter_layer_information": jackknifed("inter_layer", "nats", "inter_layer_information"),
            "update_ratio": averaged(moments.update, valid, "ratio", "update_ratio"),
            "effective_rank": jackknifed("effective_rank", "dimensions", "effective_rank"),
        }
        return jackknifed("compression", "nats", "compression"), signals

    def _check(self, prompt: Prompt, index: int) -> None:
        tokens, adapter = prompt.tokens, self.adapter
        if len(tokens) > adapter.n_ctx:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens, more than the context of "
                f"{adapter.name} ({adapter.n_ctx}): cut it into windows"
            )
        if tokens.min() < 0 or tokens.max() >= adapter.d_vocab:
            raise ValueError(
                f"prompt {index} has a token outside the vocabulary of {adapter.name} "
                f"(0 to {adapter.d_vocab - 1}): {tokens.min()} to {tokens.max()}; was it made "
                "by another tokenizer?"
            )

    def _most_positions(self, prompts: Sequence[Prompt]) -> tuple[Int[np.ndarray, " fold"], int]:
        """Positions per fold that may be read, and valid ones, if every token is ordinary text."""
        reach = [a - 1 + (b - a + 2) // 2 for a, b in self.bands.values()]
        n_read = np.zeros(self.n_folds, dtype=np.int64)
        n_valid = 0
        for prompt in prompts:
            first = max(self.skip_first, max(reach) - 1)
            n_read[self.folds[prompt.group]] += max(0, len(prompt.tokens) - first - max(reach))
            n_valid += max(0, len(prompt.tokens) - self.skip_first)
        return n_read, n_valid

    def _check_enough(self, n_read: Int[np.ndarray, " fold"], n_valid: int) -> None:
        n_features = self.moments.plan.features.shape[1]
        longest = max(b for _, b in self.bands.values())
        if not n_read.sum():
            raise ValueError(
                f"prompts are too short for the bands {self.bands}: no position has half of every "
                f"band before and after it; use prompts of more than {2 * longest} tokens, or "
                "bands= with smaller offsets"
            )
        if n_read.min() < 2 * n_features:
            raise ValueError(
                f"prompts give {int(n_read.min())} positions with every band in one of "
                f"{self.n_folds} folds; at least {2 * n_features} are needed: give more or longer "
                "prompts, fewer folds, or smaller bands"
            )
        width = self.moments.plan.width
        if n_valid < 2 * width:
            raise ValueError(
                f"prompts give {n_valid} valid positions; residuals of width {width} "
                f"need at least {2 * width}: give more or longer prompts"
            )


def _by_scale(reading: Reading, scales: list[str], first: int, name: str) -> dict[str, Curve]:
    return {
        scale: Curve(
            reading.values[first + i],
            reading.low[first + i],
            reading.high[first + i],
            "nats",
            _GUARANTEES[name],
            reading.by_fold[:, first + i],
        )
        for i, scale in enumerate(scales)
    }


def _token_curve(relevance: TokenRelevance, name: str) -> Curve:
    return Curve(
        relevance.values,
        relevance.low,
        relevance.high,
        "nats",
        _GUARANTEES[name],
        relevance.by_fold,
    )


def _small_sample_warnings(
    retained: Mapping[str, Curve], predicted: Mapping[str, Curve]
) -> list[str]:
    notes = []
    for name, curves in (("retained", retained), ("predicted", predicted)):
        for scale, curve in curves.items():
            if (curve.low <= 0).all():
                best = int(np.argmax(curve.values))
                notes.append(
                    f"{name} information at scale {scale!r} cannot be told from 0 at any site "
                    f"(at most {curve.values[best]:.3g} nats, 95% interval "
                    f"{curve.low[best]:.3g} to {curve.high[best]:.3g}, at site {best}); "
                    "if there is any, more groups of text are needed to see it"
                )
    return notes


def _warned(profile: LayerProfile) -> LayerProfile:
    """The profile, its warnings told to whoever called the public function."""
    for note in profile.warnings:
        warnings.warn(note, stacklevel=3)
    return profile


def _shifted(tensor: Tensor, start: int, length: int, axes: tuple[int, ...]) -> Tensor:
    """One prompt's activations from its first real token on, ``length`` long on these axes."""
    for axis in axes:
        tensor = tensor.roll(-start, dims=axis).narrow(axis, 0, length)
    return tensor


def _chunks(stream: Iterator[Prompt]) -> Iterator[list[Prompt]]:
    while chunk := list(itertools.islice(stream, _CHUNK)):
        yield chunk
