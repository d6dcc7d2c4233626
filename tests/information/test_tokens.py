"""Readings of single tokens against processes whose information is known, and in closed form."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from token_processes import AHEAD, BACK, PROCESSES, Faint, read, read_made, truths

from mspgt_lens.information.forging import forged
from mspgt_lens.information.site_reader import Predictions, Residuals
from mspgt_lens.information.tilting import (
    TEMPERATURES,
    AmongTokens,
    Tilt,
    best_temperature,
    channel,
    log_total,
    mean_gain,
)
from mspgt_lens.moments import Sample

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.simulation
@pytest.mark.parametrize("steps", [BACK, AHEAD], ids=["past carried", "future carried"])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_values_lie_below_the_truth_and_intervals_hold_what_readers_can_use(process, steps):
    known = truths(process, steps)
    readings = [read(process, steps, 300, seed) for seed in range(5)]
    held = []
    for (side, offset, site), truth in known.items():
        of = [reading[side, offset] for reading in readings]
        values = np.array([reading.values[site] for reading in of])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert values.mean() < truth + 3 * error + 0.005
        assert np.mean([reading.low[site] > truth for reading in of]) <= 0.2
        limit = tabled(process, steps, side, offset, site).limit
        held += [reading.low[site] <= limit <= reading.high[site] for reading in of]
    assert len(held) == 21 * len(readings)
    # One draw of text decides them all together.
    assert np.mean(held) >= 0.85


def test_the_table_s_limits_are_what_readers_find_in_much_text():
    process, steps = PROCESSES[0], BACK
    found = read(process, steps, 4000, 7, 8192)
    for (side, offset, site), truth in truths(process, steps).items():
        row = tabled(process, steps, side, offset, site)
        assert row.truth == pytest.approx(truth, abs=1e-3)
        assert row.limit < truth + 0.01
        assert found[side, offset].values[site] == pytest.approx(row.limit, abs=0.05)


def tabled(process, steps, side, offset, site):
    """The row of ``docs/tokens.csv``."""
    table = pd.read_csv(DOCS / "tokens.csv")
    place = "prediction" if site == len(steps) else f"token at {steps[site]:+d}"
    asked = offset if side == "future" else 1 - offset
    rows = table[
        (table.process == process.name)
        & (table.site == place)
        & (table.asked == f"token at {asked:+d}")
    ]
    return rows.iloc[0]


def test_tokens_that_nobody_wrote_do_not_win_between_those_that_were():
    made = Faint(0)
    current = read_made(made, made.draw(300), {"next": (1, 1)}, 0)[0]
    assert (current.values > 0.8 * np.log(made.N_WRITTEN)).all()


def test_a_tilt_is_bayes_rule_for_a_linear_gaussian_channel_of_any_tokens():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((30, 4)) ** 3)
    share = torch.from_numpy(rng.dirichlet(np.ones(30)))
    mean = share @ tokens
    centered = tokens - mean
    null = centered.T @ (share[:, None] * centered)
    mixing = torch.from_numpy(rng.standard_normal((4, 6)))
    root = torch.from_numpy(rng.standard_normal((6, 6)))
    noise = root @ root.T
    seen = mixing.T @ null @ mixing + noise
    weights = torch.linalg.solve(seen, mixing.T @ null)
    tilt = channel(null - null @ mixing @ weights, null)
    z = torch.from_numpy(rng.standard_normal((5, 6)))
    scores = tilt.scores(z @ weights, centered)
    off = z[:, None] - centered @ mixing
    likelihood = -(off @ torch.linalg.inv(noise) * off).sum(dim=-1) / 2
    expected = (likelihood + share.log()).log_softmax(dim=1)
    told = (scores + share.log()).log_softmax(dim=1)
    torch.testing.assert_close(told, expected, rtol=1e-8, atol=1e-8)
    wanted = torch.tensor([0, 7, 7, 12, 29])
    gain = AmongTokens(scores, share.log(), wanted).gain(1.0)
    at_once = tilt.gain(z @ weights, centered, share.log(), wanted, 1.0)
    np.testing.assert_allclose(at_once, gain, atol=1e-12)
    torch.testing.assert_close(gain, (expected - share.log())[range(5), wanted])
    assert (gain <= -share.log()[wanted]).all()


def test_the_best_temperature_is_found_from_wherever_the_search_begins():
    rng = np.random.default_rng(3)
    found = set()
    for size in (-1.0, 0.0, 0.5, 1.0, 2.0, 5.0, 20.0):
        scores = torch.from_numpy(rng.standard_normal((200, 9)))
        right = torch.distributions.Categorical(logits=size * scores).sample()
        asked = [AmongTokens(scores, torch.full((9,), 1 / 9).double().log(), right)]
        gains = {0.0: 0.0} | {t: float(asked[0].gain(t).mean()) for t in TEMPERATURES}
        best = max(gains, key=gains.__getitem__)
        for start in gains:
            found_from = best_temperature(partial(mean_gain, asked), start)
            assert found_from == (best, pytest.approx(gains[best]))
        found.add(best)
    assert len(found) > 2


def test_what_is_hardly_possible_adds_nothing():
    logits = torch.tensor([[3.0, 2.0, -90.0, -120.0], [-500.0, -500.0, -640.0, -500.0]])
    expected = logits.double().logsumexp(dim=1)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(log_total(logits.to(dtype, copy=True)), expected.to(dtype))


@pytest.mark.parametrize(
    ("draw", "least", "most"),
    [
        pytest.param(lambda rng, n: rng.standard_normal(n), 0.0, 0.05, id="Gaussian"),
        # Two values tell 0.69 nats at most, of which a Gaussian makes 1/2 log(1 + 1/0.01) = 2.3.
        pytest.param(lambda rng, n: rng.choice([-1.0, 1.0], n), 1.5, 1.8, id="two values"),
    ],
)
def test_what_a_target_forges_is_what_a_gaussian_reads_beyond_it(draw, least, most):
    rng, n, noise = np.random.default_rng(1), 1000, 0.01
    y = draw(rng, n)
    z = y + np.sqrt(noise) * rng.standard_normal(n)
    weight, left = 1 / (1 + noise), noise / (1 + noise)
    fold, column = np.arange(n) % 5, torch.from_numpy((weight * z)[:, None])
    residuals = Residuals(*(torch.tensor(v).double() for v in ([[left]], [[1.0]], [0.0], [0.0])))
    neighbors = [(((k + 1) % 5), ((k - 1) % 5)) for k in range(5)]
    inner = [
        [(j, np.flatnonzero(fold == j), column[fold == j]) for j in pair] for pair in neighbors
    ]
    told = Predictions(column, inner, [], [residuals] * 5, torch.zeros(5, 1).double())
    sample = Sample(
        priority=np.arange(n, dtype=np.uint64),
        rows=(),
        next_token=np.zeros(n, dtype=np.int64),
        single=np.zeros((n, 0, 1), dtype=np.int64),
        read=np.ones(n, dtype=bool),
        targets=y[:, None].astype(np.float32),
        fold=fold,
        group=np.arange(n, dtype=np.uint64),
    )
    assert least <= forged(told, sample, 0) <= most


def test_a_tilt_without_a_second_term_is_linear_in_the_prediction():
    tilt = Tilt(torch.eye(2), None)
    scores = tilt.scores(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    torch.testing.assert_close(scores, torch.tensor([[11.0, 2.0]]))
