"""What differs between versions of TransformerLens though it must not, on tiny models.

Run as ``python tests/compat/behavior.py OUT``, once in every environment: hooks of the user survive
a call and act in it, prompts are read alike however they are padded, sweeps become results of
TransformerLens and come back where it has them, and a profile is written to
``OUT-<class>.safetensors``, to be compared with that of other versions.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformer_lens import patching

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import random_model, random_tokens, tiny_config

import mspgt_lens as ml
from mspgt_lens import models

N_CTX = 64
BANDS = {"local": (1, 1), "intermediate": (2, 4)}


def tiny_models() -> Iterator[Any]:
    """A model with rotary positions in every class that is here, and one with learned positions."""
    llama = random_model(tiny_config("llama", n_ctx=N_CTX))
    if models.bridge_class() is not None:
        yield models.bridge_from_huggingface(llama, None, "tiny-llama")
        gpt2 = random_model(tiny_config("gpt2", n_ctx=N_CTX))
        yield models.bridge_from_huggingface(gpt2, None, "tiny-gpt2")
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return
    llama = random_model(tiny_config("llama", n_ctx=N_CTX))
    yield models.hooked_llama_from_huggingface(llama, None, "tiny-llama", N_CTX)
    sizes = {"n_layers": 4, "d_model": 32, "d_head": 8, "n_ctx": N_CTX, "d_vocab": 101}
    learned = HookedTransformerConfig(**sizes, act_fn="gelu", seed=0, model_name="tiny-learned")
    yield HookedTransformer(learned).eval()


def pairs(n_pads: int) -> ml.PromptPairs:
    """The same pairs after so many pads."""
    clean, corrupted = random_tokens(4, 6), random_tokens(4, 6)
    corrupted[:, 2] = random_tokens(4, 6, seed=1)[:, 2]
    answer, foil = random_tokens(4, 2, seed=2).T
    before = torch.full((4, n_pads), 7)
    mask = torch.cat([torch.zeros_like(before), torch.ones_like(clean)], dim=1).bool()
    both = (torch.cat([before, tokens], dim=1) for tokens in (clean, corrupted))
    return ml.PromptPairs.from_tokens(*both, answer, foil, mask=mask)


def check_padding(model: Any) -> None:
    """Pads on the left change no effect."""
    plain, padded = (ml.patch_layers(model, pairs(n), progress=False) for n in (0, 2))
    difference = np.abs(padded.by_pair[:, :, 2:] - plain.by_pair).max()
    if not difference < 1e-4 * np.ptp(plain.by_pair):
        raise SystemExit(f"left-padded pairs are patched otherwise, by {difference:.3g}")


def check_hooks(model: Any) -> None:
    """A hook of the user stays, and acts in every call."""
    free = ml.patch_layers(model, pairs(0), progress=False)
    seen: list[int] = []

    def halve(residual: Any, hook: Any) -> Any:
        seen.append(1)
        return residual / 2

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", halve)]):
        first, second = (ml.patch_layers(model, pairs(0), progress=False) for _ in range(2))
        seen.clear()
        model(random_tokens(1, 5))
        if not seen:
            raise SystemExit("a call removed the user's own hook")
    if not np.array_equal(first.by_pair, second.by_pair):
        raise SystemExit("a second call under the user's own hook gave other numbers")
    if np.abs(first.by_pair - free.by_pair).max() < 1e-3:
        raise SystemExit("the user's own hook did not act in a call")
    if not np.array_equal(ml.patch_layers(model, pairs(0), progress=False).by_pair, free.by_pair):
        raise SystemExit("the user's own hook still acts after it was removed")


def check_patching_results(model: Any) -> None:
    """A sweep becomes TransformerLens's own result and comes back, or that has no such results."""
    sweep = ml.patch_layers(model, pairs(0), place="z", progress=False)
    try:
        result = sweep.to_transformer_lens()
    except ImportError:
        if hasattr(patching, "PatchingResult"):
            raise
        return
    back = ml.results.PatchSweep.from_transformer_lens(
        result, place="z", clean=sweep.clean_by_pair, groups=sweep.groups
    )
    for name in ("by_pair", "effect", "low", "high", "p_values"):
        if not np.array_equal(getattr(back, name), getattr(sweep, name)):
            raise SystemExit(f"{name} is another after a sweep was a PatchingResult")


def main(out: str) -> None:
    """Check every model; write the profile of the rotary one in each class."""
    torch.set_num_threads(1)
    names = ("transformer-lens", "transformers", "torch")
    print(", ".join(f"{name} {metadata.version(name)}" for name in names), flush=True)
    for model in tiny_models():
        check_hooks(model)
        check_padding(model)
        check_patching_results(model)
        name = str(model.cfg.model_name)
        print(f"{type(model).__name__} {name}: hooks, padding and results passed", flush=True)
        if name == "tiny-llama":
            prompts = ml.PromptDataset.from_tokens(random_tokens(12, 48).tolist())
            with warnings.catch_warnings():
                # The sample is small on purpose: no number here is interpreted.
                warnings.simplefilter("ignore")
                profile = ml.profile_layers(
                    model, prompts, bands=BANDS, n_folds=3, skip_first=4, progress=False
                )
            profile.save(f"{out}-{type(model).__name__}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} OUT")
    main(sys.argv[1])
