"""Adds a LoRA adapter to the expert, and makes its forward pass compute the contrast loss.

In: a loaded model, the adapter's settings. Out: a PeftModel whose forward takes a batch and returns `StepSums`.
The loss is computed inside forward because DDP and FSDP wrap only that call. Knows nothing of RUNs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from client.errors import ModelError
from trainer.settings import ALL_LINEAR, Lora
from trainer.training.loss import StepSums, contrast_sums

LINEAR = nn.Linear, Conv1D  # GPT-2's
NOISE = re.compile(r"drop|^(?:input_)?jitter_noise$")
"""Matches names of attributes that hold a dropout rate, or the amount of noise that a layer adds."""
FACTORS = "logit_scale", "lm_head_multiplier", "output_multiplier"
DIVISORS = "logits_scaling", "logits_mup_width_multiplier"
CAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
"""Fields of config.json by which model families multiply, divide and cap the logits of their LM head."""
MULTIPLIES = "hyperclovax"
"""The model type that multiplies by a field of `DIVISORS`."""
ADAPTER_ALONE: dict[str, Any] = {"save_embedding_layers": False}
"""Options of PEFT's functions that return or save an adapter: by default they ask the Hub whether embeddings changed.
"""


class Head:
    """Computes logits from the decoder's last hidden states, as the model's own forward pass does.

    Some models change the logits after the LM head: Cohere and Falcon-H1 multiply them, Granite and Inkling divide
    them, Gemma 2, RecurrentGemma and xLSTM apply a tanh. Fields of the configuration say so.
    `trainer.training.packing_check` compares the result with the model's own logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.linear: nn.Module = model.get_output_embeddings()
        self.vocab_size: int = self.linear.weight.shape[0]
        divisor = _first_of(config, DIVISORS) or 1.0
        self.scale: float = _first_of(config, FACTORS) or 1.0
        self.scale *= divisor if config.model_type == MULTIPLIES else 1 / divisor
        self.softcap = _first_of(config, CAPS)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, d] to [n, V]."""
        logits = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def _first_of(config: PreTrainedConfig, names: Iterable[str]) -> float | None:
    """The value of the first of these fields that the configuration sets; None if it sets none."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def with_lora(model: PreTrainedModel, name: str, lora: Lora, rounded: bool = True) -> PeftModel:
    """The model with a new adapter, which is in float32, whatever the model's type, and records `name` as its base.

    With a model in half precision the update is computed in that type, as in vLLM. It is computed in float32 with DoRA,
    and if `rounded` is False, as in early versions.

    Raises ModelError if the model lacks one of the layers, or if one cannot take LoRA.
    """
    check_targets(model, name, lora)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora,
        use_dora=lora.use_dora, target_modules=lora.target_modules, exclude_modules=left_out(model, lora),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"--targets: {name} cannot take the adapter on {', '.join(lora.targets)}: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = name
    whole: Any = adapted
    whole.save_pretrained = functools.partial(adapted.save_pretrained, **ADAPTER_ALONE)
    if rounded and model.dtype != torch.float32 and not lora.use_dora:
        multiply_in_the_models_type(adapted)
    compute_loss_in_forward(adapted)
    return adapted


def multiply_in_the_models_type(adapted: PeftModel) -> None:
    """Round A and B to the model's type where they are multiplied, which a GPU does faster. They stay in float32."""
    for layer in adapted.modules():
        if isinstance(layer, Linear):
            layer.cast_input_dtype_enabled = False
            for half in (*layer.lora_A.values(), *layer.lora_B.values()):
                half.forward = functools.partial(_rounded, half)


def _rounded(layer: Any, states: Tensor) -> Tensor:
    return nn.functional.linear(states, layer.weight.to(states.dtype))


def decoder_of(model: Any) -> Any:
    """The module that turns ids into the states that the LM head reads. transformers' `get_decoder` returns a model
    with its head for Llama 4, and the head itself for ModernBERT's decoder.
    """
    found, head, embedding = model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()
    if found is head:
        found = model
    while any(module is head for module in found.modules()):
        inner = (part for part in found.children() if any(module is embedding for module in part.modules()))
        if (part := next(inner, None)) is None:
            break
        found = part
    return found


def text_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that text goes through, by name: the decoder with its modules, and the LM head."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    inner = {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in inner}


