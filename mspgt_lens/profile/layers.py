"""Layer profiles: one pass over the prompts, every curve from its moments."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.models import ModelAdapter, as_adapter, cache_reader
from mspgt_lens.moments import Coordinates
from mspgt_lens.padding import real_spans
from mspgt_lens.processes import joined
from mspgt_lens.profile.intake import Intake
from mspgt_lens.profile.passing import pass_over
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.profile.settings import Control, ProfileSettings
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset
from mspgt_lens.signals import Signal, choose_signals
from mspgt_lens.targets import DEFAULT_BANDS


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
    signals: Sequence[str | Signal] | None = None,
    control: Control | None = None,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
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
        batch_size: Prompts per forward pass; by default as many as fill a fixed number of tokens,
            and fewer from where memory runs out on.
        logit_lens: Also decode the raw logit lens; about as much work again as relevance.
        signals: Names of the signals of blocks to gather, and ``extending.Signal`` objects of your
            own; by default all of the package's. Attention patterns are gathered only where one of
            them is of attention.
        control: A null to compare with. ``"random_weights"`` draws all weights anew for the time of
            the profile, as large as trained ones of the same kind but the same in every block;
            ``"shuffled_tokens"`` puts each prompt's tokens in random order.
        seed: Decides the folds, the sampled positions, the projection of wide residuals, and what
            a control draws.
        progress: Show a progress bar with tokens per second; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same profile, that of one process;
            what stops one stops all.
        checkpoint: A folder where sums are kept every few minutes. A run that was stopped, started
            again with the same model, prompts and arguments, goes on from there, and its result is
            the same to the bit on the same machine. Delete it once you have the result.

    Returns:
        The profile. Information is in nats per token.

    Raises:
        ValueError: If there are no prompts, fewer groups than folds, too few positions, prompts
            longer than the context, or tokens outside the vocabulary; if processes were given
            different arguments, or ``checkpoint`` holds another run.
        FloatingPointError: If an activation is NaN or infinite.
        OSError: If ``checkpoint`` cannot be written.
        RuntimeError: If another process of the group failed; says which one, and why. Or torch's
            own (``torch.OutOfMemoryError``), if not even one prompt fits into memory.
        TypeError: If the model is none of TransformerLens's, or lacks a hook; or signals are no
            sequence of names and ``Signal`` objects.

    Example:
        >>> profile = ml.profile_layers(model, prompts)
        >>> profile.relevance.values.shape  # nats per token at every site
        (9,)
        >>> sorted(profile.predicted)
        ['global', 'intermediate', 'local']
    """
    with joined(process_group) as processes:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        settings = ProfileSettings(
            bands, noise, coordinates, n_folds, skip_first, seed, control, choose_signals(signals)
        )
        adapter = as_adapter(model)
        dataset = as_dataset(prompts, adapter)
        if control == "shuffled_tokens":
            dataset = dataset.shuffled(adapter.special_ids, seed=seed)
        weights = adapter.random_weights(seed) if control == "random_weights" else nullcontext()
        with weights:
            run = ProfileRun(adapter, settings)
            pass_over(run, dataset, batch_size, progress, processes, checkpoint)
            with adapter.inference():
                return _warned(run.finish(logit_lens, processes=processes))


