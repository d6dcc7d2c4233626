"""The signals of other theories of depth, as their authors define them; none is a default.

docs/signals.md has each one's source, its cost, and when not to trust it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from mspgt_lens.models import in_float64
from mspgt_lens.signals.record import BlockRows, Signal, SiteRows
from mspgt_lens.signals.traits import (
    N_MASSIVE,
    SINK_THRESHOLD,
    largest_share,
    prompt_entropy,
    sink_rate,
)

# Tokens before the query that count as recent (Lad et al. 2024).
RECENT = 5


def _block_influence(rows: BlockRows) -> Float[Tensor, " row"]:
    return 1 - _cosine(rows.before, rows.after)


def _attention_ratio(rows: BlockRows) -> Float[Tensor, " row"]:
    assert rows.attention is not None
    return _length(rows.attention) / _length(rows.before)


def _mlp_ratio(rows: BlockRows) -> Float[Tensor, " row"]:
    assert rows.mlp is not None
    assert rows.between is not None
    return _length(rows.mlp) / _length(rows.between)


def _attention_cosine(rows: BlockRows) -> Float[Tensor, " row"]:
    assert rows.attention is not None
    return _cosine(rows.attention, rows.before)


def _mlp_cosine(rows: BlockRows) -> Float[Tensor, " row"]:
    assert rows.mlp is not None
    assert rows.between is not None
    return _cosine(rows.mlp, rows.between)


def _sink_rate(rows: BlockRows) -> Float[Tensor, ""]:
    assert rows.pattern is not None
    return sink_rate(rows.pattern)


def _recent_attention(rows: BlockRows) -> Float[Tensor, " row"]:
    assert rows.pattern is not None
    back = torch.arange(1, RECENT + 1, device=rows.position.device)
    key = rows.position[:, None] - back
    there = key.clamp(min=0)[:, None].expand(-1, rows.pattern.shape[1], -1)
    recent = rows.pattern.gather(2, there) * (key >= 0)[:, None]
    return recent.sum(dim=2).mean(dim=1)


def _attention_distance(rows: BlockRows) -> Float[Tensor, ""]:
    assert rows.pattern is not None
    apart = (rows.position[:, None] - rows.position).abs().to(rows.pattern.dtype)
    return torch.einsum("q h k, q k -> q h", rows.pattern, apart).mean()


def _massive_share(rows: SiteRows) -> Float[Tensor, ""]:
    return largest_share(in_float64(rows.residual).pow(2).sum(dim=0))


def _first_norm(rows: SiteRows) -> Float[Tensor, ""]:
    length = _length(rows.residual)
    return length[0] / length.quantile(0.5)


def _prompt_entropy(rows: SiteRows) -> Float[Tensor, ""]:
    return prompt_entropy(rows.residual)


def _length(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _cosine(
    first: Float[Tensor, "row d_model"], second: Float[Tensor, "row d_model"]
) -> Float[Tensor, " row"]:
    # In float64: blocks turn the residual by little, and little is what is left of 1.
    first, second = in_float64(first), in_float64(second)
    along: Tensor = torch.linalg.vecdot(first, second)
    return along / (_length(first) * _length(second))


_ALL = (
    Signal(
        name="block_influence",
        unit="1 - cosine",
        guarantee="1 - cosine between a position's residual before and after the block, mean over "
        "valid positions (ShortGPT).",
        title="Block influence",
        sentence="the block turns the residual by {number}",
        of=_block_influence,
    ),
    Signal(
        name="attention_ratio",
        unit="ratio",
        guarantee="Length of what attention adds over that of the residual that it is added to, "
        "mean over valid positions.",
        title="Attention's update",
        sentence="attention adds {number} times the residual's length",
        of=_attention_ratio,
        updates=True,
    ),
    Signal(
        name="mlp_ratio",
        unit="ratio",
        guarantee="Length of what the MLP adds over that of the residual that it is added to, mean "
        "over valid positions.",
        title="MLP's update",
        sentence="the MLP adds {number} times the residual's length",
        of=_mlp_ratio,
        updates=True,
    ),
    Signal(
        name="attention_cosine",
        unit="cosine",
        guarantee="Cosine of what attention adds with the residual that it is added to, mean over "
        "valid positions: below 0 it erases, above 0 it strengthens.",
        title="Attention's direction",
        sentence="what attention adds has a cosine of {number} with the residual",
        of=_attention_cosine,
        updates=True,
        from_zero=False,
    ),
    Signal(
        name="mlp_cosine",
        unit="cosine",
        guarantee="Cosine of what the MLP adds with the residual that it is added to, mean over "
        "valid positions: below 0 it erases, above 0 it strengthens.",
        title="MLP's direction",
        sentence="what the MLP adds has a cosine of {number} with the residual",
        of=_mlp_cosine,
        updates=True,
        from_zero=False,
    ),
    Signal(
        name="sink_rate",
        unit="share of heads",
        guarantee="Share of heads whose attention to a prompt's first position, mean over all of "
        f"its queries, exceeds {SINK_THRESHOLD}; mean over prompts.",
        title="Attention sinks",
        sentence="{number} of the heads rest on the first position",
        of=_sink_rate,
        whole=True,
        patterns=True,
    ),
    Signal(
        name="recent_attention",
        unit="share",
        guarantee=f"Share of attention to the {RECENT} tokens before the query's own, mean over "
        "heads and valid queries.",
        title="Attention to recent tokens",
        sentence=f"{{number}} of attention is on the {RECENT} tokens before",
        of=_recent_attention,
        patterns=True,
    ),
    Signal(
        name="attention_distance",
        unit="tokens",
        guarantee="Expected distance to the attended key, the first key included, mean over heads "
        "and all queries of a prompt, then over prompts: it grows with the prompts' length.",
        title="Attention distance, sink included",
        sentence="heads attend {value} away on average, the sink included",
        of=_attention_distance,
        whole=True,
        patterns=True,
    ),
    Signal(
        name="massive_share",
        unit="share of power",
        guarantee=f"Share of the {N_MASSIVE} largest coordinates in the power of all of a prompt's "
        "residuals together, mean over prompts.",
        title="Massive coordinates",
        sentence=f"{N_MASSIVE} coordinates hold {{number}} of the power",
        of=_massive_share,
        place="site",
        whole=True,
    ),
    Signal(
        name="first_norm",
        unit="ratio",
        guarantee="Length of the first position's residual over the median length of all of the "
        "prompt's, mean over prompts.",
        title="First position's length",
        sentence="the first position is {number} times as long as the median",
        of=_first_norm,
        place="site",
        whole=True,
        logarithmic=True,
    ),
    Signal(
        name="prompt_entropy",
        unit="nats per prompt",
        guarantee="Renyi entropy of order 2 of the Gram matrix of a prompt's centered residuals "
        "at unit length, negative cosines taken as 0, mean over prompts: at most the logarithm of "
        "their number of tokens.",
        title="Prompt entropy",
        sentence="the prompt's positions differ by {number} nats",
        of=_prompt_entropy,
        place="site",
        whole=True,
        from_zero=False,
    ),
    Signal(
        name="lens_entropy",
        unit="nats",
        guarantee="Entropy of the ridge lens's prediction, mean over sampled held-out positions.",
        title="Entropy of the lens",
        sentence="the lens is unsure by {value}",
        of="lens_entropy",
        place="site",
    ),
    Signal(
        name="lens_kl",
        unit="nats",
        guarantee="Divergence of the ridge lens's prediction from the model's own, mean over "
        "sampled held-out positions.",
        title="The lens's divergence",
        sentence="the lens is {value} from the model's prediction",
        of="lens_kl",
        place="site",
    ),
    Signal(
        name="intrinsic_dimension",
        unit="dimensions",
        guarantee="Maximum-likelihood dimension from the two nearest neighbors of sampled "
        "positions' normalized residuals, equal ones counted once: of the scale of their "
        "distances, and too low where it is high.",
        title="Intrinsic dimension",
        sentence="positions look {number}-dimensional from nearby",
        of="dimension",
        place="site",
    ),
)
# In the order of docs/signals.md.
RIVAL_SIGNALS: Mapping[str, Signal] = MappingProxyType({signal.name: signal for signal in _ALL})
