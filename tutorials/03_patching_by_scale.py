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
# # What does each scale do?
#
# Curves over depth say what can be *read* at a layer. They do not say what the layer is *for*. To see
# that, change it: put the activations of one prompt into another, add noise, and watch what becomes of
# the answer, of the loss, of the text that is written. This notebook does so by layer, by position and
# by scale, with an interval and a control beside every effect.
#
# **You will learn** to patch a task layer by layer and head by head, and tell real cells from chance; to
# hold a segment against random sets of blocks; to choose a noise whose answer means something; and to
# see which tokens, and what in written text, suffers. About ten minutes on two CPU cores.
#
# What a partition is, and when its segments stand on anything, is told in the second notebook.

# %% [markdown]
# ## Segments to speak of
#
# The theory's scales are segments of blocks: Local, Intermediate, Global. `detect_scales` places two
# boundaries where they fit best *whether or not* the data support any (see the second tutorial).
# Read its first line before you call the segments stages.

# %%
import mspgt_lens as ml

model = ml.load_model(MODEL)
texts = [passage.text for passage in ml.load_passages()]
prompts = ml.PromptDataset.from_texts(model, texts[::5], max_length=128)
profile = ml.profile_layers(model, prompts, progress=False)
partition = ml.detect_scales(profile=profile)
print(partition.summary())
print(dict(partition.segments))

# %% [markdown]
# ## One task, patched block by block
#
# *Then Mary and John went to the store. John gave a book to* — Mary. In the corrupted prompt the other
# name gives, so the other one is the answer. `patch_layers` puts the clean prompt's residual stream into
# the corrupted run, one block and position at a time, and reads the difference of the two names'
# logits. Effects run from 0 (the corrupted run) to 1 (the clean one).
#
# The pairs are made for the model's own tokenizer, so that clean and corrupted line up token by token.
# `ml.tasks` has more: agreement, capitals, a cue far back, induction. `PromptPairs.from_texts` takes
# your own.

# %%
pairs = ml.tasks.indirect_objects(model, n_pairs=16)
sweep = ml.patch_layers(model, pairs, progress=False)
print(f"logit difference: {sweep.clean:.2f} clean, {sweep.corrupted:.2f} corrupted")
print(*sweep.warnings, sep="\n")
ml.plots.plot_patching(sweep, partition)

# %% [markdown]
# **How to read it.** Rows are blocks, columns are positions. A bright cell is a place whose content alone
# brings the answer back. In early blocks that is where the prompts differ: the giver's name. In late
# blocks it is the last token, where the answer is read. Dots mark cells whose change differs from none
# by a sign-flip test over pairs, corrected over all cells.
#
# Where does the answer move from one place to the other? As numbers:

