"""Profiles equal direct computations, in plain and in projected coordinates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from profiles import (
    QUICK,
    RAGGED,
    TOKENS,
    assert_same,
    cache_of,
    gather,
    pad,
    prompts_of,
    run,
)
from tiny import random_tokens, tiny_model
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.profile import run as profile_module


@dataclasses.dataclass(frozen=True)
class Slow:
    """Everything that is measured, position by position in float64, from unpadded single runs."""

    residuals: np.ndarray  # [site, position, d_model]
    sites: np.ndarray  # The same, normalized.
    patterns: list[list[np.ndarray]]  # Per block, per valid query of every prompt: [head, key]
    log_likelihood: np.ndarray  # Of the next token where it is ordinary, [position]


def slow(model: Any, prompts: list[list[int]], skip_first: int = 4) -> Slow:
    adapter = as_adapter(model)
    n_layers = adapter.n_layers
    residuals: list[list[np.ndarray]] = [[] for _ in range(n_layers + 1)]
    patterns: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
    log_likelihood = []
    for prompt in prompts:
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([prompt]))
        log_probability = logits[0].double().log_softmax(dim=-1).numpy()
        for t, token in enumerate(prompt):
            if t < skip_first or token in adapter.special_ids:
                continue
            for block in range(n_layers):
                residuals[block].append(cache["resid_pre", block][0, t].double().numpy())
                patterns[block].append(cache["pattern", block][0, :, t].double().numpy())
            residuals[n_layers].append(cache["resid_post", n_layers - 1][0, t].double().numpy())
            if t + 1 < len(prompt) and prompt[t + 1] not in adapter.special_ids:
                log_likelihood.append(log_probability[t, prompt[t + 1]])
    raw = np.array(residuals)
    centered = raw - raw.mean(axis=2, keepdims=True) if adapter.norm_kind == "layer" else raw
    power = (centered**2).mean(axis=2, keepdims=True)
    normalized = centered / np.sqrt(power + adapter.cfg.eps)
    return Slow(raw, normalized, patterns, np.array(log_likelihood))


def in_coordinates(sites: np.ndarray, coordinates: str) -> np.ndarray:
    centered = sites - sites.mean(axis=1, keepdims=True)
    return centered if coordinates == "raw" else centered / centered.std(axis=1, keepdims=True)


def rate(z: np.ndarray, noise: float) -> float:
    return float(np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / len(z) / noise)[1] / 2)


def with_specials() -> list[list[int]]:
    """Prompts with BOS, and with end-of-text, unknown and padding tokens inside."""
    prompts = [[1, *row] for row in RAGGED[:12]]
    prompts[0][9], prompts[3][12], prompts[3][13], prompts[8][11] = 2, 3, 0, 2
    return prompts


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"coordinates": "raw", "noise": 0.02},
        {"skip_first": 0, "noise": 1.0},
    ],
    ids=["defaults", "raw", "first tokens too"],
)
def test_curves_equal_a_direct_computation(
    told: dict[str, Any], architecture: str, choice: dict[str, Any]
) -> None:
    model, prompts = told[architecture], with_specials()
    measured = run(model, prompts_of(prompts), **choice)
    direct = slow(model, prompts, choice.get("skip_first", 4))
    noise, coordinates = choice.get("noise", 0.1), choice.get("coordinates", "standardized")
    z = in_coordinates(direct.sites, coordinates)
    assert measured.n_tokens == z.shape[1]

    rates = [rate(site, noise) for site in z]
    np.testing.assert_allclose(measured.compression.values, rates, rtol=1e-6)

    signals = {name: curve.values for name, curve in measured.signals.items()}
    joint = [rate(np.hstack(pair), noise) for pair in itertools.pairwise(z)]
    shared = np.array(rates[:-1]) + rates[1:] - joint
    np.testing.assert_allclose(signals["inter_layer_information"], shared, rtol=1e-4)

    # CKA from the Gram matrices of positions, Kornblith et al. 2019, equation 4.
    grams = [site @ site.T for site in z]
    cka = [
        (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for a, b in itertools.pairwise(grams)
    ]
    np.testing.assert_allclose(signals["novelty"], 1 - np.array(cka), rtol=1e-5, atol=1e-6)

    powers = [np.linalg.svd(site, compute_uv=False) ** 2 for site in z[1:]]
    participation = [power.sum() ** 2 / (power**2).sum() for power in powers]
    np.testing.assert_allclose(signals["effective_rank"], participation, rtol=1e-5)

    steps = np.linalg.norm(np.diff(direct.residuals, axis=0), axis=2)
    ratios = steps / np.linalg.norm(direct.residuals[:-1], axis=2)
    np.testing.assert_allclose(signals["update_ratio"], ratios.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("skip_first", [0, 4])
def test_attention_signals_equal_a_direct_computation(
    told: dict[str, Any], architecture: str, skip_first: int
) -> None:
    """Query by query and head by head, the first key of the prompt left out."""
    model, prompts = told[architecture], with_specials()
    measured = run(model, prompts_of(prompts), skip_first=skip_first)
    special = as_adapter(model).special_ids
    queries = [
        t for p in prompts for t, token in enumerate(p) if t >= skip_first and token not in special
    ]
    for block, rows in enumerate(slow(model, prompts, skip_first).patterns):
        spans, entropies = [], []
        for query, row in zip(queries, rows, strict=True):
            for head in row:
                shares = [float(x) for x in head[1:]]
                total = sum(shares)
                if total == 0:
                    continue
                shares = [share / total for share in shares]
                spans.append(sum(p * (query - key) for key, p in enumerate(shares, start=1)))
                entropies.append(-sum(p * np.log(p) for p in shares if p > 0))
        assert measured.signals["attention_span"].values[block] == pytest.approx(
            np.mean(spans), rel=1e-5
        )
        assert measured.signals["attention_entropy"].values[block] == pytest.approx(
            np.mean(entropies), rel=1e-5
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_relevance_at_the_last_site_is_the_models_own_gain(
    told: dict[str, Any], architecture: str
) -> None:
    model, prompts = told[architecture], with_specials()
    measured = run(model, prompts_of(prompts), logit_lens=True)
    log_likelihood = slow(model, prompts).log_likelihood
    # So few positions that all are decoded.
    assert measured.settings["n_decoded"] == len(log_likelihood)
    gain = measured.settings["unigram_cross_entropy"] + log_likelihood.mean()
    assert measured.relevance.values[-1] == pytest.approx(gain, abs=1e-4)
    assert measured.logit_lens is not None
    assert measured.logit_lens.values[-1] == pytest.approx(gain, abs=1e-4)


def test_the_position_of_a_token_is_told_by_its_prompt_not_by_its_batch(model: Any) -> None:
    """Prompts of one length and prompts padded to it have the same valid positions."""
    short, long = TOKENS[:12, :16].tolist(), random_tokens(12, 24, seed=5).tolist()
    together = run(model, prompts_of(short + long))
    assert together.n_tokens == 12 * 12 + 12 * 20
    direct = slow(model, short + long)
    rates = [rate(site, 0.1) for site in in_coordinates(direct.sites, "standardized")]
    np.testing.assert_allclose(together.compression.values, rates, rtol=1e-6)


def test_a_large_mean_costs_no_digits(model: Any) -> None:
    """A constant 10,000 times the deviation in every coordinate, as the normalized rows see it."""
    cache = dict(cache_of(model, TOKENS).items())
    name = ml.needed_hooks(model)[1]
    residual = cache[name] = cache[name] / cache[name].std() + 1e4
    measured = ml.profile_cache(model, cache, TOKENS, **QUICK)
    # The twin begins where the package does, with float32 rows; only the summing is compared.
    rows = as_adapter(model).normalize(residual[:, 4:]).flatten(0, 1).double().numpy()
    assert np.abs(rows.mean(axis=0) / rows.std(axis=0)).min() > 5e3
    expected = rate(in_coordinates(rows[None], "standardized")[0], 0.1)
    assert measured.compression.values[1] == pytest.approx(expected, rel=1e-4)


def test_wide_residuals_are_projected_on_orthonormal_axes(model: Any) -> None:
    first = gather(model, TOKENS, max_width=8)
    assert first.reference is not None
    axes = first.reference.axes
    assert axes is not None
    assert axes.shape == (16, 8)
    torch.testing.assert_close(axes.T @ axes, torch.eye(8), atol=1e-5, rtol=0)
    assert first.zz_read.shape[-2:] == (8, 8)
    again = gather(model, TOKENS, max_width=8)
    assert again.reference is not None
    assert torch.equal(again.reference.axes, axes)
    other = gather(model, TOKENS, max_width=8, seed=1)
    assert other.reference is not None
    assert not torch.allclose(other.reference.axes, axes)


def test_projected_moments_equal_a_direct_computation(model: Any) -> None:
    first = gather(model, TOKENS, max_width=8)
    reference = first.reference
    assert reference is not None
    assert reference.axes is not None
    assert reference.spread is not None
    center, spread = reference.center.double().numpy(), reference.spread.double().numpy()
    sites = (slow(model, TOKENS.tolist()).sites - center[:, None]) / spread[:, None]
    z = sites @ reference.axes.double().numpy()
    sums_of_z = (first.z_read + first.z_rest).sum(dim=0).numpy()
    np.testing.assert_allclose(sums_of_z, z.sum(axis=1), rtol=1e-4, atol=1e-3)
    squares = (first.zz_read + first.zz_rest).sum(dim=0).numpy()
    np.testing.assert_allclose(squares, z.transpose(0, 2, 1) @ z, rtol=1e-4, atol=1e-3)
    across = first.z_next.sum(dim=0).numpy()
    np.testing.assert_allclose(across, z[:-1].transpose(0, 2, 1) @ z[1:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "coordinates"), [("llama", "standardized"), ("gpt2", "raw")]
)
def test_a_wide_model_is_profiled(
    tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    coordinates: str,
) -> None:
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 16)
    model = tiny(architecture, n_layers=2, d_model=32)
    prompts = prompts_of(random_tokens(48, 24))
    wide = run(model, prompts, coordinates=coordinates, logit_lens=True)
    assert wide.settings["width"] == 16
    for quantity, _, curve in wide.curves():
        assert np.isfinite([curve.values, curve.low, curve.high]).all(), quantity
    assert (wide.signals["effective_rank"].values < 16).all()
    monkeypatch.undo()
    full = run(model, prompts, coordinates=coordinates, logit_lens=True)
    assert full.settings["width"] == 32
    # These need no projection.
    for name in ("attention_span", "attention_entropy", "update_ratio"):
        np.testing.assert_allclose(wide.signals[name].values, full.signals[name].values)
    assert wide.relevance.values[-1] == pytest.approx(full.relevance.values[-1], abs=1e-5)
    assert wide.logit_lens is not None
    assert full.logit_lens is not None
    np.testing.assert_allclose(wide.logit_lens.values, full.logit_lens.values, atol=1e-5)


@pytest.mark.parametrize("coordinates", ["standardized", "raw"])
def test_a_wide_cache_gives_the_same_profile(
    model: Any, monkeypatch: pytest.MonkeyPatch, coordinates: str
) -> None:
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 8)
    tokens, mask = pad(RAGGED, "left")
    choice = {**QUICK, "coordinates": coordinates}
    cached = ml.profile_cache(model, cache_of(model, tokens, mask), tokens, mask=mask, **choice)
    direct = run(model, prompts_of(RAGGED), coordinates=coordinates)
    assert_same(cached, direct, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("max_width", [8, 16], ids=["wide", "whole"])
def test_no_forward_pass_holds_more_than_a_batch_of_tokens(
    model: Any, monkeypatch: pytest.MonkeyPatch, max_width: int
) -> None:
    """Padding counts: a long prompt after many short ones must not make a huge batch."""
    monkeypatch.setattr(profile_module, "MAX_WIDTH", max_width)
    sizes: list[int] = []
    run_model = ModelAdapter.run

    def counting(self: ModelAdapter, tokens: Tensor, *args: Any) -> None:
        sizes.append(tokens.numel())
        run_model(self, tokens, *args)

    monkeypatch.setattr(ModelAdapter, "run", counting)
    prompts = [*random_tokens(120, 6).tolist(), *random_tokens(8, 120).tolist()]
    run(model, prompts_of(prompts))
    assert sum(sizes) >= 120 * 6 + 8 * 120
    assert max(sizes) <= 2048


def test_standardized_wide_residuals_have_unit_variances(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Hadamard's inequality the rate is at most that of independent coordinates."""
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 16)
    prompts = prompts_of(random_tokens(48, 24))
    wide = run(tiny("llama", n_layers=2, d_model=32), prompts)
    assert (wide.compression.values < 16 * np.log1p(1 / 0.1) / 2).all()


