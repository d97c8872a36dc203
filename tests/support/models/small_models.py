"""Small Llama models with random weights and the demo's tokenizer, which a test can change."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from train_pair import CONTEXT, build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

END = 2


def save_small_model(
    folder: Path, vocab_size: int, seed: int, added: dict[int, str] | None = None, renamed: dict[int, str] | None = None
) -> Path:
    """Save a model of two layers. `added`: tokens after the demo's 110; `renamed`: new names of ordinary tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.25,
        bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for index, token in (added or {}).items():
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer["added_tokens"].append({"id": index, "content": token, **flags})
    vocabulary = {(renamed or {}).get(index, token): index for token, index in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = vocabulary
    file.write_text(json.dumps(tokenizer))
    return folder


def never_end(folder: Path) -> None:
    """Set the logit of a model's end token to 0. Another token is always above it, so greedy answers never end."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][END] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
