"""What the expert reads: a question becomes token ids here, and ids that an engine cannot take stop here.

In: a problem and what its request says of the prompt. Out: token ids, or TrajectoryError with the reason. Never runs
an engine.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from client.protocol.requests import Problem, SamplingSettings
from server.engines.preflight import ModelFacts
from server.settings import Role

CHARACTERS_A_TOKEN = 16
"""More than any text has on average."""
TEMPLATE_ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
"""Arguments of transformers itself. All others are variables of the chat template."""


class TrajectoryError(Exception):
    """Why the service cannot give one trajectory; `type` is the error type of its line."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.type, self.detail = kind, detail


class Prompts:
    """The prompts of one pair."""

    def __init__(self, expert: ModelFacts, contexts: Mapping[Role, int], generation_config: Mapping[str, Any]) -> None:
        """`contexts`: each engine's context, in tokens; `generation_config`: the expert's, as vLLM read it."""
        self._expert, self._contexts = expert, contexts
        self._tokenizer: Any = AutoTokenizer.from_pretrained(expert.folder, trust_remote_code=expert.trusted)
        self._renderer = ThreadPoolExecutor(1, "renderer")  # one: two threads cannot share a tokenizer
        configured = generation_config.get("eos_token_id")
        listed = configured if isinstance(configured, list) else [configured]
        self.end_tokens = {index for index in (*listed, self._tokenizer.eos_token_id) if index is not None}
        """The ids at which the expert's engine stops: the tokenizer's and the generation config's."""

    async def render(self, problem: Problem, sampling: SamplingSettings) -> list[int]:
        """The token ids of a problem's prompt.

        Raises TrajectoryError where the template fails or the text is too long.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._renderer, self._render, problem, sampling)

    def check(self, prompt: list[int], completion: list[int], max_tokens: int) -> None:
        """Raise TrajectoryError unless both engines can take the prompt and the completion.

        `completion`: the given one; where it is empty, the expert generates up to `max_tokens`.
        """
        length = len(completion) or max_tokens
        for role, context in self._contexts.items():
            if len(prompt) + length + 1 > context:
                raise TrajectoryError(
                    "context_length_exceeded",
                    f"{len(prompt)} prompt tokens + {length} completion tokens + 1 exceed the {role}'s context"
                    f" of {context}; shorten the question or lower max_tokens",
                )
        size = self._expert.vocab_size
        for index in (index for group in (prompt, completion) for index in group if index >= size):
            raise TrajectoryError("unknown_token", f"token id {index} is beyond the expert's vocabulary of {size}")

    def objection(self, sampling: SamplingSettings) -> tuple[str, str] | None:
        """The first field of a request that cannot give a prompt, and why; None if there is none."""
        if (length := len(sampling.system_prompt or "")) > self._longest:
            return "system_prompt", f"{length} characters; {self._too_long}"
        for name in sampling.chat_template_kwargs.keys() & TEMPLATE_ARGUMENTS:
            return f"chat_template_kwargs.{name}", "not a template's own variable; the service sets it itself"
        return None

    def _render(self, problem: Problem, sampling: SamplingSettings) -> list[int]:
        if problem.prompt_token_ids is not None:
            return problem.prompt_token_ids
        if self._expert.chat_template_digest is None:
            raise TrajectoryError(
                "no_chat_template",
                "the expert has no chat template, so the service cannot render a question: send prompt_token_ids,"
                " or add chat_template.jinja to its folder",
            )
        messages = _conversation(problem, sampling.system_prompt)
        if (length := sum(len(message["content"]) for message in messages)) > self._longest:
            raise TrajectoryError(
                "context_length_exceeded", f"question and system prompt have {length} characters; {self._too_long}"
            )
        unfinished = messages[-1]["role"] == "assistant"
        try:
            prompt = self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                tokenize=True,
                return_dict=False,
                **sampling.chat_template_kwargs,
            )
        except Exception as error:  # a template may raise anything; the cause is the user's data
            raise TrajectoryError("chat_template", f"the chat template refused the question: {error}") from error
        if not prompt:
            raise TrajectoryError("chat_template", "the chat template rendered the question to nothing")
        return prompt

    @property
    def _longest(self) -> int:
        """Characters. A longer text cannot fit. Its tokens are not even counted: that would keep others waiting."""
        return CHARACTERS_A_TOKEN * self._contexts["expert"]

    @property
    def _too_long(self) -> str:
        return f"more than {self._longest} are taken to exceed the expert's context of {self._contexts['expert']}"


def _conversation(problem: Problem, system_prompt: str | None) -> list[dict[str, str]]:
    """The conversation that is rendered: the problem's own as it is, or the system prompt and the question."""
    if problem.messages:
        return [message.model_dump() for message in problem.messages]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem.question or ""}]