def test_raw_coordinates_stay_raw_in_wide_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """One massive coordinate owns the raw spectrum, projected or not; standardized, it does not."""
    model = tiny_model("llama", n_layers=2, d_model=32)
    with torch.no_grad():
        model.W_E[:, 5] *= 100.0
    prompts = prompts_of(random_tokens(48, 24))
    full = run(model, prompts, coordinates="raw")
    standardized = run(model, prompts)
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 16)
    wide = run(model, prompts, coordinates="raw")
    assert full.signals["effective_rank"].values[0] < 2
    assert standardized.signals["effective_rank"].values[0] > 4
    # Eigenvalues of a projection interlace: it can only lose.
    assert (wide.compression.values <= full.compression.values).all()
    assert wide.signals["effective_rank"].values[0] < 2


def test_a_target_that_is_read_without_error_does_not_stop_the_profile(
    tiny: Callable[..., Any],
) -> None:
    """At site 0 the token's own features are nearly linear in the residual: nothing is left."""
    run(tiny("llama", n_layers=2, d_model=32), prompts_of(random_tokens(18, 24)))


def test_folds_of_every_curve_average_to_it(tiny):
    """Means over folds are the values; pseudo-values are what the jackknife corrects to."""
    prompts = ml.PromptDataset.from_tokens(random_tokens(40, 140))
    profile = ml.profile_layers(tiny("llama"), prompts, progress=False)
    for quantity, _, curve in profile.curves():
        assert curve.by_fold.shape == (5, len(curve))
        if quantity in ("retained", "predicted", "attention_span", "update_ratio"):
            # Folds differ a little in size.
            assert np.allclose(curve.by_fold.mean(axis=0), curve.values, rtol=0.05, atol=0.02)
    bits = profile.compression.to("bits")
    assert np.allclose(bits.by_fold * np.log(2), profile.compression.by_fold)


