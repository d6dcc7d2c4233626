"""Models spread over devices, and devices without float64: the same numbers as on the CPU."""

import subprocess
import sys
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import test_ambient
import torch
from tiny import random_model, tiny_config, tiny_model, tiny_tokenizer
from virtual import AVAILABLE, spread, virtual_devices

import mspgt_lens as ml
from mspgt_lens.models import as_adapter, bridge_from_huggingface

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="this torch has no backends in Python"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.simulation,
]
TWO = ("virtual:0", "virtual:1")
# Autograd has threads for the first device of a kind only.
WITH_CPU = ("virtual:0", "cpu")
NAMES = (
    "profile_layers",
    "fit_lens",
    "lens read",
    "classify_tokens",
    "residual_statistics",
    "perturb_scales",
    "patch_layers",
    "profile_cache",
    "fit_hvib",
    "generation_effects",
    "measure_brittleness",
    "block_effects",
    "measure_dissociation",
    "patch_scales",
)
GRADIENTS = ("patch_layers attribution", "rate_distortion")


def over(devices, architecture="llama", n_layers=6):
    """A tiny model whose first half is on the first device and whose second is on the other."""
    first, second = devices
    inner = random_model(tiny_config(architecture, n_layers=n_layers))
    half = n_layers // 2
    starts = {"llama": ("model.embed_tokens", "model.rotary", "model.layers"), "gpt2": ()}
    starts["gpt2"] = ("transformer.wte", "transformer.wpe", "transformer.h")
    *before, blocks = starts[architecture]
    places = dict.fromkeys([*before, *(f"{blocks}.{i}." for i in range(half))], first)
    if architecture == "gpt2":
        places["lm_head"] = first  # Tied to the embedding.
    model = bridge_from_huggingface(
        spread(inner, places | {"": second}), None, f"tiny-{architecture}"
    )
    model.tokenizer = tiny_tokenizer()
    return model


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return test_ambient.Things(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    made = {}

    def things(devices):
        if devices not in made:
            made[devices] = test_ambient.Things(tmp_path_factory.mktemp("two"))
            made[devices].model = over(devices)
        return made[devices]

    return things


def require_close(found, expected, path=""):
    """Every number of a result equal up to rounding, and all else the same."""
    if is_dataclass(expected):
        for item in fields(expected):
            mine, other = getattr(found, item.name), getattr(expected, item.name)
            require_close(mine, other, f"{path}.{item.name}")
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            require_close(found[key], value, f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            require_close(found[index], value, f"{path}[{index}]")
    elif isinstance(expected, torch.Tensor | np.ndarray | float):
        found, expected = np.asarray(found), np.asarray(expected)
        if expected.dtype.kind in "fc":
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=path)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_over_two_devices_gives_what_it_gives_on_one(one, two, name):
    with virtual_devices():
        found = two(TWO)[name]
    require_close(found, one[name])


def test_gradients_over_two_devices_are_those_on_one():
    # In a process of its own: autograd counts the devices once, at its first backward pass.
    code = "import test_devices; test_devices.compare_gradients()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == list(GRADIENTS)


def compare_gradients():
    with tempfile.TemporaryDirectory() as folder:
        one, two = (test_ambient.Things(Path(folder)) for _ in range(2))
        with virtual_devices():
            two.model = over(WITH_CPU)
            for name in GRADIENTS:
                require_close(two[name], one[name])
                print(name)


def test_tied_weights_and_learned_positions_may_be_spread_too():
    prompts = ml.PromptDataset.from_tokens(test_ambient.random_tokens(12, 40))
    settings = {**test_ambient.QUICK, **test_ambient.QUIET, "n_folds": 3}
    expected = ml.profile_layers(tiny_model("gpt2", n_layers=4), prompts, **settings)
    with virtual_devices():
        model = over(TWO, "gpt2", n_layers=4)
        adapter = as_adapter(model)
        assert (str(adapter.device), model.cfg.n_devices) == ("virtual:0", 2)
        found = ml.profile_layers(model, prompts, **settings)
    require_close(found.relevance, expected.relevance)
    require_close(dict(found.signals), dict(expected.signals))


def test_operations_over_devices_are_refused_as_on_real_ones():
    """So that the tests above can fail."""
    with virtual_devices():
        a, b = (torch.ones(3, device=device) for device in TWO)
        assert float((a + a).sum()) == 6
        for other in (b, torch.ones(3)):
            with pytest.raises(RuntimeError, match="must be on one device"):
                a + other
        with pytest.raises(TypeError, match="have no float64"):
            a.double()
        assert torch.equal((a + b.to(a.device)).cpu(), 2 * torch.ones(3))
