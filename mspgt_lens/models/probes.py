"""Short runs that prove what a model does, whatever it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_TOKENS = 6
# Below this share of the logits' own spread, a difference is rounding.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF_ROUNDING = 1e-3


def probe_tokens(d_vocab: int, n_ctx: int, special_ids: frozenset[int]) -> Int[Tensor, " pos"]:
    """A short prompt of ordinary tokens, spread over the vocabulary."""
    ordinary = [token for token in range(d_vocab) if token not in special_ids]
    places = torch.linspace(0, len(ordinary) - 1, min(N_TOKENS, n_ctx)).long()
    return torch.tensor(ordinary)[places]


def changes(logits: Float[Tensor, "row ..."]) -> tuple[Float[Tensor, " changed"], float]:
    """How far each row but the last two is from those, and how far rounding alone may bring it.

    The last two rows are the same run twice.
    """
    flat = logits.float().flatten(1)
    clean = flat[-1]
    floor = float((flat[-2] - clean).norm())
    spread = float((clean - clean.mean()).norm())
    share = _ROUNDING.get(logits.dtype, _HALF_ROUNDING)
    return (flat[:-2] - clean).norm(dim=1), max(10 * floor, share * spread)


@contextmanager
def without_hooks(model: Any) -> Iterator[None]:
    """The model without its users' hooks, except permanent ones, for the time of a probe.

    What users watch or ablate meanwhile is none of the model's own doing, and their hooks may know
    no other prompts than theirs.
    """
    held = []
    for point in {id(point): point for point in model.hook_dict.values()}.values():
        hooks = point._forward_hooks
        temporary = {hook.hook.id for hook in point.fwd_hooks if not hook.is_permanent} & set(hooks)
        if temporary:
            held.append((hooks, temporary, dict(hooks)))
            for number in temporary:
                del hooks[number]
    try:
        yield
    finally:
        for hooks, temporary, before in held:
            now = dict(hooks)
            hooks.clear()
            hooks.update({n: hook for n, hook in before.items() if n in temporary or n in now})
            hooks.update(now)
