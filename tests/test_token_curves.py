"""Curves about single tokens, in tokens: their bound, their null, and a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from profiles import TOKENS, gather
from scipy.special import log_softmax
from tiny import random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens import products
from mspgt_lens.gathering import add_batch, make_batch
from mspgt_lens.information import tokens as readings
from mspgt_lens.information.lens import ridge_lens_relevance
from mspgt_lens.information.readers import read_targets
from mspgt_lens.information.sampled import SampledReadings
from mspgt_lens.information.tilting import TEMPERATURES
from mspgt_lens.information.tokens import LEAST_LEFT, _Prior
from mspgt_lens.information.unigram import unigram_log_probability
from mspgt_lens.models import as_adapter
from mspgt_lens.moments import Moments, plan_moments
from mspgt_lens.prompts import Prompt
from mspgt_lens.targets import DEFAULT_BANDS, batch_targets

SINGLE = {"next": (1, 1), "second": (2, 2), "fifth": (5, 5), "many": (2, 6)}


def repeated(n_prompts: int, n_pos: int) -> torch.Tensor:
    """The same eight tokens over and over: a Gaussian reads hundreds of nats off them."""
    return (torch.arange(n_pos) + torch.arange(n_prompts)[:, None]) % 8 + 4


@pytest.mark.parametrize("bands", [DEFAULT_BANDS, SINGLE], ids=["default", "single"])
@pytest.mark.parametrize("text", [random_tokens, repeated], ids=["steps", "repeated"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "bert"])
def test_no_curve_about_one_token_exceeds_the_unigram_cross_entropy(architecture, text, bands):
    if architecture == "bert" and bands == SINGLE:
        bands = {"next": (1, 1), "many": (2, 12)}
    model = tiny_model(architecture, n_layers=2, seed=1)
    model.tokenizer = tiny_tokenizer()
    prompts = ml.PromptDataset.from_tokens(text(60, 120))
    profile = ml.profile_layers(model, prompts, bands=bands, n_folds=3, seed=2, progress=False)
    most = profile.settings["unigram_cross_entropy"]
    assert profile.settings["unigram_entropy"] <= most
    for scale, (first, last) in bands.items():
        if first == last:
            for curve in (profile.retained[scale], profile.predicted[scale]):
                assert (curve.values <= most).all()
                assert (curve.values > -0.2).all()
    # The current token is all there at site 0 where it is not hidden, but for its position.
    if architecture != "bert":
        assert profile.retained[next(iter(bands))].values[0] > 0.9 * most


@pytest.mark.parametrize("faster", [True, False])
def test_repeated_texts_are_read_nearly_whole_whoever_sums(monkeypatch, faster):
    """Where a few positions lie far from what a reader expects, among tokens that nobody wrote."""
    if not faster:
        monkeypatch.setattr(products, "_FASTER", None)
    model = tiny_model("llama", n_layers=2, seed=1)
    model.tokenizer = tiny_tokenizer()
    prompts = ml.PromptDataset.from_tokens(repeated(60, 120))
    profile = ml.profile_layers(model, prompts, n_folds=3, seed=2, progress=False)
    for curve in (profile.retained["local"], profile.predicted["local"]):
        share = curve.values / np.log(8)
        assert (share[:2] > 0.98).all()
        assert share[2] > 0.85


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_nothing_is_predicted_in_shuffled_text(architecture):
    model = tiny_model(architecture, seed=3)
    prompts = ml.PromptDataset.from_tokens(
        4 + torch.randint(97, (60, 140), generator=torch.Generator().manual_seed(0))
    )
    profile = ml.profile_layers(model, prompts, control="shuffled_tokens", progress=False)
    for curve in profile.predicted.values():
        assert (curve.low <= 0).all()
        assert (curve.high >= 0).all()
        assert (np.abs(curve.values) < 0.05).all()


def test_a_token_s_reading_equals_a_direct_computation():
    """Position by position: ridge regression, Bayes' rule over the whole vocabulary, a ratio."""
    model = tiny_model("llama", n_layers=2, d_model=16)
    adapter, site, n_folds = as_adapter(model), 1, 3
    moments = gather(model, TOKENS)
    sample, phi = moments.sample, moments.plan.features.double().numpy()
    with torch.no_grad():
        relevance = ridge_lens_relevance(moments, adapter, "standardized")
        sampled = SampledReadings(moments, adapter, "standardized", relevance)
        strengths = read_targets(moments, "standardized", sampled).ridge[:, 0]
        reading = sampled.tokens()[0]
        sites: list[torch.Tensor] = []
        adapter.run(
            TOKENS,
            torch.ones_like(TOKENS, dtype=torch.bool),
            lambda _, residual: sites.append(adapter.normalize(residual)),
            lambda *_: None,
        )
    # Positions from the fifth token on; all bands are defined up to the fourth from the end.
    z = sites[site][:, 4:].double().numpy()
    z = (z - z.mean((0, 1))) / z.std((0, 1))
    seen_rows = torch.stack([row[site] for row in sample.rows])
    near = torch.cdist(seen_rows, sites[site][:, 4:].flatten(0, 1)).argmin(dim=1)
    at = [divmod(int(index), z.shape[1]) for index in near]
    fold_of = TOKENS[:, -1].numpy() % n_folds
    x, y = z[:, :-3], phi[TOKENS[:, 4:-3].numpy()]

    def fit(k, strength, *left_out):
        kept = ~np.isin(fold_of, left_out)
        rows, targets = x[kept].reshape(-1, 16), y[kept].reshape(-1, phi.shape[1])
        middle, mean = rows.mean(0), targets.mean(0)
        covariance = (rows - middle).T @ (rows - middle) / len(rows)
        cross = (rows - middle).T @ (targets - mean) / len(rows)
        weights = np.linalg.solve(covariance + strength * np.eye(16), cross)
        return mean, lambda rows: mean + (rows - middle) @ weights

    count = relevance.n_positions
    token = sample.single[:count, 0, 0]
    assert (token == [TOKENS[p, t + 4] for p, t in at[:count]]).all()
    seen_z = np.stack([z[p, t] for p, t in at[:count]])
    gain, surprise = np.zeros(count), np.zeros(count)
    for k in range(n_folds):
        mean, predict = fit(k, strengths[k], k)
        neighbors = [j for j in range(n_folds) if j != k]
        left, null, weight = 0.0, 0.0, 0.0
        inner = []
        for j in neighbors:
            inner_mean, inner_predict = fit(k, strengths[k], k, j)
            rows, targets = x[fold_of == j].reshape(-1, 16), y[fold_of == j].reshape(-1, len(mean))
            off, off_null = targets - inner_predict(rows), targets - inner_mean
            left, null = left + off.T @ off, null + off_null.T @ off_null
            weight += len(rows)
            mine = sample.fold[:count] == j
            inner.append((j, inner_predict(seen_z[mine]) - mean, token[mine]))
        left, null = left / weight, null / weight
        left, null = left + LEAST_LEFT * null, null + LEAST_LEFT * null
        precision = np.linalg.inv(left)
        gained = precision - np.linalg.inv(null)
        about = phi - mean

        def scores(predicted, precision=precision, gained=gained, about=about):
            quadratic = np.einsum("tf,fg,tg->t", about, gained, about)
            return predicted @ precision @ about.T - quadratic / 2

        def inner_gain(temperature, inner=inner, scores=scores, k=k):
            gains = []
            for j, predicted, wanted in inner:
                prior = unigram_log_probability(moments, [k, j])
                told = log_softmax(prior + temperature * scores(predicted), axis=1)
                gains.append(told[np.arange(len(wanted)), wanted] - prior[wanted])
            return np.concatenate(gains).mean()

        temperature = max((0.0, *TEMPERATURES), key=inner_gain)
        mine = sample.fold[:count] == k
        prior = unigram_log_probability(moments, [k])
        told = log_softmax(prior + temperature * scores(predict(seen_z[mine]) - mean), axis=1)
        surprise[mine] = -prior[token[mine]]
        gain[mine] = told[np.arange(mine.sum()), token[mine]] + surprise[mine]
    value = relevance.unigram * gain.sum() / surprise.sum()
    assert value > 0.5
    assert reading.values[site] == pytest.approx(value, abs=2e-3)


