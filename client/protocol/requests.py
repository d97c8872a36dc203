"""The HTTP contract: what a request may say, and what the service answers.

Requests are pydantic models that refuse unknown fields. The lines of an answer are `client.protocol.trajectories`,
which this module gives too. No I/O.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from client.contrast import DEFAULT_GAMMA, Labels, Selection
from client.protocol.trajectories import Encoding as Encoding
from client.protocol.trajectories import Failure as Failure
from client.protocol.trajectories import FinishReason as FinishReason
from client.protocol.trajectories import Trajectory as Trajectory
from client.protocol.trajectories import fault_of as fault_of
from client.protocol.trajectories import key_of_line as key_of_line
from client.protocol.trajectories import parse_line as parse_line

SYSTEM_PROMPT = "Please reason step by step."
"""The published sampling prompt."""
DEFAULT_TOP_K = 20
"""By measurement: tests/benchmarks/README.md, "Why --top-k is 20"."""
DEFAULT_SLOTS = 128
"""Of a model's card that does not say: vLLM's own number, which servers without the field ran with."""
MAX_PROBLEMS = 1024
"""Problems that one request may carry; the server expands each into n trajectories."""
MAX_JOB_PROBLEMS = 50_000
"""Problems that a job's request may carry; more of them lie in the bucket, where they keep nobody waiting."""
MAX_CHARACTERS = 4_000_000
"""Of a question. A server takes less where its expert's context is smaller."""
MAX_SHARED_CHARACTERS = 100_000
"""Of what is rendered again with every problem: the system prompt, the template's variables."""
MAX_IDS = 1_000_000
MAX_FIELDS = 64
"""Of an object in a request; far more than any knows."""

PASSING_ERRORS = frozenset({"engine_error", "no_scores", "internal_error", "server_stopping"})
"""Types of error lines that say nothing of the problem: asked again, it may well succeed."""

TOP_NEEDS_ALL = "select top needs the whole RUN: sample first, then lightreasoner-client build --select top"
SHIFTED_LABELS: frozenset[Labels] = frozenset({"contrast", "tilt"})
"""Labels that leave the expert, so that max_shift can bound by how much."""
DEFAULT_KEEP = 0.05
"""Share of the steps that select top keeps: about what the published beta keeps."""

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


