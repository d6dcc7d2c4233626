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
# # How much is a bit of a layer worth?
#
# The theory says that a Transformer is a *hierarchical variational information bottleneck* (H-VIB):
# each scale keeps of its input what predicts the output at that scale, and pays for what it keeps. This
# notebook measures the exchange. How much must be kept of a layer to predict so much? What does
# each scale add to the coarser ones? And what do readers that are not linear find beyond?
#
# Mutual information in deep networks is easy to get wrong. Every number below says what it bounds, comes
# with an interval, and the estimators are shown on data where the truth is known.
#
# **You will learn** to read the price of a layer's information, scale by scale; to train readers that are
# not linear and set them beside linear ones; to measure the rate that the model's own predictions need of
# a layer; to choose an estimator of mutual information by what it bounds; and to hold a profile against
# shuffled text. At most five minutes on two CPU cores.
#
# What a profile is, is told in the first notebook.

# %% [markdown]
# ## The frontier of a layer
#
# A profile holds, for every site and scale, the held-out canonical correlations of the residual stream
# with the tokens to come. From these the **Gaussian information bottleneck** follows in closed form: the
# most that a noisy linear summary of each rate can predict. No further pass over the text is needed.

# %%
import numpy as np

import mspgt_lens as ml

model = ml.load_model(MODEL)
texts = [passage.text for passage in ml.load_passages()][::3]
prompts = ml.PromptDataset.from_texts(model, texts, max_length=192)
profile = ml.profile_layers(model, prompts, progress=False)
ml.plots.plot_information_plane(profile)

# %% [markdown]
# The thin curves behind the paths are frontiers. One of them as numbers: at which *beta* (the weight of
# relevance against rate) is the first direction worth its price, and how much is predicted at a rate of
# one nat?

# %%
import pandas as pd

rows = []
for site in np.linspace(0, profile.n_layers, 6).round().astype(int):
    for scale in profile.scales:
        frontier = profile.frontier(int(site), scale)
        beta = frontier.critical_beta
        kept = frontier.relevance_at(1.0)
        rows.append((site, scale, beta.value, beta.low, beta.high, kept.value, kept.low, kept.high))
columns = ["site", "scale", "critical beta", "low", "high", "at 1 nat", "low ", "high "]
pd.DataFrame(rows, columns=columns).round(3)

# %% [markdown]
# A small critical beta means that the scale is cheap to predict from there. An infinite one means that no
# direction of the site predicts the scale on held-out text, or that the text is too little to see it.
#
# ## What each scale adds
#
# The futures overlap: who knows the average of the next sixteen tokens knows something about those after
# them. `added` takes bands of several tokens apart, coarse to fine, as H-VIB factorizes generation: the
# global future, then what the intermediate one adds to it. (The next token alone is read in tokens, in a
# unit of its own, and is no part of this sum.)

# %%
site = int(np.argmax(profile.predicted["local"].values))
added = {scale: curve.values[site] for scale, curve in profile.added.items()}
alone = {scale: profile.predicted[scale].values[site] for scale in profile.added}
print(f"site {site}")
pd.DataFrame({"on its own": alone, "beyond the coarser scales": added}).round(3)

# %% [markdown]
# ## Readers that are not linear
#
# `fit_hvib` trains the bottleneck itself: stochastic encoders with two hidden layers, learned priors,
# decoders of the next token and of the band means, every site and every beta at once. A few sites, three
# betas and few steps are enough to see the exchange; leave these arguments out for the whole picture.

# %%
sites = [int(s) for s in np.linspace(0, profile.n_layers, 5).round()]
fit = ml.fit_hvib(
    model,
    prompts,
    sites=sites,
    betas=(3.0, 12.0, 50.0),
    n_steps=500,
    max_positions=6000,
    progress=False,
)
ml.plots.plot_hvib(fit)

# %% [markdown]
# **How to read it.** Each path belongs to one site and runs from small to large beta: more rate, more
# relevance. *Relevance* is what the trained decoder knows on groups it has not seen. It is a lower
# bound as long as the decoder is honest, and training on a few dozen documents is not the same
# as having enough of them.
#
# Where do linear readers and the trained probe disagree? The largest beta against the linear reader:

# %%
rows = []
for row, site in enumerate(fit.sites):
    for scale in fit.scales:
        trained = fit.relevance[scale]
        linear = profile.predicted[scale]
        rows.append(
            (
                site,
                scale,
                linear.values[site],
                linear.high[site],
                trained.values[row, -1],
                trained.low[row, -1],
                trained.high[row, -1],
            )
        )
columns = ["site", "scale", "linear", "linear, at most", "trained", "low", "high"]
pd.DataFrame(rows, columns=columns).round(3)

