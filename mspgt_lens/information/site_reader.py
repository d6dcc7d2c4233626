"""Linear-Gaussian readers of one site: residuals, log-likelihood ratios, canonical correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.information.ridge import FoldSums, RidgeFit, moment_about, ring
from mspgt_lens.products import product

# Share of a variance that sums of float32 products resolve.
RESOLUTION = 1e-6
# Share of its mean square below which a target does not vary: features are centered on all text.
_CONSTANT = 1e-4


@dataclass(frozen=True)
class Strengths:
    """Ridge strengths: the chosen one, and the weakest whose optimism the sample can bear."""

    chosen: Float[np.ndarray, "fold target"]
    weakest: Float[np.ndarray, " target"]


@dataclass(frozen=True)
class Scores:
    """Log-likelihood ratios of one site on each fold, nats per token, shape ``[fold, part]`` each.

    Attributes:
        held_out: On the fold itself, at the chosen strength.
        light: On the fold itself, at the weakest strength that the sample can bear.
        corrected: On the training folds at the weakest strength, less the optimism.
    """

    held_out: Float[np.ndarray, "fold part"]
    light: Float[np.ndarray, "fold part"]
    corrected: Float[np.ndarray, "fold part"]


@dataclass(frozen=True)
class SampledRows:
    """Sampled positions of one site: its coordinates there, and the fold of each."""

    z: Float[Tensor, "position width"]
    fold: Int[np.ndarray, " position"]


@dataclass(frozen=True)
class Predictions:
    """All targets at sampled positions, as readers that never saw the position predict them.

    Attributes:
        held_out: By the reader of all other folds, shape ``[position, column]``.
        inner: For each fold, what readers that left out the fold and a neighbor predict of the
            neighbor's positions: ``(neighbor, position, prediction)`` for each neighbor.
        fitted: For each fold, what the reader of all other folds says of the same positions, which
            it was fitted on, one entry per neighbor.
        left: For each fold, the second moments that its readers leave unexplained.
        mean: Mean of the targets over the other folds, shape ``[fold, column]``.
    """

    held_out: Float[Tensor, "position column"]
    inner: Sequence[
        Sequence[tuple[int, Int[np.ndarray, " chosen"], Float[Tensor, "chosen column"]]]
    ]
    fitted: Sequence[Sequence[Float[Tensor, "chosen column"]]]
    left: Sequence[Residuals]
    mean: Float[Tensor, "fold column"]


@dataclass(frozen=True)
class Residuals:
    """Second moments of what readers of all targets, and the null reader, leave unexplained.

    The floors are variances per target, the least that either may claim to leave in any direction:
    what float32 products do not resolve. Where a reader is the null reader, both are the same, so
    that it reads exactly 0.
    """

    reader: Float[Tensor, "column column"]
    null: Float[Tensor, "column column"]
    reader_floor: Float[Tensor, " target"]
    null_floor: Float[Tensor, " target"]

    @property
    def n_features(self) -> int:
        return len(self.reader) // len(self.null_floor)

    def only(self, targets: Sequence[int]) -> Residuals:
        """Those of some targets."""
        chosen, size = list(targets), self.n_features
        at = torch.cat([torch.arange(t * size, (t + 1) * size) for t in chosen])
        return Residuals(
            self.reader[at][:, at],
            self.null[at][:, at],
            self.reader_floor[chosen],
            self.null_floor[chosen],
        )

    def covariances(self, target: int) -> tuple[Float[Tensor, "f f"], Float[Tensor, "f f"]]:
        """What one target's reader and the null reader leave, floors included."""
        at = slice(target * self.n_features, (target + 1) * self.n_features)
        identity = torch.eye(self.n_features).to(self.reader)
        return (
            self.reader[at, at] + self.reader_floor[target] * identity,
            self.null[at, at] + self.null_floor[target] * identity,
        )

    def plus(self, other: Residuals, share: float) -> Residuals:
        mixed = (
            mine * (1 - share) + theirs * share
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )
        return Residuals(*mixed)


