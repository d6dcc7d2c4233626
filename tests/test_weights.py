"""Weights: every one counted once, and a model as before training owes nothing to its training."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny import (
    ARCHITECTURES,
    ENCODERS,
    MORE,
    random_tokens,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

from mspgt_lens.models import as_adapter, bridge_from_huggingface
from mspgt_lens.models.weights import count_distinct, count_weights, drawn_anew

TOKENS = random_tokens(2, 9)
ALL = ARCHITECTURES + MORE
QUERIES = "q._original_component.weight"


def plain(config):
    """The Hugging Face model on its own, as its class begins it."""
    return getattr(transformers, config.architectures[0])(config)


def loaded(model):
    """A bridge's or a HookedTransformer's parameters by name, each once."""
    return dict(model.named_parameters())


class Named(torch.nn.Module):
    """A module with these parameters and submodules."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                part = torch.nn.Parameter(part)
            setattr(self, name, part)


def in_the_manner_of_hooked_transformer(n_layers=3):
    """The names and shapes of a ``HookedTransformer``, which TransformerLens 4 no longer has.

    Biases are in rows by head, and the unembedding is a copy of the embedding.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    def block():
        attn = Named(W_Q=normal(4, 32, 8), b_Q=normal(4, 8), b_K=normal(4, 8))
        mlp = Named(W_in=normal(32, 64), b_in=normal(64))
        return Named(attn=attn, mlp=mlp, ln1=Named(w=normal(32) + 1, b=normal(32)))

    model = Named(
        embed=Named(W_E=normal(101, 32)),
        blocks=torch.nn.ModuleList([block() for _ in range(n_layers)]),
        unembed=Named(W_U=torch.zeros(32, 101), b_U=normal(101)),
    )
    model.W_E = model.embed.W_E
    model.unembed.W_U.data.copy_(model.W_E.T)
    return model


def fold_and_center(model):
    """What processing makes of the two."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.unembed.W_U *= 1 + 0.3 * torch.randn(32, 1, generator=generator)
        model.unembed.W_U -= model.unembed.W_U.mean(dim=1, keepdim=True)
        model.W_E -= model.W_E.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("processed", [False, True], ids=["plain", "compatibility"])
def test_every_weight_counts_once(architecture, processed):
    expected = sum(p.numel() for p in plain(tiny_config(architecture)).parameters())
    model = tiny_model(architecture)
    if processed:
        model.enable_compatibility_mode()
    assert as_adapter(model).n_parameters == expected


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_count_once_on_every_class(tied):
    config = tiny_config("llama")
    config.tie_word_embeddings = tied
    inner = plain(config)
    model = bridge_from_huggingface(inner.eval(), None, "tiny")
    without = as_adapter(tiny_model("llama")).n_parameters - 32 * 101
    expected = without if tied else without + 32 * 101
    assert as_adapter(model).n_parameters == expected
    model.enable_compatibility_mode()
    assert as_adapter(model).n_parameters == expected


@pytest.mark.parametrize("architecture", ALL)
def test_a_forward_pass_multiplies_every_block_once_and_the_unembedding(architecture):
    inner = plain(tiny_config(architecture))
    name = max(
        (name for name, module in inner.named_modules() if isinstance(module, torch.nn.ModuleList)),
        key=lambda name: sum(p.numel() for p in inner.get_submodule(name).parameters()),
    )
    blocks = sum(p.numel() for p in inner.get_submodule(name).parameters())
    adapter = as_adapter(tiny_model(architecture))
    assert adapter.n_forward_weights == blocks + 32 * 101


@pytest.mark.parametrize("processed", [False, True], ids=["plain", "processed"])
def test_tied_embeddings_that_are_stored_twice_count_once(processed):
    model = in_the_manner_of_hooked_transformer()
    apart = sum(p.numel() for p in model.parameters())
    if processed:
        fold_and_center(model)
    assert count_weights(model) == apart - 32 * 101
    with torch.no_grad():
        model.unembed.W_U.normal_(generator=torch.Generator().manual_seed(2))
    assert count_weights(model) == apart


def test_interleaved_views_and_the_rest_of_their_memory():
    memory = torch.zeros(60)
    parts = [torch.nn.Parameter(memory.as_strided((20,), (3,), start)) for start in range(2)]
    assert count_distinct(parts) == 40
    assert count_distinct([*parts, torch.nn.Parameter(memory[:30])]) == 50
    assert count_distinct([*parts, parts[0], torch.nn.Parameter(memory.clone())]) == 100


def rearranged(model, seed=1):
    """Shuffle every matrix and vector of the blocks within itself.

    All that random weights may depend on, the mean and deviation of each kind, stays.
    """
    generator = torch.Generator().manual_seed(seed)
    storages = {}
    for parameter in sorted(model.parameters(), key=lambda p: -p.numel()):
        storages.setdefault(parameter.untyped_storage().data_ptr(), parameter)
    names = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in storages.values():
            if re.search(r"\.\d+\.", names[id(parameter)]):
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))


