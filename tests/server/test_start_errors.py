"""A pair that cannot start says why in vLLM's own words, also where a child process alone knows."""

import logging
import os
from pathlib import Path

import pytest
from support.servers.real_server import DEMO, command
from vllm.engine.arg_utils import AsyncEngineArgs

from client import child_errors
from client.errors import reason_of


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"max_model_len": 8192}, "User-specified max_model_len (8192) is greater than the derived max_model_len"),
        ({"dtype": "fp16"}, "dtype 'fp16': expected 'auto', 'half', 'float16'"),
        ({"quantization": "fp8", "dtype": "float32"}, "torch.float32 is not supported for quantization method fp8"),
        ({"quantization": "none at all"}, "Unknown quantization method: none at all"),
    ],
)
def test_vllms_sentence_that_says_why_is_passed_on(argument, words):
    with pytest.raises(Exception) as refused:
        AsyncEngineArgs(model=str(DEMO / "expert"), **argument).create_engine_config()
    said = reason_of(refused.value)
    assert words in said and "\n" not in said
    assert "validation error" not in said and "errors.pydantic.dev" not in said


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("first\n  second"), "first second"), (KeyError("x"), "'x'"), (RuntimeError(), "RuntimeError()")],
)
def test_any_other_exception_is_passed_on_whole(error, said):
    assert reason_of(error) == said


def test_the_last_cause_is_told_and_not_that_another_process_failed(monkeypatch):
    monkeypatch.setattr(child_errors, "parent_process", lambda: object())  # as in a child
    log = logging.getLogger("vllm")
    before = list(log.handlers)
    try:
        with child_errors.collected() as cause:
            assert cause() is None
            child_errors.tell_parent()
            for error in (OSError("optional, missing"), ValueError("no room\nfor blocks"),
                          RuntimeError("WorkerProc initialization failed due to an exception")):  # fmt: skip
                log.getChild("v1").error("failed", exc_info=error)
            assert cause() == "no room for blocks"
        with child_errors.collected() as cause:  # of a process that looks at a model's class, vLLM logs in this one
            said = "Error raised in subprocess:\nTraceback (…):\nModuleNotFoundError: No module named 'torchvision'\n"
            log.error("in inspecting", exc_info=RuntimeError(said))
            assert cause() == "ModuleNotFoundError: No module named 'torchvision'"
    finally:
        log.handlers[:] = before
    assert child_errors.VARIABLE not in os.environ


@pytest.mark.engine
def test_the_server_says_why_an_engines_process_failed(tmp_path):
    config: Path = tmp_path / "server.yaml"
    amateur = f"amateur: {{model: {DEMO / 'amateur'}, kv_cache_memory_bytes: 1}}"
    config.write_text(f"expert: {{model: {DEMO / 'expert'}, kv_cache_memory_bytes: 1}}\n{amateur}\n")
    said = command("server", "--config", config, "--port", 0)
    last = said.stderr.strip().splitlines()[-1]
    assert said.returncode == 1 and "Traceback" not in last
    assert last.startswith("error: the expert's engine did not start") and "cache" in last, last
    assert "See root cause" not in last
