"""The HTTP contract: requests and responses.

Requests are pydantic models that reject unknown fields. The lines of a response are in `client.protocol.trajectories`;
this module exports their names too. No I/O.
"""

from __future__ import annotations

import datetime
import json
from typing import Annotated, Any, Literal, NamedTuple, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from client.contrast import DEFAULT_GAMMA, Labels, Selection
from client.protocol.trajectories import MAX_SAMPLES as MAX_SAMPLES
from client.protocol.trajectories import Encoding as Encoding
from client.protocol.trajectories import Failure as Failure
from client.protocol.trajectories import FinishReason as FinishReason
from client.protocol.trajectories import Trajectory as Trajectory
from client.protocol.trajectories import fault_of as fault_of
from client.protocol.trajectories import key_of_line as key_of_line
from client.protocol.trajectories import parse_line as parse_line
from client.protocol.trajectories import token_fault as token_fault

SYSTEM_PROMPT = "Please reason step by step."
"""The system prompt of the published sampling code."""
BOX_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
"""The system prompt for whole solutions, whose answers are graded."""
DEFAULT_TOP_K = 20
"""Chosen by measurement: tests/benchmarks/README.md, "Why --top-k is 20"."""
DEFAULT_SLOTS = 128
"""Slots of a model whose card does not name them: vLLM's default, which earlier servers ran with."""
MAX_PROBLEMS = 1024
"""Most problems in a request. The server makes n trajectories of each."""
MAX_JOB_PROBLEMS = 50_000
"""Most problems in a job's request. Put a larger set into the bucket, so that no request is blocked by it."""
MAX_CHARACTERS = 4_000_000
"""Most characters of a question. A server whose expert has a smaller context accepts fewer."""
MAX_SHARED_CHARACTERS = 100_000
"""Most characters of each setting that is rendered with every problem: system prompt, template variables."""
MAX_MESSAGES = 1024
"""Most messages of a problem."""
MAX_IDS = 1_000_000
MAX_STOP_TOKENS = 1000
MAX_NAME_CHARACTERS = 256
"""Most characters of a type or a fingerprint."""
MAX_VOCABULARY = 2**24
"""Most columns of a model's head. 2**18 are already many."""
MAX_FIELDS = 64
"""Most fields of an object in a request; every model has far fewer."""

PASSING_ERRORS = frozenset({"engine_error", "no_scores", "internal_error", "server_stopping"})
"""Types of failures that the problem did not cause: a retry may succeed."""

TOP_NEEDS_ALL = "select top needs the whole RUN: sample first, then lightreasoner-client build --select top"
SHIFTED_LABELS: frozenset[Labels] = frozenset({"contrast", "tilt"})
"""Labels that differ from the expert, so that max_shift can bound them."""
DEFAULT_KEEP = 0.05
"""Share of the steps that select top keeps: about what the published beta keeps."""
NEWER_FIELDS = "stop_token_ids", "amateur_prompt", "date"
"""Fields of a request that earlier servers reject. They are sent only if they are set."""
NO_VARIABLES = frozenset({
    "messages", "add_generation_prompt", "conversation", "tools", "documents", "chat_template", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "continue_final_message",
})  # fmt: skip
"""Names that chat_template_kwargs rejects: the conversation, and arguments of transformers' apply_chat_template."""
AmateurPrompt = Literal["same", "own"]
"""What the amateur reads before a completion: the expert's prompt, or its own rendering of the question."""

LARGEST_ID = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=LARGEST_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


class Strict(BaseModel):
    """Base of all requests: frozen; unknown fields, and values of another type, are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Limit the fields: each unknown field is an error of its own, and a request may have a million."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields; only {len(cls.model_fields)} are known")
        return data


class Message(Strict):
    """A turn of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str = Field(max_length=MAX_CHARACTERS)


