"""Folds an adapter into its base: a model folder that needs no adapter.

In: a model and an adapter made for it. Out: a full model folder, in the base's own dtype unless another is asked for,
with the base's tokenizer and chat template byte for byte, and how much of the update the rounding took. Neither input
is touched.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import GenerationConfig

from client.errors import ModelError
from client.fingerprints import model_folder
from trainer.adapter import adapter_folder, check_base, new_folder, read_config
from trainer.base import load, weights_dtype
from trainer.settings import Precision

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
WARN_ABOVE = 0.1
"""Share of the update's norm that rounding may take before one is warned."""


@dataclass(frozen=True)
class Merged:
    """A merged model. `lost`: ||rounded - exact|| / ||update|| over all merged weights, 0 where nothing was rounded."""

    folder: Path
    dtype: torch.dtype
    lost: float

    @property
    def too_much_lost(self) -> bool:
        return self.lost > WARN_ABOVE


def merge(model: str, adapter: str, output: str, dtype: Precision = Precision.AUTO) -> Merged:
    """Merge an adapter into a model.

    The sum W + scale * B A is taken in float32 and rounded once, to `dtype`; auto is the one in which the base is
    stored. A small update to large weights is mostly rounding: what is lost is measured.
    Raises ModelError where the adapter was made for another base or `output` is taken.
    """
    base, made = model_folder(model), adapter_folder(adapter)
    read_config(made)
    check_base(made, base)
    out = new_folder(output)
    target = weights_dtype(dtype, base)
    whole = load(base, torch.float32)
    try:
        adapted = PeftModel.from_pretrained(whole, made)
        lost = _merge_layers(adapted, target)
        merged = adapted.unload()
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"{adapter} does not fit {base}, or is damaged: {error}") from error
    # The base's own file is copied: transformers refuses to save one whose values it finds odd.
    merged.generation_config = GenerationConfig()
    merged.to(target).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    for pattern in COPIED_FILES:
        for file in base.glob(pattern):
            shutil.copy(file, out / file.name)
    return Merged(out, target, lost)


def _merge_layers(adapted: PeftModel, target: torch.dtype) -> float:
    """Merge every adapted layer in place; returns the share of the update's norm that rounding to `target` takes."""
    update_squares = lost_squares = 0.0
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        exact = layer.get_base_layer().weight.detach()
        update_squares += float((exact - before).square().sum(dtype=torch.float64))
        lost_squares += float((exact.to(target).float() - exact).square().sum(dtype=torch.float64))
    return math.sqrt(lost_squares / update_squares) if update_squares else 0.0
