"""In the server's process: keeps log-probabilities as the arrays that the engine sent.

vLLM itself makes lists of Python numbers of them, token by token. In: vLLM's messages from an engine. Out: vLLM's
outputs, with arrays where its `FlatLogprobs` holds lists. Log-probabilities that are spread over several messages are
left to vLLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput


class ArrayOutputs(OutputProcessor):
    """vLLM's output processor, without a Python object for each log-probability."""

    @classmethod
    def instead_of(cls, processor: OutputProcessor) -> ArrayOutputs:
        """A new one with the settings of `processor`, which has not been used yet."""
        return cls(
            processor.tokenizer,
            log_stats=processor.log_stats,
            stream_interval=processor.stream_interval,
            tracing_enabled=processor.tracing_enabled,
        )

    def process_outputs(
        self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> OutputProcessorOutput:
        for output in engine_core_outputs:
            if output.new_logprobs is not None or output.new_prompt_logprobs_tensors is not None:
                self._keep(output)
        return super().process_outputs(engine_core_outputs, *args, **kwargs)

    def _keep(self, output: EngineCoreOutput) -> None:
        state = self.request_states.get(output.request_id)
        processor = state.logprobs_processor if state else None
        if processor is None:
            return
        new, prompt = output.new_logprobs, output.new_prompt_logprobs_tensors
        if new is not None and output.finished and not processor.logprobs and processor.num_logprobs is not None:
            processor.logprobs = array_logprobs(new.logprob_token_ids, new.logprobs, processor.num_logprobs)
            output.new_logprobs = None
        known, k = processor.prompt_logprobs, processor.num_prompt_logprobs
        if prompt is not None and known is not None and len(known) == 1 and k is not None:
            processor.prompt_logprobs = array_logprobs(prompt.logprob_token_ids.numpy(), prompt.logprobs.numpy(), k, 1)
            output.new_prompt_logprobs_tensors = None


def array_logprobs(
    ids: npt.NDArray[np.integer], logprobs: npt.NDArray[np.floating], k: int, empty: int = 0
) -> FlatLogprobs:
    """FlatLogprobs of the first k + 1 entries of rows [T, k + 1 or more] (all for k = -1), after `empty` empty rows."""
    width = ids.shape[1] if k == -1 else k + 1
    ends = np.concatenate((np.zeros(empty, np.int64), np.arange(1, len(ids) + 1) * width))
    starts = np.concatenate((np.zeros(empty, np.int64), np.arange(len(ids)) * width))
    flat = np.ascontiguousarray(ids[:, :width]).ravel(), np.ascontiguousarray(logprobs[:, :width]).ravel()
    return FlatLogprobs(starts, ends, *flat)  # type: ignore[arg-type]  # arrays are indexed as its lists are