def log_determinant(left: Residuals) -> Float[np.ndarray, " target"]:
    """Log-determinant of what each target's reader leaves unexplained, floor included."""
    blocks = _diagonal_blocks(left.reader, left.n_features)
    root = torch.linalg.cholesky(blocks + _isotropic(left.reader_floor, blocks))
    values: np.ndarray = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1).cpu().numpy()
    return values


def log_ratio(tested: Residuals, expected: Residuals) -> Float[np.ndarray, " target"]:
    """Mean log-likelihood ratio of each target's reader against its null reader, nats per token."""
    blocks = (
        _diagonal_blocks(matrix, tested.n_features)
        for matrix in (tested.reader, tested.null, expected.reader, expected.null)
    )
    reader, null, reader_spread, null_spread = blocks
    ratio = _log_likelihood(reader, reader_spread + _isotropic(expected.reader_floor, reader))
    ratio = ratio - _log_likelihood(null, null_spread + _isotropic(expected.null_floor, null))
    values: np.ndarray = ratio.sum(dim=-1).cpu().numpy()
    return values


def chain_log_ratio(
    tested: Residuals, expected: Residuals, order: Sequence[int]
) -> Float[np.ndarray, " target"]:
    """What each target in turn adds to those before it, nats per token.

    The log-likelihood ratio of a reader of all these targets together, split by the chain rule:
    ``I(z; y_1), I(z; y_2 | y_1), ...``, by partial covariances. The parts sum to the whole.

    Returns:
        One part per target, in the order given.
    """
    f = tested.n_features
    columns = torch.cat([torch.arange(t * f, (t + 1) * f) for t in order])

    def parts(matrix: Tensor, spread: Tensor, floor: Tensor) -> Tensor:
        matrix, spread = matrix[columns][:, columns], spread[columns][:, columns]
        spread = spread + torch.diag(floor[list(order)].repeat_interleave(f))
        if torch.linalg.cholesky_ex(spread).info:
            # Targets that determine one another: what rounding leaves must not go below zero.
            lowest = torch.linalg.eigvalsh(spread)[0]
            spread = spread + torch.diag((RESOLUTION * spread.diagonal()) - 2 * lowest)
        return _log_likelihood(matrix, spread)

    ratio = parts(tested.reader, expected.reader, expected.reader_floor)
    ratio = ratio - parts(tested.null, expected.null, expected.null_floor)
    values: np.ndarray = rearrange(ratio, "(t f) -> t f", f=f).sum(dim=1).cpu().numpy()
    return values


@dataclass(frozen=True)
class _OnFold:
    """One target's reader on a fold: its weights, and the fold's second moment times these."""

    weights: Float[Tensor, "width feature"]
    products: Float[Tensor, "width feature"]


