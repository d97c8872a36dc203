"""Pairs as the paper's are published: where trajectories end, and what an amateur reads that lacks the chat's tokens.

The expert is a base model with a chat template: its tokenizer and generation config end at token 2, and only its
template closes a turn with token 112. Of its role tokens the amateur knows none, and it has a template of its own.
"""

import json

import httpx
import numpy as np
import pytest
from support.models.oracle import Oracle
from support.models.small_models import save_small_model
from support.servers.real_server import command, running_server
from word_problems import rows

from client.protocol.requests import Failure, parse_line
from client.runs.run import Run

USER, ASSISTANT, TURN_END = 110, 111, 112
VOCABULARY = 113
EXPERT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}{% else %}"
    "<|{{ 'User' if message.role == 'user' else 'Assistant' }}|>{{ message.content }}{% if message.role != 'user' %}"
    "<|turn_end|>{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
AMATEUR_TEMPLATE = (
    "{{ strftime_now('%d') }}{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
DAY = "2026-01-31"


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The pair, served."""
    folder = tmp_path_factory.mktemp("paper")
    expert = save_small_model(
        folder / "expert", VOCABULARY, 1, {USER: "<|User|>", ASSISTANT: "<|Assistant|>", TURN_END: "<|turn_end|>"}
    )
    amateur = save_small_model(
        folder / "amateur", VOCABULARY, 2, {USER: "<|im_start|>", ASSISTANT: "<|im_end|>", TURN_END: "<|other|>"}
    )
    (expert / "chat_template.jinja").write_text(EXPERT_TEMPLATE)
    (amateur / "chat_template.jinja").write_text(AMATEUR_TEMPLATE)
    with running_server(expert, amateur, folder, imported=True) as server:
        yield server


@pytest.fixture(scope="module")
def amateur(paper):
    return Oracle(paper.amateur)


def ask(server, problems, **fields):
    body = {"problems": problems, "top_k": 20, "date": DAY, **fields}
    response = httpx.post(f"{server.url}/v1/trajectories", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return [line for line in map(parse_line, response.text.splitlines()) if line]


QUESTIONS = [{"id": row["id"], "question": row["question"]} for row in rows("dev", 4)]


def own_prompt(server, question, day="31"):
    """What transformers makes of a question by the amateur's own template; the tokens' ids are the test's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.amateur)
    messages = [{"role": "system", "content": "Please reason step by step."}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, strftime_now=lambda _: day
    )


def test_the_end_of_turn_is_among_the_ends_that_the_card_and_the_log_name(paper):
    expert, amateur = httpx.get(f"{paper.url}/v1/models").json()["data"]
    assert (expert["end_token_ids"], amateur["end_token_ids"]) == ([2, TURN_END], None)
    assert (expert["amateur_prompt"], amateur["amateur_prompt"]) == (None, "own")
    assert (expert["writes_date"], amateur["writes_date"]) == (False, True)
    log = paper.log.read_text(errors="replace")
    assert "trajectories end at: 2 '<|end|>', 112 '<|turn_end|>'" in log and "own chat template" in log


def test_trajectories_end_with_their_turn_and_its_step_counts(paper):
    asked = {"n": 8, "temperature": 1.5, "seed": 1, "max_tokens": 60}
    ended = set()
    for line in ask(paper, QUESTIONS, **asked):
        assert not {2, TURN_END} & set(line.token_ids[:-1].tolist()) and len(line.top_ids) == len(line.token_ids)
        ends = line.token_ids[-1] in (2, TURN_END)
        assert (line.finish_reason, len(line.token_ids) == 60) in (("stop", False), ("stop", True), ("length", True))
        assert ends == (line.finish_reason == "stop")
        ended |= {int(line.token_ids[-1])} if ends else set()
    assert ended == {2, TURN_END}


def test_a_request_names_further_ends_and_a_given_completion_ends_at_the_same(paper):
    first = ask(paper, QUESTIONS[2:3], max_tokens=30)[0]
    stop = int(first.token_ids[5])
    cut = ask(paper, QUESTIONS[2:3], max_tokens=30, stop_token_ids=[stop])[0]
    until = first.token_ids.tolist().index(stop) + 1
    assert cut.token_ids.tolist() == first.token_ids.tolist()[:until] and cut.finish_reason == "stop"
    given = [{"id": str(end), "question": "How many?", "token_ids": [20, end]} for end in (2, TURN_END, stop, 21)]
    for stops, expected in (([], {2, TURN_END}), ([stop], {2, TURN_END, stop})):
        lines = ask(paper, given, stop_token_ids=stops)
        assert {int(line.problem_id) for line in lines if line.finish_reason == "stop"} == expected


@pytest.mark.parametrize("asked", [{}, {"amateur_prompt": "own"}])
def test_an_amateur_that_lacks_the_chats_tokens_reads_its_own_template(paper, amateur, asked):
    for line, problem in zip(ask(paper, QUESTIONS, max_tokens=12, **asked), QUESTIONS, strict=False):
        problem = next(one for one in QUESTIONS if one["id"] == line.problem_id)
        prompt = np.array(own_prompt(paper, problem["question"]))
        assert USER in line.prompt_token_ids and USER in prompt and ASSISTANT in prompt
        until = next((t + 1 for t, token in enumerate(line.token_ids) if token >= USER), len(line.token_ids))
        known = line.top_ids[:until] < USER
        exact = np.take_along_axis(amateur.logprobs(prompt, line.token_ids)[:until], line.top_ids[:until], 1)
        assert np.abs(line.amateur_logprobs[:until] - exact)[known].max() <= 2e-4
        assert np.isneginf(line.amateur_logprobs[:until][~known]).all()


def test_the_same_prompt_is_what_the_amateur_knows_of_the_experts(paper, amateur):
    for line in ask(paper, QUESTIONS[:2], max_tokens=1, amateur_prompt="same"):
        known = line.prompt_token_ids[line.prompt_token_ids < USER]
        ids = line.top_ids < USER
        exact = amateur.logprobs(known, line.token_ids)
        assert np.abs(line.amateur_logprobs - np.take_along_axis(exact, line.top_ids, 1))[ids].max() <= 2e-4


def test_token_ids_given_as_a_prompt_are_always_the_same(paper, amateur):
    prompt = [6, 7, 8, 9]
    for asked in ({}, {"amateur_prompt": "own"}):
        (line,) = ask(paper, [{"id": "x", "prompt_token_ids": prompt}], max_tokens=1, top_k=VOCABULARY - 3, **asked)
        ids = line.top_ids < USER
        exact = amateur.logprobs(np.array(prompt), line.token_ids)
        assert np.abs(line.amateur_logprobs - np.take_along_axis(exact, line.top_ids, 1))[ids].max() <= 2e-4


def test_what_the_amateur_reads_must_fit_its_own_context(paper):
    question = " 1" * 115  # in the amateur's prompt the system prompt and the question take more tokens
    expert = len(ask(paper, [{"id": "x", "question": question}], max_tokens=1)[0].prompt_token_ids)
    own = len(own_prompt(paper, question))
    assert own > expert
    room = 256 - own - 1
    (fits,) = ask(paper, [{"id": "x", "question": question}], max_tokens=room)
    (late,) = ask(paper, [{"id": "x", "question": question}], max_tokens=room + 1)
    assert not isinstance(fits, Failure) and late.type == "context_length_exceeded"
    assert f"{own} prompt tokens" in late.detail and "the amateur's context" in late.detail


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"amateur_prompt": "theirs"}, "amateur_prompt"),
        ({"date": "31.1.2026"}, "date"),
    ],
)
def test_what_is_no_end_no_prompt_and_no_day_is_refused_by_its_name(paper, fields, field):
    response = httpx.post(f"{paper.url}/v1/trajectories", json={"problems": QUESTIONS, **fields})
    assert response.status_code == 422
    assert field in [entry["field"] for entry in response.json()["errors"]], response.text


