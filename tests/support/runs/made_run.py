"""Trajectories and manifests without a model: random log-probabilities of the right shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, models

from client.problems.problem_set import ProblemSetIdentity
from client.protocol.requests import Decoding, ModelCard, Trajectory
from client.runs.manifest import RunManifest

VOCABULARY, TOP_K = 50, 8


def make_trajectory(problem_id: str, seed: int, tokens: int, top_k: int = TOP_K) -> Trajectory:
    """A trajectory over a vocabulary of 50, with the top k of a peaked distribution."""
    rng = np.random.default_rng(seed)

    def log_softmax(logits):
        return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)

    expert = log_softmax(rng.normal(0, 3, (tokens, VOCABULARY)))
    amateur = log_softmax(expert + rng.normal(0, 2, expert.shape))
    ids = np.argsort(-expert, axis=1)[:, :top_k].astype(np.int32)
    return Trajectory(
        problem_id=problem_id,
        sample_index=0,
        prompt_token_ids=rng.integers(0, VOCABULARY, 5, dtype=np.int32),
        token_ids=ids[:, 0].copy(),
        top_ids=ids,
        expert_logprobs=np.take_along_axis(expert, ids, 1),
        amateur_logprobs=np.take_along_axis(amateur, ids, 1),
        finish_reason="stop",
    )


def make_manifest(**changes: object) -> RunManifest:
    """A manifest of made-up models, with some fields changed."""
    card = {
        "created": 1, "vocab_size": VOCABULARY, "max_model_len": 128, "max_logprobs": 128, "dtype": "float32",
        "tokenizer_fingerprint": "t", "chat_template_digest": "c",
    }  # fmt: skip
    made = RunManifest(
        format=1,
        created_at=1,
        expert=ModelCard(id="/expert", role="expert", model_fingerprint="e", **card),
        amateur=ModelCard(id="/amateur", role="amateur", model_fingerprint="a", **card),
        system_prompt="Please reason step by step.",
        chat_template_kwargs={},
        decoding=Decoding(),
        top_k=TOP_K,
        problems=ProblemSetIdentity(count=6, digest="d"),
        versions={"client": "1"},
    )
    return made.model_copy(update=changes)


def words_of(first: Sequence[str] = ()) -> list[str]:
    """The vocabulary of `tokenizer_json`."""
    return [*first, *(f"w{index}" for index in range(VOCABULARY - len(first)))]


def tokenizer_json(first: Sequence[str] = ()) -> bytes:
    """A tokenizer with a word for each of the 50 ids, the first of them given."""
    vocabulary = {word: index for index, word in enumerate(words_of(first))}
    return Tokenizer(models.WordLevel(vocabulary, "w0")).to_str().encode()
