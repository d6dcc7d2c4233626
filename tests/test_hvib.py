"""The trained H-VIB probe on data whose information is known, and its promises on tiny models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import random_tokens

import mspgt_lens as ml
from mspgt_lens.hvib import activations as activations_module
from mspgt_lens.hvib import fitting as hvib_fitting
from mspgt_lens.hvib import probe as hvib_module
from mspgt_lens.hvib import training as hvib_training
from mspgt_lens.hvib.network import Network, NetworkPlan
from mspgt_lens.hvib.training import Samples, TrainingPlan, train

pytestmark = [
    # Tiny models with random weights predict little.
    pytest.mark.filterwarnings("ignore:relevance at scale"),
]

RHO = np.array([0.9, 0.8, 0.6, 0.3])
BETAS = (1.02, 1.5, 2.0, 4.0, 8.0, 32.0)
# Small enough for a test, with the paths of the real thing.
QUICK = {"betas": (2.0, 20.0), "latent": 2, "hidden": 8, "width": 8, "n_steps": 60}
BANDS = {"local": (1, 1), "intermediate": (2, 4), "global": (5, 8)}


def frontier(beta):
    """Rate and relevance of the Gaussian bottleneck (Chechik et al. 2005), independently."""
    active = RHO[1 / beta < RHO**2] ** 2
    rate = 0.5 * np.log((beta - 1) * active / (1 - active)).sum()
    return rate, rate - 0.5 * np.log(beta * active).sum()


def relevance_at(rate):
    """The most relevance that a rate buys, by bisection over beta."""
    low, high = 1.0, 1e9
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if frontier(middle)[0] < rate else (low, middle)
    return frontier(low)[1]


@pytest.fixture(scope="module")
def gaussian():
    """Correlated pairs, mixed on both sides."""
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((2, 40_000, 8))
    y = y[:, :6]
    y[:, :4] = RHO * z[:, :4] + np.sqrt(1 - RHO**2) * y[:, :4]
    z, y = z @ rng.standard_normal((8, 8)), y @ rng.standard_normal((6, 6))
    return ml.arrays.fit_hvib_arrays(
        z[None], {"y": y}, betas=BETAS, batch_size=128, progress=False, seed=1
    )


@pytest.mark.parametrize("number", range(1, len(BETAS)), ids=[f"beta {b}" for b in BETAS[1:]])
def test_the_probe_reaches_the_gaussian_frontier(gaussian, number):
    rate = gaussian.total_rate["y"].values[0, number]
    relevance = gaussian.relevance["y"].values[0, number]
    assert relevance == pytest.approx(relevance_at(rate), rel=0.05)
    # So does the objective; 8,000 test positions may flatter it by a few hundredths of a nat.
    best_rate, best = frontier(BETAS[number])
    missed = (rate / BETAS[number] - relevance) - (best_rate / BETAS[number] - best)
    assert -0.03 < missed < 0.05 * best


def test_below_the_first_critical_beta_nothing_is_kept(gaussian):
    assert BETAS[0] < 1 / RHO.max() ** 2
    assert 0 <= gaussian.rate["y"].values[0, 0] < 0.01
    assert abs(gaussian.relevance["y"].values[0, 0]) < 0.01


def test_a_cell_that_finds_nothing_reads_exactly_nothing(signs):
    z, y = signs
    fit = ml.arrays.fit_hvib_arrays(
        z[None], {"y": y}, betas=(0.5, 1.0), n_steps=200, progress=False
    )
    assert (fit.best_step == 0).all()
    for name in ("rate", "relevance", "information"):
        np.testing.assert_allclose(getattr(fit, name)["y"].values, 0, atol=1e-6)


def test_rates_bound_the_information_from_above_and_contrast_from_below(gaussian):
    true = -0.5 * np.log(1 - RHO**2).sum()
    rate, information = gaussian.total_rate["y"], gaussian.information["y"]
    assert (gaussian.relevance["y"].values < rate.values + 0.01).all()
    assert (information.low < true).all()
    assert information.values[0, -1] > 0.9 * true
    assert (information.low <= rate.high).all()


@pytest.fixture(scope="module")
def signs():
    """A product of signs in noise: no linear reader sees anything. And a shuffled twin."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((12_000, 6))
    y = np.sign(z[:, :1] * z[:, 1:2]) + 0.5 * rng.standard_normal((len(z), 1))
    return z, y