# %%
table = sweep.to_dataframe()
last = table[table.position == table.position.max()]
last.iloc[:: max(1, len(last) // 10)][["block", "token", "value", "low", "high", "p_value"]].round(
    3
)

# %% [markdown]
# Which heads write it? `place="z"` patches every attention head's output on its own; `positions="last"`
# looks only where the answer is read.

# %%
heads = ml.patch_layers(model, pairs, place="z", positions="last", progress=False)
heads.to_dataframe().nlargest(6, "value")[
    ["block", "head", "value", "low", "high", "p_value"]
].round(3)

# %% [markdown]
# Exact patching runs the model once for each cell. One backward pass gives a first-order estimate of all
# of them, and 48 cells are patched exactly to say how far to trust it:

# %%
quick = ml.patch_layers(model, pairs, method="attribution", progress=False)
quick.attribution_error

# %% [markdown]
# ## One task, patched by scale
#
# Now everything that the blocks of one segment *write*, at all positions at once. The control is what
# makes this worth looking at: random sets of as many blocks from anywhere in the model. A segment that
# does no more than they do is no functional unit for this task.

# %%
by_scale = ml.patch_scales(model, pairs, partition, n_controls=119, progress=False)
print(*by_scale.warnings, sep="\n")
by_scale.to_dataframe().round(3)

# %%
ml.plots.plot_scale_patch(by_scale)

# %% [markdown]
# ## How much noise does each scale bear?
#
# Noise has a *shape*, and the shape decides the answer. **Isotropic** noise is sized by the residual's
# root mean square, as in the literature. A few massive coordinates own most of that in real models, so
# isotropic noise swamps everything else. **Covariance-shaped** noise gives every direction the same
# strength, in units of its own spread. A model may look many times more brittle under one than under the
# other, so both are always measured.

# %%
few = ml.PromptDataset.from_texts(model, [" ".join(t.split()[:32]) for t in texts[::20]])
brittle = ml.measure_brittleness(model, few, partition, levels=(0.05, 0.5), progress=False)
ml.plots.plot_brittleness(brittle)

# %%
ratios = brittle.ratios()
ratios[ratios["mode"] == "equal_energy"].round(3)

# %% [markdown]
# `ratio` is that of the initial slopes of KL divergence between two segments that get the same total
# noise. Read its interval: where it holds 1, the segments cannot be told apart.
#
# ## Which tokens does a scale matter to?
#
# MSPGT predicts a diagonal: perturbing the Local blocks should hurt the tokens that depend on the word
# just before, perturbing the Global blocks those that depend on words far back. `token_classes` sorts
# tokens by the longest context that makes them more likely; `measure_dissociation` perturbs each segment.

# %%
some = ml.PromptDataset.from_texts(model, texts[::8], max_length=112)
classes = ml.classify_tokens(model, some, n_tokens=200, progress=False)
print(classes.counts)
table = ml.measure_dissociation(model, some, partition, classes, progress=False)
print("interaction:", table.interaction, "p =", round(table.interaction.p_value, 3))
ml.plots.plot_dissociation(table)

# %% [markdown]
# The *interaction* is above 0 where the diagonal holds more than strong segments and sensitive tokens
# explain on their own. Its interval says whether this text shows it.
#
# ## What breaks in the text that is written?
#
# The first version of the theory predicts that Local interventions move lexical diversity, Intermediate
# ones sentences, Global ones coherence. Here every prompt is continued with and without an intervention,
# with the same random numbers, and all segments get the same *effect*: the strength at which predictions
# move by half a nat. (A few prompts and short texts keep this notebook short; take 50 prompts or more
# for an answer.)

# %%
starts = [" ".join(text.split()[:24]) for text in texts[::8]]
written = ml.generation_effects(
    model,
    starts,
    partition,
    perturbations=[ml.Perturbation("noise")],
    n_new=32,
    n_controls=1,
    progress=False,
)
print(written.summary())
print("without: ", written.clean_texts[0])
for segment, continued in zip(written.segments, written.texts[0], strict=True):
    print(f"{segment}: ", continued[0])

# %%
ml.plots.plot_effects(written)

# %% [markdown]
# ## What this does not show
#
# - A patch shows that an activation is *enough* to bring the answer back (or to destroy it, with
#   `direction="noise"`), for this task, on these pairs. It does not show that nothing else would be.
# - Segments are compared with random sets of blocks, which are scattered. A segment may stand out
#   because its blocks are neighbors, not because it is a stage.
# - Perturbed activations are not those of any text. Effects of strong noise say what breaks first, not
#   what a segment is for.
# - Where the partition is not supported by the data, the segments here are names for thirds of the depth,
#   more or less. So are all conclusions about them.

# %% [markdown]
# ## Exercise
#
# Which blocks *write* the answer at the last position, and is it their attention or their MLP? The residual
# stream cannot tell, since it holds all that came before. Patch what each of both adds
# (`place="attn_out"`, `place="mlp_out"`).
#
# <details><summary>Solution</summary>
#
# ```python
# for place in ("attn_out", "mlp_out"):
#     added = ml.patch_layers(model, pairs, place=place, positions="last", progress=False)
#     print(place)
#     print(added.to_dataframe().nlargest(3, "value")[["block", "value", "low", "high", "p_value"]])
# ```
#
# Attention, in SmolLM2: that of block 23 alone brings back 85% of the answer, with block 20 next. No MLP
# brings back more than 6%, and none can be told from chance.
#
# </details>
