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
# # Which claims of the theory survive?
#
# The Multi-Scale Probabilistic Generation Theory calls itself falsifiable. Its predictions are about
# *models in general*: that all of them have two sharp boundaries, that boundaries lie where an optimal
# allocation of layers puts them, that families differ, that the scales can be told apart by breaking
# them. So one model can never decide. And a prediction counts only when something else could have come
# out: five other theories of depth say other things of the same models. This notebook goes from one
# model and all of these theories to several models: measure, give each prediction a verdict, compare,
# and see what a verdict needs.
#
# **You will learn** to measure on a model all that the predictions need, in one call that goes on where it
# stopped; to read a verdict and what it is short of; to hold one model against six theories; to compare
# models; and to hand on a report. About eight minutes on two CPU cores.
#
# What a profile, a partition and brittleness are, is told in the first three notebooks.

# %% [markdown]
# ## One model, everything at once
#
# `analyze` takes every step that the predictions need: the profile, its boundaries, the same with random
# weights and with shuffled text, the noise that every segment bears, which tokens each scale's
# perturbation hurts, what becomes of predictions without each block. With `folder=` each result is saved
# as soon as it is there, and an interrupted analysis goes on where it stopped. The settings here are
# small, so that it takes minutes on two cores; leave them out for real.

# %%
import mspgt_lens as ml

texts = [passage.text for passage in ml.load_passages()][::5]
small = {"n_documents": 4, "n_control_documents": 12, "n_tokens": 300, "max_length": 160}


def measure(name):
    return ml.analyze(name, texts, folder=f"analysis/{name}", progress=False, **small)


analysis = measure(MODEL)
print(analysis.partition.summary())
for step, why in analysis.skipped.items():
    print(step, "was skipped:", why)

# %%
verdicts = ml.evaluate_predictions(analysis.results)
print(verdicts.summary())

# %% [markdown]
# *Inconclusive* is the right answer to most of P1 to P6: statements about models need models. Each reason
# says how many, and of what. R1 to R5 are the other theories'. Thresholds are arguments of
# `evaluate_predictions`; the defaults were fixed before anything was measured with them.
#
# What one model does say, it says on its own:

# %%
for name in ("partition", "random_weights", "shuffled_tokens"):
    found = getattr(analysis, name)
    if found is not None:
        of_any = found.p_values[1]
        print(f"{name:16} boundaries found: {found.n_boundaries}, p of any = {of_any:.3f}")
ml.plots.plot_brittleness(analysis.brittleness)

# %% [markdown]
# ## One model, five other theories
#
# Rivals speak of what a model shows by itself: one transition at half depth, phases between the onset and
# the end of massive activations, four stages of inference, a valley of entropy, an early peak of intrinsic
# dimension. So they have verdicts of this one model, with intervals over its documents.
# [The documentation](https://github.com/mspgt-lens/mspgt_lens/blob/main/docs/rivals.md) says what each
# predicts, and where.

# %%
table = verdicts.to_dataframe()
rivals = table[table["theory"] != "MSPGT"]
rivals[["theory", "prediction", "verdict", "value", "low", "high", "threshold"]].round(3)

# %% [markdown]
# They answer the same questions, and not all of them can be right:

# %%
verdicts.contradictions()

# %% [markdown]
# Two of them, the half-depth transition and the stages of inference, are about what each block is needed
# for. Skipped at *earlier* tokens only, a block matters through what later ones take from it:

# %%
ml.plots.plot_block_effects(analysis.block_effects)

# %% [markdown]
# And whose partition is it? Each theory names places; the boundaries are held against all placements of as
# many. In 30 blocks two boundaries can be told from chance only where they all but meet the places.

# %%
places = verdicts.places[analysis.profile.model_name]
print(places.summary())
places.plot()

# %% [markdown]
# ## Several models
#
# Where there is a network, name more models, of several families and sizes, and let them run one after
# the other. Four models allow a first verdict on some predictions; families of three or more allow those
# about families.

