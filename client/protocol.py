"""The HTTP contract: what a request may say, what a line of the answer says, in both encodings.

Requests are pydantic models that refuse unknown fields. Answers are plain values around numpy arrays and
are never validated number by number. This module does no I/O.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from client.contrast import Labels, Selection

SYSTEM_PROMPT = "Please reason step by step."
"""The published sampling prompt."""
DEFAULT_TOP_K = 20
"""By measurement: README, "Why --top-k is 20"."""
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

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
FinishReason = Literal["stop", "length"]
Encoding = Literal["json", "base64"]


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
    labels: Labels = "contrast"
    select_seed: int = Field(0, ge=0, le=2**63 - 1)  # of select "random"


class Answering(Decoding):
    """How problems are to be answered: what every kind of request says beside its problems."""

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
            raise ValueError(f"{size} bytes as JSON; at most {MAX_SHARED_CHARACTERS} are taken")
        return value


class TrajectoryRequest(Answering):
    """The body of POST /v1/trajectories."""

    problems: list[Problem] = Field(min_length=1, max_length=MAX_PROBLEMS, fail_fast=True)
    encoding: Encoding = "json"

    @model_validator(mode="after")
    def _problems_agree(self) -> TrajectoryRequest:
        check_problems(self.problems, self.n)
        return self


class JobTerms(Answering, ContrastSettings):
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
    dtype: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_digest: str | None
    unknown_tokens: list[TokenDifference] = Field(
        default_factory=list, description="Of the amateur: added tokens of the expert that it does not share."
    )


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


@dataclass(frozen=True)
class Trajectory:
    """The expert's answer to a problem, with both models' log-probabilities of the expert's top-k ids.

    Row t is step t: the prediction of token_ids[t] given the prompt and the tokens before it. Log-probabilities
    are natural, raw, each normalised over its model's full vocabulary; -inf: unknown to the amateur.
    """

    problem_id: str
    sample_index: int
    prompt_token_ids: npt.NDArray[np.int32]  # [P]
    token_ids: npt.NDArray[np.int32]  # [T], the stop token included
    top_ids: npt.NDArray[np.int32]  # [T, k], the expert's best first
    expert_logprobs: npt.NDArray[np.float32]  # [T, k]
    amateur_logprobs: npt.NDArray[np.float32]  # [T, k]
    finish_reason: FinishReason

    ARRAYS = ("prompt_token_ids", "token_ids", "top_ids", "expert_logprobs", "amateur_logprobs")

    def to_line(self, encoding: Encoding) -> bytes:
        """One NDJSON line, newline included. JSON writes an unknown id's log-probability as null."""
        encode = _to_base64 if encoding == "base64" else np.ascontiguousarray
        arrays = {name: encode(getattr(self, name)) for name in self.ARRAYS}
        line = {
            "problem_id": self.problem_id,
            "sample_index": self.sample_index,
            **arrays,
            "finish_reason": self.finish_reason,
        }
        return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True)
class Failure:
    """What became of a trajectory that could not be had; the others are not disturbed by it."""

    problem_id: str
    sample_index: int
    type: str
    detail: str

    def to_line(self) -> bytes:
        """One NDJSON line, newline included; the same in both encodings."""
        error = {"type": self.type, "detail": self.detail}
        line = {"problem_id": self.problem_id, "sample_index": self.sample_index, "error": error}
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


ROUNDING = 1e-3
"""Nats by which a model's log-probability may exceed 0, and the order of two."""


def parse_line(line: bytes | str, vocab_size: int | None = None) -> Trajectory | Failure | None:
    """The value of one line of the answer, in either encoding; None for a heartbeat (a blank line).

    `vocab_size`: columns of the expert's head, where they are known.

    Raises ValueError, KeyError, TypeError, AttributeError or OverflowError where the line is not one of the contract's.
    """
    if not line.strip():
        return None
    fields = orjson.loads(line)
    key = _key_in(fields)
    if "error" in fields:
        kind, detail = fields["error"]["type"], fields["error"]["detail"]
        if not isinstance(kind, str) or not isinstance(detail, str):
            raise ValueError("an error's type and detail are texts")
        return Failure(*key, kind, detail)
    trajectory = Trajectory(
        *key,
        prompt_token_ids=_ids(fields["prompt_token_ids"]),
        token_ids=_ids(fields["token_ids"]),
        top_ids=_ids(fields["top_ids"]),
        expert_logprobs=_logprobs(fields["expert_logprobs"]),
        amateur_logprobs=_logprobs(fields["amateur_logprobs"], unknown=-np.inf),
        finish_reason=fields["finish_reason"],
    )
    if fault := fault_of(trajectory, vocab_size):
        raise ValueError(fault)
    return trajectory


