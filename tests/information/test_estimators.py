"""Estimators of mutual information against truths, other implementations, nulls and misuse."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from known import TASKS, correlated, one_pair, student
from scipy import stats
from scipy.special import digamma

import mspgt_lens as ml
from mspgt_lens.ambient import tell
from mspgt_lens.estimators.interface import ESTIMATORS
from mspgt_lens.estimators.linear import negentropy
from mspgt_lens.estimators.neighbors import N_NEIGHBORS
from mspgt_lens.estimators.samples import normal_scores

pytestmark = pytest.mark.simulation

TASK = {task.name: task for task in TASKS}
TRAINED = ("vib", "infonce")


def estimate(estimator: str, z, y, *, groups=None, seed: int = 0) -> ml.results.Estimate:
    """The estimate, whose warnings the caller reads from the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ml.mutual_information(z, y, groups=groups, estimator=estimator, seed=seed)


def draw(name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return TASK[name].draw(np.random.default_rng(seed), n)


# --- Truths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [t.name for t in TASKS if t.family == "Gaussian"])
def test_gaussian_is_exact_to_five_percent_or_a_twentieth_of_a_nat(name):
    found = estimate("gaussian", *draw(name, 10_000))
    truth = TASK[name].truth
    assert abs(found.value - truth) <= max(0.05, 0.05 * truth)
    assert found.unit == "nats"
    assert not found.warnings


@pytest.mark.parametrize(
    "name",
    ["Gaussian 1-d, rho 0.5", "Gaussian 4-d dense", "Gaussian 32-d sparse", "independent 4-d"],
)
def test_gaussian_interval_holds_the_truth(name):
    held, told = 0, []
    for seed in range(30):
        found = estimate("gaussian", *draw(name, 600, seed), seed=seed)
        held += found.low <= TASK[name].truth <= found.high
        told.append(found.value - TASK[name].truth)
    assert held >= 26
    # Without bias: the mean error is within chance of 0.
    assert abs(np.mean(told)) <= 3.5 * np.std(told) / np.sqrt(len(told)) + 1e-3


def test_gaussian_gives_canonical_correlations_back():
    """Against the sample's own canonical correlations: nearly all bias is theirs."""
    z, y = draw("Gaussian 4-d dense", 50_000)
    left = np.linalg.svd(z - z.mean(0), full_matrices=False)[0]
    right = np.linalg.svd(y - y.mean(0), full_matrices=False)[0]
    rho = np.linalg.svd(left.T @ right, compute_uv=False)
    bias = 4 * 4 / (2 * 50_000)
    found = estimate("gaussian", z, y).value
    assert found == pytest.approx(-0.5 * np.log1p(-(rho**2)).sum() - bias, abs=3e-4)


def test_dependence_within_groups_widens_the_interval_and_does_not_raise_the_value():
    rng = np.random.default_rng(0)
    values, held = [], 0
    for seed in range(20):
        base = rng.standard_normal((2, 40, 4)).repeat(25, axis=1)
        z, y = base + 0.3 * rng.standard_normal((2, 1000, 4))
        groups = np.arange(40).repeat(25)
        found = estimate("gaussian", z, y, groups=groups, seed=seed)
        values.append(found.value)
        held += found.low <= 0 <= found.high
        naive = estimate("gaussian", z, y, seed=seed)
    assert held >= 18
    assert naive.low > 0
    assert abs(np.mean(values)) < 3.5 * np.std(values) / np.sqrt(20) + 0.02


@pytest.mark.parametrize("estimator", ["copula", "ksg"])
def test_monotone_maps_of_columns_change_nothing(estimator):
    rng = np.random.default_rng(1)
    z, noise = rng.standard_normal((2, 400))
    y = z + noise
    plain = estimate(estimator, z, y)
    mapped = estimate(estimator, np.exp(2 * z), 7 + y**3)
    assert mapped.value == pytest.approx(plain.value, abs=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "Gaussian 1-d, rho 0.999",
        "Gaussian 32-d dense",
        "Student-t 3-d, 3 degrees",
        "uniform noise, width 0.1",
        "exp and cube, rho 0.8",
        "two clusters apart",
        "label shifts 1 of 16 columns",
        "5 uniform classes",
        "product",
    ],
)
@pytest.mark.parametrize("estimator", ["gaussian", "copula"])
def test_linear_lower_bounds_are_not_above_the_truth(estimator, name):
    z, y = draw(name, 1500)
    if estimator == "copula" and y.dtype.kind == "i":
        with pytest.raises(ValueError, match="continuous y"):
            estimate(estimator, z, y)
        return
    assert estimate(estimator, z, y).low <= TASK[name].truth


