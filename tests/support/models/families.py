"""A tiny pair of each model family: its architecture with random weights, its template, tokens and end tokens.

Each trait of a family that changes its logits (soft caps, windows, multipliers) is strong enough to show in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from train_pair import CONTEXT, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from support.models.chat_templates import TEMPLATES

ORDINARY = 110
"""Tokens of the demo's tokenizer. A family's own tokens follow them."""
COLUMNS = 128
"""Columns of each LM head: more than there are tokens, as in Qwen."""
SHAPE: dict[str, Any] = {
    "vocab_size": COLUMNS, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": CONTEXT, "initializer_range": 0.25,
}  # fmt: skip
LAYERS = {"expert": 3, "amateur": 2}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 8
"""Tokens in a sliding window: fewer than any prompt has."""


@dataclass(frozen=True)
class Family:
    """The content of a family's files."""

    kind: str  # model_type of transformers
    form: str  # key in TEMPLATES
    tokens: tuple[str, ...]
    end: str
    begin: str | None = None
    ends: tuple[str, ...] = ()  # end tokens of the generation config; () means `end` alone
    shape: Mapping[str, Any] = field(default_factory=dict)
    windows: bool = False  # every other layer sees WINDOW tokens
    system_prompt: str | None = "Please reason step by step."
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def template(self) -> str:
        return TEMPLATES[self.form][0]

    @property
    def end_tokens(self) -> set[str]:
        """Every token at which the family's trajectories end."""
        return {self.end, *self.ends, TEMPLATES[self.form][1]} & {*self.tokens, "<|end|>", "<|assistant|>"}


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3 = (*CHATML, "<think>", "</think>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3 = {"sliding_window": WINDOW, "query_pre_attn_scalar": 48}
FAMILIES = {
    "Qwen2.5": Family("qwen2", "Qwen2.5-Math", CHATML, "<|im_end|>", shape={"tie_word_embeddings": True}),
    "Qwen2.5, base": Family("qwen2", "Qwen2.5-Math", CHATML, "<|endoftext|>", shape={"tie_word_embeddings": True}),
    "Qwen2.5-Math, base": Family("qwen2", "Qwen2.5-Math", CHATML, "<|endoftext|>"),
    "Qwen2.5-Math": Family(
        "qwen2", "Qwen2.5-Math", CHATML, "<|endoftext|>", ends=("<|im_end|>", "<|endoftext|>")
    ),
    "DeepSeek-R1-Distill-Qwen": Family(
        "qwen2", "R1-Distill",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>"),
        "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    ),
    "Qwen3": Family("qwen3", "Qwen3", QWEN3, "<|im_end|>", shape={"tie_word_embeddings": True}),
    "Qwen3 without thinking": Family(
        "qwen3", "Qwen3", QWEN3, "<|im_end|>", variables={"enable_thinking": False}
    ),
    "Qwen3-MoE": Family("qwen3_moe", "Qwen3", QWEN3, "<|im_end|>", shape=MOE),
    "Llama 3": Family(
        "llama", "Llama 3",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>", "<|begin_of_text|>", ends=("<|end_of_text|>", "<|eot_id|>"), shape={"rope_parameters": LLAMA3},
    ),
    "Mistral": Family(
        "mistral", "Mistral, which has no word for the assistant", ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>", "<s>", shape={"sliding_window": WINDOW}, system_prompt=None,
    ),
    "Gemma 2": Family(
        "gemma2", "Gemma", GEMMA, "<eos>", "<bos>", ends=("<eos>", "<end_of_turn>"), windows=True,
        shape={**GEMMA3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, system_prompt=None,
    ),
    "Gemma 3": Family(
        "gemma3_text", "Gemma", GEMMA, "<eos>", "<bos>", ends=("<eos>", "<end_of_turn>"), windows=True,
        shape=GEMMA3, system_prompt=None,
    ),
    "Gemma 3, multimodal": Family(
        "gemma3", "Gemma", (*GEMMA, "<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<eos>",
        "<bos>", ends=("<eos>", "<end_of_turn>"), windows=True, shape=GEMMA3, system_prompt=None,
    ),
    "Phi-3": Family(
        "phi3", "Phi-3", ("<s>", "<|endoftext|>"), "<|endoftext|>", "<s>",
        ends=("<|endoftext|>", "<|assistant|>", "<|end|>"), shape={"sliding_window": WINDOW},
    ),
    "Granite": Family(
        "granite", "Granite", ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        shape={"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
               "attention_multiplier": 0.1, "tie_word_embeddings": True},
    ),
    "Cohere": Family(
        "cohere", "Cohere",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", shape={"logit_scale": 0.4},
    ),
    "OLMo 2": Family(
        "olmo2", "OLMo 2, whose roles are plain text", ("<|endoftext|>",), "<|endoftext|>",
        "<|endoftext|>",
    ),
    "GPT-OSS": Family(
        "gpt_oss", "GPT-OSS, which closes a message within a turn otherwise",
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>"), "<|return|>", "<|startoftext|>",
        ends=("<|return|>",), windows=True,
        shape={"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    ),
}  # fmt: skip


def configuration_of(family: Family, role: str, **changed: Any) -> PreTrainedConfig:
    """The family's configuration, with a small shape."""
    layers = LAYERS[role]
    shape = {**SHAPE, "num_hidden_layers": layers, "bos_token_id": None, "pad_token_id": 0, **family.shape, **changed}
    if family.windows:
        shape["layer_types"] = ALTERNATING[:layers]
    if family.kind == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        return AutoConfig.for_model("gemma3", text_config=shape, vision_config=vision, mm_tokens_per_image=4)
    return AutoConfig.for_model(family.kind, **shape)


def save_family(
    folder: Path, family: Family, role: str, shard: str = "1GB", dtype: torch.dtype = torch.float32, **changed: Any
) -> Path:
    """Save a model of the family. `shard`: the largest size of a weights file; `changed`: fields of config.json."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    named = {"eos_token": family.end, **({"bos_token": family.begin} if family.begin else {})}
    tokenizer.add_special_tokens(named)
    ids = tokenizer.get_added_vocab()
    if family.begin:  # the tokenizers of Llama, Gemma and Mistral put it before every text
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.begin} $A", special_tokens=[(family.begin, ids[family.begin])]
        )
    tokenizer.chat_template = family.template
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends or (family.end,)]
    torch.manual_seed(LAYERS[role])
    config = configuration_of(family, role, **changed)
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at ones and zeros, which would hide a missing one
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = ends
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    if family.kind == "gemma3":
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
        processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


IMAGES = {
    "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor", "do_resize": True,
    "size": {"height": 28, "width": 28}, "do_rescale": True, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
"""preprocessor_config.json of a model that reads images."""
