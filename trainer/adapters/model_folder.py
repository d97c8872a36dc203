"""A model's folder: its fingerprint, its configuration, and its weights, which are loaded on demand.

In: a folder, or a Hugging Face Hub id. Out: a `ModelFolder`, which is made once and passed on. Never writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.errors import ModelError, reason_of, shown
from client.models.chat_template import ChatTemplate
from client.models.ends import end_token_ids
from client.models.fingerprints import (
    chat_template_digest,
    check_generation_config,
    model_fingerprint,
    model_folder,
)
from trainer.settings import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DEQUANTIZED = ("mxfp4",)
"""Quantisation methods whose weights transformers turns back into full ones on loading."""
UNCAPPED = "sdpa"
"""Attention implementation of transformers that silently ignores a model's soft cap. It is the usual one."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine. Each property is computed once, at its first use.

    A property raises ModelError if the folder lacks what it needs.
    """

    path: Path
    hub_id: str | None = None  # None: the user named the folder
    chat_template_file: Path | None = None  # takes the place of the folder's chat template

    @classmethod
    def find(cls, model: str, chat_template: Path | None = None) -> ModelFolder:
        """The model in a folder, or with a Hub id, downloaded if needed. Raises ModelError if `model` is neither.

        `chat_template`: a Jinja file that takes the place of its chat template.
        """
        path = model_folder(model)
        return cls(path, None if path == Path(model) else model, chat_template)

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
        """The configuration in config.json, read by transformers."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self} has no config.json that transformers can read: {reason_of(error)}") from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of tokenizer.json, unchanged, as on the server. AutoTokenizer rebuilds many differently."""
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.path)
        except Exception as error:  # tokenizers raises plain ones
            raise ModelError(f"{self} has no tokenizer.json that can be read: {reason_of(error)}") from error

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises ModelError if it has none."""
        return ChatTemplate(self.path, self.chat_template_file, self.tokenizer.special_tokens_map)

    @cached_property
    def template_digest(self) -> str | None:
        """SHA-256 of the chat template, as hex digits; None without a chat template."""
        return chat_template_digest(self.path, self.chat_template_file)

    @cached_property
    def end_token_ids(self) -> list[int]:
        """Every id at which an answer ends: the tokenizer's, the generation config's, the chat template's."""
        from transformers import GenerationConfig

        check_generation_config(self.path)
        try:
            configured = GenerationConfig.from_pretrained(self.path)
        except OSError:
            configured = GenerationConfig.from_model_config(self.configuration)
        template = self.template if self.template_digest else None
        return end_token_ids(
            self.tokenizer.eos_token_id, configured.eos_token_id, template, self.tokenizer.get_added_vocab()
        )

    @cached_property
    def kind(self) -> Any:
        """The transformers class of the model: the one that config.json names under `architectures`, as in vLLM. So
        both use the same layer names, also for multimodal models. By default AutoModelForCausalLM.
        """
        import transformers

        for name in self.configuration.architectures or []:
            found: Any = getattr(transformers, str(name), None)
            takes = isinstance(self.configuration, getattr(found, "config_class", None) or ())
            if takes and found.can_generate() and not self.configuration.is_encoder_decoder:
                return found
        if type(self.configuration) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"{self} is not a causal language model: transformers knows none of the type"
                f" {self.configuration.model_type!r} with architectures {shown(self.configuration.architectures)}"
            )
        return transformers.AutoModelForCausalLM

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all modules and parameters in transformers. Loads no weights."""
        import torch

        with torch.device("meta"):
            try:
                empty = getattr(self.kind, "from_config", None) or self.kind._from_config
                model = empty(self.configuration)
            except (ValueError, KeyError, ImportError) as error:
                raise ModelError(f"{self} is not a causal language model: {reason_of(error)}") from error
        return frozenset(name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)))

    @property
    def vocab_size(self) -> int:
        """Columns of the LM head."""
        return self.configuration.get_text_config().vocab_size

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens; None if config.json names no limit."""
        most = getattr(self.configuration.get_text_config(), "max_position_embeddings", None)
        return most if most and most > 0 else None  # XLNet's is -1

    @property
    def caps_attention(self) -> bool:
        """Whether the model caps its attention logits, as Gemma 2 does: softcap * tanh(logits / softcap)."""
        return bool(getattr(self.configuration.get_text_config(), "attn_logit_softcapping", None))

    def check_trainable(self) -> None:
        """Raise ModelError if transformers has no such causal language model, or if the weights are quantised by a
        method that is not in `DEQUANTIZED`: they can neither be trained nor merged into.
        """
        _ = self.kind
        stored = getattr(self.configuration, "quantization_config", None) or {}
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        method = stored.get("quant_method")
        if method and method not in DEQUANTIZED:
            name = getattr(method, "value", method)
            raise ModelError(
                f"{self} is quantised ({name}), and the trainer needs full weights: give the model that it was made"
                " from. If RUN was sampled with the quantised one, add --allow-mismatch"
            )

    def check_whole(self) -> None:
        """Raise ModelError if the files lack a tensor of the model, or hold a tensor that it does not have. Reads only
        names, mapped by transformers.

        vLLM does not report a missing tensor that it fuses with others, such as q_proj: it computes with uninitialised
        memory. Skips quantised models: their tensors have other names, and whoever loads them checks them.
        """
        if getattr(self.configuration, "quantization_config", None):
            return
        try:
            whole: Any = self.kind.from_pretrained(
                self.path, config=self.configuration, device_map="meta", output_loading_info=True
            )
        except Exception:  # transformers cannot load this model on the meta device: whoever loads it says why
            return
        _check_names(self, "lacks {} tensors", whole[1]["missing_keys"])
        _check_names(self, "has {} tensors unknown to its architecture", whole[1]["unexpected_keys"])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The weights' type in config.json, by default float32, which holds all others exactly."""
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
    """The model with its weights in `dtype`. Raises ModelError if it is damaged or not a causal language model.

    `attention`: attn_implementation of transformers; None: transformers chooses, but eager for a model with a soft cap.
    """
    from safetensors import SafetensorError

    if model.caps_attention and attention in (None, UNCAPPED):
        if attention:
            raise ModelError(
                f"{model} caps its attention (attn_logit_softcapping), which --attention {attention} leaves out: use"
                " eager, flash_attention_2 or flex_attention"
            )
        attention = "eager"
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        whole: Any = model.kind.from_pretrained(
            model.path, config=model.configuration, dtype=dtype, output_loading_info=True, **options
        )
        loaded, names = whole
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        using = f" with --attention {attention}" if attention else ""
        raise ModelError(f"{model} cannot be loaded as a causal language model{using}: {reason_of(error)}") from error
    _check_names(model, "lacks {} tensors", names["missing_keys"])
    _check_names(model, "has {} tensors unknown to its architecture", names["unexpected_keys"])
    return loaded


def _check_names(model: ModelFolder, what: str, odd: Iterable[str]) -> None:
    """Raise ModelError if `odd` names any tensor. `what`: what is wrong with so many tensors."""
    if listed := sorted(odd):
        raise ModelError(
            f"{model} is damaged, or not what its config.json says: it {what.format(len(listed))},"
            f" such as {listed[0]}; download or save the model again"
        )
