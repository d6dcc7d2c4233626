"""What gathering may cost, and what it finds."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mspgt_lens.gathering import make_batches
from mspgt_lens.moments import (
    PROJECTED_WIDTH,
    SAMPLE_CAPACITY,
    MomentPlan,
    Moments,
    Sample,
    merge_samples,
)
from mspgt_lens.profile.passing import TOKENS_PER_BATCH
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.prompts import Prompt
from mspgt_lens.targets import DEFAULT_BANDS, batch_targets


def test_a_model_of_7b_parameters_stays_under_six_gigabytes():
    """33 sites of width 4,096: the sums, the sample, and one batch's rows."""
    d_model, n_layers = 4096, 32
    plan = MomentPlan(
        bands=DEFAULT_BANDS,
        n_folds=5,
        skip_first=4,
        seed=0,
        width=PROJECTED_WIDTH,
        coordinates="standardized",
        features=torch.zeros(1, 32),
    )
    adapter = SimpleNamespace(
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=128_256,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    moments = Moments(plan, adapter)
    sums = sum(value.nbytes for value in moments.sums().values())
    sample = SAMPLE_CAPACITY * (n_layers + 1) * d_model * 4
    rows = TOKENS_PER_BATCH["cpu"] * ((n_layers + 1) * PROJECTED_WIDTH + 2 * d_model) * 4
    assert sums + sample + rows < 6e9


@pytest.mark.parametrize("length", [20, 40, 64])
@pytest.mark.parametrize("bands", [DEFAULT_BANDS, {"a": (1, 1), "b": (2, 4)}, {"c": (5, 5)}])
def test_positions_are_counted_before_the_pass_as_the_pass_finds_them(length, bands):
    tokens = torch.arange(length)[None]
    targets = batch_targets(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        features=torch.zeros(length, 1),
        special=torch.zeros(0, dtype=torch.long),
        bands=bands,
        skip_first=4,
    )
    moments = SimpleNamespace(plan=SimpleNamespace(masked=False))
    settings = SimpleNamespace(bands=bands, skip_first=4, n_folds=1)
    run = SimpleNamespace(settings=settings, folds={0: 0}, moments=moments)
    n_read, n_valid = ProfileRun._most_positions(run, [Prompt(tokens[0].numpy(), 0)])
    assert (n_read.tolist(), n_valid) == ([int(targets.read.sum())], int(targets.valid.sum()))


def test_samples_merged_in_place_are_those_merged_apart():
    def sample(seed, n):
        rng = np.random.default_rng(seed)
        rows = torch.from_numpy(rng.standard_normal((n, 2, 3)))
        priority = np.sort(rng.integers(2**64, size=n, dtype=np.uint64))
        token, fold, group = np.arange(3 * n).reshape(3, n)
        single, targets = token.reshape(n, 1, 1), rng.standard_normal((n, 4), dtype=np.float32)
        group = group.astype(np.uint64)
        return Sample(priority, tuple(rows), token, single, token > n // 2, targets, fold, group)

    first, others = sample(0, 700), [sample(seed, 600) for seed in (1, 2, 3)]
    apart = together = first
    for other in others:
        apart = merge_samples(apart, other)
        before = {row.data_ptr() for row in together.rows}
        together = merge_samples(together, other, in_place=True)
    assert len(apart.priority) == SAMPLE_CAPACITY
    np.testing.assert_array_equal(together.priority, apart.priority)
    for name in ("next_token", "single", "read", "targets", "fold", "group"):
        np.testing.assert_array_equal(getattr(together, name), getattr(apart, name))
    torch.testing.assert_close(together.rows, apart.rows, rtol=0, atol=0)
    # Once full, no memory is added.
    assert {row.data_ptr() for row in together.rows} == before


_FAULTS = """
import contextlib, resource, sys
import torch
from mspgt_lens.profile.memory import kept_memory

def work():
    for _ in range(20):
        blocks = [torch.ones(5_000_000) for _ in range(5)]
        del blocks

with kept_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, after.ru_maxrss // 1024)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts what glibc's heap takes anew")
def test_memory_that_is_freed_is_used_again_and_none_is_taken_in_advance():
    def run(how: str) -> tuple[int, int]:
        command = [sys.executable, "-c", _FAULTS, how]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        faults, peak = map(int, out.split())
        return faults, peak

    pages = 5 * 4 * 5_000_000 // mmap.PAGESIZE
    (faults, peak), (_, bare_peak) = run("kept"), run("bare")
    assert faults < 1.5 * pages  # Each page once; far more often if freed memory went back.
    assert peak < bare_peak + 64


def test_batches_shrink_where_the_context_makes_attention_patterns_large():
    """A context of 2,048 tokens: 64 heads have a gigabyte of patterns to one prompt."""
    prompts = [(Prompt(np.zeros(2048, dtype=np.int64), i), 0) for i in range(8)]
    sizes = {
        n_heads: [len(batch.tokens) for batch in make_batches(prompts, None, 8192, 0, n_heads)]
        for n_heads in (0, 16, 32, 64, 128)
    }
    assert sizes == {0: [4, 4], 16: [4, 4], 32: [2] * 4, 64: [1] * 8, 128: [1] * 8}
    # What is asked for is done.
    assert len(next(make_batches(prompts, 8, 8192, 0, 128)).tokens) == 8
