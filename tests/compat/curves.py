"""Profile the demo model on fixed prompts, once per model class that TransformerLens has here.

Run as ``python tests/compat/curves.py OUT``; writes ``OUT-<class>.safetensors`` for each class.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

import mspgt_lens
from mspgt_lens import models
from mspgt_lens.models import loading

N_PASSAGES = 10
N_TOKENS = 160
N_FOLDS = 3


def demo_models(cache_dir: str | None) -> Iterator[Any]:
    """The demo model in every class that the installed TransformerLens offers."""
    yield mspgt_lens.load_demo_model(cache_dir)
    if models.bridge_class() is None:
        return
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return
    model, tokenizer = loading._load_huggingface(cache_dir)
    yield models.hooked_llama_from_huggingface(
        model, tokenizer, loading.NAME, loading._HOOKED_CONTEXT
    )


def first_tokens(model: Any) -> mspgt_lens.PromptDataset:
    """The first tokens of passages spread over all topics, without BOS."""
    passages = mspgt_lens.load_passages()
    adapter = models.as_adapter(model)
    rows = []
    for passage in passages[:: len(passages) // N_PASSAGES][:N_PASSAGES]:
        ids = adapter.tokenize(passage.text)[:N_TOKENS]
        if len(ids) < N_TOKENS:
            raise SystemExit(
                f"passages must have {N_TOKENS} tokens, got {len(ids)} in one on {passage.topic!r}"
            )
        rows.append(ids)
    return mspgt_lens.PromptDataset.from_tokens(rows)


def main(out: str, *options: str) -> None:
    """Write one profile per model class."""
    names = ("transformer-lens", "transformers", "numpy", "torch")
    # One thread: sums in one order, and no waiting where other processes share the cores.
    torch.set_num_threads(1)
    print(", ".join(f"{name} {metadata.version(name)}" for name in names), flush=True)
    with tempfile.TemporaryDirectory() as fresh:
        # A fresh cache folder makes this environment convert the weights itself.
        for model in demo_models(fresh if "--convert" in options else None):
            start = time.perf_counter()
            with warnings.catch_warnings():
                # The sample is small on purpose: no number here is interpreted.
                warnings.filterwarnings("ignore", message=".*cannot be told from 0")
                profile = mspgt_lens.profile_layers(
                    model, first_tokens(model), n_folds=N_FOLDS, progress=False
                )
            seconds = time.perf_counter() - start
            path = profile.save(f"{out}-{type(model).__name__}")
            print(f"{type(model).__name__}: profiled in {seconds:.0f} s, wrote {path}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or set(sys.argv[2:]) - {"--convert"}:
        raise SystemExit(f"usage: {sys.argv[0]} OUT [--convert]")
    main(*sys.argv[1:])
