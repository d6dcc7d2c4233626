"""Tiny models with random weights, a word tokenizer and random tokens: no network, no downloads."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mspgt_lens.models import bridge_from_huggingface

ARCHITECTURES = ("llama", "qwen2", "gpt2", "neox", "gemma")
# Those that keep queries, keys and values in one matrix, or whose attention TransformerLens forms
# in another way.
MORE = (
    "bigcode",
    "bloom",
    "codegen",
    "falcon",
    "glm4",
    "gptj",
    "gptneo",
    "mixtral",
    "mpt",
    "opt",
    "phi3",
    "xglm",
)
ENCODERS = ("bert", "roberta")
NORM_KINDS = {"llama": "rms", "qwen2": "rms", "gpt2": "layer", "neox": "layer", "gemma": "rms"}
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"  # Encoders hide tokens under the last.
SPECIAL = (PAD, BOS, EOS, UNK)
N_HEADS = 4


def tiny_model(
    architecture: str,
    *,
    seed: int = 0,
    d_model: int = 32,
    n_layers: int = 4,
    vocab: int = 101,
    n_ctx: int = 256,
) -> Any:
    """A ``TransformerBridge`` with random weights, in evaluation mode and without a tokenizer."""
    config = tiny_config(architecture, d_model, n_layers, vocab, n_ctx)
    return bridge_from_huggingface(random_model(config, seed), None, f"tiny-{architecture}")


def random_model(config: Any, seed: int = 0) -> Any:
    """A model of transformers with random weights, in evaluation mode.

    The weights are far from a fresh initialization: blocks change the residual, norms have learned
    scales and shifts, and logits are spread, so that a mistake anywhere shows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, config.architectures[0])(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@cache
def tiny_tokenizer(vocab: int = 101) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words ``w4``, ``w5``, ...: the id of ``w7`` is 7; below 4 are special.

    Put it on a model as ``model.tokenizer = tiny_tokenizer()``: handing it to TransformerLens while
    building would make it look for files.
    """
    ids = {word: index for index, word in enumerate(SPECIAL)}
    ids |= {f"w{index}": index for index in range(len(SPECIAL), vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        cls_token=BOS,
        sep_token=EOS,
        mask_token=UNK,
    )


def random_tokens(
    n_prompts: int, n_pos: int, vocab: int = 101, seed: int = 0
) -> Int[Tensor, "prompt pos"]:
    """Tokens that are never special, each drawn near the one before, so that text has structure."""
    generator = torch.Generator().manual_seed(seed)
    n_ordinary = vocab - len(SPECIAL)
    start = torch.randint(n_ordinary, (n_prompts, 1), generator=generator)
    steps = torch.randint(-6, 9, (n_prompts, n_pos), generator=generator)
    return (start + steps.cumsum(dim=1)) % n_ordinary + len(SPECIAL)


def as_text(tokens: Int[Tensor, " pos"]) -> str:
    """The text that :func:`tiny_tokenizer` turns into these tokens."""
    return " ".join(f"w{int(token)}" for token in tokens)


def tiny_config(
    architecture: str, d_model: int = 32, n_layers: int = 4, vocab: int = 101, n_ctx: int = 256
) -> Any:
    """The configuration of a tiny model; its ``architectures`` name the class."""
    common: dict[str, Any] = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2}
    usual = common | {
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": n_ctx,
    }
    grouped = usual | {"num_key_value_heads": 2}
    encoder = {name: value for name, value in usual.items() if name not in common} | {
        "vocab_size": vocab
    }
    old = common | {"n_embd": d_model, "n_layer": n_layers, "n_head": N_HEADS, "n_positions": n_ctx}
    match architecture:
        case "bigcode":
            return transformers.GPTBigCodeConfig(**old, architectures=["GPTBigCodeForCausalLM"])
        case "bloom":
            sizes = {"hidden_size": d_model, "n_layer": n_layers, "n_head": N_HEADS}
            return transformers.BloomConfig(
                **common, **sizes, seq_length=n_ctx, architectures=["BloomForCausalLM"]
            )
        case "codegen":
            return transformers.CodeGenConfig(
                **old, rotary_dim=4, architectures=["CodeGenForCausalLM"]
            )
        case "falcon":
            return transformers.FalconConfig(**usual, architectures=["FalconForCausalLM"])
        case "glm4":
            head = {"head_dim": d_model // N_HEADS, "pad_token_id": 0}
            return transformers.Glm4Config(**grouped, **head, architectures=["Glm4ForCausalLM"])
        case "gptj":
            return transformers.GPTJConfig(**old, rotary_dim=4, architectures=["GPTJForCausalLM"])
        case "gptneo":
            kinds = [[["global", "local"], n_layers // 2]]
            sizes = {"hidden_size": d_model, "num_layers": n_layers, "num_heads": N_HEADS}
            return transformers.GPTNeoConfig(
                **common,
                **sizes,
                max_position_embeddings=n_ctx,
                attention_types=kinds,
                architectures=["GPTNeoForCausalLM"],
            )
        case "mixtral":
            return transformers.MixtralConfig(
                **grouped, num_local_experts=2, architectures=["MixtralForCausalLM"]
            )
        case "mpt":
            sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": N_HEADS}
            return transformers.MptConfig(
                vocab_size=vocab, **sizes, max_seq_len=n_ctx, architectures=["MptForCausalLM"]
            )
        case "opt":
            sizes = {"ffn_dim": 2 * d_model, "word_embed_proj_dim": d_model}
            return transformers.OPTConfig(**usual, **sizes, architectures=["OPTForCausalLM"])
        case "phi3":
            return transformers.Phi3Config(
                **grouped, pad_token_id=0, architectures=["Phi3ForCausalLM"]
            )
        case "xglm":
            sizes = {"d_model": d_model, "ffn_dim": 2 * d_model, "attention_heads": N_HEADS}
            return transformers.XGLMConfig(
                **common,
                **sizes,
                num_layers=n_layers,
                max_position_embeddings=n_ctx,
                architectures=["XGLMForCausalLM"],
            )
        case "llama":
            return transformers.LlamaConfig(**grouped, architectures=["LlamaForCausalLM"])
        case "qwen2":
            return transformers.Qwen2Config(**grouped, architectures=["Qwen2ForCausalLM"])
        case "gpt2":
            sizes = {"n_embd": d_model, "n_layer": n_layers, "n_head": N_HEADS}
            return transformers.GPT2Config(
                **common, **sizes, n_positions=n_ctx, architectures=["GPT2LMHeadModel"]
            )
        case "neox":
            return transformers.GPTNeoXConfig(**usual, architectures=["GPTNeoXForCausalLM"])
        case "gemma":
            head = {"num_key_value_heads": 1, "head_dim": d_model // N_HEADS}
            return transformers.GemmaConfig(**usual, **head, architectures=["GemmaForCausalLM"])
        case "bert":
            return transformers.BertConfig(
                **encoder, pad_token_id=0, architectures=["BertForMaskedLM"]
            )
        case "roberta":
            # Its positions begin after that of padding.
            return transformers.RobertaConfig(
                **encoder | {"max_position_embeddings": n_ctx + 1},
                pad_token_id=0,
                type_vocab_size=1,
                architectures=["RobertaForMaskedLM"],
            )
    raise ValueError(
        f"architecture must be one of {ARCHITECTURES + MORE + ENCODERS}, got {architecture!r}"
    )
