"""Starts trainings in processes of their own: several ranks, or one that the test kills."""

import json
import subprocess
import time
from pathlib import Path

from support.processes.forked import PATH, fork, fork_server
from support.servers.real_server import free_port

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SECONDS = 300
COMMAND, ONE_STEP, SHARDED = "trainer.__main__:main", "support.training.one_step:main", "support.training.sharded:run"
APART = "support.training.apart:run"
"""Functions that a rank can run."""


def torchrun(count, *words):
    """Run `torchrun --standalone -m trainer WORDS` on this machine's CPU. Only torchrun itself is a fork."""
    launch = ["torchrun", "--standalone", "--nproc-per-node", count, "-m", "trainer", *words]
    launcher = fork_server("trainer").fork("torch.distributed.run:main", launch, ENVIRONMENT | PATH)
    try:
        said, errors = launcher.communicate(SECONDS)
    finally:
        launcher.kill()
    return subprocess.CompletedProcess(words, launcher.returncode, said, errors)


def ranks(count, *words, function=COMMAND, machines=None):
    """Run the ranks as forks, in the environment that torchrun gives its ranks. When one fails, all are terminated.

    `machines`: an empty folder, in which each rank gets a folder as its own machine; use it with `function=APART`.
    """
    port = str(free_port())
    local = 1 if machines else count
    world = ENVIRONMENT | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(local), "MASTER_PORT": port}
    own = [{"TMPDIR": str(machines / str(rank))} if machines else {} for rank in range(count)]
    for environment in own if machines else []:
        Path(environment["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    started = [
        fork_server("trainer").fork(
            function, ["lightreasoner-trainer", *words],
            world | own[rank] | {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "MASTER_ADDR": "127.0.0.1"},
        )
        for rank in range(count)
    ]  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while None in (codes := [rank.poll() for rank in started]):
        if any(codes) or time.monotonic() > deadline:
            for rank in started:
                rank.terminate()
        time.sleep(0.02)
    said = [rank.communicate() for rank in started]
    code = next((rank.returncode for rank in started if rank.returncode), 0)
    return subprocess.CompletedProcess(words, code, *("".join(streams) for streams in zip(*said, strict=True)))


def started(*words, **environment):
    """Start `lightreasoner-trainer` as a process, with all its output in one pipe."""
    return fork("trainer", *words, environment=ENVIRONMENT | environment, one_stream=True)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
