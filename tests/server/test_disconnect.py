"""A client that goes away frees what the engines do for it, at once, whatever it was doing."""

import asyncio
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from server.cli import serve

FREED_SECONDS = 2.0
LONG = {"max_tokens": 2000, "top_k": 32, "temperature": 2.0, "seed": 1, "n": 8}


def body(count):
    problems = [{"id": f"p{index}", "question": f"Count from {index} on, and never stop."} for index in range(count)]
    return json.dumps({"problems": problems, **LONG}).encode()


def running(server):
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def ask_and_vanish(server, how):
    """Ask for long trajectories; when the engines are at work, go away."""
    address = urlsplit(server.url)
    stranger = socket.create_connection((address.hostname, address.port))
    if how == "having stopped reading":
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    content = body(2)
    head = (
        f"POST /v1/trajectories HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    stranger.sendall(f"{head}\r\n\r\n".encode() + content)
    assert wait_until(lambda: running(server) >= 16, 60)
    if how == "in the middle of an answer":
        assert b"200 OK" in stranger.recv(100)
    if how == "by a reset":
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stranger.close()


@pytest.mark.parametrize("how", ["in the middle of an answer", "having stopped reading", "by a reset"])
def test_a_client_that_goes_away_frees_both_engines(smollm2_server, how):
    ask_and_vanish(smollm2_server, how)
    assert wait_until(lambda: running(smollm2_server) == 0, FREED_SECONDS)
    assert wait_until(lambda: smollm2_server.metric("lightreasoner_queue_depth") == 0, 5)


def test_one_that_leaves_before_its_body_is_whole_is_forgotten(smollm2_server):
    address = urlsplit(smollm2_server.url)
    with socket.create_connection((address.hostname, address.port)) as stranger:
        stranger.sendall(b"POST /v1/trajectories HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert httpx.get(f"{smollm2_server.url}/ready").status_code == 200
    assert smollm2_server.metric("lightreasoner_queue_depth") == 0


def test_a_reader_that_stays_and_takes_nothing_loses_its_connection(monkeypatch):
    """Against a plain application on the server's own socket: what is tested is what connections inherit from it."""
    monkeypatch.setattr(serve, "STALLED_MILLISECONDS", 1000)
    listener = serve.listen("127.0.0.1", 0)
    left = threading.Event()

    async def endless(scope, receive, send):
        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not left.is_set():
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
        await watching

    serving = uvicorn.Server(uvicorn.Config(endless, lifespan="off", log_config=None))
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with socket.create_connection(listener.getsockname()) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert left.wait(20)
    serving.should_exit = True
    thread.join(10)
