"""Plans say what runs take: sizes, sums and files to the byte, memory as it is measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from profiles import TOKENS, prompts_of
from tiny import (
    ARCHITECTURES,
    ENCODERS,
    MORE,
    N_HEADS,
    random_model,
    random_tokens,
    tiny_config,
    tiny_model,
)

import mspgt_lens as ml
from mspgt_lens.cli.command import main
from mspgt_lens.gathering import plan_batches
from mspgt_lens.models import as_adapter, bridge_from_huggingface
from mspgt_lens.models.sizing import model_size
from mspgt_lens.moments import Moments, plan_moments
from mspgt_lens.profile import checkpoint as checkpoint_module
from mspgt_lens.prompts import Prompt
from mspgt_lens.targets import DEFAULT_BANDS

plan_profile = ml.studies.plan_profile


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE, *ENCODERS])
def test_sizes_from_the_configuration_are_those_of_the_model(architecture: str) -> None:
    config = tiny_config(architecture)
    loaded = random_model(config)
    size = model_size(config)
    weights = dict(loaded.named_parameters())
    in_blocks = [p for name, p in weights.items() if any(map(str.isdigit, name.split(".")))]
    assert size.n_parameters == sum(p.numel() for p in weights.values())
    assert size.n_blocks == sum(p.numel() for p in in_blocks)
    assert (size.n_layers, size.d_model, size.d_vocab, size.n_heads) == (4, 32, 101, N_HEADS)
    if architecture not in ENCODERS:
        assert size.n_parameters == as_adapter(tiny_model(architecture)).n_parameters


def test_a_token_meets_some_experts_only() -> None:
    config = tiny_config("mixtral")
    config.num_local_experts, config.num_experts_per_tok = 8, 2
    size = model_size(config)
    # Three matrices in each of eight experts of four blocks.
    experts = 4 * 8 * 3 * config.hidden_size * config.intermediate_size
    assert size.n_active == size.n_blocks - experts * 6 // 8


def with_width(d_model: int, n_layers: int = 2) -> Any:
    config = tiny_config("llama", d_model=d_model, n_layers=n_layers)
    return config, bridge_from_huggingface(random_model(config), None, "wide")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("d_model", [32, 1040])
def test_sums_take_what_is_planned(d_model: int, dtype: str) -> None:
    config, model = with_width(d_model)
    adapter = as_adapter(model.to(getattr(torch, dtype)))
    plan = plan_moments(
        adapter,
        np.bincount(TOKENS.flatten(), minlength=101),
        bands=DEFAULT_BANDS,
        n_folds=5,
        skip_first=4,
        seed=0,
    )
    sums = Moments(plan, adapter).sums().values()
    taken = sum(value.nbytes for value in sums if isinstance(value, torch.Tensor))
    planned = plan_profile(config, 60, 96, device="cpu", dtype=dtype)
    terms = {term.term: term.n_bytes for term in planned.memory}
    # No token that was seen is left out of the features only where there are enough.
    assert plan.features.shape[1] == 32
    assert terms["sums of all folds"] == taken
    weights = sum(parameter.nbytes for parameter in random_model(config).parameters())
    assert terms["weights"] == weights * torch.finfo(adapter.dtype).bits // 32


@pytest.mark.parametrize("d_model", [32, 1040])
def test_files_take_what_is_planned(
    d_model: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = with_width(d_model)
    monkeypatch.setattr(checkpoint_module, "SECONDS_BETWEEN", 0.0)
    prompts = prompts_of(random_tokens(30, 120))
    with pytest.warns(UserWarning, match="more groups of text"):
        profile = ml.profile_layers(
            model, prompts, checkpoint=tmp_path / "kept", progress=False, n_folds=5
        )
    planned = plan_profile(config, 30, 120, device="cpu").disk
    (kept,) = (tmp_path / "kept").glob("*.safetensors")
    assert kept.stat().st_size == pytest.approx(planned["checkpoint, if asked for"], rel=0.05)
    size = profile.save(tmp_path / "profile").stat().st_size
    assert size == pytest.approx(planned["saved profile"], rel=0.2)


def test_batches_are_those_of_the_pass() -> None:
    config = tiny_config("llama", n_ctx=4096)
    for length in (24, 700, 2500):
        rows = [(Prompt(np.zeros(length, dtype=np.int64), i), i % 5) for i in range(400)]
        batches = list(plan_batches(rows, None, 8192, n_heads=4))
        largest = max(batch.n_padded for batch in batches)
        planned = plan_profile(config, 400, length)
        terms = {term.term: term.n_bytes for term in planned.memory}
        assert terms["one batch: rows of its sites"] == 5 * largest * 32 * 4


MEASURED = """
import sys, warnings, torch
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
from test_plan import with_width
from tiny import random_tokens
import mspgt_lens as ml

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) * 1024

