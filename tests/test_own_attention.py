"""The model's own attention: the same residuals, no pattern, and everything back afterwards."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import N_HEADS, random_tokens, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers.models.llama import modeling_llama

import mspgt_lens as ml
from mspgt_lens.hvib import activations
from mspgt_lens.lens import reading
from mspgt_lens.models import PatternBlocks, as_adapter, own_attention, pattern_blocks
from mspgt_lens.perturbation import dependence, massive, residuals
from mspgt_lens.perturbation.batches import make_batches
from mspgt_lens.profile import passing

N_POS = 48


class LargestPattern(TorchDispatchMode):
    """The most entries of any result of torch that has a number for each query and key."""

    def __init__(self, n_pos):
        super().__init__()
        self.n_pos, self.n_entries = n_pos, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in tree_leaves(out):
            if isinstance(result, torch.Tensor) and result.shape[-2:] == (self.n_pos, self.n_pos):
                self.n_entries = max(self.n_entries, result.numel())
        return out


def sites(adapter, tokens, mask):
    found = []
    adapter.run(tokens, mask, lambda site, residual: found.append(residual.clone()))
    return torch.stack(found)


def batch(padded):
    tokens, mask = random_tokens(2, N_POS), torch.ones(2, N_POS, dtype=torch.bool)
    mask[1, -9:] = not padded
    return tokens, mask


def state(model):
    return [
        (module.__dict__.get("forward"), getattr(module.config, "_attn_implementation", None))
        for module in model.modules()
        if hasattr(module, "config")
    ]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "bert"])
def test_it_gives_the_same_residuals_without_a_pattern(architecture, padded):
    model = tiny_model(architecture, d_model=16)
    model.tokenizer = tiny_tokenizer()
    adapter, (tokens, mask) = as_adapter(model), batch(padded)
    before = state(model)
    with adapter.inference():
        with LargestPattern(N_POS) as as_loaded:
            expected = sites(adapter, tokens, mask)
        with own_attention(adapter) as is_own, LargestPattern(N_POS) as own:
            found = sites(adapter, tokens, mask)
        assert is_own
        torch.testing.assert_close(found[:, mask], expected[:, mask], rtol=1e-5, atol=1e-5)
    n_entries = len(tokens) * N_HEADS * N_POS**2
    assert own.n_entries < n_entries <= as_loaded.n_entries
    assert state(model) == before


def test_a_model_that_cannot_is_left_as_it_is():
    for architecture in ("gptj", "bloom"):
        adapter = as_adapter(tiny_model(architecture))
        with adapter.inference(), own_attention(adapter) as is_own:
            assert not is_own


def test_weights_that_its_own_attention_does_not_read_are_noticed():
    """Folded into what TransformerLens split off, they are in its attention only."""
    model = tiny_model("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    adapter, (tokens, mask) = as_adapter(model), batch(False)
    with adapter.inference():
        expected = sites(adapter, tokens, mask)
        with own_attention(adapter):
            torch.testing.assert_close(sites(adapter, tokens, mask), expected)


@pytest.mark.parametrize("place", ["attn.hook_pattern", "attn.hook_z", "attn.hook_q"])
def test_hooks_inside_of_attention_still_act(place):
    adapter, (tokens, mask) = as_adapter(tiny_model("llama")), batch(True)
    seen = []
    hooks = [(f"blocks.1.{place}", lambda x, hook: seen.append(1) or 0.5 * x)]
    with adapter.inference(), adapter.model.hooks(fwd_hooks=hooks):
        expected = sites(adapter, tokens, mask)
        with own_attention(adapter) as is_own:
            found = sites(adapter, tokens, mask)
        assert not is_own
        assert len(seen) == 2
        assert torch.equal(found, expected)


def test_hooks_elsewhere_act_and_see_their_own_prompts_only():
    adapter, (tokens, mask) = as_adapter(tiny_model("llama")), batch(True)
    shapes = []
    hooks = [("blocks.1.hook_resid_pre", lambda x, hook: shapes.append(x.shape) or 0.5 * x)]
    with adapter.inference(), adapter.model.hooks(fwd_hooks=hooks):
        expected = sites(adapter, tokens, mask)
        with own_attention(adapter) as is_own:
            found = sites(adapter, tokens, mask)
        assert is_own
        assert shapes == [(*tokens.shape, 32)] * 2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_everything_is_back_after_an_error():
    model = tiny_model("llama")
    adapter, before = as_adapter(model), state(model)

    def stopped():
        with adapter.inference(), own_attention(adapter):
            assert state(model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert state(model) == before


def profiled():
    model = tiny_model("llama", d_model=16)
    prompts = ml.PromptDataset.from_tokens(random_tokens(40, 2 * N_POS))
    settings = {"bands": {"local": (2, 4)}, "progress": False}
    with LargestPattern(2 * N_POS) as largest:
        profile = ml.profile_layers(model, prompts, signals=["novelty"], **settings)
    return profile, largest.n_entries


def test_a_profile_without_signals_of_attention_makes_no_pattern(monkeypatch):
    own, n_entries = profiled()
    monkeypatch.setattr(passing, "own_attention", lambda adapter: nullcontext(False))
    as_loaded, n_entries_as_loaded = profiled()
    # Each of five folds has a batch of eight prompts.
    n_pattern = 8 * N_HEADS * (2 * N_POS) ** 2
    assert n_entries < n_pattern <= n_entries_as_loaded
    for name in ("compression", "relevance"):
        ours, theirs = (getattr(profile, name).values for profile in (own, as_loaded))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def collected(model, prompts, folder):
    plan = activations.CollectionPlan((0, 3), {"local": (2, 4)}, 4, 60, seed=0)
    found = activations.collect_activations(
        as_adapter(model), list(prompts), plan, folder, progress=False
    )
    return found.rows.astype(np.float32)


def classified(model, prompts, folder):
    bands = {"near": (1, 2), "far": (3, N_POS)}
    return ml.classify_tokens(model, prompts, bands=bands, n_tokens=20, progress=False).losses


def concentrated(model, prompts, folder):
    adapter, bar = as_adapter(model), tqdm(disable=True)
    batches = make_batches(adapter, prompts, skip_first=4, batch_size=None)
    with adapter.inference():
        block, coordinates = massive._onset(adapter, batches, None, bar)
    return np.array([block, *coordinates.tolist()])


def gathered(model, prompts, folder):
    found = ml.residual_statistics(model, prompts)
    return torch.cat([found.deviation, found.factor[:, 0], found.updates[:, 3]]).numpy()


def read(model, prompts, folder):
    adapter, tokens = as_adapter(model), next(iter(prompts)).tokens.tolist()
    return reading.read_text(adapter, tokens, lambda _, rows: adapter.decode(rows), 0).entropy


@pytest.mark.parametrize(
    ("passes", "module"),
    [
        (collected, activations),
        (classified, dependence),
        (concentrated, massive),
        (gathered, residuals),
        (read, reading),
    ],
    ids=lambda of: of.__name__.rpartition(".")[2],
)
def test_passes_that_read_residuals_only_make_no_pattern(passes, module, monkeypatch, tmp_path):
    model = tiny_model("llama", d_model=16)
    found, n_pos = [], {classified: 2 * N_POS}.get(passes, N_POS)
    prompts = ml.PromptDataset.from_tokens(random_tokens(6, n_pos))
    for name in ("own", "as_loaded"):
        folder = tmp_path / name
        folder.mkdir()
        before = state(model)
        with LargestPattern(N_POS) as largest:
            found.append((passes(model, prompts, folder), largest.n_entries))
        assert state(model) == before
        monkeypatch.setattr(module, "own_attention", lambda adapter: nullcontext(False))
    (own, n_own), (as_loaded, n_as_loaded) = found
    n_prompts = {read: 1, classified: 20}.get(passes, 6)
    assert n_own < n_prompts * N_HEADS * N_POS**2 <= n_as_loaded
    np.testing.assert_allclose(own, as_loaded, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_patterns_in_blocks_give_the_same_spans_and_no_whole_pattern(monkeypatch, architecture):
    model = tiny_model(architecture, d_model=16)
    model.tokenizer = tiny_tokenizer()
    tokens, mask = random_tokens(40, 2 * N_POS), torch.ones(40, 2 * N_POS, dtype=torch.bool)
    mask[:5, -7:] = False
    prompts = ml.PromptDataset.from_tokens(tokens, mask)
    settings = {"bands": {"local": (2, 4)}, "progress": False}
    found = []
    # 40 of the 96 queries at a time, in batches of eight prompts.
    blocks_of_40 = PatternBlocks(as_adapter(model), 40 * 8 * N_HEADS * 2 * N_POS)
    monkeypatch.setattr(passing, "pattern_blocks", lambda adapter: blocks_of_40)
    for n_entries in (2**24, 2**10):
        monkeypatch.setattr(passing, "LARGE_PATTERN", n_entries)
        with LargestPattern(2 * N_POS) as largest:
            found.append((ml.profile_layers(model, prompts, **settings), largest.n_entries))
    (whole, n_whole), (blocks, n_blocks) = found
    n_pattern = 7 * N_HEADS * (2 * N_POS) ** 2
    assert n_blocks < n_pattern <= n_whole
    assert set(blocks.signals) == set(whole.signals)
    for name, curve in blocks.signals.items():
        np.testing.assert_allclose(curve.values, whole.signals[name].values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(blocks.compression.values, whole.compression.values, rtol=1e-4)


def test_signals_that_read_whole_patterns_get_them_in_long_contexts(monkeypatch):
    prompts = ml.PromptDataset.from_tokens(random_tokens(40, N_POS))
    signals = ["attention_span", "sink_rate"]
    found = []
    for n_entries in (2**24, 2**10):
        monkeypatch.setattr(passing, "LARGE_PATTERN", n_entries)
        profile = ml.profile_layers(
            tiny_model("llama"), prompts, bands={"local": (2, 4)}, signals=signals, progress=False
        )
        found.append(profile.signals["sink_rate"].values)
    np.testing.assert_array_equal(*found)


def test_another_model_of_the_same_class_is_not_looked_into():
    mine, other = (as_adapter(tiny_model("llama", seed=seed)) for seed in (0, 1))
    tokens, mask = batch(True)
    seen = []

    def on_site(site, residual):
        if site == 1:
            with own_attention(other):
                sites(other, tokens, mask)

    with mine.inference(), other.inference():
        blocks = pattern_blocks(mine)
        blocks.run(tokens, mask, on_site, lambda block, pattern, first: seen.append(block))
    assert seen == list(range(4))
    assert modeling_llama.eager_attention_forward.__module__ == modeling_llama.__name__
