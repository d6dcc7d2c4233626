"""The adapter: the same sites, norms and logits for every architecture, and no trace left."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, MORE, N_HEADS, NORM_KINDS, random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models import (
    ModelAdapter,
    RecordedRun,
    as_adapter,
    bridge_class,
    cache_reader,
    edited_logits,
    needed_hooks,
)

TOKENS = random_tokens(3, 11)
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
N_LAYERS, D_MODEL = 4, 32


class Facade:
    """A model seen through a wrapper that replaces some of its attributes."""

    def __init__(self, model: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def hooks_on(model: Any) -> dict[str, int]:
    """How many hooks sit on every hook point and on every torch module."""
    points = {f"point {name}": len(hook.fwd_hooks) for name, hook in model.hook_dict.items()}
    modules = {
        f"module {name}": len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
    }
    return points | modules


def read(model: Any, tokens: Tensor = TOKENS) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    sites: dict[int, Tensor] = {}
    patterns: dict[int, Tensor] = {}
    adapter = as_adapter(model)
    with adapter.inference():
        adapter.run(tokens, torch.ones_like(tokens).bool(), sites.__setitem__, patterns.__setitem__)
    return sites, patterns


def logits_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens, return_type="logits")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norm_kind_is_that_of_the_architecture(tiny: Callable[..., Any], architecture: str) -> None:
    assert as_adapter(tiny(architecture)).norm_kind == NORM_KINDS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_site_normalized_and_decoded_gives_the_models_logits(
    tiny: Callable[..., Any], architecture: str
) -> None:
    model = tiny(architecture)
    adapter = as_adapter(model)
    final = read(model)[0][N_LAYERS]
    with adapter.inference():
        decoded = adapter.decode(adapter.normalize(final).flatten(0, 1))
    expected = logits_of(model).flatten(0, 1)
    assert decoded.shape == expected.shape
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_decoding_holds_with_folded_norms_too(architecture: str) -> None:
    model = tiny_model(architecture)
    assert as_adapter(model).weight_processing.endswith("norms not folded")
    model.enable_compatibility_mode()
    adapter = as_adapter(model)
    assert adapter.weight_processing.endswith("norms folded")
    sites, patterns = read(model)
    assert (list(sites), list(patterns)) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    decoded = adapter.decode(adapter.normalize(sites[N_LAYERS]).flatten(0, 1))
    expected = logits_of(model).flatten(0, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_any_final_norm_is_learned_from_its_outputs(
    tiny: Callable[..., Any], kind: type[torch.nn.Module], width: int
) -> None:
    """Normalizing and decoding through an unembedding that does nothing is the final norm."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(width, eps=1e-5).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(width, generator=generator))
    cfg = SimpleNamespace(
        n_layers=N_LAYERS, d_model=width, d_vocab=9, n_ctx=9, eps=1e-5, default_prepend_bos=False
    )
    model = Facade(tiny("llama"), cfg=cfg, ln_final=norm, unembed=torch.nn.Identity())
    adapter = as_adapter(model)
    adapter.logit_factor = 1.0  # A model of parts that do not fit cannot run.
    residual = torch.randn(7, width, generator=generator) + 2.0
    torch.testing.assert_close(
        adapter.decode(adapter.normalize(residual)), norm(residual), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_normalize_against_the_formula(tiny: Callable[..., Any], architecture: str) -> None:
    adapter = as_adapter(tiny(architecture))
    residual = 3.0 * torch.randn(4, 5, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1.0
    h = residual.double().numpy()
    if NORM_KINDS[architecture] == "layer":
        h = h - h.mean(axis=-1, keepdims=True)
    expected = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + adapter.cfg.eps)
    np.testing.assert_allclose(adapter.normalize(residual).numpy(), expected, atol=2e-6)


def test_normalize_never_computes_in_half_precision(tiny: Callable[..., Any]) -> None:
    adapter = as_adapter(tiny("llama"))
    residual = torch.full((2, D_MODEL), 300.0)  # Its square overflows float16.
    assert adapter.normalize(residual.double()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        normalized = adapter.normalize(residual.to(dtype))
        assert normalized.dtype == torch.float32
        torch.testing.assert_close(normalized, torch.ones(2, D_MODEL))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_come_in_order_and_are_the_residual_stream(
    tiny: Callable[..., Any], architecture: str
) -> None:
    model = tiny(architecture)
    sites, patterns = read(model)
    assert list(sites) == list(range(N_LAYERS + 1))
    assert list(patterns) == list(range(N_LAYERS))
    assert {site.shape for site in sites.values()} == {(*TOKENS.shape, D_MODEL)}
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    for block in range(N_LAYERS):
        for found, name in (
            (sites[block], "hook_resid_pre"),
            (sites[block + 1], "hook_resid_post"),
            (patterns[block], "attn.hook_pattern"),
        ):
            torch.testing.assert_close(found, cache[f"blocks.{block}.{name}"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patterns_are_causal_and_sum_to_one_over_keys(
    tiny: Callable[..., Any], architecture: str
) -> None:
    n_pos = TOKENS.shape[1]
    for pattern in read(tiny(architecture))[1].values():
        assert pattern.shape == (len(TOKENS), N_HEADS, n_pos, n_pos)
        assert (pattern >= 0).all()
        assert not pattern.triu(diagonal=1).any()
        torch.testing.assert_close(pattern.sum(dim=-1), torch.ones(pattern.shape[:-1]))


def test_run_ends_before_the_unembedding(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    calls: list[str] = []
    handle = model.unembed.register_forward_hook(lambda *_: calls.append("unembed"))
    try:
        read(model)
        assert not calls
        logits_of(model)
        assert calls
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["site", "pattern"])
def test_run_leaves_no_hook_behind(
    tiny: Callable[..., Any], architecture: str, error: type[BaseException] | None, where: str
) -> None:
    model = tiny(architecture)
    adapter = as_adapter(model)
    during: list[dict[str, int]] = []

    def callback(index: int, activation: Tensor) -> None:
        during.append(hooks_on(model))
        if error is not None and index == 2:
            raise error

    def ignore(index: int, activation: Tensor) -> None:
        pass

    callbacks = (callback, ignore) if where == "site" else (ignore, callback)
    logits, before = logits_of(model), hooks_on(model)
    if error is None:
        adapter.run(TOKENS, MASK, *callbacks)
    else:
        with pytest.raises(error):
            adapter.run(TOKENS, MASK, *callbacks)
    assert during[0] != before
    assert hooks_on(model) == before
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_hooks_of_the_user_survive_and_are_seen(error: type[BaseException] | None) -> None:
    model = tiny_model("llama")
    clean = read(model)[0]
    calls: list[str] = []

    def shift(activation: Tensor, hook: Any) -> Tensor:
        calls.append("permanent")
        return activation + 1.0

    def watch(activation: Tensor, hook: Any) -> None:
        calls.append("temporary")

    model.hook_dict["blocks.2.hook_resid_pre"].add_hook(shift, is_permanent=True)
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(watch)
    model.blocks[0].register_forward_hook(lambda *_: calls.append("torch"))
    before = hooks_on(model)

    def callback(site: int, activation: Tensor) -> None:
        if error is not None and site == 3:
            raise error

    if error is None:
        as_adapter(model).run(TOKENS, MASK, callback)
    else:
        with pytest.raises(error):
            as_adapter(model).run(TOKENS, MASK, callback)
    assert calls == ["torch", "temporary", "permanent"]
    assert hooks_on(model) == before
    torch.testing.assert_close(read(model)[0][2], clean[2] + 1.0)
    assert calls == ["torch", "temporary", "permanent"] * 2


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_inference_restores_the_mode_of_every_module(error: type[BaseException] | None) -> None:
    model = tiny_model("gpt2", n_layers=2)
    adapter = as_adapter(model)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2

    def use() -> None:
        with adapter.inference():
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


def test_building_an_adapter_changes_nothing() -> None:
    model = tiny_model("gpt2", n_layers=2)
    model.train()
    before = hooks_on(model)
    as_adapter(model)
    assert all(module.training for module in model.modules())
    assert hooks_on(model) == before


def test_no_gradient_is_kept() -> None:
    model = tiny_model("llama", n_layers=2)
    assert any(parameter.requires_grad for parameter in model.parameters())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    sites, patterns = read(model)
    adapter = as_adapter(model)
    assert not any(x.requires_grad for x in [*sites.values(), *patterns.values()])
    assert not adapter.embedding().requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("thing", "missing"),
    [
        (None, "NoneType lacks model.run_with_hooks"),
        ("gpt2", "str lacks model.run_with_hooks"),
        (torch.nn.Linear(2, 2), "Linear lacks .*model.blocks, model.ln_final, model.unembed"),
    ],
    ids=["none", "name", "module"],
)
def test_what_is_no_model_is_refused_by_what_it_lacks(thing: object, missing: str) -> None:
    with pytest.raises(TypeError, match=missing):
        as_adapter(thing)


@pytest.mark.parametrize("attribute", ["run_with_hooks", "hook_dict", "ln_final", "unembed", "W_E"])
def test_a_missing_attribute_is_named(tiny: Callable[..., Any], attribute: str) -> None:
    with pytest.raises(TypeError, match=rf"lacks model\.{attribute}$"):
        as_adapter(Facade(tiny("llama"), **{attribute: None}))


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_pre", "blocks.3.hook_resid_post", "blocks.2.attn.hook_pattern"]
)
def test_a_missing_hook_is_named(tiny: Callable[..., Any], hook: str) -> None:
    model = tiny("llama")
    hooks = {name: point for name, point in model.hook_dict.items() if name != hook}
    with pytest.raises(TypeError, match=f"lacks the hooks {hook};"):
        as_adapter(Facade(model, hook_dict=hooks))


def test_hooks_that_never_fire_are_an_error(tiny: Callable[..., Any]) -> None:
    adapter = as_adapter(tiny("llama"))
    adapter.model = Facade(adapter.model, run_with_hooks=lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"without reaching blocks\.3\.hook_resid_post"):
        adapter.run(TOKENS, MASK, lambda *_: None)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_decoding_knows_a_constant_factor_and_a_cap_without_any_check(
    tiny: Callable[..., Any], cap: float | None
) -> None:
    model = tiny("llama")

    def finished(*args: Any, **kwargs: Any) -> Tensor:
        logits = 3.0 * model.run_with_hooks(*args, **kwargs)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    cfg = Facade(model.cfg, output_logits_soft_cap=cap)
    adapter = as_adapter(Facade(model, run_with_hooks=finished, cfg=cfg))
    expected = 3.0 * logits_of(model)
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    final = read(model)[0][N_LAYERS]
    decoded = adapter.decode(adapter.normalize(final).flatten(0, 1))
    torch.testing.assert_close(decoded, expected.flatten(0, 1), atol=1e-3, rtol=1e-4)
    # Resumed runs are decoded by the same factor and cap.
    run = RecordedRun(adapter, TOKENS, MASK)
    with adapter.inference():
        found = torch.stack([run.logits(one) for one in final])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_checking_changes_nothing(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")

    def scaled(*args: Any, **kwargs: Any) -> Tensor:
        return 3.0 * model.run_with_hooks(*args, **kwargs)

    adapter = as_adapter(Facade(model, run_with_hooks=scaled))
    final = adapter.normalize(read(model)[0][N_LAYERS]).flatten(0, 1)
    before = adapter.decode(final)
    for _ in range(2):
        adapter.check_decoding(TOKENS[0])
        assert torch.equal(adapter.decode(final), before)


def test_check_decoding_refuses_logits_made_otherwise(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")

    def bent(*args: Any, **kwargs: Any) -> Tensor:
        return torch.tanh(2.0 * model.run_with_hooks(*args, **kwargs))

    adapter = as_adapter(Facade(model, run_with_hooks=bent))
    with pytest.raises(ValueError, match="not its final norm followed by its unembedding"):
        adapter.check_decoding(TOKENS[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_decoding_accepts_every_architecture(
    tiny: Callable[..., Any], architecture: str
) -> None:
    model = tiny(architecture)
    model(TOKENS)  # Bridges put hooks of their own in place on their first run.
    before = hooks_on(model)
    as_adapter(model).check_decoding(TOKENS[0])
    as_adapter(model).check_decoding(TOKENS[0, :1])
    assert hooks_on(model) == before


def test_a_half_precision_model_is_read_in_float32() -> None:
    model = tiny_model("llama", n_layers=2).to(torch.bfloat16)
    adapter = as_adapter(model)
    adapter.check_decoding(TOKENS[0])
    final = adapter.normalize(read(model)[0][2].flatten(0, 1))
    assert final.dtype == torch.float32
    assert adapter.decode(final).dtype == torch.float32


def test_an_adapter_is_returned_as_it_is(tiny: Callable[..., Any]) -> None:
    adapter = ModelAdapter(tiny("llama"))
    assert as_adapter(adapter) is adapter


def test_sizes_are_those_of_the_model(tiny: Callable[..., Any]) -> None:
    adapter = as_adapter(tiny("llama"))
    sizes = (adapter.n_layers, adapter.d_model, adapter.d_vocab, adapter.n_ctx)
    assert sizes == (N_LAYERS, D_MODEL, 101, 256)
    assert adapter.name == "tiny-llama"
    assert adapter.embedding().shape == (101, D_MODEL)
    # Per block: queries and outputs, keys and values of half as many heads, gated MLP, two norms.
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert adapter.n_forward_weights == N_LAYERS * block + 32 * 101


def test_special_ids_and_bos_come_from_the_tokenizer() -> None:
    model = tiny_model("llama", n_layers=2)
    assert (as_adapter(model).special_ids, as_adapter(model).prefix) == (frozenset(), ())
    model.tokenizer = tiny_tokenizer()
    adapter = as_adapter(model)
    assert (adapter.special_ids, adapter.prefix) == (frozenset({0, 1, 2, 3}), (1,))
    assert adapter.tokenize("w9 w100 nonsense") == [9, 100, 3]
    model.cfg.default_prepend_bos = False
    assert as_adapter(model).prefix == ()


def test_text_without_a_tokenizer_names_the_way_out(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.*PromptDataset\.from_tokens"):
        as_adapter(tiny("llama")).tokenize("w9")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_needed_hooks_are_all_that_a_cache_must_hold(
    tiny: Callable[..., Any], architecture: str
) -> None:
    model = tiny(architecture)
    names = needed_hooks(model)
    assert len(names) == len(set(names)) == 2 * N_LAYERS + 1
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
    sites, patterns, updates = cache_reader(as_adapter(model), cache)
    assert not updates
    for found, expected in zip((sites, patterns), read(model), strict=True):
        for index, one in enumerate(found):
            torch.testing.assert_close(one, expected[index])


def test_a_cache_without_batch_dimension_holds_one_prompt(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    sites, patterns, updates = cache_reader(as_adapter(model), cache)
    assert not updates
    assert sites[0].shape == (1, TOKENS.shape[1], D_MODEL)
    assert patterns[0].shape == (1, N_HEADS, TOKENS.shape[1], TOKENS.shape[1])


def test_an_incomplete_cache_says_how_to_make_a_complete_one(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=needed_hooks(model)[:-1])
    missing = r"lacks 1 of 9 hooks.*blocks\.3\.attn\.hook_pattern.*names_filter=.*needed_hooks"
    with pytest.raises(KeyError, match=missing):
        cache_reader(as_adapter(model), cache)


def sees_ahead(model: Any) -> Facade:
    """The model with predictions that depend on the last token as well, whatever it says."""

    class Leaking(Facade):
        def __call__(self, tokens: Tensor, **options: Any) -> Tensor:
            logits = self._model(tokens, **options)
            return logits + 0.1 * logits[:, -1:].roll(1, dims=-1)

    return Leaking(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE)
def test_causal_models_are_known_to_be(tiny: Callable[..., Any], architecture: str) -> None:
    model = tiny(architecture)
    before, calls = hooks_on(model), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: calls.append(x))]):
        as_adapter(model).require_causal("this")
    assert not calls
    assert hooks_on(model).keys() == before.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_later_tokens_is_not_causal_whatever_it_says(dtype: torch.dtype) -> None:
    adapter = as_adapter(tiny_model("llama").to(dtype))
    adapter.require_causal("this")
    leaking = as_adapter(sees_ahead(tiny_model("llama").to(dtype)))
    with pytest.raises(CannotMeasure, match="attends in both directions; this needs a causal"):
        leaking.require_causal("this")


def test_a_native_model_that_reads_both_ways_is_not_causal() -> None:
    bridge = bridge_class()
    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_vocab": 101}
    config = sizes | {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN"}
    as_adapter(bridge.boot_native(dict(config))).require_causal("this")
    model = bridge.boot_native(config | {"attention_dir": "bidirectional"})
    model.cfg.attention_dir = "causal"
    with pytest.raises(CannotMeasure, match="attends in both directions"):
        as_adapter(model).require_causal("this")


def test_fewer_logits_than_tokens_are_named() -> None:
    bridge = bridge_class()
    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_vocab": 101}
    config = sizes | {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN", "d_vocab_out": 50}
    adapter = as_adapter(bridge.boot_native(config))
    assert (adapter.d_vocab, adapter.d_vocab_out) == (101, 50)
    with pytest.raises(CannotMeasure, match="reads 101 tokens and has logits of 50"):
        adapter.require_every_logit("this")
    as_adapter(tiny_model("opt")).require_every_logit("this")


def test_passes_keep_no_keys_and_values_that_nothing_reads(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    adapter, seen = as_adapter(model), []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs.get("past_key_values"))

    handle = model.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    try:
        with adapter.inference():
            adapter.run(TOKENS, mask, lambda site, residual: None)
            edited_logits(adapter, TOKENS, mask)
            run = RecordedRun(adapter, TOKENS, mask)
    finally:
        handle.remove()
    assert seen[:2] == [None, None]
    # Blocks that resume need a place for keys and values, but no recorded ones stay in memory.
    assert None not in seen[2:]
    caches = [weakref.ref(kept) for kept in seen[2:]]
    seen.clear()
    assert len(run.residual) == N_LAYERS + 1
    assert [cache() for cache in caches] == [None] * len(caches)
