"""The networks of the trained H-VIB probe: every site and every beta stacked into one tensor each.

Scales run from coarse to fine: ``t_G`` first, ``t_I`` given ``t_G``, then ``t_L`` given ``t_I``. A
*row* is a site (or one tap per scale), a *cell* is one row at one beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Encoders may narrow or widen a latent's deviation by exp(+-4) at most, smoothly.
LOG_VARIANCE_REACH = 8.0


@dataclass(frozen=True)
class NetworkPlan:
    """Sizes that fix every parameter's shape.

    Attributes:
        n_inputs: Inputs: one per row, or, with one tap per scale, one per scale and a single row.
        width: Coordinates of each input.
        betas: Weights of the path, one cell per row and beta.
        n_features: Target features of each scale, coarse to fine.
        latent: Dimensions of each scale's t.
        hidden: Units of each of an encoder's two hidden layers.
        tapped: Whether each scale has an input of its own.
        n_classes: Tokens told apart, or 0 where tokens are not decoded.
        rank: Columns of the class rows.
    """

    n_inputs: int
    width: int
    betas: tuple[float, ...]
    n_features: tuple[int, ...]
    latent: int
    hidden: int
    tapped: bool = False
    n_classes: int = 0
    rank: int = 0

    @property
    def n_scales(self) -> int:
        """Number of scales."""
        return len(self.n_features)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return 1 if self.tapped else self.n_inputs

    @property
    def cells(self) -> tuple[int, int]:
        """``(row, beta)``."""
        return self.n_rows, len(self.betas)


@dataclass(frozen=True)
class Scores:
    """What one pass gives per cell and position, in nats.

    Attributes:
        kl: ``KL(q(t_s | z) || r(t_s | t_parent))`` per scale, coarse to fine.
        gain: ``log p(y_s | t) - log N(y_s; m, S)`` per scale.
        token_gain: ``log p(token class | t) - log p(token class)``, or None.
    """

    kl: Float[Tensor, "scale row beta position"]
    gain: Float[Tensor, "scale row beta position"]
    token_gain: Float[Tensor, "row beta labeled"] | None


class Network:
    """Encoders, priors and decoders of all cells.

    Encoder of each scale: a linear map plus two hidden layers give the mean, the hidden layers the
    variances. Priors are linear and Gaussian. Decoders are linear in every t at least as coarse,
    with a full covariance, so that linear-Gaussian readers are among them; the encoders bend.

    Args:
        plan: Sizes.
        rows: Unembedding rows of the token classes, or None where tokens are not decoded.
        log_classes: Log-probability of each class without z.
        seed: Decides the first weights, which are the same in every cell.
        dtype: Floating type of the computation.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        rows: Float[Tensor, "class rank"] | None = None,
        log_classes: Float[Tensor, " class"] | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.plan, self.rows, self.log_classes = plan, rows, log_classes
        self.parameters = _first_parameters(plan, log_classes, seed, dtype)

    def __call__(
        self,
        z: Float[Tensor, "input position width"],
        targets: list[Float[Tensor, "position feature"]],
        labels: Int[Tensor, " labeled"] | None,
        noise: Float[Tensor, "scale position latent"],
    ) -> Scores:
        """Scores of every position in every cell, for one draw of the latents' noise.

        Targets are whitened: without z, ``N(0, I)`` is their best Gaussian. Labels may be those of
        the first positions only, since telling tokens apart is the dearest part.
        """
        mean, log_variance = self._encode(z)
        t = torch.addcmul(mean, (log_variance / 2).exp(), noise[None, None])
        kl = self._divergence(mean, log_variance, t)
        seen, gains = self.latents_seen(t), []
        for scale, target in enumerate(targets):
            ahead, code = self.compare(scale, seen, target)
            loss = (ahead - code).square().sum(-1) - target.square().sum(-1)
            gains.append(self.log_precision(scale)[..., None] - loss / 2)
        token_gain = None if labels is None else self._token_gain(seen[:, :, : len(labels)], labels)
        return Scores(kl, torch.stack(gains), token_gain)

    def ignorant(self) -> dict[str, Tensor]:
        """Parameters with which every rate and every gain is exactly 0."""
        nothing = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        if self.log_classes is not None:
            nothing["class_bias"] += self.log_classes
        return nothing

    def draw(
        self,
        z: Float[Tensor, "input position width"],
        noise: Float[Tensor, "scale position latent"],
    ) -> Float[Tensor, "row beta position latents"]:
        """One draw of every t, coarse to fine side by side."""
        mean, log_variance = self._encode(z)
        return self.latents_seen(torch.addcmul(mean, (log_variance / 2).exp(), noise[None, None]))

    @staticmethod
    def latents_seen(
        t: Float[Tensor, "row beta scale position latent"],
    ) -> Float[Tensor, "row beta position latents"]:
        """All t side by side; the decoder of scale s sees the first s + 1."""
        return t.transpose(2, 3).flatten(3)

    def compare(
        self,
        scale: int,
        seen: Float[Tensor, "row beta position latents"],
        target: Float[Tensor, "position feature"],
    ) -> tuple[Tensor, Tensor]:
        """Target and what the decoder expects, both where the decoder's covariance is I.

        Both have shape ``[row, beta, position, feature]``.
        """
        p = self.parameters
        n_cells = self.plan.n_rows * len(self.plan.betas)
        factor = self._factor(scale).flatten(0, 1)
        ahead = torch.bmm(target[None].expand(n_cells, -1, -1), factor)
        code = torch.baddbmm(
            p[f"offset{scale}"].flatten(0, 1),
            seen[..., : (scale + 1) * self.plan.latent].flatten(0, 1),
            p[f"decode{scale}"].flatten(0, 1),
        )
        shape = (*self.plan.cells, *ahead.shape[1:])
        return ahead.view(shape), code.view(shape)

    def log_precision(self, scale: int) -> Float[Tensor, "row beta"]:
        """Log-determinant of the decoder's precision factor."""
        return self.parameters[f"log_diagonal{scale}"].sum(-1)

    def _factor(self, scale: int) -> Float[Tensor, "row beta feature feature"]:
        """Triangular F with decoder precision ``F F^T``."""
        p = self.parameters
        return p[f"above{scale}"].triu(1) + p[f"log_diagonal{scale}"].exp().diag_embed()

    def _encode(self, z: Float[Tensor, "input position width"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each t, shape ``[row, beta, scale, position, latent]``."""
        plan, p = self.plan, self.parameters
        # Cells of one row share its z: one product with all their weights side by side.
        first = torch.baddbmm(p["enter_bias"].flatten(2), z, p["enter"].flatten(2))
        first = first.view(*first.shape[:2], *p["enter"].shape[2:])
        order = (3, 2, 0, 1, 4) if plan.tapped else (0, 2, 3, 1, 4)
        stacked = first.permute(order).flatten(0, 2)
        hidden = stacked[..., : plan.hidden].relu()
        inner = torch.baddbmm(p["inner_bias"].flatten(0, 2), hidden, p["inner"].flatten(0, 2))
        out = torch.baddbmm(p["leave_bias"].flatten(0, 2), inner.relu(), p["leave"].flatten(0, 2))
        mean = stacked[..., plan.hidden :] + out[..., : plan.latent]
        reach = LOG_VARIANCE_REACH
        log_variance = reach * (out[..., plan.latent :] / reach).tanh()
        shape = (*plan.cells, plan.n_scales, *mean.shape[1:])
        return mean.view(shape), log_variance.view(shape)

    def _divergence(
        self, mean: Tensor, log_variance: Tensor, t: Tensor
    ) -> Float[Tensor, "scale row beta position"]:
        """Root against ``N(0, I)``; every other t against its linear prior given its parent."""
        plan, p = self.plan, self.parameters
        root = mean[:, :, :1].square() + log_variance[:, :, :1].exp() - log_variance[:, :, :1] - 1
        parts = [root]
        if plan.n_scales > 1:
            parent = torch.baddbmm(
                p["prior_bias"].flatten(0, 2),
                t[:, :, :-1].flatten(0, 2),
                p["prior"].flatten(0, 2),
            ).view(*plan.cells, plan.n_scales - 1, *t.shape[3:])
            width = LOG_VARIANCE_REACH * (p["prior_width"] / LOG_VARIANCE_REACH).tanh()
            own = log_variance[:, :, 1:]
            error = (mean[:, :, 1:] - parent).square() + own.exp()
            parts.append(error * (-width).exp() - own + width - 1)
        return torch.cat(parts, dim=2).sum(-1).movedim(2, 0) / 2

    def _token_gain(
        self, seen: Float[Tensor, "row beta position latents"], labels: Int[Tensor, " position"]
    ) -> Float[Tensor, "row beta position"]:
        assert self.rows is not None
        assert self.log_classes is not None
        p = self.parameters
        # The rows first: latents and rank are few, positions are many.
        weights = p["read"].flatten(0, 1) @ self.rows.T
        logits = torch.baddbmm(p["class_bias"].flatten(0, 1), seen.flatten(0, 1), weights)
        wanted = labels[None, :, None].expand(len(logits), -1, 1)
        chosen = logits.gather(2, wanted)[..., 0] - logits.logsumexp(-1)
        return chosen.view(*self.plan.cells, -1) - self.log_classes[labels]


def cell_mask(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """A ``[row, beta]`` mask shaped to broadcast over a parameter."""
    if name in ("enter", "enter_bias"):
        return mask[:, None, :, None, None]
    return mask.view(*mask.shape, *[1] * (value.ndim - 2))


def _first_parameters(
    plan: NetworkPlan, log_classes: Tensor | None, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n_rows, n_betas = plan.cells
    n_scales, k, h = plan.n_scales, plan.latent, plan.hidden
    per_input = 1 if plan.tapped else n_scales

    def draw(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def everywhere(tensor: Tensor) -> Tensor:
        return tensor.expand(n_rows, n_betas, *tensor.shape)

    # Scales start alike too, so that one tap per scale starts like all scales at one site.
    enter = torch.cat(
        [
            draw(plan.width, h, scale=(2 / plan.width) ** 0.5),
            draw(plan.width, k, scale=0.5 * plan.width**-0.5),
        ],
        dim=1,
    )
    inner = draw(h, h, scale=(2 / h) ** 0.5)
    leave = torch.cat([draw(h, k, scale=0.5 * h**-0.5), torch.zeros(h, k)], dim=1)
    parameters = {
        "enter": enter[None, :, None, None].expand(plan.n_inputs, -1, n_betas, per_input, -1),
        "enter_bias": torch.zeros(plan.n_inputs, 1, n_betas, per_input, h + k),
        "inner": everywhere(inner.expand(n_scales, -1, -1)),
        "inner_bias": everywhere(torch.zeros(n_scales, 1, h)),
        "leave": everywhere(leave.expand(n_scales, -1, -1)),
        "leave_bias": everywhere(torch.zeros(n_scales, 1, 2 * k)),
    }
    if n_scales > 1:
        parameters["prior"] = everywhere(torch.zeros(n_scales - 1, k, k))
        parameters["prior_bias"] = everywhere(torch.zeros(n_scales - 1, 1, k))
        parameters["prior_width"] = everywhere(torch.zeros(n_scales - 1, 1, k))
    for scale, n_features in enumerate(plan.n_features):
        seen = (scale + 1) * k
        parameters[f"decode{scale}"] = everywhere(draw(seen, n_features, scale=0.3 * seen**-0.5))
        parameters[f"offset{scale}"] = everywhere(torch.zeros(1, n_features))
        parameters[f"above{scale}"] = everywhere(torch.zeros(n_features, n_features))
        parameters[f"log_diagonal{scale}"] = everywhere(torch.zeros(n_features))
    if log_classes is not None:
        parameters["read"] = everywhere(draw(n_scales * k, plan.rank, scale=0.1 * plan.rank**-0.5))
        parameters["class_bias"] = everywhere(log_classes[None].double())
    return {
        name: value.to(dtype).contiguous().requires_grad_() for name, value in parameters.items()
    }
