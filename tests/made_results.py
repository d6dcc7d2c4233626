"""One made-up result of every kind, of a model with a hostile name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from made_profile import made_profile
from test_brittleness import made as made_brittleness
from test_effects_plots import made_effects, made_perturbations
from test_perturbation_plots import made_table

import mspgt_lens as ml
from mspgt_lens.contract import Result

HOSTILE = "<script>alert(1)</script> & co"
NOTES = ("few documents: take the intervals with care", "another <b>note</b>")


def made_results() -> dict[str, Result]:
    """Class name to its example."""
    rng = np.random.default_rng(0)
    profile = replace(made_profile(HOSTILE, warnings=NOTES), control="shuffled_tokens")
    partition = made_partition()
    moved = replace(partition, boundaries=(3, 6), intervals=((2, 4), (5, 7)))
    models = [
        replace(
            one,
            profile=replace(one.profile, model_name=f"{HOSTILE} {number}"),
            partition=replace(one.partition, model_name=f"{HOSTILE} {number}"),
        )
        for number, one in enumerate(ml.synthetic.synthetic_models(2, 4))
    ]
    verdicts = ml.evaluate_predictions(models)
    comparison = ml.studies.compare_models(models)
    depths = np.array([one.partition.n_layers for one in models])
    placed = np.array([one.partition.boundaries for one in models])
    assert comparison.shares is not None
    brittleness = replace(made_brittleness(), model_name=HOSTILE, warnings=NOTES)
    table = replace(made_table(HOSTILE), settings={"seed": 0})
    classes = made_classes(rng)
    made = [
        profile.compression,
        ml.results.Estimate(1.0, 0.5, float("inf"), "nats", f"What {HOSTILE} is.", 0.04, NOTES),
        profile.frontier(3, "local"),
        made_fit(rng),
        made_fit(rng).distortion,
        made_rates(rng),
        profile,
        partition,
        ml.results.Stability({"first": partition, HOSTILE: moved}),
        ml.synthetic.synthetic_signals(10, 3),
        ml.results.Power(0.5, {0: 0.5, 1: 0.25, 2: 0.25, 3: 0.0}, 0.25, 40),
        made_sweep(rng),
        made_scale_patch(rng),
        brittleness,
        classes,
        table,
        made_perturbations(HOSTILE),
        made_effects(HOSTILE),
        made_block_effects(rng),
        made_ablation(rng),
        made_statistics(),
        made_lens(rng),
        made_reading(rng),
        models[0],
        verdicts["P1 existence"],
        verdicts,
        ml.theory.compare_places(partition, profile),
        comparison,
        comparison.shares,
        ml.results.Emergence((0, "last"), (profile, profile), (partition, None)),
        ml.theory.fit_water_filling(placed, depths),
        ml.results.Analysis(
            profile,
            partition,
            random_profile=replace(profile, control="random_weights"),
            random_weights=replace(partition, control="random_weights"),
            brittleness=brittleness,
            token_classes=classes,
            dissociation=table,
            effects=made_perturbations(HOSTILE),
            family=HOSTILE,
            n_parameters=123,
            skipped={"shuffled_tokens": f"{HOSTILE} is too short"},
            identity="abc",
        ),
    ]
    return {type(one).__name__: one for one in made}


def made_block_effects(rng: np.random.Generator) -> ml.results.BlockEffects:
    """Four blocks, three documents; the last block has no future."""
    skip, swap = rng.random((3, 3, 4, 3)), rng.random((3, 3, 3, 3))
    for table in (skip, swap):
        table[2, :, -1] = np.array([0.0, 1.0, 0.0])[:, None]
    return ml.results.BlockEffects(HOSTILE, 4, skip, swap, {"seed": 0}, {"numpy": "2"}, NOTES)


def made_ablation(rng: np.random.Generator) -> ml.results.MassiveAblation:
    """Four blocks, three documents."""
    return ml.results.MassiveAblation(
        HOSTILE,
        4,
        1,
        (5, 2, 7),
        1.25,
        0.8,
        rng.random((2, 5, 3)),
        rng.random((2, 4, 3)),
        3 * rng.random((2, 5, 3)),
        rng.random((3, 3)),
        {"block": None},
        {"numpy": "2"},
        NOTES,
    )


def made_partition() -> ml.results.ScalePartition:
    """Of 12 blocks, in a deviation of 1."""
    signals = ml.synthetic.synthetic_signals(12, 3, seed=1).signals
    found = ml.segment_blocks(signals, names=["a", "b", HOSTILE], n_bootstraps=20)
    assert len(found.boundaries) == 2
    return replace(found, model_name=HOSTILE, warnings=NOTES)


def made_fit(rng: np.random.Generator) -> ml.results.HvibFit:
    """Two sites, three betas."""

    def grid() -> ml.results.Grid:
        values = rng.random((2, 3))
        return ml.results.Grid(values, values - 0.1, values + 0.1, "nats", "Made up.")

    scales = ("local", "global")
    return ml.results.HvibFit(
        model_name=HOSTILE,
        sites=(0, 4),
        taps={},
        betas=(1.0, 2.0, 4.0),
        rate={s: grid() for s in scales},
        total_rate={s: grid() for s in scales},
        relevance={s: grid() for s in scales},
        information={s: grid() for s in scales},
        token_relevance=None,
        distortion=grid(),
        free_energy=grid(),
        best_step=np.arange(6).reshape(2, 3),
        n_positions={"training": 10, "stopping": 5, "testing": 5},
        n_groups={"training": 4, "stopping": 2, "testing": 2},
        settings={"seed": 0, "levels": [1, 2]},
        versions={"numpy": "2"},
        warnings=NOTES,
    )


def made_rates(rng: np.random.Generator) -> ml.results.RateDistortion:
    """Two scales, three sites, two distortions, and a channel of each kind."""
    rate = np.sort(rng.random((2, 3, 2)))[..., ::-1] * 100
    # Shaped noise needs less, but at the second site.
    times = np.array([2.0, 0.5, 2.0])[:, None]
    run = ml.results.ChannelRun("local", 0, True, 12.0, 0.1, 0.08, 0.13, 0.09)
    return ml.results.RateDistortion(
        model_name=HOSTILE,
        n_layers=6,
        sites=(0, 3, 6),
        bands={"local": (1, 1), "global": (17, 48)},
        distortions=(0.01, 0.1),
        shaped_rate=rate,
        shaped_low=0.9 * rate,
        shaped_high=1.2 * rate,
        covariance_rate=times * rate,
        covariance_low=0.8 * times * rate,
        covariance_high=1.3 * times * rate,
        shrinkage=np.full((2, 3), 0.3),
        runs=(run, run._replace(shaped=False, rate=20.0)),
        guarantee="An upper bound.",
        settings={"seed": 0},
        versions={"numpy": "2"},
        warnings=NOTES,
    )


def made_sweep(rng: np.random.Generator) -> ml.results.PatchSweep:
    """Four blocks, three positions, two pairs."""
    by_pair = rng.standard_normal((2, 4, 3))
    metric = by_pair.mean(axis=0)
    return ml.results.PatchSweep(
        model_name=HOSTILE,
        place="resid_pre",
        direction="denoise",
        method="attribution",
        window=1,
        metric_name="logit_difference",
        metric=metric,
        clean=2.0,
        corrupted=-1.0,
        effect=(metric + 1) / 3,
        low=(metric + 1) / 3 - 0.1,
        high=(metric + 1) / 3 + 0.1,
        p_values=np.full((4, 3), 0.5),
        by_pair=by_pair,
        positions=np.array([0, 3, -1]),
        tokens=("a", "<b>", " c"),
        checked_cells=np.array([[0, 1], [2, 2]]),
        checked_metric=np.array([0.5, 0.25]),
        settings={"n_pairs": 2, "n_groups": 2},
        warnings=NOTES,
        clean_by_pair=np.array([1.5, 2.5]),
        corrupted_by_pair=np.array([-1.0, -1.0]),
        groups=(HOSTILE, 7),
    )


def made_scale_patch(rng: np.random.Generator) -> ml.results.ScalePatch:
    """Three segments."""
    effect = np.array([0.1, 0.7, 0.2])
    return ml.results.ScalePatch(
        model_name=HOSTILE,
        direction="denoise",
        metric_name="logit_difference",
        segments=("local", "intermediate", "global"),
        blocks=np.array([[0, 3], [4, 7], [8, 11]]),
        metric=3 * effect - 1,
        clean=2.0,
        corrupted=-1.0,
        effect=effect,
        low=effect - 0.1,
        high=effect + 0.1,
        controls=rng.random((3, 20)),
        p_values=np.array([1.0, 0.05, 0.4]),
        settings={"n_pairs": 2, "n_groups": 2},
    )


def made_classes(rng: np.random.Generator) -> ml.results.TokenClasses:
    """Thirty tokens, some of which depend on no context."""
    return ml.results.TokenClasses(
        model_name=HOSTILE,
        bands={"local": (1, 1), "intermediate": (2, 16), "global": (17, 48)},
        threshold=0.5,
        losses=rng.gamma(2.0, size=(30, 4)),
        classes=np.arange(30) % 4 - 1,
        prompts=np.arange(30) // 10,
        positions=50 + np.arange(30) % 10,
        tokens=np.arange(30),
        groups=np.arange(30, dtype=np.uint64) // 10 + 2**63,
        settings={"seed": 0},
    )


def made_lens(rng: np.random.Generator) -> ml.results.RidgeLens:
    """Four blocks of width 6, projected on three directions."""

    def curve(end: float) -> ml.Curve:
        values = np.linspace(4.0, end, 5)
        return ml.results.Curve(values, values - 0.1, values + 0.1, "nats", "Made up.")

    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    return ml.results.RidgeLens(
        model_name=HOSTILE,
        n_tokens=1000,
        n_groups=10,
        n_decoded=300,
        cross_entropy=curve(3.0),
        kl=curve(0.0),
        relevance=curve(5.0),
        unigram=7.0,
        strength=0.01,
        weights=drawn(4, 3, 6),
        bias=drawn(4, 6),
        center=drawn(4, 6),
        spread=drawn(4, 6).abs(),
        axes=drawn(6, 3),
        weights_digest="abc",
        settings={"seed": 0, "skip_first": 4},
        versions={"numpy": "2"},
        warnings=NOTES,
    )


def made_reading(rng: np.random.Generator) -> ml.results.LensReading:
    """Three sites, four tokens; nothing follows the last."""
    texts = {0: '"a"', 1: HOSTILE, 2: "<b>", 3: "\n", 4: " "}
    share = np.sort(rng.dirichlet(np.ones(5), size=(3, 4)), axis=-1)[..., ::-1]
    order = np.array([rng.permutation(5) for _ in range(12)]).reshape(3, 4, 5)
    rank = 1 + (order == np.array([1, 2, 3, 0])[:, None]).argmax(axis=-1)
    rank[:, -1] = 0
    return ml.results.LensReading(
        model_name=HOSTILE,
        tokens=("a", HOSTILE, "<b>", "\n"),
        positions=np.arange(4),
        answers=np.array([1, 2, 3, -1]),
        top=order[..., :2],
        probability=share[..., :2],
        entropy=-(share * np.log(share)).sum(axis=-1),
        rank=rank,
        texts=texts,
        warnings=NOTES,
    )


def made_statistics() -> ml.results.ResidualStatistics:
    """Two blocks of width 3."""
    return ml.results.ResidualStatistics(
        deviation=torch.ones(2, 3),
        factor=torch.eye(3).repeat(2, 1, 1),
        rms=torch.tensor([1.0, 2.0]),
        update_mean=torch.zeros(2, 3),
        updates=torch.zeros(2, 4, 3),
        groups=np.arange(4, dtype=np.uint64),
        n_positions=40,
    )
