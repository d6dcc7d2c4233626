"""TransformerLens models over loaded Hugging Face models, without asking the hub."""

from __future__ import annotations

import copy
from typing import Any


def bridge_class() -> Any | None:
    """``TransformerBridge``, or None under TransformerLens 2."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    return TransformerBridge


def bridge_from_huggingface(model: Any, tokenizer: Any, name: str) -> Any:
    """A ``TransformerBridge`` over a loaded Hugging Face model, without asking the hub."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    # Other implementations never form the attention patterns that hooks read.
    model.set_attn_implementation("eager")
    # The bridge edits the configuration it is given.
    config = copy.deepcopy(model.config)
    architecture = (config.architectures or [type(model).__name__])[0]
    bridge = build_bridge_from_module(
        model, architecture, hf_config=config, tokenizer=tokenizer, model_name=name
    )
    placed = getattr(model, "hf_device_map", None) or {}
    # As TransformerLens sets it where it loads the model itself: it then refuses to move it.
    bridge.cfg.n_devices = max(1, len({str(device) for device in placed.values()}))
    return bridge


def hooked_llama_from_huggingface(model: Any, tokenizer: Any, name: str, n_ctx: int) -> Any:
    """A ``HookedTransformer`` over a loaded Hugging Face Llama, with no weight processing."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = model.config
    d_head = config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    cfg = HookedTransformerConfig(
        model_name=name,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=n_ctx,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_base=int(rope["rope_theta"]),
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
        init_weights=False,
        device="cpu",
    )
    hooked = HookedTransformer(cfg, tokenizer)
    hooked.load_and_process_state_dict(
        convert_llama_weights(model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()