@in_own_state
def profile_cache(
    model: Any,
    cache: Mapping[str, Any] | Iterable[tuple[Mapping[str, Any], Tensor]],
    tokens: Int[Tensor, "prompt pos"] | None = None,
    *,
    prompts: PromptDataset | None = None,
    mask: Bool[Tensor, "prompt pos"] | None = None,
    groups: Sequence[Hashable] | None = None,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    noise: float = 0.1,
    coordinates: Coordinates = "standardized",
    n_folds: int = 5,
    skip_first: int = 4,
    logit_lens: bool = False,
    signals: Sequence[str | Signal] | None = None,
    seed: int = 0,
) -> LayerProfile:
    """The same curves from an ``ActivationCache`` that is already there, or from many.

    Args:
        model: The model that made the cache.
        cache: From ``model.run_with_cache(tokens, names_filter=needed_hooks(model))``, of whole
            prompts; tensors or arrays. Left-padded tokens need ``attention_mask=mask`` there. Or
            pairs of a cache and its tokens, which are read one after the other and dropped, so
            that a generator of them needs the memory of one.
        tokens: The tokens that were run; with pairs, None.
        prompts: With pairs: all their prompts, in any order, which decide the folds and what is
            read for. None takes them from the pairs' tokens, which must then be a list.
        mask: True where a token is not padding; padding may be on either side. By default it is
            what the tokenizer pads with, at the ends.
        groups: One label per prompt; by default every prompt is a group of its own. With
            ``prompts``, these bring their groups.
        bands, noise, coordinates, n_folds, skip_first, logit_lens, signals, seed: As in
            :func:`profile_layers`. Without signals of attention, the cache needs no patterns
            (``needed_hooks(model, patterns=False)``), and attention to padding is not noticed; with
            signals of updates it needs these (``needed_hooks(model, updates=True)``).

    Returns:
        The profile that :func:`profile_layers` gives for these prompts.

    Raises:
        KeyError: If the cache lacks a needed hook; the message gives the ``names_filter`` to use.
        ValueError: As :func:`profile_layers`, or if shapes of the cache's entries and the tokens
            do not agree, padding cannot be told from text, or padding was attended to.
        TypeError: If neither ``tokens`` nor pairs say what was run, or both do.

    Example:
        >>> tokens = torch.tensor([prompt.tokens.tolist() for prompt in prompts])
        >>> _, cache = model.run_with_cache(tokens, names_filter=ml.needed_hooks(model))
        >>> ml.profile_cache(model, cache, tokens)
        LayerProfile of ...
        ...
    """
    adapter = as_adapter(model)
    # An encoder is profiled on masked tokens, which a cache of plain ones does not hold.
    adapter.require_causal("profile_cache (profile_layers does not)")
    chosen = choose_signals(signals)
    settings = ProfileSettings(bands, noise, coordinates, n_folds, skip_first, seed, signals=chosen)
    run = ProfileRun(adapter, settings)
    if hasattr(cache, "keys"):
        if tokens is None:
            raise TypeError("tokens must be those that the cache was made from, got None")
        if prompts is not None:
            raise TypeError("prompts goes with pairs of caches and tokens; here tokens say it all")
        rows = _token_rows(tokens)
        real = _real(adapter, rows) if mask is None else torch.as_tensor(mask).cpu().bool()
        promised = list(PromptDataset.from_tokens(rows, real, groups))
        pairs: Iterable[tuple[Any, Tensor, Tensor | None]] = [(cache, rows, real)]
    else:
        promised = _promised(adapter, cache, tokens, prompts, mask, groups)
        pairs = ((entries, _token_rows(ids), None) for entries, ids in cache)
    with adapter.inference():
        intake = Intake(run, promised)
        intake.calibrate(promised)
        for entries, ids, real_tokens in pairs:
            sites, patterns, updates = cache_reader(
                adapter, entries, patterns=intake.needs_patterns, updates=intake.needs_updates
            )
            if sites[0].shape[:2] != ids.shape:
                raise ValueError(
                    f"tokens must be those that the cache was made from, of shape "
                    f"{tuple(sites[0].shape[:2])}, got {tuple(ids.shape)}"
                )
            intake.begin(ids, real_tokens)
            for site, residual in enumerate(sites):
                intake.on_site(site, residual.to(adapter.device))
                if site < len(patterns):
                    intake.on_pattern(site, patterns[site].to(adapter.device))
                for part, update in updates[site].items() if site < len(updates) else ():
                    intake.on_part(site, part, update.to(adapter.device))
            intake.end()
        return _warned(run.finish(logit_lens, intake.notes()))


def _warned(profile: LayerProfile) -> LayerProfile:
    """The profile, its warnings told to whoever called the public function."""
    for note in profile.warnings:
        tell(note)
    return profile


def _token_rows(tokens: Any) -> Int[Tensor, "prompt pos"]:
    rows = torch.as_tensor(tokens)
    return (rows[None] if rows.ndim == 1 else rows).cpu()


def _real(adapter: ModelAdapter, rows: Int[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt pos"]:
    """True where a token is not what the tokenizer pads with, at the ends."""
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for row, span in zip(mask, real_spans(adapter, list(rows.numpy())), strict=True):
        row[span] = True
    return mask


def _promised(
    adapter: ModelAdapter,
    pairs: Any,
    tokens: Any,
    prompts: PromptDataset | None,
    mask: Any,
    groups: Sequence[Hashable] | None,
) -> list[Prompt]:
    """All prompts of pairs of a cache and its tokens."""
    if tokens is not None or mask is not None:
        raise TypeError(
            "tokens and mask go with one cache; pairs bring their tokens, and prompts= tells "
            "padding apart"
        )
    if prompts is not None:
        if groups is not None:
            raise TypeError("groups must be None where prompts are given: they bring their groups")
        return list(as_dataset(prompts, adapter))
    if isinstance(pairs, Iterator):
        raise TypeError(
            "prompts must be given with an iterator of caches: all its prompts decide the folds "
            "before the first cache is read (or give a list of pairs)"
        )
    own = []
    for _, ids in pairs:
        rows = _token_rows(ids)
        own += [r[real].tolist() for r, real in zip(rows, _real(adapter, rows), strict=True)]
    return list(PromptDataset.from_tokens(own, None, groups))
