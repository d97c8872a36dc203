"""Where settings come from: flags, LIGHTREASONER_… variables, server.yaml; what wins, and what an error names."""

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from server import __main__ as command_line
from server.configuration import load_settings
from server.settings import ServerSettings, SettingsError

MODELS = "expert: {model: one}\namateur: {model: two}\n"


@pytest.fixture
def variables(monkeypatch):
    """Sets LIGHTREASONER_… variables, where none is set otherwise."""
    for name in list(os.environ):
        if name.upper().startswith("LIGHTREASONER_"):
            monkeypatch.delenv(name)

    def given(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"LIGHTREASONER_{name}", value)

    return given


@pytest.fixture
def file(tmp_path):
    def written(text=MODELS):
        path = tmp_path / "server.yaml"
        path.write_text(text)
        return path

    return written


@pytest.mark.parametrize(
    ("name", "value", "key", "expected"),
    [
        ("HOST", "0.0.0.0", "host", "0.0.0.0"),
        ("PORT", "9000", "port", 9000),
        ("GRACE_SECONDS", "2.5", "grace_seconds", 2.5),
        ("LEASE_SECONDS", "60", "lease_seconds", 60.0),
        ("HANG_SECONDS", "10", "hang_seconds", 10.0),
        ("BUCKET", "s3://samples/team", "bucket", "s3://samples/team"),
        ("API_KEY_FILE", "/run/secrets/key", "api_key_file", Path("/run/secrets/key")),
        ("CHAT_TEMPLATE", "/templates/mine.jinja", "chat_template", Path("/templates/mine.jinja")),
        ("BUCKET", "", "bucket", None),  # an empty variable is not set
    ],
)
def test_every_setting_can_come_from_a_variable(variables, file, name, value, key, expected):
    variables(**{name: value})
    assert getattr(load_settings(file()), key) == expected


def test_every_key_of_the_file_is_a_setting_that_this_test_has_seen(variables):
    seen = {"host", "port", "grace_seconds", "lease_seconds", "hang_seconds", "bucket", "api_key_file", "chat_template"}
    assert set(ServerSettings.model_fields) == seen | {"limits", "expert", "amateur"}


def test_a_limit_can_come_from_a_nested_variable_or_from_one_mapping(variables, file):
    config = file(f"{MODELS}limits: {{open_jobs: 7, body_bytes: 2000}}\n")
    variables(LIMITS__BODY_BYTES="4096")
    limits = load_settings(config).limits
    assert (limits.body_bytes, limits.open_jobs) == (4096, 7)
    variables(LIMITS='{"job_trajectories": 5}')
    limits = load_settings(config).limits
    assert (limits.body_bytes, limits.open_jobs, limits.job_trajectories) == (4096, 7, 5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4096", 4096),
        ("0.5", 0.5),
        ("1e-5", 1e-5),
        ("true", True),
        ("null", None),
        ("float32", "float32"),
        ('"4096"', "4096"),
        ("[1, two]", [1, "two"]),
        ('["0", "1"]', ["0", "1"]),
        ("{head_dtype: float32}", {"head_dtype": "float32"}),
        ('{"Head": {"a": [true]}}', {"Head": {"a": [True]}}),
    ],
)
def test_an_engine_argument_in_a_variable_is_read_as_in_the_file(variables, file, value, expected):
    variables(EXPERT__ANY_ARGUMENT=value)
    settings = load_settings(file())
    assert settings.expert == {"model": "one", "any_argument": expected} and settings.amateur == {"model": "two"}
    assert type(settings.expert["any_argument"]) is type(expected)


def test_models_can_come_from_variables_alone_and_their_names_are_not_parsed(variables):
    variables(EXPERT__MODEL="1e5", AMATEUR__MODEL="Qwen/Qwen2.5-0.5B", AMATEUR__HF_OVERRIDES__HEAD_DTYPE="float32")
    settings = load_settings(None)
    assert settings.expert == {"model": "1e5"}
    assert settings.amateur == {"model": "Qwen/Qwen2.5-0.5B", "hf_overrides": {"head_dtype": "float32"}}


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(variables, file):
    config = file("expert: {model: one, dtype: float32, seed: 1}\namateur: {model: two}\nport: 1\nhost: ::1\n")
    variables(EXPERT__MODEL="three", EXPERT__DTYPE="bfloat16", PORT="2", HOST="0.0.0.0")
    settings = load_settings(config, expert="four", port=3, host=None)
    assert settings.expert == {"model": "four", "dtype": "bfloat16", "seed": 1}
    assert (settings.port, settings.host) == (3, "0.0.0.0")


