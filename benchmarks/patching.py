"""Speed of ``patch_layers`` against ``transformer_lens.patching``, with the numbers compared.

    python -m benchmarks.patching

One run on the demo model: 8 pairs of 15 tokens, the residual before every block at every position,
both under ``no_grad`` with as many threads. Twice: with prompts that differ from the first token
on, where every cell has to be computed, and with prompts that differ in the middle, as in most
tasks, where a pair's earlier positions cannot change anything and are skipped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from transformer_lens import patching

import mspgt_lens as ml
from benchmarks.table import Comparison

# What either prompt says after its first word does not tell the other's first word.
BEGINNINGS = (
    ("Paris", "Rome"),
    ("London", "Boston"),
    ("Monday", "Friday"),
    ("March", "June"),
    ("Mary", "John"),
    ("Tom", "James"),
    ("Water", "Fire"),
    ("Dogs", "Cats"),
)
NAMES = ("Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "David")
N_TOKENS = 15


def first_token_pairs(model: Any) -> ml.PromptPairs:
    """Pairs that differ in their first token; every cell has to be computed."""
    rest = " is what everybody here was talking about all day long, so then we"
    return _pairs(model, [(a + rest, b + rest, f" {a}", f" {b}") for a, b in BEGINNINGS])


def middle_pairs(model: Any) -> ml.PromptPairs:
    """Indirect objects: the second mention of a name decides who is given something."""
    texts = []
    for a, b in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True):
        start = f"Then {a} and {b} went to the old book shop."
        texts.append((f"{start} {b} gave it to", f"{start} {a} gave it to", f" {a}", f" {b}"))
    return _pairs(model, texts)


def _pairs(model: Any, texts: list[tuple[str, str, str, str]]) -> ml.PromptPairs:
    clean, corrupted, answer, foil = (list(column) for column in zip(*texts, strict=True))
    encode = model.tokenizer
    rows = [
        [encode(t, add_special_tokens=False)["input_ids"] for t in x] for x in (clean, corrupted)
    ]
    lengths = {len(row) for part in rows for row in part}
    if lengths != {N_TOKENS}:
        raise SystemExit(f"prompts must have {N_TOKENS} tokens, got {sorted(lengths)}")
    ends = [
        [encode(t, add_special_tokens=False)["input_ids"][0] for t in x] for x in (answer, foil)
    ]
    return ml.PromptPairs.from_tokens(*rows, *ends)


def reference(model: Any, pairs: ml.PromptPairs) -> tuple[torch.Tensor, float]:
    """TransformerLens's own sweep, and its seconds."""
    answer, foil = pairs.answer[:, None], pairs.foil[:, None]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        return (last.gather(1, answer) - last.gather(1, foil)).mean()

    with torch.no_grad():
        start = time.perf_counter()
        _, cache = model.run_with_cache(pairs.clean)
        sweep = patching.get_act_patch_resid_pre(model, pairs.corrupted, cache, metric)
        return sweep, time.perf_counter() - start


CASES = {"from the first token": first_token_pairs, "from the middle": middle_pairs}


def compare() -> Iterator[Comparison]:
    """Seconds of the sweeps, the better of two rounds."""
    model = ml.load_demo_model()
    for name, make in CASES.items():
        pairs = make(model)
        _, ours = own_sweep(model, pairs, 2, None)
        _, slow = reference(model, pairs)
        what = f"patch_layers, prompts that differ {name}"
        yield Comparison(what, ours, "transformer_lens.patching", slow, "s", "below 1")


def own_sweep(
    model: Any, pairs: ml.PromptPairs, n_rounds: int, batch_size: int | None
) -> tuple[ml.results.PatchSweep, float]:
    """The sweep, and the seconds of the best round."""
    seconds = []
    for _ in range(n_rounds):
        start = time.perf_counter()
        sweep = ml.patch_layers(model, pairs, batch_size=batch_size, progress=False)
        seconds.append(time.perf_counter() - start)
    return sweep, min(seconds)


def print_case(name: str, model: Any, pairs: ml.PromptPairs, options: argparse.Namespace) -> None:
    """Print seconds, ratio and largest difference."""
    sweep, ours = own_sweep(model, pairs, options.rounds, options.batch_size)
    line = f"{name}: patch_layers {ours:.2f} s"
    if not options.ours:
        expected, slow = reference(model, pairs)
        largest = float((torch.tensor(sweep.metric) - expected.double()).abs().max())
        line += (
            f", transformer_lens.patching {slow:.2f} s: {slow / ours:.2f}x; largest "
            f"difference {largest:.1e} of values from {expected.min():.2f} to {expected.max():.2f}"
        )
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=2, help="runs of patch_layers; the best counts"
    )
    parser.add_argument("--batch-size", type=int, help="rows in one call of a block")
    parser.add_argument("--ours", action="store_true", help="leave out the reference")
    options = parser.parse_args()
    model = ml.load_demo_model()
    versions = (f"{name} {metadata.version(name)}" for name in ("transformer-lens", "torch"))
    print(f"{type(model).__name__}, {', '.join(versions)}, {torch.get_num_threads()} threads")
    for name, make in CASES.items():
        print_case(name, model, make(model), options)


if __name__ == "__main__":
    main()