def sign_information():
    """I(sign; sign + noise) in nats by quadrature."""
    x = np.linspace(-5, 5, 20_001)
    density = [np.exp(-((x - s) ** 2) / 0.5) / np.sqrt(0.5 * np.pi) for s in (-1, 1)]
    mixed = sum(density) / 2
    entropy = [-np.trapezoid(p * np.log(p + 1e-300), x) for p in (mixed, density[0])]
    return entropy[0] - entropy[1]


def test_a_product_of_signs_is_found(signs):
    z, y = signs
    linear = np.corrcoef(np.concatenate([z, y], axis=1).T)[-1, :-1]
    assert np.abs(linear).max() < 0.03
    fit = ml.arrays.fit_hvib_arrays(z[None], {"y": y}, betas=(8.0, 50.0), progress=False)
    best = fit.information["y"].values.max()
    assert best > 0.8 * sign_information()
    assert (fit.information["y"].low < sign_information()).all()
    # Against a Gaussian without z, which misses that y has two humps.
    assert fit.relevance["y"].values.max() > 0.8 * 0.5 * np.log(1 + 1 / 0.25)


def test_shuffled_pairs_tell_nothing(signs):
    z, y = signs
    y = np.random.default_rng(1).permutation(y)
    with pytest.warns(UserWarning, match="relevance at scale 'y' cannot be told from 0"):
        fit = ml.arrays.fit_hvib_arrays(
            z[None], {"y": y}, betas=(2.0, 50.0), n_steps=300, progress=False
        )
    assert (fit.relevance["y"].low <= 0).all()
    assert (fit.information["y"].low <= 0).all()
    assert (fit.relevance["y"].values < 0.01).all()


