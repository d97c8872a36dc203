"""What the client sends beside the problems, against a real HTTP server of the standard library."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.servers.real_server import command

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