# %% [markdown]
# The probe sees a site through a narrow gate (8 dimensions per scale) and a third less text than
# the linear reader, so it will often find *less* where the relation is linear. It finds more
# only where the relation bends enough to pay for that. Where the whole interval of the trained value lies
# above what the linear reader could reach at most, there is something that no linear reader sees.

# %% [markdown]
# ## The rate that predictions need
#
# Whatever a reader finds at a site, the model need not use it. `rate_distortion` asks the model itself: it
# sends the residuals of one site through a noisy channel that keeps mean and covariance, as the positions
# where the next token is predicted (*local*) or those further back (*intermediate*, *global*) see it, and
# measures by how many nats of KL the predictions move. The noise goes where gradients say that it costs
# least. A small example: the beginnings of sixty passages, three sites, two distortions.

# %%
starts = ml.PromptDataset.from_texts(model, [p.text[:300] for p in ml.load_passages()][::2])
needed = ml.rate_distortion(
    model,
    starts,
    sites=[profile.n_layers // 5, profile.n_layers // 2, 4 * profile.n_layers // 5],
    distortions=(0.1, 1.0),
    n_targets=4,
    progress=False,
)
print(needed)
ml.plot_rate_distortion(needed)

# %% [markdown]
# **How to read it.** Every number is an upper bound: a channel that passed on no more was run, and the KL was
# measured on passages that shaped none of them. On SmolLM2-135M and at 0.1 nats of KL, the next token
# needs most at the latest of the three sites, 556 nats (490 to 657), where tokens two to sixteen ahead need 4
# (0 to 51) and those beyond nothing. At the two earlier sites these need about 300 to 360 and 180 nats: what
# is needed far ahead is passed on early in depth. Noise that keeps one correlation in every direction
# (dotted) must pass on one and a half to six times as much for the same KL.
#
# ## Estimators, where the truth is known
#
# The same on plain arrays, on a task that is made to fool linear readers: the label is the XOR of two
# signs. Its information is log 2 = 0.69 nats.

# %%
import warnings

rng = np.random.default_rng(0)
z = rng.standard_normal((1500, 2))
label = ((z[:, 0] > 0) ^ (z[:, 1] > 0)).astype(int)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for estimator in ("gaussian", "vib", "infonce", "ksg"):
        found = ml.mutual_information(z, label, estimator=estimator)
        print(f"{estimator:9} {found}   {found.guarantee}")

# %% [markdown]
# And the other way round: with labels dealt anew there is nothing to find, and every estimator
# must say so.

# %%
shuffled = rng.permutation(label)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for estimator in ("gaussian", "vib", "infonce", "ksg", "renyi"):
        print(f"{estimator:9} {ml.mutual_information(z, shuffled, estimator=estimator)}")

# %% [markdown]
# ## A null for the whole profile
#
# Shuffled tokens keep every word and destroy every order. What a profile still predicts then is not
# about text.

# %%
null = ml.profile_layers(
    model,
    ml.PromptDataset.from_texts(model, texts[::2], max_length=192),
    control="shuffled_tokens",
    progress=False,
)
for scale in profile.scales:
    best = profile.predicted[scale].values.max()
    print(
        f"{scale:13} {best:6.3f} nats at most; shuffled {null.predicted[scale].values.max():6.3f}"
    )

# %% [markdown]
# ## What this does not show
#
# - *Usable* information is not Shannon's. It may rise with depth, and a better reader may find more.
# - No estimator can certify more than about the logarithm of the number of samples without assuming a
#   distribution. The linear-Gaussian readers assume one and say so.
# - The frontier is that of *Gaussian* summaries of the band means. A network need not work on it.
# - Rates depend on the noise that is chosen: a deterministic network has none of its own.
# - [The table of all estimators on all tasks](https://github.com/mspgt-lens/mspgt_lens/blob/main/docs/information.md)
#   has the bad rows as well.

# %% [markdown]
# ## Exercise
#
# `size = |x| + noise` depends on x, but no line through the points tells. Which estimators see it, and
# which of their values may you quote as a lower bound?
#
# <details><summary>Solution</summary>
#
# ```python
# x = rng.standard_normal(1500)
# size = abs(x) + 0.2 * rng.standard_normal(1500)
# for estimator in ("gaussian", "copula", "vib", "infonce", "ksg"):
#     found = ml.mutual_information(x, size, estimator=estimator)
#     print(f"{estimator:9} {found}   {found.guarantee}")
# ```
#
# `gaussian` and `copula` see nothing: x is as often left as right of its mean where `size` is large. The
# other three find about one nat. `vib` and `infonce` are lower bounds, so "at least" may be written
# before theirs; `ksg` is the closest guess but bounds nothing.
#
# </details>
