"""Makes the prompts of both models: renders questions to token ids, and rejects ids that an engine cannot take.

In: a problem and its request's settings for the prompt. Out: token ids, or a TrajectoryError with the reason. Never
runs an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from client.errors import ModelError
from client.models.chat_template import ChatTemplate, Messages
from client.models.ends import end_of_turn, end_token_ids
from client.protocol.requests import NO_VARIABLES, SYSTEM_PROMPT, AmateurPrompt, Problem, SamplingSettings
from server.engines.preflight import ModelFacts, PairFacts
from server.logs import log
from server.settings import Role

CHARACTERS_A_TOKEN = 16
"""More characters per token than any text has on average."""
PROBE = {"role": "user", "content": "What is 7 times 8?"}
"""A question whose prompt shows which tokens the expert's chat template writes."""
COUNTED_CHARACTERS = 256
"""Characters of a long text whose tokens are counted at a time."""


class TrajectoryError(Exception):
    """The service cannot return a trajectory. `type`: the error type of its line."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.type, self.detail = kind, detail


@dataclass(frozen=True)
class Accepted:
    """The limits of a pair for a request's settings. They can be checked without the pair."""

    top_k: int
    context: int  # the expert's, in tokens
    vocab_size: int  # columns of the expert's head
    own_prompt: bool  # the amateur has a chat template of its own

    def objection(self, sampling: SamplingSettings) -> tuple[str, str] | None:
        """The first field that the schema allows but this pair does not, and why; None if there is none."""
        if sampling.top_k > self.top_k:
            return "top_k", f"{sampling.top_k} is more than this pair answers for, {self.top_k}"
        if (length := len(sampling.system_prompt or "")) > longest(self.context):
            return "system_prompt", f"{length} characters; {too_long(self.context)}"
        for name in sampling.chat_template_kwargs.keys() & NO_VARIABLES:
            return f"chat_template_kwargs.{name}", "not a template's own variable; the service sets it itself"
        if sampling.amateur_prompt == "own" and not self.own_prompt:
            return "amateur_prompt", "the amateur has no chat template of its own; add one, or ask for 'same'"
        for index in (index for index in sampling.stop_token_ids if index >= self.vocab_size):
            return "stop_token_ids", f"{index} is beyond the expert's vocabulary of {self.vocab_size}"
        return None


@dataclass(frozen=True)
class Prompt:
    """The token ids before a completion: the expert's, and the amateur's if it reads a prompt of its own."""

    expert: list[int]
    amateur: list[int] | None = None  # None: the expert's ids, without those that the amateur does not know


