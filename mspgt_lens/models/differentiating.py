"""Differentiating what a model predicts by its activations, and never by its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mspgt_lens.models.adapter import ModelAdapter


@contextmanager
def differentiable(adapter: ModelAdapter, what: str) -> Iterator[None]:
    """Gradients on, and none for weights, whose own inputs then need not be kept.

    Which weights require gradients is restored on leaving, however it ends.

    Args:
        adapter: The model.
        what: What needs gradients, such as ``"rate_distortion"``.

    Raises:
        CannotMeasure: If torch cannot differentiate through the weights.
    """
    adapter.require_ordinary_weights(what)
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
