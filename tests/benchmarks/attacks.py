"""The cost of attacks on the server for its other users: its resident memory, and the longest wait for /health.

The server is the real one with stand-in engines and one key; each attack gets a new server. Memory is that of all its
processes, at its highest during the attack and a moment after. Another process asks /health every 10 ms.

    .venv/bin/python tests/benchmarks/attacks.py [NAME …] [--tree CHECKOUT]

CHECKOUT: another version's checkout, to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MIB = 1024**2
KEY = "a-key-of-the-benchmark"
SECONDS, SETTLE_SECONDS = 12.0, 1.0
"""Longest wait of an attack, and the time after it for which memory is still measured."""

Address = tuple[str, int]


def head(path: str, *lines: str, method: str = "POST", key: bool = False) -> bytes:
    known = [f"Authorization: Bearer {KEY}"] if key else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *known, *lines, "", ""]).encode()


def send(to: Address, *pieces: bytes, times: int = 1) -> None:
    """Send the first piece once and the others `times` times, read nothing, and hold the connection."""
    with contextlib.suppress(OSError), socket.create_connection(to) as stranger:
        stranger.settimeout(SECONDS)
        stranger.sendall(pieces[0])
        for _ in range(times):
            for piece in pieces[1:]:
                stranger.sendall(piece)
        time.sleep(2)


def post(to: Address, body: bytes, path: str = "/v1/trajectories") -> None:
    with contextlib.suppress(OSError):
        kind = "Content-Type: application/json", f"Content-Length: {len(body)}"
        with socket.create_connection(to) as stranger:
            stranger.settimeout(SECONDS)
            stranger.sendall(head(path, *kind, key=True) + body)
            stranger.recv(1000)


def side_by_side(count: int, call: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ids(to: Address) -> None:
    problems = [{"id": str(index), "prompt_token_ids": [7] * 7000} for index in range(1000)]
    post(to, json.dumps({"problems": problems}, separators=(",", ":")).encode())


def unfinished(to: Address) -> None:
    def one() -> None:
        lines = "Content-Type: application/json", f"Content-Length: {16 * MIB}"
        send(to, head("/v1/trajectories", *lines, key=True), b" " * 15 * MIB)

    side_by_side(100, one)


def unread(to: Address) -> None:
    """Clients that stop reading: each asks for long lines, and reads none."""
    problems = [{"id": str(index), "question": "What is 2 plus 3?"} for index in range(256)]
    asked = {"problems": problems, "max_tokens": 200, "top_k": 100, "encoding": "json"}
    body = json.dumps(asked).encode()
    kind = "Content-Type: application/json", f"Content-Length: {len(body)}"

    def one() -> None:
        with contextlib.suppress(OSError), socket.create_connection(to) as stranger:
            stranger.sendall(head("/v1/trajectories", *kind, key=True) + body)
            time.sleep(SECONDS)

    side_by_side(8, one)


def emoji(to: Address) -> None:
    question = "\N{GRINNING FACE}" * 4000
    body = json.dumps({"problems": [{"id": "a", "question": question}], "max_tokens": 4}).encode()
    side_by_side(12, lambda: post(to, body))


CHUNKED = "Transfer-Encoding: chunked"
NESTED = b'{"problems":' + b"[" * 8 * MIB + b"]" * 7 * MIB
FIELDS = b'{"problems":[{' + b",".join(b'"%d":0' % index for index in range(1_300_000)) + b"}]}"
DEEP = b'{"problems":[{"id":"a","question":' + b'{"a":' * 2_500_000 + b"1" + b"}" * 2_500_000 + b"}]}"
EMPTY = b'{"problems":[{"id":"a","question":[' + b"{}," * 4_900_000 + b"{}]}]}"

ATTACKS: dict[str, tuple[str, Callable[[Address], Any]]] = {
    "header": ("no key: a header of 250 MB", lambda to: send(to, head("/x")[:-2] + b"a: ", b"x" * MIB, times=250)),
    "target": ("no key: a path of 250 MB", lambda to: send(to, b"GET /", b"x" * MIB, times=250)),
    "extension": (
        "no key: a chunk's extension of 250 MB",
        lambda to: send(to, head("/v1/jobs", CHUNKED) + b"1;", b"x" * MIB, times=250),
    ),
    "trailers": (
        "no key: trailers of 250 MB",
        lambda to: send(to, head("/v1/jobs", CHUNKED) + b"0\r\n", b"a: b\r\n" * 170_000, times=250),
    ),
    "chunks": (
        "no key: 20 million chunks of one byte",
        lambda to: send(to, head("/v1/jobs", CHUNKED), b"1\r\nx\r\n" * 200_000, times=100),
    ),
    "pipelined": (
        "no key: 200,000 pipelined requests, never read",
        lambda to: send(to, b"", head("/health", method="GET") * 2000, times=100),
    ),
    "ids": ("a legal body of 14 MB of ids", ids),
    "nested": ("15 MB of brackets", lambda to: post(to, NESTED)),
    "deep": ("15 MB of nested objects", lambda to: post(to, DEEP)),
    "fields": ("a problem with 1.3 million fields", lambda to: post(to, FIELDS)),
    "empty": ("a question of 4.9 million empty objects", lambda to: post(to, EMPTY)),
    "job": ("the same as a job", lambda to: post(to, EMPTY, "/v1/jobs")),
    "unfinished": ("100 unfinished bodies of 15 MB", unfinished),
    "unread": ("8 readers that stop, 256 lines each", unread),
    "emoji": ("12 questions of emoji beside each other", emoji),
}


def watch(to: Address, enough: Any, longest: Any) -> None:
    """Ask /health until `enough` is set. Writes the longest wait, in seconds, to `longest`."""
    while not enough.is_set():
        began = time.perf_counter()
        try:
            connection = http.client.HTTPConnection(*to, timeout=60)
            connection.request("GET", "/health")
            connection.getresponse().read()
            connection.close()
        except OSError:
            pass
        longest.value = max(longest.value, time.perf_counter() - began)
        time.sleep(0.01)


def resident(session: int) -> int:
    """Bytes of all processes of a session."""
    pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                pages += int((folder / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def measured(session: int, to: Address) -> Iterator[dict[str, float]]:
    """Memory before and at its highest, and the longest wait of /health."""
    spawn = multiprocessing.get_context("spawn")
    enough, longest, done = spawn.Event(), spawn.Value("d", 0.0), threading.Event()
    asking = spawn.Process(target=watch, args=(to, enough, longest))
    asking.start()
    time.sleep(1.5)
    before = resident(session)
    found: dict[str, float] = {"before": before, "most": before}

    def look() -> None:
        while not done.wait(0.05):
            found["most"] = max(found["most"], resident(session))

    looking = threading.Thread(target=look)
    looking.start()
    longest.value = 0.0
    yield found
    time.sleep(SETTLE_SECONDS)
    done.set()
    enough.set()
    looking.join()
    asking.join()
    found["wait"] = longest.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ATTACKS], help="attacks; all of them if none is named")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2])
    asked = parser.parse_args()
    sys.path[:0] = [str(asked.tree), str(asked.tree / "tests"), str(asked.tree / "deploy" / "demo")]
    from support.servers.stand_in import stand_in_server

    print("| attack | memory before, MiB | at most | longest wait of /health, s |\n| --- | --- | --- | --- |")
    for name in asked.names or ATTACKS:
        said, attack = ATTACKS[name]
        with tempfile.TemporaryDirectory() as folder:
            keys = Path(folder, "keys")
            keys.write_text(KEY)
            settings = {"api_key_file": str(keys), "bucket": f"{folder}/bucket"}
            with stand_in_server(Path(folder), **settings) as server:
                address = urlsplit(server.url)
                to = (address.hostname or "", address.port or 0)
                with measured(server.process.pid, to) as found:
                    attack(to)
        print(
            f"| {said} | {found['before'] / MIB:,.0f} | {found['most'] / MIB:,.0f} | {found['wait']:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
