"""Many architectures of TransformerLens's list: exact against a plain copy, or refused."""

from __future__ import annotations

import pytest
from checks import row
from kinds import KINDS, Kind
from table import listed

# The same functions for every architecture: one check of their shapes elsewhere is enough.
pytestmark = pytest.mark.simulation


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_it_is_exact_or_refused_as_the_documentation_says(kind: Kind) -> None:
    assert row(kind) == listed()[kind.name, kind.traits]


def test_the_table_has_every_architecture_that_is_tried_and_no_other() -> None:
    assert sorted(listed()) == sorted((kind.name, kind.traits) for kind in KINDS)
