"""Many architectures of TransformerLens's list: exact against a plain copy, or refused."""

from __future__ import annotations

import pytest
from checks import check_own_attention, check_pattern_blocks, row
from kinds import KINDS, Kind, built
from table import listed

from mspgt_lens.models import as_adapter

# The same functions for every architecture: one check of their shapes elsewhere is enough.
pytestmark = pytest.mark.simulation


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_it_is_exact_or_refused_as_the_documentation_says(kind: Kind) -> None:
    assert row(kind) == listed()[kind.name, kind.traits]


def test_the_table_has_every_architecture_that_is_tried_and_no_other() -> None:
    assert sorted(listed()) == sorted((kind.name, kind.traits) for kind in KINDS)


# Those whose attention is not PyTorch's, or not the same: soft caps, sinks, older classes.
LEFT = {
    "BloomForCausalLM",
    "CodeGenForCausalLM",
    "FalconForCausalLM, sequential, ALiBi",
    "Gemma2ForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "GptOssForCausalLM",
    "MptForCausalLM",
    "VaultGemmaForCausalLM",
    "XGLMForCausalLM",
}


# Those that do not form patterns by the function that transformers gives to its modules.
WHOLE = LEFT - {"Gemma2ForCausalLM", "GptOssForCausalLM", "VaultGemmaForCausalLM"} | {
    "FalconForCausalLM, parallel, one key"
}


def test_attention_without_patterns_or_in_blocks_gives_the_same_or_is_left_as_it_is() -> None:
    left, whole = set(), set()
    for kind in KINDS:
        _, bridge = built(kind)
        try:
            adapter = as_adapter(bridge)
        except TypeError:
            continue
        names = {kind.name, f"{kind.name}, {kind.traits}"}
        if not check_own_attention(adapter):
            left |= LEFT & names or names
        if not check_pattern_blocks(adapter):
            whole |= WHOLE & names or names
    assert left == LEFT
    assert whole == WHOLE
