"""A server that is told to stop leaves no process behind, whenever that is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from real_server import DEMO, ROOT, free_port


def processes_of(session):
    """Processes in a session, from /proc: (pid, command)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def test_sigterm_while_the_engines_start_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "server", "--expert", DEMO / "expert", "--amateur", DEMO / "amateur"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--port", str(free_port())], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while len(processes_of(server.pid)) < 2:  # the first engine's process is there
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    server.send_signal(signal.SIGTERM)
    server.wait(120)
    deadline = time.monotonic() + 15
    while (left := processes_of(server.pid)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