class SiteReader:
    """Readers of one site's coordinates, fitted and tested on sums per fold of groups."""

    def __init__(
        self, sums: FoldSums, yy: Float[Tensor, "fold column column"], n_targets: int
    ) -> None:
        self.sums, self.yy, self.n_targets = sums, yy, n_targets
        self.count = sums.count
        self.n_features = yy.shape[1] // n_targets

    def tested(
        self,
        fit: RidgeFit,
        fold: int,
        strengths: Float[np.ndarray, " target"],
        targets: Sequence[int] | None = None,
    ) -> Residuals:
        """Residuals of readers of the given strengths on a fold that they were not fitted on.

        Args:
            fit: Where readers come from.
            fold: The fold.
            strengths: Ridge strengths per target.
            targets: Which targets; all by default.
        """
        chosen = range(self.n_targets) if targets is None else targets
        return self._left(fit, fold, self._on_fold(fit, fold, strengths, chosen), chosen)

    def trained(
        self,
        fit: RidgeFit,
        strengths: Float[np.ndarray, " target"],
        targets: Sequence[int] | None = None,
    ) -> Residuals:
        """The same on the folds that the readers were fitted on."""
        chosen = range(self.n_targets) if targets is None else targets
        at = self._columns(chosen)
        weights = torch.cat(self._weights(fit, strengths, chosen), dim=1)
        zt = fit.zt[:, at].to(weights)
        penalty = [0.0 if np.isinf(s) else fit.penalty(s) for s in strengths[list(chosen)]]
        penalties = torch.tensor(penalty).to(weights).repeat_interleave(self.n_features)
        # What solves (zz + penalty) W = zt tells zz W without a product; the null reader is 0.
        explained = torch.where(penalties > 0, zt - weights * penalties, 0.0)
        return self._residuals(weights, explained, self._trained_targets(fit)[at][:, at], zt)

    def constant_targets(self, left_out: Sequence[int]) -> list[int]:
        """Targets that do not vary over the folds that are kept.

        Args:
            left_out: The other folds.
        """
        kept = [k for k in range(len(self.count)) if k not in left_out]
        count = self.count[kept].sum()
        square = self.yy[kept].sum(0).diagonal() / count
        varying = square - (self.sums.t[kept].sum(0) / count).pow(2) > _CONSTANT * square
        per_target = rearrange(varying, "(t f) -> t f", f=self.n_features).any(dim=1)
        return [target for target, varies in enumerate(per_target.tolist()) if not varies]

    def score(
        self,
        strengths: Strengths,
        *,
        scored: Sequence[int],
        chain: Sequence[int] = (),
        correlated: Sequence[int] = (),
        rows: SampledRows | None = None,
    ) -> tuple[Scores, Float[np.ndarray, "fold part component"], Predictions | None]:
        """Everything that is read of this site.

        Args:
            strengths: Ridge strengths per target.
            scored: Targets whose log-likelihood ratios are wanted.
            chain: Those of them whose joint information is split, from the first to the last.
            correlated: Targets whose canonical correlations are wanted.
            rows: Positions at which predictions are wanted too.

        Returns:
            Scores of these targets, then of every part of the chain; held-out canonical
            correlations, shape ``[fold, target, component]``; and predictions of all targets.
        """
        n_folds = len(self.count)
        spread: dict[int, Residuals] = {}
        inner_rows: list[list[tuple[int, np.ndarray, Tensor]]] = [[] for _ in range(n_folds)]
        held_out_rows = torch.zeros(len(rows.z) if rows else 0, self.yy.shape[1]).to(self.yy)
        fitted_rows, means = [], []
        for pair in ring(n_folds):
            fit = self.sums.fit(pair)
            for outer, inner in (pair, pair[::-1]):
                left = self.tested(fit, inner, strengths.chosen[outer])
                neighbors = self.count[(outer + 1) % n_folds] + self.count[(outer - 1) % n_folds]
                so_far = spread.get(outer, left)
                spread[outer] = so_far.plus(left, self.count[inner] / neighbors)
                if rows is not None:
                    at = np.flatnonzero(rows.fold == inner)
                    predicted = self._predict(fit, strengths.chosen[outer], rows.z[at])
                    inner_rows[outer].append((inner, at, predicted))

        order = [list(scored).index(target) for target in chain]

        def ratios(tested: Residuals, expected: Residuals) -> np.ndarray:
            parts = [chain_log_ratio(tested, expected, order)] if chain else []
            return np.concatenate([log_ratio(tested, expected), *parts])

        held_out, light, corrected = np.zeros((3, n_folds, len(scored) + len(chain)))
        asked = sorted({*scored, *correlated})
        weakest = np.where(np.isin(np.arange(self.n_targets), scored), strengths.weakest, np.inf)
        correlations = []
        for k in range(n_folds):
            fit = self.sums.fit([k])
            here = self._on_fold(fit, k, strengths.chosen[k], asked)
            if scored:
                left = self._left(fit, k, here, scored)
                held_out[k] = ratios(left, spread[k].only(scored))
                trained = self.trained(fit, weakest, scored)
                light[k] = ratios(self.tested(fit, k, weakest, scored), trained)
                training = ratios(trained, trained)
                # A fold that happens to score above training shows no optimism.
                gap = np.maximum(training - light[k], 0.0) / self.n_features
                corrected[k] = training - self.n_features / 2 * np.log1p(gap)
            correlations.append(self._canonical(fit, k, here, correlated))
            means.append(fit.mean_t)
            if rows is not None:
                at = np.flatnonzero(rows.fold == k)
                held_out_rows[at] = self._predict(fit, strengths.chosen[k], rows.z[at])
                near = [rows.z[position] for _, position, _ in inner_rows[k]]
                fitted_rows.append([self._predict(fit, strengths.chosen[k], z) for z in near])
        scores = Scores(held_out, light, corrected)
        if rows is None:
            return scores, np.stack(correlations), None
        unexplained = [spread[k] for k in range(n_folds)]
        told = Predictions(held_out_rows, inner_rows, fitted_rows, unexplained, torch.stack(means))
        return scores, np.stack(correlations), told

    def _predict(
        self,
        fit: RidgeFit,
        strengths: Float[np.ndarray, " target"],
        rows: Float[Tensor, "row width"],
    ) -> Float[Tensor, "row column"]:
        weights = torch.cat(self._weights(fit, strengths, range(self.n_targets)), dim=1)
        return fit.mean_t + product((rows - fit.mean_z).to(weights), weights)

    def _canonical(
        self, fit: RidgeFit, fold: int, here: Mapping[int, _OnFold], targets: Sequence[int]
    ) -> Float[np.ndarray, "part component"]:
        """Correlations, on one fold, along the canonical directions of the folds fitted on.

        The null reader has no direction, and correlates 0.
        """
        chosen = list(targets)
        weights = torch.stack([here[target].weights.double() for target in chosen])
        products = torch.stack([here[target].products.double() for target in chosen])

        def split(columns: Tensor) -> Tensor:
            return rearrange(columns, "d (t f) -> t d f", f=self.n_features)[chosen]

        def blocks(matrix: Tensor) -> Tensor:
            return _diagonal_blocks(matrix, self.n_features)[chosen]

        spread = blocks(self._trained_targets(fit))
        root = torch.linalg.cholesky(spread + _isotropic(_floor(spread), spread))
        whitened = torch.linalg.solve_triangular(root, weights.mT @ split(fit.zt), upper=False)
        whitened = torch.linalg.solve_triangular(root, whitened.mT, upper=False)
        directions = torch.linalg.eigh((whitened + whitened.mT) / 2).eigenvectors.flip(-1)
        axes = torch.linalg.solve_triangular(root.mT, directions, upper=True)

        def along(moment: Tensor) -> Tensor:
            diagonal: Tensor = (axes * (moment @ axes)).sum(dim=1)
            return diagonal

        power_y = along(blocks(self._targets_about(fit, fold)))
        power = along(weights.mT @ products) * power_y
        together = along(weights.mT @ split(fit.about(fold).zt))
        correlation = torch.where(power > 0, together / power.sqrt(), 0.0)
        values: np.ndarray = correlation.cpu().numpy()
        return values

    def _on_fold(
        self,
        fit: RidgeFit,
        fold: int,
        strengths: Float[np.ndarray, " target"],
        targets: Sequence[int],
    ) -> dict[int, _OnFold]:
        """Readers of some targets on a fold that they were not fitted on, by target."""
        weights = dict(zip(targets, self._weights(fit, strengths, targets), strict=True))
        found: dict[int, _OnFold] = {}
        # Each in the precision that it was solved for in.
        for dtype in {one.dtype for one in weights.values()}:
            alike = [target for target in targets if weights[target].dtype == dtype]
            together = torch.cat([weights[target] for target in alike], dim=1)
            products = fit.about(fold, dtype).zz_times(together)
            found |= {
                target: _OnFold(weights[target], product)
                for target, product in zip(
                    alike, torch.split(products, self.n_features, dim=1), strict=True
                )
            }
        return found

    def _left(
        self, fit: RidgeFit, fold: int, here: Mapping[int, _OnFold], targets: Sequence[int]
    ) -> Residuals:
        at = self._columns(targets)
        weights = torch.cat([here[target].weights for target in targets], dim=1)
        products = torch.cat([here[target].products for target in targets], dim=1)
        yy = self._targets_about(fit, fold)[at][:, at]
        return self._residuals(weights, products, yy, fit.about(fold, weights.dtype).zt[:, at])

    def _targets_about(self, fit: RidgeFit, fold: int) -> Float[Tensor, "column column"]:
        count = self.count[fold]
        mean = self.sums.t[fold] / count
        return moment_about(self.yy[fold] / count, mean, mean, fit.mean_t, fit.mean_t)

    def _trained_targets(self, fit: RidgeFit) -> Float[Tensor, "column column"]:
        yy: Tensor = self.yy[fit.folds].sum(0) / self.count[fit.folds].sum()
        return yy - torch.outer(fit.mean_t, fit.mean_t)

    def _residuals(
        self,
        weights: Float[Tensor, "width column"],
        zz_weights: Float[Tensor, "width column"],
        yy: Float[Tensor, "column column"],
        zt: Float[Tensor, "width column"],
    ) -> Residuals:
        null_floor = _floor(_diagonal_blocks(yy, self.n_features))
        # E (y - W z)(y - W z)^T = yy - W^T zy - (W^T zy)^T + W^T zz W. The null reader has no
        # weights, and is left exactly as it is.
        change = (weights.T @ (zz_weights / 2 - zt)).to(yy)
        residual = yy + change + change.T
        lengths = rearrange(weights, "d (t f) -> t d f", f=self.n_features).pow(2).sum(dim=1).to(yy)
        blocks = _diagonal_blocks(residual, self.n_features)
        reader_floor = _raised(null_floor + RESOLUTION * lengths.amax(dim=-1), blocks)
        return Residuals(residual, yy, reader_floor, null_floor)

    def _columns(self, targets: Sequence[int]) -> Int[Tensor, " column"]:
        start = torch.tensor(list(targets), dtype=torch.long) * self.n_features
        return (start[:, None] + torch.arange(self.n_features)).flatten()

    def _weights(
        self, fit: RidgeFit, strengths: Float[np.ndarray, " target"], targets: Sequence[int]
    ) -> list[Float[Tensor, "width feature"]]:
        """Some targets' weights, each at its own strength; zeros for the null reader."""
        return fit.block_weights(strengths[list(targets)].tolist(), targets, self.n_features)


