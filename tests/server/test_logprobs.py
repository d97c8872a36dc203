"""Log-probabilities on their way from an engine: kept until a request's end, and never made into Python numbers."""

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from server.engines.logprobs.arrays import ArrayOutputs
from server.engines.logprobs.scheduler import HeldLogprobs

PROMPT = [7, 8, 9]


def step(rng, width):
    """One token's rows, as a step gives them whose widest request asks for `width` - 1 ids."""
    return LogprobsLists(rng.integers(0, 99, (1, width)), -rng.exponential(3, (1, width)), np.ones(1, np.int64))


def output(name, new, last=False, token=5):
    tokens = [] if new is None else [token]
    return EngineCoreOutput(name, tokens, new_logprobs=new, finish_reason=FinishReason.LENGTH if last else None)


def answers(processor, messages, **asked):
    """The completion that vLLM's request queue gives after these messages of request 'a'."""
    params = SamplingParams(
        detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, max_tokens=9, **asked
    )
    queue = RequestOutputCollector(params.output_kind, "a")
    request = EngineCoreRequest(
        request_id="a", external_req_id="a", prompt_token_ids=PROMPT, mm_features=None, sampling_params=params,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    processor.add_request(request, None, None, 0, queue)
    for message in messages:
        processor.process_outputs([message])
    return queue.get_nowait()


def as_lists(flat):
    names = "start_indices", "end_indices", "token_ids", "logprobs"
    return [np.asarray(getattr(flat, name)).tolist() for name in names]


def test_rows_are_sent_once_with_the_last_token_and_tokens_as_they_come():
    rng, held = np.random.default_rng(0), HeldLogprobs()
    rows = [step(rng, width) for width in (6, 4, 6)]
    messages = [output("a", row, last=number == 2, token=number) for number, row in enumerate(rows)]
    others = [output("b", step(rng, 6)) for _ in rows]
    for mine, other in zip(messages, others, strict=True):
        held.hold([mine, other], {"a", "b"})
    assert [message.new_token_ids for message in messages] == [[0], [1], [2]]
    assert [message.new_logprobs is None for message in messages + others] == [True, True, False, True, True, True]
    whole = messages[2].new_logprobs
    np.testing.assert_array_equal(
        whole.logprob_token_ids, np.concatenate([row.logprob_token_ids[:, :4] for row in rows])
    )
    np.testing.assert_allclose(whole.logprobs, np.concatenate([row.logprobs[:, :4] for row in rows]), rtol=1e-6)


def test_rows_of_a_request_that_was_aborted_are_forgotten():
    rng, held = np.random.default_rng(0), HeldLogprobs()
    held.hold([output("a", step(rng, 4)), output("b", step(rng, 4))], {"a", "b"})
    held.hold([], {"b"})
    assert list(held._rows) == ["b"]
    ended = output("b", None, last=True)  # vLLM may end a request without another token
    held.hold([ended], {})
    assert len(ended.new_logprobs.logprobs) == 1 and not held._rows


@pytest.mark.parametrize("k", [1, 3])
def test_the_arrays_are_what_vllm_makes_of_the_same_rows(k):
    rng, held = np.random.default_rng(0), HeldLogprobs()
    rows = [step(rng, 6)._replace(logprobs=-rng.exponential(3, (1, 6)).astype(np.float32)) for _ in range(4)]
    vllms = answers(
        OutputProcessor(None, log_stats=False), [output("a", row, last=row is rows[-1]) for row in rows], logprobs=k
    )
    messages = [output("a", row, last=row is rows[-1]) for row in rows]
    for message in messages:
        held.hold([message], {"a"})
    ours = answers(ArrayOutputs(None, log_stats=False), messages, logprobs=k)
    assert isinstance(ours.outputs[0].logprobs.token_ids, np.ndarray)
    assert as_lists(ours.outputs[0].logprobs) == as_lists(vllms.outputs[0].logprobs)
    assert ours.outputs[0].token_ids == vllms.outputs[0].token_ids == [5] * 4


def test_rows_that_come_token_by_token_are_left_to_vllm():
    rng = np.random.default_rng(0)
    rows = [step(rng, 4) for _ in range(3)]
    found = answers(
        ArrayOutputs(None, log_stats=False), [output("a", row, last=row is rows[-1]) for row in rows], logprobs=3
    )
    assert len(found.outputs[0].logprobs) == 3 and isinstance(found.outputs[0].logprobs.token_ids, list)


def test_a_prompts_rows_are_arrays_behind_an_empty_first_one():
    rng = np.random.default_rng(0)
    tensors = LogprobsTensors(
        torch.from_numpy(rng.integers(0, 99, (2, 4))), torch.from_numpy(-rng.exponential(3, (2, 4)).astype(np.float32)),
        torch.ones(2, dtype=torch.int64),
    )  # fmt: skip
    found = []
    for processor in (OutputProcessor, ArrayOutputs):
        message = EngineCoreOutput("a", [5], new_prompt_logprobs_tensors=tensors, finish_reason=FinishReason.LENGTH)
        found.append(answers(processor(None, log_stats=False), [message], prompt_logprobs=3).prompt_logprobs)
    assert isinstance(found[1], FlatLogprobs) and isinstance(found[1].token_ids, np.ndarray)
    assert as_lists(found[1]) == as_lists(found[0])
