"""Where memory runs out, batches are halved, and nothing is added twice or by half."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from profiles import BANDS, LENGTH, RAGGED, SMALL, TOKENS, hooks_on, prompts_of, run
from tiny import random_tokens, tiny_model, tiny_tokenizer
from tqdm import tqdm

import mspgt_lens as ml
from mspgt_lens.gathering import plan_batches
from mspgt_lens.halving import Halving, Span
from mspgt_lens.hvib import activations as activations_module
from mspgt_lens.models import ModelAdapter, as_adapter, ran_out_of_memory
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
    [
        (23, None, "a batch of one with 24 tokens"),
        (72, 5, "batch_size=5"),
        (23, 1, "shorter prompts, signals= without those of attention"),
    ],
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
    for most, batch_size, said in ((150, 7, "batch_size=7"), (least, 1, "a batch of one with")):
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


MODULES = ("responding", "massive", "skipping", "dissociation")


@pytest.mark.parametrize(
    ("measure", "n_lucky"),
    [(perturbed, 4), (brittle, 4), (skipped, 12), (ablated, 2), (dissociated, 3)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_progress_is_taken_back_with_the_batch_that_comes_again(
    measure: Any, n_lucky: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        farthest = 0.0

        def __init__(self, *args: Any, **options: Any) -> None:
            # A bar that is not shown does not count.
            super().__init__(*args, **{**options, "disable": False, "file": StringIO()})
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            self.farthest = max(self.farthest, self.n)
            return shown

    for module in MODULES:
        monkeypatch.setattr(f"mspgt_lens.perturbation.{module}.tqdm", Bar)
    model, prompts = tiny_model("llama", **SMALL), spoken()
    with (
        small_device(model, 6 * 24, n_lucky=n_lucky),
        pytest.warns(UserWarning, match="memory ran out in a batch of 24 prompts"),
    ):
        measure(model, prompts)
    assert bars
    for bar in bars:
        assert bar.n == bar.farthest == bar.total


def test_a_bar_goes_back_by_what_a_batch_had_done() -> None:
    seen, places = [], []
    with tqdm(total=8, file=StringIO()) as bar:

        def run(span: Span) -> Span:
            for _ in range(2):
                seen.append(span)
                places.append(int(bar.n))
                if span.n_rows > 1 and len(seen) != 1:
                    raise MemoryError
                bar.update(span.n_rows)
            return span

        with pytest.warns(UserWarning, match="memory ran out in a batch of 4 things"):
            found = list(Halving(rows="things", bar=bar).each(Span(0, 4, 3), run))
        assert found == [Span(i, i + 1, 3) for i in range(4)]
        assert bar.n == 8
    assert places == [0, 4, 0, *range(8)]


def classified(model: Any, prompts: Any) -> Any:
    bands = {"near": (1, 1), "middle": (2, 11), "far": (12, 12)}
    return ml.classify_tokens(model, prompts, bands=bands, threshold=0.01, progress=False)


@pytest.mark.parametrize("n_lucky", [0, 1])
def test_classes_of_tokens_are_the_same_in_halved_batches(n_lucky: int) -> None:
    model, prompts = tiny_model("llama", **SMALL), spoken()
    expected = classified(model, prompts)
    before = hooks_on(model)
    with (
        small_device(model, 60 * 12, n_lucky=n_lucky) as tried,
        pytest.warns(UserWarning, match="memory ran out in a batch of 192 windows"),
    ):
        found = classified(model, prompts)
    assert hooks_on(model) == before
    assert {192, 96, 48} <= set(tried)
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-5)
    np.testing.assert_array_equal(found.classes, expected.classes)
    bands = {"near": (1, 18), "far": (19, 19)}
    with (
        small_device(model, 18),
        pytest.warns(UserWarning, match="memory ran out"),
        pytest.raises(torch.cuda.OutOfMemoryError, match=r"one with 19 tokens .* smaller offsets"),
    ):
        ml.classify_tokens(model, prompts, bands=bands, progress=False)


def collected(model: Any, folder: Path) -> Any:
    prompts = list(prompts_of(TOKENS, groups=[i // 2 for i in range(len(TOKENS))]))
    folder.mkdir()
    plan = activations_module.CollectionPlan((0, 1, 2), BANDS, 4, 200, seed=0)
    return activations_module.collect_activations(
        as_adapter(model), prompts, plan, folder, progress=False
    )


@pytest.mark.parametrize(("n_lucky", "tokens_per_batch"), [(0, 2048), (0, 240), (1, 240)])
def test_activations_are_the_same_in_halved_batches(
    n_lucky: int, tokens_per_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also their centers, which the first batch decides as a whole."""
    monkeypatch.setattr(activations_module, "_TOKENS_PER_BATCH", tokens_per_batch)
    model = tiny_model("llama", **SMALL)
    expected = collected(model, tmp_path / "whole")
    with (
        small_device(model, 6 * 24, n_lucky=n_lucky) as tried,
        pytest.warns(UserWarning, match=r"memory ran out in a batch of .* prompts"),
    ):
        found = collected(model, tmp_path / "halved")
    # One more, with others, is the short run that proves the model's own attention.
    assert len(set(tried)) >= 3
    np.testing.assert_allclose(
        np.asarray(found.rows, np.float32), np.asarray(expected.rows, np.float32), atol=4e-3
    )
    for name, values in expected.targets.items():
        np.testing.assert_allclose(found.targets[name], values, atol=1e-5)
    np.testing.assert_array_equal(found.next_token, expected.next_token)
    np.testing.assert_array_equal(found.group, expected.group)


@cache
def fitted(architecture: str) -> Any:
    model = tiny_model(architecture, n_layers=2)
    model.tokenizer = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, ml.fit_lens(model, random_prompts(), n_folds=3, progress=False)


def random_prompts() -> Any:
    return prompts_of(random_tokens(36, 60))


def assert_same_reading(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.top, expected.top)
    np.testing.assert_array_equal(found.rank, expected.rank)
    np.testing.assert_allclose(found.entropy, expected.entropy, atol=1e-5)
    assert found.tokens == expected.tokens


def test_an_encoders_text_is_read_in_halved_batches() -> None:
    model, lens = fitted("bert")
    ids = [1, *random_tokens(1, 20, seed=3)[0].tolist(), 2]
    expected = lens.read(ids)
    with (
        small_device(model, 7 * 22) as tried,
        pytest.warns(UserWarning, match="memory ran out in a batch of 20 copies of the text"),
    ):
        found = lens.read(ids)
    assert tried[-6:] == [20, 10, 5, 5, 5, 5]
    assert_same_reading(found, expected)


def test_a_text_is_decoded_in_halved_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lens = fitted("llama")
    ids = random_tokens(1, 20, seed=3)[0].tolist()
    expected = lens.read(ids)
    decode, tried = ModelAdapter.decode, []

    def small(adapter: Any, rows: Any) -> Any:
        tried.append(len(rows))
        if len(rows) > 7:
            raise MemoryError
        return decode(adapter, rows)

    monkeypatch.setattr(ModelAdapter, "decode", small)
    with pytest.warns(UserWarning, match="memory ran out in a batch of 20 positions"):
        found = lens.read(ids)
    assert tried == [20, 10, *[5] * 4 * 3]
    assert_same_reading(found, expected)
    with (
        small_device(model, 19),
        pytest.raises(torch.cuda.OutOfMemoryError, match=r"one with 20 tokens .* a shorter text"),
    ):
        lens.read(ids)