config, model = with_width({d_model}, {n_layers})
prompts = ml.PromptDataset.from_tokens(random_tokens(60, 120))
with torch.no_grad():
    model(random_tokens(2, 8))
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
ml.profile_layers(model, prompts, progress=False)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(("d_model", "n_layers"), [(512, 5), (1040, 2)])
def test_memory_is_what_is_measured(d_model: int, n_layers: int) -> None:
    program = MEASURED.format(
        tests=str(Path(__file__).parent),
        d_model=d_model,
        n_layers=n_layers,
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    config = tiny_config("llama", d_model=d_model, n_layers=n_layers)
    planned = plan_profile(config, 60, 120, device="cpu")
    weights = next(term.n_bytes for term in planned.memory if term.term == "weights")
    assert int(ran.stdout) == pytest.approx(planned.peaks["cpu"] - weights, rel=0.2)


def test_a_million_prompts_take_the_memory_of_a_thousand() -> None:
    config = tiny_config("llama")
    few, many = (plan_profile(config, n, 100) for n in (1_000, 1_000_000))
    assert many.peaks["cuda:0"] == few.peaks["cuda:0"]
    # More prompts are looked at before the pass, 10,000 at most.
    assert many.peaks["cpu"] - few.peaks["cpu"] == 9_000 * 100 * 8
    assert many.operations["sums"] == pytest.approx(1000 * few.operations["sums"])
    assert many.disk == few.disk


def test_operations_are_those_of_the_products() -> None:
    config = tiny_config("llama", d_model=32, n_layers=4)
    found = plan_profile(config, 10, 100).operations
    n_tokens, d, mlp, kv = 1000, 32, 64, 16
    block = 2 * d * d + 2 * d * kv + 3 * d * mlp + 2 * d
    assert found["forward passes"] == 2 * n_tokens * 4 * block
    assert found["attention"] == 2 * n_tokens * 4 * 2 * 100 * d
    sums = 5 * (0.625 * d * d + d * (6 * 32 + d)) + 4 * d * d
    assert found["sums"] == 2 * n_tokens * sums
    assert found["decoding"] == 2 * min(1024, n_tokens, max(256, 0)) * 5 * d * 101


def test_devices_share_the_blocks_and_the_first_has_the_sums() -> None:
    config = tiny_config("llama", n_layers=5)
    one, three = (plan_profile(config, 100, 100, n_devices=n) for n in (1, 3))
    assert [*three.peaks] == ["cuda:0", "cuda:1", "cuda:2", "cpu"]

    def total(plan: Any, term: str) -> dict[str, int]:
        return {x.device: x.n_bytes for x in plan.memory if x.term == term}

    assert sum(total(three, "weights").values()) == sum(total(one, "weights").values())
    assert [*total(three, "sums of all folds")] == ["cuda:0"]
    rows = total(three, "one batch: rows of its sites")
    assert sum(rows.values()) == sum(total(one, "one batch: rows of its sites").values())
    assert rows["cuda:0"] == rows["cuda:1"] == rows["cuda:2"]
    table = three.to_dataframe()
    assert set(table["kind"]) == {"memory", "operations", "disk"}
    assert table["value"].sum() > 0


def test_the_command_needs_a_configuration_and_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    asked = ["plan", str(tmp_path), "--prompts", "1000", "--length", "100", "--devices", "2"]
    assert main([*asked, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    for words in (
        "in bfloat16, 4 blocks of width 32",
        "cuda:0: ",
        "cuda:1: ",
        "cpu: ",
        "sums of all",
    ):
        assert words in said
    assert "operations: " in said
    assert "checkpoint, if asked for" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "3", "--length", "100"], "--prompts: must be a whole number, at least 5"),
        (["--prompts", "10", "--length", "1"], "--length: must be a whole number, at least 2"),
        (["--prompts", "10", "--length", "257"], "the model's context, 256 tokens, got 257"),
        (["--prompts", "10", "--length", "99", "--devices", "0"], "--devices: must be a whole"),
        (
            ["--prompts", "10", "--length", "99", "--devices", "2", "--device", "cpu"],
            "got 2 of cpu",
        ),
    ],
)
def test_bad_plans_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    try:
        code = main(["plan", str(tmp_path), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing at"):
        plan_profile(str(tmp_path / "none.gguf"), 10, 10)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        plan_profile("./none", 10, 10)
    with pytest.raises(TypeError, match=r"model\.cfg\.model_name"):
        plan_profile(tiny_model("llama"), 10, 10)
    with pytest.raises(ValueError, match="dtype must be one of"):
        plan_profile(tiny_config("llama"), 10, 10, dtype="int8")
    with pytest.raises(ValueError, match="device must be one of"):
        plan_profile(tiny_config("llama"), 10, 10, device="tpu")  # type: ignore[arg-type]
    quantized = tiny_config("llama")
    quantized.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ml.CannotMeasure, match="quantized"):
        plan_profile(quantized, 10, 10)
    with pytest.raises(ml.CannotMeasure, match="does not say how large it is"):
        plan_profile(transformers.PretrainedConfig(), 10, 10)


def test_the_table_of_the_page_is_current() -> None:
    docs = Path(__file__).parents[1] / "docs"
    sys.path.insert(0, str(docs))
    try:
        import make_plans
    finally:
        sys.path.remove(str(docs))
    assert make_plans.page() == make_plans.PAGE.read_text("utf-8"), "run: python docs/make_plans.py"
    # As published.
    known = {"Llama 3.2 1B": 1_235_814_400, "Llama 3.1 8B": 8_030_261_248}
    known |= {"Qwen2.5 32B": 32_763_876_352, "Llama 3.1 70B": 70_553_706_496}
    sizes = {name: model_size(config).n_parameters for name, config, *_ in make_plans.MODELS}
    assert {name: sizes[name] for name in known} == known


def test_terms_add_up_to_the_largest_stage() -> None:
    plan = plan_profile(tiny_config("llama"), 100, 100, device="cpu")
    by_stage = {
        stage: sum(x.n_bytes for x in plan.memory if x.stage == stage)
        for stage in ("throughout", "before", "pass", "reading")
    }
    kept = by_stage.pop("throughout")
    assert plan.peaks["cpu"] == kept + max(by_stage.values())
    lone = replace(plan, memory=plan.memory[:1])
    assert lone.peaks["cpu"] == plan.memory[0].n_bytes
