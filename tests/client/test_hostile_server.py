"""What a bad server may cost the client, and write on its terminal: a real HTTP server that sends what it likes."""

import asyncio
import gzip
import subprocess
import sys
import time

import httpx
import pytest
from starlette.responses import Response, StreamingResponse
from support.runs.sampled import PROBLEMS, keys, once, sampled
from support.servers.contract_server import ContractServer, refusal
from support.servers.real_server import ROOT

import client.servers.connection
from client.errors import ServiceError, Unreachable, clean_lines, one_line, shorten
from client.protocol.requests import Failure, ModelCard, parse_line
from client.servers.client import SamplingClient
from client.servers.connection import HttpAnswer, _detail, _retry_after

pytestmark = pytest.mark.usefixtures("short_pauses")
PATHS = ("/ready", "/v1/models", "/v1/tokenizer", "/version", "/v1/trajectories")
FORGED = "\x1b[2J\x9b31m\u202e\nerror: forged\r\x00"


@pytest.fixture
def server():
    with ContractServer().running() as server:
        yield server


def ask_all(url, patience=10.0):
    """Ask a server all that sampling asks."""

    async def ask():
        async with SamplingClient(url, patience=patience) as connection:
            await connection.models()
            await connection.tokenizer()
            await connection.versions()
            return [line async for line in connection.trajectories(PROBLEMS[:2])]

    return asyncio.run(ask())


def answering(path, response):
    return lambda request: response() if request.url.path == path else None


@pytest.mark.parametrize("path", PATHS)
def test_a_compressed_answer_is_refused_before_it_is_unpacked(server, path):
    bomb = gzip.compress(gzip.compress(b" " * 2**24))
    server.refuse = answering(path, lambda: Response(bomb, headers={"content-encoding": "gzip, gzip"}))
    with pytest.raises(ServiceError, match=r"Content-Encoding 'gzip, gzip'.* compression of its proxy"):
        ask_all(server.url)
    assert all(request.headers["accept-encoding"] == "identity" for request in server.requests)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_does_not_end_is_cut(server, path, status):
    async def endless():
        for _ in range(2000):  # 131 MB, for a server that is not read goes on
            yield b"x" * 2**16
            await asyncio.sleep(0)

    server.refuse = answering(path, lambda: StreamingResponse(endless(), status))
    with pytest.raises(ServiceError, match=r"(more than [\d,]+ bytes|cannot serve)"):
        ask_all(server.url)


@pytest.mark.parametrize("path", PATHS[1:])
def test_a_body_of_many_small_values_is_refused_before_it_is_checked(server, path):
    """Some 4 MB of such cards took 2.8 GB."""
    content = b'{"data": [' + b"{}," * {"/v1/tokenizer": 2**21, "/v1/models": 2**18}.get(path, 2**16) + b"{}]}"
    server.refuse = answering(path, lambda: Response(content))
    with pytest.raises(ServiceError, match=r"answered with [\d,]+ values|not a tokenizer.json|sent an invalid line"):
        ask_all(server.url)


def test_a_body_that_comes_byte_by_byte_takes_no_longer_than_is_borne(server, monkeypatch):
    async def slow():
        while True:
            await asyncio.sleep(0.05)
            yield b" "

    monkeypatch.setattr(client.servers.connection, "ANSWER_SECONDS", 0.3)
    server.refuse = answering("/v1/models", lambda: StreamingResponse(slow()))
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"/v1/models was not answered whole in 0.3 s"):
        ask_all(server.url, patience=1.0)
    assert time.monotonic() - began < 10


def test_a_line_of_many_small_values_costs_little():
    """16 MB that would be 4 GB of Python's objects."""
    code = """
import resource
from client.protocol.requests import parse_line
line = b'{"problem_id": "a", "sample_index": 0, "token_ids": [' + b"[],{}," * 2**20 + b"0]}"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    parse_line(line)
    raise SystemExit("read")
except ValueError as error:
    assert "more than 2,097,152 values" in str(error), error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and int(said.stdout) < 100, said


def test_a_line_may_be_as_long_as_its_request_allows_and_no_longer(server):
    server.line = lambda problem, index: b" " * (client.servers.connection.SMALLEST_LINE_BOUND + 2**18)
    with pytest.raises(ServiceError, match=r"sent a line of more than 16,941,056 bytes"):
        sampled(server.url, PROBLEMS[:1])


@pytest.mark.parametrize(
    "field",
    [{"vocab_size": 2**62}, {"vocab_size": 2_000_000_000}, {"vocab_size": 0}, {"max_model_len": 0}, {"slots": 2**40},
     {"dtype": "f" * 10_000}, {"model_fingerprint": "f" * 10_000}],
)  # fmt: skip
def test_a_card_that_no_model_can_have_is_refused(field):
    with ContractServer(**field).running() as server:
        (name,) = field
        with pytest.raises(ServiceError, match=rf"its /v1/models lists no pair \(.*{name}") as refused:
            ask_all(server.url)
    assert len(str(refused.value)) < 1000 and ModelCard.model_fields[name]


@pytest.mark.parametrize(
    "value",
    ["Mon, 01 Jan 0001 00:00:00 -0000", "Fri, 99 Zzz 99999 99:99:99 GMT", "Fri, 31 Dec 9999 23:59:59 -2359", ",",
     "9" * 5000, "soon", "-5", "\u0663"],
)  # fmt: skip
def test_no_retry_after_is_absurd(value):
    headers = httpx.Headers({"retry-after": value.encode("utf-8")})
    assert 0 <= _retry_after(HttpAnswer(503, headers, b"")) <= 86_400


def test_an_error_that_is_nested_without_end_is_an_error(server):
    refusals = [Response(b"[" * 200_000, status) for status in (503, 502)]
    server.refuse = lambda request: refusals.pop() if request.method == "POST" and refusals else None
    assert keys(sampled(server.url)) == once(PROBLEMS) and not refusals
    assert "HTTP 503" in _detail(HttpAnswer(503, httpx.Headers(), b"[" * 200_000))


def test_a_servers_words_are_one_short_line_that_a_terminal_shows_as_it_is(server):
    server.refuse = lambda request: refusal(422, FORGED + "x" * 10_000) if request.method == "POST" else None
    with pytest.raises(ServiceError) as refused:
        sampled(server.url)
    said = str(refused.value)
    assert said.isprintable() and len(said) < 700 and r"\x1b[2J\x9b31m\u202e error: forged \x00xxx" in said
    line = Failure("p0", 0, FORGED, FORGED * 10_000).to_line()
    failure = parse_line(line)
    assert isinstance(failure, Failure) and failure.type.isprintable() and failure.detail.isprintable()
    assert len(failure.detail) < 10_000


def test_what_others_wrote_is_made_plain_and_our_own_lines_stay():
    assert one_line("café 日本 – ok") == "café 日本 – ok"
    assert one_line(FORGED) == r"\x1b[2J\x9b31m\u202e error: forged \x00"
    assert shorten(FORGED * 100, 5) == "\\x1b[2J\\x9b…"
    assert clean_lines("one\n  two\x1b") == "one\n  two\\x1b"
