"""A model's folder: its fingerprint, its configuration, and its weights, which are loaded on demand.

In: a folder, or a Hugging Face Hub id. Out: a `ModelFolder`, which is made once and passed on. Never writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from client.errors import ModelError
from client.models.fingerprints import model_fingerprint, model_folder
from trainer.settings import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine. Each property is computed once, at its first use.

    A property raises ModelError if the folder lacks what it needs.
    """

    path: Path
    hub_id: str | None = None  # None: the user named the folder

    @classmethod
    def find(cls, model: str) -> ModelFolder:
        """The model at a folder, or with a Hub id, downloaded if needed. Raises ModelError if it is neither."""
        path = model_folder(model)
        return cls(path, None if path == Path(model) else model)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name that an adapter records: a Hub id, or the folder's full path."""
        return self.hub_id or str(self.path.absolute())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights, as hex digits."""
        return model_fingerprint(self.path)

    @cached_property
    def configuration(self) -> PreTrainedConfig:
        """config.json, as transformers reads it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{self} has no config.json that transformers can read: {reason}") from error

    @property
    def vocab_size(self) -> int:
        """Columns of the LM head."""
        return self.configuration.get_text_config().vocab_size

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens; None if config.json names no limit."""
        return getattr(self.configuration.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type in config.json; if there is none, float32, which can hold all others exactly."""
        import torch

        named = self.configuration.dtype or torch.float32
        return getattr(torch, named) if isinstance(named, str) else named

    def dtype_for(self, precision: Precision | None) -> torch.dtype:
        """The type to load the weights in. None: bfloat16 on a GPU, float32 on a CPU."""
        import torch

        precision = precision or default_precision()
        return self.dtype if precision == Precision.AUTO else getattr(torch, precision)


def default_precision() -> Precision:
    """The default type on this machine: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return Precision.BFLOAT16 if torch.cuda.is_available() else Precision.FLOAT32


def load(model: ModelFolder, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model with its weights in `dtype`. Raises ModelError if it is not a causal language model.

    `attention`: attn_implementation of transformers; None lets transformers choose.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModelForCausalLM.from_pretrained(model.path, config=model.configuration, dtype=dtype, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        using = f" with --attention {attention}" if attention else ""
        raise ModelError(f"{model} cannot be loaded as a causal language model{using}: {error}") from error
