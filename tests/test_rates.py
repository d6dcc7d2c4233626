"""The rate that predictions need of a site, against closed forms and plain runs of the model."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sharing import in_processes
from test_contract import MADE
from test_out_of_memory import MESSAGES, small_device
from tiny import (
    ARCHITECTURES,
    as_text,
    random_model,
    random_tokens,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from torch import distributed

import mspgt_lens as ml
from mspgt_lens import processes as processes_module
from mspgt_lens.cli import main as run_command
from mspgt_lens.cli import placing
from mspgt_lens.models import RecordedRun, as_adapter, bridge_from_huggingface, differentiable
from mspgt_lens.rates import shaping, windows
from mspgt_lens.rates.channel import (
    Channel,
    channel_rate,
    find_directions,
    kept_correlations,
    principal_axes,
)
from mspgt_lens.rates.ladder import Ladder
from mspgt_lens.rates.measuring import Installed, Reading, measure
from mspgt_lens.rates.reading import read_rate
from mspgt_lens.rates.shaping import find_shapes, gradients
from mspgt_lens.rates.windows import Plan, Recorded, draw_windows, split_prompts
from mspgt_lens.storage import read_result, write_result

BANDS = {"local": (1, 1), "far": (2, 4)}
ENDS = ("rate", "low", "high")
QUICK = {"bands": BANDS, "sites": (1, 4), "n_targets": 4, "progress": False}
# Twelve groups are the least; tests of tiny models make no claim about texts.
pytestmark = pytest.mark.filterwarnings("ignore:only .* were measured on")


class Bar:
    """A progress bar that shows nothing."""

    def update(self):
        """One step."""


def dataset(n_prompts=40, n_pos=24, seed=0):
    return ml.PromptDataset.from_tokens(random_tokens(n_prompts, n_pos, seed=seed))


def plan(**changed):
    given = {"sites": (1, 3), "bands": BANDS, "n_targets": 4, "skip_first": 4}
    given |= {"batch_size": None, "seed": 0}
    return Plan(**given | changed)


def covariance_of(width, seed=0):
    root = np.random.default_rng(seed).standard_normal((width, 2 * width))
    return torch.from_numpy(root @ root.T / width)


def fisher_of(width, rank, seed=1):
    root = np.random.default_rng(seed).standard_normal((width, rank))
    return torch.from_numpy(root @ root.T)


def directions(width=6, rank=3):
    mean = torch.arange(width, dtype=torch.float64)
    return find_directions(principal_axes(mean, covariance_of(width)), fisher_of(width, rank))


@pytest.mark.parametrize("cost", [0.01, 0.5, 3.0])
def test_correlations_are_those_of_a_solver_that_knows_no_formula(cost):
    mu = np.array([0.3, 1.0, 2.5, 7.0])
    found = minimize(
        lambda x: -0.5 * np.log1p(-(x**2)).sum(),
        np.full(4, 0.5),
        bounds=[(0, 1 - 1e-9)] * 4,
        constraints={"type": "eq", "fun": lambda x: mu @ (1 - x) - cost},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    along = replace(directions(4, 4), costs=mu)
    channel = along.at_cost(cost)
    assert along.expected_cost(channel) == pytest.approx(cost)
    np.testing.assert_allclose(channel.kept, found.x, atol=2e-5)
    assert along.at_rate(channel.rate).kept == pytest.approx(channel.kept)


def test_much_passed_on_is_usual_water_filling():
    mu = np.array([1.0, 10.0, 100.0])
    theta = 1e-3
    np.testing.assert_allclose(kept_correlations(mu, 1 / theta), 1 - theta / mu / 2, rtol=1e-6)
    assert kept_correlations(np.zeros(2), 1.0).tolist() == [0.0, 0.0]


def test_the_cost_is_that_of_the_noise_in_the_fisher_information():
    along = directions()
    channel = along.at_cost(0.4)
    # z' - z = sum_i u_i ((rho_i - 1) w_i + sqrt(1 - rho_i^2) eps_i)
    lost = (channel.kept - 1) ** 2 + 1 - channel.kept**2
    noise = channel.out.double() @ torch.diag(torch.from_numpy(lost)) @ channel.out.double().T
    assert float((fisher_of(6, 3) * noise).sum() / 2) == pytest.approx(0.4, rel=1e-4)


def test_a_channel_keeps_mean_and_covariance_and_passes_its_rate_on():
    width, n = 6, 400_000
    channel = directions(width).at_cost(2.0)
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(covariance_of(width)).float()
    own, normal = (torch.randn(n, width, generator=generator) for _ in range(2))
    rows = torch.arange(width) + own @ root.T
    out = channel.pass_on(channel.coordinates(rows), normal)
    both = np.cov(torch.cat([rows, out], dim=1).double().numpy().T)
    np.testing.assert_allclose(out.mean(dim=0), np.arange(width), atol=0.02)
    np.testing.assert_allclose(both[width:, width:], both[:width, :width], atol=0.05)
    # Information of Gaussians, from determinants of what was drawn.
    logs = [np.linalg.slogdet(x)[1] for x in (both[:width, :width], both[width:, width:], both)]
    assert (logs[0] + logs[1] - logs[2]) / 2 == pytest.approx(channel.rate, abs=0.01)


def test_nothing_passed_on_is_the_same_along_any_directions():
    axes = principal_axes(torch.zeros(6), covariance_of(6))
    first, second = (find_directions(axes, fisher_of(6, 3, seed)).closed() for seed in (1, 2))
    assert not torch.allclose(first.out, second.out, atol=0.1)
    rows, normal = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    passed = [one.pass_on(one.coordinates(rows), normal) for one in (first, second)]
    torch.testing.assert_close(*passed, atol=1e-5, rtol=1e-5)
    assert first.rate == second.rate == 0


def test_more_power_passes_more_on():
    kept = np.array([0.5, 0.9])
    assert channel_rate(kept, np.ones(2)) == pytest.approx(-0.5 * np.log(1 - kept**2).sum())
    # Signal 4 x .25 over noise .75, and signal .81 over noise .19.
    expected = 0.5 * (np.log1p(1 / 0.75) + np.log1p(0.81 / 0.19))
    assert channel_rate(kept, np.array([4.0, 1.0])) == pytest.approx(expected)


def test_directions_without_variance_are_left_out():
    covariance = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    along = find_directions(principal_axes(torch.zeros(3), covariance), fisher_of(3, 3))
    assert along.into.shape == (2, 3)
    rows = torch.tensor([[2.0, -1.0, 0.0]])
    open_ = replace(along.closed(), kept=np.full(2, 1 - 1e-12))
    passed = open_.pass_on(open_.coordinates(rows), torch.ones(1, 2))
    torch.testing.assert_close(passed, rows, atol=1e-4, rtol=0)


def test_rates_are_read_between_channels_in_use_by_turns_and_never_beyond():
    rates, kl = np.array([0.0, 10.0, 30.0]), np.array([2.0, 0.5, 0.1])
    assert read_rate(rates, kl, 3.0) == 0.0
    assert read_rate(rates, kl, 0.5) == 10.0
    assert read_rate(rates, kl, 0.3) == pytest.approx(20.0)
    # A channel that is no better than a mixture of its neighbors is not used.
    assert read_rate(np.array([0.0, 9.0, 10.0]), np.array([1.0, 0.9, 0.0]), 0.5) == pytest.approx(5)
    with pytest.raises(ValueError, match=r"must reach down to 0.05 nats, got 0.1"):
        read_rate(rates, kl, 0.05)


@pytest.mark.parametrize("steepness", [0.7, 1.0, 1.6])
def test_a_ladder_runs_a_channel_near_every_distortion(steepness):
    """Measured KL is far from the expected one, and levels off where nothing is passed on."""
    along = directions()
    levels = (0.01, 0.03, 0.1, 0.3, 1.0)

    def moved(expected):
        return 2 * (1 - np.exp(-3 * (expected / along.most) ** steepness))

    ladder = Ladder(0, "far", True, along, levels, (along.most / 10, 0.8 * moved(along.most / 10)))
    groups = np.arange(40)
    noise = np.random.default_rng(0).gamma(20, 1 / 20, 40)
    while not ladder.done:
        assert len(ladder.runs) < 9
        one = ladder.next()
        kl = moved(along.expected_cost(one.channel))
        ladder.tell(one, Reading(one.channel.rate, kl * noise, groups), seed=0)
    assert ladder.runs[0].rate == 0
    for level in levels:
        assert min(abs(np.log(run.kl / level)) for run in ladder.runs) < 0.5
    rate, low, high = ladder.read()
    assert (np.diff(rate) < 0).all()
    assert (low <= rate).all()
    assert (rate <= high).all()


def test_a_ladder_that_nothing_moves_has_one_rung():
    ladder = Ladder(0, "far", True, directions(), (0.01,), (1.0, 0.0))
    one = ladder.next()
    ladder.tell(one, Reading(0.0, np.zeros(4), np.arange(4)), seed=0)
    assert ladder.done
    assert [x.tolist() for x in ladder.read()] == [[0.0]] * 3


@cache
def plain_and_bridge(architecture):
    """Two models of the same weights, the first untouched by TransformerLens."""
    plain, wrapped = (random_model(tiny_config(architecture), 3) for _ in range(2))
    return plain, bridge_from_huggingface(wrapped, None, f"tiny-{architecture}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_a_plain_run(architecture, monkeypatch):
    plain, bridge = plain_and_bridge(architecture)
    adapter = as_adapter(bridge)
    chosen = torch.tensor([7, 8, 9])
    monkeypatch.setattr(shaping, "_sampled", lambda scores, keys, *_: chosen[: len(keys)])
    plan_ = plan(sites=(0, 2), bands={"all": (1, 5)}, batch_size=3)
    batches = split_prompts(adapter, dataset(36), plan_).shaping
    with adapter.inference():
        batch, run = next(iter(Recorded(adapter, batches)))
        part = draw_windows(run, batch, plan_, "all", 1, "shaping")[0]
        ((_, found),) = gradients(run, batch, part, plan_.sites, 0)
    assert run.reuses_prefix
    assert part.start == part.target - 4
    out = plain(batch.tokens, output_hidden_states=True)
    score = out.logits[:, part.target].log_softmax(dim=-1).gather(1, chosen[:, None]).sum()
    expected = torch.autograd.grad(score, [out.hidden_states[site] for site in plan_.sites])
    for site, whole in zip(plan_.sites, expected, strict=True):
        torch.testing.assert_close(
            found[site], whole[:, part.start : part.target + 1], atol=2e-6, rtol=1e-3
        )


def test_sampled_tokens_follow_the_predictions():
    share = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    scores = share.log().expand(4000, -1)
    drawn = shaping._sampled(scores, range(4000), 3, 0, 0)
    counts = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(counts, share, atol=0.03, rtol=0)
    assert counts[1] == 0
    assert not torch.equal(drawn, shaping._sampled(scores, range(4000), 4, 0, 0))


def test_the_fisher_information_is_that_of_a_softmax():
    """At the last site it is J' (diag p - p p') J, J being the unembedding's derivative."""
    adapter = as_adapter(tiny_model("llama", n_layers=2, d_model=16))
    plan_ = plan(sites=(0, 2), bands={"local": (1, 1)}, n_targets=60)
    batches = split_prompts(adapter, dataset(72), plan_).shaping
    shape = find_shapes(adapter, batches, plan_, Bar())[2]
    exact, n = torch.zeros(16, 16, dtype=torch.float64), 0

    def logits(residual):
        return adapter.decode(adapter.normalize(residual[None]))[0]

    with adapter.inference():
        for batch, run in Recorded(adapter, batches):
            for part in draw_windows(run, batch, plan_, "local", 20, "exact"):
                for residual in run.residual[2][:, part.target]:
                    with torch.enable_grad():
                        slope = torch.autograd.functional.jacobian(logits, residual).double()
                    p = logits(residual).double().softmax(dim=-1)
                    exact += slope.T @ (torch.diag(p) - torch.outer(p, p)) @ slope
                    n += 1
    exact /= n
    assert float((shape.fisher["local"] - exact).norm() / exact.norm()) < 0.1
    rows = torch.cat([run.residual[2][batch.valid] for batch, run in _recorded(adapter, batches)])
    np.testing.assert_allclose(shape.covariance, np.cov(rows.double().T, bias=True), atol=1e-5)
    np.testing.assert_allclose(shape.mean, rows.double().mean(dim=0), atol=1e-5)


