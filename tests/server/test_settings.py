"""server.yaml and flags."""

import socket

import pytest
from support.servers.real_server import DEMO, command

from server.configuration import load_settings
from server.settings import SettingsError, cpu_cores, cpu_threads, engine_arguments


def written(tmp_path, text):
    file = tmp_path / "server.yaml"
    file.write_text(text)
    return file


def test_a_flag_wins_over_the_file_and_engine_arguments_pass_through(tmp_path):
    file = written(tmp_path, "port: 9000\nexpert: {model: one, dtype: float32}\namateur: {model: two}\n")
    settings = load_settings(file, expert="three", amateur=None, host=None, port=None)
    assert settings.expert == {"model": "three", "dtype": "float32"}
    assert settings.amateur == {"model": "two"} and settings.port == 9000 and settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expert: {model: one}\n", "no amateur model: give --amateur"),
        ("expert: {modle: one}\n", "expert.modle is set; did you mean 'model'?"),
        ("expert: one\namateur: {model: two}\n", "expert must be a mapping"),
        ("expert: {model: a}\namateur: {model: b}\nprot: 1\n", "prot"),
        ("expert: {model: a}\namateur: {model: b}\nport: many\n", "port"),
        ("expert: {model: a, logprobs_mode: processed_logprobs}\namateur: {model: b}\n", "expert.logprobs_mode"),
        ("expert: {model: a}\namateur: {model: b, enable_prefix_caching: true}\n", "amateur.enable_prefix_caching"),
        ("expert: [", "not valid YAML"),
        ("- 1\n", "must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(SettingsError, match=said):
        load_settings(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"server\.yaml cannot be read"):
        load_settings(tmp_path / "server.yaml")


def test_the_users_engine_arguments_win_over_the_defaults():
    settings = load_settings(None, expert="a", amateur="b")
    settings = settings.model_copy(update={"expert": {"model": "a", "max_logprobs": 500, "kv_cache_memory_bytes": 7}})
    arguments = engine_arguments(settings, "expert", on_cpu=True)
    assert arguments["max_logprobs"] == 500 and arguments["kv_cache_memory_bytes"] == 7
    assert arguments["logprobs_mode"] == "raw_logprobs" and arguments["generation_config"] == "vllm"
    amateur = engine_arguments(settings, "amateur", on_cpu=True)
    assert amateur["enable_prefix_caching"] is False and amateur["max_logprobs"] == 128


def test_cores_are_shared_out_without_overlap():
    assert cpu_cores([0, 1]) == {"expert": "0", "amateur": "1"}
    assert cpu_cores([2, 3, 5, 7, 8, 9]) == {"expert": "2,3,5,7", "amateur": "8,9"}
    assert cpu_cores([4]) == {"expert": "4", "amateur": "4"}


@pytest.mark.parametrize(
    ("cores", "workers", "lists"),
    [("0,1,2", 1, "0,1,2"), ("0,1,2,3", 2, "0,2|1,3"), ("4,5,6", 2, "4,6|5"), ("0,1", 3, "0|1|0"), ("7", 2, "7|7")],
)
def test_each_worker_of_an_engine_has_a_list_of_cores(cores, workers, lists):
    """vLLM refuses one list for two."""
    found = cpu_threads(cores, workers)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == lists
    assert workers == 1 or len(found) == 1, "vLLM binds each worker's threads itself"


def test_an_argument_that_vllm_does_not_know_stops_the_server_with_its_name(tmp_path):
    file = written(tmp_path, "expert: {max_model_length: 5}\n")
    said = command("server", "--config", file, "--expert", DEMO / "expert", "--amateur", DEMO / "amateur", "--port", 0)
    assert said.returncode != 0
    reason = "error: expert.max_model_length is no vLLM engine argument; did you mean 'max_model_len'?"
    assert reason in said.stderr
    assert "Traceback" not in said.stderr


def test_a_port_that_is_taken_stops_the_server_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = command("server", "--expert", DEMO / "expert", "--amateur", DEMO / "amateur", "--port", port)
    assert said.returncode == 1 and f"error: cannot listen on 127.0.0.1:{port}" in said.stderr
    assert "Traceback" not in said.stderr
