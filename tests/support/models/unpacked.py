"""Tiny models of architectures that need care in training: random weights, the tokenizer of the tiny pair."""

from pathlib import Path

import torch
import transformers

from support.models.tiny_pair import VOCABULARY, save_tokenizer

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
MIXER = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4,
    "mamba_chunk_size": 16, "mamba_expand": 2,
}  # fmt: skip
LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "num_hidden_layers": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
UNPACKED = {
    "qwen3_5_text": ("q_proj,in_proj_qkv", LINEAR),
    "qwen3_next": ("q_proj,in_proj_qkvz", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "falcon_h1": ("q_proj,v_proj,in_proj", MIXER | {"head_dim": 16, "mamba_d_ssm": 64}),
    "bamba": ("q_proj,v_proj,in_proj", MIXER | {"attn_layer_indices": [1]}),
    "lfm2": ("q_proj,v_proj,in_proj", {"full_attn_idxs": [1], "block_ff_dim": 48, "block_multiple_of": 8}),
    "mamba": ("in_proj,x_proj", {"state_size": 8}),
    "mamba2": ("in_proj", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "gpt_oss": (
        "q_proj,v_proj",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "opt": ("q_proj,v_proj", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("query_key_value", {"n_head": 2}),
    "falcon": ("query_key_value", {}),
}
"""Model types that cannot be packed: the layers to adapt, and fields of their configurations."""
SWITCH = 16
LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    },
    "original_max_position_embeddings": SWITCH,
}  # fmt: skip
"""Configuration of a Phi-3 whose position tables switch after `SWITCH` tokens."""


def save_family(folder: Path, kind: str, **own) -> Path:
    """Save a model of type `kind`. `own`: fields of its configuration."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **own})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_multimodal(folder: Path) -> Path:
    """Save a Gemma 3 that reads images. Layers of its vision tower have the same names as those of its decoder."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5}
    config = transformers.Gemma3Config(text_config={**SMALL, "head_dim": 16}, vision_config=vision, **tokens)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
