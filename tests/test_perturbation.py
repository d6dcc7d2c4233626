"""Perturbations do what they say, and effects come with tests that keep their level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_editing import hooks_on
from tiny import ARCHITECTURES, random_tokens, tiny_model

import mspgt_lens as ml
from mspgt_lens.models import Edit, as_adapter, edited_logits
from mspgt_lens.partition import as_segments
from mspgt_lens.perturbation import perturbing as effects_module
from mspgt_lens.perturbation import residuals as residuals_module
from mspgt_lens.perturbation.batches import make_batches
from mspgt_lens.perturbation.perturbing import perturbed
from mspgt_lens.perturbation.responding import MEASURES, respond
from mspgt_lens.statistics import mean_interval

N_LAYERS, D_MODEL = 4, 32
AXIS = torch.arange(D_MODEL, dtype=torch.float32) - 3.0
NEUTRAL = [
    *(ml.Perturbation("noise", 0.0, shape) for shape in ("covariance", "diagonal", "isotropic")),
    ml.Perturbation("scaling", 1.0),
    ml.Perturbation("mean", 0.0),
    ml.Perturbation("resample", 0.0),
    ml.Perturbation("translation", 0.0, direction=AXIS),
    ml.Perturbation("temperature", 1.0),
]
STRONG = [
    *(ml.Perturbation("noise", 0.3, shape) for shape in ("covariance", "diagonal", "isotropic")),
    *(ml.Perturbation(kind) for kind in ("scaling", "mean", "resample", "temperature", "skip")),
    ml.Perturbation("translation", 0.3, direction=AXIS),
]


def dataset(n_prompts=6, n_pos=20, per_group=2, seed=0):
    groups = [index // per_group for index in range(n_prompts)]
    return ml.PromptDataset.from_tokens(random_tokens(n_prompts, n_pos, seed=seed), groups=groups)


def prepared(model, prompts, **options):
    adapter = as_adapter(model)
    batches = make_batches(adapter, prompts, skip_first=4, batch_size=None, **options)
    return adapter, batches, ml.residual_statistics(adapter, batches)


def run(model, prompts, kinds, blocks=(1, 2)):
    adapter, batches, statistics = prepared(model, prompts)
    return respond(adapter, batches, [perturbed(kind, statistics, blocks) for kind in kinds])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dose_of_nothing_gives_exactly_nothing(tiny, architecture):
    found = run(tiny(architecture), dataset(), NEUTRAL, range(N_LAYERS))
    assert (found[..., 0] == 0).all()
    assert (found[..., 1] == 0).all()
    assert (found[..., 2] == 1).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_moves_predictions_on_every_architecture(tiny, architecture):
    found = run(tiny(architecture), dataset(), STRONG)
    assert (found[..., 0] > 1e-6).all()


def test_divergence_and_loss_are_those_of_the_logits(tiny):
    model, prompts = tiny("llama"), dataset()
    kind = ml.Perturbation("noise", 0.5)
    found = run(model, prompts, [kind])[0]
    adapter, batches, statistics = prepared(model, prompts)
    expected = np.zeros((3, 3))
    for batch in batches:
        edits = perturbed(kind, statistics, (1, 2))(batch)
        with adapter.inference():
            clean, changed = (
                edited_logits(adapter, batch.tokens, batch.mask, e).double().log_softmax(-1)
                for e in ([], edits)
            )
        kl = (clean.exp() * (clean - changed)).sum(-1)
        losses = [-x[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0] for x in (clean, changed)]
        same = (clean.argmax(-1) == changed.argmax(-1)).double()
        for group in range(3):
            own = torch.from_numpy(batch.groups == group)
            columns = (kl[own, 4:], (losses[1] - losses[0])[own, 4:], same[own, 4:])
            expected[group] = [float(c.mean()) for c in columns]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_statistics_are_those_of_the_cache(tiny):
    model, prompts = tiny("qwen2"), dataset()
    _, _, statistics = prepared(model, prompts)
    tokens = torch.stack([torch.from_numpy(p.tokens) for p in prompts])
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    for block in range(N_LAYERS):
        before, after = (
            cache[f"blocks.{block}.hook_resid_{end}"][:, 4:].flatten(0, 1).double()
            for end in ("pre", "post")
        )
        covariance = torch.cov(before.T, correction=0)
        factor = statistics.factor[block].double()
        torch.testing.assert_close(factor @ factor, covariance, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            statistics.deviation[block].double(), covariance.diagonal().sqrt(), rtol=1e-4, atol=1e-6
        )
        assert float(statistics.rms[block]) == pytest.approx(float(before.pow(2).mean().sqrt()))
        torch.testing.assert_close(
            statistics.update_mean[block].double(), (after - before).mean(0), atol=1e-6, rtol=1e-4
        )
        # Every donor is a position's own update.
        gap = torch.cdist(statistics.updates[block].double(), after - before).min(dim=1).values
        assert gap.max() < 1e-5


@pytest.mark.parametrize("shape", ["covariance", "diagonal", "isotropic"])
def test_noise_has_the_covariance_it_says(tiny, shape):
    _, _, statistics = prepared(tiny("llama"), dataset(12, 40))
    (edit,) = ml.Perturbation("noise", 0.5, shape).edits(statistics, [2])
    drawn = edit.change(torch.zeros(40, 1000, D_MODEL)).flatten(0, 1)
    target = {
        "covariance": statistics.factor[2] @ statistics.factor[2],
        "diagonal": torch.diag(statistics.deviation[2] ** 2),
        "isotropic": torch.eye(D_MODEL) * statistics.rms[2] ** 2,
    }[shape]
    error = (torch.cov(drawn.T) - 0.25 * target).norm() / (0.25 * target).norm()
    # 40,000 draws in 32 directions.
    assert error < 0.04
    assert float(drawn.mean(0).norm()) < 0.05 * float(drawn.norm(dim=1).mean())


def residuals_of(model, prompts):
    """Residuals before every block at valid positions, by plain hooks."""
    tokens = torch.stack([torch.from_numpy(p.tokens) for p in prompts])
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    before = [cache[f"blocks.{block}.hook_resid_pre"] for block in range(N_LAYERS)]
    return torch.stack([rows[:, 4:].flatten(0, 1).double() for rows in before])


def test_wide_residuals_keep_rows_instead_of_a_matrix(tiny, monkeypatch):
    model, prompts = tiny("qwen2"), dataset()
    _, _, whole = prepared(model, prompts)
    monkeypatch.setattr(residuals_module, "MAX_WIDTH", D_MODEL - 1)
    _, _, statistics = prepared(model, prompts)
    # 6 prompts of 16 valid positions: all are kept, and nothing is lost.
    assert statistics.factor.shape == (N_LAYERS, 96, D_MODEL)
    for block, rows in enumerate(residuals_of(model, prompts)):
        factor = statistics.factor[block].double()
        covariance = torch.cov(rows.T, correction=0)
        torch.testing.assert_close(factor.T @ factor, covariance, atol=1e-5, rtol=1e-4)
    for name in ("deviation", "rms", "update_mean", "updates", "groups"):
        np.testing.assert_array_equal(getattr(statistics, name), getattr(whole, name))


def test_a_sample_of_wide_residuals_has_exact_spreads_and_no_bias(tiny, monkeypatch):
    model, prompts = tiny("llama"), dataset(12, 40)
    adapter, batches, _ = prepared(model, prompts)
    monkeypatch.setattr(residuals_module, "MAX_WIDTH", D_MODEL - 1)
    monkeypatch.setattr(residuals_module, "_N_ROWS", 64)
    rows = residuals_of(model, prompts)[2]
    target = torch.cov(rows.T, correction=0)
    drawn = []
    for seed in range(40):
        statistics = ml.residual_statistics(adapter, batches, seed=seed)
        assert statistics.factor.shape == (N_LAYERS, 64, D_MODEL)
        factor = statistics.factor[2].double()
        drawn.append(factor.T @ factor)
        torch.testing.assert_close(drawn[-1].diagonal(), target.diagonal(), rtol=1e-4, atol=1e-8)
    unit = torch.outer(target.diagonal(), target.diagonal()).sqrt()
    errors = (torch.stack(drawn) - target) / unit
    # Correlations of 64 positions of 432 are 0.12 off; the mean of 40 such samples 0.02.
    assert 0.05 < float(errors.std(dim=0)[unit > 0].mean()) < 0.15
    off = errors.mean(dim=0)[~torch.eye(D_MODEL, dtype=torch.bool)]
    assert float(off.abs().max()) < 0.1


def test_noise_of_wide_residuals_has_the_covariance_it_says(tiny, monkeypatch):
    monkeypatch.setattr(residuals_module, "MAX_WIDTH", D_MODEL - 1)
    model, prompts = tiny("llama"), dataset(12, 40)
    _, _, statistics = prepared(model, prompts)
    (edit,) = ml.Perturbation("noise", 0.5).edits(statistics, [2])
    drawn = edit.change(torch.zeros(40, 1000, D_MODEL)).flatten(0, 1)
    target = torch.cov(residuals_of(model, prompts)[2].float().T, correction=0)
    assert (torch.cov(drawn.T) - 0.25 * target).norm() < 0.04 * (0.25 * target).norm()
    # As many normal numbers as rows, not as coordinates.
    assert statistics.factor.shape[1] == 432


def test_draws_are_shared_by_doses_shapes_and_batches(tiny):
    _, _, statistics = prepared(tiny("llama"), dataset())
    where = torch.zeros(2, 9, dtype=torch.bool)
    where[0, 3:] = where[1, 5:8] = True

    def drawn(kind, where=where, keys=(7, 8), blocks=(2,)):
        edit = kind.edits(statistics, blocks, where=where, keys=keys)[-1]
        return edit.change(torch.zeros(*where.shape, D_MODEL))

    one = drawn(ml.Perturbation("noise", 0.1))
    torch.testing.assert_close(drawn(ml.Perturbation("noise", 0.2)), 2 * one)
    assert torch.equal(drawn(ml.Perturbation("noise", 0.1), blocks=(1, 2)), one)
    alone = drawn(ml.Perturbation("noise", 0.1), where[1:], (8,))
    torch.testing.assert_close(alone[0], one[1])
    assert not torch.equal(drawn(ml.Perturbation("noise", 0.1, seed=1)), one)
    assert not torch.allclose(drawn(ml.Perturbation("noise", 0.1), blocks=(1,)), one)
    assert (one[~where] == 0).all()


def test_later_passes_draw_anew_and_act_everywhere(tiny):
    _, _, statistics = prepared(tiny("llama"), dataset())
    where = torch.zeros(2, 9, dtype=torch.bool)
    (edit,) = ml.Perturbation("noise", 0.1).edits(statistics, [0], where=where)
    first = edit.change(torch.zeros(2, 9, D_MODEL))
    second, third = (edit.change(torch.zeros(2, 1, D_MODEL)) for _ in range(2))
    assert (first == 0).all()
    assert (second != 0).all()
    assert not torch.allclose(second, third)


def test_skipping_ablating_and_cooling_are_what_they_say(tiny):
    model, prompts = tiny("gpt2"), dataset(per_group=6)
    adapter, batches, statistics = prepared(model, prompts, min_groups=1)
    (batch,) = batches

    def logits(edits):
        with adapter.inference():
            return edited_logits(adapter, batch.tokens, batch.mask, edits)

    skipped = logits(ml.Perturbation("skip").edits(statistics, [1]))
    torch.testing.assert_close(skipped, logits([Edit(1, "skip")]))
    zero = logits(ml.Perturbation("scaling", 0.0).edits(statistics, [1]))
    torch.testing.assert_close(zero, skipped)
    seen = {}

    def keep(name):
        return lambda x: seen.__setitem__(name, x) or x

    ends = [Edit(1, end, keep(end)) for end in ("resid_pre", "resid_post")]
    logits([*ml.Perturbation("mean").edits(statistics, [1]), *ends])
    update = seen["resid_post"] - seen["resid_pre"]
    expected = statistics.update_mean[1].expand_as(update)
    torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-4)
    patterns = []
    point = model.hook_dict["blocks.1.attn.hook_pattern"].name
    cooled = [e.change for e in ml.Perturbation("temperature", 2.0).edits(statistics, [1])]
    hooks = [("blocks.1.attn.hook_attn_scores", lambda x, hook: cooled[0](x))]
    for change in ([], hooks):
        keep_pattern = (point, lambda x, hook: patterns.append(x))
        with torch.no_grad():
            model.run_with_hooks(batch.tokens, fwd_hooks=[*change, keep_pattern])
    root = patterns[0].sqrt()
    torch.testing.assert_close(patterns[1], root / root.sum(-1, keepdim=True))


def test_attention_is_cooled_for_the_queries_acted_on_only(tiny):
    _, _, statistics = prepared(tiny("llama"), dataset())
    where = torch.zeros(1, 5, dtype=torch.bool)
    where[0, 3:] = True
    (edit,) = ml.Perturbation("temperature", 2.0).edits(statistics, [1], where=where)
    scores = torch.ones(1, 4, 5, 5).masked_fill(torch.triu(torch.ones(5, 5), 1).bool(), -torch.inf)
    cooled = edit.change(scores)
    assert torch.equal(cooled[:, :, :3], scores[:, :, :3])
    assert torch.equal(cooled[:, :, 3:], scores[:, :, 3:] / 2)


def test_resampling_takes_updates_of_other_groups_the_same_ones_in_all_blocks(tiny):
    model, prompts = tiny("llama"), dataset(8, 20)
    adapter, batches, statistics = prepared(model, prompts)
    (batch,) = batches
    seen = {}
    ends = [
        Edit(block, end, lambda x, key=(block, end): seen.__setitem__(key, x) or x)
        for block in (1, 2)
        for end in ("resid_pre", "resid_post")
    ]
    edits = perturbed(ml.Perturbation("resample"), statistics, (1, 2))(batch)
    with adapter.inference():
        edited_logits(adapter, batch.tokens, batch.mask, [*edits, *ends])
    owner = torch.nonzero(batch.valid)[:, 0].numpy()
    chosen = []
    for block in (1, 2):
        update = (seen[block, "resid_post"] - seen[block, "resid_pre"])[batch.valid]
        gap = torch.cdist(
            update, statistics.updates[block], compute_mode="donot_use_mm_for_euclid_dist"
        )
        assert gap.min(dim=1).values.max() < 1e-4
        chosen.append(gap.argmin(dim=1).numpy())
    assert (chosen[0] == chosen[1]).all()
    assert (statistics.groups[chosen[0]] != batch.group_hashes[owner]).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_batches_are_of_no_matter(tiny, architecture):
    rows = random_tokens(6, 20)
    groups = [0, 0, 1, 1, 2, 2]
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[1, 14:] = mask[4, 9:] = False
    left, left_mask = rows.clone(), mask.clone()
    for i in (1, 4):
        n = int(mask[i].sum())
        left[i, -n:], left[i, :-n] = rows[i, :n], 0
        left_mask[i, -n:], left_mask[i, :-n] = True, False
    model = tiny(architecture)
    kinds = [k for k in STRONG if k.kind != "resample"]
    found = run(model, ml.PromptDataset.from_tokens(rows, mask, groups), kinds)
    other = run(model, ml.PromptDataset.from_tokens(left, left_mask, groups), kinds)
    np.testing.assert_array_equal(found, other)
    adapter = as_adapter(model)
    prompts = ml.PromptDataset.from_tokens(rows, mask, groups)
    one = make_batches(adapter, prompts, skip_first=4, batch_size=1)
    assert len(one.batches) == 6
    statistics = ml.residual_statistics(adapter, one)
    alone = respond(adapter, one, [perturbed(kind, statistics, (1, 2)) for kind in kinds])
    np.testing.assert_allclose(alone, found, atol=2e-4)


def test_effects_of_a_real_run(tiny):
    prompts = dataset(8, 24)
    kinds = [ml.Perturbation("noise", 0.3), ml.Perturbation("skip")]
    found = ml.perturb_scales(
        tiny("llama"), prompts, [1, 3], perturbations=kinds, n_controls=5, progress=False
    )
    assert found.perturbations == ("covariance noise 0.3", "skip")
    assert found.segments == {"local": (0,), "intermediate": (1, 2), "global": (3,)}
    direct = run(tiny("llama"), prompts, kinds, (1, 2))
    np.testing.assert_allclose(found.values[:, 1], direct.mean(axis=1), rtol=1e-9)
    # Segments of one block share their controls.
    np.testing.assert_array_equal(found.controls[:, 0], found.controls[:, 2])
    assert found.p_controls.min() >= 1 / 6
    again = ml.perturb_scales(
        tiny("llama"), prompts, [1, 3], perturbations=kinds, n_controls=5, progress=False
    )
    np.testing.assert_array_equal(found.controls, again.controls)
    table = found.to_dataframe()
    assert len(table) == 2 * 3 * len(MEASURES)
    assert (table["low"] <= table["value"]).all()
    assert table["p_value"].notna().sum() == 6


def test_effects_are_kept_as_they_are(tiny, tmp_path):
    found = ml.perturb_scales(
        tiny("llama"),
        dataset(),
        [2],
        perturbations=[ml.Perturbation("mean")],
        n_controls=2,
        progress=False,
    )
    loaded = ml.results.PerturbationEffects.load(found.save(tmp_path / "effects"))
    assert loaded.to_dataframe().equals(found.to_dataframe())
    assert loaded.segments == found.segments
    assert dict(loaded.settings) == dict(found.settings)
    with pytest.raises(ValueError, match="read-only"):
        found.values[0] = 0


def test_simulated_effects_are_recovered_and_covered(tiny, monkeypatch):
    rng = np.random.default_rng(0)
    truth = np.array([0.3, 0.02, 0.9])

    def simulated(adapter, batches, conditions, **_):
        noise = rng.standard_normal((len(conditions), len(batches.groups), 3))
        return truth + 0.1 * noise

    monkeypatch.setattr(effects_module, "respond", simulated)
    kinds = [ml.Perturbation("noise", 0.01 * i) for i in range(150)]
    found = ml.perturb_scales(
        tiny("llama"),
        dataset(12, 8, 1),
        [1, 3],
        perturbations=kinds,
        statistics=object(),
        progress=False,
    )
    # 1,350 intervals at 95%.
    assert 0.93 < np.mean((found.low <= truth) & (truth <= found.high)) < 0.97
    assert np.abs(found.values.mean(axis=(0, 1)) - truth).max() < 0.01


def test_an_unread_direction_is_rarely_significant(monkeypatch):
    """LayerNorm reads no constant shift: only rounding is left, which leans to no side."""
    adapter = as_adapter(tiny_model("gpt2"))
    # statsmodels collects garbage at every correction, which takes a second with torch loaded.
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    options = {"n_controls": 1, "progress": False}
    unread = ml.Perturbation("translation", 0.5, direction=torch.ones(D_MODEL))
    p_values, sizes = [], []
    for seed in range(30):
        prompts = dataset(10, 12, 1, seed=seed)
        found = ml.perturb_scales(adapter, prompts, [1, 3], perturbations=[unread], **options)
        p_values.append(found.p_values.min())
        sizes.append(found.values[0, :, 0].max())
    assert max(sizes) < 1e-8
    # Corrected p below 0.05 in 5% of 30 runs is 1.5 of them; more than 4 come once in 65.
    assert np.sum(np.array(p_values) < 0.05) <= 4
    read = ml.Perturbation("translation", 0.5, direction=AXIS)
    found = ml.perturb_scales(adapter, dataset(10, 12, 1), [1, 3], perturbations=[read], **options)
    assert found.values[0, :, 0].min() > 1e-3


def test_the_control_ranks_a_segment_among_all_sets():
    values = np.array([[[5.0]]])
    controls = np.arange(19.0).reshape(1, 1, 19, 1)
    assert effects_module._rank_p_values(values, controls)[0, 0, 0] == 13 / 20
    assert effects_module._rank_p_values(values * 100, controls)[0, 0, 0] == 1 / 20


def test_intervals_over_groups_cover():
    rng = np.random.default_rng(1)
    drawn = rng.gamma(4.0, 0.25, size=(16, 4000))
    _, low, high = mean_interval(drawn)
    assert 0.91 < np.mean((low <= 1) & (high >= 1)) < 0.97


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_stays_whatever_happens(tiny, error, monkeypatch):
    model = tiny("neox")
    run(model, dataset(), STRONG[:1])
    before, training = hooks_on(model), model.training

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(
        ml.Perturbation, "edits", lambda *_, **__: [Edit(0, "skip"), Edit(2, "resid_pre", stop)]
    )
    with pytest.raises(error):
        ml.perturb_scales(model, dataset(), [2], progress=False)
    assert hooks_on(model) == before
    assert model.training == training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "noize"}, "kind must be one of"),
        ({"kind": "noise", "shape": "round"}, "shape must be one of"),
        ({"kind": "noise", "strength": -0.1}, "strength of 'noise' must be finite, 0 to inf"),
        ({"kind": "mean", "strength": 1.5}, "strength of 'mean' must be finite, 0 to 1"),
        ({"kind": "temperature", "strength": 0}, "must be above 0"),
        ({"kind": "skip", "strength": 0.5}, "must be left out"),
        ({"kind": "scaling", "strength": float("nan")}, "must be finite"),
        ({"kind": "translation"}, "needs a direction"),
        ({"kind": "skip", "direction": AXIS}, "takes no direction"),
        ({"kind": "translation", "direction": torch.zeros(4)}, "other than zero"),
    ],
)
def test_wrong_perturbations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ml.Perturbation(**arguments)


def test_wrong_arguments_are_named(tiny):
    model, prompts = tiny("llama"), dataset()
    with pytest.raises(ValueError, match="rise from 1 to 3"):
        ml.perturb_scales(model, prompts, [2, 2])
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        ml.perturb_scales(model, prompts, {"late": [3, 4]})
    with pytest.raises(ValueError, match="each once"):
        ml.perturb_scales(model, prompts, {"late": []})
    with pytest.raises(ValueError, match="all differ"):
        ml.perturb_scales(model, prompts, [2], perturbations=[])
    with pytest.raises(ValueError, match="n_controls"):
        ml.perturb_scales(model, prompts, [2], n_controls=0)
    with pytest.raises(ValueError, match="skip_first"):
        ml.perturb_scales(model, prompts, [2], skip_first=-1)
    with pytest.raises(ValueError, match="at least 3 groups"):
        ml.perturb_scales(model, dataset(4), [2])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ml.perturb_scales(model, ml.PromptDataset.from_tokens([[500] * 9] * 3), [2])
    short = ml.Perturbation("translation", direction=torch.ones(5))
    with pytest.raises(ValueError, match=r"d_model \(32\)"):
        ml.perturb_scales(model, prompts, [2], perturbations=[short], progress=False)
    short_ones = ml.PromptDataset.from_tokens([*random_tokens(4, 9).tolist(), [5, 6, 7]])
    with pytest.warns(UserWarning, match="1 of 5 prompts were left out"):
        make_batches(as_adapter(model), short_ones, skip_first=4, batch_size=None)


def test_partitions_come_as_results_names_or_boundaries():
    thirds = {"local": (0, 1), "intermediate": (2, 3), "global": (4, 5)}
    assert as_segments([2, 4], 6) == thirds
    assert as_segments(thirds, 6) == thirds
    made = ml.segment_blocks(np.random.default_rng(0).standard_normal((6, 2)))
    assert as_segments(made, 6) == {n: tuple(b) for n, b in made.segments.items()}
    with pytest.raises(ValueError, match="of 6 blocks, but the model has 4"):
        as_segments(made, 4)