def test_y_that_is_not_gaussian_is_told(monkeypatch):
    monkeypatch.setattr("mspgt_lens.estimators.interface.tell", inspect.unwrap(tell))
    z, y = draw("two clusters apart", 2000)
    with pytest.warns(UserWarning, match="y is not Gaussian") as caught:
        # Without the frames that checking shapes puts between.
        found = inspect.unwrap(ml.mutual_information)(z, y)
    assert found.value > TASK["two clusters apart"].truth > found.low
    assert caught[0].filename == __file__
    assert estimate("copula", z, y).high < TASK["two clusters apart"].truth


def test_negentropy_is_nothing_for_gaussians_and_right_for_uniforms():
    rng = np.random.default_rng(0)
    assert negentropy(rng.standard_normal((3000, 20)) @ rng.standard_normal((20, 20)), 0) == 0
    uniform = 0.5 * np.log(2 * np.pi * np.e / 12)
    columns = rng.uniform(size=(3000, 2)) * np.array([1.0, 3.0])
    assert negentropy(columns, 0) == pytest.approx(2 * uniform, abs=0.03)


@pytest.mark.parametrize(
    ("estimator", "name", "n"),
    [
        ("vib", "XOR of signs", 1500),
        ("vib", "noisy product of signs", 2000),
        ("vib", "label shifts 1 of 16 columns", 1000),
        ("infonce", "XOR of signs", 1500),
    ],
)
def test_trained_bounds_see_beyond_linear_readers(estimator, name, n):
    task = TASK[name]
    z, y = draw(name, n)
    found = estimate(estimator, z, y)
    assert found.low <= task.truth
    assert found.value >= 0.7 * task.truth
    if "sign" in name:
        assert estimate("gaussian", z, y).value < 0.01


def test_vib_starts_at_the_linear_reader():
    z, y = draw("Gaussian 4-d high", 400)
    truth = TASK["Gaussian 4-d high"].truth
    found = estimate("vib", z, y)
    assert found.low <= truth
    assert found.value > 0.85 * truth


def test_infonce_says_where_its_ceiling_is():
    z, y = draw("Gaussian 4-d high", 200)
    with pytest.warns(UserWarning, match=r"ceiling, log\(40\)"):
        found = ml.mutual_information(z, y, estimator="infonce")
    assert found.value <= np.log(40)
    assert "log(40) = 3.69" in found.guarantee
    assert any("ceiling" in note for note in found.warnings)


@pytest.mark.parametrize(
    "name", ["two clusters apart", "label shifts mean by 1", "5 uniform classes"]
)
def test_ksg_holds_the_truth_in_few_dimensions(name):
    held = 0
    for seed in range(10):
        found = estimate("ksg", *draw(name, 400, seed), seed=seed)
        held += found.low <= TASK[name].truth <= found.high
    assert held >= 8


def slow_ksg(z: np.ndarray, y: np.ndarray) -> float:
    """Kraskov's first estimator by comparing all pairs."""
    apart = [np.abs(a[:, None] - a[None]).max(-1) for a in (z, y)]
    both = np.maximum(*apart)
    total = 0.0
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        radius = np.sort(both[i, others])[N_NEIGHBORS - 1]
        counts = [(a[i, others] < radius).sum() for a in apart]
        total += digamma(N_NEIGHBORS) + digamma(len(z)) - sum(digamma(c + 1) for c in counts)
    return total / len(z)


def slow_ross(z: np.ndarray, labels: np.ndarray) -> float:
    """Ross's estimator by comparing all pairs."""
    total = 0.0
    for i in range(len(z)):
        apart = np.abs(z - z[i]).max(-1)
        alike = (labels == labels[i]) & (np.arange(len(z)) != i)
        radius = np.sort(apart[alike])[N_NEIGHBORS - 1]
        inside = (apart < radius).sum() - 1
        total += digamma(len(z)) + digamma(N_NEIGHBORS)
        total -= digamma(alike.sum() + 1) + digamma(inside + 1)
    return total / len(z)


def test_ksg_equals_the_comparison_of_all_pairs():
    z, y = draw("Gaussian 4-d dense", 150)
    slow = slow_ksg(normal_scores(z), normal_scores(y))
    assert estimate("ksg", z, y).value == pytest.approx(slow, abs=1e-12)
    z, label = draw("label shifts mean by 1", 150)
    assert estimate("ksg", z, label).value == pytest.approx(
        slow_ross(normal_scores(z), label), abs=1e-12
    )