def _log_likelihood(
    tested: Float[Tensor, "*batch c c"], expected: Float[Tensor, "*batch c c"]
) -> Float[Tensor, "*batch c"]:
    """Mean Gaussian log-likelihood, each coordinate given those before it, but for a constant."""
    root = torch.linalg.cholesky(expected)
    half = torch.linalg.solve_triangular(root, tested, upper=False)
    scaled = torch.linalg.solve_triangular(root, half.mT, upper=False)
    squares: Tensor = scaled.diagonal(dim1=-2, dim2=-1)
    log_scale: Tensor = root.diagonal(dim1=-2, dim2=-1).log()
    return -log_scale - squares / 2


def _diagonal_blocks(
    matrix: Float[Tensor, "column column"], size: int
) -> Float[Tensor, "target f f"]:
    split = rearrange(matrix, "(t f) (u g) -> t u f g", f=size, g=size)
    index = torch.arange(len(split))
    blocks: Tensor = split[index, index]
    return blocks


def _floor(blocks: Float[Tensor, "target f f"]) -> Float[Tensor, " target"]:
    return _raised(RESOLUTION * blocks.diagonal(dim1=-2, dim2=-1).amax(dim=-1), blocks)


def _raised(
    floor: Float[Tensor, " target"], blocks: Float[Tensor, "target f f"]
) -> Float[Tensor, " target"]:
    """The floor, raised where variances are below zero: that is rounding, and shows its size."""
    if not torch.linalg.cholesky_ex(blocks + _isotropic(floor, blocks)).info.any():
        return floor
    lowest = torch.linalg.eigvalsh(blocks)[:, 0]
    raised: Tensor = floor + 2 * (-lowest).clamp(min=0.0)
    return raised


def _isotropic(floor: Float[Tensor, " target"], like: Tensor) -> Float[Tensor, "target f f"]:
    """The floor of each target in every direction."""
    spherical: Tensor = floor[:, None, None] * torch.eye(like.shape[-1]).to(like)
    return spherical
