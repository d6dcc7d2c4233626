"""Loading: hub names, folders, GGUF files, and what is said of wrong ones."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.models import as_adapter, loading, placing


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what it is asked for."""
    asked = []
    bridge = SimpleNamespace(boot_transformers=lambda name, **given: asked.append((name, given)))
    monkeypatch.setattr(loading, "bridge_class", lambda: bridge)
    return asked


def test_hub_names_go_to_transformer_lens(hub):
    ml.load_model("gpt2")
    ml.load_model("EleutherAI/pythia-70m", revision="step512", device="cpu")
    assert hub == [
        ("gpt2", {"device": None}),
        ("EleutherAI/pythia-70m", {"device": "cpu", "revision": "step512"}),
    ]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_folders_of_save_pretrained_are_loaded(tmp_path, architecture):
    model = tiny_model(architecture)
    inner = model.original_model
    clean = getattr(transformers, type(inner).__name__)(inner.config)
    clean.save_pretrained(tmp_path / "mine")
    tiny_tokenizer().save_pretrained(tmp_path / "mine")
    found = ml.load_model(str(tmp_path / "mine"))
    assert as_adapter(found).name == "mine"
    assert (as_adapter(found).mask_id is not None) == (architecture == "bert")
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(tokens), clean.eval()(tokens).logits)


def test_devices_and_precision_go_to_transformer_lens(hub):
    ml.load_model("gpt2", dtype="bfloat16", n_devices=2)
    ml.load_model("gpt2", dtype=torch.float16, device_map="auto", max_memory={0: "2GiB"})
    assert hub == [
        ("gpt2", {"device": None, "dtype": torch.bfloat16, "n_devices": 2}),
        (
            "gpt2",
            {
                "device": None,
                "dtype": torch.float16,
                "device_map": "auto",
                "max_memory": {0: "2GiB"},
            },
        ),
    ]


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"dtype": "int8"}, TypeError, "dtype must be one of float32, bfloat16, .*, got 'int8'"),
        ({"dtype": torch.int64}, TypeError, "dtype must be one of"),
        ({"device": "cpu", "n_devices": 2}, ValueError, "give one of them"),
        ({"device": "cpu", "device_map": "auto"}, ValueError, "give one of them"),
        ({"n_devices": 2, "device_map": "auto"}, ValueError, "both say how to spread"),
        ({"n_devices": 0}, ValueError, "n_devices must be at least 1, got 0"),
        ({"max_memory": {0: "1GiB"}}, ValueError, "max_memory bounds what a spread model takes"),
    ],
)
def test_contradictions_are_named_before_anything_is_loaded(hub, given, error, named):
    with pytest.raises(error, match=named):
        ml.load_model("gpt2", **given)
    assert not hub


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", torch.bfloat16])
def test_folders_are_loaded_in_the_precision_asked_for(tmp_path, dtype):
    place = saved("llama", tmp_path)
    found, full = ml.load_model(place, dtype=dtype), ml.load_model(place)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {weights.dtype for weights in found.parameters()} == {expected}
    # Rotary frequencies are no weights: in half precision, late positions would run together.
    kept = {b.dtype for name, b in found.original_model.named_buffers() if "inv_freq" in name}
    assert kept == {torch.float32}
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).float(), full(tokens), atol=0.05, rtol=0.05)


def test_folders_go_where_a_device_map_says(tmp_path, monkeypatch):
    place = saved("llama", tmp_path)
    load, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def noted(name, **given):
        asked.append(copy.deepcopy({k: v for k, v in given.items() if k != "dtype"}))
        return load(name, **given)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", noted)
    ml.load_model(place)
    sizes = {"cpu": "1GiB"}
    ml.load_model(place, device_map="auto", max_memory=sizes)
    assert sizes == {"cpu": "1GiB"}
    ml.load_model(place, device="meta")
    assert asked == [
        {},
        {"device_map": "auto", "max_memory": {"cpu": "1GiB"}},
        {"device_map": {"": "meta"}},
    ]
    offloaded = ml.load_model(place, device_map="auto", max_memory={"cpu": "1KiB"})
    with pytest.raises(ml.CannotMeasure, match=r"embedding of .* is not in memory .*max_memory="):
        as_adapter(offloaded).embedding()
    with pytest.raises(ValueError, match="CUDA"):
        ml.load_model(place, n_devices=64)
    with pytest.raises(ValueError, match="the demo model is small"):
        ml.load_model("demo", device_map="auto")


