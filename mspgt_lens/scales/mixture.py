"""What a matrix may be made of, each possibility with its weight, and series like it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln

from mspgt_lens.scales.drift import NOISES, Fit, Noise, legendre, steps
from mspgt_lens.scales.evidence import SearchPlan

_ORDERS = ("none", "linear", "quadratic", "cubic", "quartic", "quintic")


@dataclass(frozen=True)
class Mixture:
    """Descriptions of one matrix with the same jumps, or none.

    Attributes:
        matrix: What they describe.
        fits: The descriptions.
        weights: Their restricted likelihoods, as shares of all.
    """

    matrix: Float[np.ndarray, "block signal"]
    fits: tuple[Fit, ...]
    weights: Float[np.ndarray, " fit"]

    @property
    def best(self) -> Fit:
        """The likeliest description."""
        return self.fits[int(self.weights.argmax())]

    def regenerate(
        self, n_draws: int, rng: np.random.Generator, *, flip: bool = False
    ) -> Float[np.ndarray, "draw block signal"]:
        """Matrices of descriptions drawn by weight, with new noise or with signs flipped."""
        counts = rng.multinomial(n_draws, self.weights)
        return np.concatenate(
            [
                (fit.flip if flip else fit.regenerate)(self.matrix, count, rng)
                for fit, count in zip(self.fits, counts, strict=True)
                if count
            ]
        )


def describe(
    plan: SearchPlan, matrix: Float[np.ndarray, "block signal"], boundaries: tuple[int, ...] = ()
) -> Mixture:
    """Everything that the matrix may be, given where its jumps are.

    Drift is a polynomial, or without jumps a logistic; every order and each kind of logistic count
    alike beforehand. Restricted likelihood corrects for the fitted columns, which make noise look
    smaller and less correlated than it is.
    """
    n = len(matrix)
    jumps = steps(n, boundaries)
    fits: list[Fit] = []
    scores: list[float] = []
    for noise in NOISES:
        for order in plan.orders_beneath if boundaries else plan.orders:
            if order <= noise.max_order:
                basis = np.column_stack([legendre(n, order), jumps])
                scores.append(float(_restricted_likelihood(matrix, basis[None], noise)[0]))
                fits.append(Fit(basis, boundaries, noise, _ORDERS[order]))
        if not noise.white or boundaries or not plan.logistic_shapes:
            continue
        for degree in plan.logistic_degrees:
            bases = plan.logistic_basis(degree)
            scores.extend(_restricted_likelihood(matrix, bases, noise) - np.log(len(bases)))
            fits.extend(
                Fit(basis, (), noise, _logistic_in_words(*shape))
                for basis, shape in zip(bases, plan.logistic_shapes, strict=True)
            )
    weights = np.exp(np.array(scores) - max(scores))
    return Mixture(matrix, tuple(fits), weights / weights.sum())


def _logistic_in_words(center: float, scale: float) -> str:
    return f"logistic around block {center:.0f}, 10 to 90% in {4.4 * scale:.0f} blocks"


def _restricted_likelihood(
    matrix: Float[np.ndarray, "block signal"],
    bases: Float[np.ndarray, "basis block column"],
    noise: Noise,
) -> Float[np.ndarray, " basis"]:
    """Log-likelihood of what bases leave, the noise's size integrated out, columns charged for.

    Determinants are relative to white noise, so that a basis counts the same in any units.
    """
    n, m = matrix.shape
    n_columns = bases.shape[-1]
    whitener = noise.whitener(n)
    q, r = np.linalg.qr(whitener @ bases)
    plain = np.linalg.qr(bases)[1]
    rows = whitener @ matrix
    # The same floor as in the search.
    floor = (matrix**2).sum() / n**2
    left = (rows**2).sum() - ((q.transpose(0, 2, 1) @ rows) ** 2).sum(axis=(1, 2)) + floor
    freedom = (n - n_columns) * m / 2
    likelihood: np.ndarray = (
        m * np.log(np.diag(whitener)).sum()
        - m * (_log_determinant(r) - _log_determinant(plain))
        + gammaln(freedom)
        - freedom * np.log(np.maximum(left, floor) / 2)
        - m * n_columns * np.log(n) / 2
    )
    return likelihood


def _log_determinant(triangles: Float[np.ndarray, "basis column column"]) -> np.ndarray:
    logs: np.ndarray = np.log(np.abs(np.diagonal(triangles, axis1=1, axis2=2))).sum(axis=1)
    return logs
