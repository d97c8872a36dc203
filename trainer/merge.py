"""Folds an adapter into its base: a model folder that needs no adapter.

In: a model and an adapter made for it. Out: a full model folder, in the base's own dtype, with the base's
tokenizer and chat template byte for byte. Neither input is touched.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig

from client.errors import ModelError
from client.fingerprints import model_folder
from trainer.adapter import check_base, new_folder, read_config
from trainer.base import load, stored_dtype

COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
)


def merge(model: str, adapter: str, output: str) -> Path:
    """Merge an adapter into a model; returns the new folder.

    The sum W + (alpha / r) * B A is taken in float32 and rounded once, to the dtype in which the base is stored.
    Raises ModelError where the adapter was made for another base or `output` is taken.
    """
    base, adapter_folder = model_folder(model), Path(adapter)
    read_config(adapter_folder)
    check_base(adapter_folder, base)
    out = new_folder(output)
    whole = load(base, torch.float32)
    try:
        merged = PeftModel.from_pretrained(whole, adapter_folder).merge_and_unload()
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"{adapter} does not fit {base}, or is damaged: {error}") from error
    # The base's own file is copied: transformers refuses to save one whose values it finds odd.
    merged.generation_config = GenerationConfig()
    merged.to(stored_dtype(base)).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    for pattern in COPIED_FILES:
        for file in base.glob(pattern):
            shutil.copy(file, out / file.name)
    return out