class Problem(Strict):
    """A question, messages, or a prompt as token ids. With `token_ids`, that completion is scored."""

    id: str = Field(min_length=1, max_length=512, description="Identifies the problem in the lines of the response.")
    question: str | None = Field(
        None, min_length=1, max_length=MAX_CHARACTERS, description="Rendered with the expert's chat template."
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None,
        description="Rendered with the expert's chat template as they are, without system_prompt. If the last message "
        "is the assistant's, the expert continues it.",
    )
    prompt_token_ids: TokenIds | None = Field(None, description="The prompt as token ids of the expert.")
    token_ids: TokenIds | None = Field(
        None, description="A completion that both models score. The expert then generates nothing."
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Problem:
        if sum(prompt is not None for prompt in (self.question, self.messages, self.prompt_token_ids)) != 1:
            raise ValueError("give exactly one of 'question', 'messages' and 'prompt_token_ids'")
        return self

    @property
    def text(self) -> str | None:
        """The question, or the last message; None if the prompt is given as token ids."""
        return self.messages[-1].content if self.messages else self.question


class Decoding(Strict):
    """How the expert decodes."""

    max_tokens: int = Field(128, ge=1, le=1_000_000, description="Maximum length of a trajectory, in tokens.")
    n: int = Field(
        1, ge=1, le=MAX_SAMPLES, description="Trajectories per problem. More than 1 needs a temperature above 0."
    )
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Nucleus sampling, with a temperature above 0.")
    seed: int | None = Field(
        None, ge=0, le=2**63 - 1, description="With it, the same problem is sampled the same way again."
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=MAX_STOP_TOKENS, fail_fast=True,
        description="Ids at which a trajectory ends, besides the expert's own (end_token_ids of its card).",
    )  # fmt: skip

    @field_validator("stop_token_ids")
    @classmethod
    def _in_order(cls, value: list[int]) -> list[int]:
        """Sort the ids and drop repeated ones: their order does not matter."""
        return sorted(set(value))

    @model_validator(mode="after")
    def _several_need_temperature(self) -> Decoding:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 needs temperature > 0: greedy decoding gives the same trajectory each time")
        return self


class ContrastSettings(Strict):
    """How samples are made from trajectories. `client.contrast` explains each setting."""

    alpha: float = Field(0.2, gt=0.0, le=1.0)
    beta: float = Field(0.4, ge=0.0)
    first_step: int = Field(1, ge=0, le=2**31 - 1)
    keep_incomplete: bool = False
    select: Selection = "kl"
    keep: float | None = Field(None, gt=0.0, le=1.0, description="Share of the steps that select top keeps.")
    labels: Labels = "contrast"
    gamma: float | None = Field(None, ge=0.0, le=1000.0, description="How far labels tilt move the expert.")
    max_shift: float | None = Field(
        None,
        ge=0.0,
        description="The largest divergence of a contrast or tilt label from the expert, in nats; null: no bound.",
    )
    select_seed: int = Field(0, ge=0, le=2**63 - 1)  # of select "random"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_choices(cls, data: Any) -> Any:
        """Fill in the settings that a choice needs, so that run.json records them. Unused settings stay null."""
        if isinstance(data, dict):
            needed = {}
            if data.get("labels") == "tilt" and data.get("gamma") is None:
                needed["gamma"] = DEFAULT_GAMMA
            if data.get("select") == "top" and data.get("keep") is None:
                needed["keep"] = DEFAULT_KEEP
            return data | needed
        return data

    @model_validator(mode="after")
    def _choices_agree(self) -> Self:
        if self.gamma is not None and self.labels != "tilt":
            raise ValueError(f"gamma belongs to labels tilt, and these are {self.labels}")
        if self.max_shift is not None and self.labels not in SHIFTED_LABELS:
            raise ValueError(f"max_shift belongs to labels contrast or tilt, and these are {self.labels}")
        if self.keep is not None and self.select != "top":
            raise ValueError(f"keep belongs to select top, and this is {self.select}")
        return self

    def changed(self, **given: Any) -> dict[str, Any]:
        """These settings with the `given` ones, as values that still need validation.

        gamma, max_shift and keep are dropped if the new choice does not use them, unless they are given too.
        """
        values = {name: getattr(self, name) for name in ContrastSettings.model_fields} | given
        if values["labels"] != "tilt" and "gamma" not in given:
            values["gamma"] = None
        if values["labels"] not in SHIFTED_LABELS and "max_shift" not in given:
            values["max_shift"] = None
        if values["select"] != "top" and "keep" not in given:
            values["keep"] = None
        return values


class SamplingSettings(Decoding):
    """How problems are sampled: the settings that requests, jobs and the sampler share. Frozen.

    Raises pydantic's ValidationError, naming the field, for a value that no server accepts.
    """

    top_k: int = Field(
        DEFAULT_TOP_K, ge=1, description="Token ids per step; at most the smaller max_logprobs of the two models."
    )
    system_prompt: str | None = Field(
        SYSTEM_PROMPT, max_length=MAX_SHARED_CHARACTERS, description="null or empty: no system message."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables of the chat template, by name."
    )
    amateur_prompt: AmateurPrompt | None = Field(
        None,
        description="What the amateur reads before the completion: the same ids as the expert, or the question through"
        " its own chat template. Left out: own where the expert's prompt holds an id that the amateur does not know and"
        " the amateur has a template, else same. prompt_token_ids are always the same.",
    )
    date: str | None = Field(
        None, description="The day, as 2026-01-31, that a chat template writes which writes the date. Left out: today."
    )

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value is not None and datetime.date.fromisoformat(value).isoformat() != value:
            raise ValueError(f"{value!r} is not written as 2026-01-31")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _plain_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Allow only values that JSON keeps unchanged: run.json records them, to compare later requests with."""
        try:
            size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
            orjson.dumps(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not plain JSON: {error}") from None
        if size > MAX_SHARED_CHARACTERS:
            raise ValueError(f"{size} bytes as JSON; at most {MAX_SHARED_CHARACTERS} are allowed")
        return value

    @property
    def unsaid(self) -> set[str]:
        """Fields of `NEWER_FIELDS` that are not set. A server of an earlier version must not see them."""
        return {name for name in NEWER_FIELDS if not getattr(self, name)}

    @property
    def decoding(self) -> Decoding:
        """The expert's decoding alone, as run.json records it."""
        return Decoding(**{name: getattr(self, name) for name in Decoding.model_fields})


class TrajectoryRequest(SamplingSettings):
    """The body of POST /v1/trajectories."""

    problems: list[Problem] = Field(min_length=1, max_length=MAX_PROBLEMS, fail_fast=True)
    encoding: Encoding = "json"

    @model_validator(mode="after")
    def _problems_agree(self) -> TrajectoryRequest:
        check_problems(self.problems, self.n)
        return self


class JobTerms(SamplingSettings, ContrastSettings):
    """A job's request without inline problems."""

    run: str = Field(
        min_length=1,
        max_length=4096,
        description="The RUN to write: a URL inside the server's bucket, or a path relative to the bucket.",
    )
    problems_url: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A file or a folder of files: a URL inside the server's bucket, or a path relative to it.",
    )

    @model_validator(mode="after")
    def _no_step_needs_the_whole_run(self) -> Self:
        if self.select == "top":
            raise ValueError(TOP_NEEDS_ALL)
        return self


