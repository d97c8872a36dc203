"""Parts of the check that cover the whole: a job from the server's start to the adapter, and how servers end."""

from __future__ import annotations

import os
import shutil
import signal
import time

from gpu.card import BACK_SECONDS, MIB
from gpu.session import Figures, Session
from support.servers.real_server import RunningServer, command, engine_processes, mark_of

from server import watchdog

TARGETS = {"7b": ("120", "240"), "1.5b": ("60", "180")}
"""Seconds of work alone, and with every start. The paper needs 45 minutes for 7B and 30 for 1.5B, on one H200."""


def end_to_end(session: Session) -> Figures:
    """The server's start, sampling, training and merging, in seconds."""
    found, pair, out, merged = Figures(), session.pair, session.folder / "adapter", session.folder / "merged"
    if not session.start_seconds:
        session.shared  # noqa: B018  # is started here, and timed
    kept, seconds = session.kept, {"server, to ready": session.start_seconds, "sampling": session.sample_seconds}
    session.stop()
    for name, words in (
        ("training", ("train", kept, "--model", pair.expert, "--output", out)),
        ("merging", ("merge", pair.expert, out, merged)),
    ):
        began = time.monotonic()
        said = command("trainer", *words)
        seconds[name] = time.monotonic() - began
        found.claim(said.returncode == 0, f"{name}: {said.stderr[-1000:]}")
    shutil.rmtree(merged, ignore_errors=True)  # as large as the expert
    work, whole = TARGETS.get(pair.name, ("", ""))
    for name, value in seconds.items():
        found.add(f"{name}, s", value)
    found.add("sampling and training, s", seconds["sampling"] + seconds["training"], work)
    found.add("with every start, s", sum(seconds.values()), whole)
    return found


def stopping(session: Session) -> Figures:
    """After SIGTERM, kill -9 and a killed engine, the GPU's memory is free again within ten seconds."""
    found = Figures()
    session.stop()
    for name, end in (("SIGTERM", terminated), ("kill -9", killed), ("a killed engine, then SIGTERM", engine_killed)):
        with session.server() as server:
            mark, held = mark_of(server), session.card.held_by(engine_processes(server))
            end(server, found)
            began = time.monotonic()
            while time.monotonic() - began < 3 * BACK_SECONDS:
                if not watchdog.marked(mark) and session.card.free_again():
                    break
                time.sleep(0.1)
            seconds = time.monotonic() - began
            found.add(f"{name}: {held // MIB} MiB back after, s", seconds, f"{BACK_SECONDS:g}")
            found.claim(seconds <= BACK_SECONDS, f"{name}: the memory is not back after {seconds:.0f} s")
    if session.card.count > 1:
        two_cards(session, found)
    return found


def terminated(server: RunningServer, found: Figures) -> None:
    os.kill(server.process.pid, signal.SIGTERM)
    status = server.process.wait(60)
    found.claim(status == 0, f"SIGTERM: the server exited with {status}")


def killed(server: RunningServer, found: Figures) -> None:
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(60)


def engine_killed(server: RunningServer, found: Figures) -> None:
    os.kill(engine_processes(server)[0], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (status := server.ask("GET", "/health").status_code) != 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    found.claim(status == 503, f"a killed engine: /health still answers {status}")
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(60)


def two_cards(session: Session, found: Figures) -> None:
    """Two servers at the same time, with a GPU each."""
    first, second = (
        {"expert_arguments": {"device_ids": [card]}, "amateur_arguments": {"device_ids": [card]}} for card in (0, 1)
    )
    with session.server(**first) as one, session.server(**second) as other:
        statuses = [server.ask("GET", "/ready").status_code for server in (one, other)]
    found.add("two servers on two cards", str(statuses), "[200, 200]")
    found.claim(statuses == [200, 200], "two servers on two cards are not both ready")
