"""The ridge lens as an object: it decodes residuals, reads texts, and is kept without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, interval, named
from mspgt_lens.estimates import Curve
from mspgt_lens.information.lens import LensMaps
from mspgt_lens.lens.reading import LensReading, read_text
from mspgt_lens.models import ModelAdapter, as_adapter, weight_digest


@dataclass(frozen=True, eq=False, repr=False)
class RidgeLens(Result):
    """What the residual stream at every site predicts, decoded by the model's own unembedding.

    From each site an affine map leads to the final residual, both through the model's own kind of
    norm without its learned scale; then come the norm's scale, the unembedding and the soft cap of
    the model. The map is ridge regression in closed form: a tuned lens (Belrose et al. 2023)
    without gradient descent. At site L, after the last block, it is the identity.

    A lens decodes through its model, which is not saved with it: one that was loaded needs
    :meth:`attach` before :meth:`logits` and :meth:`read`.

    Attributes:
        model_name: The model.
        n_tokens: Positions that it was fitted on.
        n_groups: Groups that these are from.
        n_decoded: Held-out positions that the three curves rest on.
        cross_entropy: Held-out cross-entropy at each site, the model's own at the last.
        kl: Held-out divergence of each site's predictions from the model's own.
        relevance: The gain in cross-entropy over the unigram model.
        unigram: Held-out cross-entropy of the unigram model, in nats per token.
        strength: Penalty of the regression, in units of a coordinate's variance.
        weights: Linear part of the map from each site but the last, ``[site, width, d_model]``.
        bias: What is added, shape ``[site, d_model]``.
        center: What is taken off the normalized residual, shape ``[site, d_model]``.
        spread: Where the residual is wider than ``width``, what each coordinate is divided by
            before it is projected, shape ``[site, d_model]``; else None.
        axes: The directions it is projected on, shape ``[d_model, width]``; else None.
        weights_digest: Tells the model's weights from others.
        settings: What decided the numbers.
        versions: Versions of the packages that made it.
        warnings: What a reader has to know before trusting it.
    """

    model_name: str
    n_tokens: int
    n_groups: int
    n_decoded: int
    cross_entropy: Curve
    kl: Curve
    relevance: Curve
    unigram: float
    strength: float
    weights: Float[Tensor, "site width d_model"]
    bias: Float[Tensor, "site d_model"]
    center: Float[Tensor, "site d_model"]
    spread: Float[Tensor, "site d_model"] | None
    axes: Float[Tensor, "d_model width"] | None
    weights_digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    # The model, and the maps on its device: not part of the result.
    _decoder: ClassVar[tuple[ModelAdapter, LensMaps] | None] = None

    @property
    def n_layers(self) -> int:
        """Number of blocks, L."""
        return len(self.weights)

    @in_own_state
    def attach(self, model: Any) -> RidgeLens:
        """The same lens with the model that it decodes through.

        Args:
            model: The model that the lens was fitted on.

        Returns:
            A lens that :meth:`logits` and :meth:`read` work on.

        Raises:
            ValueError: If the model's weights are not those that the lens was fitted on.
            TypeError: If the model is none of TransformerLens's.
        """
        adapter = as_adapter(model)
        digest = weight_digest(adapter)
        if digest != self.weights_digest:
            raise ValueError(
                f"model must be the one that the lens was fitted on, {self.model_name} with the "
                f"weights {self.weights_digest} ({self.settings.get('weights', 'unknown class')}); "
                f"got {adapter.name} with {digest} ({adapter.weight_processing}): load that one in "
                "the same class and precision, or fit_lens(model, prompts) anew"
            )
        maps = LensMaps(self.center, self.weights, self.bias, self.spread, self.axes)
        attached = replace(self)
        object.__setattr__(attached, "_decoder", (adapter, maps.to(adapter.unembedding_device)))
        return attached

    @in_own_state
    def logits(
        self, site: int, residual: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch vocab"]:
        """What a residual stream predicts, as logits; without gradients.

        Args:
            site: 0 ... L; site ``l`` is the residual before block ``l``, L that after the last.
            residual: The residual stream as the hook of that site gives it, not normalized
                (``blocks.{l}.hook_resid_pre``; the last block's ``hook_resid_post`` for L).

        Returns:
            Logits in float32 or wider, on the model's device. At site L they are the model's own.

        Raises:
            ValueError: If no model is attached, there is no such site, or the residual's width is
                not the model's.

        Example:
            >>> lens = ml.fit_lens(model, prompts, progress=False)
            >>> _, cache = model.run_with_cache(torch.arange(4, 24)[None])
            >>> lens.logits(3, cache["blocks.3.hook_resid_pre"]).shape
            torch.Size([1, 20, 101])
        """
        adapter, _ = self._attached("logits")
        if not 0 <= site <= self.n_layers:
            raise ValueError(f"site must be 0 to {self.n_layers}, got {site}")
        if not residual.ndim or residual.shape[-1] != adapter.d_model:
            raise ValueError(
                f"residual must end in the width of {adapter.name}, {adapter.d_model}; got shape "
                f"{tuple(residual.shape)}"
            )
        with adapter.inference():
            logits = self._decoded(site, residual.reshape(-1, adapter.d_model))
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    @in_own_state
    def read(self, text: str | Sequence[int] | Int[Tensor, " pos"]) -> LensReading:
        """What every site predicts at every position of one text.

        An encoder is read at every token in turn, with that one hidden.

        Args:
            text: A text no longer than the model's context, or its token ids as the model takes
                them (with BOS where it takes one).

        Returns:
            The most probable tokens, entropies and ranks by site and position.

        Raises:
            ValueError: If no model is attached, the text is empty or longer than the context, or
                the model has no tokenizer and ids are not given.
            FloatingPointError: If a prediction is NaN or infinite.
            RuntimeError: Torch's own (``torch.OutOfMemoryError``), if the text does not fit into
                memory.

        Example:
            >>> lens = ml.fit_lens(model, prompts, progress=False)
            >>> lens.read("w5 w6 w7 w8 w9 w10")
            LensReading of ...
            ...
        """
        adapter, _ = self._attached("read")
        skip_first = int(self.settings.get("skip_first", 0))
        return read_text(adapter, text, self._decoded, skip_first)

    def heading(self) -> str:
        """The model and how much text."""
        return (
            f"RidgeLens{named(self.model_name)}: {counted(self.n_layers, 'block')}, fitted on "
            f"{self.n_tokens:,} positions from {counted(self.n_groups, 'group')}"
        )

    def rows(self) -> Rows:
        """All three quantities at a few sites."""
        last = self.n_layers
        sites = sorted({0, round(last / 3), round(2 * last / 3), last - 1, last})
        names = [f"{name.replace('_', ' ')} ({curve.unit})" for name, curve in self._curves()]
        rows: Rows = [("site", *names)]
        for site in sites:
            numbers = (
                interval(c.values[site], c.low[site], c.high[site]) for _, c in self._curves()
            )
            rows.append((str(site), *numbers))
        return rows

    def findings(self) -> list[str]:
        """What the numbers rest on, and whether there is a model to decode through."""
        said = [
            f"Held out by groups at {self.n_decoded:,} positions; the unigram model's "
            f"cross-entropy is {self.unigram:.3g}; 95% intervals."
        ]
        if self._decoder is None:
            said.append("No model is attached: attach(model) before logits and read.")
        return said

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity and site: ``model, quantity, site, value, low, high, unit``."""
        frames = [
            pd.DataFrame(
                {
                    "model": self.model_name,
                    "quantity": name,
                    "site": np.arange(len(curve)),
                    "value": curve.values,
                    "low": curve.low,
                    "high": curve.high,
                    "unit": curve.unit,
                }
            )
            for name, curve in self._curves()
        ]
        return pd.concat(frames, ignore_index=True)

    def _curves(self) -> list[tuple[str, Curve]]:
        names = ("cross_entropy", "kl", "relevance")
        return [(name, getattr(self, name)) for name in names]

    def _decoded(
        self, site: int, residual: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row vocab"]:
        adapter, maps = self._attached("logits")
        normalized = adapter.normalize(residual.to(adapter.unembedding_device))
        return adapter.decode(maps.final(site, normalized))

    def _attached(self, what: str) -> tuple[ModelAdapter, LensMaps]:
        if self._decoder is None:
            raise ValueError(
                f"{what} decodes through {self.model_name}, and this lens was loaded or made "
                "without it: lens = lens.attach(model)"
            )
        return self._decoder
