"""Checks whether two models may be contrasted, from their files, before an engine starts.

In: two model folders. Out: `PairFacts`, or a ModelError that names the token or file at fault.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.errors import ModelError, reason_of, shown
from client.models.chat_template import ChatTemplate
from client.models.fingerprints import (
    chat_template_digest,
    check_generation_config,
    model_config,
    model_fingerprint,
    shard_names,
    token_map,
    tokenizer_fingerprint,
)
from client.protocol.requests import TokenDifference
from server import models
from server.logs import log
from server.settings import Role, ServerSettings

GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of architectures that generate text; vLLM knows some others."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts from the files of one model."""

    folder: Path
    vocab_size: int  # columns of its head
    weight_bytes: int
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_digest: str | None
    trusted: bool  # whether the model's own Python code may run
    chat_template_file: Path | None = None  # a template in place of the folder's


@dataclass(frozen=True)
class PairFacts:
    """Two models that may be contrasted, and the ids of the expert that the amateur does not know."""

    expert: ModelFacts
    amateur: ModelFacts
    differences: list[TokenDifference]  # added tokens that differ between the two
    known: npt.NDArray[np.bool_]  # [expert's vocab_size], whether the id may be sent to the amateur


def inspect_models(settings: ServerSettings) -> tuple[ServerSettings, PairFacts]:
    """The settings with a local folder for each model, downloaded if needed, and facts from their files; logs both.

    Raises SettingsError or ModelError.
    """
    try:
        settings = models.located(settings)
        folders = Path(settings.expert["model"]), Path(settings.amateur["model"])
        facts = inspect_pair(*folders, models.trusted(settings), settings.chat_template)
    except OSError as error:
        raise ModelError(f"a model cannot be read ({error}); give a folder whose files this user may read") from error
    log.info("expert %s, amateur %s", facts.expert.folder, facts.amateur.folder)
    if facts.differences:
        listed = ", ".join(f"{entry.id} {entry.expert!r} / {entry.amateur!r}" for entry in facts.differences)
        log.info("added tokens that the amateur does not share (id expert / amateur): %s", listed)
    return settings, facts


def inspect_pair(
    expert: Path, amateur: Path, trusted: Collection[Role] = (), chat_template_file: Path | None = None
) -> PairFacts:
    """Compare two models' token maps and heads.

    `trusted`: the models whose own Python code may run. `chat_template_file`: a template in place of the expert's.

    Ordinary tokens must have the same id in both; raises ModelError naming the first that differs. Added tokens may
    differ: those ids, and ids beyond the amateur's head, are unknown to the amateur.
    """
    facts = _inspect(expert, "expert" in trusted, chat_template_file), _inspect(amateur, "amateur" in trusted)
    check_generation_config(expert)
    if facts[0].chat_template_digest or chat_template_file:
        ChatTemplate(expert, chat_template_file)  # finds an invalid template before an engine starts
    expert_tokens, expert_added = token_map(expert)
    amateur_tokens, amateur_added = token_map(amateur)
    differences = []
    for index in sorted(expert_tokens.keys() | amateur_tokens.keys()):
        mine, theirs = expert_tokens.get(index), amateur_tokens.get(index)
        if mine == theirs:
            continue
        if (mine is None or index in expert_added) and (theirs is None or index in amateur_added):
            differences.append(TokenDifference(id=index, expert=mine, amateur=theirs))
            continue
        raise ModelError(
            f"expert and amateur disagree on token {index}: {_shown(mine)} against {_shown(theirs)}; contrast needs"
            " one tokenizer: choose an amateur of the expert's family"
        )
    known = np.arange(facts[0].vocab_size) < facts[1].vocab_size
    different = [entry.id for entry in differences if entry.id < len(known)]
    known[different] = False
    return PairFacts(*facts, differences, known)


def _inspect(folder: Path, trusted: bool, chat_template_file: Path | None = None) -> ModelFacts:
    return ModelFacts(
        folder=folder,
        vocab_size=_vocab_size(folder, trusted),
        model_fingerprint=model_fingerprint(folder),
        weight_bytes=_weight_bytes(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        chat_template_digest=chat_template_digest(folder, chat_template_file),
        chat_template_file=chat_template_file,
        trusted=trusted,
    )


def _weight_bytes(folder: Path) -> int:
    """Bytes of the files that vLLM loads. Mistral's folders hold the same weights twice, once as `consolidated`."""
    files = [folder / name for name in shard_names(folder)]
    files = files or [file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")]
    return sum(file.stat().st_size for file in files or folder.glob("*.safetensors"))


def _vocab_size(folder: Path, trusted: bool) -> int:
    """Columns of the head. Raises ModelError if config.json is not a causal language model's."""
    config = model_config(folder)
    _check_causal(folder, config)
    size = config.get("vocab_size")
    if size is None:
        # Multimodal models write only what differs from the defaults, which transformers knows.
        from transformers import AutoConfig

        try:
            size = AutoConfig.from_pretrained(folder, trust_remote_code=trusted).get_text_config().vocab_size
        except Exception as error:
            raise ModelError(f"{folder}/config.json cannot be read by transformers: {reason_of(error)}") from error
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{folder}/config.json has vocab_size {size!r}; is this a causal language model?")
    return size


def _check_causal(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelError unless config.json names a decoder that generates text."""
    named = config.get("architectures") or []
    remedy = "the service needs a causal language model"
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"{folder}/config.json has architectures {shown(named)}, where a list of names was expected")
    if not named:
        raise ModelError(f"{folder}/config.json names no architectures, so vLLM cannot load it; {remedy}")
    if any(name.endswith(GENERATING) for name in named) or "AutoModelForCausalLM" in (config.get("auto_map") or ()):
        return
    from vllm.model_executor.models import registry

    if not any(name in registry._TEXT_GENERATION_MODELS or name in registry._MULTIMODAL_MODELS for name in named):
        raise ModelError(f"{folder}/config.json names {', '.join(named)}, which generates no text; {remedy}")


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
