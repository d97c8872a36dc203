"""In the engine's process: keeps a request's log-probabilities until its last token, then sends them as two arrays.

vLLM itself sends three small arrays per token, and the server's process then spends most of its time unpacking them.
Tokens are still sent as they come. In: messages that vLLM's scheduler is about to send. Out: the same, with each
request's rows in its last message. vLLM creates the scheduler from the engine argument `scheduler_cls`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists

StepRow = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class HeldLogprobs:
    """Rows of requests that still generate: for each token its ids and their log-probabilities, both [1, width]."""

    def __init__(self) -> None:
        self._rows: dict[str, list[StepRow]] = {}

    def hold(self, outputs: Iterable[EngineCoreOutput], running: Container[str]) -> None:
        """Move the rows of `outputs` to their request's last output. Drop rows of requests that are not `running`."""
        for output in outputs:
            if (new := output.new_logprobs) is not None:
                # Copied: a row is a view of the whole step's array, which it would keep alive.
                row = new.logprob_token_ids.astype(np.int32), new.logprobs.astype(np.float32)
                self._rows.setdefault(output.request_id, []).append(row)
                output.new_logprobs = None
            if output.finished and (rows := self._rows.pop(output.request_id, None)):
                output.new_logprobs = _whole(rows)
        for aborted in [name for name in self._rows if name not in running]:
            del self._rows[aborted]


def _whole(rows: list[StepRow]) -> LogprobsLists:
    """Join a request's rows, at the width of the narrowest.

    All rows of a step are as wide as its widest request needs, so the narrowest row still has all that this request
    asked for.
    """
    width = min(ids.shape[1] for ids, _ in rows)
    ids, logprobs = (np.concatenate([array[:, :width] for array in arrays]) for arrays in zip(*rows, strict=True))
    return LogprobsLists(ids, logprobs, np.empty(0, np.int32))  # the ranks are not used


class _Holding(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held = HeldLogprobs()

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        sent = super().update_from_output(*args, **kwargs)
        self._held.hold((output for outputs in sent.values() for output in outputs.outputs), self.requests)
        return sent


class HoldingScheduler(_Holding):
    """vLLM's scheduler, which keeps log-probabilities until a request's end."""


class HoldingAsyncScheduler(_Holding, AsyncScheduler):
    """vLLM's asynchronous scheduler, which keeps log-probabilities until a request's end."""
