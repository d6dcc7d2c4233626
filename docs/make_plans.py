"""Write what profiles of models of all sizes take into docs/memory.md.

    python docs/make_plans.py

The table is what ``ml.studies.plan_profile`` says; the test of the page fails until this was run
after its formulas have changed. Sizes are those that the models' authors published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

import mspgt_lens as ml
from mspgt_lens.profile.planning import shown_bytes

PAGE = Path(__file__).parent / "memory.md"
BEGIN, END = "<!-- below: python docs/make_plans.py -->\n", "<!-- above: docs/make_plans.py -->\n"
LENGTH = 512
FEW, MANY = 1_000, 1_000_000


def _llama(width: int, mlp: int, depth: int, heads: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=131_072,
        architectures=["LlamaForCausalLM"],
        **{"num_key_value_heads": 8, "vocab_size": 128_256, **more},
    )


# Name, configuration, kind of device, how many, and precision.
MODELS: list[tuple[str, PretrainedConfig, str, int, str]] = [
    (
        "SmolLM2-135M (demo)",
        _llama(
            576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True
        ),
        "cpu",
        1,
        "float32",
    ),
    (
        "Llama 3.2 1B",
        _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
        "cuda",
        1,
        "bfloat16",
    ),
    ("Llama 3.1 8B", _llama(4096, 14_336, 32, 32), "cuda", 1, "bfloat16"),
    (
        "Qwen2.5 32B",
        Qwen2Config(
            hidden_size=5120,
            intermediate_size=27_648,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            vocab_size=152_064,
            max_position_embeddings=32_768,
            architectures=["Qwen2ForCausalLM"],
        ),
        "cuda",
        2,
        "bfloat16",
    ),
    ("Llama 3.1 70B", _llama(8192, 28_672, 80, 64), "cuda", 4, "bfloat16"),
]


def table() -> str:
    """The table, as it has to be."""
    lines = [
        f"| model | devices | most on one | machine | operations, {FEW:,} prompts | "
        f"{MANY:,} prompts | checkpoint | saved profile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, config, device, n_devices, dtype in MODELS:
        few, many = (
            ml.studies.plan_profile(
                config, n_prompts, LENGTH, n_devices=n_devices, device=device, dtype=dtype
            )
            for n_prompts in (FEW, MANY)
        )
        host = many.peaks["cpu"]
        most = max((n for where, n in many.peaks.items() if where != "cpu"), default=None)
        placed = f"{n_devices} {device.upper()}, {dtype}"
        on_one = "" if most is None else shown_bytes(most)
        counts = (f"{sum(plan.operations.values()):.1e}" for plan in (few, many))
        files = (shown_bytes(n_bytes) for n_bytes in many.disk.values())
        cells = [name, placed, on_one, shown_bytes(host), *counts, *files]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def page() -> str:
    """The whole page, as it has to be."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