def test_what_a_group_shares_is_no_information():
    """Each group has its own z and y, unrelated: memory of groups must not count."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 40)
    z = rng.standard_normal((60, 4))[group] + 0.01 * rng.standard_normal((2400, 4))
    y = rng.standard_normal((60, 2))[group] + 0.01 * rng.standard_normal((2400, 2))
    settings = {**QUICK, "n_steps": 600, "progress": False}
    fit = ml.arrays.fit_hvib_arrays(z[None], {"y": y}, group, **settings)
    assert (fit.relevance["y"].low <= 0).all()
    assert fit.relevance["y"].values.max() < 0.1
    alone = ml.arrays.fit_hvib_arrays(z[None], {"y": y}, **settings)
    assert alone.relevance["y"].values.max() > 0.2


def _made_samples(dtype=torch.float64, n=400, n_sites=3):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, n_sites, 5, generator=generator, dtype=dtype)
    noise = torch.randn(n, 6, generator=generator, dtype=dtype)
    targets = [z[:, 0, :2] + noise[:, :2], z[:, 1, :3] ** 2 - 1 + noise[:, 2:5]]
    labels = (z[:, 2, 0] > 0).long()
    return Samples(z, targets, labels)


def _trained(samples, betas, sites, n_steps=60, seed=3, tapped=False, **settings):
    chosen = Samples(samples.z[:, sites], samples.targets, samples.labels)
    plan = NetworkPlan(len(sites), 5, betas, (2, 3), 2, 7, tapped, n_classes=2, rank=2)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    log_classes = torch.full((2,), -np.log(2.0), dtype=rows.dtype)
    network = Network(plan, rows, log_classes, seed=seed, dtype=rows.dtype)
    index = torch.arange(400)
    training = TrainingPlan(n_steps, 32, 0.03, 0.1, 20, seed)
    steps = train(network, chosen, index[:150], index[150:], training, progress=False, **settings)
    return network, steps


def test_all_cells_at_once_are_each_cell_alone():
    samples, betas = _made_samples(), (2.0, 9.0)
    together, steps = _trained(samples, betas, [0, 1, 2], n_steps=300)
    for row in range(3):
        for column, beta in enumerate(betas):
            alone, step = _trained(samples, (beta,), [row], n_steps=300)
            assert steps[row, column] == step[0, 0]
            for name, value in alone.parameters.items():
                shared = together.parameters[name]
                picked = (
                    shared[row : row + 1, :, column : column + 1]
                    if name.startswith("enter")
                    else shared[row : row + 1, column : column + 1]
                )
                torch.testing.assert_close(picked, value, rtol=1e-9, atol=1e-9)
    # Cells stop at different steps, so that stopping is tested too.
    assert len(np.unique(steps)) > 1


def test_scores_are_those_of_the_distributions_they_are_named_after():
    """Against torch's own distributions, cell by cell, with every parameter drawn at random."""
    plan = NetworkPlan(2, 5, (2.0, 9.0), (2, 3), 2, 7, n_classes=3, rank=2)
    generator = torch.Generator().manual_seed(0)
    log_classes = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rows = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    network = Network(plan, rows, log_classes, dtype=torch.float64)
    with torch.no_grad():
        for value in network.parameters.values():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    z = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    targets = [torch.randn(4, r, generator=generator, dtype=torch.float64) for r in (2, 3)]
    labels = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        scores = network(z, targets, labels, noise)
        mean, log_variance = network._encode(z)
    p = {name: value.detach() for name, value in network.parameters.items()}
    normal = torch.distributions.Normal
    for row in range(2):
        for beta in range(2):
            encoders = [
                normal(mean[row, beta, s], (log_variance[row, beta, s] / 2).exp()) for s in (0, 1)
            ]
            t = [q.mean + q.stddev * noise[s] for s, q in enumerate(encoders)]
            bent = 8 * (p["prior_width"][row, beta, 0] / 8).tanh()
            priors = [
                normal(torch.zeros(2).double(), torch.ones(2).double()),
                normal(
                    t[0] @ p["prior"][row, beta, 0] + p["prior_bias"][row, beta, 0],
                    (bent / 2).exp().expand(4, 2),
                ),
            ]
            seen = torch.cat(t, dim=1)
            for s, (q, r) in enumerate(zip(encoders, priors, strict=True)):
                kl = torch.distributions.kl_divergence(q, r).sum(1)
                torch.testing.assert_close(scores.kl[s, row, beta], kl)
                factor = p[f"above{s}"][row, beta].triu(1)
                factor = factor + p[f"log_diagonal{s}"][row, beta].exp().diag()
                code = seen[:, : 2 * (s + 1)] @ p[f"decode{s}"][row, beta]
                decoder = torch.distributions.MultivariateNormal(
                    (code + p[f"offset{s}"][row, beta]) @ factor.inverse(),
                    precision_matrix=factor @ factor.T,
                )
                alone = normal(0.0, 1.0).log_prob(targets[s]).sum(1)
                torch.testing.assert_close(
                    scores.gain[s, row, beta], decoder.log_prob(targets[s]) - alone
                )
            logits = seen @ p["read"][row, beta] @ rows.T + p["class_bias"][row, beta]
            told = torch.distributions.Categorical(logits=logits).log_prob(labels)
            torch.testing.assert_close(scores.token_gain[row, beta], told - log_classes[labels])


def test_one_tap_per_scale_reads_each_scale_at_its_own_site():
    samples = _made_samples()
    network, _ = _trained(samples, (2.0, 9.0), [0, 1], tapped=True)
    z, targets, labels = samples.take(torch.arange(50))
    noise = torch.zeros(2, 50, 2, dtype=torch.float64)
    kl = network(z[:2], targets, labels, noise).kl
    moved = z[:2].clone()
    moved[1] += 1.0
    changed = network(moved, targets, labels, noise).kl - kl
    assert changed[0].abs().max() == 0
    assert changed[1].abs().min() > 0
    # With the same input at every tap it is the untapped network.
    same = Samples(samples.z[:, [0, 0]], samples.targets, samples.labels)
    tapped, _ = _trained(same, (2.0, 9.0), [0, 1], tapped=True)
    plain, _ = _trained(same, (2.0, 9.0), [0])
    torch.testing.assert_close(tapped.parameters["decode1"], plain.parameters["decode1"])


def test_an_interrupted_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    samples = _made_samples()
    whole, steps = _trained(samples, (2.0, 9.0), [0, 1])
    where = {"checkpoint": tmp_path / "checkpoint.safetensors", "fingerprint": "these"}
    advance, calls = hvib_training._Trainer.advance, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        advance(self, *args)

    monkeypatch.setattr(hvib_training._Trainer, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _trained(samples, (2.0, 9.0), [0, 1], **where)
    resumed, again = _trained(samples, (2.0, 9.0), [0, 1], **where)
    assert len(calls) < 30 + 60
    np.testing.assert_array_equal(steps, again)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name])
    with pytest.raises(ValueError, match="other data or settings"):
        _trained(samples, (2.0, 9.0), [0, 1], **where | {"fingerprint": "others"})