def test_ksg_looks_for_neighbors_in_other_groups():
    """Samples of one group lie together in both: that is no information between z and y."""
    rng = np.random.default_rng(3)
    centers = rng.standard_normal((2, 60, 1)).repeat(8, axis=1)
    z, y = centers + 0.2 * rng.standard_normal((2, 480, 1))
    groups = np.arange(60).repeat(8)
    assert estimate("ksg", z, y).low > 0.05
    found = estimate("ksg", z, y, groups=groups)
    assert found.low <= 0 <= found.high


def slow_renyi(z: np.ndarray, y: np.ndarray, order: float) -> float:
    """From eigenvalues of normalized kernel matrices, as defined."""

    def entropy(kernel: np.ndarray) -> float:
        power = np.linalg.eigvalsh(kernel / np.trace(kernel)).clip(min=0.0)
        return float(np.log((power**order).sum()) / (1 - order))

    kernels = []
    for a in (z, y):
        a = (a - a.mean(0)) / a.std(0)
        apart = ((a[:, None] - a[None]) ** 2).sum(-1)
        kernels.append(np.exp(-apart / (2 * a.shape[1])))
    return entropy(kernels[0]) + entropy(kernels[1]) - entropy(kernels[0] * kernels[1])


def test_renyi_is_the_eigenvalue_definition_less_its_shuffled_mean():
    z, y = draw("Gaussian 4-d dense", 120)
    rng = np.random.default_rng(0)
    shuffled = [np.exp(slow_renyi(z, y[rng.permutation(120)], 2.0)) for _ in range(300)]
    expected = slow_renyi(z, y, 2.0) - np.log(np.mean(shuffled))
    assert estimate("renyi", z, y).value == pytest.approx(expected, abs=2e-3)


def test_the_channel_rate_is_not_below_what_gets_through():
    """A two-cluster source in noise: the rate is above the mixture's information."""
    task = TASK["two clusters that touch"]
    rng = np.random.default_rng(0)
    source = np.sign(rng.standard_normal(2000))
    received = source + np.sqrt(0.1) * rng.standard_normal(2000)
    rate = ml.arrays.channel_rate(np.array([[source.var()]]), 0.1)
    labels = (source > 0).astype(int)
    assert estimate("ksg", received, labels).high < rate
    assert task.truth < ml.arrays.channel_rate(np.eye(1), 1.0)


def test_student_truths_agree_with_scipy():
    shape = np.array([[1.0, 0.6], [0.6, 1.0]])
    joint = stats.multivariate_t(shape=shape, df=3).entropy()
    single = stats.t(3).entropy()
    assert student("", 1, 0.6, 3.0).truth == pytest.approx(2 * single - joint, abs=1e-9)


# --- Nulls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("categorical", [False, True], ids=["numbers", "labels"])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_shuffled_pairs_read_zero(estimator, categorical):
    if categorical and estimator == "copula":
        pytest.skip("takes no labels")
    runs, n = (2, 200) if estimator in TRAINED else (20, 400)
    held = 0
    for seed in range(runs):
        z, y = draw("Gaussian 4-d high", n, seed)
        y = (y[:, 0] > 0).astype(int) if categorical else y[:, :2]
        shuffled = np.random.default_rng(seed).permutation(n)
        found = estimate(estimator, z, y[shuffled], seed=seed)
        held += found.low <= 0 <= found.high
    assert held >= (runs if estimator in TRAINED else 17)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_group_effects_of_unpaired_data_are_no_information(estimator):
    held, runs = 0, 1 if estimator in TRAINED else 4
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        z, y = rng.standard_normal((2, 50, 2)).repeat(8, axis=1)
        z, y = z + 0.2 * rng.standard_normal((400, 2)), y + 0.2 * rng.standard_normal((400, 2))
        groups = np.arange(50).repeat(8)
        found = estimate(estimator, z, y, groups=groups, seed=seed)
        held += found.low <= 0 <= found.high
    assert held >= max(1, runs - 1)


# --- Use and misuse -------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_arrays_and_tensors_of_any_number_type_read_the_same(estimator):
    z, y = (a.astype(np.float32) for a in draw("Gaussian 1-d, rho 0.5", 80))
    first = estimate(estimator, z, y)
    assert first == estimate(estimator, torch.tensor(z, requires_grad=True), y[:, 0].tolist())
    assert first == estimate(estimator, z[:, 0].astype(np.float64), torch.tensor(y))
    assert first.low <= first.value <= first.high


def test_scales_do_not_matter():
    z, y = draw("Gaussian 4-d dense", 500)
    far = estimate("gaussian", z * np.array([1e-12, 1.0, 1e12, 1e150]), y * 1e-30 + 1e-28)
    assert far.value == pytest.approx(estimate("gaussian", z, y).value, rel=1e-6)


