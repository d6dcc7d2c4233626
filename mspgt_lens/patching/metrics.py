"""Metrics of patched runs: by name, or any callable on logits as in TransformerLens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.patching.pairs import PromptPairs

MetricName = Literal["logit_difference", "kl", "cross_entropy"]
LogitMetric = Callable[[Float[Tensor, "pair pos vocab"]], Any]
DEFAULT_METRIC: MetricName = "logit_difference"


@dataclass(frozen=True)
class NamedMetric:
    """A metric that reads the logits at each pair's last token, one value per pair.

    Attributes:
        name: ``"logit_difference"`` (answer minus foil), ``"kl"`` (of the run from the clean run,
            in nats) or ``"cross_entropy"`` (of the answer, in nats).
        answer: Shape ``[pair]``.
        foil: Shape ``[pair]``.
        clean: Log-probabilities of the clean run at the last token, shape ``[pair, vocab]``; for
            ``"kl"`` only.
    """

    name: MetricName
    answer: Int[Tensor, " pair"]
    foil: Int[Tensor, " pair"]
    clean: Float[Tensor, "pair vocab"] | None = None

    def __call__(
        self, logits: Float[Tensor, "row vocab"], pair: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The metric of each row of logits, which belongs to the pair of that number."""
        if self.name == "logit_difference":
            answer, foil = self.answer[pair, None], self.foil[pair, None]
            return (logits.gather(1, answer) - logits.gather(1, foil))[:, 0]
        scores = logits.log_softmax(dim=-1)
        if self.name == "cross_entropy":
            return -scores.gather(1, self.answer[pair, None])[:, 0]
        assert self.clean is not None
        clean = self.clean[pair]
        return (clean.exp() * (clean - scores)).sum(dim=-1)


def named_metric(
    name: str, pairs: PromptPairs, clean_logits: Float[Tensor, "pair vocab"]
) -> NamedMetric:
    """The metric of that name.

    Args:
        name: One of ``"logit_difference"``, ``"kl"`` and ``"cross_entropy"``.
        pairs: The pairs.
        clean_logits: Of the clean run at each pair's last token.

    Raises:
        ValueError: If there is no metric of that name.
    """
    check_metric(name)
    device = clean_logits.device
    return NamedMetric(
        name,  # type: ignore[arg-type]
        pairs.answer.to(device),
        pairs.foil.to(device),
        clean_logits.log_softmax(dim=-1) if name == "kl" else None,
    )


def check_metric(metric: Any) -> None:
    """See that a metric is a known name or a callable.

    Raises:
        ValueError: If it is neither.
    """
    if not callable(metric) and metric not in get_args(MetricName):
        raise ValueError(
            f"metric must be one of {', '.join(get_args(MetricName))} or a callable on logits "
            f"[pair, pos, vocab], got {metric!r}"
        )


def metric_label(metric: MetricName | LogitMetric) -> str:
    """A metric's name; of a callable, its own."""
    if callable(metric):
        return str(getattr(metric, "__name__", type(metric).__name__))
    return str(metric)


def call_metric(
    metric: LogitMetric, logits: Float[Tensor, "pair pos vocab"]
) -> Float[Tensor, "*pair"]:
    """What a callable says of all pairs: one value per pair, or one for all of them.

    Raises:
        ValueError: If it returns something else, or a value that is not finite.
    """
    value = torch.as_tensor(metric(logits)).cpu().double()
    if value.shape not in (torch.Size([]), logits.shape[:1]):
        raise ValueError(
            f"metric must return one value per pair, shape [{len(logits)}], or one number; it "
            f"returned shape {tuple(value.shape)}"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"metric must return finite values, got {value.tolist()}")
    return value