def test_some_of_the_tokens_that_nobody_wrote_stand_for_all(monkeypatch):
    monkeypatch.setattr(readings, "UNSEEN", 2)
    moments = gather(tiny_model("llama", n_layers=2, d_model=16), TOKENS)
    prior, whole = _Prior(moments, 0), unigram_log_probability(moments, [0, 1])
    part = prior.without(1).double()
    seen = np.flatnonzero(moments.token_counts[1:].sum(axis=0))
    assert len(part) == len(seen) + 2 < len(whole)
    assert float(part.exp().sum()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(part[prior.place[torch.from_numpy(seen)]], whole[seen], rtol=1e-6)


@pytest.mark.parametrize("skip_first", [0, 4])
def test_single_tokens_and_later_predictions_are_those_of_a_plain_loop(skip_first):
    model = tiny_model("gpt2", n_layers=2)
    model.tokenizer = tiny_tokenizer()
    adapter, tokens = as_adapter(model), random_tokens(6, 30, seed=6)
    tokens[2, 12] = 2  # Not ordinary text.
    found = batch_targets(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        features=torch.randn(101, 4, generator=torch.Generator().manual_seed(0)),
        special=torch.arange(4),
        bands=SINGLE,
        skip_first=skip_first,
    )
    offsets = [0, -1, -4, 1, 2, 5]
    for p, t in np.ndindex(*tokens.shape):
        expected = [
            int(tokens[p, t + k]) if 0 <= t + k < 30 and tokens[p, t + k] >= 4 else -1
            for k in offsets
        ]
        assert found.single[p, t, :, 0].tolist() == expected
    plan = plan_moments(
        adapter,
        np.bincount(tokens.flatten(), minlength=101),
        bands=SINGLE,
        n_folds=3,
        skip_first=skip_first,
        seed=0,
    )
    moments = Moments(plan, adapter)
    with adapter.inference():
        batch = make_batch([Prompt(row.numpy(), 0) for row in tokens], 0, range(6))
        add_batch(moments, adapter, batch)
        _, cache = model.run_with_cache(tokens)
        final = adapter.normalize(cache[adapter.site_hooks[-1]])
    reference, f = moments.reference, plan.features.shape[1]
    later = (final - reference.center[-1]) @ reference.logit_axes
    columns = []
    for a in (2, 5):
        rows = [
            later[p, t + a - 1] if tokens[p, t + a - 1] >= 4 else torch.zeros(f)
            for p, t in torch.nonzero(found.read).tolist()
        ]
        columns.append(torch.stack(rows))
    expected = torch.cat(columns, dim=1).double()
    torch.testing.assert_close(moments.y[0, -2 * f :], expected.sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        moments.yy[0, -2 * f :, -2 * f :], expected.T @ expected, rtol=1e-4, atol=1e-2
    )


def test_leading_logits_are_the_directions_that_move_frequent_logits_most():
    """With as many features as directions nothing is lost; with fewer, what is lost is least."""
    model = tiny_model("llama", n_layers=2, d_model=16, vocab=60)
    tokens = random_tokens(20, 30, vocab=60)
    adapter = as_adapter(model)
    plan = plan_moments(
        adapter,
        np.bincount(tokens.flatten(), minlength=60),
        bands=SINGLE,
        n_folds=3,
        skip_first=0,
        seed=0,
    )
    moments = Moments(plan, adapter)
    with adapter.inference():
        batch = make_batch([Prompt(row.numpy(), 0) for row in tokens], 0, range(20))
        add_batch(moments, adapter, batch)
        _, cache = model.run_with_cache(tokens)
        final = adapter.normalize(cache[adapter.site_hooks[-1]])
        reference = moments.reference
        centered = final.reshape(-1, 16) - reference.center[-1]
        back = centered @ reference.logit_axes @ reference.logit_basis
        logits, kept = adapter.decode(centered), adapter.decode(back)
    assert plan.features.shape[1] == 16
    shift = logits - kept
    shift -= shift.mean(dim=1, keepdim=True)
    assert shift.norm() < 1e-3 * logits.norm()
