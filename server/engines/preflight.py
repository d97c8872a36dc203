"""May these two models be contrasted? Answered from their files, before an engine starts.

In: two model folders. Out: `PairFacts`, or ModelError saying which token or file stands in the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.errors import ModelError
from client.models.fingerprints import (
    chat_template_digest,
    model_config,
    model_fingerprint,
    token_map,
    tokenizer_fingerprint,
)
from client.protocol.requests import TokenDifference


@dataclass(frozen=True)
class ModelFacts:
    """What the files of one model say."""

    folder: Path
    vocab_size: int  # columns of its head
    weight_bytes: int
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_digest: str | None


@dataclass(frozen=True)
class PairFacts:
    """Two models that may be contrasted, and the ids of the expert that the amateur does not know."""

    expert: ModelFacts
    amateur: ModelFacts
    differences: list[TokenDifference]  # added tokens that are not the same in both
    known: npt.NDArray[np.bool_]  # [expert's vocab_size]: may the id be sent to the amateur?


def inspect_pair(expert: Path, amateur: Path) -> PairFacts:
    """Compare two models' token maps and heads.

    Ordinary tokens must have the same id in both; raises ModelError naming the first that has not. Added tokens
    may differ: those ids, and ids beyond the amateur's head, are unknown to the amateur.
    """
    facts = _inspect(expert), _inspect(amateur)
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


def _inspect(folder: Path) -> ModelFacts:
    return ModelFacts(
        folder=folder,
        vocab_size=_vocab_size(folder),
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        model_fingerprint=model_fingerprint(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        chat_template_digest=chat_template_digest(folder),
    )


def _vocab_size(folder: Path) -> int:
    config: dict[str, Any] = model_config(folder)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ModelError(f"{folder}/config.json has no vocab_size; is this a causal language model?")
    return size


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
