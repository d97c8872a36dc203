"""The base install is the client alone: the other commands say what they lack."""

import importlib.util
import os
import subprocess
import sys

import pytest
from support.servers.real_server import ROOT

BLOCK = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from {package}.__main__ import main
sys.argv = {words!r}
main()
"""


def without(names, package, *words):
    """Run a command where some packages cannot be imported."""
    code = BLOCK.format(names=names, package=package, words=[package, *words])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


HEAVY = ["torch", "transformers", "vllm", "yaml", "fastapi", "uvicorn", "peft"]


HELPED = """
import sys

class Nothing:
    def find_spec(name, path=None, target=None):
        if name in {names!r}:
            print("asked for", name)
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Nothing)
from {package}.__main__ import main, program
import typer
for words in [[], *([name] for name in typer.main.get_command(program).commands)]:
    sys.argv = ["{package}", *words, "--help"]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code)
"""
"""`--help` of a program and of each of its commands; what is heavy cannot be imported, and who tries is seen."""


@pytest.mark.parametrize(("package", "commands"), [("client", 11), ("server", 2), ("trainer", 5)])
def test_no_help_needs_or_tries_more_than_the_base(package, commands):
    code = HELPED.format(names=HEAVY, package=package)
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("Usage: ") == said.stdout.count("ended with 0\n") == 1 + commands
    assert "asked for" not in said.stdout


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [
        ("server", ["--expert", "deploy/demo/expert", "--amateur", "deploy/demo/amateur", "--port", "0"], "server"),
        ("trainer", ["merge", "deploy/demo/expert", "{adapter}", "out"], "trainer"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(package, words, extra, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')  # an adapter as far as is seen without torch
    (tmp_path / "adapter_model.safetensors").touch()
    words = [word.format(adapter=tmp_path) for word in words]
    said = without(HEAVY, package, *words)
    assert said.returncode == 1 and f"is not installed: pip install 'lightreasoner[{extra}]'" in said.stderr
    assert f"(in a checkout: pip install '.[{extra}]')" in said.stderr
    assert "Traceback" not in said.stderr


HEAVY_IMPORTS = {"torch", "vllm", "transformers", "tokenizers", "jinja2", "datasets"}


@pytest.mark.parametrize(
    "imports",
    ["import client.sampling.sampler, client.__main__", "import client; [getattr(client, n) for n in client.__all__]"],
)
def test_the_client_is_imported_without_torch_or_vllm(imports):
    code = f"import sys; {imports}; print({HEAVY_IMPORTS} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "set()", said.stderr


def test_a_run_is_written_and_read_without_pandas():
    """Arrow imports it where it may, which costs a second and 40 MB."""
    assert importlib.util.find_spec("pandas")
    code = (
        "import sys, tempfile; from support.runs.reported import make_run, trajectories_of\n"
        "run = make_run(tempfile.mkdtemp(), trajectories_of(3))\n"
        "print(len(list(run.trajectories())), len(list(run.samples())), len(run.keys()), 'pandas' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == "3 3 3 False", said.stderr
