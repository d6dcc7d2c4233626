"""The ridge lens against plain ridge regression on cached activations, and its two ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import random_tokens

import mspgt_lens as ml
from mspgt_lens.gathering import add_batch, make_batches
from mspgt_lens.information import lens
from mspgt_lens.information.unigram import unigram_log_probability
from mspgt_lens.models import as_adapter
from mspgt_lens.moments import Moments, plan_moments
from mspgt_lens.processes import ALONE
from mspgt_lens.prompts import PromptDataset

BANDS = {"local": (1, 1), "far": (2, 4)}
N_FOLDS = 4


@pytest.fixture(scope="module")
def gathered(tiny):
    """A tiny model, its prompts with folds, and their moments."""
    adapter = as_adapter(tiny("llama"))
    tokens = random_tokens(24, 40)
    prompts = list(PromptDataset.from_tokens(tokens))
    plan = plan_moments(
        adapter,
        np.bincount(tokens.flatten().numpy(), minlength=adapter.d_vocab),
        bands=BANDS,
        n_folds=N_FOLDS,
        skip_first=4,
        seed=0,
    )
    moments = Moments(plan, adapter)
    with adapter.inference():
        for batch in make_batches([(p, i % N_FOLDS) for i, p in enumerate(prompts)], None, 400):
            add_batch(moments, adapter, batch)
    return adapter, tokens, moments


def _plain_relevance(adapter, tokens, moments, site):
    """Ridge regression on the rows themselves, per fold, decoded at the sampled positions."""
    with torch.no_grad():
        _, cache = adapter.model.run_with_cache(tokens)
    z = adapter.normalize(cache[adapter.site_hooks[site]])[:, 4:].double()
    final = adapter.normalize(cache[adapter.site_hooks[-1]])[:, 4:].double()
    pooled = z.flatten(0, 1)
    z = z / pooled.std(dim=0, correction=0)
    fold = np.arange(len(tokens)) % N_FOLDS
    strengths = lens._choose_strength(moments, "standardized", ALONE)
    sample = moments.sample
    scores = np.zeros(len(sample.next_token))
    for k in range(N_FOLDS):
        rows, targets = z[fold != k].flatten(0, 1), final[fold != k].flatten(0, 1)
        mean, mean_target = rows.mean(0), targets.mean(0)
        centered = rows - mean
        weights = torch.linalg.solve(
            centered.T @ centered / len(rows) + strengths[k] * torch.eye(z.shape[-1]),
            centered.T @ (targets - mean_target) / len(rows),
        )
        mine = sample.fold == k
        asked = torch.stack(sample.rows)[torch.from_numpy(mine), site].double() / pooled.std(
            0, correction=0
        )
        logits = adapter.decode((mean_target + (asked - mean) @ weights).float())
        scores[mine] = (
            logits.log_softmax(-1)[torch.arange(mine.sum()), sample.next_token[mine]]
            .detach()
            .numpy()
        )
    return scores


@pytest.mark.parametrize("site", [0, 2])
def test_ridge_lens_equals_ridge_regression_on_the_rows(gathered, site):
    adapter, tokens, moments = gathered
    with torch.no_grad():
        relevance = lens.ridge_lens_relevance(moments, adapter, "standardized")
        expected = _plain_relevance(adapter, tokens, moments, site)[: relevance.n_positions]
    gain = expected.mean() + relevance.unigram
    assert relevance.values[site] == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize("which", ["ridge", "logit"])
def test_both_lenses_end_at_the_model_itself(gathered, which):
    adapter, tokens, moments = gathered
    with torch.no_grad():
        if which == "ridge":
            relevance = lens.ridge_lens_relevance(moments, adapter, "standardized")
        else:
            relevance = lens.logit_lens_relevance(moments, adapter)
        logits = adapter.model(tokens).log_softmax(-1)
    # The sample holds positions by content, so find each one's own log-probability by its rows.
    final = adapter.normalize(_last_site(adapter, tokens))
    sample = moments.sample
    scores = []
    for row, token in zip(sample.rows, sample.next_token, strict=True):
        prompt, position = np.unravel_index(
            int((final - row[-1]).abs().sum(-1).argmin()), final.shape[:2]
        )
        scores.append(float(logits[prompt, position, token]))
    gain = np.mean(scores[: relevance.n_positions]) + relevance.unigram
    assert relevance.values[-1] == pytest.approx(gain, abs=1e-4)


def _last_site(adapter, tokens):
    with torch.no_grad():
        _, cache = adapter.model.run_with_cache(tokens)
    return cache[adapter.site_hooks[-1]]


def test_sampled_positions_do_not_depend_on_the_batches(tiny):
    tokens = random_tokens(24, 40)
    prompts = PromptDataset.from_tokens(tokens)
    settings = {"bands": BANDS, "n_folds": N_FOLDS, "progress": False}
    one = ml.profile_layers(tiny("gpt2"), prompts, batch_size=1, **settings)
    many = ml.profile_layers(tiny("gpt2"), prompts, batch_size=24, **settings)
    np.testing.assert_allclose(one.relevance.values, many.relevance.values, atol=1e-4)


def test_unigram_model_is_a_distribution_fitted_without_its_fold(gathered):
    _, _, moments = gathered
    before = unigram_log_probability(moments, [0])
    assert np.exp(before).sum() == pytest.approx(1.0)
    counts = moments.token_counts.copy()
    try:
        moments.token_counts[0] = counts[0][::-1]
        np.testing.assert_array_equal(unigram_log_probability(moments, [0]), before)
    finally:
        moments.token_counts[:] = counts


def test_logit_lens_is_there_only_when_asked_for(tiny):
    prompts = PromptDataset.from_tokens(random_tokens(24, 40))
    settings = {"bands": BANDS, "n_folds": N_FOLDS, "progress": False}
    assert ml.profile_layers(tiny("llama"), prompts, **settings).logit_lens is None
    asked = ml.profile_layers(tiny("llama"), prompts, logit_lens=True, **settings)
    assert asked.logit_lens is not None
    assert asked.logit_lens.values[-1] == pytest.approx(asked.relevance.values[-1], abs=1e-5)