class JobRequest(JobTerms):
    """The body of POST /v1/jobs."""

    problems: Annotated[list[Problem], Field(min_length=1, max_length=MAX_JOB_PROBLEMS, fail_fast=True)] | None = Field(
        None, description="Put a larger problem set into the bucket, and name it with problems_url."
    )

    @model_validator(mode="after")
    def _one_problem_set(self) -> JobRequest:
        if (self.problems is None) == (self.problems_url is None):
            raise ValueError("give exactly one of 'problems' and 'problems_url'")
        check_problems(self.problems or [], self.n)
        return self


def check_problems(problems: list[Problem], n: int) -> None:
    """Raises ValueError if two problems share an id, or if a given completion comes with n above 1."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"two problems have the id {problem.id!r}; each problem needs its own")
        seen.add(problem.id)
    if n > 1 and any(problem.token_ids for problem in problems):
        raise ValueError("a given completion (token_ids) is scored once: n must be 1")


JobStatus = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"completed", "failed", "cancelled"})
"""States that a job never leaves."""


class RequestCounts(BaseModel):
    """Trajectories of the whole RUN."""

    total: int = Field(0, description="Trajectories that the job asks for; 0 until its problem set has been read.")
    completed: int = Field(0, description="Trajectories in the RUN.")
    failed: int = Field(0, description="Trajectories that failed and are not retried.")


class JobError(BaseModel):
    """Why a job failed."""

    type: str
    detail: str


class Job(BaseModel):
    """A job's status. Times are seconds since the epoch; null: not reached."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    run: str = Field(description="The RUN's absolute URL or path.")
    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = Field(default_factory=RequestCounts)
    error: JobError | None = None