@pytest.mark.parametrize("processed", [False, True], ids=["plain", "compatibility"])
@pytest.mark.parametrize("architecture", ALL)
def test_nothing_of_training_survives_in_random_weights(architecture, processed):
    """Two models whose kinds of weights have the same means and deviations become the same."""
    found = []
    for change in (False, True):
        model = tiny_model(architecture, n_layers=2)
        if processed:
            model.enable_compatibility_mode()
        if change:
            trained = model(TOKENS).detach()
            rearranged(model)
            assert (model(TOKENS) - trained).abs().max() > 0.1
        with as_adapter(model).random_weights(3):
            found.append(model(TOKENS).detach())
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*ALL, *ENCODERS])
def test_trained_weights_come_back_to_the_bit(architecture, dtype):
    model = tiny_model(architecture, n_layers=2).to(dtype)
    if architecture in ENCODERS:
        model.tokenizer = tiny_tokenizer()
    adapter = as_adapter(model)
    before = {name: p.detach().clone() for name, p in loaded(model).items()}
    changed = 0

    def fail():
        nonlocal changed
        with adapter.random_weights():
            changed = sum(not torch.equal(before[name], p) for name, p in loaded(model).items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert changed > len(before) / 2
    assert all(torch.equal(before[name], p) for name, p in loaded(model).items())


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_views_show_what_was_drawn(architecture):
    """A matrix and its parts are one memory, drawn once, from the whole's spread."""
    model = tiny_model(architecture)

    def fused():
        found = [p for name, p in loaded(model).items() if ".qkv." in name and p.ndim == 2]
        return torch.stack([p.detach() for p in found])

    def queries():
        [name] = [name for name in loaded(model) if ".1." in name and name.endswith(QUERIES)]
        return loaded(model)[name].detach()

    trained = fused()
    with as_adapter(model).random_weights():
        drawn = fused()
        assert any(torch.equal(queries(), one[:32]) for one in (drawn[1], drawn[1].T))
    assert abs(float(drawn.std() / trained.std()) - 1.0) < 0.1
    assert (drawn != trained).all()


@pytest.mark.parametrize("processed", [False, True], ids=["plain", "processed"])
def test_biases_by_head_take_their_mean_and_ties_stay(processed):
    model = in_the_manner_of_hooked_transformer()
    if processed:
        fold_and_center(model)
    before = {name: p.detach().clone() for name, p in loaded(model).items()}
    with drawn_anew(model, "made", seed=0):
        for name in ("attn.b_Q", "attn.b_K", "mlp.b_in", "ln1.w", "ln1.b"):
            kind = [p for full, p in loaded(model).items() if full.endswith(name)]
            trained = torch.stack([before[full] for full in before if full.endswith(name)])
            assert len(kind) == 3
            assert trained.std() > 0.1
            expected = trained.mean().expand_as(trained)
            torch.testing.assert_close(torch.stack(kind), expected, atol=1e-6, rtol=0)
        matrices = [p for full, p in loaded(model).items() if full.endswith("W_Q")]
        assert min(float(p.detach().std()) for p in matrices) > 0.2
        assert torch.equal(model.unembed.b_U, before["unembed.b_U"])
        embedding, unembedding = model.W_E.flatten(), model.unembed.W_U.T.flatten()
        assert not torch.equal(model.W_E, before["W_E"])
        if processed:
            both = torch.stack([embedding, unembedding])
            assert torch.corrcoef(both)[0, 1] > 0.999
        else:
            assert torch.equal(embedding, unembedding)
    assert all(torch.equal(before[name], p) for name, p in loaded(model).items())


def test_embeddings_that_are_tied_stay_so_in_compatibility_mode():
    model = tiny_model("gpt2")
    model.enable_compatibility_mode()
    with as_adapter(model).random_weights():
        both = torch.stack([model.W_E.detach().flatten(), model.W_U.detach().T.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.999


def test_quantized_and_absent_weights_are_refused():
    model = tiny_model("llama")
    block = model.blocks[1].mlp.get_submodule("in")._original_component
    block.weight = torch.nn.Parameter(block.weight.detach().to(torch.int8), requires_grad=False)
    before = {name: p.detach().clone() for name, p in loaded(model).items()}
    with (
        pytest.raises(ValueError, match=r"int8; load the model without quantization"),
        as_adapter(model).random_weights(),
    ):
        pass
    assert all(torch.equal(before[name], p) for name, p in loaded(model).items())
    model = tiny_model("llama")
    model.blocks[1].mlp.get_submodule("in")._original_component.to("meta")
    with (
        pytest.raises(ValueError, match="not in memory; load the model without"),
        as_adapter(model).random_weights(),
    ):
        pass
    model = tiny_model("llama")
    packed = torch.zeros(4, 8, dtype=torch.int32)
    model.blocks[1].mlp._original_component.register_buffer("qweight", packed)
    with (
        pytest.raises(ValueError, match=r"qweight of tiny-llama is torch\.int32"),
        as_adapter(model).random_weights(),
    ):
        pass
