"""Text generated in batches with a key-value cache, with or without edits of the activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.adapter import ModelAdapter
from mspgt_lens.models.building import bridge_class
from mspgt_lens.models.editing import (
    Edit,
    check_edits,
    installed,
    require_acted,
    require_effect,
)


@dataclass(frozen=True)
class Rows:
    """The prompts that are generated together, padded on the left.

    What an edit sees first has the positions of ``tokens``; then one new position per step.

    Attributes:
        prompts: The number of each row's prompt.
        tokens: The prompts' tokens, padded on the left.
        mask: True where a token is not padding.
    """

    prompts: range
    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]


RowEdits = Callable[[Rows], Sequence[Edit]]


def generate(
    adapter: ModelAdapter,
    prompts: Sequence[Int[np.ndarray, " pos"]],
    *,
    n_new: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    edits: RowEdits | None = None,
    batch_size: int = 64,
) -> Int[np.ndarray, "prompt new"]:
    """Continue every prompt by exactly ``n_new`` tokens.

    Every token is processed once, its keys and values are kept; edits act on the positions that are
    newly processed, the prompt's included. Special tokens are never chosen, so that all
    continuations have the same length. A prompt's continuation depends on its own tokens and
    seed, not on the others in its batch (up to rounding of the logits).

    Args:
        adapter: The model; it is left as it was found, whatever happens.
        prompts: Token ids of every prompt, without padding.
        n_new: Tokens to generate.
        temperature: 0 takes the most probable token; above 0, tokens are drawn at that temperature
            by the Gumbel-max rule, so that two runs with the same seeds and nearly the same logits
            choose nearly the same tokens.
        seeds: Seed of each prompt's draws; needed above temperature 0.
        edits: Called with each batch's rows; gives what to change while it runs.
        batch_size: Prompts generated together.

    Raises:
        ValueError: If an argument is out of range, or prompt and continuation exceed the context.
        CannotEdit: If an edit never acted, or cannot.
        FloatingPointError: If logits are NaN or infinite.
    """
    check_generation(adapter, prompts, n_new, temperature, batch_size)
    if seeds is None and temperature > 0:
        raise ValueError("seeds must give one seed per prompt where temperature is above 0")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"seeds must have one seed per prompt ({len(prompts)}), got {len(seeds)}")
    new = np.zeros((len(prompts), n_new), dtype=np.int64)
    with adapter.inference():
        for start in range(0, len(prompts), batch_size):
            numbers = range(start, min(start + batch_size, len(prompts)))
            chooser = _Chooser(
                adapter,
                temperature,
                None if seeds is None else [seeds[number] for number in numbers],
            )
            rows = Rows(numbers, *_pad_left([prompts[number] for number in numbers]))
            new[numbers.start : numbers.stop] = _generate_batch(
                adapter, rows, n_new, chooser, () if edits is None else edits(rows)
            )
    return new


def _generate_batch(
    adapter: ModelAdapter,
    rows: Rows,
    n_new: int,
    chooser: _Chooser,
    edits: Sequence[Edit],
) -> Int[np.ndarray, "prompt new"]:
    check_edits(adapter, edits)
    _require_effect(adapter, edits)
    tokens, mask = rows.tokens.to(adapter.device), rows.mask.to(adapter.device)
    step = _cached_step(adapter, len(rows.prompts))
    chosen: list[Tensor] = []
    with installed(adapter, edits) as counts:
        for _ in range(n_new):
            tokens = chooser(step(tokens, mask))[:, None].to(adapter.device)
            require_acted(adapter, edits, counts)
            chosen.append(tokens)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    written: np.ndarray = torch.cat(chosen, dim=1).cpu().numpy()
    return written


def _require_effect(adapter: ModelAdapter, edits: Sequence[Edit]) -> None:
    """Prove that edits act on the prompt, and on a token after it with the prompt's cache."""

    def run(tokens: Tensor, probes: Sequence[Edit], *, cached: bool) -> tuple[Tensor, list[int]]:
        step = _cached_step(adapter, len(tokens))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if cached:
            step(tokens[:, :-1], mask[:, :-1])
            tokens = tokens[:, -1:]
        with installed(adapter, probes) as counts:
            last = step(tokens, mask)
        return last, counts

    require_effect(adapter, edits, partial(run, cached=False), "prompt")
    require_effect(adapter, edits, partial(run, cached=True), "token")


