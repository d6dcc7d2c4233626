"""Layer profiles: one pass over the prompts, every curve from its moments."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.gathering import Batch, Source, add_batch, calibrate, make_batch
from mspgt_lens.models import as_adapter, cache_reader
from mspgt_lens.moments import Coordinates
from mspgt_lens.padding import real_spans
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.run import Control, ProfileRun
from mspgt_lens.prompts import (
    PromptDataset,
    as_dataset,
)
from mspgt_lens.targets import DEFAULT_BANDS

# Masked keys get exactly nothing; this leaves room for what half precision makes of that.
_ATTENDED = 1e-4


@in_own_state
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
    dataset = as_dataset(prompts, adapter)
    if control == "shuffled_tokens":
        dataset = dataset.shuffled(adapter.special_ids, seed)
    weights = adapter.random_weights(seed) if control == "random_weights" else nullcontext()
    with weights:
        run = ProfileRun(adapter, bands, noise, coordinates, n_folds, skip_first, seed, control)
        run.gather(dataset, batch_size, progress)
        with adapter.inference():
            return _warned(run.finish(logit_lens))


@in_own_state
def profile_cache(
    model: Any,
    cache: Mapping[str, Any],
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
        cache: From ``model.run_with_cache(tokens, names_filter=needed_hooks(model))``, of whole
            prompts; tensors or arrays. Left-padded tokens need ``attention_mask=mask`` there.
        tokens: The tokens that were run.
        mask: True where a token is not padding; padding may be on either side. By default it is
            what the tokenizer pads with, at the ends.
        groups: One label per prompt; by default every prompt is a group of its own.
        bands, noise, coordinates, n_folds, skip_first, logit_lens, seed: As in
            :func:`profile_layers`.

    Returns:
        The profile that :func:`profile_layers` gives for these prompts.

    Raises:
        KeyError: If the cache lacks a needed hook; the message gives the ``names_filter`` to use.
        ValueError: As :func:`profile_layers`, or if shapes of the cache's entries and the tokens
            do not agree, padding cannot be told from text, or padding was attended to.
    """
    adapter = as_adapter(model)
    # An encoder is profiled on masked tokens, which a cache of plain ones does not hold.
    adapter.require_causal("profile_cache (profile_layers does not)")
    sites, patterns = cache_reader(adapter, cache)
    tokens = torch.as_tensor(tokens)
    tokens = (tokens[None] if tokens.ndim == 1 else tokens).cpu()
    if sites[0].shape[:2] != tokens.shape:
        raise ValueError(
            f"tokens must be those that the cache was made from, of shape "
            f"{tuple(sites[0].shape[:2])}, got {tuple(tokens.shape)}"
        )
    run = ProfileRun(adapter, bands, noise, coordinates, n_folds, skip_first, seed)
    if mask is None:
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, span in zip(mask, real_spans(adapter, list(tokens.numpy())), strict=True):
            row[span] = True
    prompts = list(PromptDataset.from_tokens(tokens, mask, groups))
    start = torch.as_tensor(mask).cpu().long().argmax(dim=1)
    _check_padding(patterns, start)
    run.begin(prompts)
    assigned = run.assign(prompts)

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


def _warned(profile: LayerProfile) -> LayerProfile:
    """The profile, its warnings told to whoever called the public function."""
    for note in profile.warnings:
        tell(note)
    return profile


def _check_padding(patterns: Sequence[Tensor], start: Int[Tensor, " prompt"]) -> None:
    """Raise ``ValueError`` if a real token attends to the padding before it."""
    for block, pattern in enumerate(patterns):
        for index in start.nonzero()[:, 0].tolist():
            first = int(start[index])
            share = float(pattern[index, :, first:, :first].float().sum(dim=-1).max())
            if share > _ATTENDED:
                raise ValueError(
                    f"cache: in block {block}, tokens of prompt {index} attend to the {first} "
                    f"positions of padding before it (up to {share:.2g} of a head's attention); "
                    "make the cache with model.run_with_cache(tokens, attention_mask=mask, ...), "
                    "or pad on the right"
                )


def _shifted(tensor: Tensor, start: int, length: int, axes: tuple[int, ...]) -> Tensor:
    """One prompt's activations from its first real token on, ``length`` long on these axes."""
    for axis in axes:
        tensor = tensor.roll(-start, dims=axis).narrow(axis, 0, length)
    return tensor
