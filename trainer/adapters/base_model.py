"""The base model's folder, as transformers reads it: its configuration, its type, its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from client.errors import ModelError
from trainer.settings import Precision


def config_of(folder: Path) -> PreTrainedConfig:
    """config.json. Raises ModelError where there is none, or none that the installed transformers knows."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder} has no config.json that transformers can read: {reason}") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that a model's config.json names; float32, which holds every other exactly, where it names none."""
    dtype = config_of(folder).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def weights_dtype(precision: Precision | None, folder: Path) -> torch.dtype:
    """The type to load a model in; without a choice bfloat16 on a GPU and float32 on a CPU."""
    precision = precision or default_precision()
    return stored_dtype(folder) if precision == Precision.AUTO else getattr(torch, precision)


def default_precision() -> Precision:
    """What this machine is best at."""
    return Precision.BFLOAT16 if torch.cuda.is_available() else Precision.FLOAT32


def load(folder: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model with its weights in `dtype`. Raises ModelError where it is no causal language model.

    `attention`: transformers' attn_implementation; None leaves the choice to it.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, config=config_of(folder), dtype=dtype, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        using = f" with --attention {attention}" if attention else ""
        raise ModelError(f"{folder} cannot be loaded as a causal language model{using}: {error}") from error
