"""Recording a run and taking it up again at any block, without the blocks and tokens before it.

A change at block ``l`` and position ``p`` leaves every earlier block, and in a causal model every
earlier position, as it was. So a changed run is computed from block ``l`` on and for the positions
from ``p`` on only; the keys and values of earlier positions are those of the recorded run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.adapter import ModelAdapter, answer_in_float32
from mspgt_lens.models.arguments import BlockArguments, Rows, learn_arguments, record_calls

PatchPlace = Literal["resid_pre", "attn_out", "mlp_out", "z"]
Change = Callable[[Tensor], Tensor]
_HOOKED_CACHE = "past_kv_cache_entry"
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.05


class _Prefix:
    """Keys and values of earlier positions, in the manner of every model class's own cache."""

    def __init__(self, axis: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.axis, self.keys, self.values = axis, keys, values
        self.given: tuple[Tensor, Tensor] | None = None

    @property
    def past_keys(self) -> Tensor:
        """As HookedTransformer reads it, for the number of earlier positions."""
        return torch.zeros(1, 0) if self.keys is None else self.keys

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As HookedTransformer calls it."""
        self.given = keys, values
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], self.axis), torch.cat([self.values, values], self.axis)

    def update(
        self, keys: Tensor, values: Tensor, *layer: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """As the blocks of a TransformerBridge call it."""
        return self.append(keys, values)

    def get_seq_length(self, *layer: Any) -> int:
        """Number of earlier positions, as some Hugging Face blocks ask for it."""
        return 0 if self.keys is None else int(self.keys.shape[self.axis])


class RecordedRun:
    """One run over prompts: the residual at every site, and all it takes to resume at a block.

    Build and use it inside ``adapter.inference()``. Blocks are called as the model calls them, so
    the user's own hooks act as they do in the model.

    Attributes:
        residual: The residual stream as each block received it, sites 0 ... L, each
            ``[prompt, pos, d_model]``.
        activations: At the patched place, one per block (``[prompt, pos, d_model]``, or
            ``[prompt, pos, head, d_head]`` for ``"z"``); for ``"resid_pre"`` the residuals.
        reuses_prefix: Whether a resumed run may start at a later position than the first. False
            where a model class does not take keys and values as expected; then all positions are
            computed.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokens: Int[Tensor, "prompt pos"],
        mask: Bool[Tensor, "prompt pos"],
        place: PatchPlace = "resid_pre",
    ) -> None:
        self.adapter, self.place = adapter, place
        self.tokens, self.mask = tokens.cpu(), mask.cpu()
        self.residual: list[Tensor] = []
        self.activations: list[Tensor] = []
        self.reuses_prefix = False
        self._arguments: list[BlockArguments] = []
        self._prefix: list[tuple[Tensor, Tensor]] = []
        self._edits: dict[int, Change] = {}
        self._record()

    def prepare(self) -> None:
        """Check that resuming and decoding give the recorded run back; keep keys and values.

        Raises:
            ValueError: If they do not: the model computes something that is not in its blocks, its
                final norm and its unembedding; or a block is called with something that does not
                follow prompts and positions in a known way.
        """
        self._check_logits()
        # In another order than recorded, so that rows mixed up are found out.
        order = torch.arange(len(self.tokens)).flip(0)
        prefixes = [self._check_block(block, order) for block in range(self.adapter.n_layers)]
        own = [prefix for prefix in prefixes if prefix is not None]
        start = self.n_pos // 2
        if len(own) < self.adapter.n_layers or not start:
            return
        self._prefix = own
        self.reuses_prefix = self._resumes_at(start, self._unlike())

    @property
    def n_pos(self) -> int:
        """Tokens of each prompt, padding included."""
        return int(self.tokens.shape[1])

    @property
    def n_bytes(self) -> int:
        """Of what was recorded."""
        prefixes = [part for pair in self._prefix for part in pair]
        unique = {id(t): t for t in (*self.residual, *self.activations, *prefixes)}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

    @contextmanager
    def editing(self) -> Iterator[dict[int, Change]]:
        """Hooks on the patched place of every block for the time inside.

        Yields:
            A dictionary: what is put there under a block's number is applied to that place's
            activation whenever that block runs.
        """

        def hook(block: int) -> Callable[..., Tensor | None]:
            def apply(activation: Tensor, hook: Any) -> Tensor | None:
                edit = self._edits.get(block)
                return None if edit is None else edit(activation)

            return apply

        hooks = [(name, hook(block)) for block, name in enumerate(self._place_names())]
        try:
            with self.adapter.model.hooks(fwd_hooks=hooks):
                yield self._edits
        finally:
            self._edits.clear()

    def run_block(
        self,
        block: int,
        residual: Float[Tensor, "row length d_model"],
        prompts: Int[Tensor, " row"],
        start: int,
    ) -> Float[Tensor, "row length d_model"]:
        """One block on changed residuals.

        Args:
            block: The block.
            residual: Its input, for positions ``start`` ... ``start + length - 1``.
            prompts: Which recorded prompt each row was changed from.
            start: First position; the keys and values before it are the recorded ones.
        """
        prefix = None
        if start:
            keys, values = self._prefix[block]
            axis = self._prefix_axis(block)
            prefix = _Prefix(
                axis,
                keys.narrow(axis, 0, start)[prompts],
                values.narrow(axis, 0, start)[prompts],
            )
        stop = start + residual.shape[1]
        return self._call(block, residual, Rows(prompts, start, stop, prefix))

    def logits(self, residual: Float[Tensor, "position d_model"]) -> Float[Tensor, "position v"]:
        """Logits of final residuals, by the model's own final norm and unembedding in float32."""
        model, dtype = self.adapter.model, self.adapter.dtype
        normalized = answer_in_float32(model.ln_final, residual[None], dtype)
        unembedded = answer_in_float32(model.unembed, normalized, dtype)[0]
        return self.adapter.finished_logits(unembedded)

    def _place_names(self) -> list[str]:
        """The hook of the patched place in each block; none for the residual, a block's input."""
        if self.place == "resid_pre":
            return []
        names = [self.adapter.hook(self.place, b) for b in range(self.adapter.n_layers)]
        absent = [name for name in names if name not in self.adapter.model.hook_dict]
        if absent:
            raise CannotMeasure(
                f"place {self.place!r}: {self.adapter.name} lacks {len(absent)} of its hooks, the "
                f"first being {absent[0]} (models of attention only have no MLP); choose another "
                "place"
            )
        return names

    def _record(self) -> None:
        def keep_activation(activation: Tensor, hook: Any) -> None:
            self.activations.append(activation.detach().clone())

        hooks = [(name, keep_activation) for name in self._place_names()]
        with self.adapter.model.hooks(fwd_hooks=hooks):
            calls, final = record_calls(self.adapter, self.tokens, self.mask)
        self.residual = [*(call.residual for call in calls), final]
        # Here and not in prepare(): runs of a model that was checked on another prompt resume too.
        # The calls themselves are let go: the model's cache of all keys and values hangs on them.
        self._arguments = learn_arguments(self.adapter, calls, self.tokens, self.mask)
        if self.place == "resid_pre":
            self.activations = self.residual[:-1]
        elif len(self.activations) != self.adapter.n_layers:
            raise CannotMeasure(
                f"place {self.place!r}: {self.adapter.name} computes it in {len(self.activations)} "
                f"of its {self.adapter.n_layers} blocks (models of attention only have no MLP); "
                "choose another place"
            )

    def _prefix_axis(self, block: int) -> int:
        return 1 if _HOOKED_CACHE in self._arguments[block].kwargs else 2

    def _check_block(self, block: int, order: Tensor) -> tuple[Tensor, Tensor] | None:
        """Prove that the block gives the recorded run back; its keys and values, if it tells."""
        prefix: _Prefix | None = _Prefix(self._prefix_axis(block))
        rows = self.residual[block][order]
        try:
            after = self._call(block, rows, Rows(order, 0, self.n_pos, prefix))
        except (RuntimeError, TypeError, IndexError, AttributeError):
            # It keeps more than keys and values, such as the state of a recurrence.
            prefix = None
            after = self._call(block, rows, Rows(order, 0, self.n_pos))
        expected = self.residual[block + 1][order]
        self._require_equal(after, expected, f"block {block}", self.mask[order])
        if prefix is None or prefix.given is None:
            return None
        keys, values = (given[order] for given in prefix.given)
        return keys, values

    def _call(self, block: int, residual: Tensor, rows: Rows) -> Tensor:
        args, kwargs = self._arguments[block].take(rows)
        residual = residual.to(self.residual[block].device)
        out = self.adapter.model.blocks[block](residual, *args, **kwargs)
        after: Tensor = out[0] if isinstance(out, tuple) else out
        return after

    def _check_logits(self) -> None:
        """Prove on the first prompt that :meth:`logits` gives the model's own."""
        real = self.mask[0]
        expected = self.adapter.model.run_with_hooks(
            self.tokens[:1].to(self.adapter.device),
            **self.adapter._run_arguments(self.mask[:1]),
            return_type="logits",
            fwd_hooks=[],
        )[0, real].float()
        resumed = self.logits(self.residual[-1][0, real])
        self._require_equal(resumed[None], expected[None], "the unembedding", self.mask[:1, real])

    def _unlike(self) -> Int[Tensor, " row"]:
        """A few prompts that differ as much as any in how blocks are called for them.

        Every prompt has been run whole by now. What is cut at a position besides the residual,
        masks, places and biases, follows the batch's size and each prompt's padding, which is at
        its ends: so those with most and least of it at either end stand for all. They are two at
        least, where there are two, and in another order than recorded.
        """
        lead, real = self.mask.int().argmax(dim=1), self.mask.sum(dim=1)
        ends = [0, len(self.mask) - 1]
        ends += [int(at) for of in (lead, real) for at in (of.argmin(), of.argmax())]
        return torch.tensor(sorted(set(ends), reverse=True))

    def _resumes_at(self, start: int, order: Tensor) -> bool:
        # Short of the last position, so that both ends are seen to be cut right.
        part = slice(start, max(start + 1, self.n_pos - 1))
        residual = self.residual[0][order, part]
        try:
            for block in range(self.adapter.n_layers):
                residual = self.run_block(block, residual, order, start)
        except (RuntimeError, TypeError, IndexError, AttributeError):
            return False
        return self._equal(residual, self.residual[-1][order, part], self.mask[order, part])

    def _equal(self, resumed: Tensor, expected: Tensor, real: Tensor) -> bool:
        if resumed.shape != expected.shape:
            return False
        resumed, expected = resumed[real].float(), expected[real].to(resumed.device, torch.float32)
        dtype = self.adapter.dtype
        # Row by row: massive activations in a few rows would hide errors in all others.
        error = (resumed - expected).norm(dim=-1) / expected.norm(dim=-1)
        return float(error.square().mean().sqrt()) < _TOLERANCE.get(dtype, _HALF_TOLERANCE)

    def _require_equal(
        self, resumed: Tensor, expected: Tensor, what: str, real: Tensor | None = None
    ) -> None:
        if not self._equal(resumed, expected, self.mask if real is None else real):
            raise CannotMeasure(
                f"model: {what} of {self.adapter.name}, called on its own, does not give what the "
                "model computes, so a run cannot be resumed there"
            )
