"""The lines of a response, for the service's documentation. Programs use `client.protocol.trajectories`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from client.protocol.trajectories import FinishReason


class PackedArray(BaseModel):
    """An array of a response with "encoding": "base64". Its data is row-major and little-endian."""

    dtype: Literal["<i4", "<f4"]
    shape: list[int]
    data: str


class TrajectoryLine(BaseModel):
    """A line of the response. (For the documentation: programs use `Trajectory`.)"""

    problem_id: str
    sample_index: int
    prompt_token_ids: list[int] | PackedArray = Field(description="[P]")
    token_ids: list[int] | PackedArray = Field(description="[T], with the stop token.")
    top_ids: list[list[int]] | PackedArray = Field(description="[T, k]: the expert's k most probable ids, best first.")
    expert_logprobs: list[list[float]] | PackedArray = Field(
        description="[T, k]: natural logarithms of the raw probabilities of top_ids."
    )
    amateur_logprobs: list[list[float | None]] | PackedArray = Field(
        description="[T, k]: the amateur's log-probabilities of the same ids; null if the amateur does not know the id."
    )
    finish_reason: FinishReason


class FailureReason(BaseModel):
    type: str
    detail: str


class FailureLine(BaseModel):
    """The line of a trajectory that failed."""

    problem_id: str
    sample_index: int
    error: FailureReason
