"""Finds a pair's files: an engine argument that names files must hold for the whole service, or is rejected.

In: the `expert:` and `amateur:` sections. Out: a folder for each, or a SettingsError that names the argument and the
remedy. vLLM alone would read such an argument, while checks, prompts, fingerprints and cards read the model's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from client.models.fingerprints import model_folder
from server.settings import ROLES, Role, ServerSettings, SettingsError

DOWNLOAD = ("revision", "download_dir", "hf_token")
"""Arguments for the download of a model from the Hugging Face Hub. A local folder needs none of them."""
ONE_FOLDER = "the service reads a model's files from one folder"
REFUSED = {
    "code_revision": f"{ONE_FOLDER}; 'revision' holds for code too",
    "config_format": f"{ONE_FOLDER}, with a config.json in Hugging Face format",
    "convert": "the service needs a model that generates text",
    "default_mm_loras": "merge the adapter first: lightreasoner-trainer merge",
    "enable_lora": "merge the adapter first: lightreasoner-trainer merge",
    "ignore_patterns": "the service reads all *.safetensors of a model, which fingerprints are made of",
    "hf_config_path": f"{ONE_FOLDER}; put config.json there",
    "model_weights": f"{ONE_FOLDER}; name it as the model",
    "override_generation_config": "requests say how the expert samples; stop_token_ids of a request name further ends",
    "runner": "the service needs a model that generates text",
    "served_model_name": "cards and run.json call a model as --expert and --amateur do",
    "skip_tokenizer_init": "the service needs the tokenizer",
    "tokenizer": f"{ONE_FOLDER}; put the tokenizer's files there",
    "tokenizer_mode": f"{ONE_FOLDER}, with a tokenizer.json",
    "tokenizer_revision": f"{ONE_FOLDER}; 'revision' holds for the tokenizer too",
    "tokens_only": "the service needs the tokenizer",
}
"""Arguments that would hold for a part of the service only, and what to do instead."""
HARMLESS: tuple[Any, ...] = (None, False, "", "auto", "hf", "generate", "none", {}, [])
"""Values of these arguments that change nothing."""
CHECKED = ("architectures", "auto_map", "eos_token_id", "is_encoder_decoder", "model_type", "vocab_size")
"""Fields of config.json that the service reads itself: `hf_overrides` would change them for vLLM alone."""
LOAD_FORMATS = (
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "bitsandbytes"
)  # fmt: skip
"""Formats of vLLM that read the folder's *.safetensors, which fingerprints are made of."""


def located(settings: ServerSettings) -> ServerSettings:
    """The settings with a local folder for each model, downloaded if needed.

    Raises SettingsError for an argument that only a part of the service can use, ModelError if a model does not exist.
    """
    return settings.model_copy(update={role: _located(role, getattr(settings, role)) for role in ROLES})


def _located(role: Role, section: dict[str, Any]) -> dict[str, Any]:
    for name, remedy in REFUSED.items():
        if section.get(name) not in HARMLESS:
            raise SettingsError(f"{role}.{name} is not supported: {remedy}")
    over = section.get("hf_overrides")
    for fields in (over, over.get("text_config")) if isinstance(over, dict) else ():
        for name in (name for name in CHECKED if name in (fields or ())):
            raise SettingsError(f"{role}.hf_overrides may not change {name}: {ONE_FOLDER}; change its config.json")
    if (form := section.get("load_format", "auto")) not in LOAD_FORMATS:
        formats = ", ".join(LOAD_FORMATS)
        raise SettingsError(f"{role}.load_format must be one of {formats}, which read *.safetensors; not {form!r}")
    model, revision = section["model"], section.get("revision")
    revision = None if revision is None else str(revision)  # YAML reads a commit of digits as a number
    if revision and Path(model).is_dir():
        raise SettingsError(
            f"{role}.revision {revision!r} has no effect on the local folder {model}; name a folder of that revision,"
            " or a Hub id 'owner/name'"
        )
    folder = model_folder(
        model,
        revision=revision,
        cache=section.get("download_dir"),
        token=section.get("hf_token"),
        code=bool(section.get("trust_remote_code")),
    )
    return {name: value for name, value in section.items() if name not in (*DOWNLOAD, *REFUSED)} | {
        "model": str(folder)
    }


def trusted(settings: ServerSettings) -> list[Role]:
    """The models whose own Python code may run, in checks and prompts as in the engine."""
    return [role for role in ROLES if getattr(settings, role).get("trust_remote_code")]
