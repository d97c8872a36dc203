"""vLLM's two model runners: which one an engine gets, and the V2 path, a GPU's, run on a CPU (`support.v2`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from support.models.oracle import Oracle, disagreement
from support.models.small_models import never_end, save_small_model
from support.processes.forked import fork_server
from support.servers.real_server import DEMO, ROOT, running_server
from support.v2 import V2_ON_CPU

from client.protocol.requests import parse_line
from server.configuration import load_settings
from server.engines.preflight import inspect_pair

TOLERANCE = 2e-4
THINK, TOOL, VOCABULARY = 110, 111, 112
"""Two added tokens that the amateur does not know, and the expert's columns."""
CHUNK, CONTEXT = 16, 128
TIGHT = {"block_size": 32, "max_num_seqs": 8}
BLOCKS = {"expert": 9, "amateur": 7}
"""With one that vLLM keeps: for two whole contexts and for one, where more requests run: some are preempted."""


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """A pair with unknown tokens on V2, as on a GPU: asynchronous, prompts in chunks, and too few blocks."""
    folder = tmp_path_factory.mktemp("v2")
    expert = save_small_model(folder / "expert", VOCABULARY, 1, {THINK: "<|think|>", TOOL: "<|tool|>"})
    never_end(expert)
    amateur = save_small_model(folder / "amateur", THINK + 1, 2, {THINK: "<|other|>"})
    # The expert's chunks share their step with the tokens that others generate. The amateur never generates, so
    # several of its prompts must be in work at a time.
    with running_server(
        expert, amateur, folder, max_model_len=CONTEXT, environment=V2_ON_CPU, imported=True,
        expert_arguments={**TIGHT, "num_gpu_blocks_override": BLOCKS["expert"], "max_num_batched_tokens": CHUNK},
        amateur_arguments={
            **TIGHT, "num_gpu_blocks_override": BLOCKS["amateur"],
            "max_num_batched_tokens": 2 * CHUNK, "long_prefill_token_threshold": CHUNK,
        },
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def lines(v2):
    """What the server answers to four requests at once and to one more, by the request's name."""
    rng = np.random.default_rng(0)

    def prompts(name, count, length):
        return [
            {"id": f"{name}-{n}", "prompt_token_ids": rng.integers(6, 110, length + n).tolist()} for n in range(count)
        ]

    given = [{**row, "token_ids": rng.integers(6, VOCABULARY, 30).tolist()} for row in prompts("given", 3, 60)]
    given[0]["prompt_token_ids"][3] = given[1]["token_ids"][-1] = THINK
    requests = {
        "generated": {"problems": prompts("generated", 5, 40), "max_tokens": 24, "top_k": VOCABULARY},
        "short": {"problems": prompts("short", 4, 5), "max_tokens": 24, "top_k": 1},
        "sampled": {"problems": prompts("sampled", 3, 30), "max_tokens": 24, "top_k": 7, "n": 2, "temperature": 1.0,
                    "seed": 3},
        "given": {"problems": given, "top_k": 20},
    }  # fmt: skip

    def ask(body):
        answer = httpx.post(f"{v2.url}/v1/trajectories", json={**body, "encoding": "base64"}, timeout=150)
        return [line for line in map(parse_line, answer.text.splitlines()) if line]

    with ThreadPoolExecutor() as pool:
        found = dict(zip(requests, pool.map(ask, requests.values()), strict=True))
    # All but the last token of this prompt is three blocks, in the cache by then: six trajectories begin at one step,
    # end at one step, and the amateur gets them at one moment.
    problems = prompts("together", 1, 97)
    ask({"problems": problems, "max_tokens": 1, "top_k": 1})
    together = {"problems": problems, "n": 6, "temperature": 1.0, "max_tokens": 24, "top_k": 20}
    # Nothing else runs, and three grow by a token a step up to the longest context: there is room for two. Those two
    # come to the amateur within a few of the steps in which it reads one of them: there is room for one.
    growing = {"problems": prompts("growing", 3, 10), "max_tokens": CONTEXT - 13, "top_k": 20}
    return {**found, "together": ask(together), "growing": ask(growing)}


def amateurs_rows(amateur, line):
    """What the amateur says at each step of what it knows of the trajectory, computed plainly: [T, 111]."""
    read = np.concatenate((line.prompt_token_ids, line.token_ids[:-1]))
    known = read < THINK
    rows = amateur.logprobs(read[known][:1], np.append(read[known][1:], 6))
    return rows[(np.cumsum(known) - 1)[len(line.prompt_token_ids) - 1 :]]


def test_the_whole_server_on_v2_agrees_with_transformers(v2, lines):
    counts = {"generated": 5, "short": 4, "sampled": 6, "given": 3, "together": 6, "growing": 3}
    assert {name: len(found) for name, found in lines.items()} == counts
    expert, amateur = Oracle(v2.expert), Oracle(v2.amateur)
    worst, unknown = {"expert": 0.0, "amateur": 0.0}, 0
    for line in (line for found in lines.values() for line in found):
        exact = expert.logprobs(line.prompt_token_ids, line.token_ids)
        worst["expert"] = max(worst["expert"], disagreement(line.expert_logprobs, exact, line.top_ids))
        strange = line.top_ids >= THINK
        unknown += int(strange.sum()) + int((line.token_ids >= THINK).sum())
        assert (np.isneginf(line.amateur_logprobs) == strange).all()
        exact = np.take_along_axis(amateurs_rows(amateur, line), np.where(strange, 0, line.top_ids), 1)
        worst["amateur"] = max(worst["amateur"], np.abs(line.amateur_logprobs - exact)[~strange].max())
        if len(exact) > 1:  # the wrong rows would be noticed
            assert np.abs(line.amateur_logprobs - np.roll(exact, 1, axis=0))[~strange].max() > TOLERANCE
    assert max(worst.values()) <= TOLERANCE, worst
    assert unknown > 100


def test_rows_on_v2_are_the_experts_best_ids_and_greedy_trajectories_follow_them(lines):
    for line in (line for found in lines.values() for line in found):
        assert (np.diff(line.expert_logprobs, axis=1) <= 0).all()
        assert all(len(set(row)) == line.top_ids.shape[1] for row in line.top_ids)
    for line in lines["generated"]:
        taken = line.expert_logprobs[line.top_ids == line.token_ids[:, None]]
        np.testing.assert_allclose(taken, line.expert_logprobs[:, 0], atol=1e-4)
    first, second = (line.token_ids.tolist() for line in lines["sampled"] if line.problem_id == "sampled-0")
    assert first != second


def test_requests_of_both_engines_were_preempted_and_scheduled_ahead(v2, lines):
    assert [line.finish_reason for line in lines["growing"]] == ["length"] * 3
    for role in ("expert", "amateur"):
        assert v2.metric("vllm:num_preemptions_total", role=role) >= 1
        assert f"{role}: vLLM's model runner V2, asynchronous scheduling" in v2.log.read_text(errors="replace")


@pytest.mark.parametrize(("ways", "count"), [([], 4), pytest.param(["all"], 9, marks=pytest.mark.long)])
def test_vllms_scoring_kernels_are_exact_at_the_width_of_a_real_vocabulary(ways, count):
    kernels = fork_server("v2").fork("support.v2.kernels:main", ["kernels", *ways], V2_ON_CPU)
    said, errors = kernels.communicate(300)
    assert kernels.returncode == 0, errors[-2000:]
    worst = json.loads(said.splitlines()[-1])
    assert len(worst) == count and max(worst.values()) <= 2e-5, worst


REFUSED = [
    ("0", False, {}, "VLLM_USE_V2_MODEL_RUNNER=0 is set; unset it"),
    (None, False, {}, "V2 requires Triton, and vLLM finds none that works here"),
    (
        None,
        True,
        {"distributed_executor_backend": "external_launcher", "pipeline_parallel_size": 2},
        "V2 does not yet support pipeline parallelism with external_launcher; remove the engine argument",
    ),
]


@pytest.mark.parametrize(("variable", "triton", "arguments", "reason"), REFUSED)
def test_v1_on_a_gpu_is_refused_with_vllms_reason_before_anything_is_loaded(
    monkeypatch, variable, triton, arguments, reason
):
    import vllm.config.vllm

    from server.engines import start

    monkeypatch.setattr(start, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(start, "_card_memory", lambda _: 80 * 2**30)
    monkeypatch.setattr(start, "Engine", lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", triton)
    if variable:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", variable)
    settings = load_settings(None, expert=str(DEMO / "expert"), amateur=str(DEMO / "amateur"))
    settings = settings.model_copy(update={"amateur": {**settings.amateur, **arguments}})
    with pytest.raises(start.EngineStartError, match="on a GPU the amateur needs vLLM's V2 model runner") as refused:
        start.start_pair(settings, inspect_pair(DEMO / "expert", DEMO / "amateur"), threading.Event())
    assert reason in str(refused.value)


def test_v2_without_triton_is_refused_before_anything_is_loaded(monkeypatch):
    from server.engines import start

    monkeypatch.setattr(start, "Engine", lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    settings = load_settings(None, expert=str(DEMO / "expert"), amateur=str(DEMO / "amateur"))
    with pytest.raises(
        start.EngineStartError, match=r"the expert's engine did not start .*: Model Runner V2 requires Triton"
    ):
        start.start_pair(settings, inspect_pair(DEMO / "expert", DEMO / "amateur"), threading.Event())


@pytest.mark.long
def test_every_claim_about_trajectories_and_the_smollm2_pair_hold_on_v2():
    files = [ROOT / "tests" / name for name in ("server/test_trajectories.py", "e2e/test_smollm2.py")]
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], cwd=ROOT,
        env={**os.environ, **V2_ON_CPU}, capture_output=True, text=True, timeout=840,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout[-4000:]
