"""Trainings in processes of their own: several ranks, or one that is to be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.servers.real_server import PATH, ROOT

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def torchrun(ranks, *words, module=False):
    """`torchrun --standalone` on this machine's CPU."""
    launch = "torch.distributed.run", "--standalone", "--nproc-per-node", ranks
    return process(*launch, *["-m"] * module, *words)


def process(module, *words):
    """`python -m MODULE WORDS`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], cwd=ROOT, env={**os.environ, **ENVIRONMENT, **PATH},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def started(*words, **environment):
    """`lightreasoner-trainer` as a process, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, words)], cwd=ROOT, env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
