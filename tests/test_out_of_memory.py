"""Where memory runs out, batches are halved, and nothing is added twice or by half."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from profiles import LENGTH, RAGGED, SMALL, hooks_on, prompts_of, run
from tiny import tiny_model

from mspgt_lens.gathering import plan_batches
from mspgt_lens.models import ran_out_of_memory
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


@contextmanager
def small_device(model: Any, most: int, error: Exception = MESSAGES[0]) -> Iterator[list[int]]:
    """A model whose last block has no memory for more tokens; the numbers of prompts tried."""
    tried: list[int] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0] if args else kwargs["hidden_states"]
        tried.append(len(rows))
        if rows.shape[0] * rows.shape[1] > most:
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
