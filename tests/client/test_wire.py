"""What the client sends: nothing that an earlier server would refuse, unless it was asked for."""

import asyncio
import json

import orjson
import pytest
from support.runs.made_run import make_manifest, make_trajectory
from support.servers.contract_server import ContractServer

from client.cli.options import SamplingOptions
from client.errors import LightReasonerError, ModelError
from client.models.fingerprints import model_folder
from client.problems.problem_set import ProblemSet
from client.protocol.requests import (
    ContrastSettings,
    JobRequest,
    PairCards,
    Problem,
    SamplingSettings,
    parse_line,
)
from client.sampling.agreement import manifest_of
from client.servers.connection import Connection, _body

PROBLEMS = [Problem(id="a", question="How many?")]
ASKED = {"stop_token_ids": [1, 2], "amateur_prompt": "own", "date": "2026-01-31"}


def test_fields_that_earlier_servers_do_not_know_are_sent_only_where_they_say_something():
    plain = orjson.loads(_body(PROBLEMS, SamplingSettings(system_prompt=None)))
    assert plain["system_prompt"] is None and not set(ASKED) & plain.keys()
    assert orjson.loads(_body(PROBLEMS, SamplingSettings(**ASKED))).items() >= ASKED.items()


@pytest.mark.parametrize("system_prompt", ["Think.", None])
def test_a_job_is_submitted_with_its_system_prompt_or_without_one(system_prompt, monkeypatch):
    sent = []

    async def post(connection, path, headers, body):
        sent.append(json.loads(body))
        raise LightReasonerError("far enough")

    monkeypatch.setattr(Connection, "_post", post)
    request = JobRequest(run="r", problems=PROBLEMS, system_prompt=system_prompt, stop_token_ids=[1])
    with pytest.raises(LightReasonerError, match="far enough"):
        asyncio.run(Connection("http://127.0.0.1:9", None).submit(request))
    assert (sent[0]["system_prompt"], sent[0]["stop_token_ids"]) == (system_prompt or "", [1])
    assert not {"amateur_prompt", "date"} & sent[0].keys()


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        ({}, "same"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "same"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "own"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "amateur_prompt": "same"}, "same"),
    ],
)
def test_a_run_with_a_switch_that_the_amateur_cannot_follow_has_the_amateurs_own_prompt(asked, read):
    made = make_manifest()
    amateur = made.amateur.model_copy(
        update={"amateur_prompt": "same", "own_prompt_with": {"enable_thinking": [False]}, "writes_date": True}
    )
    sampling, pair = SamplingSettings(**asked), PairCards(made.expert, amateur)
    manifest = manifest_of(ProblemSet.of(PROBLEMS), pair, {}, sampling, ContrastSettings(), "2026-01-31")
    assert (manifest.amateur_prompt, manifest.date) == (read, "2026-01-31" if read == "own" else None)


def test_options_become_fields():
    options = SamplingOptions(chat_template_kwargs='{"enable_thinking": false}', stop_token_ids="2, 1,2")
    settings = options.settings()
    assert settings.chat_template_kwargs == {"enable_thinking": False} and settings.stop_token_ids == [1, 2]
    assert SamplingOptions().settings() == SamplingSettings()
    whole = SamplingOptions(solutions=True).settings()
    assert (whole.n, whole.temperature, whole.max_tokens) == (8, 0.8, 1024) and r"\boxed{}" in str(whole.system_prompt)
    chosen = SamplingOptions(solutions=True, n=2, temperature=1.0, max_tokens=64, system_prompt="").settings()
    assert (chosen.n, chosen.temperature, chosen.max_tokens, chosen.system_prompt) == (2, 1.0, 64, None)
    assert SamplingOptions(solutions=True).contrast() == SamplingOptions().contrast()
    for wrong, said in (
        ({"chat_template_kwargs": "{x}"}, "--chat-template-kwargs '{x}' is not JSON"),
        ({"chat_template_kwargs": "[1]"}, "give a JSON object"),
        ({"chat_template_kwargs": '{"a": NaN}'}, "is not JSON"),
        ({"chat_template_kwargs": '{"tokenize": false}'}, "tokenize is not a variable"),
        ({"stop_token_ids": "1;2"}, "--stop-token-ids '1;2': give token ids"),
        ({"stop_token_ids": "-1"}, "--stop-token-ids: "),
        ({"solutions": True, "temperature": 0.0}, "--solutions samples 8 .*; add --n 1, or leave out --temperature"),
        ({"system_prompt": "\udc80"}, "--system-prompt: .* is not valid UTF-8"),
    ):
        with pytest.raises(LightReasonerError, match=said.replace("[", r"\[")):
            SamplingOptions(**wrong).settings()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--stop-token-ids", "50"), "--stop-token-ids: 50 is beyond the expert's vocabulary of 50"),
        (("--amateur-prompt", "own"), "--amateur-prompt own: the amateur has no chat template"),
    ],
)
def test_what_the_pair_cannot_do_is_said_before_there_is_a_run(tmp_path, options, said):
    from support.servers.real_server import command

    (tmp_path / "problems.jsonl").write_text('{"question": "How many?"}\n')
    with ContractServer(chat_template_digest=None).running() as server:
        asked = command(
            "client", "sample", tmp_path / "problems.jsonl", tmp_path / "run", "--server", server.url, *options
        )
    assert asked.returncode == 1 and said in asked.stderr and not (tmp_path / "run").exists()


def test_a_run_of_an_early_version_is_read_and_differs_from_a_new_one_for_a_reason():
    early, new = make_manifest(), make_manifest(end_token_ids=[2, 3], amateur_prompt="same")
    (difference,) = early.differences(new)
    assert difference.startswith("end_token_ids: None against [2, 3]; an early version sampled one of the two")
    assert not early.differences(early) and not new.differences(new)
    (prompt,) = new.differences(new.model_copy(update={"amateur_prompt": "own"}))[:1]
    assert prompt == "amateur_prompt: 'same' against 'own'"


def test_an_adapter_that_is_given_as_a_model_is_named_with_the_way_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-Math-1.5B"}')
    with pytest.raises(ModelError, match=rf"LoRA adapter.*merge Qwen/Qwen2\.5-Math-1\.5B {tmp_path} OUT"):
        model_folder(str(tmp_path))
    for name in ("config.json", "adapter_model.safetensors"):  # as some trainers leave them beside
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match="holds a LoRA adapter, not a model"):
        model_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelError, match=r"holds a model and a LoRA adapter \(adapter_config\.json\)"):
        model_folder(str(tmp_path))  # transformers would load the adapter's base
    (tmp_path / "adapter_config.json").unlink()
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("value", [float("nan"), 0.5, float("inf")])
@pytest.mark.parametrize("name", ["expert_logprobs", "amateur_logprobs"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_log_probability_that_no_model_gives_is_found_wherever_it_stands(name, value, step):
    line = make_trajectory("p", seed=1, tokens=4)
    getattr(line, name)[step, 5] = value
    with pytest.raises(ValueError, match="NaN or above 0"):
        parse_line(line.to_line("base64"))


@pytest.mark.parametrize("data", ["AAAA\nAAAA", "AAA", "AAAA!", "AA==AAAA", "AAAAAA==", "é", 5, None])
def test_what_is_no_base64_of_the_array_makes_the_line_invalid(data):
    line = orjson.loads(make_trajectory("p", seed=1, tokens=4).to_line("base64"))
    line["token_ids"]["data"] = data
    with pytest.raises((ValueError, TypeError)):
        parse_line(orjson.dumps(line))