def test_transformer_lens_2_spreads_by_number_of_devices_only(monkeypatch):
    monkeypatch.setattr(placing, "bridge_class", lambda: None)
    with pytest.raises(RuntimeError, match="device_map and max_memory need transformer-lens >= 3"):
        ml.load_model("gpt2", device_map="auto")


def saved(architecture, folder, change=lambda weights, config: None):
    """A folder whose weights and config were changed after saving."""
    inner = tiny_model(architecture).original_model
    config = copy.deepcopy(inner.config)
    clean = getattr(transformers, type(inner).__name__)(config)
    clean.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    change(weights, written)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(written))
    return str(folder)


def without(*names):
    """Weights whose names hold one of these are not on file."""

    def change(weights, config):
        for key in [key for key in weights if any(name in key for name in names)]:
            del weights[key]

    return change


def one_block_less(weights, config):
    config["num_hidden_layers"] = 3


def biases_that_config_does_not_know(weights, config):
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)


def a_vocabulary_of_another_size(weights, config):
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:50].clone()


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("llama", without("lm_head"), "has no lm_head.weight, so random numbers"),
        ("neox", without("embed_out", "lm_head"), "has no (embed_out|lm_head).weight"),
        ("qwen2", without("layers.2.self_attn.k_proj.bias"), "has no model.layers.2.*k_proj.bias"),
        ("llama", without("layers.3."), "has no model.layers.3.*, .* and 5 more"),
        ("bert", without("cls.predictions.transform"), "has no cls.predictions.transform"),
        ("llama", one_block_less, "holds model.layers.3.*config.json has no place"),
        ("llama", biases_that_config_does_not_know, "holds model.layers.1.self_attn.q_proj.bias"),
        ("llama", a_vocabulary_of_another_size, "embed_tokens|mismatch"),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path, architecture, change, named):
    with pytest.raises((ValueError, RuntimeError), match=named):
        ml.load_model(saved(architecture, tmp_path, change))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "roberta", "bert"])
def test_tied_heads_need_no_weights_of_their_own(tmp_path, architecture):
    names = []
    place = saved(architecture, tmp_path, lambda weights, _: names.extend(weights))
    assert not [name for name in names if name.startswith("lm_head.weight")]
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(ml.load_model(place)(tokens), ml.load_model(place)(tokens))


def test_models_of_the_hub_are_held_to_it_too(tmp_path, monkeypatch):
    """TransformerLens loads them by transformers, and says nothing of what was missing."""
    place = saved("llama", tmp_path, without("lm_head"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = transformers.PreTrainedModel.__dict__["from_pretrained"]
    bridge = SimpleNamespace(boot_transformers=lambda name, **given: load(place))
    monkeypatch.setattr(loading, "bridge_class", lambda: bridge)
    with pytest.raises(ValueError, match=r"weights of some/name .* has no lm_head.weight"):
        ml.load_model("some/name")
    # Nothing of it is left behind.
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is found
    load(place)


@pytest.mark.real_model
def test_gguf_files_are_loaded_as_they_are(demo_model, tmp_path):
    source = loading.demo_file()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "only.gguf").symlink_to(source)
    found = ml.load_model(str(tmp_path / "model"))
    adapter = as_adapter(found)
    assert (adapter.name, adapter.family) == ("only", "Llama")
    tokens = torch.from_numpy(np.arange(100, 120))[None]
    with torch.no_grad():
        torch.testing.assert_close(found(tokens), demo_model(tokens))
    assert adapter.tokenize("a b") == as_adapter(demo_model).tokenize("a b")


def test_what_cannot_be_loaded_is_named(tmp_path, hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing at"):
        ml.load_model("./nowhere")
    with pytest.raises(FileNotFoundError, match="nothing at"):
        ml.load_model("missing.gguf")
    for name in ("demo", str(tmp_path)):
        with pytest.raises(ValueError, match="is local: leave it out"):
            ml.load_model(name, revision="main")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds 2 GGUF files: name one of them"):
        ml.load_model(str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        ml.load_model(str(tmp_path / "a.gguf"))
    monkeypatch.setattr(loading, "bridge_class", lambda: None)
    with pytest.raises(RuntimeError, match="transformer-lens >= 3"):
        ml.load_model(str(tmp_path))
