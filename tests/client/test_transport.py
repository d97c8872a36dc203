"""The client's HTTP: requests that nobody takes, certificates, proxies, and a client that another loop goes on with."""

import asyncio
import gc
import socket

import pytest
from support.servers.contract_server import ContractServer
from support.servers.proxy import Proxy

import client.servers.connection
from client.errors import ServiceError, Unreachable
from client.protocol.requests import Problem, SamplingSettings
from client.servers.client import SamplingClient
from client.servers.connection import Connection
from client.servers.transport import CTransport

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def servers():
    with ContractServer().running() as one, ContractServer().running() as two:
        yield one, two


def test_a_client_may_be_left_open_and_used_by_another_loop(servers, caplog):
    client = SamplingClient(servers[0].url)
    assert asyncio.run(client.models()) == asyncio.run(client.models())
    del client
    gc.collect()
    assert not caplog.text


def test_a_client_that_was_left_open_says_nothing_whatever_is_found_first(servers, caplog):
    """A collection looks at the youngest objects before those of middle age: here at aiohttp's before ours."""
    gc.collect()
    gc.disable()  # nothing but what follows moves objects between generations
    try:
        client = SamplingClient(servers[0].url)
        gc.collect(0)
        asyncio.run(client.models())
        del client
        gc.collect()
    finally:
        gc.enable()
    assert not caplog.text


def test_a_server_that_does_not_take_a_request_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(client.servers.connection, "READ_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(client.servers.connection, "CONNECT_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        connection = Connection(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        problems = [Problem(id=str(index), question="?" * 2**20) for index in range(16)]  # more than sockets hold

        async def ask():
            async for _ in connection.answer(problems, SamplingSettings(), 100):
                pass

        with pytest.raises(Unreachable):
            asyncio.run(asyncio.wait_for(ask(), 30))


def test_certificates_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    with pytest.raises(ServiceError, match=r"certificates cannot be loaded: .*; see SSL_CERT_FILE"):
        Connection("http://127.0.0.1:1")


def test_a_proxy_that_is_not_for_this_server_changes_nothing(monkeypatch):
    for name, value in (("no_proxy", "127.0.0.1"), ("http_proxy", "http://127.0.0.1:1")):
        monkeypatch.setenv(name, value)
        assert isinstance(Connection("http://127.0.0.1:1")._http._transport, CTransport)


def test_a_proxy_of_the_environment_is_asked(servers, monkeypatch):
    with Proxy(servers[0].port).running() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert asyncio.run(Connection(servers[1].url).why_not_ready()) is None
        assert [len(server.requests) for server in servers] == [1, 0]
        assert servers[0].requests[0].headers["host"] == servers[1].url.removeprefix("http://")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert asyncio.run(Connection(servers[1].url).why_not_ready()) is None
    assert [len(server.requests) for server in servers] == [1, 1]