def _recorded(adapter, batches):
    with adapter.inference():
        yield from Recorded(adapter, batches)


def test_runs_are_kept_while_they_fit_and_tell_the_same(monkeypatch):
    adapter = as_adapter(tiny_model("llama"))
    batches = split_prompts(adapter, dataset(48), plan()).measuring
    channel = directions(adapter.d_model, 3).closed()
    one = [Installed(1, "local", channel)]
    made = []
    record = Recorded._record

    def counted(self, batch):
        made.append(batch)
        return record(self, batch)

    monkeypatch.setattr(Recorded, "_record", counted)
    kept = Recorded(adapter, batches, again=True)
    first, second = (measure(adapter, kept, one, plan(), Bar())[0].kl for _ in range(2))
    assert len(made) == len(batches.batches)
    monkeypatch.setattr(windows, "_KEPT_BYTES", 1)
    anew = Recorded(adapter, batches, again=True)
    for _ in range(2):
        np.testing.assert_array_equal(measure(adapter, anew, one, plan(), Bar())[0].kl, first)
    assert len(made) == 3 * len(batches.batches)
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_channel_acts_at_the_bands_positions_and_the_target_is_read(architecture):
    """A channel that gives the mean whatever goes in is a plain hook."""
    plain, bridge = plain_and_bridge(architecture)
    adapter = as_adapter(bridge)
    plan_ = plan(sites=(2,), bands={"far": (2, 4)}, n_targets=16)
    batches = split_prompts(adapter, dataset(36, seed=5), plan_).measuring
    mean = torch.linspace(-1, 1, 32)
    constant = Channel(mean, torch.eye(32), torch.zeros(32, 32), torch.eye(32), np.zeros(32))
    (reading,) = measure(
        adapter, Recorded(adapter, batches), [Installed(2, "far", constant)], plan_, Bar()
    )
    blocks = plain.transformer.h if architecture == "gpt2" else plain.model.layers
    expected = []
    for batch, run in _recorded(adapter, batches):
        for part in draw_windows(run, batch, plan_, "far", 2, "measuring"):
            clean = plain(batch.tokens).logits[:, part.target].double().log_softmax(dim=-1)

            def put(module, args, kwargs, at=part.target):
                residual = args[0].clone()
                residual[:, at + 1 - 4 : at + 1 - 2 + 1] = mean
                return (residual, *args[1:]), kwargs

            handle = blocks[2].register_forward_pre_hook(put, with_kwargs=True)
            moved = plain(batch.tokens).logits[:, part.target].double().log_softmax(dim=-1)
            handle.remove()
            expected.append((clean.exp() * (clean - moved)).sum(dim=-1))
    np.testing.assert_allclose(
        reading.kl, torch.cat(expected).detach().numpy(), rtol=2e-3, atol=1e-6
    )
    assert reading.kl.max() > 1e-3


