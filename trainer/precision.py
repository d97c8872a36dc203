"""What `Precision` means for a model: a torch dtype. Loads no weight."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from trainer.settings import Precision


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that a model's config.json names; float32, which holds every other exactly, where it names none."""
    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def weights_dtype(precision: Precision | None, folder: Path) -> torch.dtype:
    """The type to load a model in; without a choice bfloat16 on a GPU and float32 on a CPU."""
    if precision is None:
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return stored_dtype(folder) if precision == Precision.AUTO else getattr(torch, precision)