def tiny_prompts(n=24):
    return ml.PromptDataset.from_tokens(random_tokens(n, 40))


def test_a_model_is_fitted_at_every_site(tiny, tmp_path):
    model = tiny("llama")
    fit = ml.fit_hvib(model, tiny_prompts(), bands=BANDS, **QUICK, progress=False)
    assert fit.sites == (0, 1, 2, 3, 4)
    assert fit.scales == tuple(BANDS)
    assert sum(fit.n_groups.values()) == 24
    for _, _, grid in fit.grids():
        assert grid.values.shape == (5, 2)
        assert (grid.low <= grid.values).all()
        assert (grid.values <= grid.high).all()
    finest = fit.total_rate["local"].values
    np.testing.assert_allclose(sum(g.values for g in fit.rate.values()), finest, rtol=1e-9)
    np.testing.assert_allclose(
        fit.free_energy.values, fit.distortion.values + finest / np.array(fit.betas), rtol=1e-9
    )
    assert ml.results.HvibFit.load(fit.save(tmp_path / "fit")) == fit
    assert len(fit.to_dataframe()) == 10 * sum(1 for _ in fit.grids())
    again = ml.fit_hvib(model, tiny_prompts(), bands=BANDS, **QUICK, progress=False)
    assert again == fit


def test_a_partition_gives_one_tap_per_segment(tiny, monkeypatch):
    model = tiny("gpt2")
    signals = np.random.default_rng(0).standard_normal((12, 4))
    partition = ml.segment_blocks(signals, n_bootstraps=20)
    with pytest.raises(ValueError, match="12 blocks"):
        ml.fit_hvib(model, tiny_prompts(), partition, bands=BANDS, **QUICK)
    fitting = dataclasses.replace(
        partition,
        n_layers=4,
        boundaries=(1, 3),
        intervals=((1, 1), (3, 3)),
        probability=np.zeros(4),
        signals=np.zeros((4, 4)),
    )
    collect, read = hvib_module.collect_activations, []

    def spied(adapter, prompts, plan, *args, **settings):
        read.extend(plan.sites)
        return collect(adapter, prompts, plan, *args, **settings)

    monkeypatch.setattr(hvib_module, "collect_activations", spied)
    fit = ml.fit_hvib(model, tiny_prompts(), fitting, bands=BANDS, **QUICK, progress=False)
    # The network takes its inputs from coarse to fine.
    assert read == [4, 3, 1]
    assert dict(fit.taps) == {"local": 1, "intermediate": 3, "global": 4}
    assert fit.relevance["local"].values.shape == (1, 2)
    with pytest.raises(ValueError, match="one segment per band"):
        ml.fit_hvib(model, tiny_prompts(), fitting, bands={"local": (1, 1)}, **QUICK)
    with pytest.raises(ValueError, match="sites must be None"):
        ml.fit_hvib(model, tiny_prompts(), fitting, sites=[1], bands=BANDS, **QUICK)


def test_activations_are_those_of_the_model_and_only_where_every_band_is_defined(tiny, tmp_path):
    model = tiny("llama")
    prompts = list(ml.PromptDataset.from_tokens(random_tokens(6, 40), groups="aabbcc"))
    adapter = ml.models.as_adapter(model)
    plan = activations_module.CollectionPlan((0, 3), BANDS, 4, 60, seed=0)
    got = activations_module.collect_activations(adapter, prompts, plan, tmp_path, progress=False)
    assert got.rows.shape == (2, 60, 32)
    assert set(np.bincount(np.unique(got.group, return_inverse=True)[1]) > 0) == {True}
    # An independent reading: every kept row is a standardized normalized residual of some position,
    # with the target of that very position.
    tokens = torch.stack([torch.from_numpy(p.tokens) for p in prompts])
    _, cache = model.run_with_cache(tokens)
    z = cache["blocks.3.hook_resid_pre"]
    z = (z / z.pow(2).mean(-1, keepdim=True).add(adapter.cfg.eps).sqrt()).flatten(0, 1)
    rows = torch.from_numpy(got.rows[1].astype(np.float32))
    z = (z - z.mean(0)) / z.std(0)
    rows = (rows - rows.mean(0)) / rows.std(0)
    # Means over other positions differ, so the nearest position is asked for.
    nearest = torch.cdist(rows, z).argmin(dim=1)
    assert len(nearest.unique()) == 60
    position = nearest % 40
    assert position.min() >= 5
    assert position.max() <= 40 - 1 - 6
    assert (tokens.flatten()[nearest + 1].numpy() == got.next_token).all()
    counts = np.bincount(tokens.flatten(), minlength=adapter.d_vocab)
    phi = activations_module.token_features(adapter.embedding(), counts, 32)
    ahead = torch.stack([phi[tokens.flatten()[nearest + k]] for k in range(2, 5)]).mean(0)
    np.testing.assert_allclose(got.targets["intermediate"], ahead, atol=1e-5)


