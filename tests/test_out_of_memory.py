"""Where memory runs out, batches are halved, and nothing is added twice or by half."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from profiles import LENGTH, RAGGED, SMALL, TOKENS, hooks_on, prompts_of, run
from tiny import tiny_model

import mspgt_lens as ml
from mspgt_lens.gathering import plan_batches
from mspgt_lens.models import ran_out_of_memory
from mspgt_lens.processes import PeerError
from mspgt_lens.signals import SIGNALS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]
MESSAGES = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.94 GB)"),
    MemoryError("Unable to allocate 3.00 GiB"),
)


BLOCKS = {"first": (0,), "second": (1,)}


@contextmanager
def small_device(
    model: Any, most: int, error: Exception = MESSAGES[0], n_lucky: int = 0
) -> Iterator[list[int]]:
    """A model whose last block has no memory for more tokens; the numbers of prompts tried.

    The first ``n_lucky`` times, there is.
    """
    tried: list[int] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0] if args else kwargs["hidden_states"]
        tried.append(len(rows))
        is_large = rows.shape[0] * rows.shape[1] > most
        if is_large and sum(size * rows.shape[1] > most for size in tried) > n_lucky:
            raise type(error)(*error.args)

    handle = model.blocks[-1].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


def profiled(model: Any, rows: Any = None, **settings: Any) -> Any:
    return run(
        model, None if rows is None else prompts_of(rows), signals=[*SIGNALS, LENGTH], **settings
    )


@pytest.mark.parametrize("max_width", [1024, 8])
@pytest.mark.parametrize("error", MESSAGES, ids=lambda error: type(error).__name__)
def test_batches_are_halved_until_they_fit(
    error: Exception, max_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mspgt_lens.profile.run.MAX_WIDTH", max_width)
    # What the axes of wide residuals come from is one batch, whatever the others are.
    monkeypatch.setattr("mspgt_lens.profile.run.CALIBRATION_TOKENS", 48)
    model = tiny_model("llama", **SMALL)
    expected = profiled(model, batch_size=2)
    before = hooks_on(model)
    with small_device(model, 3 * 24, error) as tried, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = profiled(model)
    assert hooks_on(model) == before
    # Eight prompts in each fold: 8, 4, and 2 from there on.
    assert [size for size in tried if size > 1][-14:] == [8, 4, *[2] * 12]
    assert found == expected
    ours = [str(warning.message) for warning in told if "memory" in str(warning.message)]
    assert len(ours) == 1
    assert "memory ran out in a batch of 8 prompts" in ours[0]


def test_prompts_of_many_lengths_come_to_the_same() -> None:
    model = tiny_model("llama", **SMALL)
    expected = profiled(model, RAGGED)
    with small_device(model, 3 * 24), pytest.warns(UserWarning, match="memory ran out"):
        found = profiled(model, RAGGED)
    for (name, scale, one), (_, _, other) in zip(expected.curves(), found.curves(), strict=True):
        assert abs(one.values - other.values).max() < 1e-4 * (1 + abs(one.values).max()), (
            name,
            scale,
        )
    assert found.n_tokens == expected.n_tokens
    assert found.settings == expected.settings


@pytest.mark.parametrize(
    ("most", "batch_size", "said"),
    [(23, None, "one prompt of 24 tokens"), (72, 5, "batch_size=5"), (23, 1, "one prompt of 24")],
)
def test_what_cannot_be_halved_is_an_error_that_says_what_to_do(
    most: int, batch_size: int | None, said: str
) -> None:
    model = tiny_model("llama", **SMALL)
    before = hooks_on(model)

    def fail() -> None:
        with small_device(model, most), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            profiled(model, batch_size=batch_size)

    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory") as raised:
        fail()
    assert said in str(raised.value)
    assert hooks_on(model) == before


def test_other_errors_are_no_lack_of_memory() -> None:
    assert all(ran_out_of_memory(error) for error in MESSAGES)
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out_of_memory(ValueError("out of memory"))
    assert not ran_out_of_memory(PeerError("process 1 of 2 stopped: CUDA out of memory"))
    model = tiny_model("llama", **SMALL)
    with (
        small_device(model, 3 * 24, RuntimeError("a kernel failed")) as tried,
        pytest.raises(RuntimeError, match="a kernel failed"),
    ):
        profiled(model)
    assert tried.count(8) == 1


def test_parts_of_a_batch_are_the_batches_of_a_smaller_size() -> None:
    rows = [(prompt, 0) for prompt in prompts_of(RAGGED)]
    (whole,) = plan_batches(rows, None, 10_000)
    assert whole.parts(24 * 5) == list(plan_batches(rows, 5, 0))
    assert [len(part.prompts) for part in whole.parts(1)] == [1] * len(rows)


@cache
def spoken() -> Any:
    """What the model of these tests writes itself: perturbed, it predicts it worse."""
    model, tokens = tiny_model("llama", **SMALL), TOKENS[:, :3]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(21):
            shares = model(tokens, return_type="logits")[:, -1].mul(1.5).softmax(-1)
            shares[:, :4] = 0
            tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], dim=1)
    return prompts_of(tokens)


def perturbed(model: Any, prompts: Any, **settings: Any) -> Any:
    kinds = [ml.Perturbation("noise"), ml.Perturbation("skip")]
    return ml.perturb_scales(
        model, prompts, BLOCKS, perturbations=kinds, n_controls=1, progress=False, **settings
    )


def brittle(model: Any, prompts: Any, **settings: Any) -> Any:
    return ml.measure_brittleness(
        model, prompts, BLOCKS, levels=[0.1, 0.2], progress=False, **settings
    )


def skipped(model: Any, prompts: Any, **settings: Any) -> Any:
    return ml.studies.block_effects(model, prompts, progress=False, **settings)


def ablated(model: Any, prompts: Any, **settings: Any) -> Any:
    def write(activation: Any, hook: Any) -> Any:
        activation = activation.clone()
        activation[:, 0, :3] += 300.0
        return activation

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", write)]):
        return ml.studies.ablate_massive(model, prompts, progress=False, **settings)


def dissociated(model: Any, prompts: Any, **settings: Any) -> Any:
    bands = {"near": (1, 1), "far": (2, 4)}
    classes = ml.classify_tokens(
        tiny_model("llama", **SMALL), prompts, bands=bands, threshold=0.01, progress=False
    )
    noise = ml.Perturbation("noise", 2.0)
    return ml.measure_dissociation(
        model, prompts, BLOCKS, classes, perturbation=noise, progress=False, **settings
    )


OF_BATCHES = (ml.residual_statistics, perturbed, brittle, skipped, ablated, dissociated)


# Without luck the first run of a batch fails; with it, one in the midst of the batch's runs.
@pytest.mark.parametrize(
    ("measure", "n_lucky"),
    [(one, 0) for one in OF_BATCHES]
    + [(perturbed, 4), (brittle, 4), (skipped, 12), (ablated, 2), (dissociated, 3)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_effects_are_those_of_a_smaller_batch_size(measure: Any, n_lucky: int) -> None:
    model, prompts = tiny_model("llama", **SMALL), spoken()
    if measure in (perturbed, brittle, dissociated):
        statistics = ml.residual_statistics(model, prompts)
        measure = partial(measure, statistics=statistics)
    expected = measure(model, prompts, batch_size=6)
    before = hooks_on(model)
    with (
        small_device(model, 6 * 24, n_lucky=n_lucky) as tried,
        pytest.warns(UserWarning, match="memory ran out in a batch of 24 prompts"),
    ):
        found = measure(model, prompts)
    assert hooks_on(model) == before
    assert {24, 12, 6} <= set(tried)
    assert found == expected


@pytest.mark.parametrize("measure", OF_BATCHES, ids=lambda measure: measure.__name__)
def test_effects_that_cannot_be_halved_say_what_to_do(measure: Any) -> None:
    model, prompts = tiny_model("llama", **SMALL), spoken()
    # How blocks are called is learned from five prompts at once.
    least = 5 * 25 - 1 if measure is skipped else 23
    for most, batch_size, said in ((150, 7, "batch_size=7"), (least, 1, "even one by one")):
        with (
            small_device(model, most),
            pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory") as raised,
        ):
            measure(model, prompts, batch_size=batch_size)
        assert said in str(raised.value)


def test_effects_of_prompts_of_many_lengths_come_to_the_same() -> None:
    model, prompts = tiny_model("llama", **SMALL), prompts_of(RAGGED)
    expected = skipped(model, prompts)
    with small_device(model, 6 * 24), pytest.warns(UserWarning, match="memory ran out"):
        found = skipped(model, prompts)
    np.testing.assert_allclose(found.skip, expected.skip, atol=1e-5)
    np.testing.assert_allclose(found.swap, expected.swap, atol=1e-5)
