"""Signals of other theories equal their definitions, computed plainly from cached activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_recording import LENGTHS, QUICK, TOKENS, assert_same, padded, prompts  # noqa: F401
from tiny import tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.extending import RIVAL_SIGNALS
from mspgt_lens.information.dimension import two_nearest_dimension

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be told from 0:UserWarning")
SKIPPED = 4


# Parallel attention and MLP in neox; a norm after each part in glm4.
@pytest.fixture(scope="module", params=["llama", "gpt2", "neox", "glm4"])
def model(request):
    """In float64, where another batch rounds by less than the agreement that is asked for."""
    model = tiny_model(request.param)
    model.tokenizer = tiny_tokenizer()
    return model.to(torch.float64)


@pytest.fixture(scope="module")
def profile(model, prompts):  # noqa: F811
    return ml.profile_layers(model, prompts, signals=list(RIVAL_SIGNALS), progress=False, **QUICK)


def cosine(a, b):
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


def plain(model, row, parallel):
    """Every signal of one prompt: lists over depth of numbers per valid row, or of one number."""
    _, cache = model.run_with_cache(torch.tensor(row)[None])
    layers = range(model.cfg.n_layers)
    found = {}
    sites = [cache[f"blocks.{i}.hook_resid_pre"][0] for i in layers]
    sites.append(cache[f"blocks.{len(layers) - 1}.hook_resid_post"][0])
    for block in layers:
        before, after = sites[block], sites[block + 1]
        attention = cache[f"blocks.{block}.hook_attn_out"][0]
        mlp = cache[f"blocks.{block}.hook_mlp_out"][0]
        np.testing.assert_allclose(before + attention + mlp, after, rtol=1e-6, atol=1e-8)
        between = before if parallel else before + attention
        pattern = cache[f"blocks.{block}.attn.hook_pattern"][0]
        here = torch.arange(len(row), dtype=torch.float64)
        last_five = [pattern[:, q, max(q - 5, 0) : q].sum(1).mean() for q in range(len(row))]
        own = {
            "block_influence": (1 - cosine(before, after))[SKIPPED:],
            "attention_ratio": (attention.norm(dim=1) / before.norm(dim=1))[SKIPPED:],
            "mlp_ratio": (mlp.norm(dim=1) / between.norm(dim=1))[SKIPPED:],
            "attention_cosine": cosine(attention, before)[SKIPPED:],
            "mlp_cosine": cosine(mlp, between)[SKIPPED:],
            "recent_attention": torch.stack(last_five)[SKIPPED:],
            "sink_rate": (pattern[:, :, 0].mean(1) > 0.3).double().mean(),
            "attention_distance": (pattern * (here[:, None] - here).abs()).sum(2).mean(),
        }
        for name, value in own.items():
            found.setdefault(name, []).append(value)
    for residual in sites:
        power = residual.pow(2).sum(0).sort(descending=True).values
        unit = residual - residual.mean(0)
        unit = unit / unit.norm(dim=1, keepdim=True)
        gram = (unit @ unit.T).clamp(min=0)
        eigenvalues = torch.linalg.eigvalsh(gram / gram.trace())
        own = {
            "massive_share": power[:3].sum() / power.sum(),
            "first_norm": residual[0].norm() / np.median(residual.norm(dim=1)),
            "prompt_entropy": -torch.log(eigenvalues.pow(2).sum()),
        }
        for name, value in own.items():
            found.setdefault(name, []).append(value)
    return found


def test_signals_equal_plain_computation(model, profile):
    parallel = "neox" in model.cfg.model_name
    rows = [row[:length] for row, length in zip(TOKENS.tolist(), LENGTHS, strict=True)]
    each = [plain(model, row, parallel) for row in rows]
    for name in each[0]:
        whole = RIVAL_SIGNALS[name].whole
        depths = range(len(each[0][name]))
        wanted = []
        for depth in depths:
            of_prompts = [one[name][depth] for one in each]
            all_of = torch.stack(of_prompts) if whole else torch.cat(of_prompts)
            wanted.append(float(all_of.mean()))
        np.testing.assert_allclose(
            profile.signals[name].values, wanted, rtol=1e-5, atol=1e-9, err_msg=name
        )


def test_curves_of_sites_run_over_sites_and_everything_has_its_interval(profile):
    for name, signal in RIVAL_SIGNALS.items():
        curve = profile.signals[name]
        assert len(curve) == profile.n_layers + (signal.place == "site")
        assert np.isfinite([curve.low, curve.values, curve.high]).all()
        assert (curve.low <= curve.values).all()
        assert (curve.values <= curve.high).all()
        assert curve.by_fold is not None


def test_the_last_site_is_the_model_s_own_prediction(profile):
    np.testing.assert_allclose(profile.signals["lens_kl"].values[-1], 0, atol=1e-6)


def test_a_padded_cache_gives_the_same(model, prompts, profile):  # noqa: F811
    names = ml.needed_hooks(model, updates=True)
    tokens, mask = padded(list(range(len(LENGTHS))))
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names.__contains__)
    found = ml.profile_cache(
        model, [(cache, tokens)], prompts=prompts, signals=list(RIVAL_SIGNALS), **QUICK
    )
    assert_same(found, profile)


def test_boundaries_are_sought_in_the_package_s_own_curves(model, prompts, profile):  # noqa: F811
    names = list(ml.arrays.boundary_signals(profile).columns)
    assert not {name.replace("_", " ") for name in RIVAL_SIGNALS} & set(names)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_dimension_of_even_points(d):
    points = torch.rand(1500, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    # Rotated into more coordinates, which add nothing.
    turned = torch.linalg.qr(torch.randn(20, d, dtype=torch.float64))[0]
    assert two_nearest_dimension(points @ turned.T) == pytest.approx(d, rel=0.12)
