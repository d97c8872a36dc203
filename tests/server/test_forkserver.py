"""Engines are forked only where a fork is like a spawned process. Fork servers without vLLM: what they do is the same.

test_lifecycle tries with real engines that all processes heed the server and end with it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.forked import ROOT

from client.environment import environment
from server.engines import forkserver

PRELUDE = """
import json, os, signal, sys
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from server import watchdog
from server.engines import forkserver

forkserver.PRELOADED = sys.argv[1:]

def environment_of(pid):
    return dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\\0") if "=" in entry)
"""


def told(folder, code, *preloaded, **variables):
    """What a process that starts a fork server prints as JSON. `preloaded`: the source of each module."""
    for number, source in enumerate(preloaded):
        (folder / f"preloaded{number}.py").write_text(source)
    names = [f"preloaded{number}" for number in range(len(preloaded))]
    path = os.pathsep.join(map(str, (folder, ROOT)))
    found = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *names],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, **variables}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


USABLE = """
forkserver.start()
os.environ["LD_PRELOAD"] = forkserver._preloaded_libraries or ""  # as vLLM does when it configures an engine
print(json.dumps([forkserver._may_fork(), forkserver._problem() if forkserver._preloaded_libraries else None]))
"""


def test_engines_are_forked_from_a_process_of_one_thread_without_a_device(tmp_path):
    """NumPy starts a thread when it is imported, and ends it for the moment of a fork."""
    code = """
import time
forkserver.start()
os.environ["LD_PRELOAD"] = forkserver._preloaded_libraries
process = Path(f"/proc/{_forkserver._forkserver_pid}")
while "openblas" not in (process / "maps").read_text():
    time.sleep(0.05)
time.sleep(0.5)
print(json.dumps([len(list((process / "task").iterdir())), forkserver._may_fork()]))
"""
    assert told(tmp_path, code, "import numpy", OPENBLAS_NUM_THREADS="2") == [1, True]


@pytest.mark.parametrize(
    ("imported", "reason"),
    [
        ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()", "has 2 threads"),
        ("import sys, types\nsys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace("
         "_is_in_bad_fork=lambda: True))", "has a CUDA context"),
        ("raise SystemExit(1)", "does not answer"),
    ],
    ids=["a thread", "a device", "an end"],
)  # fmt: skip
def test_engines_are_spawned_where_a_fork_would_share_more_than_code(tmp_path, imported, reason):
    usable, problem = told(tmp_path, USABLE, imported)
    assert not usable and reason in problem


def test_engines_are_spawned_where_vllm_preloads_other_libraries(tmp_path):
    other = USABLE.replace("forkserver._preloaded_libraries or", '"/nowhere.so" or')
    usable, problem = told(tmp_path, other, "")
    assert not usable and "vLLM preloads '/nowhere.so'" in problem


@pytest.mark.parametrize("way", ["asked for", "another build"])
def test_no_fork_server_is_started_where_engines_are_spawned(tmp_path, way):
    """vLLM for a GPU is another build: there a fork server might touch the device."""
    code = "" if way == "asked for" else "forkserver.CPU_BUILD = 'vllm-of-a-gpu'"
    variables = {forkserver.SPAWN_ENGINES: "1"} if way == "asked for" else {}
    code += "\nforkserver.start()\nprint(json.dumps([_forkserver._forkserver_pid, forkserver._may_fork()]))"
    assert told(tmp_path, code, "", **variables) == [None, False]


def test_a_forked_process_has_the_environment_of_its_start_and_the_cores_of_its_engine(tmp_path):
    report = """
import json, os, sys, types
def report(file):
    with open(file, "w") as out:
        json.dump([dict(os.environ), sorted(os.sched_getaffinity(0)), threads], out)
threads = []
sys.modules["torch"] = types.SimpleNamespace(set_num_threads=threads.append)
"""
    code = """
os.environ |= {"CHANGED": "early", "GONE": "early"}
watchdog.start()
forkserver.start()
os.environ |= {"CHANGED": "late", "ADDED": "late"}
del os.environ["GONE"]
from preloaded0 import report
process = forkserver._Context(str(max(os.sched_getaffinity(0)))).Process(target=report, args=("reported",))
process.start()
process.join()
at_start = environment_of(_forkserver._forkserver_pid)
print(json.dumps([json.load(open("reported")), dict(os.environ), max(os.sched_getaffinity(0)), at_start]))
"""
    (environment, cores, threads), servers, core, at_start = told(tmp_path, code, report)
    assert environment == servers and "GONE" not in environment and environment["CHANGED"] == "late"
    assert (cores, threads) == ([core], [1])
    mark = "LIGHTREASONER_SERVER_PROCESS"
    assert at_start[mark] == servers[mark], "the watchdog would not find what the fork server starts"


def test_a_forked_process_searches_no_garbage_in_what_it_froze(tmp_path):
    """As vLLM freezes what it imported, and thaws it before its process ends."""
    thaw = """
import gc
def thaw(file):
    gc.freeze()
    gc.unfreeze()
    with open(file, "w") as out:
        out.write(str(gc.get_freeze_count()))
"""
    code = """
forkserver.start()
from preloaded0 import thaw
process = forkserver._Context(None).Process(target=thaw, args=("frozen",))
process.start()
process.join()
print(json.dumps(int(open("frozen").read())))
"""
    assert told(tmp_path, code, thaw) > 1_000


def test_the_fork_server_holds_signals_that_are_meant_for_all(tmp_path):
    code = """
forkserver.start()
status = Path(f"/proc/{_forkserver._forkserver_pid}/status").read_text()
print(json.dumps(int(status.split("SigBlk:")[1].split()[0], 16)))
"""
    blocked = told(tmp_path, code, "")
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))


def test_the_fork_server_preloads_what_vllm_preloads():
    """Else engines would be spawned, everywhere."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    demo = Path(ROOT) / "deploy" / "demo" / "expert"
    ours = forkserver.preloaded_libraries()
    with environment({"LD_PRELOAD": os.environ.get("LD_PRELOAD", "")}):
        AsyncEngineArgs(str(demo), enforce_eager=True).create_engine_config()
        theirs = os.environ["LD_PRELOAD"]
    assert ours == theirs and "libgomp" in ours


@pytest.mark.parametrize("way", ["forked", "spawned"])
def test_the_watchdog_finds_a_process_that_took_a_title(tmp_path, way):
    """A title may be written over the variables that the kernel shows; vLLM gives its processes titles."""
    titled = """
import time
def take_title(file):
    import setproctitle
    setproctitle.setproctitle("VLLM::EngineCore")
    with open(file, "w") as out:
        out.write("taken")
    time.sleep(30)
"""
    code = """
import multiprocessing, time
watchdog.start()
forkserver.start()
from preloaded0 import take_title
context = forkserver._Context(None) if WAY == "forked" else multiprocessing.get_context("spawn")
process = context.Process(target=take_title, args=("title",), daemon=True)
process.start()
while not Path("title").exists():
    time.sleep(0.05)
found = watchdog.marked(f"{watchdog.MARK}={os.environ[watchdog.MARK]}")
print(json.dumps([process.pid in found, Path(f"/proc/{process.pid}/cmdline").read_text().rstrip("\\0")]))
process.kill()
"""
    assert told(tmp_path, f"WAY = {way!r}" + code, titled) == [True, "VLLM::EngineCore"]
