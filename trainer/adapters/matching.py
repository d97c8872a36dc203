"""Checks that an adapter fits a model and changes it. peft and vLLM silently skip weights that match no layer.

In: an adapter's folder, its model. Out: ModelError, naming weights that match no layer or cannot be added to it; the
layers whose update is zero. Loads the adapter's weights, never the model's.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from client.errors import ModelError, reason_of
from trainer.adapters.adapter import WEIGHTS, read_config
from trainer.adapters.model_folder import ModelFolder

NAME_PREFIX = "base_model.model."
"""Prefix of every name in an adapter's file. The name in the model follows it."""
LORA = ".lora_"
TOKEN_ROWS = ".token_adapter."
"""Follows the name of an embedding that has trained rows (trainable_token_indices)."""
HALVES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
"""A layer's update is the product of an A and a B. If one of them is zero, so is the update."""
BIASES = (".lora_B.bias", ".lora_embedding_B.bias")
"""Follow the name of a layer to which the adapter adds a bias (lora_bias)."""
UNSERVED = {
    "layer_replication": "repeats layers of its model",
    "alora_invocation_tokens": "acts only behind certain tokens",
}
"""PEFT settings that neither a merged model nor vLLM supports, and what each does."""


def check_matches(adapter: Path, base: ModelFolder) -> None:
    """Raise ModelError unless each weight of the adapter belongs to a layer of the model, and no half is missing."""
    config = read_config(adapter)
    for setting, what in UNSERVED.items():
        if value := config.get(setting):
            raise ModelError(
                f"{adapter} {what} ({setting}: {value}); neither can PEFT merge that, nor vLLM serve it: train an"
                f" adapter without {setting}"
            )
    names = _names(adapter)
    layers = {name.partition(LORA)[0] for name in names if LORA in name}
    wanted = layers | {name.partition(TOKEN_ROWS)[0] for name in names if LORA not in name}
    if lost := sorted(wanted - base.names):
        raise ModelError(
            f"{adapter} does not fit {base}: {len(lost)} of its {len(wanted)} layers are not in the model, such as"
            f" {lost[0]!r}; give the model that the adapter was trained on"
        )
    biased = {name.removesuffix(bias) for name in names for bias in BIASES if name.endswith(bias)}
    if unbiased := sorted(layer for layer in biased if f"{layer}.bias" not in base.names):
        raise ModelError(
            f"{adapter} adds a bias (lora_bias) to {len(unbiased)} layers that have none in {base}, such as"
            f" {unbiased[0]!r}; neither can PEFT merge that, nor vLLM serve it: train an adapter without lora_bias"
        )
    for layer in sorted(layers):
        halves = {half for half in HALVES if any(name.startswith(f"{layer}.{half}") for name in names)}
        if len(halves) != 2:
            raise ModelError(f"{adapter}/{WEIGHTS} is damaged: {layer} has only {', '.join(halves)}; copy it again")


def has_effect(adapter: Path) -> bool:
    """Whether any layer's update is not zero. In an untrained LoRA adapter all are zero."""
    with safe_open(adapter / WEIGHTS, "pt") as weights:
        # Any weight that is not a half replaces one of the model's own.
        if any(not any(f".{half}" in name for half in HALVES) for name in weights.keys()):  # noqa: SIM118 - no mapping
            return True
    return not all(_is_zero(adapter).values())


def idle_layers(adapter: Path) -> list[str]:
    """The layers whose update is zero while others' are not: no gradient reached them. Empty if all are zero."""
    zero = _is_zero(adapter)
    idle = sorted(layer.removeprefix(NAME_PREFIX) for layer, nothing in zero.items() if nothing)
    return idle if len(idle) < len(zero) else []


def _is_zero(adapter: Path) -> dict[str, bool]:
    """For each layer, whether one of its halves is zero."""
    zero: dict[str, bool] = {}
    with safe_open(adapter / WEIGHTS, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping
            if any(f".{half}" in name for half in HALVES):
                layer = name.partition(LORA)[0]
                zero[layer] = zero.get(layer, False) or not weights.get_tensor(name).any()
    return zero


def _names(adapter: Path) -> list[str]:
    """The names of the adapter's weights, in the model's spelling."""
    try:
        with safe_open(adapter / WEIGHTS, "pt") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{adapter}/{WEIGHTS} cannot be read: {reason_of(error)}; copy it again") from error
    if not names:
        raise ModelError(f"{adapter}/{WEIGHTS} holds no weights; train the adapter again")
    if strays := [name for name in names if not name.startswith(NAME_PREFIX)]:
        raise ModelError(
            f"{adapter}/{WEIGHTS} is not in PEFT's format: {strays[0]!r} does not begin with {NAME_PREFIX!r}; save it"
            " with PEFT's save_pretrained"
        )
    # PEFT saves an embedding or LM head under the name of the wrapped layer.
    return [name.removeprefix(NAME_PREFIX).replace(".base_layer", "") for name in names]
