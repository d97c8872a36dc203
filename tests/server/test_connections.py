"""What one connection may send, hold and wait, over real sockets, by those who have no key."""

import contextlib
import socket
import time

import pytest
from support.servers.stand_in import serving

from server.api import connections

MORE = 8_000_000
"""Bytes that no bound lets pass and no socket buffer holds."""


@pytest.fixture(scope="module")
def locked():
    with serving(["first-key", "second-key"]) as client:
        yield client


@pytest.fixture
def stranger(locked):
    with connected(locked) as found:
        yield found


@contextlib.contextmanager
def connected(client):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as found:
        found.settimeout(20)
        yield found


def head(path, *lines, method="POST"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def rest(stranger):
    """All that comes until the connection ends."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := stranger.recv(65536):
            found += piece
    return found


def push(stranger, data):
    """Send until all is sent, or the server has closed."""
    with contextlib.suppress(ConnectionError):
        stranger.sendall(data)


@pytest.mark.parametrize(
    ("begun", "endless", "status"),
    [
        (head("/health", method="GET")[:-2] + b"a: ", b"x", b"431"),
        (head("/health", method="GET")[:-2], b"a: b\r\n", b"431"),
        (b"GET /", b"x", b"431"),
        (b"", b"x", b"431"),
        (head("/v1/jobs", "Transfer-Encoding: chunked") + b"1;", b"x", b"401"),
        (head("/v1/jobs", "Transfer-Encoding: chunked") + b"0\r\n", b"a: b\r\n", b"401"),
        (head("/v1/jobs", "Transfer-Encoding: chunked"), b"1\r\nx\r\n", b"401"),
        (head("/v1/jobs", f"Content-Length: {10**12}"), b"x", b"401"),
    ],
    ids=["a header", "headers", "a path", "a method", "an extension", "trailers", "chunks", "a body"],
)
def test_what_has_no_end_is_answered_and_its_connection_ends(stranger, begun, endless, status, monkeypatch):
    monkeypatch.setattr(connections, "LINGER_SECONDS", 1.0)
    began = time.monotonic()
    push(stranger, begun)
    push(stranger, endless * (MORE // len(endless)))
    answer = rest(stranger)
    assert answer.startswith(b"HTTP/1.1 " + status) and b"application/problem+json" in answer
    assert time.monotonic() - began < 10


def test_a_head_beyond_the_bound_is_refused_even_where_it_comes_at_once(locked):
    for size, status in ((12_000, 200), (connections.REQUEST_HEAD_BYTES, 431), (40_000, 431)):
        answer = locked.get("/health", headers={"x-long": "x" * size})
        assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json" and "16,384 bytes" in answer.json()["detail"]


def test_requests_whose_answers_nobody_reads_stay_with_their_sender(locked):
    with connected(locked) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stranger.setblocking(False)
        sent, deadline, requests = 0, time.monotonic() + 2, head("/health", method="GET") * 1000
        while time.monotonic() < deadline:
            try:
                sent += stranger.send(requests)
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 3 * MORE
        began = time.monotonic()
        assert locked.get("/health").status_code == 200
        assert time.monotonic() - began < 1


def test_pipelined_requests_are_all_answered_in_their_order(stranger):
    push(stranger, head("/health", method="GET") * 300 + head("/x", "Connection: close", method="GET"))
    answers = rest(stranger)
    assert answers.count(b"HTTP/1.1 200") == 300 and answers.rindex(b"HTTP/1.1 401") > answers.rindex(b"HTTP/1.1 200")


def test_a_request_that_is_never_whole_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with serving() as client:
        with connected(client) as stranger:  # a byte now and then does not help
            with contextlib.suppress(ConnectionError):
                for byte in head("/health", method="GET")[:-2] + b"a" * 50:
                    stranger.send(bytes([byte]))
                    time.sleep(0.02)
            assert b"408" in rest(stranger)
        with connected(client) as silent:
            assert rest(silent) == b""


def test_an_idle_connection_serves_again_and_then_ends(monkeypatch):
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 1.0)
    with serving() as client, connected(client) as stranger:
        for _ in range(3):
            stranger.sendall(head("/health", method="GET"))
            assert stranger.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)
        assert rest(stranger) == b""


def test_one_more_connection_than_there_may_be_takes_the_place_of_the_one_that_waits_longest(monkeypatch):
    monkeypatch.setattr("server.api.serving.allow_connections", lambda: 5)
    with serving() as client, contextlib.ExitStack() as stack:
        client.get("/health")
        strangers = []
        for _ in range(5):
            time.sleep(0.1)
            strangers.append(stack.enter_context(connected(client)))
        strangers[0].settimeout(0.2)
        with pytest.raises(TimeoutError):
            strangers[0].recv(1)  # the client's own has waited longer
        strangers[0].settimeout(20)
        assert client.get("/health").status_code == 200  # which makes a new one, in the place of the first
        assert rest(strangers[0]) == b""
        strangers[1].sendall(head("/health", method="GET"))
        assert strangers[1].recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1/jobs", "/x"])
def test_a_body_that_is_still_sent_does_not_cost_its_sender_the_answer(locked, path):
    for _ in range(5):
        with connected(locked) as stranger:
            stranger.sendall(head(path, f"Content-Length: {MORE}", "Authorization: Bearer first-key"))
            push(stranger, b" " * MORE)
            answer = rest(stranger)
            assert b"\r\nconnection: close\r\n" in answer and answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 404"))


def test_what_is_no_request_is_refused_as_a_problem(locked):
    for said in (b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0",
                 head("/v1/jobs", "Transfer-Encoding: gzip"), head("/v1/jobs", f"Content-Length: {'9' * 5000}"),
                 head("/v1/jobs", "Content-Length: -1"), head("/v1/jobs", "Content-Length: 1", "Content-Length: 2"),
                 head("/x", "a b: c"), head("/x\x00")):  # fmt: skip
        with connected(locked) as stranger:
            push(stranger, said)
            answer = rest(stranger)
        assert answer.startswith(b"HTTP/1.1 400") and b"application/problem+json" in answer, (said[:50], answer[:200])


def test_a_chunk_that_is_none_ends_a_request_that_is_read_already(locked):
    key = "Authorization: Bearer first-key"
    with connected(locked) as stranger:
        stranger.sendall(head("/v1/jobs", "Content-Type: application/json", "Transfer-Encoding: chunked", key))
        time.sleep(0.2)
        stranger.sendall(b"no chunk\r\n")
        assert rest(stranger).startswith(b"HTTP/1.1 400")
    assert locked.get("/health").status_code == 200
