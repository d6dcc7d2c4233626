"""What tests of profiles share: prompts, quick settings, a slow twin, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens.gathering import add_batch, make_batches
from mspgt_lens.models import as_adapter
from mspgt_lens.moments import Moments, plan_moments
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.prompts import Prompt
from mspgt_lens.signals import SIGNALS, BlockRows, Signal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]


SMALL = {"n_layers": 2, "d_model": 16, "n_ctx": 128}


BANDS = {"local": (1, 1), "intermediate": (2, 4)}


QUICK: dict[str, Any] = {"bands": BANDS, "n_folds": 3}


TOKENS = random_tokens(24, 24)


LENGTHS = [24, 13, 18, 24, 16, 20, 12, 22, 15, 24, 19, 17] * 2


RAGGED = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]


def prompts_of(tokens: Any = TOKENS, **kwargs: Any) -> ml.PromptDataset:
    return ml.PromptDataset.from_tokens(tokens, **kwargs)


def run(model: Any, prompts: Any = None, **kwargs: Any) -> LayerProfile:
    chosen = prompts_of() if prompts is None else prompts
    return ml.profile_layers(model, chosen, **{**QUICK, "progress": False, **kwargs})


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    """A small model to be read only."""
    return tiny("llama", **SMALL)


@pytest.fixture(scope="module")
def profile(tiny: Callable[..., Any]) -> LayerProfile:
    """The profile of ``model`` at the settings of these tests."""
    return run(tiny("llama", **SMALL))


@pytest.fixture(scope="module")
def ragged(tiny: Callable[..., Any]) -> Callable[[str], LayerProfile]:
    """``ragged(architecture)``: the profile of prompts of many lengths, without any padding."""
    profiles: dict[str, LayerProfile] = {}

    def profile_of(architecture: str) -> LayerProfile:
        if architecture not in profiles:
            model = tiny(architecture, **SMALL)
            profiles[architecture] = run(model, prompts_of(RAGGED), logit_lens=True)
        return profiles[architecture]

    return profile_of


def assert_same(
    first: LayerProfile, second: LayerProfile, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """The same curves; by default to the last digit.

    The ends of an interval are small differences of large numbers: they get ``rtol`` of the
    largest number in the curve.
    """
    pairs = list(zip(first.curves(), second.curves(), strict=True))
    for (quantity, scale, a), (other_quantity, other_scale, b) in pairs:
        assert (quantity, scale) == (other_quantity, other_scale)
        largest = np.abs([b.values, b.low, b.high]).max()
        for name in ("values", "low", "high"):
            np.testing.assert_allclose(
                getattr(a, name),
                getattr(b, name),
                rtol=rtol,
                atol=atol if name == "values" else atol + rtol * largest,
                err_msg=f"{quantity} {scale} {name}",
            )
        assert (a.unit, a.guarantee) == (b.unit, b.guarantee)


def pad(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Rows padded on one side with an ordinary token, and their mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), 50)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[index, at], mask[index, at] = torch.tensor(row), True
    return tokens, mask


def cache_of(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Any:
    kwargs = {} if mask is None else {"attention_mask": mask.long()}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=ml.needed_hooks(model), **kwargs)
    return cache


def hooks_on(model: Any) -> list[int]:
    points = [len(hook.fwd_hooks) for hook in model.hook_dict.values()]
    return points + [len(module._forward_hooks) for module in model.modules()]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """Models that know their special tokens."""
    models = {name: tiny_model(name, **SMALL) for name in ("llama", "gpt2")}
    for model in models.values():
        model.tokenizer = tiny_tokenizer()
    return models


def broken_late(value: float, index: int) -> tuple[Any, list[list[int]]]:
    """A model whose activations break from position 20 on, where only one prompt reaches."""
    model = tiny_model("gpt2", **SMALL)
    with torch.no_grad():
        model.W_pos[20:] = value
    prompts = TOKENS[:, :20].tolist()
    prompts[index] = TOKENS[index].tolist()
    return model, prompts


def lengths(rows: BlockRows) -> Tensor:
    """A signal of one's own: how long the residual is after the block."""
    return rows.after.norm(dim=1)


LENGTH = Signal(
    name="length",
    unit="lengths",
    guarantee="Length of the residual after the block.",
    title="Length",
    sentence="{value}",
    of=lengths,
)


def gather(
    model: Any, tokens: Any, first: Moments | None = None, max_width: int = 1024, seed: int = 0
) -> Moments:
    """Moments of prompts dealt to three folds in turn; a further shard goes with a first one."""
    adapter = as_adapter(model)
    rows = [np.asarray(row) for row in tokens]
    if first is None:
        plan = plan_moments(
            adapter,
            np.bincount(TOKENS.flatten(), minlength=101),
            bands=BANDS,
            n_folds=3,
            skip_first=4,
            seed=seed,
            max_width=max_width,
            signals=(*SIGNALS.values(), LENGTH),
        )
    else:
        plan = first.plan
    gathered = Moments(plan, adapter)
    if first is not None:
        gathered.reference = first.reference
    assigned = [(Prompt(row, int(row[0])), int(row[-1]) % 3) for row in rows]
    with adapter.inference():
        for batch in make_batches(assigned, None, 100):
            add_batch(gathered, adapter, batch)
    return gathered
