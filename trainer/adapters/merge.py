"""Merges an adapter into its model.

In: a model, and an adapter that was trained on it. Out: a complete model folder with the same tokenizer and chat
template, and how much of the adapter is left after rounding. Neither input is changed.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from client.errors import ModelError, reason_of
from trainer.adapters.adapter import adapter_folder, check_base, free_folder, make_folder, read_config
from trainer.adapters.matching import check_matches
from trainer.adapters.model_folder import ModelFolder, load
from trainer.settings import Precision

COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*processor_config.json",  # for images, audio and video
    "audio_tokenizer_config.json",
)
NOT_YET_WHOLE = "unfinished"
"""Folder in OUT to which files are written first, so that a killed merge leaves nothing that looks like a model."""
UNFIT = RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, ArithmeticError, re.error
"""Errors that PEFT raises for settings that it cannot use."""
LARGE_ERROR = 0.1
"""Rounding error, as a share of the update's norm, above which the merged model is no longer the trained one."""


@dataclass(frozen=True)
class Update:
    """The size of an adapter's update, and how much of it is left after rounding to `dtype`.

    D = fp32(W + adapter) - W and R = rounded(W + adapter) - W, over all adapted weights together.
    """

    dtype: torch.dtype
    relative: float  # ||D|| / ||W||
    surviving: float  # ||R|| / ||D||; above 1 if rounding moved the weights further from W
    error: float  # ||R - D|| / ||D||

    @property
    def is_damaged(self) -> bool:
        """Whether rounding changes the update by more than the share `LARGE_ERROR`."""
        return self.error > LARGE_ERROR


def merge(model: str, adapter: str, output: str, precision: Precision = Precision.AUTO) -> Update:
    """Merge an adapter into a model, and save the result to a new folder.

    The sum W + (alpha / r) * B A is computed in float32 and rounded once, to `precision`; by default this is the dtype
    of the stored model. Raises ModelError if the adapter was made for another model, or `output` is not empty.
    """
    base, made = ModelFolder.find(model), adapter_folder(adapter)
    read_config(made)
    check_base(made, base)
    base.check_trainable()
    check_matches(made, base)
    dtype = base.dtype_for(precision)
    out = free_folder(output)
    whole = load(base, torch.float32)
    try:
        adapted = PeftModel.from_pretrained(whole, made)
        untie(whole)
        check_unshared(adapted, adapter)
        update = merge_layers(adapted, dtype)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # peft: the layers are already merged
            merged = adapted.merge_and_unload()
    except (*UNFIT, SafetensorError) as error:
        raise ModelError(f"{adapter} does not fit {base}, or is damaged: {reason_of(error)}") from error
    make_folder(out)
    try:
        save(merged.to(dtype), base, out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{out} cannot be written ({error}): make room there, and repeat the command") from error
    return update


def save(merged: PreTrainedModel, base: ModelFolder, out: Path) -> None:
    """Write a merged model and the files that it shares with `base`. Moves them to `out` when all are written,
    config.json last.

    Raises OSError or SafetensorError, with nothing left in `out`.
    """
    unfinished = out / NOT_YET_WHOLE
    try:
        # The model's own file is copied below: transformers refuses to save some valid ones.
        merged.generation_config = GenerationConfig()
        merged.save_pretrained(unfinished)
        (unfinished / "generation_config.json").unlink(missing_ok=True)
        for pattern in COPIED_FILES:
            for file in filter(Path.is_file, base.path.glob(pattern)):
                copy = unfinished / file.relative_to(base.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)
        for weights_file in unfinished.glob("*.safetensors"):
            shutil.copymode(unfinished / "config.json", weights_file)  # safetensors makes it readable by its owner only
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def untie(model: PreTrainedModel) -> None:
    """Give a tied LM head its own weights if it or the embedding is adapted: the update belongs to only one of them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = [layer for layer in (head, embedding) if isinstance(layer, BaseTunerLayer)]
    if not adapted or not model.config.get_text_config().tie_word_embeddings:
        return
    inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    inner.weight = nn.Parameter(inner.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def check_unshared(adapted: PeftModel, adapter: str) -> None:
    """Raises ModelError if an adapted layer shares its weights with another, as in Zamba: their updates may differ.

    Trained rows of an embedding are allowed: PEFT applies them to a tied head, too.
    """
    uses = Counter(id(weight) for module in adapted.modules() for weight in module.parameters(recurse=False))
    for name, layer in adapted.named_modules():
        if (
            isinstance(layer, BaseTunerLayer)
            and not isinstance(layer, TrainableTokensLayer)
            and any(uses[id(weight)] > 1 for weight in layer.get_base_layer().parameters(recurse=False))
        ):
            raise ModelError(
                f"{adapter} cannot be merged: {name.removeprefix('base_model.model.')} shares its weights with another"
                " layer of the model, which has an update of its own, or none; use the adapter unmerged"
            )


def merge_layers(adapted: PeftModel, dtype: torch.dtype) -> Update:
    """Add the adapter to the weights of its layers, in place, and measure what rounding would leave of it.

    Only one layer's weights are held twice at a time. Raises ValueError if a sum is not finite.
    """
    squares = torch.zeros(4, dtype=torch.float64)
    for layer in (module for module in adapted.modules() if isinstance(module, BaseTunerLayer)):
        weights = dict(layer.get_base_layer().named_parameters(recurse=False))
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        layer.merge(safe_merge=True)  # raises ValueError if a sum is not finite
        for name, weight in layer.get_base_layer().named_parameters(recurse=False):
            old, new = before[name], weight.detach()
            whole, rounded = new - old, new.to(dtype).float() - old
            squares += torch.stack([part.double().square().sum() for part in (old, whole, rounded, rounded - whole)])
    weight, whole, rounded, lost = squares.sqrt().tolist()
    if not whole:  # an untrained adapter
        return Update(dtype, relative=0.0, surviving=1.0, error=0.0)
    return Update(dtype, whole / weight, rounded / whole, lost / whole)
