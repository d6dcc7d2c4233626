"""The odds for changes: against the long way, and what chance makes of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm, t

from mspgt_lens.scales import chance, odds
from mspgt_lens.scales.chance import ROWS, SIGNALS, Table, chance_for, draw_table
from mspgt_lens.scales.evidence import Change, capped, change_curves, evidence_for_change
from mspgt_lens.scales.gradual import gradual_kinds
from mspgt_lens.scales.odds import Told, own_evidence, weigh_changes
from mspgt_lens.scales.seeking import seek_changes, standardized
from mspgt_lens.scales.segments import segment_blocks
from mspgt_lens.synthetic import synthetic_signals

pytestmark = pytest.mark.simulation

SIZES = ((4.0, 0.5), (64.0, 0.25), (4096.0, 0.25))
SORTS = {("jump", 1): 0.4, ("jump", 2): 0.05, ("jump", 3): 0.05, ("bend", 1): 0.5}
SHARES = (0.5, 0.95)


def told(series, *given_changes):
    return weigh_changes(evidence_for_change(len(series), given_changes), standardized(series))


def straight(n_rows):
    return np.column_stack([np.ones(n_rows), np.arange(n_rows)])


def scale_free(series, covariances, fitted):
    """Restricted log-likelihoods of normal series whose size of noise is fitted."""
    beyond = np.linalg.svd(fitted)[0][:, fitted.shape[1] :]
    inside = beyond.T @ covariances @ beyond
    left = beyond.T @ series
    squares = (left * np.linalg.solve(inside, left)).sum(axis=-2)
    size = np.linalg.slogdet(inside)[1][..., None]
    return -0.5 * size - inside.shape[-1] / 2 * np.log(squares)


def heavier(series, roots, fitted):
    """How much likelier rows are under t(3) than under normal noise, the likeliest of scales."""
    axes, white = np.linalg.inv(roots) @ fitted, np.linalg.inv(roots) @ series
    left = white - axes @ (np.linalg.pinv(axes) @ white)
    left /= np.sqrt((left**2).mean(axis=-2, keepdims=True))
    scales = (0.3, 0.45, 0.65, 1.0)
    tails = np.max([t.logpdf(left, 3, scale=s).mean(axis=-2) for s in scales], axis=0)
    return (tails - norm.logpdf(left).mean(axis=-2)) * (len(series) - 2)


def long_way(series):
    """The odds from covariances, every kind and pair of changes in turn."""
    n_rows, n_signals = series.shape
    kinds, line = gradual_kinds(n_rows), straight(n_rows)
    candidates = evidence_for_change(n_rows).candidates
    sorts = [(c.kind, c.width) for c in candidates]
    place = np.log([SORTS[sort] / sorts.count(sort) for sort in sorts])
    heavy_chances = np.where(np.isin(np.arange(len(kinds.words)), kinds.jagged), kinds.chances, 0)
    chances = np.concatenate([kinds.chances, heavy_chances / heavy_chances.sum()]) / 2
    allowed = chances > 0
    prior = np.log(chances[allowed])

    def likelihoods(changes, variance):
        curves = change_curves(n_rows, changes)
        wider = kinds.covariances + variance * curves @ curves.T
        normal = scale_free(series, wider, line)
        heavy = normal + heavier(series, kinds.roots, np.column_stack([line, curves]))
        return np.concatenate([normal, heavy])[allowed]

    def mixed(each):
        spread = logsumexp(each + prior[:, None], axis=0)
        return np.logaddexp(np.log(0.8) + each, np.log(0.2) + spread), spread

    none, apart = mixed(likelihoods((), 0.0))
    totals = none.sum(axis=1) + prior
    whole = np.logaddexp(logsumexp(totals), apart.sum()) - np.log(2)
    best = none[totals.argmax()]
    part = best + (whole - best.sum()) / n_signals

    def evidence(changes, variance):
        one, one_apart = mixed(likelihoods(changes, variance))
        values = []
        for share in SHARES:
            having, lacking = np.log([share, 1 - share])
            alike = capped(np.logaddexp(having + one, lacking + none) - part).sum(axis=1)
            each = capped(np.logaddexp(having + one_apart, lacking + apart) - part).sum()
            values += [logsumexp(alike + prior), each]
        return logsumexp(values) - np.log(len(values))

    numbers = range(len(candidates))
    values = []
    for variance, share in SIZES:
        for i in numbers:
            values.append(place[i] + np.log(share) + evidence([candidates[i]], variance))
        for i, j in itertools.combinations(numbers, 2):
            pair = evidence([candidates[i], candidates[j]], variance)
            values.append(place[i] + place[j] + np.log(2 * share) + pair)
    return logsumexp(values) - np.log(2)


@pytest.mark.parametrize("given_changes", [(), (Change("jump", 4),)])
@pytest.mark.parametrize("variance", [4.0, 4096.0])
def test_gains_are_those_of_normal_sizes(given_changes, variance):
    """A change of normal size adds to the covariance; the long way."""
    n = 9
    series = np.random.default_rng(0).standard_normal((n, 2))
    evidence = evidence_for_change(n, given_changes)
    line = np.column_stack([straight(n), change_curves(n, given_changes)])
    weighing = odds._Weighing(evidence, series)
    one = weighing.rows.one(variance)
    two = weighing.rows.two(np.full(len(one), 2), variance)
    first = evidence.candidates[2]
    for kind in range(0, len(one), 23):
        covariance = gradual_kinds(n).covariances[kind]
        plain = scale_free(series, covariance, line)
        for at, change in enumerate(evidence.candidates):
            for gains, changes in ((one, [change]), (two, [first, change])):
                if len(set(changes)) < len(changes):
                    assert (gains[kind, at] < -1e3).all()
                    continue
                curves = change_curves(n, changes)
                wider = scale_free(series, covariance + variance * curves @ curves.T, line)
                expected = wider - plain
                if np.linalg.matrix_rank(np.column_stack([line, curves])) < 2 + len(
                    [*given_changes, *changes]
                ):
                    continue
                assert gains[kind, at] == pytest.approx(expected, abs=0.02)


def test_odds_are_those_of_the_long_way():
    """But for kinds that are not likely and pairs of two unlikely changes, which are left out."""
    series = np.random.default_rng(4).standard_normal((6, 2))
    series[3:] += 3.0
    assert told(series).odds == pytest.approx(long_way(standardized(series)), abs=0.3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 24), st.integers(1, 5))
def test_order_units_and_straight_drift_change_no_odds(seed, n_rows, n_signals):
    rng = np.random.default_rng(seed)
    series = rng.standard_normal((n_rows, n_signals))
    order = rng.permutation(n_signals)
    changed = 5 - 1e3 * series[:, order] + 70 * np.arange(n_rows)[:, None]
    first, second = told(series), told(changed)
    assert first.odds == pytest.approx(second.odds, abs=0.05)
    assert np.allclose(first.own[:, order], second.own, atol=0.05)


def test_what_is_given_changes_no_odds():
    series = np.random.default_rng(3).standard_normal((20, 4))
    for change in (Change("jump", 8), Change("bend", 8)):
        larger = series + 50 * change_curves(20, [change])
        assert told(larger, change).odds == pytest.approx(told(series, change).odds, abs=0.05)
        assert told(larger).odds > 8
        assert told(larger).best.row == 8


@pytest.mark.parametrize("noise", ["white", "random_walk"])
@pytest.mark.parametrize("kind", ["jump", "bend"])
def test_odds_never_fall_as_a_change_grows(kind, noise):
    change = Change(kind, 7)
    curve = change_curves(16, [change])
    found = []
    for size in (0, 2, 4, 8, 16, 64, 1000):
        made = (synthetic_signals(16, 4, n_boundaries=0, noise=noise, seed=s) for s in range(12))
        found.append(np.mean([told(one.signals + size * curve).odds for one in made]))
    assert (np.diff(found) > -0.3).all()
    assert found[-1] > found[0] + 8


def test_one_signal_does_not_decide_for_all():
    series = np.random.default_rng(5).standard_normal((20, 6))
    one, three = series.copy(), series.copy()
    one[9:, 2] += 1e4
    three[9:, :3] += 6.0
    assert told(three).odds > told(one).odds + 3
    at = [c == Change("jump", 9) for c in evidence_for_change(20).candidates].index(True)
    own = own_evidence(evidence_for_change(20), standardized(one))[at]
    assert own[2] > 40
    assert np.delete(own, 2).max() < 2


def test_heavy_tails_and_likeness_are_told():
    rng = np.random.default_rng(6)
    normal = [told(rng.standard_normal((22, 6))) for _ in range(10)]
    heavy = [told(rng.standard_t(3, (22, 6))) for _ in range(10)]
    assert np.mean([one.heavy for one in heavy]) > np.mean([one.heavy for one in normal]) + 4
    shared = rng.standard_normal((22, 1)) + 0.2 * rng.standard_normal((22, 6))
    assert told(shared).together > 0.7
    assert normal[0].together < 0.15
    assert told(shared[:, :1]).together == 0


@pytest.mark.parametrize("jump", [0.0, 8.0])
def test_signals_that_repeat_another_count_once(jump):
    rng = np.random.default_rng(10)
    one, other = np.cumsum(rng.standard_normal((2, 22)), axis=1)
    one[12:] += jump
    copies = np.column_stack([one, -3 * one, other, 2 * other + 5, one])
    assert told(copies).distinct == (0, 2)
    both = np.column_stack([one, other])
    assert seek_changes(standardized(copies)).first.p_value == pytest.approx(
        seek_changes(standardized(both)).first.p_value, rel=0.02
    )
    found = segment_blocks(np.vstack([copies[:1], copies, copies[-1:]]), n_bootstraps=20)
    assert "signal 1, signal 3, signal 4 say nearly the same" in found.warnings[-1]
    # Few rows cannot tell.
    assert told(copies[:11]).distinct == (0, 1, 2, 3, 4)
    # Of those that are not quite the same, the one with less evidence counts, in any order.
    nearly = np.column_stack([one, one + 0.05 * rng.standard_normal(22), other])
    orders = [list(order) for order in itertools.permutations(range(3))]
    p_values = [seek_changes(standardized(nearly[:, order])).first.p_value for order in orders]
    assert max(p_values) < 1.03 * min(p_values)


def test_no_number_is_lost_where_nothing_is_left():
    """Exact lines, steps and curves, few rows, and changes that given ones add up to."""
    rows = np.arange(22.0)[:, None]
    step = (rows > 10) * [1.0, 2.0, 3.0]
    rng = np.random.default_rng(7)
    given_changes = (Change("jump", 3), Change("jump", 4), Change("bend", 5))
    for found in (
        told(1 / (1 + rows) * [1.0, 2.0]),
        told(step),
        told(1e10 * step + rng.standard_normal((22, 3))),
        told(rng.standard_normal((4, 5))),
        # Signals of many kinds, of which two of the three jumps there are explain everything.
        told(chance._drawn(4, 8, False, np.random.default_rng([0, 4, 8, 0, 269]))),
        told(rng.standard_normal((9, 3)), *given_changes),
        told(np.repeat(np.cumsum(rng.standard_normal((22, 1)), axis=0), 8, axis=1)),
    ):
        assert np.isfinite([found.odds, found.heavy, found.together]).all()
        assert 0 <= found.even <= 1
        assert not np.isnan(found.own).any()


def made_table():
    drawn = np.zeros((2, 400, 7))
    drawn[..., 0] = np.arange(400)
    drawn[1, :, 0] += 200
    drawn[..., 1] = np.where(np.arange(400) % 2, 0.0, 0.8)
    drawn[..., 2:] = np.arange(400)[:, None]
    return Table(drawn)


def test_p_values_are_shares_of_alike_series():
    """Odd ones are those of signals that have nothing in common."""
    table, change = made_table(), Change("jump", 1)
    own = np.zeros((1, 1))

    def p_value(value, heavy, together, **worst):
        reached = Told(value, heavy, together, 0.0, (0,), change, own)
        return table.p_value(reached, together, **worst)

    # Of the 200 draws that are as much alike.
    def share(above):
        return (above + 1) / 201

    def beyond(value):
        """Thirty are above 340, by 30 in the mean; shares fall as an exponential does."""
        return share(30) * np.exp(-(value - 340) / 30)

    assert p_value(300.5, -50.0, 0.0) == pytest.approx(share(50))
    assert p_value(380.5, -50.0, 0.0) == pytest.approx(beyond(380.5), rel=0.02)
    assert p_value(2000, -50.0, 0.0) == pytest.approx(1 / 401)
    assert p_value(2000, -50.0, 0.0, worst=100.0) == pytest.approx(1 / 401)
    # What reaches high odds more often counts for as much.
    assert p_value(380.5, -50.0, 0.0, worst=3.0) == pytest.approx(3 * beyond(380.5), rel=0.02)
    assert p_value(300.5, -50.0, 0.0, worst=5.0) == pytest.approx(1)
    # Heavy tails account for more.
    assert p_value(500.5, 50.0, 0.0) == pytest.approx(share(50))
    assert p_value(500.5, 50.0, 0.0, heavy_worst=2.0) == pytest.approx(2 * share(50))
    assert p_value(500.5, 50.0, 0.0, worst=3.0, heavy_worst=2.0) == pytest.approx(3 * share(50))
    assert p_value(300.5, 50.0, 0.0, heavy_worst=2.0) == pytest.approx(1)
    # As likely as normal ones, but for the odds of 8 beforehand.
    both = (beyond(500.5) + 8 * 2 * share(50)) / 9
    assert p_value(500.5, 0.0, 0.0, heavy_worst=2.0) == pytest.approx(both, rel=0.02)
    # Between, those that are nearer by their logarithms are taken, as if they were near.
    each = np.exp(-1 / 2)
    assert p_value(300, -50.0, 0.4) == pytest.approx((50 * each + 1) / (200 * each + 1), rel=1e-3)
    assert table.anywhere(0.5) == pytest.approx(199.5)


def test_single_signals_are_held_against_the_tails_that_signals_have():
    drawn = np.zeros((2, 400, 7))
    drawn[0, :, 2] = np.arange(400)
    drawn[1, :, 2] = np.arange(400) + 200
    table = Table(drawn)

    def p_alone(evidence, heavy, heavy_worst=1.0):
        reached = Told(0.0, heavy, 0.0, 0.0, (0,), Change("jump", 1), np.zeros((1, 1)))
        return table.p_alone(reached, evidence, heavy_worst)

    assert p_alone(389.5, -50.0) == pytest.approx(11 / 401)
    assert p_alone(389.5, -50.0, 3.0) == pytest.approx(11 / 401)
    assert p_alone(589.5, 50.0) == pytest.approx(11 / 401)
    assert p_alone(589.5, 50.0, 3.0) == pytest.approx(33 / 401)
    # As likely as normal ones, but for the odds of 8 beforehand.
    assert p_alone(389.5, 0.0) == pytest.approx((11 + 8 * 211) / 9 / 401)


@pytest.mark.parametrize("heavy", [-50.0, -2.0, 50.0])
@pytest.mark.parametrize(("n_rows", "n_signals"), [(4, 1), (12, 5), (78, 16)])
def test_what_one_signal_reaches_by_chance_has_that_chance(n_rows, n_signals, heavy):
    chances = chance_for(n_rows, n_signals)
    reached = Told(0.0, heavy, 0.9, 0.0, (0,), Change("jump", 1), np.zeros((1, 1)))
    alone = chances.alone(reached, 0.05)
    assert chances.p_alone(reached, alone + 0.01) <= 0.05 <= chances.p_alone(reached, alone - 0.01)
    # A share that no evidence is as rare as.
    assert chances.alone(reached, 1e-4) == np.inf


def test_small_p_values_are_those_of_exponential_tails():
    rng, change, own = np.random.default_rng(8), Change("jump", 1), np.zeros((1, 1))
    found = []
    for _ in range(40):
        drawn = np.zeros((2, 300, 7))
        drawn[..., 0] = rng.exponential(2.0, (2, 300))
        reached = Told(2 * np.log(100), -50.0, 0.0, 0.0, (0,), change, own)
        found.append(Table(drawn).p_value(reached, 0.0))
    assert np.exp(np.mean(np.log(found))) == pytest.approx(0.01, rel=0.3)
    assert max(found) < 0.025


def test_even_noise_is_told_from_walks_that_signals_share():
    """So that correlated walks, which reach high odds most often, count for more, and noise not."""
    rng = np.random.default_rng(12)
    common = np.sqrt(0.5) * rng.standard_normal((12, 22, 1))
    noise = common + np.sqrt(0.5) * rng.standard_normal((12, 22, 8))
    jumps = noise.copy()
    jumps[:, 8:] += 3.0
    walks = np.cumsum(noise, axis=1)
    assert np.median([told(one).even for one in (*noise, *jumps)]) > 0.05
    assert max(told(one).even for one in walks) < 0.02
    found = told(walks[0])
    chances = chance_for(22, 8)
    assert chances.p_value(found) > 3 * chances.p_value(found._replace(even=1.0))


@pytest.mark.parametrize(("n_rows", "times"), [(10, 3.0), (22, 3.0), (78, 3.0 * 78 / 22)])
def test_heavy_tailed_walks_count_for_more_from_many_rows(n_rows, times):
    chances, own = chance_for(n_rows, 4), np.zeros((1, 1))
    # What a twentieth of heavy-tailed series reaches.
    odds_of_some = np.quantile(chances.parts[0][0]._odds[1], 0.95)
    walk = Told(odds_of_some, 50.0, 0.0, 0.0, (0, 1, 2, 3), Change("jump", 1), own)
    even = chances.p_value(walk._replace(even=1e9))
    assert chances.p_value(walk) == pytest.approx(times * even, rel=1e-3)


def test_rows_that_signals_share_make_them_hardly_more_alike():
    """What a transition over several blocks leaves beside two changes."""
    rng = np.random.default_rng(9)
    apart = [told(rng.standard_normal((22, 6))).together for _ in range(20)]
    series = rng.standard_normal((20, 22, 6))
    for row, size in ((5, 30.0), (10, -30.0), (15, 30.0)):
        series[:, row] += size
    shared = [told(one).together for one in series]
    # By the values themselves it would be 0.8 and more.
    assert np.mean(shared) < np.mean(apart) + 0.3


def test_tables_between_are_weighed_by_how_near_they_are():
    assert [w for *_, w in chance_for(22, 8).parts] == [1.0]
    between = chance_for(26, 5)
    assert sum(w for *_, w in between.parts) == pytest.approx(1)
    assert [n for _, n, _ in between.parts] == [4, 8, 4, 8]
    # Beyond the tables, as at their ends.
    assert chance_for(500, 300).parts == chance_for(ROWS[-1], SIGNALS[-1]).parts
    assert len(chance_for(3, 1).parts) == 1


@pytest.mark.parametrize(("n_rows", "n_signals"), [(4, 1), (10, 4), (22, 8), (30, 16)])
def test_stored_tables_are_those_of_the_evidence_as_it_is(n_rows, n_signals):
    """Whoever changes the evidence draws them anew: python -m benchmarks.chance."""
    stored = chance._stored()[chance.table_name(n_rows, n_signals)][:, :3]
    drawn = draw_table(n_rows, n_signals, 3)
    assert np.allclose(stored, drawn, rtol=2e-3, atol=0.03)


def test_p_values_hold_between_tables_too():
    """150 new series of 12 rows and 5 signals; more than 15 below .05 have a chance of 1%.

    With what counts for more taken out, as if noise were even.
    """
    evidence = evidence_for_change(12)
    p_values = []
    for draw in range(150):
        series = chance._drawn(12, 5, False, np.random.default_rng([99, draw]))
        found = weigh_changes(evidence, series)._replace(even=1e6)
        p_values.append(chance_for(12, 5).p_value(found))
    assert np.mean(np.array(p_values) < 0.05) <= 15 / 150
    assert 0.35 < np.mean(p_values) < 0.75
