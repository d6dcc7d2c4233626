"""Reading a model's weights: unembedding rows of some tokens, and what tells two models apart."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.models.adapter import ModelAdapter, answer_in_float32
from mspgt_lens.models.weights import packed_weights, unpacked
from mspgt_lens.storage import package_versions

_LOGITS_PER_CHUNK = 50_000_000
_VALUES_PER_PARAMETER = 64


def unembedding_rows(
    adapter: ModelAdapter, tokens: Int[Tensor, " token"]
) -> Float[Tensor, "token d_model"]:
    """How each token's logit depends on the normalized final residual, on the CPU.

    The final norm's learned scale is included. Read off the unembedding's outputs, since every
    model class stores it in its own way.
    """
    device = adapter.unembedding_device
    size = max(1, _LOGITS_PER_CHUNK // adapter.d_vocab)
    chosen = tokens.to(device)

    def logits(vectors: Tensor) -> Tensor:
        # A position axis of its own: unembedding modules expect [prompt, pos, d_model].
        rows = vectors.to(device)[None]
        return answer_in_float32(adapter.model.unembed, rows, adapter.dtype)[0][:, chosen]

    with adapter.inference():
        nothing = logits(torch.zeros(1, adapter.d_model))
        axes = torch.eye(adapter.d_model)
        rows = torch.cat([logits(part) - nothing for part in torch.split(axes, size)]).T
        return (rows * adapter._scale).cpu()


def provenance(adapter: ModelAdapter) -> dict[str, str]:
    """Which model it is, where it runs, and the versions of the packages that run it."""
    return {
        "model": adapter.name,
        "weights": weight_digest(adapter),
        "device": adapter.device.type,
        **{f"version of {name}": version for name, version in package_versions().items()},
    }


def weight_digest(adapter: ModelAdapter) -> str:
    """A short text that differs between models whose weights differ.

    A hash of up to 64 values of every parameter, evenly spread: training moves nearly all of them.
    Of quantized weights, of what they are packed in.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{adapter.name}, {adapter.weight_processing}".encode())
    weights = dict(adapter.model.named_parameters()) | dict(packed_weights(adapter.model))
    for name, parameter in weights.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        known = unpacked(parameter.detach())
        values = (parameter.detach() if known is None else known).flatten()
        step = max(1, len(values) // _VALUES_PER_PARAMETER)
        some = values[::step]
        # Words that hold several weights have more digits than float32.
        told = some.float() if some.is_floating_point() else some.long()
        digest.update(told.cpu().numpy().tobytes())
    return digest.hexdigest()
