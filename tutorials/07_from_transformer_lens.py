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
# # Five things you do with TransformerLens, and the call here
#
# **You will learn** what becomes of five everyday habits: the logit lens, activation patching, ablating
# layers, looking at attention, and comparing layers by a number. For each, what you would write
# yourself, and the call that adds groups, intervals and a null. A few minutes on two CPU cores.

# %%
import numpy as np
import torch

import mspgt_lens as ml

model = ml.load_model(MODEL)
texts = [passage.text for passage in ml.load_passages()]
prompts = ml.PromptDataset.from_texts(model, texts[::4], max_length=96)

# %% [markdown]
# ## 1. The logit lens
#
# You would unembed the residual stream of every layer. Early residuals are not written in the
# unembedding's coordinates, so most of the early rows are nonsense. `fit_lens` learns, in closed form and
# in one pass, the affine map from every site to the last; `plot_lens` shows top tokens by site and
# position.

# %%
text = "The capital of France is Paris, and the capital of Italy is"
_, cache = model.run_with_cache(model.to_tokens(text))
residual = cache["blocks.15.hook_resid_post"][0, -1]
with torch.no_grad():
    plain = model.unembed(model.ln_final(residual[None, None]))[0, 0]
print("logit lens:", [model.to_string(token) for token in plain.topk(5).indices])

lens = ml.fit_lens(model, prompts, progress=False)
read = lens.logits(16, residual)  # Site 16 is after block 15
print("ridge lens:", [model.to_string(token) for token in read.topk(5).indices])

# %%
ml.plot_lens(lens, model, text)

# %% [markdown]
# ## 2. Activation patching
#
# You would loop over layers and positions and draw a heat map for a prompt or two. `patch_layers` does it
# for many pairs, runs the model from the patched block on only, and says which cells are more than chance
# over pairs, all cells considered. On the same sweep `method="attribution"` takes two passes, with its
# error measured.
#
# A sweep that you have run in TransformerLens already, as a `PatchingResult` (4.2 and later), need not be
# run again: `ml.results.PatchSweep.from_transformer_lens(result, place="resid_pre", clean=...)` gives it
# groups, the correction over all cells and this figure.

# %%
pairs = ml.tasks.capitals(model, n_pairs=12)
sweep = ml.patch_layers(model, pairs, positions="last", progress=False)
ml.plots.plot_patching(sweep)

# %% [markdown]
# ## 3. Ablating layers
#
# You would zero a block and look at the loss. Zero is far from anything that a model has seen, and every
# block hurts when zeroed. `perturb_scales` changes a segment as much as asked, and sets it beside random
# sets of as many blocks: only what exceeds these is the segment's own.

# %%
thirds = np.linspace(0, model.cfg.n_layers, 4).round().astype(int)[1:3].tolist()
effects = ml.perturb_scales(
    model,
    ml.PromptDataset.from_texts(model, texts[::12], max_length=64),
    thirds,
    perturbations=[ml.Perturbation("noise", 0.3)],
    n_controls=20,
    progress=False,
)
effects.to_dataframe().round(3).head(12)

# %% [markdown]
# ## 4. Looking at attention
#
# You would draw the pattern of one head on one prompt. How far back does a whole layer look, over all
# prompts? `attention_span` leaves the sink on the first token out, which otherwise hides everything.

# %%
profile = ml.profile_layers(model, prompts, progress=False)
span = profile.signals["attention_span"]
print(span.guarantee)
for block in np.linspace(0, model.cfg.n_layers - 1, 5).round().astype(int):
    print(
        f"block {block:2}: {span.values[block]:5.1f} tokens "
        f"({span.low[block]:.1f} to {span.high[block]:.1f})"
    )

# %% [markdown]
# ## 5. Comparing layers by a number
#
# You would plot a norm or a cosine over layers and point at a kink. Is it one? `segment_blocks` asks
# whether several curves change more sharply than everything gradual, and a network with random weights
# is the null for any profile.

# %%
partition = ml.detect_scales(profile=profile, n_bootstraps=50)
print(partition.summary())
ml.plot_boundaries(partition)

# %% [markdown]
# ## Exercise
#
# In which block does the capital begin to be read at the last position? Use `sweep.to_dataframe()`, and
# believe only cells that the test over pairs supports.
#
# <details><summary>Solution</summary>
#
# ```python
# table = sweep.to_dataframe()
# table[(table.p_value < 0.05) & (table.low > 0)].block.min()
# ```
#
# </details>
