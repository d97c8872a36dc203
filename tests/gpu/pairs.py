"""Pairs to check with: the demo's, and pairs of Qwen2.5's shapes with random weights, made on the spot.

Models with random weights are as fast and as large as trained ones. With small random weights a model would repeat its
last token, because Qwen2.5's LM head is its embedding. So here the last norm has random signs, and the head is scaled
so that its best tokens stand out as in a trained model. Texts are the demo's; ids beyond its 110 tokens have no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpu.card import apart
from support.models.qwen_shapes import QWEN_SHAPES
from support.servers.real_server import DEMO

LOGITS = 3.0
"""The standard deviation of a made model's logits, in nats."""
CONTEXT = 4096
AMATEUR = {"0.5b": "0.5b", "1.5b": "0.5b", "7b": "0.5b", "tiny": "tiny"}
"""The amateur's shape for each expert. Its random weights are others."""
NAMES = ("demo", *QWEN_SHAPES)


@dataclass(frozen=True)
class ModelPair:
    """Two model folders."""

    name: str
    expert: Path
    amateur: Path


def pair(name: str, folder: Path, device: str) -> ModelPair:
    """The pair of that name. Its models are made in `folder`, once."""
    if name == "demo":
        return ModelPair(name, DEMO / "expert", DEMO / "amateur")
    found = ModelPair(name, folder / f"expert-{name}", folder / f"amateur-{AMATEUR[name]}")
    for shape, made, seed in ((name, found.expert, 1), (AMATEUR[name], found.amateur, 2)):
        if not (made / "tokenizer.json").is_file():
            words = (shape, made, seed, device)
            apart(make, *words) if device == "cuda" else make(*words)
    return found


def make(shape: str, folder: Path, seed: int, device: str) -> None:
    """Make a model of a shape, in bfloat16."""
    import torch
    from train_pair import build_tokenizer
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        **QWEN_SHAPES[shape], max_position_embeddings=CONTEXT, rope_theta=1e6, rms_norm_eps=1e-6,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            norm = model.model.norm.weight
            norm.copy_(torch.randint(0, 2, norm.shape) * 2 - 1)
            model.lm_head.weight.normal_(0, LOGITS / config.hidden_size**0.5)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