@pytest.mark.parametrize("control", ["random_weights", "shuffled_tokens"])
def test_controls_leave_the_model_as_it_was(control):
    model = tiny_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    prompts = ml.PromptDataset.from_tokens(random_tokens(40, 140))
    plain = ml.profile_layers(model, prompts, progress=False)
    found, again = (
        ml.profile_layers(model, prompts, control=control, progress=False) for _ in range(2)
    )
    assert found == again
    assert found.predicted["local"] != plain.predicted["local"]
    assert control.replace("_", " ") in found.model_name
    assert found.settings["control"] == control
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_random_weights_are_put_back_after_an_error():
    model = tiny_model("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    bad = ml.PromptDataset.from_tokens(random_tokens(4, 20))
    with pytest.raises(ValueError, match="at least as many groups"):
        ml.profile_layers(model, bad, control="random_weights", progress=False)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="control must be None or one of"):
        ml.profile_layers(model, bad, control="random", progress=False)


def test_shuffled_tokens_say_nothing_of_their_neighbors(tiny):
    """Tokens that follow one another closely are foreseen; in random order they are not."""
    model = tiny("llama")
    prompts = ml.PromptDataset.from_tokens(random_tokens(60, 140, seed=3))
    plain = ml.profile_layers(model, prompts, progress=False)
    shuffled = ml.profile_layers(model, prompts, control="shuffled_tokens", progress=False)
    assert plain.predicted["local"].values[0] > 0.1
    assert abs(shuffled.predicted["local"].values[0]) < 0.02