def test_a_run_holds_its_ends_its_amateurs_prompt_and_its_date(paper, tmp_path):
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    words = ["sample", tmp_path / "problems.jsonl", tmp_path / "run", *paper.options, "--max-tokens", 8]
    sampled = command("client", *words, "--stop-token-ids", "20,21", "--limit", 4)
    assert sampled.returncode == 0, sampled.stderr
    manifest = Run(str(tmp_path / "run")).manifest()
    assert manifest.end_token_ids == [2, 20, 21, TURN_END] and manifest.expert.end_token_ids == [2, TURN_END]
    assert (manifest.amateur_prompt, manifest.decoding.stop_token_ids) == ("own", [20, 21])
    # The same RUN on another day: what is missing is asked with the RUN's date.
    (tmp_path / "run" / "complete.json").unlink()
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(said | {"date": DAY}))
    for part in (tmp_path / "run").glob("*/part-*"):
        part.unlink()
    assert command("client", *words, "--stop-token-ids", "20,21").returncode == 0
    rescored = {line.problem_id: line for line in ask(paper, QUESTIONS, max_tokens=8, stop_token_ids=[20, 21])}
    for line in Run(str(tmp_path / "run")).trajectories():
        np.testing.assert_allclose(line.amateur_logprobs, rescored[line.problem_id].amateur_logprobs, atol=1e-4)
    # What is asked otherwise, or was sampled before ends of turn were known, is refused.
    (tmp_path / "run" / "complete.json").unlink()
    other = command("client", *words)
    assert other.returncode == 1 and "--stop-token-ids: [20, 21] against []" in other.stderr, other.stderr
    early = {name: value for name, value in said.items() if name not in ("end_token_ids", "amateur_prompt", "date")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(early))
    other = command("client", *words, "--stop-token-ids", "20,21")
    assert other.returncode == 1 and "end_token_ids: None against [2, 20, 21, 112]" in other.stderr
    assert "may go on behind the end of turn" in other.stderr