def key_of_line(line: bytes) -> tuple[str, int] | None:
    """Which trajectory a line speaks of, whatever else is wrong with it; None where that cannot be read."""
    try:
        return _key_in(orjson.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def _key_in(fields: dict[str, Any]) -> tuple[str, int]:
    problem_id, index = fields["problem_id"], fields["sample_index"]
    if not isinstance(problem_id, str) or type(index) is not int or not 0 <= index < 2**31:
        raise ValueError(f"{problem_id!r:.100}, {index!r:.100} is no trajectory")
    return problem_id, index


def fault_of(line: Trajectory, vocab_size: int | None = None) -> str | None:
    """What a trajectory says that no model can have given, if anything. `vocab_size`: columns of the expert's head."""
    shape = line.top_ids.shape
    if line.sample_index < 0:
        return f"its sample_index is {line.sample_index}"
    if line.prompt_token_ids.ndim != 1 or line.token_ids.ndim != 1 or len(shape) != 2:
        return "its arrays have other dimensions than [P], [T] and [T, k]"
    if not line.prompt_token_ids.size or not line.top_ids.size:
        return "it has no prompt, no token or no top k"
    if not (len(line.token_ids) == shape[0] and line.expert_logprobs.shape == line.amateur_logprobs.shape == shape):
        return "its arrays are not aligned"
    if min(array.min() for array in (line.prompt_token_ids, line.token_ids, line.top_ids)) < 0:
        return "a token id is negative"
    if vocab_size and (largest := max(line.token_ids.max(), line.top_ids.max())) >= vocab_size:
        return f"token {largest} is beyond the expert's {vocab_size:,} columns"
    ids = np.sort(line.top_ids, axis=1)
    if (ids[:, 1:] == ids[:, :-1]).any():
        return "an id is twice among a step's top k"
    if not (line.expert_logprobs <= ROUNDING).all() or not (line.amateur_logprobs <= ROUNDING).all():  # nor nan
        return "a log-probability is NaN or above 0"
    if not np.isfinite(line.expert_logprobs[:, 0]).all():
        return "the expert's best token is impossible"
    if (line.expert_logprobs[:, 1:] > line.expert_logprobs[:, :-1] + ROUNDING).any():
        return "its top k are not the best first"
    if line.finish_reason not in get_args(FinishReason):
        return f"its finish_reason is {line.finish_reason!r:.100}"
    return None


def _to_base64(array: npt.NDArray[Any]) -> dict[str, Any]:
    dtype = "<f4" if array.dtype.kind == "f" else "<i4"
    data = base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return {"dtype": dtype, "shape": list(array.shape), "data": data.decode()}


def _ids(value: Any) -> npt.NDArray[np.int32]:
    array = _unpacked(value, "<i4") if isinstance(value, dict) else np.array(value)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError("token ids are whole numbers")
    if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise ValueError("a token id is out of range")
    return array.astype(np.int32, copy=False)


def _logprobs(value: Any, unknown: float = np.nan) -> npt.NDArray[np.float32]:
    """`unknown`: what JSON's null stands for."""
    if isinstance(value, dict):
        return _unpacked(value, "<f4")
    array = np.array(value, dtype=np.float32)
    array[np.isnan(array)] = unknown
    return array


def _unpacked(value: dict[str, Any], dtype: str) -> npt.NDArray[Any]:
    if value["dtype"] != dtype:
        raise ValueError(f"an array is of dtype {value['dtype']!r:.100}, where {dtype!r} was expected")
    return np.frombuffer(base64.b64decode(value["data"]), dtype=dtype).reshape(value["shape"])