class Strict(BaseModel):
    """Base of what comes in over the wire: frozen, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Each unknown field is an error of its own, and a stranger may send a million of them."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, where only {len(cls.model_fields)} are known")
        return data


class Problem(Strict):
    """A question, or a prompt already in token ids; with `token_ids`, a completion to be scored as it is."""

    id: str = Field(min_length=1, max_length=512, description="Names the problem in every line about it.")
    question: str | None = Field(
        None, min_length=1, max_length=MAX_CHARACTERS, description="Rendered through the expert's chat template."
    )
    prompt_token_ids: TokenIds | None = Field(None, description="The prompt, as the expert's ids.")
    token_ids: TokenIds | None = Field(
        None, description="A completion to be scored by both models instead of generated."
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Problem:
        if (self.question is None) == (self.prompt_token_ids is None):
            raise ValueError("give exactly one of 'question' and 'prompt_token_ids'")
        return self


class Decoding(Strict):
    """How the expert answers. Temperature 0 is greedy; the seed fixes sampling, problem by problem."""

    max_tokens: int = Field(128, ge=1, le=1_000_000)
    n: int = Field(1, ge=1, le=256, description="Trajectories a problem; more than 1 needs temperature > 0.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="vLLM takes 0 to 2.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)

    @model_validator(mode="after")
    def _several_need_temperature(self) -> Decoding:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 needs temperature > 0: greedy decoding gives the same trajectory n times")
        return self


class ContrastSettings(Strict):
    """What turns trajectories into samples; the meaning of each is in `client.contrast`."""

    alpha: float = Field(0.2, gt=0.0, le=1.0)
    beta: float = Field(0.4, ge=0.0)
    first_step: int = Field(1, ge=0, le=2**31 - 1)
    keep_incomplete: bool = False
    select: Selection = "kl"
    keep: float | None = Field(None, gt=0.0, le=1.0, description="Share of the steps that select top keeps.")
    labels: Labels = "contrast"
    gamma: float | None = Field(None, ge=0.0, le=1000.0, description="How far labels tilt move the expert.")
    max_shift: float | None = Field(
        None, ge=0.0, description="Nats by which a label, contrast or tilt, may leave the expert; null: any."
    )
    select_seed: int = Field(0, ge=0, le=2**63 - 1)  # of select "random"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_choices(cls, data: Any) -> Any:
        """What a choice needs is recorded with it, and what none needs is null: two such RUNs are alike."""
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
        """These settings with others in their place, as values to be checked.

        What belongs to a choice that is given up goes with it, unless it is given too.
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
    """How problems are answered: what every request, every job and the sampler share. Frozen.

    Raises pydantic's ValidationError, naming the field, where no server takes it.
    """

    top_k: int = Field(DEFAULT_TOP_K, ge=1, description="Ids a step; at most the engines' max_logprobs.")
    system_prompt: str | None = Field(
        SYSTEM_PROMPT, max_length=MAX_SHARED_CHARACTERS, description="null or empty: no system message."
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _plain_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        """What cannot be written down again as it came could not be compared with what made a RUN."""
        try:
            size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
            orjson.dumps(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not plain JSON: {error}") from None
        if size > MAX_SHARED_CHARACTERS:
            raise ValueError(f"{size} bytes as JSON; at most {MAX_SHARED_CHARACTERS} are allowed")
        return value

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
    """What a job is to do, but for problems that come with the request."""

    run: str = Field(
        min_length=1, max_length=4096, description="The RUN to write: inside the server's bucket, or relative to it."
    )
    problems_url: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A .jsonl, .jsonl.gz or .parquet inside the server's bucket, or relative to it.",
    )

    @model_validator(mode="after")
    def _no_step_needs_the_whole_run(self) -> Self:
        if self.select == "top":
            raise ValueError(TOP_NEEDS_ALL)
        return self


class JobRequest(JobTerms):
    """The body of POST /v1/jobs."""

    problems: Annotated[list[Problem], Field(min_length=1, max_length=MAX_JOB_PROBLEMS, fail_fast=True)] | None = Field(
        None, description="A larger problem set goes into the bucket, and its name into problems_url."
    )

    @model_validator(mode="after")
    def _one_problem_set(self) -> JobRequest:
        if (self.problems is None) == (self.problems_url is None):
            raise ValueError("give exactly one of 'problems' and 'problems_url'")
        check_problems(self.problems or [], self.n)
        return self


def check_problems(problems: list[Problem], n: int) -> None:
    """Raises ValueError where problems share an id, or one cannot be answered n times."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"two problems have the id {problem.id!r}; ids name the answer's lines")
        seen.add(problem.id)
    if n > 1 and any(problem.token_ids for problem in problems):
        raise ValueError("a given completion (token_ids) is scored once: n must be 1")


JobStatus = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"completed", "failed", "cancelled"})
"""States that a job never leaves."""


class RequestCounts(BaseModel):
    """Trajectories of the whole RUN: asked for, there, and failed for good."""

    total: int = Field(0, description="0 while the problem set has not been read.")
    completed: int = 0
    failed: int = 0


class JobError(BaseModel):
    """Why a job failed."""

    type: str
    detail: str


class Job(BaseModel):
    """A job as the service tells of it; times are seconds since the epoch, null for what has not happened."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    run: str = Field(description="The RUN, absolute.")
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
    """A page of jobs, newest first; the next one is asked for with after=last_id."""

    object: Literal["list"] = "list"
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TokenDifference(BaseModel):
    """An added token that differs: its id, and what each model's tokenizer calls it (null: has none)."""

    id: int
    expert: str | None
    amateur: str | None


class ModelCard(BaseModel):
    """One of the pair, as GET /v1/models lists it (OpenAI's list shape and what a RUN must know of it)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lightreasoner"
    role: Literal["expert", "amateur"]
    vocab_size: int = Field(description="Columns of the model's head.")
    max_model_len: int
    max_logprobs: int
    slots: int = Field(
        DEFAULT_SLOTS, ge=1, description="Requests that its engine runs at a time, all data-parallel ranks together."
    )
    dtype: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_digest: str | None
    unknown_tokens: list[TokenDifference] = Field(
        default_factory=list, description="Of the amateur: added tokens of the expert that it does not share."
    )


class PairCards(NamedTuple):
    """What is known of the pair that a server serves."""

    expert: ModelCard
    amateur: ModelCard

    @property
    def slots(self) -> int:
        """Trajectories that the pair works on at a time: the smaller engine's."""
        return min(self.expert.slots, self.amateur.slots)


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ProblemDetails(BaseModel):
    """RFC 9457: the body of every request error, as application/problem+json."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field(default_factory=list, description="Field by field, where fields are at fault.")


class PackedArray(BaseModel):
    """An array with "encoding": "base64": row-major, little-endian."""

    dtype: Literal["<i4", "<f4"]
    shape: list[int]
    data: str


class TrajectoryLine(BaseModel):
    """A line of the answer, for the documentation; `Trajectory` is the value that is read and written."""

    problem_id: str
    sample_index: int
    prompt_token_ids: list[int] | PackedArray = Field(description="[P]")
    token_ids: list[int] | PackedArray = Field(description="[T], the stop token included.")
    top_ids: list[list[int]] | PackedArray = Field(description="[T, k], the expert's best first.")
    expert_logprobs: list[list[float]] | PackedArray = Field(description="[T, k], natural, raw.")
    amateur_logprobs: list[list[float | None]] | PackedArray = Field(description="[T, k]; null: unknown to it.")
    finish_reason: FinishReason


class FailureReason(BaseModel):
    type: str
    detail: str


class FailureLine(BaseModel):
    """A line of the answer for a trajectory that could not be had."""

    problem_id: str
    sample_index: int
    error: FailureReason
