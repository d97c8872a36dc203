"""The batch scripts on a Slurm of this machine: two nodes with pretended cards, tasks that are requeued.

Engines answer from memory; the commands, Slurm, torchrun and the training are real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_pair import save_model, trajectory, write_run
from support.processes.forked import PATH, ROOT
from support.servers.real_server import DEMO, free_port
from word_problems import rows

from client.runs.run import Run

SCRIPTS = ROOT / "deploy" / "slurm"
NODES = "127.0.0.1", "127.0.0.2"
"""Names that are addresses: torchrun's processes meet at the first."""
HAVE = "CPUs=64 RealMemory=600000 Gres=gpu:8"
CONFIGURATION = """
ClusterName=one
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.process,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="no Slurm: apt-get install slurm-wlm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons run as root"),
]


class Slurm:
    """Two nodes of 64 pretended cores and 8 pretended cards; its commands."""

    def __init__(self, folder: Path) -> None:
        first = free_port()
        nodes = f"NodeName=127.0.0.[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{first + 1}] {HAVE}"
        configuration = CONFIGURATION.format(port=free_port(), folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(configuration)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/card[0-7]\n")
        for card in range(8):
            (folder / f"card{card}").touch()
        (folder / "state").mkdir()
        self.environment = {**os.environ, **PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        daemons = [["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in NODES)]
        with (folder / "log").open("ab") as log:
            self._daemons = [
                subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, cwd=folder) for words in daemons
            ]

    def said(self, *words: object) -> str:
        return subprocess.run(
            [*map(str, words)], env=self.environment, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def submit(self, folder: Path, script: str, *words: object, options: tuple[str, ...] = (), **more: str) -> str:
        """Its number. `more`: variables."""
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{self.environment['PATH']}"
        submitted = subprocess.run(
            ["sbatch", "--parsable", *options, str(SCRIPTS / script), *map(str, words)],
            env=self.environment | {"PATH": path} | more, cwd=folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def state(self, job: str) -> str:
        """Empty once it has ended."""
        return self.said("squeue", "--noheader", "--format=%T", "--job", job)

    def again(self, job: str) -> None:
        """Start a requeued task now: Slurm itself waits for two minutes."""
        until(lambda: self.state(job) == "PENDING")

        def started() -> bool:
            self.said("scontrol", "update", f"JobId={job}", "StartTime=now")
            return self.state(job) != "PENDING"

        until(started)

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    started = Slurm(folder)
    try:
        until(lambda: started.said("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"], 60)
        yield started
        started.said("scancel", "--user", "root")
        until(lambda: not started.said("squeue", "--noheader"))
    finally:
        started.close()
        print((folder / "log").read_text()[-3000:])


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.3)


def program(folder: Path, text: str) -> None:
    """What stands for lightreasoner-server in PATH."""
    (folder / "bin").mkdir()
    file = folder / "bin" / "lightreasoner-server"
    file.write_text(f"#!/bin/bash\n{text}")
    file.chmod(0o755)


def logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.log")))


def test_a_task_goes_back_to_the_queue_alone(slurm: Slurm, tmp_path: Path) -> None:
    """1 fails for good; 2 is out of time; 3 says 75, and again; 4 is cancelled. The last one has the array's number."""
    program(
        tmp_path,
        """
echo "$SLURM_ARRAY_TASK_ID" >> starts
trap 'exit 143' TERM
case "$SLURM_ARRAY_TASK_ID ${SLURM_RESTART_COUNT:-0}" in
    "1 0") exit 1 ;;
    "2 1") exit 0 ;;
    3*) exit 75 ;;
esac
while true; do sleep 0.2; done
""",
    )

    def starts() -> Counter[str]:
        return Counter((tmp_path / "starts").read_text().split() if (tmp_path / "starts").exists() else ())

    words = ("problems.jsonl", "run")
    array = slurm.submit(tmp_path, "sample-array.sbatch", *words, options=("--array=1-4",), RESTARTS="1")
    one, two, three, four = (f"{array}_{task}" for task in (1, 2, 3, 4))
    slurm.again(three)
    until(lambda: starts() == Counter("12334"))
    assert slurm.state(two) == slurm.state(four) == "RUNNING" and not slurm.state(one)
    slurm.said("scancel", "--batch", "--signal=USR1", two)
    slurm.said("scancel", four)
    slurm.again(two)
    until(lambda: not slurm.state(array))
    assert starts() == Counter("122334"), logs(tmp_path)


def test_a_task_that_is_out_of_time_continues_its_shard(slurm: Slurm, tmp_path: Path) -> None:
    program(
        tmp_path,
        f"""
exec {sys.executable} -c 'import sys
sys.argv[0] = "lightreasoner-server"
from support.servers.stand_in_engines import main
main()' "$@"
""",
    )
    problems, asked = tmp_path / "problems.jsonl", [row["id"] for row in rows("dev", 4000)]
    problems.write_text("".join(json.dumps({"id": row, "question": row}) + "\n" for row in asked))
    run = Run(str(tmp_path / "run"))
    pair = ("--expert", DEMO / "expert", "--amateur", DEMO / "amateur", "--max-tokens", 100, "--top-k", 4)
    words = (problems, run, *pair)
    array = slurm.submit(tmp_path, "sample-array.sbatch", *words, options=("--array=1-2",))
    until(lambda: run.parts("trajectories"))
    slurm.said("scancel", "--batch", "--signal=USR1", f"{array}_2")
    slurm.again(f"{array}_2")
    until(lambda: not slurm.state(array))
    said = logs(tmp_path)
    assert "shard 2/2, from SLURM_ARRAY_TASK_ID 2" in said and "Run the same command again" in said
    assert run.completion() and Counter(line.problem_id for line in run.trajectories()) == Counter(asked)


def test_a_training_over_two_nodes_continues_after_its_time_and_after_scancel(slurm: Slurm, tmp_path: Path) -> None:
    expert = save_model(tmp_path / "expert")
    run = write_run(tmp_path / "run", expert, trajectories=[trajectory(f"p{index}", index) for index in range(13)])
    out, steps = tmp_path / "out", 600
    words = (run, "--model", expert, "--output", out, "--batch-size", 4, "--max-steps", steps, "--token-budget", 30)

    def submitted_and_at_work() -> str:
        before = trained()
        job = slurm.submit(tmp_path, "train-nodes.sbatch", *words, options=("--gres=gpu:1",))
        until(lambda: trained() > before, 240)
        return job

    def trained() -> int:
        return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0

    cancelled = submitted_and_at_work()
    slurm.said("scancel", cancelled)
    until(lambda: not slurm.state(cancelled))
    assert list((out / "checkpoints").glob("checkpoint-*")), logs(tmp_path)
    job = submitted_and_at_work()
    slurm.said("scancel", "--batch", "--signal=USR1", job)
    slurm.again(job)
    until(lambda: not slurm.state(job), 300)
    said = logs(tmp_path)
    assert said.count("resuming after step") == 2 and f"{steps} optimizer steps over 13 trajectories" in said, said
    assert "forcing job termination" not in (tmp_path / f"lightreasoner-train-{job}.log").read_text()
    assert '"ranks": 2' in (out / "lightreasoner.json").read_text()