# %%
MORE = []  # Such as ["gpt2", "EleutherAI/pythia-160m", "Qwen/Qwen2.5-0.5B"].

results = [analysis.results] + [measure(name).results for name in MORE]
print(ml.studies.compare_models(results).summary())

# %% [markdown]
# ## What a verdict looks like when the truth is known
#
# Here are made-up families for which every prediction holds: boundaries where water-filling puts them,
# the local segment most brittle, the diagonal ahead. Their results have the form that `analyze` gives, so
# everything that follows works on real ones.

# %%
true = ml.synthetic.synthetic_models(3, 6, boundaries="water-filling", seed=1)
judged = ml.evaluate_predictions(true)
judged.to_dataframe()[
    ["prediction", "verdict", "value", "low", "high", "threshold", "n_models"]
].round(3)

# %% [markdown]
# Not every claim can hold at once. Water-filling puts boundaries where depth says, so family explains
# little: the same results *support* position and *refute* dominance by family. And families whose
# boundaries do not follow depth at all:

# %%
false = ml.synthetic.synthetic_models(
    3,
    6,
    boundaries="random",
    family_ratio=1.0,
    segment_ratio=1.0,
    excess=0.0,
    half_depths=(0.4, 0.4, 0.4),
    supported=False,
    seed=1,
)
table = ml.evaluate_predictions(false).to_dataframe()
table[["prediction", "verdict", "reason"]]

# %% [markdown]
# How often are such verdicts right?
# [The documentation](https://github.com/mspgt-lens/mspgt_lens/blob/main/docs/theory.md) has the table, for
# many draws of families where each prediction is true and where it is false.
#
# ## Models side by side
#
# Profiles of different depth on relative depth, the share of every segment, brittleness on a logarithmic
# axis.

# %%
compared = ml.studies.compare_models(true)
print(compared.summary())
ml.plots.plot_comparison(compared)

# %% [markdown]
# Which allocation of layers would the theory call optimal? `fit_water_filling` learns it from some models;
# what it predicts for the others is held against two rules that learn nothing.

# %%
import numpy as np

boundaries = np.array([one.partition.boundaries for one in true])
depths = np.array([one.partition.n_layers for one in true])
fitted = ml.theory.fit_water_filling(boundaries, depths)
print("best boundaries for 36 blocks:", fitted.boundaries(36))
errors = ml.theory.held_out_errors(boundaries, depths)
errors.groupby("rule")["error"].mean().round(3)

# %% [markdown]
# ## A report to hand on
#
# One HTML file, readable by somebody who did not run it, that opens without a network. The command line
# does all of this in one go: `mspgt-lens analyze MODEL MODEL ... --out analysis`.

# %%
path = ml.write_report("analysis/report.html", analysis, verdicts)
print(path, f"{path.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## What this does not show
#
# - A verdict on one model is about that model, on these texts; published claims are of others.
# - *Supported* means that the whole interval lies on the predicted side of a threshold, on these models
#   and texts. It does not mean that the theory is the reason.
# - Places of boundaries are used for position and dominance even where a model's own test supports none;
#   the reasons say in how many models that is so. Verdicts on places of nothing are worth little.
# - Models of one family share data, code and tokenizers. They are fewer independent witnesses than
#   their number.

# %% [markdown]
# ## Exercise
#
# How many models are enough? Judge the first four of `true` alone. Which verdicts are left, and what do
# the others ask for?
#
# <details><summary>Solution</summary>
#
# ```python
# for verdict in ml.evaluate_predictions(true[:4]):
#     if verdict.verdict == "inconclusive":
#         print(f"{verdict.name}: {verdict.reason}")
# ```
#
# Segments of one model, dissociation and order are judged from four. That boundaries exist, and where,
# takes six models; whatever compares families takes two of three models each.
#
# </details>
