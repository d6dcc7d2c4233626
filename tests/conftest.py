"""Fixtures for all tests: tiny models, the demo model, and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from tiny import tiny_model

import mspgt_lens
from mspgt_lens.loading import INSTALL, PACKAGE


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads that wait for one another on a busy machine cost ten times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(architecture, **sizes)``: as ``tiny_model``, but built once and shared.

    For reading only: a test that changes a model builds its own.
    """
    models: dict[Any, Any] = {}

    def shared(architecture: str, **sizes: int) -> Any:
        key = architecture, tuple(sorted(sizes.items()))
        if key not in models:
            models[key] = tiny_model(architecture, **sizes)
        return models[key]

    return shared


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """SmolLM2-135M, or a visible skip where its package is not installed."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the demo model's package is missing: {INSTALL}")
    return mspgt_lens.load_demo_model()
