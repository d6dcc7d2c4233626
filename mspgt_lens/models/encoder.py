"""Encoders: models that read in both directions and predict masked tokens (BERT, RoBERTa)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.adapter import ModelAdapter, NormKind, answer_in_float32


class EncoderAdapter(ModelAdapter):
    """A masked language model of TransformerLens: ``TransformerBridge`` or ``HookedEncoder``.

    Its blocks normalize what they write (post-norm), so the residual is read as it is. Attributes
    are those of :class:`ModelAdapter`.
    """

    reads_both_ways = True
    parts = ("run_with_hooks", "hook_dict", "blocks", "mlm_head", "unembed", "W_E")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        tokenizer: Any = getattr(model, "tokenizer", None)
        mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise CannotMeasure(
                f"model: {self.name} predicts masked tokens, but has no tokenizer with a mask "
                "token; set model.tokenizer"
            )
        self.mask_id = int(mask_id)
        ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.prefix, self.suffix = (() if end is None else (int(end),) for end in ends)

    @property
    def site_hooks(self) -> list[str]:
        """The hook of each site, 0 ... L."""
        last = f"blocks.{self.n_layers - 1}"
        # HookedEncoder normalizes after its hook_resid_post.
        normalized = f"{last}.hook_normalized_resid_post"
        end = normalized if normalized in self.model.hook_dict else f"{last}.hook_resid_post"
        return [self.hook("resid_pre", block) for block in range(self.n_layers)] + [end]

    def normalize(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d"]:
        """The residual as a reader sees it: as it is, in float32 or wider."""
        return residual if residual.dtype == torch.float64 else residual.float()

    def _run_arguments(
        self, mask: Bool[Tensor, "prompt pos"], *, cached: bool = False
    ) -> dict[str, Any]:
        name = "attention_mask"
        if type(self.model).__name__ == "HookedEncoder":
            name = "one_zero_attention_mask"
        return {name: mask.to(self.device, torch.long)}

    def _probe_final_norm(self) -> tuple[Tensor, Tensor, NormKind]:
        return torch.ones(self.d_model), torch.zeros(self.d_model), "layer"

    def _unembedded(
        self, normalized: Float[Tensor, "position d_model"]
    ) -> Float[Tensor, "position v"]:
        rows = normalized.to(self.unembedding_device)[None]
        head = answer_in_float32(self.model.mlm_head, rows, self.dtype)
        # The bridge keeps the head's parts apart, HookedEncoder has them in one.
        if getattr(self.model, "ln_final", None) is not None:
            head = answer_in_float32(
                self.model.ln_final, torch.nn.functional.gelu(head), self.dtype
            )
        return answer_in_float32(self.model.unembed, head, self.dtype)[0]
