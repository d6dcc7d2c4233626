"""Fitting a ridge lens: one pass over the prompts, then closed form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mspgt_lens.ambient import in_own_state, tell
from mspgt_lens.estimates import Curve
from mspgt_lens.gathering import HIDDEN_SHARE
from mspgt_lens.information.lens import fit_lens_maps, lens_relevance, mean_over_sample, score_lens
from mspgt_lens.lens.ridge_lens import RidgeLens
from mspgt_lens.models import as_adapter, weight_digest
from mspgt_lens.moments import Coordinates, Moments
from mspgt_lens.profile.curves import guarantee, token_curve
from mspgt_lens.profile.passing import pass_over
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.profile.settings import ProfileSettings
from mspgt_lens.prompts import PromptDataset, as_dataset
from mspgt_lens.storage import package_versions

_CROSS_ENTROPY = (
    "Held-out cross-entropy of what the ridge lens predicts from each site; at the last site the "
    "model's own."
)
_KL = (
    "Held-out Kullback-Leibler divergence KL(model || lens) of the ridge lens's predictions from "
    "the model's own; 0 at the last site."
)


@in_own_state
def fit_lens(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    *,
    coordinates: Coordinates = "standardized",
    n_folds: int = 5,
    skip_first: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RidgeLens:
    """Fit a lens that decodes every site's residual stream, without training.

    One pass over the prompts gathers second moments; memory does not grow with their number. The
    lens itself is fitted on all groups of prompts. What it is worth is measured at sampled
    positions, each by a lens of the other folds of groups. The relevance of
    :func:`~mspgt_lens.profile_layers` is the same lens's.

    Args:
        model: A ``HookedTransformer``, a ``TransformerBridge`` or an encoder (BERT, RoBERTa), which
            is fitted and read where tokens are hidden from it.
        prompts: A :class:`~mspgt_lens.PromptDataset`, or texts.
        coordinates: ``"standardized"`` penalizes every residual coordinate in units of its own
            variance, ``"raw"`` all in one unit.
        n_folds: Folds of groups for cross-fitting, at least 3.
        skip_first: Tokens at the beginning of each prompt that are left out: attention sinks and
            massive activations sit there.
        batch_size: Prompts per forward pass; by default as many as fill a fixed number of tokens.
        seed: Decides the folds, the sampled positions, and the projection of wide residuals.
        progress: Show a progress bar with tokens per second.

    Returns:
        The lens, with the model attached: ``lens.logits(site, residual)`` decodes, ``lens.read``
        reads a text, and its curves give the held-out cross-entropy and the divergence from the
        model's own predictions, in nats per token.

    Raises:
        ValueError: If there are no prompts, fewer groups than folds, too few positions, prompts
            longer than the context, or tokens outside the vocabulary.
        FloatingPointError: If an activation is NaN or infinite.
        TypeError: If the model is none of TransformerLens's, or lacks a hook.

    Example:
        >>> lens = ml.fit_lens(model, prompts, progress=False)
        >>> lens.kl.values.shape  # nats per token at every site
        (9,)
        >>> lens = ml.results.RidgeLens.load(lens.save("lens")).attach(model)
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
    adapter = as_adapter(model)
    # Nothing is read of the bands: the shortest asks the least of the prompts. No signal is either,
    # so that no attention pattern is looked at.
    settings = ProfileSettings(
        bands={"next": (1, 1)},
        noise=0.1,
        coordinates=coordinates,
        n_folds=n_folds,
        skip_first=skip_first,
        seed=seed,
        signals=(),
    )
    run = ProfileRun(adapter, settings)
    pass_over(run, as_dataset(prompts, adapter), batch_size, progress)
    run.require_enough()
    moments = run.moments.on_cpu()
    with adapter.inference():
        maps, strength = fit_lens_maps(moments, coordinates)
        scores = score_lens(moments, adapter, coordinates)
        relevance = lens_relevance(moments, scores.log_likelihood)
    gain = token_curve(relevance, guarantee("relevance", moments.plan.masked))
    lens = RidgeLens(
        model_name=adapter.name,
        n_tokens=int((moments.n_read if moments.plan.masked else moments.n_valid).sum()),
        n_groups=run.n_groups,
        n_decoded=len(scores.kl),
        cross_entropy=_curve(moments, -scores.log_likelihood, _CROSS_ENTROPY),
        kl=_curve(moments, scores.kl, _KL),
        relevance=gain,
        unigram=relevance.unigram,
        strength=strength,
        **vars(maps.to(torch.device("cpu"))),
        weights_digest=weight_digest(adapter),
        settings={
            "coordinates": coordinates,
            "n_folds": n_folds,
            "skip_first": skip_first,
            "seed": seed,
            "n_prompts": moments.n_prompts,
            "weights": adapter.weight_processing,
            "prompts_fingerprint": f"{moments.fingerprint:016x}",
            **({"hidden_share": HIDDEN_SHARE} if moments.plan.masked else {}),
        },
        versions=package_versions(),
        warnings=_warnings(gain),
    )
    for note in lens.warnings:
        tell(note)
    return lens.attach(adapter)


def _curve(moments: Moments, scores: Float[np.ndarray, "position site"], guarantee: str) -> Curve:
    values, low, high, by_fold = mean_over_sample(moments, scores)
    return Curve(values, low, high, "nats", guarantee, by_fold)


def _warnings(relevance: Curve) -> tuple[str, ...]:
    """What the sample is too small to show; the last site is the model's own."""
    if (relevance.low[:-1] > 0).any():
        return ()
    best = int(relevance.values[:-1].argmax())
    return (
        "relevance is not seen to be above 0 at any site before the last (at most "
        f"{relevance.values[best]:.3g} nats, 95% interval {relevance.low[best]:.3g} to "
        f"{relevance.high[best]:.3g}, at site {best}); if the model predicts anything there, more "
        "groups of text are needed to see it",
    )
