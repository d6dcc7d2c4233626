"""Quantized weights are served where that is exact, and refused where it would be silently wrong.

No quantizing library is needed: its modules are stood in for by modules that pack as they do.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from profiles import SMALL, TOKENS, assert_same, run
from tiny import random_model, tiny_config
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens.models import as_adapter, bridge_from_huggingface, weight_digest
from mspgt_lens.models.weights import count_block_weights, count_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]
STEP = 0.05


class Foreign(Tensor):
    """A weight of a library's own class, such as torchao's: shaped as if it were not packed."""

    @staticmethod
    def __new__(cls: type, packed: Tensor) -> Foreign:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.packed.float() * STEP

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Foreign(args[0].packed)
        raise NotImplementedError(f"{function} of packed weights")


Foreign.__module__ = "library.of.tensors"


class Packed(torch.nn.Module):
    """A linear map whose weights are packed; it multiplies with what they stand for."""

    def __init__(self, linear: torch.nn.Linear, how: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        levels = (linear.weight.detach() / STEP).round().clamp(-8, 7).to(torch.int8)
        self.how, self.bias = how, linear.bias
        nibbles = (levels + 8).to(torch.uint8)
        pairs = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
        if how == "gptq":
            words = nibbles.to(torch.int32).unflatten(1, (-1, 8))
            shifts = torch.arange(8, dtype=torch.int32) * 4
            self.register_buffer("qweight", (words << shifts).sum(dim=2, dtype=torch.int32))
            self.register_buffer("scales", torch.full((1, linear.out_features), STEP))
        elif how == "bitsandbytes 4":
            self.weight = torch.nn.Parameter(pairs.reshape(-1, 1), requires_grad=False)
            self.weight.quant_state = SimpleNamespace(shape=linear.weight.shape)
        elif how == "bitsandbytes 8":
            self.weight = torch.nn.Parameter(levels, requires_grad=False)
        elif how == "hqq":
            self.W_q = torch.nn.Parameter(pairs, requires_grad=False)
        elif how == "torchao":
            self.weight = torch.nn.Parameter(Foreign(levels), requires_grad=False)
        elif how == "out of sight":
            self.storage = SimpleNamespace(levels=levels)
        elif how == "attribute":
            self.levels = levels

    def values(self) -> Tensor:
        if self.how == "gptq":
            shifts = torch.arange(8, dtype=torch.int32) * 4
            return (((self.qweight[..., None] >> shifts) & 15).flatten(1).float() - 8) * STEP
        if self.how in ("bitsandbytes 4", "hqq"):
            pairs = self.weight if self.how == "bitsandbytes 4" else self.W_q
            pairs = pairs.reshape(self.out_features, -1)
            return (torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1).float() - 8) * STEP
        if self.how == "torchao":
            return self.weight.dequantize()
        held = {"bitsandbytes 8": "weight", "attribute": "levels"}.get(self.how)
        return (self.storage.levels if held is None else getattr(self, held)).float() * STEP

    def forward(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows, self.values(), self.bias)


HOW = ("gptq", "bitsandbytes 4", "bitsandbytes 8", "hqq", "torchao", "out of sight", "attribute")


def two_alike(how: str) -> tuple[Any, Any]:
    """A model with packed maps in its blocks, and the same with what they stand for."""
    config = tiny_config("llama", **SMALL)
    packed = random_model(config)
    plain = copy.deepcopy(packed)
    for name, module in list(packed.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            stand_in = Packed(module, how)
            packed.set_submodule(name, stand_in)
            plain.get_submodule(name).weight.data.copy_(stand_in.values())
    packed.config.quantization_config = {"quant_method": how}
    return tuple(bridge_from_huggingface(model, None, "stand-in") for model in (packed, plain))


@pytest.mark.parametrize("how", HOW)
def test_packed_blocks_are_profiled_as_what_they_stand_for(how: str) -> None:
    packed, plain = two_alike(how)
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS[:2]), plain(TOKENS[:2]))
    assert_same(run(packed), run(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_packed_weights_count_as_what_they_stand_for(how: str) -> None:
    packed, plain = map(as_adapter, two_alike(how))
    assert packed.n_parameters == plain.n_parameters
    assert packed.n_forward_weights == plain.n_forward_weights
    # Not read off its first parameter, which may be bytes.
    assert packed.dtype == torch.float32


@pytest.mark.parametrize("how", HOW)
def test_packed_weights_are_never_left_as_trained_by_the_control(how: str) -> None:
    packed, _ = two_alike(how)
    before = {name: p.detach() for name, p in packed.named_parameters()}
    kept = {n: p.clone() for n, p in before.items() if type(p) is Tensor}
    with pytest.raises(ml.CannotMeasure, match="load the model without quantization"):
        run(packed, control="random_weights")
    now = dict(packed.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in kept.items())


def test_a_model_that_was_unpacked_while_loading_is_like_any_other() -> None:
    config = tiny_config("llama", **SMALL)
    models = []
    for says in (None, {"quant_method": "gguf"}):
        loaded = random_model(config)
        if says is not None:
            loaded.config.quantization_config = says
        models.append(bridge_from_huggingface(loaded, None, "same"))
    first, second = (run(model, control="random_weights") for model in models)
    assert_same(first, second)


def test_two_models_that_differ_in_packed_weights_alone_are_told_apart() -> None:
    for how in ("gptq", "hqq", "torchao", "attribute"):
        one, _ = two_alike(how)
        other, _ = two_alike(how)
        assert weight_digest(as_adapter(one)) == weight_digest(as_adapter(other))
        held = next(m for m in other.modules() if isinstance(m, Packed))
        packs = {"gptq": "qweight", "hqq": "W_q", "attribute": "levels"}
        weights = held.weight.packed if how == "torchao" else getattr(held, packs[how])
        weights.bitwise_xor_(torch.ones_like(weights))
        assert weight_digest(as_adapter(one)) != weight_digest(as_adapter(other))


def test_a_packed_embedding_is_unpacked_or_refused() -> None:
    def with_embedding(make: Any) -> Any:
        loaded = random_model(tiny_config("llama", **SMALL))
        bridge = bridge_from_huggingface(loaded, None, "embedded")
        held = bridge.W_E.detach()
        levels = (held / STEP).round().clamp(-8, 7).to(torch.int8)
        adapter = as_adapter(bridge)
        adapter.model = SimpleNamespace(W_E=make(levels))
        return adapter, levels.float() * STEP

    adapter, values = with_embedding(Foreign)
    assert torch.equal(adapter.embedding(), values)
    adapter, _ = with_embedding(lambda levels: levels)
    with pytest.raises(ml.CannotMeasure, match=r"embedding of embedded is quantized \(torch.int8"):
        adapter.embedding()


def test_packed_weights_of_other_models_count_where_something_says_how_many() -> None:
    def made(**parts: Any) -> Any:
        block = torch.nn.Module()
        for name, part in parts.items():
            setattr(block, name, torch.nn.Parameter(part, requires_grad=False))
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([block])
        model.W_E = model.unembed = torch.zeros(3, 4)
        return model

    known = made(W_Q=torch.zeros(16, 1, dtype=torch.uint8), b=torch.zeros(8))
    known.blocks[0].W_Q.quant_state = SimpleNamespace(shape=(4, 8))
    assert count_weights(known) == 4 * 8 + 8
    assert count_block_weights(known) == 4 * 8 + 8
    assert count_weights(made(W_Q=torch.zeros(16, 2, dtype=torch.uint8))) is None
