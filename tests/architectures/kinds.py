"""Architectures, tiny: each as TransformerLens has it, and as a plain copy it never touched."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny import random_model, tiny_tokenizer
from torch import Tensor, nn

from mspgt_lens.models import bridge_from_huggingface

N_LAYERS, N_HEADS, VOCAB, N_CTX = 3, 4, 101, 64
# Both names of each size: a configuration leaves out what it does not know.
_USUAL = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
}
_OLD = {"n_embd": 32, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {"head_dim": 8, **_GROUPED}
_SLIDING = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": N_HEADS,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SCALED = {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        name: Its class in transformers.
        traits: What it stands for here, in words.
        config: Its configuration beside the usual sizes.
    """

    name: str
    traits: str
    config: dict[str, Any]

    @property
    def id(self) -> str:
        """Its name in the tests."""
        return f"{self.name}-{self.traits.replace(' ', '_')}"


def _kind(name: str, traits: str, *parts: dict[str, Any], **config: Any) -> Kind:
    for part in parts:
        config = part | config
    return Kind(name, traits, config)


KINDS = [
    _kind("AfmoeForCausalLM", "mixture, sliding windows", _MIXTURE, _SLIDING, _WIDE,
          num_dense_layers=1, num_shared_experts=1),
    _kind("ApertusForCausalLM", "grouped queries, normed queries and keys", _GROUPED),
    _kind("ArceeForCausalLM", "squared ReLU", _GROUPED),
    _kind("BambaForCausalLM", "Mamba and attention", _MAMBA, _GROUPED, attn_layer_indices=[1]),
    _kind("BartForConditionalGeneration", "encoder and decoder", d_model=32, encoder_layers=3,
          decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4),
    _kind("BertForMaskedLM", "encoder"),
    _kind("BitNetForCausalLM", "norms within parts", _GROUPED),
    _kind("BloomForCausalLM", "ALiBi", _OLD),
    _kind("CodeGenForCausalLM", "parallel, rotary in part", _OLD, rotary_dim=4),
    _kind("CohereForCausalLM", "parallel, scaled logits", _GROUPED, logit_scale=0.25),
    _kind("Cohere2ForCausalLM", "parallel, sliding windows", _SLIDING, _GROUPED),
    _kind("DeepseekV2ForCausalLM", "latent attention, mixture", _LATENT, _ROUTED,
          topk_method="greedy"),
    _kind("DeepseekV3ForCausalLM", "latent attention, mixture", _LATENT, _ROUTED),
    _kind("Ernie4_5ForCausalLM", "rotary in pairs", _WIDE),
    _kind("Ernie4_5_MoeForCausalLM", "mixture", _WIDE, moe_num_experts=4, moe_k=2,
          moe_intermediate_size=16, moe_layer_start_index=1),
    _kind("Exaone4ForCausalLM", "norms after parts, sliding windows", _SLIDING, _GROUPED),
    _kind("FalconForCausalLM", "parallel, one key", alibi=False, multi_query=True,
          new_decoder_architecture=False),
    _kind("FalconForCausalLM", "sequential, ALiBi", alibi=True, multi_query=False,
          new_decoder_architecture=False, parallel_attn=False),
    _kind("FalconH1ForCausalLM", "Mamba beside attention", _MAMBA, _WIDE, mamba_d_ssm=64,
          mamba_chunk_size=8),
    _kind("FalconMambaForCausalLM", "Mamba"),
    _kind("FlexOlmoForCausalLM", "mixture", _MIXTURE, _GROUPED),
    _kind("GemmaForCausalLM", "one key, scaled embeddings", head_dim=8, num_key_value_heads=1),
    _kind("Gemma2ForCausalLM", "norms before and after, soft caps", _WIDE, _SLIDING,
          final_logit_softcapping=5.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    _kind("Gemma3ForCausalLM", "norms before and after, sliding windows", _WIDE, _SLIDING,
          query_pre_attn_scalar=8),
    _kind("Gemma4ForCausalLM", "norms before and after", _WIDE, _SLIDING, global_head_dim=8,
          vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=0,
          num_kv_shared_layers=0),
    _kind("Gemma4ForCausalLM", "keys shared by blocks", _WIDE, _SLIDING, global_head_dim=8,
          vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
          num_kv_shared_layers=1),
    _kind("GlmForCausalLM", "rotary in part", _WIDE),
    _kind("Glm4ForCausalLM", "norms before and after", _WIDE),
    _kind("Glm4MoeForCausalLM", "mixture", _WIDE, _ROUTED),
    _kind("Glm4MoeLiteForCausalLM", "latent attention, mixture", _LATENT, _ROUTED),
    _kind("GPT2LMHeadModel", "learned positions, tied", _OLD),
    _kind("GPTBigCodeForCausalLM", "learned positions, one key", _OLD),
    _kind("GPTJForCausalLM", "parallel, rotary in part", _OLD, rotary_dim=4),
    _kind("GPTNeoForCausalLM", "learned positions, local attention", num_layers=3, num_heads=4,
          attention_types=[[["global", "local", "global"], 1]], window_size=4),
    _kind("GPTNeoXForCausalLM", "parallel, rotary in part"),
    _kind("GPTNeoXForCausalLM", "sequential", use_parallel_residual=False),
    _kind("GptOssForCausalLM", "attention sinks, mixture, sliding windows", _LOCAL, _WIDE,
          _SLIDING),
    _kind("GraniteForCausalLM", "scaled embeddings, residual and logits", _SCALED, _GROUPED,
          embedding_multiplier=3.0),
    _kind("GraniteMoeForCausalLM", "mixture, scaled logits", _SCALED, _LOCAL, _GROUPED),
    _kind("HunYuanDenseV1ForCausalLM", "normed queries and keys", _WIDE),
    _kind("Jais2ForCausalLM", "squared ReLU, biases", _GROUPED),
    _kind("JambaForCausalLM", "Mamba and attention", num_experts=2, attn_layer_period=2,
          attn_layer_offset=1, mamba_d_state=4),
    _kind("JetMoeForCausalLM", "mixture of attentions", _LOCAL, kv_channels=8,
          num_key_value_heads=2),
    _kind("LagunaForCausalLM", "mixture, sliding windows", _MIXTURE, _WIDE, _SLIDING,
          shared_expert_intermediate_size=16),
    _kind("Lfm2ForCausalLM", "convolutions and attention", _GROUPED,
          layer_types=["conv", "full_attention", "conv"], block_multiple_of=8),
    _kind("LlamaForCausalLM", "grouped queries, untied", _GROUPED),
    _kind("LlamaForCausalLM", "tied, biases", _GROUPED, tie_word_embeddings=True,
          attention_bias=True, mlp_bias=True),
    _kind("Llama4ForCausalLM", "mixture, chunked attention", _WIDE, num_local_experts=4,
          num_experts_per_tok=1, intermediate_size_mlp=48, moe_layers=[1],
          no_rope_layers=[1, 0, 1], attention_chunk_size=4),
    _kind("MambaForCausalLM", "Mamba"),
    _kind("MiniMaxM2ForCausalLM", "mixture", _LOCAL, _WIDE, rotary_dim=4),
    _kind("Ministral3ForCausalLM", "scaled queries", _WIDE),
    _kind("MistralForCausalLM", "sliding windows", _GROUPED, sliding_window=4),
    _kind("MixtralForCausalLM", "mixture", _LOCAL, _GROUPED),
    _kind("ModernBertDecoderForCausalLM", "head with a layer of its own",
          layer_types=_SLIDING["layer_types"], local_attention=8),
    _kind("MptForCausalLM", "ALiBi, no biases", d_model=32, n_heads=4, n_layers=3,
          max_seq_len=N_CTX, expansion_ratio=2),
    _kind("NanoChatForCausalLM", "norms without weights, soft caps", _GROUPED),
    _kind("NemotronForCausalLM", "LayerNorm of 1 + weight", _GROUPED),
    _kind("OlmoForCausalLM", "norms without weights", _GROUPED),
    _kind("Olmo2ForCausalLM", "norms after parts", _GROUPED),
    _kind("Olmo3ForCausalLM", "norms after parts, sliding windows", _SLIDING, _GROUPED),
    _kind("OlmoeForCausalLM", "mixture", _GROUPED, num_experts=4, num_experts_per_tok=2),
    _kind("OpenAIGPTLMHeadModel", "norms after the residual", _OLD),
    _kind("OPTForCausalLM", "learned positions", ffn_dim=48, word_embed_proj_dim=32),
    _kind("PhiForCausalLM", "parallel, biased head", partial_rotary_factor=0.5),
    _kind("Phi3ForCausalLM", "fused matrices, sliding windows", _GROUPED, sliding_window=4),
    _kind("Qwen2ForCausalLM", "biased queries, sliding windows", _SLIDING, _GROUPED,
          use_sliding_window=True),
    _kind("Qwen2MoeForCausalLM", "mixture", _MIXTURE, _GROUPED,
          shared_expert_intermediate_size=16),
    _kind("Qwen3ForCausalLM", "normed queries and keys", _WIDE),
    _kind("Qwen3MoeForCausalLM", "mixture", _MIXTURE, _WIDE),
    _kind("Qwen3NextForCausalLM", "linear attention", _MIXTURE, _WIDE, _LINEAR,
          shared_expert_intermediate_size=16),
    _kind("RecurrentGemmaForCausalLM", "recurrence and attention", lru_width=32,
          attention_window_size=4, block_types=["recurrent", "recurrent", "attention"]),
    _kind("RobertaForMaskedLM", "encoder", type_vocab_size=1, max_position_embeddings=80),
    _kind("RwkvForCausalLM", "recurrence", attention_hidden_size=32),
    _kind("SeedOssForCausalLM", "grouped queries, biases", _WIDE),
    _kind("SmolLM3ForCausalLM", "positions in some blocks", _GROUPED, no_rope_layers=[1, 0, 1]),
    _kind("StableLmForCausalLM", "parallel, rotary in part", _GROUPED,
          use_parallel_residual=True, use_qkv_bias=True),
    _kind("Starcoder2ForCausalLM", "sliding windows, biases", _GROUPED, sliding_window=4),
    _kind("T5ForConditionalGeneration", "encoder and decoder", d_model=32, d_kv=8, d_ff=48,
          num_layers=3, num_heads=4),
    _kind("VaultGemmaForCausalLM", "sliding windows", _WIDE, _SLIDING),
    _kind("XGLMForCausalLM", "sinusoidal positions", d_model=32, ffn_dim=48, num_layers=3,
          attention_heads=4),
    _kind("YoutuForCausalLM", "latent attention", _LATENT),
]  # fmt: skip


def built(kind: Kind) -> tuple[Plain, Any]:
    """The plain copy, and the bridge over the model."""
    model_class = getattr(transformers, kind.name)
    config = model_class.config_class(**_USUAL | kind.config, architectures=[kind.name])
    model = random_model(config)
    model.set_attn_implementation("eager")
    plain = Plain(copy.deepcopy(model))
    bridge = bridge_from_huggingface(model, None, f"tiny {kind.name}")
    if kind.name.endswith("MaskedLM"):
        bridge.tokenizer = tiny_tokenizer()
    return plain, bridge


class Plain:
    """A model of transformers, read and changed by torch's own hooks on its modules."""

    _ATTENTION = ("self_attn", "attn", "attention", "self_attention", "attention.self")
    _MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2", "output.dense")
    _PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "attention.out_proj")

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Falcon's blocks keep to another implementation, whatever is asked for.
        for config in (getattr(module, "config", None) for module in model.modules()):
            if config is not None:
                config._attn_implementation = "eager"

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks."""
        lists = (m for m in self.model.modules() if isinstance(m, nn.ModuleList))
        return next(
            m for m in lists if len(m) == N_LAYERS and next(m.parameters(), None) is not None
        )

    def part(self, block: int, place: str) -> nn.Module:
        """The module that writes a place, or for heads the one that reads them."""
        layer = self.blocks[block]
        if place == "mlp_out":
            return _first(layer, self._MLP)
        attention = _first(layer, self._ATTENTION)
        return attention if place == "attn_out" else _first(attention, self._PROJECTION)

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Its logits, with the positions that padding leaves."""
        arguments = {"input_ids": tokens, "attention_mask": mask.long(), "use_cache": False}
        known = inspect.signature(self.model.forward).parameters
        # RoBERTa counts its positions itself.
        if "position_ids" in known and "Roberta" not in type(self.model).__name__:
            arguments["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        arguments = {name: value for name, value in arguments.items() if name in known}
        with torch.no_grad():
            return self.model(**arguments).logits


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    raise LookupError(f"{type(module).__name__} has none of {names}")
