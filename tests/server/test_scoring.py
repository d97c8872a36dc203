"""How the amateur is asked, checked without an engine, and against vLLM's own validation."""

import numpy as np
import pytest

from server.engines.scoring import scoring_params, scoring_passes

KNOWN = np.ones(50, bool)


def passes(prompt, completion, known=KNOWN, k=3):
    top_ids = np.arange(len(completion) * k, dtype=np.int32).reshape(-1, k) % 50
    arrays = np.array(prompt, np.int32), np.array(completion, np.int32)
    return top_ids, list(scoring_passes(*arrays, top_ids, known))


def test_one_pass_scores_every_step_of_a_trajectory_that_is_known():
    top_ids, (scoring,) = passes([1, 2, 3], [4, 5, 6])
    assert scoring.prompt_token_ids[:5] == [1, 2, 3, 4, 5] and len(scoring.prompt_token_ids) == 6
    assert scoring.start == 2 and scoring.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(scoring.token_ids, top_ids)


def test_unknown_ids_are_never_sent():
    known = KNOWN.copy()
    known[[5, 6, 7]] = False
    _, scorings = passes([1, 2, 6], [4, 5, 6, 8], known, k=10)
    for scoring in scorings:
        assert not set(scoring.prompt_token_ids) & {5, 6, 7}
        assert not set(scoring.token_ids.ravel().tolist()) & {5, 6, 7}
    assert sorted(s for scoring in scorings for s in scoring.steps.tolist() if s >= 0) == [0, 1, 2, 3]


def test_a_step_after_an_unknown_token_goes_into_a_further_pass():
    known = KNOWN.copy()
    known[5] = False
    top_ids, (first, second) = passes([1, 2], [4, 5, 6], known)
    assert first.prompt_token_ids[:3] == [1, 2, 4] == second.prompt_token_ids[:3]
    assert first.steps.tolist() == [0, 1] and second.steps.tolist() == [-1, 2]
    assert (second.token_ids[0] == -1).all() and 5 not in second.token_ids
    np.testing.assert_array_equal(second.token_ids[1], np.where(top_ids[2] == 5, -1, top_ids[2]))


def test_a_prompt_of_which_nothing_is_known_is_refused():
    known = KNOWN.copy()
    known[1] = False
    with pytest.raises(ValueError, match="knows no token of the prompt"):
        passes([1, 1], [2, 3], known)


def test_the_native_parameters_pass_vllms_own_validation(monkeypatch):
    """On a GPU vLLM scores ids itself; here its input processor judges our parameters, no engine is run."""
    from support.servers.real_server import DEMO
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs import tokens_input
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    config = AsyncEngineArgs(model=str(DEMO / "amateur"), enforce_eager=True, kv_cache_memory_bytes=2**28)
    vllm_config = config.create_engine_config()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    processor = InputProcessor(vllm_config, renderer_from_config(vllm_config))

    def judge(scoring, **changes):
        params = scoring_params(scoring, native=True)
        for name, value in changes.items():
            setattr(params, name, value)
        prompt = tokens_input(scoring.prompt_token_ids)
        return processor.process_inputs("name", prompt, params, supported_tasks=("generate",))

    known = KNOWN.copy()
    known[5] = False
    for _, scorings in (passes([1, 2, 3], [4, 5, 6]), passes([1, 2], [4, 5, 6, 5], known)):
        for scoring in scorings:
            accepted = judge(scoring).sampling_params
            np.testing.assert_array_equal(accepted.prompt_logprob_token_ids, scoring.token_ids)
            assert accepted.prompt_logprob_start == scoring.start
            with pytest.raises(VLLMValidationError, match="scored rows"):
                judge(scoring, prompt_logprob_start=scoring.start + 1)


@pytest.mark.gpu
def test_vllms_own_scoring_agrees_with_transformers_on_a_gpu(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: vLLM's own prompt_logprob_token_ids needs the V2 model runner")
    from gpu.parts import IEEE
    from support.models.oracle import Oracle, disagreement
    from support.servers.real_server import DEMO, running_server
    from test_trajectories import ask
    from word_problems import rows

    problems = [{"id": row["id"], "question": row["question"]} for row in rows("dev", 16)]
    amateur = Oracle(DEMO / "amateur")
    with running_server(DEMO / "expert", DEMO / "amateur", tmp_path, environment=IEEE) as server:
        for line in ask(server, problems, max_tokens=48, top_k=32).values():
            exact = amateur.logprobs(line.prompt_token_ids, line.token_ids)
            assert disagreement(line.amateur_logprobs, exact, line.top_ids) <= 2e-3
