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
# # Do a model's layers fall into stages?
#
# The Multi-Scale Probabilistic Generation Theory says that a Transformer's blocks form three segments,
# Local, Intermediate and Global, with two sharp boundaries. A plain fit of three stages finds two
# boundaries in *any* curve that changes with depth, even in a network with random weights. So the
# question is put differently here: is there anything sharp **beyond gradual drift**?
#
# This notebook asks it of three things whose answers can be compared: a model, the same model with
# random weights, and signals with boundaries that were planted.
#
# **You will learn** to test a model's layers for sharp changes; to read the evidence, and what to do
# when there is none; to hold a finding against a network with random weights and against planted
# boundaries; and to tell whether your model is deep enough for an answer. About six minutes on two CPU
# cores.
#
# What the curves are is told in the first notebook; you can go on without it.

# %% [markdown]
# ## A model
#
# `detect_scales` takes the information curves after each block, and the block signals such as attention
# span, 14 signals in all. It describes them by everything gradual (straight lines, noise, random walks,
# smooth curves, for every signal its likeliest kind), and asks whether some of them change sharply
# at the same block: by a **jump**, which moves the level, or a **bend**, which moves the rate of change.
# p says how often gradual change alone gives as much evidence.

# %%
import mspgt_lens as ml

model = ml.load_model(MODEL)
passages = ml.load_passages()[::3]
prompts = ml.PromptDataset.from_texts(model, [p.text for p in passages], max_length=192)
profile = ml.profile_layers(model, prompts, progress=False)
partition = ml.detect_scales(profile=profile)
print(partition.summary())

# %%
ml.plot_boundaries(partition)

# %% [markdown]
# **How to read it.** Each row is one signal, on the left its ranks, blue where it is low and orange where
# it is high among this model's own blocks, on the right its level. A solid line is a jump, a dashed one a
# bend, each with its block and its size in units of a typical block's change; what one signal shows alone
# is marked in its row only. Crosses are what the first or the last block changes, which is not counted.
# Below is the share of bootstrap draws with a boundary at each block. Nothing is drawn that the data do
# not support: `ml.plot_boundaries(partition, unsupported=True)` shows the best places too.
#
# - `n_boundaries` is the number of boundaries that the data ask for, `found` what they are. 0 means that
#   gradual change does as well.
# - `p_values` says how sure each number of boundaries is.
# - `boundaries` are the best two places *in any case*, since later steps may want a partition. Where
#   `supported` is false, not all of them are boundaries, and `summary()` says which.
# - `sharpness` leaves out one block after the other and predicts it from the rest: by stages alone, by
#   drift alone, by both. The least error describes the depth best.

# %%
print("p-values by number:         ", {k: round(p, 3) for k, p in partition.p_values.items()})
print("error of left-out blocks:   ", {k: round(v, 2) for k, v in partition.sharpness.items()})
print("drift:", partition.drift)
print(*partition.warnings, sep="\n")

# %% [markdown]
# Does the answer hang on one signal? `by_signal` leaves out one at a time:

# %%
import pandas as pd

pd.DataFrame.from_dict(
    dict(partition.by_signal), orient="index", columns=ml.results.Support._fields
)

# %% [markdown]
# Other ways to place two boundaries, among them two published detectors and two that do not look at the
# data at all. If they disagree, a figure with *the* boundaries of this model would show a choice of
# method.

# %%
print(partition.by_method)
partition.agreement.round(2)

# %% [markdown]
# ## The same model with random weights
#
# `control="random_weights"` draws all weights anew for the time of one profile, as large as the trained
# ones of the same kind but the same in every block. Such a network has no stages that were learned.
# Whatever is found in it is what the architecture and the method give for free: its curves settle
# smoothly, and by chance one network in twenty may be called (docs/boundaries.md says what was found in
# ten), and as many list a change of one signal alone. What a trained model shows has to be larger to
# mean anything.

# %%
twin_profile = ml.profile_layers(model, prompts, control="random_weights", progress=False)
twin = ml.detect_scales(profile=twin_profile)
print(twin.summary())
ml.plot_boundaries(twin)

# %%
print("plain stages would put boundaries at", twin.by_method["stages"], "in a random network")

# %% [markdown]
# ## Boundaries that were planted
#
# Signals as deep as the model, with two jumps of four times the noise on top of a ramp. This is what an
# answer looks like when there is one.

# %%
planted = ml.synthetic.synthetic_signals(
    model.cfg.n_layers, 14, effect=4.0, drift="ramp", drift_size=2.0, seed=3
)
found = ml.segment_blocks(planted.signals)
print("planted at", planted.boundaries)
print(found.summary())
ml.plot_boundaries(found)

# %% [markdown]
# And how often would such jumps be found at this depth? `rejected` is the share of draws with p < 0.05,
# `located` the share with both boundaries within one block.

# %%
print(ml.synthetic.power(model.cfg.n_layers, 14, effect=4.0, n_simulations=20))
print(ml.synthetic.power(model.cfg.n_layers, 14, effect=2.0, n_simulations=20))
print(ml.synthetic.power(model.cfg.n_layers, 14, n_boundaries=0, drift="ramp", n_simulations=20))

# %% [markdown]
# ## What this does not show
#
# - *No boundary beyond gradual change* does not say that all blocks do the same. It says that what they do
#   changes gradually, or that jumps are too small to be seen among so few blocks: compare with `power`.
# - Signals that wander with depth (a high `autocorrelation`) hide jumps and look like them. The result
#   warns.
# - A boundary in these signals is a change in what can be *read*. Whether the segments also *do*
#   different things is a question for interventions.
# - Try other texts and seeds before you believe a place: `ml.studies.stability(model, [texts, other_texts])`
#   makes the table, `ml.plots.plot_stability` the figure.

# %% [markdown]
# ## Exercise
#
# A change need not be a step. Plant one *bend*, from which on signals change at another rate
# (`kind="bends"`), by as much per block as the noise is large, then by half of that. Does the test find
# it, where it is, and call it a bend?
#
# <details><summary>Solution</summary>
#
# ```python
# for effect in (1.0, 0.5):
#     bent = ml.synthetic.synthetic_signals(
#         model.cfg.n_layers, 14, n_boundaries=1, kind="bends", effect=effect, seed=5
#     )
#     again = ml.segment_blocks(bent.signals)
#     print("planted at", bent.boundaries)
#     print(*again.changes_in_words(), sep="\n")
# ```
#
# At 30 blocks the larger one is found at its block, 20, and called a bend; the smaller one is not found: a
# bend of half the noise per block looks like gradual change.
#
# </details>