@pytest.mark.parametrize(
    ("given", "flags", "said"),
    [
        ({"PORT": "many"}, {}, "LIGHTREASONER_PORT: expected a whole number"),
        ({"LIMITS__BODY_BYTES": "1"}, {}, "LIGHTREASONER_LIMITS__BODY_BYTES: expected at least"),
        ({"LIMITS": '{"body_bytes": 1}'}, {}, "LIGHTREASONER_LIMITS: expected at least"),
        ({"LIMITS": '{"open_jobs": 9}', "LIMITS__BODY_BYTES": "1"}, {}, "^LIGHTREASONER_LIMITS__BODY_BYTES: expected"),
        ({"LIMITS": "{body"}, {}, "LIGHTREASONER_LIMITS: neither JSON nor YAML"),
        ({"LIMITS__BODY_BYTS": "5000"}, {}, "LIGHTREASONER_LIMITS__BODY_BYTS: unknown setting; did you mean 'body_byt"),
        ({"EXPERT": "some/model"}, {}, "LIGHTREASONER_EXPERT must be a mapping.*set .*LIGHTREASONER_EXPERT__MODEL"),
        ({"EXPERT__HF_OVERRIDES": "{a: ["}, {}, "LIGHTREASONER_EXPERT__HF_OVERRIDES: neither JSON nor YAML"),
        ({"EXPERT__GENERATION_CONFIG": "auto"}, {}, "LIGHTREASONER_EXPERT__GENERATION_CONFIG must be 'vllm'"),
        ({"PORT": "80"}, {"port": 70000}, "^--port: expected at most"),
        ({}, {}, r"server\.yaml: limits\.open_jobs: expected at least"),
    ],
)
def test_an_error_names_what_holds_the_invalid_value(variables, file, given, flags, said):
    variables(**given)
    config = file(f"{MODELS}limits: {{open_jobs: {-1 if not given else 5}}}\nport: 8080\n")
    with pytest.raises(SettingsError, match=said):
        load_settings(config, **flags)


def test_an_unknown_key_of_the_file_is_told_with_the_nearest_one(variables, file):
    with pytest.raises(SettingsError, match=r"server\.yaml: prot: unknown setting; did you mean 'port'"):
        load_settings(file(f"{MODELS}prot: 1\n"))


def test_a_variable_like_a_setting_is_warned_of_and_those_of_others_are_not(variables, file, caplog):
    caplog.set_level(logging.WARNING)
    variables(PROT="9000", API_KEYS="a,b", API_KEY="c", SERVER_PROCESS="d", SERVICE_HOST="10.0.0.1", OTHERS="e")
    assert load_settings(file()).port == 8000
    warned = [record.getMessage() for record in caplog.records]
    assert warned == ["LIGHTREASONER_PROT is not a setting, ignored; did you mean 'LIGHTREASONER_PORT'?"]


def test_the_address_of_a_kubernetes_service_is_not_taken_for_a_port(variables, file):
    variables(PORT="tcp://10.0.0.1:8000", PORT_8000_TCP="tcp://10.0.0.1:8000")
    assert load_settings(file()).port == 8000


@pytest.mark.parametrize("words", [["--port", "9"], ["serve", "--port", "9"]])
def test_serve_is_the_command_whether_it_is_named_or_not(variables, monkeypatch, words):
    variables(EXPERT__MODEL="one", AMATEUR__MODEL="two", PORT="8")
    started = SimpleNamespace(settings=None)
    monkeypatch.setattr("server.cli.serve.listen_and_serve", lambda settings: setattr(started, "settings", settings))
    monkeypatch.setattr("server.logs.configure", lambda: None)
    monkeypatch.setattr(sys, "argv", ["lightreasoner-server", *words])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 0 and started.settings.port == 9 and started.settings.expert == {"model": "one"}
