"""The result of a profile: curves over depth, their settings, and files that keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mspgt_lens.contract import Result, Rows, counted, interval, named
from mspgt_lens.estimates import Curve, Unit
from mspgt_lens.information.frontier import DEFAULT_BETAS, Frontier
from mspgt_lens.signals import SignalWords


@dataclass(frozen=True, eq=False, repr=False)
class LayerProfile(Result):
    """What each layer of one model keeps of the past and predicts of the future.

    Site ``l`` is the residual stream before block ``l`` (0 ... L - 1); site ``L`` is after the last
    block. Information curves run over the ``L + 1`` sites, ``signals`` over the ``L`` blocks or the
    ``L + 1`` sites.

    Attributes:
        model_name: The model's name as TransformerLens knows it.
        n_layers: Number of blocks, L.
        n_tokens: Valid positions that entered the moments.
        n_groups: Groups (documents) that they came from.
        bands: Scale name to its band of token offsets ``(a, b)``.
        compression: Channel rate of the standardized residual stream (nats per token).
        relevance: Held-out cross-entropy gain of the ridge lens over a unigram model (nats per
            token), on a sample of positions.
        retained: Per scale, information about what was read: of a band of one token in nats about
            the token, at most ``settings["unigram_cross_entropy"]``; of others in nats about the
            mean of the band's features.
        predicted: Per scale, information about what is to come, in the same units.
        added: Per scale of several tokens, what the mean of its future adds to those of the coarser
            scales: ``I(z; Y_global)``, ``I(z; Y_intermediate | Y_global)`` and so on (nats). The
            parts sum to the information about these futures together.
        signals: Name to the curve of a signal over blocks or sites.
        correlations: Per scale, held-out canonical correlations of each site with its future, shape
            ``[fold, site, component]``: what :meth:`frontier` is computed from.
        fold_weights: Positions of each fold, shape ``[fold]``.
        logit_lens: As ``relevance`` for the raw logit lens, or None where it was not asked for.
        control: ``"random_weights"`` or ``"shuffled_tokens"`` if this is a null to compare with;
            None for the model itself.
        settings: Everything that decides the numbers: bands, noise, folds, seed and so on.
        versions: Package versions it was made with.
        warnings: What a reader has to know before trusting the curves.
        signal_words: Name to what figures say of a signal that is not the package's own.
    """

    model_name: str
    n_layers: int
    n_tokens: int
    n_groups: int
    bands: Mapping[str, tuple[int, int]]
    compression: Curve
    relevance: Curve
    retained: Mapping[str, Curve]
    predicted: Mapping[str, Curve]
    signals: Mapping[str, Curve]
    added: Mapping[str, Curve] = field(default_factory=dict)
    correlations: Mapping[str, Float[np.ndarray, "fold site component"]] = field(
        default_factory=dict
    )
    fold_weights: tuple[float, ...] = ()
    logit_lens: Curve | None = None
    control: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    signal_words: Mapping[str, SignalWords] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for quantity, _, curve in self.curves():
            of_site = self.n_layers + 1
            # Signals are of blocks or of sites; which, their length says.
            allowed = (self.n_layers, of_site) if quantity in self.signals else (of_site,)
            if len(curve) not in allowed:
                raise ValueError(
                    f"LayerProfile: {quantity} needs {' or '.join(map(str, allowed))} points for "
                    f"{self.n_layers} blocks, got {len(curve)}"
                )

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the scales, in the order of ``bands``."""
        return tuple(self.bands)

    @property
    def reads_tokens(self) -> bool:
        """Whether bands of one token were read in tokens (profiles saved before 0.4 were not)."""
        return "unigram_entropy" in self.settings

    def about_one_token(self, quantity: str, scale: str) -> bool:
        """Whether a curve is about one token, so that it never exceeds the unigram cross-entropy.

        Args:
            quantity: As :meth:`curves` calls it.
            scale: One of ``scales``.

        Returns:
            True of retained and predicted information of a band of one token.
        """
        first, last = self.bands.get(scale, (1, 2))
        return self.reads_tokens and quantity in ("retained", "predicted") and first == last

    def curves(self) -> Iterator[tuple[str, str, Curve]]:
        """Every curve as ``(quantity, scale, curve)``; scale is ``""`` where there is none.

        Yields:
            Curves over sites (compression, relevance, retained, predicted, added information), then
            ``signals`` over blocks or sites, each in its own unit.
        """
        yield "compression", "", self.compression
        yield "relevance", "", self.relevance
        if self.logit_lens is not None:
            yield "logit_lens", "", self.logit_lens
        for quantity in ("retained", "predicted", "added"):
            by_scale: Mapping[str, Curve] = getattr(self, quantity)
            for scale, curve in by_scale.items():
                yield quantity, scale, curve
        for name, curve in self.signals.items():
            yield name, "", curve

    def frontier(
        self, site: int, scale: str, betas: Float[np.ndarray, " beta"] = DEFAULT_BETAS
    ) -> Frontier:
        """The Gaussian information bottleneck between one site and one scale's future.

        Args:
            site: 0 ... L.
            scale: One of ``scales``.
            betas: Weights of relevance against rate, at least 1.

        Returns:
            Its rates and relevances at every beta, in nats per token (Chechik et al. 2005). For a
            band of one offset the target is a token's embedding, and the result says that a
            Gaussian reading of it may exceed what a token carries.

        Raises:
            ValueError: If there is no such site or scale, or the profile was saved by a version
                that kept no correlations.
        """
        if not self.correlations:
            raise ValueError(
                "this profile holds no canonical correlations (versions before 0.3 did not save "
                "them): run profile_layers again"
            )
        if scale not in self.correlations:
            raise ValueError(f"scale must be one of {', '.join(self.scales)}, got {scale!r}")
        if not 0 <= site <= self.n_layers:
            raise ValueError(f"site must be 0 to {self.n_layers}, got {site}")
        by_fold = self.correlations[scale][:, site]
        first, last = self.bands[scale]
        return Frontier(
            np.asarray(betas, dtype=float),
            by_fold,
            np.array(self.fold_weights),
            of_token=first == last,
        )

    def heading(self) -> str:
        """The model and how much text."""
        return (
            f"LayerProfile{named(self.model_name)}: {counted(self.n_layers, 'block')}, "
            f"{self.n_tokens:,} token positions from {counted(self.n_groups, 'group')}"
        )

    def rows(self) -> Rows:
        """A few sites and the best one of every curve over sites."""
        last = self.n_layers
        sites = sorted({0, round(last / 2), last})
        rows: Rows = [("nats per token", *(f"site {s}" for s in sites), "highest (95% interval)")]
        for quantity, scale, curve in self.curves():
            if quantity not in self.signals and curve.unit == "nats":
                top = int(np.argmax(curve.values))
                best = interval(curve.values[top], curve.low[top], curve.high[top])
                name = f"{quantity} {scale}".strip().replace("_", " ")
                shown = (f"{curve.values[site]:.3g}" for site in sites)
                rows.append((name, *shown, f"{best} at {top}"))
        return rows

    def findings(self) -> list[str]:
        """What the numbers are."""
        usable = "What readers of a site can use, which may rise with depth."
        if not self.reads_tokens:
            return [f"{usable} It is no bound on Shannon's information."]
        most, least = (self.settings[f"unigram_{name}"] for name in ("cross_entropy", "entropy"))
        return [
            f"{usable} About one token it is at most the unigram model's cross-entropy, "
            f"{most:.3g} nats (plug-in entropy {least:.3g}); about the mean of several it is a "
            "Gaussian reading, no bound on Shannon's information."
        ]

    def to_dataframe(self, unit: Unit = "nats") -> pd.DataFrame:
        """All curves as a tidy table.

        Args:
            unit: Unit of the information quantities; the other signals keep theirs.

        Returns:
            One row per curve and point: ``model, quantity, scale, site, value, low, high, unit``.
            For a signal of blocks, ``site`` is the block.
        """
        frames = []
        for quantity, scale, curve in self.curves():
            shown = curve.to(unit) if curve.unit in ("nats", "bits") else curve
            frames.append(
                pd.DataFrame(
                    {
                        "model": self.model_name,
                        "quantity": quantity,
                        "scale": scale,
                        "site": np.arange(len(shown)),
                        "value": shown.values,
                        "low": shown.low,
                        "high": shown.high,
                        "unit": shown.unit,
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)
