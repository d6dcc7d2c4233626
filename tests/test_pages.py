"""Code on pages runs, on a tiny model in place of the one that it names.

Blocks of a page run in order in one namespace. It holds what pages leave to the reader: a model,
prompts, texts, tokens, pairs, results of several models, arrays.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import transformer_lens
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import mspgt_lens as ml
from mspgt_lens.perturbation import registry

ROOT = Path(__file__).parents[1]
# The page of errors is made from the source, what has changed is history.
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "docs/reference/*.md")
    for page in sorted(ROOT.glob(pattern))
    if page.name not in ("CHANGELOG.md", "errors.md")
]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def model():
    # As deep as the blocks that pages name.
    made = tiny_model("llama", n_layers=14, n_ctx=512)
    made.tokenizer = tiny_tokenizer()
    return made


@pytest.fixture
def scope(model, monkeypatch, tmp_path):
    """What pages take for granted; models that they load are the tiny one."""
    passages = [replace(ml.load_passages()[0], text=as_text(row)) for row in random_tokens(15, 128)]

    def load(*_, **__):
        return model

    hooked = type("HookedTransformer", (), {"from_pretrained": load})
    # TransformerLens 4 has none, and says so when it is asked.
    monkeypatch.setitem(vars(transformer_lens), "HookedTransformer", hooked)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", load)
    for name in ("load_model", "load_demo_model"):
        monkeypatch.setattr(ml, name, load)
    monkeypatch.setattr(ml, "load_passages", lambda: passages)
    several = ml.synthetic.synthetic_models(2, 4)
    # It takes many times as long as all else here, and has tests of its own.
    monkeypatch.setattr(ml, "analyze", lambda *_, **__: SimpleNamespace(results=several[0]))
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    # No browser is opened.
    monkeypatch.setattr(go.Figure, "show", lambda figure: None)
    # As torchrun has it for one process alone; any port is free.
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    texts = [passage.text for passage in passages]
    (tmp_path / "texts.txt").write_text("\n".join(texts), "utf-8")
    prompts = ml.PromptDataset.from_texts(model, texts, max_length=384)
    tokens = torch.stack([torch.from_numpy(prompt.tokens) for prompt in prompts])
    z = np.random.default_rng(0).standard_normal((200, 2))
    clean, corrupted = random_tokens(2, 8), random_tokens(2, 8, seed=1)
    return {
        "ml": ml,
        "np": np,
        "pd": pd,
        "torch": torch,
        "model": model,
        "texts": texts,
        "documents": texts,
        "rows": [{"text": text, "url": text[:9]} for text in texts],
        "prompts": prompts,
        "tokens": tokens,
        "mask": torch.ones_like(tokens, dtype=torch.bool),
        "groups": list(range(len(tokens))),
        "batches": tokens.split(5),
        "my_edits": [],
        "partition": [4, 9],
        "clean": clean,
        "corrupted": corrupted,
        "clean_tokens": clean,
        "corrupted_tokens": corrupted,
        "templates": ["first", "second"],
        "answer": clean[:, 0],
        "foil": corrupted[:, 0],
        "names": ["one"],
        "results": several,
        "z": z,
        "y": z @ [1.0, 0.5] + np.random.default_rng(1).standard_normal(200),
    }


# Shapes are checked where the functions are tested.
@pytest.mark.simulation
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_code_on_a_page_runs(page, scope):
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)