def beside_the_text(model: PreTrainedModel) -> str | None:
    """A pattern for layers that no text goes through, such as a vision tower's. An adapter there would stay untrained.

    None if the model has no such layers.
    """
    text = text_modules(model)
    if all(name in text for name, module in model.named_modules() if isinstance(module, nn.Linear)):
        return None
    roots = [name for name in text if name.rpartition(".")[0] not in text]
    return rf"(?!(?:{'|'.join(map(re.escape, roots))})(?:\.|$)).*"


def unfit(model: PreTrainedModel) -> set[str]:
    """Last names of the linear layers that cannot take LoRA: those that PEFT refuses, such as a Mamba's out_proj, and
    those that compute no plain product, such as routers of Llama 4 and Phi-3.5-MoE and the grouped one of DeepSeek-V4.
    """
    layers = {name: layer for name, layer in text_modules(model).items() if isinstance(layer, LINEAR)}
    names = {name.rpartition(".")[2] for name in layers}
    return {name for name in names if _is_refused(model, name)} | {
        name.rpartition(".")[2] for name, layer in layers.items() if not _gives_a_tensor(layer)
    }


def _is_refused(model: PreTrainedModel, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


@torch.no_grad()
def _gives_a_tensor(layer: nn.Module) -> bool:
    """Whether a layer's output is one row per token. A layer with its own `forward` is tried with one token."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    try:
        found = layer(layer.weight.new_zeros(1, layer.in_features))
    except (RuntimeError, TypeError, ValueError, IndexError):  # the layer of DeepSeek-V4 takes groups of features
        return False
    return isinstance(found, Tensor) and found.shape == (1, layer.out_features)


def left_out(model: PreTrainedModel, lora: Lora) -> str | None:
    """A pattern for layers that get no adapter although their names are targets; None if there are none."""
    odd = sorted(unfit(model)) if lora.targets == (ALL_LINEAR,) else []
    patterns = [beside_the_text(model), rf"(?:.*\.)?(?:{'|'.join(map(re.escape, odd))})" if odd else None]
    return "|".join(filter(None, patterns)) or None


def own_dropout(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """The model's own dropout and noise in training, as (module, attribute). Leaves out the adapter's dropout."""
    text = text_modules(model).values()
    adapters = {id(part) for layer in text if isinstance(layer, LoraLayer) for part in layer.lora_dropout.modules()}
    found = []
    for module in text:
        if id(module) in adapters:
            continue
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else filter(NOISE.search, vars(module))
        found += [(module, name) for name in names if isinstance(rate := getattr(module, name), float) and rate > 0]
    return found


def switch_off(dropout: list[tuple[nn.Module, str]]) -> None:
    """Set these rates of dropout and noise to 0."""
    for module, name in dropout:
        setattr(module, name, 0.0)


def check_targets(model: PreTrainedModel, name: str, lora: Lora) -> None:
    """Raises ModelError if a target cannot take LoRA, or names no layer (peft would silently ignore it)."""
    modules = text_modules(model)
    wanted = () if lora.targets == (ALL_LINEAR,) else lora.targets
    unknown = [target for target in wanted if not any(f".{module}".endswith(f".{target}") for module in modules)]
    odd = unfit(model) if wanted else set()
    refused = [target for target in wanted if target.rpartition(".")[2] in odd]
    if unknown or refused:
        linear = {path.rpartition(".")[2] for path, module in modules.items() if isinstance(module, LINEAR)} - odd
        why = (
            f"{name} has no layer {', '.join(unknown)}"
            if unknown
            else f"LoRA cannot be on {', '.join(refused)} of {name}"
        )
        raise ModelError(
            f"--targets: {why}; its linear layers are {', '.join(sorted(linear))}, or give {ALL_LINEAR} alone"
        )


def compute_loss_in_forward(adapted: PeftModel) -> None:
    """Replace the model's forward: it then takes a `trainer.data.packing.Batch` and returns `StepSums`."""
    model: Any = adapted.get_base_model()
    decoder, head = decoder_of(model), Head(model)

    def forward(
        input_ids: Tensor, position_ids: Tensor, kept: Tensor, label_ids: Tensor, label_weights: Tensor, **_: Any
    ) -> StepSums:
        states = hidden_states(decoder, input_ids, position_ids).flatten(0, 1)
        return contrast_sums(states[kept], head, label_ids, label_weights, head.vocab_size)

    model.forward = forward


def hidden_states(decoder: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[R, L] ids, as `trainer.data.packing` arranges them, to the states [R, L, d] that the LM head reads."""
    return decoder(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=None,
        use_cache=False,  # with a cache, transformers does not detect packed sequences
    ).last_hidden_state
