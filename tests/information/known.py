"""Tasks whose mutual information is known: samples, and the truth in nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.integrate import quad
from scipy.special import digamma, gammaln

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """One joint distribution.

    Attributes:
        name: For tables and test names.
        family: What the truth rests on.
        draw: ``(generator, n)`` to z and y.
        truth: Mutual information, nats.
    """

    name: str
    family: str
    draw: Draw
    truth: float


def rotation(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def correlated(name: str, rho: np.ndarray, *, dense: bool) -> Task:
    """Gaussian, with these canonical correlations, in coordinates of unequal scale."""
    d = len(rho)
    fixed = np.random.default_rng(d)
    mix = [rotation(fixed, d) * np.geomspace(0.1, 10, d) if dense else np.eye(d) for _ in range(2)]

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z, noise = rng.standard_normal((2, n, d))
        return z @ mix[0], (rho * z + np.sqrt(1 - rho**2) * noise) @ mix[1]

    return Task(name, "Gaussian", draw, float(-0.5 * np.log1p(-(rho**2)).sum()))


def student(name: str, d: int, rho: float, degrees: float) -> Task:
    """Multivariate t: z and y are Gaussian given a scale that they share."""

    def entropy(k: int, log_det: float) -> float:
        half = (degrees + k) / 2
        return (
            log_det / 2
            + gammaln(degrees / 2)
            - gammaln(half)
            + k / 2 * np.log(degrees * np.pi)
            + half * (digamma(half) - digamma(degrees / 2))
        )

    truth = 2 * entropy(d, 0.0) - entropy(2 * d, d * np.log1p(-(rho**2)))

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z, noise = rng.standard_normal((2, n, d))
        scale = np.sqrt(degrees / rng.chisquare(degrees, size=(n, 1)))
        return z * scale, (rho * z + np.sqrt(1 - rho**2) * noise) * scale

    return Task(name, "Student-t", draw, float(truth))


def uniform_noise(name: str, width: float) -> Task:
    """``y = z + u`` with z uniform on [0, 1] and u uniform on [0, width], width <= 1."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.uniform(size=n)
        return z, z + width * rng.uniform(size=n)

    return Task(name, "additive uniform noise", draw, width / 2 - np.log(width))


def monotone(name: str, rho: float) -> Task:
    """A Gaussian pair seen through an exponential and a cube: information is unchanged."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z, noise = rng.standard_normal((2, n))
        return np.exp(2 * z), (rho * z + np.sqrt(1 - rho**2) * noise) ** 3

    return Task(name, "monotone transform", draw, float(-0.5 * np.log1p(-(rho**2))))


def bimodal_entropy(offset: float, noise: float) -> float:
    """Entropy of two equal normals at plus and minus offset, by quadrature."""
    normal = stats.norm(scale=noise)

    def integrand(x: float) -> float:
        log_p = np.logaddexp(normal.logpdf(x - offset), normal.logpdf(x + offset)) - np.log(2)
        return float(-np.exp(log_p) * log_p)

    reach = offset + 12 * noise
    return float(quad(integrand, -reach, reach, points=[-offset, 0, offset], limit=400)[0])


def clusters(name: str, offset: float, noise: float) -> Task:
    """Two clusters; within one, z and y are independent. Quadrature over the two-dimensional law.

    I(z; y) = h(z) + h(y) - h(z, y), and in the coordinates (z + y) / sqrt 2, (z - y) / sqrt 2 the
    joint law is a bimodal times a normal.
    """
    joint = bimodal_entropy(offset * np.sqrt(2), noise) + stats.norm(scale=noise).entropy()
    truth = 2 * bimodal_entropy(offset, noise) - joint

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        center = offset * rng.choice([-1.0, 1.0], size=n)
        z, y = center + noise * rng.standard_normal((2, n))
        return z, y

    return Task(name, "mixture", draw, float(truth))


def class_means(name: str, offset: float, columns: int = 1) -> Task:
    """A fair label moves the mean of the first column of z."""
    truth = bimodal_entropy(offset, 1.0) - stats.norm.entropy()

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        label = rng.integers(0, 2, size=n)
        z = rng.standard_normal((n, columns))
        z[:, 0] += offset * (2 * label - 1)
        return z, label

    return Task(name, "discrete-continuous", draw, float(truth))


def uniform_classes(name: str, classes: int) -> Task:
    """Z is uniform on [label, label + 2] for labels 0 ... classes - 1, in a ring."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        label = rng.integers(0, classes, size=n)
        return (label + 2 * rng.uniform(size=n)) % classes, label

    return Task(name, "discrete-continuous", draw, float(np.log(classes / 2)))