class _Chooser:
    """The next token of every row: the most probable, or drawn with the row's own generator."""

    def __init__(
        self, adapter: ModelAdapter, temperature: float, seeds: Sequence[int] | None
    ) -> None:
        self.adapter = adapter
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]
        self.special = torch.tensor(sorted(adapter.special_ids), dtype=torch.long)

    def __call__(self, logits: Float[Tensor, "prompt vocab"]) -> Int[Tensor, " prompt"]:
        if not torch.isfinite(logits).all():
            raise FloatingPointError(
                f"the logits of {self.adapter.name} are NaN or infinite: with edits, they are too "
                "strong; without, load the model in float32"
            )
        logits = logits.float().index_fill(1, self.special.to(logits.device), -torch.inf)
        if self.temperature == 0:
            return logits.argmax(dim=1)
        # The noise is drawn on the CPU, so that a seed means the same on every device.
        drawn = torch.empty(logits.shape)
        for row, generator in zip(drawn, self.generators, strict=True):
            row.uniform_(generator=generator)
        # Never 1; a draw of 0 makes its token wait forever.
        waits = drawn.log_().neg_().log_().to(logits.device)
        return (logits / self.temperature - waits).argmax(dim=1)


Advance = Callable[[Tensor, Tensor], Tensor]


def _cached_step(adapter: ModelAdapter, n_prompts: int) -> Advance:
    """From new tokens ``[prompt, new]`` and the mask of all so far to the last position's logits.

    Keys and values of earlier calls are kept inside.
    """
    bridge = bridge_class()
    if bridge is not None and isinstance(adapter.model, bridge):
        return _bridge_step(adapter.model)
    return _hooked_step(adapter.model, n_prompts)


def _require_cache(adapter: ModelAdapter) -> None:
    bridge = bridge_class()
    if bridge is None or not isinstance(adapter.model, bridge):
        return
    known = inspect.signature(adapter.model.original_model.forward).parameters
    if "past_key_values" not in known:
        raise CannotMeasure(
            f"model: {adapter.name} keeps no keys and values of earlier tokens, so no text can be "
            "generated with it; build the bridge over a Hugging Face model, with "
            "TransformerBridge.boot_transformers"
        )


def _bridge_step(model: Any) -> Advance:
    """Through the Hugging Face model that the bridge hooks into, with its own cache.

    The hook points are inside that model. Positions under left padding differ between versions of
    the bridge's own ``forward``, so they are given here; and only the last logits are asked for.
    """
    inner = model.original_model
    # Few architectures lack one of these: those find positions from the mask themselves.
    known = inspect.signature(inner.forward).parameters
    kept: list[Any] = [None]

    def step(tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        optional = {"position_ids": positions[:, -tokens.shape[1] :], "logits_to_keep": 1}
        out = inner(
            input_ids=tokens,
            attention_mask=mask.long(),
            past_key_values=kept[0],
            use_cache=True,
            **{name: value for name, value in optional.items() if name in known},
        )
        kept[0] = out.past_key_values
        last: Tensor = out.logits[:, -1]
        return last

    return step


def _hooked_step(model: Any, n_prompts: int) -> Advance:
    import transformer_lens

    # TransformerLens 3 has it under another name.
    kind = getattr(transformer_lens, "TransformerLensKeyValueCache", None)
    kind = kind or transformer_lens.HookedTransformerKeyValueCache
    cache = kind.init_cache(model.cfg, model.cfg.device, n_prompts)

    def step(tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(
            tokens,
            attention_mask=mask[:, -tokens.shape[1] :].long(),
            past_kv_cache=cache,
            return_type="logits",
        )
        return logits[:, -1]

    return step


def _pad_left(
    prompts: Sequence[Int[np.ndarray, " pos"]],
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    """Prompts as one batch that ends where every prompt ends, with its mask."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = True
    return tokens, mask


def check_generation(
    adapter: ModelAdapter,
    prompts: Sequence[Int[np.ndarray, " pos"]],
    n_new: int,
    temperature: float,
    batch_size: int,
) -> None:
    """See that prompts can be continued so, before anything is computed.

    Raises:
        ValueError: If an argument is out of range, or prompt and continuation exceed the context.
    """
    adapter.require_causal("generating text")
    adapter.require_every_logit("generating text")
    _require_cache(adapter)
    for name, value in (("n_new", n_new), ("batch_size", batch_size)):
        if value < 1 or value != int(value):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= adapter.n_ctx - n_new:
            raise ValueError(
                f"prompts[{number}] has {len(prompt)} tokens; with {n_new} new ones it must have "
                f"1 to {adapter.n_ctx - n_new} to fit the context of {adapter.name} "
                f"({adapter.n_ctx}): shorten the prompts or n_new"
            )


def decode_text(adapter: ModelAdapter, tokens: Int[np.ndarray, " pos"]) -> str:
    """The text of some tokens, special ones left out.

    Raises:
        ValueError: If the model has no tokenizer.
    """
    tokenizer = getattr(adapter.model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"model: {adapter.name} has no tokenizer, so its tokens cannot be read as text: set "
            "model.tokenizer"
        )
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return text