class JobList(BaseModel):
    """A page of jobs, newest first. Ask for the next page with after=last_id."""

    object: Literal["list"] = "list"
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TokenDifference(BaseModel):
    """An id whose added token differs: the token in each model's tokenizer; null: no token."""

    id: int
    expert: str | None
    amateur: str | None


class ModelCard(BaseModel):
    """One model of the pair, as GET /v1/models lists it: the fields of OpenAI's list, and what run.json records."""

    id: str = Field(max_length=4096)
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lightreasoner"
    role: Literal["expert", "amateur"]
    vocab_size: int = Field(ge=0, le=MAX_VOCABULARY, description="Columns of the model's head.")
    max_model_len: int = Field(ge=0, le=2**31 - 1)
    max_logprobs: int = Field(ge=-1, le=MAX_VOCABULARY)
    slots: int = Field(
        DEFAULT_SLOTS,
        ge=1,
        le=2**20,
        description="Requests that its engine runs at a time, on all data-parallel ranks together.",
    )
    dtype: str = Field(max_length=MAX_NAME_CHARACTERS)
    model_fingerprint: str = Field(max_length=MAX_NAME_CHARACTERS)
    tokenizer_fingerprint: str = Field(max_length=MAX_NAME_CHARACTERS)
    chat_template_digest: str | None = Field(max_length=MAX_NAME_CHARACTERS)
    unknown_tokens: list[TokenDifference] = Field(
        default_factory=list, description="Only on the amateur's card: added tokens of the expert that it lacks."
    )
    end_token_ids: list[int] | None = Field(
        None, description="Of the expert: the ids at which every trajectory ends. null: an earlier version's server."
    )
    amateur_prompt: AmateurPrompt | None = Field(
        None, description="Of the amateur: what it reads before a completion, where the request does not say."
    )
    own_prompt_with: dict[str, list[bool]] = Field(
        default_factory=dict,
        max_length=100,
        description="Of the amateur: chat_template_kwargs with which the expert's prompt holds tokens that it does not"
        " know, so that it reads its own; where amateur_prompt says own, none.",
    )
    writes_date: bool = Field(False, description="Whether its chat template writes the date.")


class PairCards(NamedTuple):
    """The cards of the two models that a server serves."""

    expert: ModelCard
    amateur: ModelCard

    @property
    def slots(self) -> int:
        """Trajectories that the pair works on at a time: the slots of the smaller engine."""
        return min(self.expert.slots, self.amateur.slots)


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ProblemDetails(BaseModel):
    """The body of every error response: RFC 9457, application/problem+json."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field(default_factory=list, description="One entry for each invalid field.")