def test_runs_that_resume_at_blocks_only_give_the_same(monkeypatch):
    adapter = as_adapter(tiny_model("llama"))
    plan_ = plan(sites=(1,), n_targets=8)
    parts = split_prompts(adapter, dataset(), plan_)

    def read():
        shape = find_shapes(adapter, parts.shaping, plan_, Bar())[1]
        along = find_directions(principal_axes(shape.mean, shape.covariance), shape.fisher["far"])
        one = Installed(1, "far", along.closed())
        return shape.fisher, measure(
            adapter, Recorded(adapter, parts.measuring), [one], plan_, Bar()
        )[0].kl

    fisher, kl = read()
    monkeypatch.setattr(RecordedRun, "prepare", lambda run: None)
    whole, again = read()
    torch.testing.assert_close(whole["far"], fisher["far"], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(again, kl, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def found():
    return ml.rate_distortion(tiny_model("llama"), dataset(60), distortions=(0.01, 0.1), **QUICK)


def test_rates_fall_with_the_distortion_and_come_with_the_kl_measured(found):
    for rate, low, high in (
        (found.rate, found.low, found.high),
        (found.shaped_rate, found.shaped_low, found.shaped_high),
        (found.covariance_rate, found.covariance_low, found.covariance_high),
    ):
        assert (np.diff(rate, axis=-1) <= 0).all()
        assert (low <= rate).all()
        assert (rate <= high).all()
    assert (found.rate[0, :, 0] > 5).all()
    for i, scale in enumerate(found.bands):
        for j, site in enumerate(found.sites):
            for shaped, rate in ((True, found.shaped_rate), (False, found.covariance_rate)):
                place = scale, site, shaped
                runs = [r for r in found.runs if (r.scale, r.site, r.shaped) == place]
                assert runs[0].rate == 0
                assert min(run.high for run in runs) <= 0.01
                of_runs = np.array([(r.rate, r.kl) for r in runs]).T
                assert [read_rate(*of_runs, d) for d in (0.01, 0.1)] == rate[i, j].tolist()


def test_small_distortions_are_as_expected(found):
    small = [r for r in found.runs if r.scale == "local" and r.site == 4 and 0 < r.kl < 0.02]
    assert small
    for run in small:
        assert 0.7 < run.kl / run.expected < 1.4


def test_what_nothing_reads_needs_no_rate(found):
    """After the last block, only the position itself is read."""
    assert (found.rate[1, 1] == 0).all()
    assert (found.high[1, 1] == 0).all()
    far = [run for run in found.runs if run.scale == "far" and run.site == 4]
    assert [run.kl for run in far] == [0.0, 0.0]


def shared(model, **changed):
    """What processes find together, and one finds alone."""
    given = {**QUICK, "sites": (0, 1, 4), "distortions": (0.01, 0.1), "batch_size": 7}
    return ml.rate_distortion(model, dataset(60), **given | changed)


ONE_PLACE = {"sites": (2,), "bands": {"far": (2, 4)}}
COMMAND = ["--sites", "0,4", "--distortions", "0.05,0.5", "--n-targets", "4", "--max-length", "60"]


def command_given(folder):
    files = ["--prompts", str(folder / "texts.txt"), "--out", str(folder / "rates.html")]
    return ["rate-distortion", "tiny", *files, *COMMAND, "--no-progress"]


def tiny_with_tokenizer(name, device=None):
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    return model


def find_together(rank, folder):
    """One of three processes: the same call, by hand and by the command, and two that must fail."""
    # Nobody may wait for what has been told already.
    processes_module._FAREWELL = 3600.0
    model, together = tiny_model("llama"), {"process_group": distributed.group.WORLD}
    shared(model, **together).save(folder / f"found-{rank}")
    shared(model, **together, **ONE_PLACE).save(folder / f"place-{rank}")
    told = []
    for changed in ({"n_targets": 4 + rank // 2}, {"distortions": (1e-14,)}):
        try:
            shared(model, **together, **ONE_PLACE, **changed)
        except (ValueError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    (folder / f"told-{rank}").write_text("\n".join(told))
    placing.load_model = tiny_with_tokenizer
    os.environ.update(WORLD_SIZE="3", RANK=str(rank), MASTER_ADDR="here", MASTER_PORT="0")
    code = run_command([*command_given(folder), "--save", str(folder / "command")])
    (folder / f"code-{rank}").write_text(str(code))


def test_processes_together_find_what_one_finds(tmp_path, monkeypatch, capsys):
    texts = [as_text(row) for row in random_tokens(30, 60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert in_processes(find_together, 3, tmp_path) == [0, 0, 0]
    for name, changed in (("found", {}), ("place", ONE_PLACE)):
        one = shared(tiny_model("llama"), **changed)
        several = [ml.results.RateDistortion.load(tmp_path / f"{name}-{rank}") for rank in range(3)]
        assert several[0] == several[1] == several[2]
        assert_same_rates(several[0], one)
    # One place is one process's, which says why it failed; the others were told.
    told = [(tmp_path / f"told-{rank}").read_text().splitlines() for rank in range(3)]
    assert "n_targets (4 in process 0, 5 in process 2)" in told[2][0]
    assert told[0][0].startswith(
        "PeerError: process 2 of 3 stopped: ValueError: process_group: all"
    )
    assert told[0][1].startswith("CannotMeasure: distortions must be above")
    for text in (told[1][1], told[2][1]):
        assert text.startswith("PeerError: process 0 of 3 stopped: CannotMeasure: distortions must")
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(3)] == ["0", "0", "0"]
    monkeypatch.setattr(placing, "load_model", tiny_with_tokenizer)
    assert run_command([*command_given(tmp_path), "--save", str(tmp_path / "alone")]) == 0
    assert "30 documents" in capsys.readouterr().out
    command, alone = (ml.results.RateDistortion.load(tmp_path / n) for n in ("command", "alone"))
    assert_same_rates(command, alone)


def assert_same_rates(found, expected):
    for name in (f"{kind}_{end}" for kind in ("shaped", "covariance") for end in ENDS):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9, err_msg=name
        )
    np.testing.assert_array_equal(found.shrinkage, expected.shrinkage)
    assert found.settings == expected.settings
    assert [run[:3] for run in found.runs] == [run[:3] for run in expected.runs]
    for run, other in zip(found.runs, expected.runs, strict=True):
        np.testing.assert_allclose(run[3:], other[3:], rtol=1e-6, atol=1e-9)


def test_batches_that_do_not_fit_say_which_argument_to_lower():
    model, error = tiny_model("llama"), MESSAGES[1]
    # How blocks are called is learned from five prompts of one token more.
    with small_device(model, 5 * 25, error):
        with pytest.raises(
            type(error),
            match=r"batch_size: 21 prompts of 24 tokens do not fit .* a "
            r"batch_size below 21",
        ) as raised:
            ml.rate_distortion(model, dataset(), **QUICK)
        assert str(error) in str(raised.value)
        ml.rate_distortion(model, dataset(), distortions=(0.1,), **QUICK, batch_size=5)
    with (
        small_device(model, 12, error),
        pytest.raises(type(error), match=r"give shorter prompts, or more devices"),
    ):
        ml.rate_distortion(model, dataset(), **QUICK, batch_size=1)


def few_directions_matter():
    """A model whose final norm lets 3 of 32 coordinates through."""
    model = tiny_model("llama", n_layers=2)
    with torch.no_grad():
        model.ln_final.weight[3:] = 0.0
    return model


def test_noise_goes_where_nothing_is_read():
    model = few_directions_matter()
    found = ml.rate_distortion(
        model,
        dataset(60),
        bands={"local": (1, 1)},
        sites=(2,),
        distortions=(0.003, 0.01),
        progress=False,
    )
    assert (found.shaped_rate < found.covariance_rate / 2).all()
    assert (found.shaped_high < found.covariance_low).all()
    assert found.rate.tolist() == found.shaped_rate.tolist()


def test_the_same_noise_in_random_directions_costs_more():
    adapter = as_adapter(few_directions_matter())
    plan_ = plan(sites=(2,), bands={"local": (1, 1)}, n_targets=16)
    parts = split_prompts(adapter, dataset(60), plan_)
    shape = find_shapes(adapter, parts.shaping, plan_, Bar())[2]
    axes = principal_axes(shape.mean, shape.covariance)
    shaped = find_directions(axes, shape.fisher["local"]).at_cost(0.01)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    turned = replace(
        shaped, into=turn @ shaped.into, out=shaped.out @ turn.T, turned=turn @ shaped.turned
    )
    readings = measure(
        adapter,
        Recorded(adapter, parts.measuring),
        [Installed(2, "local", channel) for channel in (shaped, turned)],
        plan_,
        Bar(),
    )
    assert turned.rate == shaped.rate
    assert readings[1].kl.mean() > 3 * readings[0].kl.mean()


def test_positions_without_attention_need_nothing_of_one_another():
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.attn.o.parameters():
                parameter.zero_()
    found = ml.rate_distortion(model, dataset(), distortions=(0.01,), **QUICK)
    assert (found.high[1] < 1e-6).all()
    assert (found.low[0] > 1).all()


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    again, other = (
        ml.rate_distortion(tiny_model("llama"), dataset(60), distortions=(0.1,), seed=seed, **QUICK)
        for seed in (0, 1)
    )
    assert again == ml.rate_distortion(
        tiny_model("llama"), dataset(60), distortions=(0.1,), **QUICK
    )
    assert (again.rate != other.rate).any()


def test_no_group_is_in_two_parts():
    adapter = as_adapter(tiny_model("llama"))
    tokens = random_tokens(60, 24)
    prompts = ml.PromptDataset.from_tokens(tokens, groups=[i // 3 for i in range(60)])
    parts = split_prompts(adapter, prompts, plan())
    groups = [set(part.groups) for part in (parts.shaping, parts.choosing, parts.measuring)]
    assert sum(map(len, groups)) == 20
    assert len(set.union(*groups)) == 20
    assert len(groups[0]) > len(groups[2]) > len(groups[1])


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    kept = [parameter.requires_grad for parameter in model.parameters()]
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    kept[0] = False
    model.train()
    ml.rate_distortion(model, dataset(), distortions=(0.1,), **QUICK)
    assert [parameter.requires_grad for parameter in model.parameters()] == kept
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    with pytest.raises(ZeroDivisionError):
        fails_while_differentiating(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == kept


def fails_while_differentiating(model):
    with torch.no_grad(), differentiable(as_adapter(model), "a test"):
        assert torch.is_grad_enabled()
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise ZeroDivisionError


@pytest.mark.parametrize("architecture", ["neox", "gemma", "bloom", "opt", "phi3"])
def test_many_architectures_are_measured(architecture):
    found = ml.rate_distortion(tiny_model(architecture), dataset(), distortions=(0.05,), **QUICK)
    assert found.rate[0, 1, 0] > 0
    assert found.rate[1, 1, 0] == 0


def test_what_cannot_be_measured_says_why():
    model = tiny_model("llama")
    with pytest.raises(ml.CannotMeasure, match=r"at least 12 groups .* of 8 tokens.*got 11"):
        ml.rate_distortion(model, dataset(11), **QUICK)
    short = ml.PromptDataset.from_tokens(random_tokens(20, 8))
    with pytest.raises(ml.CannotMeasure, match=r"at least 64 positions .*got 4"):
        ml.rate_distortion(model, short, **QUICK)
    with pytest.raises(ml.CannotMeasure, match=r"above what can be told from rounding"):
        ml.rate_distortion(model, dataset(), distortions=(1e-14,), **QUICK)
    encoder = tiny_model("bert")
    encoder.tokenizer = tiny_tokenizer()
    with pytest.raises(ml.CannotMeasure, match="needs a causal model"):
        ml.rate_distortion(encoder, dataset(), **QUICK)
    with torch.inference_mode():
        made = tiny_model("llama")
    with pytest.raises(ml.CannotMeasure, match=r"was made under torch\.inference_mode"):
        ml.rate_distortion(made, dataset(), **QUICK)


def test_prompts_that_are_too_short_are_left_out_and_said_to_be():
    adapter = as_adapter(tiny_model("llama"))
    mixed = [*random_tokens(20, 8).tolist(), *random_tokens(9, 7).tolist()]
    with pytest.warns(UserWarning, match="9 of 29 prompts were left out: they hold fewer than 8"):
        parts = split_prompts(adapter, ml.PromptDataset.from_tokens(mixed), plan())
    assert sum(parts.group_counts().values()) == 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distortions": ()}, "at least one KL above 0"),
        ({"distortions": (0.1, 0.0)}, "at least one KL above 0"),
        ({"distortions": (0.1, 0.01)}, "distortions must rise"),
        ({"sites": (3, 1)}, "different sites in rising order"),
        ({"sites": (0, 5)}, "must lie in 0 ... 4"),
        ({"n_targets": 0}, "n_targets must be at least 1"),
        ({"bands": {"near": (0, 2)}}, "1 <= a <= b"),
    ],
)
def test_arguments_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ml.rate_distortion(tiny_model("llama"), dataset(), **QUICK | given)


def test_the_rate_is_that_of_whichever_noise_needs_less_with_its_own_interval():
    made = MADE["RateDistortion"]
    for kind, sites in (("shaped", [0, 2]), ("covariance", [1])):
        for end in ENDS:
            own = getattr(made, f"{kind}_{end}")
            assert getattr(made, end)[:, sites].tolist() == own[:, sites].tolist()
    assert (made.rate <= made.shaped_rate).all()
    assert (made.rate <= made.covariance_rate).all()
    assert made.is_shaped.all(axis=(0, 2)).tolist() == [True, False, True]
    # By scale, site and distortion, each on its own.
    mixed = made.covariance_rate.copy()
    mixed[0, 0, 1] = made.shaped_rate[0, 0, 1] / 3
    mixed = replace(made, covariance_rate=mixed)
    assert mixed.rate[0, 0].tolist() == [made.shaped_rate[0, 0, 0], made.shaped_rate[0, 0, 1] / 3]
    assert mixed.high[0, 0, 1] == made.covariance_high[0, 0, 1]
    table = made.to_dataframe()
    rates = [table[table["quantity"] == f"{kind}rate"] for kind in ("", "shaped_", "covariance_")]
    least = np.minimum(*(rate["value"].to_numpy() for rate in rates[1:]))
    assert rates[0]["value"].tolist() == least.tolist()
    assert "less than shaped noise at 2 of 6 scales and sites" in made.summary()
    assert (
        "less than shaped noise"
        not in replace(made, covariance_rate=2 * made.shaped_rate).summary()
    )


def test_files_whose_rate_was_of_shaped_channels_alone_are_refused(tmp_path):
    """They hold the same names, and would say something else under them."""
    made = MADE["RateDistortion"]
    header, arrays = read_result(made.save(tmp_path / "now"), "RateDistortion")
    for end in ENDS:
        name = f"shaped_{end}"
        arrays[end], header[end] = arrays.pop(header.pop(name)), end
    for name in ("format", "kind"):
        header.pop(name)
    write_result(tmp_path / "earlier", "RateDistortion", header, arrays)
    with pytest.raises(ValueError, match=r"does not hold what a RateDistortion .*shaped_rate"):
        ml.results.RateDistortion.load(tmp_path / "earlier")


def test_curves_are_rows_of_the_result():
    made = MADE["RateDistortion"]
    scale = next(iter(made.bands))
    assert made.over_sites(scale, 0.1).values.tolist() == made.rate[0, :, 1].tolist()
    shaped = made.over_sites(scale, 0.1, noise="shaped")
    assert shaped.high.tolist() == made.shaped_high[0, :, 1].tolist()
    covariance = made.over_distortions(scale, made.sites[2], noise="covariance")
    assert covariance.values.tolist() == made.covariance_rate[0, 2].tolist()
    assert covariance.guarantee == made.guarantee
    with pytest.raises(ValueError, match="noise must be one of either, shaped, covariance, got 1"):
        made.over_sites(scale, 0.1, noise=1)
    with pytest.raises(ValueError, match=r"distortion must be one of 0.01, 0.1, got 0.2"):
        made.over_sites(scale, 0.2)
    with pytest.raises(ValueError, match="site must be one of"):
        made.over_distortions(scale, 99)
    with pytest.raises(ValueError, match="scale must be one of"):
        made.over_sites("nowhere", 0.1)


def test_the_figure_shows_every_scale_and_site():
    made = MADE["RateDistortion"]
    figure = ml.plot_rate_distortion(made, unit="bits")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == len(made.bands) * (2 + len(made.sites))
    first = next(trace for trace in lines if trace.showlegend)
    np.testing.assert_allclose(first.y, made.rate[0, :, 1] / np.log(2))
    assert ["shaped noise" in text for text in first.hovertext] == [True, False, True]
    dotted = next(trace for trace in lines if trace.line.dash == "dot")
    np.testing.assert_allclose(dotted.y, made.covariance_rate[0, :, 1] / np.log(2))
    np.testing.assert_allclose(lines[-1].x, made.distortions)
