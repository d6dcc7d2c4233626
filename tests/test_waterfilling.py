"""Water-filling is the optimum, and its fit finds what lengths can tell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

import mspgt_lens as ml

pytestmark = pytest.mark.simulation

DEPTHS = np.array([16, 24, 28, 32, 40, 48, 64, 80])
SHARES, OFFSETS = np.array([0.22, 0.33, 0.45]), np.array([3.0, 2.0, -5.0])
positive = st.floats(0.05, 20.0)
three = st.lists(positive, min_size=3, max_size=3).map(np.array)


def distortion(lengths, betas, kappas, distortions):
    return (betas * distortions * np.exp(-kappas * lengths)).sum(axis=-1)


def parameters(seed):
    rng = np.random.default_rng(seed)
    return {
        "betas": rng.uniform(0.2, 3.0, 3),
        "kappas": rng.uniform(0.05, 0.8, 3),
        "distortions": rng.uniform(0.2, 3.0, 3),
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_layers", [1, 3, 12, 30])
def test_whole_layers_equal_a_search_over_all_allocations(seed, n_layers):
    given_ = parameters(seed)
    every = np.array(
        [(a, b, n_layers - a - b) for a in range(n_layers + 1) for b in range(n_layers + 1 - a)]
    )
    least = distortion(every, **given_).min()
    found = ml.theory.water_fill_whole(n_layers, **given_)
    assert found.sum() == n_layers
    assert distortion(found, **given_) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_real_layers_equal_a_fine_search(seed):
    """The optimum over a grid of 1/20 of a layer is no better, and nearly as good."""
    given_, n_layers, fine = parameters(seed), 10, 20
    steps = range(n_layers * fine + 1)
    every = np.array([(a, b) for a, b in itertools.product(steps, steps) if a + b <= steps[-1]])
    every = np.column_stack([every, steps[-1] - every.sum(axis=1)]) / fine
    least = distortion(every, **given_).min()
    best = distortion(ml.theory.water_fill(n_layers, **given_), **given_)
    assert best <= least * (1 + 1e-12)
    assert best == pytest.approx(least, rel=1e-3)


@settings(deadline=None, max_examples=200)
@given(three, three, three, st.integers(1, 100))
def test_the_exact_water_level_is_the_root_of_the_constraint(betas, kappas, distortions, n_layers):
    importance = np.log(betas * kappas * distortions)

    def lengths(log_mu):
        return ((importance - log_mu) / kappas).clip(min=0.0)

    root = brentq(lambda x: lengths(x).sum() - n_layers, -3000.0, importance.max(), xtol=1e-12)
    found = ml.theory.water_fill(n_layers, betas=betas, kappas=kappas, distortions=distortions)
    np.testing.assert_allclose(found, lengths(root), atol=1e-6)
    assert found.sum() == pytest.approx(n_layers)


def test_a_scale_that_is_not_worth_a_layer_gets_none():
    found = ml.theory.water_fill(
        4, betas=np.array([1.0, 1.0, 1e-4]), kappas=np.full(3, 0.5), distortions=np.ones(3)
    )
    np.testing.assert_allclose(found, [2.0, 2.0, 0.0])


def test_lengths_tell_shares_and_offsets_only():
    """Other rates, weights and distortions with the same shares and offsets: the same lengths."""
    given_ = parameters(1)
    faster = {
        "betas": given_["betas"] ** 3 * given_["kappas"] ** 2 * given_["distortions"] ** 2 * 7.0,
        "kappas": 3 * given_["kappas"],
        "distortions": given_["distortions"],
    }
    for n_layers in (3, 30, 90):
        np.testing.assert_allclose(
            ml.theory.water_fill(n_layers, **given_), ml.theory.water_fill(n_layers, **faster)
        )


def exact_boundaries(depths=DEPTHS):
    return np.cumsum(OFFSETS + np.outer(depths, SHARES), axis=1)[:, :-1]


def test_exact_lengths_give_the_parameters_back():
    fit = ml.theory.fit_water_filling(exact_boundaries(), DEPTHS)
    np.testing.assert_allclose(fit.shares, SHARES)
    np.testing.assert_allclose(fit.offsets, OFFSETS)
    np.testing.assert_allclose(fit.lengths(100), SHARES * 100 + OFFSETS)
    assert fit.boundaries(100) == (25, 60)
    assert fit.residual == pytest.approx(0.0, abs=1e-9)


def test_the_fit_reaches_where_a_scale_has_no_layers():
    """Shallow models give the third scale nothing: their lengths are not linear in depth."""
    true = {
        "kappas": np.array([0.5, 0.25, 0.2]),
        "betas": np.array([8.0, 8.0, 1.0]),
        "distortions": np.ones(3),
    }
    depths = np.array([4, 6, 8, 16, 32, 48])
    lengths = np.array([ml.theory.water_fill(int(n), **true) for n in depths])
    assert lengths[0, 2] == 0.0
    fit = ml.theory.fit_water_filling(np.cumsum(lengths, axis=1)[:, :-1], depths)
    np.testing.assert_allclose([fit.lengths(n) for n in depths], lengths, atol=1e-3)
    inverse = 1 / true["kappas"]
    np.testing.assert_allclose(fit.shares, inverse / inverse.sum(), atol=1e-3)


def test_eight_models_with_noise_of_a_block_give_shares_and_lengths_within_a_tenth():
    """Root mean square over draws; single draws and offsets are in docs/theory.md."""
    rng, errors, covered = np.random.default_rng(0), [], []
    for _ in range(200):
        placed = np.rint(exact_boundaries() + rng.standard_normal((len(DEPTHS), 2)))
        fit = ml.theory.fit_water_filling(placed, DEPTHS)
        middle = SHARES * DEPTHS.mean() + OFFSETS
        errors.append([fit.shares / SHARES - 1, fit.middle_lengths / middle - 1])
        low, high = fit.shares_interval
        covered.append((low <= SHARES) & (high >= SHARES))
    assert (np.sqrt(np.square(errors).mean(axis=0)) < 0.1).all()
    assert (np.abs(errors)[:, 1] < 0.1).mean() > 0.97
    assert 0.9 < np.mean(covered) < 0.99


def test_left_out_models_and_families_are_predicted_by_the_others():
    families = ["a", "b"] * 4
    table = ml.theory.held_out_errors(np.rint(exact_boundaries()), DEPTHS, families)
    mean = table.groupby(["left_out", "rule"])["error"].mean()
    for left_out in ("model", "family"):
        assert mean[left_out, "water-filling"] < 0.015
        assert mean[left_out, "thirds"] > 0.05
    counts = table[table["rule"] == "thirds"].groupby("left_out")["model"].count()
    assert counts.to_dict() == {"model": 8, "family": 8}
    # What is predicted of a model does not hang on that model.
    moved = np.rint(exact_boundaries())
    moved[0] = (1, 2)
    other = ml.theory.held_out_errors(moved, DEPTHS, families)
    columns = ["first", "second"]
    chosen = (table["model"] == 0) & (table["left_out"] == "model")
    assert (table[chosen][columns] == other[chosen][columns]).all(axis=None)
    assert (table[~chosen][columns] != other[~chosen][columns]).any(axis=None)


@pytest.mark.parametrize(
    ("boundaries", "n_layers", "message"),
    [
        ([[4, 8]] * 3, [12] * 3, "two depths"),
        ([[4, 8]] * 2, [12, 24], "at least 3 models"),
        ([[8, 4]] * 3, [12, 24, 32], "must rise"),
        ([[4, 30]] * 3, [12, 24, 32], "must rise"),
        ([4, 8], [12, 24], "shape"),
    ],
)
def test_what_cannot_be_fitted_is_named(boundaries, n_layers, message):
    with pytest.raises(ValueError, match=message):
        ml.theory.fit_water_filling(np.array(boundaries), np.array(n_layers))


def test_wrong_parameters_are_named():
    with pytest.raises(ValueError, match="kappas must be positive"):
        ml.theory.water_fill(
            3, betas=np.ones(2), kappas=np.array([1.0, 0.0]), distortions=np.ones(2)
        )
    with pytest.raises(ValueError, match="as many"):
        ml.theory.water_fill(3, betas=np.ones(3), kappas=np.ones(2), distortions=np.ones(2))
    with pytest.raises(ValueError, match="n_layers"):
        ml.theory.water_fill(0, betas=np.ones(2), kappas=np.ones(2), distortions=np.ones(2))
