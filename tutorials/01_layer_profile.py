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
# # What does each layer keep, and what does it predict?
#
# A language model reads tokens and predicts the next one. Somewhere between its first and its last
# layer, information about the words just read gives way to information about the words to come. This
# notebook measures where, for any model that TransformerLens loads, with an interval around every
# number.
#
# **You will learn** to measure what every layer retains and predicts; to read the curves, their
# intervals and the information plane; to ask at which depth each distance is read best; and to get the
# same from a cache that you have already. About ten minutes on two CPU cores.
#
# You need no other notebook first.

# %% [markdown]
# ## One pass over some text
#
# `load_passages()` has 120 short texts on 12 topics, each about one thing from start to end. Every
# third one is enough here. A text is a *group*: everything that follows is fitted on some groups and
# tested on others, and the intervals say how much the numbers would move with other texts.

# %%
import mspgt_lens as ml

model = ml.load_model(MODEL)
passages = ml.load_passages()[::3]
prompts = ml.PromptDataset.from_texts(model, [p.text for p in passages], max_length=320)
profile = ml.profile_layers(model, prompts, progress=False)

# %%
ml.plot_profile(profile)

# %% [markdown]
# **How to read it.** Site *l* is the residual stream before block *l*; the last site comes after the
# last block.
#
# - *Retained, local* is how many nats better than word frequencies a linear reader can still tell the
#   token just read. A token carries no more than the line drawn above it. The curve falls with depth: the
#   stream stops being a copy of its input.
# - *Predicted, local* is the same for the next token. It is read off the site by an affine map into the
#   model's own unembedding, or by a linear reader where that tells more, and at the last site it is what
#   the model itself gains. *Relevance* is the affine map alone.
# - The intermediate and global rows ask for the average of tokens 2 to 16 and 17 to 48 away, as a Gaussian
#   reads it (nats about that average, which are not nats about a token). They are much smaller: few of a
#   text's words are given away so far ahead.
# - *Compression* is what a noisy channel would need to carry the stream: an upper bound on how much of
#   the input it can hold.
#
# Hover over a curve for its values in words. The numbers are also a table:

# %%
table = profile.to_dataframe()
table[(table.quantity == "predicted") & (table.scale == "local")].iloc[::5].round(3)

# %% [markdown]
# ## From past to future
#
# The information plane puts what is kept against what is predicted. A step to the left forgets; a step
# up predicts more. If the layers only forgot, the paths would run straight to the left.

# %%
ml.plots.plot_information_plane(profile)

# %% [markdown]
# ## At which depth is each distance read best?
#
# Bands are yours to choose. `OFFSET_BANDS` reads single offsets, 1, 2, 4 ... 64 tokens away. Each row is
# shown as a share of its own maximum. Rows that cannot be told from zero stay blank: with this little
# text, far single tokens are beyond what a reader can learn.

# %%
scale_map = ml.profile_layers(model, prompts, bands=ml.OFFSET_BANDS, progress=False)
ml.plots.plot_scale_map(scale_map)

# %% [markdown]
# ## You already have a cache?
#
# `profile_cache` gives the same curves from an `ActivationCache`. Keep only the hooks that it reads:

# %%
import torch

few = ml.PromptDataset.from_texts(model, [p.text for p in passages[:24]], max_length=128)
tokens = torch.stack([torch.from_numpy(p.tokens) for p in few if len(p.tokens) == 128])
groups = [p.group for p in few if len(p.tokens) == 128]
with torch.no_grad():
    _, cache = model.run_with_cache(tokens, names_filter=ml.needed_hooks(model))
from_cache = ml.profile_cache(model, cache, tokens, groups=groups, bands={"local": (1, 1)})
direct = ml.profile_layers(
    model,
    ml.PromptDataset.from_tokens(tokens, groups=groups),
    bands={"local": (1, 1)},
    progress=False,
)
abs(from_cache.compression.values / direct.compression.values - 1).max()

# %% [markdown]
# ## What this does not show
#
# - Readers are linear. What they find is *usable* information: it may rise with depth,
#   which Shannon's information cannot, and what a nonlinear reader would find may be more.
# - A curve that changes gradually has no stages. Whether a model's layers fall into segments with sharp
#   boundaries is a question of its own, to be tested against gradual drift; a bend seen by eye is no
#   answer.
# - Compression is for a channel whose noise we chose (`noise=0.1`); only its course over depth means
#   something, not its height.
# - Curves are those of this model *on this text*. Look at the intervals and at `profile.warnings`, then
#   try another text.

# %%
print(*profile.warnings, sep="\n")
saved = profile.save("profile")
ml.results.LayerProfile.load(saved) == profile

# %% [markdown]
# ## Exercise
#
# At which site is each distance ahead read best, and is that place sure? Guess whether far tokens are read
# later than near ones, then look into `scale_map.predicted`, a curve for every offset. Believe only those
# whose interval lies above zero somewhere.
#
# <details><summary>Solution</summary>
#
# ```python
# for offset, curve in scale_map.predicted.items():
#     site = int(curve.values.argmax())
#     sure = "" if curve.low[site] > 0 else "(not above 0)"
#     print(f"{offset:>2} ahead: site {site:2}, {curve.values[site]:6.3f} nats", sure)
# ```
#
# Of SmolLM2 on these texts, the next token is read best at the last site, 2, 4 and 8 ahead a few sites
# before it, and what lies 64 ahead cannot be told from zero anywhere. How much there is to read falls
# from 3.6 nats for the next token to 0.4 for the one after it: far tokens are hardly read *at all*, which
# matters more than where.
#
# </details>
