"""What the client sends beside the problems, and says of a job's server, against small real HTTP servers."""

import asyncio
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from support.servers.contract_server import serving
from support.servers.real_server import command

import client.cli.jobs
import client.servers.window
from client.errors import ServiceError
from client.servers.client import SamplingClient


@pytest.fixture
def echo():
    """A server that answers every GET with the Authorization header that it was sent."""

    class Echo(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.end_headers()
            seen.append(self.headers["authorization"])

        def log_message(self, *_):
            pass

    seen = []
    server = HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.mark.parametrize(("key", "header"), [("secret-1", "Bearer secret-1"), (None, None), ("", None)])
def test_an_api_key_travels_as_a_bearer_token(echo, key, header):
    async def ask():
        async with SamplingClient(echo[0], key) as client:
            await client.wait_until_ready()

    with pytest.raises(ServiceError):
        asyncio.run(ask())
    assert echo[1] == [header]


def test_the_commands_take_the_key_from_an_option_or_the_environment_and_never_print_it(echo, tmp_path, monkeypatch):
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"question": "q"}\n')
    sampling = ["client", "sample", problems, tmp_path / "run", "--server", echo[0]]
    said = [command(*sampling, "--api-key", "secret-2")]
    monkeypatch.setenv("LIGHTREASONER_API_KEY", "secret-3")
    said += [command(*sampling), command("client", "sample", "--help")]
    assert echo[1] == ["Bearer secret-2", "Bearer secret-3"]
    assert not any("secret" in text.stdout + text.stderr for text in said)


def test_a_key_that_no_header_can_carry_is_refused_without_being_told():
    with pytest.raises(ServiceError, match="--api-key") as refused:
        SamplingClient("http://127.0.0.1:1", "se\ncret")
    assert "cret" not in str(refused.value)


def test_wait_says_once_that_the_server_does_not_answer_and_when_it_is_back(monkeypatch, capsys):
    """One failed answer is not worth a word."""
    monkeypatch.setattr(client.cli.jobs, "WAIT_POLL_SECONDS", 0.02)
    monkeypatch.setattr(client.servers.window, "OUTAGE_SECONDS", 0.1)
    asked = []

    async def job(request):
        asked.append(request)
        if len(asked) == 2 or 4 <= len(asked) < 20:
            return JSONResponse({"detail": "starting"}, 503)
        status = "completed" if len(asked) == 21 else "in_progress"
        return JSONResponse({"id": "j", "status": status, "run": "r", "created_at": 1})

    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with serving(Starlette(routes=[Route("/v1/jobs/j", job)]), listener):
        client.cli.jobs.wait("j", url)
    began, out, back = capsys.readouterr().err.splitlines()
    assert began == "j in_progress" and back == f"{url} is back"
    address = re.escape(url)
    assert re.fullmatch(
        rf"{address} has not answered for \d+ s \({address} cannot answer now: starting\)\. The client retries; "
        r"it gives up after 600 s",
        out,
    )