def xor(name: str, columns: int = 2) -> Task:
    """The label is the sign of the product of two columns."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.standard_normal((n, columns))
        return z, (z[:, 0] * z[:, 1] > 0).astype(int)

    return Task(name, "XOR of signs", draw, float(np.log(2)))


def sign_product(name: str, noise: float) -> Task:
    """The product of two signs, with Gaussian noise."""
    truth = bimodal_entropy(1.0, noise) - stats.norm(scale=noise).entropy()

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.standard_normal((n, 2))
        return z, np.sign(z).prod(axis=1) + noise * rng.standard_normal(n)

    return Task(name, "XOR of signs", draw, float(truth))


def product(name: str, noise: float) -> Task:
    """``y = z_1 z_2 + noise``: h(y) by quadrature over z_1, given which y is normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    variance = nodes**2 + noise**2
    share = weights / weights.sum()

    def density(y: float) -> float:
        return float(share @ (np.exp(-(y**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)))

    def integrand(y: float) -> float:
        p = density(y)
        return -p * np.log(p) if p > 0 else 0.0

    entropy = 2 * quad(integrand, 0, 60, points=[0.1, 1, 5], limit=400)[0]
    truth = entropy - stats.norm(scale=noise).entropy()

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.standard_normal((n, 2))
        return z, z.prod(axis=1) + noise * rng.standard_normal(n)

    return Task(name, "product", draw, float(truth))


def independent(name: str, d: int) -> Task:
    """Nothing to find, in heavy tails and normal columns."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_t(3, size=(n, d)), rng.standard_normal((n, d))

    return Task(name, "independent", draw, 0.0)


def one_pair(d: int, rho: float) -> np.ndarray:
    return np.r_[rho, np.zeros(d - 1)]


TASKS = (
    correlated("Gaussian 1-d, rho 0.5", np.array([0.5]), dense=False),
    correlated("Gaussian 1-d, rho 0.999", np.array([0.999]), dense=False),
    correlated("Gaussian 4-d dense", np.linspace(0.2, 0.8, 4), dense=True),
    correlated("Gaussian 4-d sparse", one_pair(4, 0.6), dense=False),
    correlated("Gaussian 4-d high", np.full(4, 0.99), dense=True),
    correlated("Gaussian 32-d dense", np.linspace(0.0, 0.7, 32), dense=True),
    correlated("Gaussian 32-d sparse", one_pair(32, 0.6), dense=False),
    correlated("Gaussian 32-d high", np.full(32, 0.999), dense=True),
    student("Student-t 1-d, 3 degrees", 1, 0.6, 3.0),
    student("Student-t 3-d, 3 degrees", 3, 0.6, 3.0),
    uniform_noise("uniform noise, width 1", 1.0),
    uniform_noise("uniform noise, width 0.1", 0.1),
    monotone("exp and cube, rho 0.8", 0.8),
    clusters("two clusters apart", 4.0, 1.0),
    clusters("two clusters that touch", 1.0, 1.0),
    class_means("label shifts mean by 1", 0.5),
    class_means("label shifts 1 of 16 columns", 1.0, 16),
    uniform_classes("5 uniform classes", 5),
    xor("XOR of signs"),
    xor("XOR of signs, 8 idle columns", 10),
    sign_product("noisy product of signs", 0.4),
    product("product", 0.5),
    independent("independent 1-d", 1),
    independent("independent 4-d", 4),
)
