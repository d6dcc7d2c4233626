"""Fixtures for all tests: tiny models and the demo model; shapes are checked, threads are few."""

from __future__ import annotations

import os

# Tests run side by side, and threads that wait for one another cost more than they save on tiny
# tensors. Read when numpy and torch start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
from jaxtyping import config, install_import_hook

# Shapes and dtypes that signatures promise are checked whenever a test calls them.
with install_import_hook("mspgt_lens", "shapes.check_shapes"):
    import mspgt_lens
    from mspgt_lens.models.loading import INSTALL, PACKAGE

from profiles import model, profile, ragged, told  # noqa: F401 - fixtures of several modules
from tiny import tiny_model


@pytest.fixture(autouse=True)
def _shapes_are_checked(request: pytest.FixtureRequest) -> None:
    """Except in simulations: they call the same functions thousands of times."""
    config.update("jaxtyping_disable", request.node.get_closest_marker("simulation") is not None)


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
