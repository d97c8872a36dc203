"""CPU time per trajectory in the server's own process, with vLLM's handling of log-probabilities and with ours.

No engine runs. Messages are made as an engine's scheduler makes them, for all requests at each step. They go through
all that the server's process does with them: vLLM's decoder and output processor, the pair's arrays, the answer's line.
Both ways run in turns. The CPU time of the engine's side, which encodes the messages, is printed, too. As it measures
CPU time, a busy machine does not matter.

    .venv/bin/python tests/benchmarks/front_end.py [--requests 256] [--tokens 128] [--top-k 20] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def steps(requests: int, tokens: int, top_k: int) -> list[Any]:
    """The output of a model runner at each step: [requests, k + 1] ids and log-probabilities."""
    from vllm.v1.outputs import LogprobsLists

    rng = np.random.default_rng(0)
    shape = (requests, top_k + 1)
    return [
        LogprobsLists(
            rng.integers(0, 150_000, shape), np.sort(-rng.exponential(3, shape)).astype(np.float32)[:, ::-1],
            np.ones(requests, np.int64),
        )
        for _ in range(tokens)
    ]  # fmt: skip


class Engine:
    """The engine's side of one round: messages as bytes. `held`: as our scheduler makes them."""

    def __init__(self, held: bool) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        from server.engines.logprobs.scheduler import HeldLogprobs

        self._held = HeldLogprobs() if held else None
        self._encoder = MsgpackEncoder()
        self.seconds = 0.0

    def message(self, logprobs: Any, names: list[str], last: bool) -> list[bytes]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        began = time.process_time()
        outputs = [
            EngineCoreOutput(
                name, [int(logprobs.logprob_token_ids[index, 0])], logprobs.slice_request(index, 1),
                finish_reason=FinishReason.LENGTH if last else None,
            )
            for index, name in enumerate(names)
        ]  # fmt: skip
        if self._held:
            self._held.hold(outputs, set(names))
        frames = [bytes(frame) for frame in self._encoder.encode(EngineCoreOutputs(outputs=outputs))]
        self.seconds += time.process_time() - began
        return frames


async def front_end(arrays: bool, requests: int, tokens: int, top_k: int, made: list[Any]) -> tuple[float, float]:
    """CPU milliseconds for a trajectory in the server's process, and in the engine's."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.metrics.stats import IterationStats
    from vllm.v1.serial_utils import MsgpackDecoder

    from client.protocol.requests import Trajectory
    from server.engines.logprobs.arrays import ArrayOutputs
    from server.engines.pair import _top_k

    processor = (ArrayOutputs if arrays else OutputProcessor)(None, log_stats=True)
    params = SamplingParams(
        max_tokens=tokens, logprobs=top_k, flat_logprobs=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    prompt = list(range(100))
    names = [f"request-{number:06}-{'0' * 24}" for number in range(requests)]
    queues = {}
    for name in names:
        queues[name] = RequestOutputCollector(params.output_kind, name)
        request = EngineCoreRequest(
            request_id=name, external_req_id=name, prompt_token_ids=prompt, mm_features=None, sampling_params=params,
            pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None,
            data_parallel_rank=None,
        )  # fmt: skip
        processor.add_request(request, None, None, 0, queues[name])
    engine, decoder, seconds = Engine(held=arrays), MsgpackDecoder(EngineCoreOutputs), 0.0
    for number, logprobs in enumerate(made):
        frames = engine.message(logprobs, names, number + 1 == tokens)
        began = time.process_time()
        message = decoder.decode(frames)
        processor.process_outputs(message.outputs, message.timestamp, IterationStats())
        seconds += time.process_time() - began
    began = time.process_time()
    for name, queue in queues.items():
        completion = (await queue.get()).outputs[0]
        top_ids, logprobs = _top_k(completion.logprobs, top_k)
        ids = np.array(completion.token_ids, np.int32)
        line = Trajectory(name, 0, np.array(prompt, np.int32), ids, top_ids, logprobs, logprobs, "length")
        assert len(line.to_line("base64")) > tokens * top_k
    seconds += time.process_time() - began
    return 1e3 * seconds / requests, 1e3 * engine.seconds / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("requests", 256), ("tokens", 128), ("top-k", 20), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    made = steps(asked.requests, asked.tokens, asked.top_k)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(asked.rounds):
        for arrays, figures in found.items():
            figures.append(asyncio.run(front_end(arrays, asked.requests, asked.tokens, asked.top_k, made)))
    print(f"{asked.requests} requests x {asked.tokens} tokens, k = {asked.top_k}, median of {asked.rounds} rounds")
    print(f"{'CPU ms a trajectory':24}{'vLLM':>10}{'ours':>10}{'ratio':>10}")
    for column, side in enumerate(("the server's process", "the engine's messages")):
        before, after = (median(row[column] for row in found[arrays]) for arrays in (False, True))
        print(f"{side:24}{before:10.2f}{after:10.2f}{after / before:10.2f}")


if __name__ == "__main__":
    main()
