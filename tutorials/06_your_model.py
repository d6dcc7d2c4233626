# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your model, your prompts, your curves
#
# **You will learn** to load any model, on any device and in any precision; to bring prompts of your own
# and say which belong together; to profile what your own loop, hooks and caches already compute; and
# to test per-layer numbers that were made elsewhere. A few minutes on two CPU cores.
#
# You need no other notebook first.

# %% [markdown]
# ## A model
#
# `load_model` takes a name on the Hugging Face hub, a local folder, a GGUF file, or `"demo"`. With
# TransformerLens 4 it gives a `TransformerBridge`. What you have loaded yourself works as well: a
# `HookedTransformer` or a `TransformerBridge` is an argument of every function, and nothing in it is
# changed.
#
# | you have | you type |
# | --- | --- |
# | a hub name | `ml.load_model("gpt2")` |
# | a gated model | log in first: `hf auth login` |
# | one GPU | `ml.load_model(name, device="cuda", dtype="bfloat16")` |
# | several GPUs | `ml.load_model(name, device_map="auto", dtype="bfloat16")` |
# | a folder or a GGUF file | `ml.load_model("path/to/model")` |
# | your own object | use it as it is |
#
# In half precision sums are still taken in float32 and float64, and results say what rounding does.

# %%
import pandas as pd
import torch

import mspgt_lens as ml

model = ml.load_model(MODEL)
print(type(model).__name__, model.cfg.n_layers, "blocks,", model.cfg.d_model, "wide")

# %% [markdown]
# ## Prompts, and which belong together
#
# Intervals resample *groups*, since the tokens of one document resemble each other. A text is a group of
# its own unless you say otherwise: chunks of one book, or several questions about one passage, belong
# together. Forgetting that makes intervals too narrow, and no warning can tell.

# %%
texts = [passage.text for passage in ml.load_passages()][::6]
halves = [half for text in texts for half in (text[: len(text) // 2], text[len(text) // 2 :])]
documents = [number // 2 for number in range(len(halves))]
prompts = ml.PromptDataset.from_texts(model, halves, groups=documents, max_length=128)
prompts

# %% [markdown]
# Token ids that you have made yourself go through `PromptDataset.from_tokens`; padding that you do not
# declare is found, or asked for. Now the profile, of block signals two that need no attention pattern:

# %%
profile = ml.profile_layers(model, prompts, signals=["novelty", "effective_rank"], progress=False)
ml.plot_profile(profile)

# %% [markdown]
# ## Your own loop and hooks
#
# Whatever runs inside `recording` is profiled: your batches, your edits, your steering. Here every block
# from the middle on reads a residual stream in which the block before wrote only half.

# %%
middle = model.cfg.n_layers // 2


def half(output, hook):
    return output / 2


edits = [(f"blocks.{middle}.hook_{place}_out", half) for place in ("attn", "mlp")]
with ml.recording(model, prompts, signals=["novelty", "effective_rank"]) as record:
    for prompt in prompts:  # Or in batches, with their padding masked
        with torch.no_grad():
            model.run_with_hooks(torch.tensor(prompt.tokens)[None], fwd_hooks=edits)
edited = record.profile()
pd.DataFrame(
    {
        "as it is": profile.relevance.values,
        f"block {middle} writes half": edited.relevance.values,
    }
).rename_axis("site").iloc[middle - 1 :: 3].round(3)

# %% [markdown]
# ## Caches that you already have
#
# One cache, or an iterator of caches one at a time, so that no more than one is in memory:

# %%
names = ml.needed_hooks(model, patterns=False)


def caches():
    for prompt in prompts:
        tokens = torch.tensor(prompt.tokens)[None]
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
        yield cache, tokens


from_caches = ml.profile_cache(
    model, caches(), prompts=prompts, signals=["novelty", "effective_rank"]
)
print("largest difference:", abs(from_caches.relevance.values - profile.relevance.values).max())

# %% [markdown]
# ## Curves from elsewhere
#
# Probe accuracies, norms, entropies of your own or out of a paper: a table with a row per block (or site)
# and a named column per curve is all that the boundary test needs. Here, what this profile has, with
# one column that you might have made.

# %%
table = pd.DataFrame({name: curve.values for name, curve in profile.signals.items()})
table["size of W_out"] = [float(weight.norm()) for weight in model.W_out]
found = ml.segment_blocks(table, n_bootstraps=50)
print(*found.changes_in_words(), sep="\n")
ml.plot_boundaries(found)

# %% [markdown]
# ## Exercise
#
# Do intervals become wider when the halves are taken for documents of their own, or narrower? Guess, then
# profile `halves` without `groups=` and compare `profile.relevance.high - profile.relevance.low`.
#
# <details><summary>Solution</summary>
#
# ```python
# alone = ml.PromptDataset.from_texts(model, halves, max_length=128)
# without = ml.profile_layers(model, alone, signals=["novelty"], progress=False)
# for one in (profile, without):
#     print((one.relevance.high - one.relevance.low).mean())
# ```
#
# Narrower, if halves of one text resemble each other: twice as many groups, which are not twice as many
# witnesses.
#
# </details>
