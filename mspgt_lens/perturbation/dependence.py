"""Which context a token depends on: near, farther, or far."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor
from tqdm.auto import tqdm

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Result, Rows, counted, named, tidy
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import stable_hash
from mspgt_lens.halving import Halving, Span
from mspgt_lens.models import ModelAdapter, as_adapter, own_attention, provenance
from mspgt_lens.processes import Turns, joined
from mspgt_lens.prompts import Prompt, PromptDataset, as_dataset, count_tokens, stack_rows
from mspgt_lens.storage import package_versions
from mspgt_lens.targets import DEFAULT_BANDS, check_bands

# Half a nat: the token becomes at least 1.65 times as likely. Fixed before any result was seen.
THRESHOLD = 0.5
_BATCH_TOKENS = 4096
_REMEDY = "bands= with smaller offsets, or more devices"


@dataclass(frozen=True, eq=False, repr=False)
class TokenClasses(Result):
    """Tokens by the longest band of context that they depend on.

    Attributes:
        model_name: The model's name.
        bands: Band name to its token offsets ``(a, b)``, from near to far.
        threshold: Least fall of the loss that counts as dependence, in nats.
        losses: Cross-entropy of each token, in nats, ``[token, context]``: from no context (the
            unigram frequencies of the other groups), then from exactly the last ``b`` tokens for
            every band's ``b``.
        classes: Index of the longest band whose context lowers the loss by ``threshold`` or more
            against the next shorter context; -1 where none does. ``[token]``
        prompts: Number of each token's prompt in the data set, ``[token]``.
        positions: Its place in that prompt, ``[token]``.
        tokens: Its id, ``[token]``.
        groups: ``stable_hash`` of its prompt's group, ``[token]``.
        settings: Everything that decides the numbers.
        versions: Package versions it was made with.
    """

    model_name: str
    bands: Mapping[str, tuple[int, int]]
    threshold: float
    losses: Float[np.ndarray, "token context"]
    classes: Int[np.ndarray, " token"]
    prompts: Int[np.ndarray, " token"]
    positions: Int[np.ndarray, " token"]
    tokens: Int[np.ndarray, " token"]
    groups: UInt64[np.ndarray, " token"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def gains(self) -> Float[np.ndarray, "token band"]:
        """Fall of the loss when the context grows to each band's end, in nats."""
        falls: np.ndarray = -np.diff(self.losses, axis=1)
        return falls

    @property
    def counts(self) -> dict[str, int]:
        """Tokens per class; ``"none"`` for those that depend on no band."""
        counts = {name: int((self.classes == i).sum()) for i, name in enumerate(self.bands)}
        return counts | {"none": int((self.classes < 0).sum())}

    def heading(self) -> str:
        """The model, how many tokens, and what counts."""
        return (
            f"TokenClasses{named(self.model_name)}: {counted(len(self.tokens), 'token')}, by the "
            f"longest context that lowers the loss by {self.threshold:g} nats"
        )

    def rows(self) -> Rows:
        """Tokens of every class, and the fall of the loss that makes it."""
        n = max(len(self.tokens), 1)
        falls = {
            name: f"{fall.mean():.2f}" if len(fall) else ""
            for i, name in enumerate(self.bands)
            for fall in (self.gains[self.classes == i, i],)
        }
        return [
            ("class", "tokens", "share", "mean fall of the loss"),
            *((k, f"{v:,}", f"{v / n:.0%}", falls.get(k, "")) for k, v in self.counts.items()),
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token and context that it was predicted from.

        Returns:
            Columns ``model, quantity, class, prompt, position, token, context, value, unit``;
            ``context`` counts tokens, and ``value`` is the loss.
        """
        names = np.array([*self.bands, "none"])
        ends = (0, *(b for _, b in self.bands.values()))
        return tidy(
            {
                "model": self.model_name,
                "quantity": "cross_entropy",
                "class": np.repeat(names[self.classes], len(ends)),
                "prompt": np.repeat(self.prompts, len(ends)),
                "position": np.repeat(self.positions, len(ends)),
                "token": np.repeat(self.tokens, len(ends)),
                "context": np.tile(ends, len(self.tokens)),
                "value": self.losses.ravel(),
                "unit": "nats",
            }
        )


@in_own_state
def classify_tokens(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    *,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    threshold: float = THRESHOLD,
    n_tokens: int = 1000,
    skip_first: int = 4,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> TokenClasses:
    """Sort sampled tokens by the longest band of context that they depend on.

    Every token is predicted from exactly the last ``b`` tokens before it, for each band ``(a, b)``,
    run as a prompt of its own (with BOS first where the model takes one), so that position
    embeddings start at 0 as in training. A token depends on a band if the context that reaches
    to the band's end lowers its loss by ``threshold`` or more against the next shorter context; the
    shortest is none at all, for which the token's frequency in the other groups stands (with one
    count added to every token). Its class is the longest band that it depends on.

    The first token of every such window is an attention sink in most models and tells them less
    than it says, so contexts of one or two tokens are used worse than inside a text.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A :class:`PromptDataset`, or texts; longer than the farthest band.
        bands: Band name to offsets, each reaching farther than the one before.
        threshold: In nats.
        n_tokens: Tokens to sample among those with enough context; fewer where there are fewer.
        skip_first: Tokens at the beginning of each prompt that no context reaches into.
        seed: Decides the sample.
        progress: Show a progress bar; of several processes, the first does.
        process_group: A group of ``torch.distributed`` whose processes share the work. All of them
            call this with the same arguments and end with the same result, that of one process;
            what stops one stops all.

    Returns:
        Losses of every sampled token with each context, in nats, and its class.

    Raises:
        RuntimeError: If another process of the group failed; says which one, and why. Or torch's
            own (``torch.OutOfMemoryError``), if one window does not fit into memory.
        ValueError: If bands do not reach farther one by one, an argument is out of range, or
            processes were given different arguments.
        CannotMeasure: If the model's context, or every prompt, is too short for the farthest band.
        FloatingPointError: If a loss is NaN or infinite.

    Example:
        >>> classes = ml.classify_tokens(model, prompts, n_tokens=200)
        >>> classes.counts  # tokens by the longest band of context that they depend on
        {'local': ..., 'intermediate': ..., 'global': ..., 'none': ...}
    """
    with joined(process_group) as processes:
        adapter = as_adapter(model)
        adapter.require_causal("telling tokens by their context")
        adapter.require_every_logit("telling tokens by their context")
        checked = _checked_bands(adapter, bands)
        ends = [b for _, b in checked.values()]
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0 nats, got {threshold}")
        if n_tokens < 1:
            raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
        rows = list(as_dataset(prompts, adapter))
        candidates = _candidates(adapter, rows, ends[-1], skip_first)
        drawn = np.random.default_rng(seed).permutation(len(candidates))[:n_tokens]
        chosen = candidates[np.sort(drawn)]
        if processes.size > 1:
            given = {
                "prompts": stable_hash([(row.tokens.tolist(), row.group) for row in rows]),
                "bands": list(checked.items()),
                "threshold": threshold,
                "n_tokens": n_tokens,
                "skip_first": skip_first,
                "seed": seed,
            }
            processes.agree(provenance(adapter) | given)
        unigram = _unigram_losses(adapter, rows, chosen)
        losses, halving = (
            np.zeros((len(ends), len(chosen))),
            Halving(rows="windows", remedy=_REMEDY),
        )
        turns, is_shown = Turns(processes), progress and processes.rank == 0
        total = len(chosen) * len(ends) // processes.size
        with (
            adapter.inference(),
            own_attention(adapter),
            tqdm(total=total, unit="tok", disable=not is_shown) as bar,
        ):
            adapter.check_decoding(torch.from_numpy(rows[chosen[0, 0]].tokens[:16]))
            for own, end in zip(losses, ends, strict=True):
                own[:] = _window_losses(adapter, rows, chosen, end, halving, turns, bar)
        processes.sum_(losses)
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"a token's loss in {adapter.name} is NaN or infinite; load the model in float32"
        )
    table = np.stack([unigram, *losses], axis=1)
    depends = -np.diff(table, axis=1) >= threshold
    classes = np.where(depends.any(axis=1), len(ends) - 1 - np.argmax(depends[:, ::-1], axis=1), -1)
    return TokenClasses(
        model_name=adapter.name,
        bands=checked,
        threshold=float(threshold),
        losses=table,
        classes=classes.astype(np.int64),
        prompts=chosen[:, 0],
        positions=chosen[:, 1],
        tokens=np.array([rows[n].tokens[p] for n, p in chosen]),
        groups=np.array([stable_hash(rows[n].group) for n, _ in chosen], dtype=np.uint64),
        settings={
            "skip_first": skip_first,
            "seed": seed,
            "n_candidates": len(candidates),
            "weights": adapter.weight_processing,
        },
        versions=package_versions(),
    )


def _checked_bands(
    adapter: ModelAdapter, bands: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """The bands, each reaching farther than the one before, all of them within the context."""
    checked = check_bands(bands)
    ends = [b for _, b in checked.values()]
    if ends != sorted(set(ends)):
        raise ValueError(f"bands must each reach farther than the one before, got {checked}")
    if ends[-1] + len(adapter.prefix) > adapter.n_ctx:
        raise CannotMeasure(
            f"bands reach {ends[-1]} tokens back, more than the context of {adapter.name} "
            f"({adapter.n_ctx})"
        )
    return checked


def _candidates(
    adapter: ModelAdapter, prompts: Sequence[Prompt], reach: int, skip_first: int
) -> Int[np.ndarray, "token 2"]:
    """Prompt and position of every token with enough ordinary text before it."""
    special = np.array(sorted(adapter.special_ids))
    candidates = [
        (number, position)
        for number, prompt in enumerate(prompts)
        for position in range(skip_first + reach, len(prompt.tokens))
        if not np.isin(prompt.tokens[position - reach : position + 1], special).any()
    ]
    if not candidates:
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        raise CannotMeasure(
            f"prompts must hold tokens with {reach} ordinary tokens before them, beyond the "
            f"first {skip_first}; the longest prompt has {longest} tokens: give "
            "longer prompts, or bands= with smaller offsets"
        )
    return np.array(candidates)


def _unigram_losses(
    adapter: ModelAdapter, prompts: Sequence[Prompt], chosen: Int[np.ndarray, "token 2"]
) -> Float[np.ndarray, " token"]:
    """By the frequencies of the other groups, one count added to every token."""
    of_group: dict[Hashable, list[Prompt]] = {}
    for prompt in prompts:
        of_group.setdefault(prompt.group, []).append(prompt)
    own = {group: count_tokens(adapter, mine) for group, mine in of_group.items()}
    total = np.sum(list(own.values()), axis=0)
    losses = []
    for number, position in chosen:
        prompt = prompts[number]
        others = total - own[prompt.group] + 1.0
        losses.append(np.log(others.sum()) - np.log(others[prompt.tokens[position]]))
    return np.array(losses)


def _window_losses(
    adapter: ModelAdapter,
    prompts: Sequence[Prompt],
    chosen: Int[np.ndarray, "token 2"],
    length: int,
    halving: Halving,
    turns: Turns,
    bar: Any,
) -> Float[np.ndarray, " token"]:
    """Loss of each token from exactly ``length`` tokens before it; 0 where it is another's turn."""
    prefix = np.array(adapter.prefix, dtype=np.int64)

    def run(span: Span) -> tuple[slice, Float[np.ndarray, " token"]]:
        part = chosen[span.rows]
        windows = [np.concatenate([prefix, prompts[n].tokens[p - length : p]]) for n, p in part]
        last: list[Tensor] = []

        def on_site(site: int, residual: Tensor) -> None:
            if site == adapter.n_layers:
                last.append(residual[:, -1])

        adapter.run(*stack_rows(windows), on_site)
        scores = adapter.decode(adapter.normalize(last[0])).log_softmax(dim=-1)
        target = torch.tensor([int(prompts[n].tokens[p]) for n, p in part], device=scores.device)
        return span.rows, -scores.gather(1, target[:, None])[:, 0].cpu().double().numpy()

    losses = np.zeros(len(chosen))
    n_tokens = length + len(prefix)
    n_parts = -(-len(chosen) * (length + 1) // _BATCH_TOKENS)
    for numbers in np.array_split(np.arange(len(chosen)), n_parts):
        if not turns.is_mine(len(numbers) * (length + 1)):
            continue
        whole = Span(int(numbers[0]), int(numbers[-1]) + 1, n_tokens)
        for rows, found in halving.each(whole, run):
            losses[rows] = found
            bar.update(len(found))
    return losses