def test_more_columns_than_samples_read_low_and_say_so():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((200, 500))
    y = z[:, :2] + rng.standard_normal((200, 2))
    found = estimate("gaussian", z, y)
    assert found.low <= np.log(2)
    assert "too few" in found.warnings[0]
    empty = estimate("gaussian", z, rng.standard_normal((200, 2)))
    assert empty.low <= 0 <= empty.high


def test_copies_in_other_groups_are_told():
    z, y = draw("independent 1-d", 100)
    twice = np.tile(z, (4, 1)), np.tile(y, (4, 1))
    assert any(
        "300 of 400 samples repeat" in note for note in estimate("gaussian", *twice).warnings
    )
    grouped = estimate("gaussian", *twice, groups=np.tile(np.arange(100), 4))
    assert not any("repeat" in note for note in grouped.warnings)
    signs = np.sign(z).astype(int)
    assert not estimate("gaussian", signs, (signs[:, 0] > 0)[np.r_[1:100, 0]]).warnings


def bad(n: int = 100, **changes):
    rng = np.random.default_rng(0)
    return {"z": rng.standard_normal((n, 2)), "y": rng.standard_normal((n, 2))} | changes


NORMAL = np.random.default_rng(9).standard_normal((400, 60))
MISUSE = {
    "unknown estimator": (bad(estimator="mine"), "estimator must be one of gaussian, copula"),
    "lengths": (bad(y=NORMAL[:50]), r"one row per sample: z has shape \(100, 2\), y \(50, 60\)"),
    "three axes": (bad(z=NORMAL.reshape(400, 6, 10)), "flatten prompts"),
    "nothing": (bad(z=np.zeros((0, 2))), "must have shape"),
    "names": (bad(y=np.array(["a", "b"] * 50)), "return_inverse"),
    "complex": (bad(z=NORMAL[:100, 0] + 1j), "real numbers"),
    "not finite": (bad(z=np.where(NORMAL[:100] == NORMAL[3, 4], np.nan, 1.0)), r"at \(3, 4\)"),
    "constant": (bad(z=np.c_[NORMAL[:100, 0], np.full(100, 0.1)]), "z has 1 constant columns"),
    "constant, far": (bad(y=np.full(100, 1e20)), "y has 1 constant columns"),
    "few samples": (bad(20), "at least 40 samples, got 20"),
    "few groups": (bad(groups=np.arange(100) % 3), "at least 10 of them, got 3"),
    "groups' shape": (bad(groups=np.arange(50)), r"groups must have shape \[100\]"),
    "one label": (bad(y=np.ones(100, dtype=int)), "one label"),
    "rare label": (bad(y=np.arange(100)), "rare labels, or pass floats"),
    "atoms": (bad(y=np.arange(100)[:, None] % 2), "pass classes as integer labels"),
    "flat y": (bad(y=np.c_[NORMAL[:100, :2], NORMAL[:100, :2].sum(1)]), "span only 2 dimensions"),
    "infinite": (bad(z=NORMAL[:100, :3], y=NORMAL[:100, :2] @ np.ones((2, 1))), "is infinite"),
    "infinite, float32": (
        bad(z=NORMAL[:100, :3], y=(3 * NORMAL[:100, 0] + 1).astype(np.float32)),
        "is infinite",
    ),
    "wide y": (bad(y=NORMAL[:100]), "60 columns, more than a fold of 20"),
    "wide y, trained": (bad(y=NORMAL[:100], estimator="vib"), "60 columns"),
    "ksg wide": (bad(z=NORMAL[:100, :9], estimator="ksg"), "at most 8 columns"),
    "ksg copies": (
        bad(z=NORMAL[:100, :2].round(0), estimator="ksg"),
        "of the rows of z repeat others",
    ),
    "ksg rare label": (
        bad(y=(np.arange(100) < 12).astype(int), estimator="ksg"),
        "16 samples of every label",
    ),
    "renyi long": (bad(20_001, estimator="renyi"), "at most 20000 samples"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_named_with_a_remedy(case):
    arguments, message = MISUSE[case]
    with pytest.raises(ValueError, match=message):
        ml.mutual_information(**arguments)


@pytest.mark.parametrize("estimator", ["vib", "infonce"])
def test_the_seed_decides_everything(estimator):
    z, y = draw("independent 1-d", 100)
    torch.manual_seed(1)
    first = estimate(estimator, z, y, seed=3)
    torch.manual_seed(2)
    assert first == estimate(estimator, z, y, seed=3)
    assert first != estimate(estimator, z, y, seed=4)


def test_sparse_and_dense_gaussians_differ_in_coordinates_only():
    assert correlated("", one_pair(3, 0.5), dense=True).truth == pytest.approx(
        correlated("", np.array([0.5]), dense=False).truth
    )
