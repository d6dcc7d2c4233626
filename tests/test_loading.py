"""Loading: hub names, folders, GGUF files, and what is said of wrong ones."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.models import as_adapter, loading


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


@pytest.mark.real_model
def test_gguf_files_are_loaded_as_they_are(demo_model, tmp_path):
    source = loading._gguf_file()
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
