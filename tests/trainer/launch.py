"""Trainings in processes of their own: several ranks, or one that is to be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def torchrun(ranks, *words, module=False):
    """`torchrun --standalone` on this machine's CPU."""
    text = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    text += ["-m"] * module + list(words)
    path = f"{ROOT}:{Path(__file__).parent}"
    return subprocess.run(
        list(map(str, text)), cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def started(*words, **environment):
    """`lightreasoner-trainer` as a process, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, words)], cwd=ROOT, env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