class TextReader:
    """Turns questions into token ids, with a model's tokenizer and chat template."""

    def __init__(self, facts: ModelFacts, context: int) -> None:
        self._context = context
        # Reads tokenizer.json unchanged. AutoTokenizer rebuilds many tokenizers for the class that
        # tokenizer_config.json names, and published ones name the wrong class: words lose their spaces. If there is a
        # tekken.json, AutoTokenizer takes mistral-common, which ignores chat templates.
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(facts.folder)
        self.template: ChatTemplate | None = None
        if facts.chat_template_digest:
            tokens = self.tokenizer.special_tokens_map
            self.template = ChatTemplate(facts.folder, facts.chat_template_file, tokens)

    def prompt(self, messages: Messages, sampling: SamplingSettings) -> list[int]:
        """Render a conversation directly to token ids, so that no second BOS is added.

        Raises ModelError; TrajectoryError if the prompt is far longer than the context.
        """
        assert self.template is not None
        text = self.template.prompt(messages, sampling.chat_template_kwargs, sampling.date)
        if self._is_far_too_long(text):
            raise TrajectoryError(
                "context_length_exceeded",
                f"the prompt's {len(text)} characters are more tokens than twice the context of {self._context};"
                " shorten the question",
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(f"{self.template.name} renders the question to no token; use another")
        return ids

    def _is_far_too_long(self, text: str) -> bool:
        """Whether a text has more than twice as many tokens as the context. It tokenises no more than it needs to tell.

        A few thousand emoji keep a tokenizer busy for a second, while all other requests wait.
        """
        if len(text.encode(errors="replace")) <= 2 * self._context:
            return False
        count = 0
        for start in range(0, len(text), COUNTED_CHARACTERS):
            piece = text[start : start + COUNTED_CHARACTERS]
            count += len(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
            if count > 2 * self._context:
                return True
        return False


class Prompts:
    """The prompts of one pair."""

    def __init__(self, pair: PairFacts, contexts: Mapping[Role, int], generation_config: Mapping[str, Any]) -> None:
        """`contexts`: each engine's context, in tokens; `generation_config`: the expert's, as vLLM read it."""
        self._pair, self._contexts = pair, contexts
        self._renderer = ThreadPoolExecutor(1, "renderer")  # one: two threads cannot share a tokenizer
        self._expert = TextReader(pair.expert, contexts["expert"])
        tokenizer, template = self._expert.tokenizer, self._expert.template
        configured, added = generation_config.get("eos_token_id"), tokenizer.get_added_vocab()
        self.end_tokens = end_token_ids(tokenizer.eos_token_id, configured, template, added)
        """The ids at which every trajectory ends."""
        self.ends_as_early = self.end_tokens == end_token_ids(tokenizer.eos_token_id, configured, None, added)
        """Whether early versions, which did not look at the template, ended at the same ids."""
        named = ", ".join(f"{index} {tokenizer.convert_ids_to_tokens(index)!r}" for index in self.end_tokens)
        log.info("trajectories end at: %s", named or "max_tokens alone, for no end token is known")
        if template and end_of_turn(template, added) is None:
            log.warning(
                "%s closes turns with no token of its own; stop_token_ids of a request can name one", template.name
            )
        self.amateur_prompt: AmateurPrompt = "own" if self._is_strange(template) and self._amateur_template else "same"
        """What the amateur reads if a request does not say."""
        if self.amateur_prompt == "own":
            log.info("the amateur does not know the expert's chat tokens: it reads questions by its own chat template")
        self.own_with = self._strange_switches(template) if self._amateur_template else {}
        """Variables of the expert's chat template, with the values that write tokens unknown to the amateur."""
        self.writes_date: dict[Role, bool] = {
            "expert": bool(template and template.writes_date),
            "amateur": bool(self._amateur_template and self._amateur_template.writes_date),
        }
        """Whether a model's prompts depend on the date."""

    async def render(self, problem: Problem, sampling: SamplingSettings) -> Prompt:
        """Render a problem's prompt to token ids.

        Raises TrajectoryError if a template fails or the text is too long.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._renderer, self._render, problem, sampling)

    def check(self, prompt: Prompt, completion: list[int], max_tokens: int) -> None:
        """Raise TrajectoryError unless both engines can take the prompt and the completion.

        `completion`: the given completion; if it is empty, the expert generates up to `max_tokens`.
        """
        length = len(completion) or max_tokens
        read: dict[Role, list[int]] = {"expert": prompt.expert, "amateur": prompt.amateur or prompt.expert}
        for role, context in self._contexts.items():
            if len(read[role]) + length + 1 > context:
                raise TrajectoryError(
                    "context_length_exceeded",
                    f"{len(read[role])} prompt tokens + {length} completion tokens + 1 exceed the {role}'s context"
                    f" of {context}; shorten the question or lower max_tokens",
                )
        size = self._pair.expert.vocab_size
        for index in (index for group in (prompt.expert, completion) for index in group if index >= size):
            raise TrajectoryError("unknown_token", f"token id {index} is beyond the expert's vocabulary of {size}")

    @property
    def has_own(self) -> bool:
        """Whether the amateur has a chat template of its own."""
        return self._amateur_template is not None

    def _render(self, problem: Problem, sampling: SamplingSettings) -> Prompt:
        if problem.prompt_token_ids is not None:
            return Prompt(problem.prompt_token_ids)
        if self._expert.template is None:
            raise TrajectoryError(
                "no_chat_template",
                "the expert has no chat template, so the service cannot render a question: send prompt_token_ids,"
                " add chat_template.jinja to its folder, or start the server with --chat-template FILE",
            )
        messages = _conversation(problem, sampling.system_prompt)
        context = self._contexts["expert"]
        if (length := sum(len(message["content"]) for message in messages)) > longest(context):
            raise TrajectoryError(
                "context_length_exceeded", f"question and system prompt have {length} characters; {too_long(context)}"
            )
        try:
            prompt = self._expert.prompt(messages, sampling)
            own = sampling.amateur_prompt == "own"
            if sampling.amateur_prompt is None and self._amateur_template:
                own = not self._all_known(prompt)
            return Prompt(prompt, self._amateur.prompt(messages, sampling) if own else None)
        except ModelError as error:
            raise TrajectoryError("chat_template", str(error)) from error

    @cached_property
    def _amateur(self) -> TextReader:
        """The amateur's tokenizer and template, read at first use: most pairs never need them."""
        return TextReader(self._pair.amateur, self._contexts["amateur"])

    @cached_property
    def _amateur_template(self) -> ChatTemplate | None:
        """The amateur's own chat template; None if it has none that is valid."""
        if not self._pair.amateur.chat_template_digest:
            return None
        try:
            return ChatTemplate(self._pair.amateur.folder)
        except ModelError as error:
            log.warning("%s; the amateur reads what the expert reads", error)
            return None

    def _strange_switches(self, template: ChatTemplate | None) -> dict[str, list[bool]]:
        """The variables and values that write tokens unknown to the amateur into the expert's prompt.

        One is Qwen3's `enable_thinking`: false writes two tokens that Qwen2.5 does not know.
        """
        if template is None or self.amateur_prompt == "own":
            return {}
        tried = {
            name: [value for value in (False, True) if self._is_strange(template, {name: value})]
            for name in template.variables
        }
        return {name: values for name, values in tried.items() if values}

    def _is_strange(self, template: ChatTemplate | None, variables: Mapping[str, bool] | None = None) -> bool:
        """Whether the amateur does not know a token that the expert's chat template writes."""
        usual = [{"role": "system", "content": SYSTEM_PROMPT}, PROBE]
        for messages in (usual, usual[1:]) if template else ():  # some templates take no system prompt
            with contextlib.suppress(ModelError, TrajectoryError):
                asked = SamplingSettings(chat_template_kwargs=dict(variables or {}))
                return not self._all_known(self._expert.prompt(messages, asked))
        return False

    def _all_known(self, prompt: list[int]) -> bool:
        """Whether the amateur knows every id of the expert's prompt."""
        known = self._pair.known
        return all(index < len(known) and known[index] for index in prompt)


def longest(context: int) -> int:
    """Most characters of a text that may fit. Tokens of a longer text are not counted, which would take long."""
    return CHARACTERS_A_TOKEN * context


def too_long(context: int) -> str:
    """The error for a longer text."""
    return f"more than {longest(context)} are taken to exceed the expert's context of {context}"


def _conversation(problem: Problem, system_prompt: str | None) -> list[dict[str, str]]:
    """The conversation to render: the problem's own messages, or the system prompt and the question."""
    if problem.messages:
        return [message.model_dump() for message in problem.messages]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem.question or ""}]
