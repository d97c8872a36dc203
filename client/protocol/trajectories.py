"""Reads and writes the lines of a response, in both encodings: a trajectory, or why one failed.

In: bytes or values. Out: values or bytes, or what is wrong with them. The values are dataclasses with numpy arrays:
pydantic would check arrays number by number. No I/O. `client.protocol.requests` exports these names too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from client.errors import shorten

MAX_SAMPLES = 256
"""Most trajectories of a problem. Sample indices are smaller than this."""
FinishReason = Literal["stop", "length"]
FINISH_REASONS = get_args(FinishReason)
Encoding = Literal["json", "base64"]


@dataclass(frozen=True)
class Trajectory:
    """The expert's answer to a problem, with both models' log-probabilities of the expert's top-k ids.

    Row t is step t: the prediction of token_ids[t] from the prompt and the tokens before it. Log-probabilities are
    natural and raw, over the full vocabulary of their model; -inf: the amateur does not know the id.
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

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(getattr(self, name).nbytes for name in self.ARRAYS)

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
    """A trajectory that failed, and why. The other trajectories of the request are not affected."""

    problem_id: str
    sample_index: int
    type: str
    detail: str

    def to_line(self) -> bytes:
        """One NDJSON line, newline included; the same in both encodings."""
        error = {"type": self.type, "detail": self.detail}
        line = {"problem_id": self.problem_id, "sample_index": self.sample_index, "error": error}
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


MOST_VALUES, SMALL_LINE_BYTES = 2**21, 2**22
"""Most JSON values of a line, and the size up to which a line's values are not counted. A value may take 60 bytes or
more."""
MOST_DETAIL_CHARACTERS = 2000
"""Most characters of a failure's detail: a person reads it."""
LOGPROB_ROUNDING = 1e-3
"""Rounding that `fault_of` allows, in nats: above 0, and against the order of the top k."""


def parse_line(line: bytes | str, vocab_size: int | None = None) -> Trajectory | Failure | None:
    """The value of one line, in either encoding; None for a heartbeat (a blank line).

    `vocab_size`: columns of the expert's head, if known.

    Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for an invalid line.
    """
    if not line or line.isspace():
        return None
    fields = _fields_of(line)
    key = _key_in(fields)
    if "error" in fields:
        kind, detail = fields["error"]["type"], fields["error"]["detail"]
        if not isinstance(kind, str) or not isinstance(detail, str):
            raise ValueError("an error's type and detail must be strings")
        return Failure(*key, shorten(kind), shorten(detail, MOST_DETAIL_CHARACTERS))
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
    """The key of the trajectory that a line is about, even if the rest is invalid; None if it cannot be read."""
    try:
        return _key_in(_fields_of(line))
    except (ValueError, KeyError, TypeError):
        return None


def _fields_of(line: bytes | str) -> Any:
    """A line's JSON. Raises ValueError if Python's objects for it would fill the memory."""
    if len(line) > SMALL_LINE_BYTES:
        data = line.encode() if isinstance(line, str) else line
        if most_values(data) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values; base64 packs arrays")
    return orjson.loads(line)


def most_values(data: bytes) -> int:
    """How many values a JSON text holds at most, without reading it."""
    return sum(data.count(mark) for mark in (b"[", b"{", b","))


def _key_in(fields: dict[str, Any]) -> tuple[str, int]:
    problem_id, index = fields["problem_id"], fields["sample_index"]
    if not isinstance(problem_id, str) or type(index) is not int or not 0 <= index < MAX_SAMPLES:
        raise ValueError(f"{problem_id!r:.100}, {index!r:.100} is not a trajectory's key")
    return problem_id, index


def fault_of(line: Trajectory, vocab_size: int | None = None) -> str | None:
    """Why a trajectory is invalid: it has a value that no model can produce. None if it is valid.

    `vocab_size`: columns of the expert's head.
    """
    shape = line.top_ids.shape
    if not 0 <= line.sample_index < MAX_SAMPLES:
        return f"its sample_index is {line.sample_index}"
    if line.prompt_token_ids.ndim != 1 or line.token_ids.ndim != 1 or len(shape) != 2:
        return "its arrays do not have the dimensions [P], [T] and [T, k]"
    if not line.prompt_token_ids.size or not line.top_ids.size:
        return "its prompt, its tokens or its top k are empty"
    if not (len(line.token_ids) == shape[0] and line.expert_logprobs.shape == line.amateur_logprobs.shape == shape):
        return "its arrays have different lengths"
    if min(array.min() for array in (line.prompt_token_ids, line.token_ids, line.top_ids)) < 0:
        return "a token id is negative"
    if vocab_size and (fault := token_fault(line, vocab_size)):
        return fault
    ids = np.sort(line.top_ids, axis=1)
    if (ids[:, 1:] == ids[:, :-1]).any():
        return "a step has the same id twice in its top k"
    # `not <=`, so that NaN fails too
    if not line.expert_logprobs.max() <= LOGPROB_ROUNDING or not line.amateur_logprobs.max() <= LOGPROB_ROUNDING:
        return "a log-probability is NaN or above 0"
    if line.expert_logprobs[:, 0].min() == -np.inf:
        return "the expert's best token has a log-probability of minus infinity"
    if (line.expert_logprobs[:, 1:] > line.expert_logprobs[:, :-1] + LOGPROB_ROUNDING).any():
        return "its top k are not in order, best first"
    if line.finish_reason not in FINISH_REASONS:
        return f"its finish_reason is {line.finish_reason!r:.100}"
    return None


def token_fault(line: Trajectory, vocab_size: int) -> str | None:
    """The largest token id, in words, if an expert with `vocab_size` columns does not have it; else None."""
    largest = max(array.max() for array in (line.prompt_token_ids, line.token_ids, line.top_ids))
    return f"token {largest} is beyond the expert's {vocab_size:,} columns" if largest >= vocab_size else None


def _to_base64(array: npt.NDArray[Any]) -> dict[str, Any]:
    dtype = "<f4" if array.dtype.kind == "f" else "<i4"
    data = pybase64.b64encode_as_string(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return {"dtype": dtype, "shape": list(array.shape), "data": data}


def _ids(value: Any) -> npt.NDArray[np.int32]:
    if isinstance(value, dict):
        return _unpacked(value, "<i4")
    array = _array(value, {int}, np.int64)
    if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise ValueError("a token id is out of range")
    return array.astype(np.int32, copy=False)


def _logprobs(value: Any, unknown: float = np.nan) -> npt.NDArray[np.float32]:
    """`unknown`: the value for JSON's null."""
    if isinstance(value, dict):
        return _unpacked(value, "<f4")
    array = _array(value, {int, float, type(None)}, np.float32)
    array[np.isnan(array)] = unknown
    return array


def _array(value: Any, kinds: set[type], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A list of numbers, or a list of such lists. numpy alone would accept strings as numbers, and pad them."""
    nested = isinstance(value, list) and value and isinstance(value[0], list)
    for row in value if nested else [value]:
        if not isinstance(row, list) or not kinds.issuperset(map(type, row)):
            raise ValueError("an array must hold numbers and nothing else")
    return np.array(value, dtype)


def _unpacked(value: dict[str, Any], dtype: str) -> npt.NDArray[Any]:
    if value["dtype"] != dtype:
        raise ValueError(f"an array has dtype {value['dtype']!r:.100}, expected {dtype!r}")
    return np.frombuffer(pybase64.b64decode(value["data"], validate=True), dtype=dtype).reshape(value["shape"])