def test_interruption_leaves_no_hooks_and_a_folder_is_used_again(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    settings = {**QUICK, "bands": BANDS, "progress": False, "folder": tmp_path}
    normalize = ml.models.ModelAdapter.normalize

    def interrupted(self, residual):
        raise KeyboardInterrupt

    monkeypatch.setattr(ml.models.ModelAdapter, "normalize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ml.fit_hvib(model, tiny_prompts(), **settings)
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in model.hook_dict.values())
    monkeypatch.setattr(ml.models.ModelAdapter, "normalize", normalize)
    first = ml.fit_hvib(model, tiny_prompts(), **settings)

    def never(self, *_):
        raise AssertionError("the model was run again")

    monkeypatch.setattr(ml.models.ModelAdapter, "run", never)
    assert ml.fit_hvib(model, tiny_prompts(), **settings) == first
    with pytest.raises(ValueError, match="another model, other prompts"):
        ml.fit_hvib(model, tiny_prompts(25), **settings)
    with pytest.raises(ValueError, match="other data or settings"):
        ml.fit_hvib(model, tiny_prompts(), **settings | {"n_steps": 40})


def test_a_temporary_folder_goes_whatever_happens(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hvib_module.tempfile, "tempdir", str(tmp_path))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hvib_fitting, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ml.fit_hvib(tiny("llama"), tiny_prompts(), bands=BANDS, **QUICK, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": ()}, "betas must be at least one"),
        ({"betas": (3.0, 2.0)}, "betas must rise"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"sites": [0, 9]}, r"sites must lie in 0 \.\.\. 4"),
        ({"sites": [2, 1]}, "rising order"),
        ({"bands": {"far": (90, 99)}}, "too short for the bands"),
        ({"max_positions": 0}, "max_positions must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(tiny, change, message):
    settings = {**QUICK, "bands": BANDS, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        ml.fit_hvib(tiny("llama"), tiny_prompts(), **settings)


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (np.zeros((20, 2)), np.zeros((20, 1)), "z must be finite"),
        (np.zeros((1, 20, 2)), np.zeros((19, 1)), r"must have shape \[20, feature\]"),
        (np.zeros((1, 20, 2)), np.full((20, 1), np.nan), "NaN"),
        (np.zeros((1, 20, 2)), np.ones((20, 1)), "does not vary"),
        (np.zeros((1, 6, 2)), np.ones((6, 1)), "groups must be at least 10"),
    ],
)
def test_wrong_arrays_are_named(z, y, message):
    with pytest.raises(ValueError, match=message):
        ml.arrays.fit_hvib_arrays(z, {"y": y}, progress=False)


def test_divergence_is_an_error(signs):
    z, y = signs
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        ml.arrays.fit_hvib_arrays(
            z[None, :200],
            {"y": y[:200]},
            **QUICK,
            learning_rate=1e30,
            weight_decay=0.0,
            progress=False,
        )


def test_the_figure_says_what_it_shows(gaussian):
    figure = ml.plots.plot_hvib(gaussian)
    path = figure.data[0]
    np.testing.assert_array_equal(path.x, gaussian.total_rate["y"].values[0])
    np.testing.assert_array_equal(path.y, gaussian.relevance["y"].values[0])
    assert "site 0, beta 8" in path.hovertext[4]
    assert "95% interval" in path.hovertext[4]
    assert "bits" in ml.plots.plot_hvib(gaussian, unit="bits").to_json()
