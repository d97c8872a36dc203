"""All servers behind a DNS name, over real HTTP: they appear, vanish and die while a client samples."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
import uvicorn
from support.runs.sampled import PROBLEMS, keys, more, once, sampled
from support.servers.contract_server import ContractServer, refusal
from support.servers.real_server import command, free_port

import client.servers.client
import client.servers.following
from client.errors import ServiceError
from client.servers.client import SamplingClient
from client.servers.connection import Connection
from client.servers.names import ServerName

pytestmark = pytest.mark.usefixtures("short_pauses", "short_polls")

NAME = "servers.test"
SYSTEM = socket.getaddrinfo


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "." + "a" * 64 + ".b"])
def test_what_is_no_hosts_name_is_refused_as_an_option(host):
    with pytest.raises(ServiceError, match=r"is not a valid URL: .* is no host's name"):
        SamplingClient(f"http+dns://{host}:8000")


@pytest.fixture
def short_polls(monkeypatch):
    monkeypatch.setattr(client.servers.following, "NAME_POLL_SECONDS", 0.2)
    monkeypatch.setattr(client.servers.client, "READY_POLL_SECONDS", 0.1)


@pytest.fixture
def addresses(monkeypatch):
    """What the name leads to, which a test may change; an empty list is an unknown name."""
    port = free_port()
    found = type("Addresses", (list,), {"port": port, "url": f"http+dns://{NAME}:{port}"})()

    def resolve(host, service, family=0, type=0, proto=0, flags=0):
        if host not in (NAME, NAME.encode()):
            return SYSTEM(host, service, family, type, proto, flags)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, service))
            for address in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return found


@pytest.fixture
def server_at(addresses):
    """Starts a server at an address of this machine, at the name's port; its `end` ends it early."""
    with contextlib.ExitStack() as stack:

        def start(address, **cards):
            server = ContractServer(addresses.port, address, **cards)
            running = stack.enter_context(contextlib.ExitStack())
            running.enter_context(server.running())
            server.end = running.close
            return server

        yield start


def asked(server):
    return sum(map(len, server.asked))


async def wait_a_little():
    await asyncio.sleep(0.002)


async def wait_longer():
    await asyncio.sleep(0.1)


def test_every_address_has_a_window_of_its_own(addresses, server_at):
    free = threading.Event()

    async def hang():
        await asyncio.to_thread(free.wait, 60)

    servers = [server_at(f"127.0.0.{last}") for last in (2, 3, 4)]
    for server, slots in zip(servers, (8, 16, 24), strict=True):
        server.pair = [card.model_copy(update={"slots": slots}) for card in server.pair]
        server.before_line = hang
        addresses.append(server.host)

    def release():
        while [asked(server) for server in servers] != [16, 32, 48]:
            time.sleep(0.05)
        time.sleep(0.3)  # nothing more comes
        seen.extend(map(asked, servers))
        free.set()

    seen = []
    threading.Thread(target=release, daemon=True).start()
    problems = more(500)
    assert keys(sampled(addresses.url, problems)) == once(problems)
    assert seen == [16, 32, 48]


def test_servers_that_appear_get_problems_and_those_that_vanish_end_what_they_have(addresses, server_at, monkeypatch):
    old, new, told = server_at("127.0.0.2"), server_at("127.0.0.3"), []
    for server in (old, new):
        server.before_line = wait_a_little
    addresses.append(old.host)

    def change(lines):
        if len(lines) == 100:
            addresses[:] = [old.host, new.host]
        if len(lines) >= 100 and asked(new) > 100 and addresses == [old.host, new.host]:
            addresses[:] = [new.host]

    answer, sent, after = Connection.answer, [], []

    def noted(self, *arguments):
        (after if told and told[-1] == f"{old.url} has left" else sent).append(str(self))
        return answer(self, *arguments)

    monkeypatch.setattr(Connection, "answer", noted)
    problems = more(2000)
    assert keys(sampled(addresses.url, problems, on_line=change, tell=told.append)) == once(problems)
    assert told == [f"{new.url} has joined", f"{old.url} has left"]
    assert old.url in sent and set(after) == {new.url}  # nothing more is sent to who has left
    assert asked(old) + asked(new) == 2000  # nothing was asked twice


def test_a_server_that_is_named_again_joins_again(addresses, server_at):
    one, other, told = server_at("127.0.0.2"), server_at("127.0.0.3"), []
    for server in (one, other):
        server.before_line = wait_a_little
    addresses[:] = [one.host, other.host]
    before = 0  # problems, when it joins again

    def change(lines):
        nonlocal before
        if len(lines) == 100:
            addresses[:] = [other.host]
        if f"{one.url} has left" in told and len(addresses) == 1:
            addresses.append(one.host)
            other.before_line = wait_longer  # until it has joined, however busy the machine is
        if f"{one.url} has joined" not in told:
            before = asked(one)
        elif asked(one) > before:
            other.before_line = wait_a_little

    problems = more(1500)
    assert keys(sampled(addresses.url, problems, on_line=change, tell=told.append)) == once(problems)
    assert f"{one.url} has joined" in told and before < asked(one)


def test_dead_servers_are_replaced_at_other_addresses(addresses, server_at):
    """All of them, so that there is a time without any server."""
    first, told = [server_at("127.0.0.2"), server_at("127.0.0.3")], []
    addresses[:] = [server.host for server in first]
    second = []

    def die(lines):
        if len(lines) == 300:
            for server in first:
                server.end()
            addresses.clear()
            threading.Timer(1.0, appear).start()

    def appear():
        second.append(server_at("127.0.0.4"))
        addresses.append("127.0.0.4")

    for server in first:
        server.before_line = wait_a_little
    problems = more(2000)
    assert keys(sampled(addresses.url, problems, on_line=die, tell=told.append)) == once(problems)
    assert asked(second[0]) > 1000
    assert f"http+dns://{NAME}:{addresses.port} has no address now (Name or service not known)" in told


def test_a_name_that_cannot_be_read_for_a_while_changes_nothing(addresses, server_at):
    server, told = server_at("127.0.0.2"), []
    server.before_line = wait_a_little
    addresses.append(server.host)

    def lose(lines):
        if len(lines) == 20:
            addresses.clear()
            server.before_line = wait_longer  # until that is told, however fast the machine is
        if told:
            server.before_line = wait_a_little

    problems = more(1000)
    assert keys(sampled(addresses.url, problems, on_line=lose, tell=told.append)) == once(problems)
    assert len(told) == 1 and "has no address now" in told[0]  # it is told once


def test_only_ready_servers_of_the_same_pair_join(addresses, server_at):
    server, late, other, told = server_at("127.0.0.2"), server_at("127.0.0.3"), None, []
    other = server_at("127.0.0.4", model_fingerprint="another")
    server.before_line = wait_a_little
    late.refuse = lambda request: refusal(503, "loading the models", retry_after="5")
    addresses.append(server.host)

    def change(lines):
        if len(lines) == 50:
            addresses[:] = [server.host, late.host, other.host]
            server.before_line = wait_longer  # until the other one has work
        if asked(late) > 100:
            server.before_line = wait_a_little
        if any("loading the models" in text for text in told):
            late.refuse = lambda request: None

    problems = more(1500)
    assert keys(sampled(addresses.url, problems, on_line=change, tell=told.append)) == once(problems)
    assert asked(late) > 100 and not asked(other)
    assert [text for text in told if other.url in text] == [
        f"{other.url} serves another pair, and gets no problems: expert.model_fingerprint: 'e' against 'another'; "
        "amateur.model_fingerprint: 'a' against 'another'"
    ]


def test_a_client_waits_for_the_first_server_behind_a_name(addresses, server_at):
    told = []

    def appear():
        server_at("127.0.0.2")
        addresses.append("127.0.0.2")

    threading.Timer(0.5, appear).start()
    assert keys(sampled(addresses.url, tell=told.append)) == once(PROBLEMS)
    no_address = f"http+dns://{NAME}:{addresses.port} has no address now (Name or service not known)"
    assert told == [f"{no_address} (for at most 60 s)"]


def test_without_any_server_a_client_gives_up_after_its_patience(addresses, server_at):
    with pytest.raises(
        ServiceError, match=r"no server behind http\+dns://servers.test:\d+ is ready after 0.5 s: .* no"
    ):
        sampled(addresses.url, patience=0.5)
    server = server_at("127.0.0.2")
    server.before_line = wait_a_little
    addresses.append(server.host)

    def vanish(lines):
        if len(lines) == 50:
            server.end()
            addresses[:] = ["127.0.0.9"]

    with pytest.raises(
        ServiceError, match=r"gave up: no server has responded for 2 s \(cannot reach http://127.0.0.9:"
    ):
        sampled(addresses.url, more(1000), patience=2, on_line=vanish)


def test_servers_that_all_reject_requests_end_a_call_at_once(addresses, server_at):
    for last in (2, 3):
        server_at(f"127.0.0.{last}").refuse = lambda request: (
            refusal(401, "no valid key") if request.url.path == "/v1/models" else None
        )
        addresses.append(f"127.0.0.{last}")
    with pytest.raises(ServiceError, match="no valid key"):
        sampled(addresses.url)


def test_names_and_urls_go_together(addresses, server_at):
    named, plain = server_at("127.0.0.2"), ContractServer()
    addresses.append(named.host)
    problems = more(1000)
    with plain.running():
        assert keys(sampled([addresses.url, plain.url], problems)) == once(problems)
    assert min(asked(named), asked(plain)) > 200


def test_servers_are_asked_by_their_name(addresses, server_at):
    server = server_at("127.0.0.2")
    addresses.append(server.host)
    sampled(addresses.url)
    assert {request.headers["host"] for request in server.requests} == {f"{NAME}:{addresses.port}"}


@pytest.mark.parametrize("direct", [NAME, ".test", "{name}:{port}", "127.0.0.2"])
def test_no_proxy_may_name_the_name_or_an_address(addresses, server_at, monkeypatch, direct):
    server_at("127.0.0.2")
    addresses.append("127.0.0.2")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", direct.format(name=NAME, port=addresses.port))
    assert keys(sampled(addresses.url, patience=20)) == once(PROBLEMS)
    monkeypatch.setenv("no_proxy", "elsewhere")
    with pytest.raises(ServiceError, match="no server behind"):
        sampled(addresses.url, patience=0.5)


def test_certificates_are_checked_for_the_name(addresses, tmp_path, monkeypatch):
    if not (openssl := shutil.which("openssl")):
        pytest.skip("no openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
    names = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    subprocess.run([openssl, *words, *names], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    config = uvicorn.Config(
        ContractServer().app, host="127.0.0.2", port=addresses.port, log_level="critical", lifespan="off",
        ssl_keyfile=key, ssl_certfile=certificate, ssl_version=ssl.PROTOCOL_TLS_SERVER,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    addresses.append("127.0.0.2")
    try:
        assert keys(sampled(addresses.url.replace("http", "https", 1))) == once(PROBLEMS)
        with pytest.raises(ServiceError, match="certificate"):
            sampled(f"https://127.0.0.2:{addresses.port}")
        monkeypatch.delenv("SSL_CERT_FILE")
        told = []
        with pytest.raises(ServiceError, match=r"certificate.*; correct the URL or the certificate"):
            sampled(addresses.url.replace("http", "https", 1), tell=told.append)  # not after 1,800 s
        for url in (addresses.url, f"http://127.0.0.2:{addresses.port}"):
            with pytest.raises(
                ServiceError, match=r"^http://127.0.0.2:\d+ speaks HTTP with TLS; give https://127.0.0.2:"
            ):
                sampled(url, tell=told.append)
        assert not told
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize(
    ("found", "urls"),
    [
        (["10.0.0.2", "10.0.0.1", "10.0.0.1"], ["http://10.0.0.1:{port}/at", "http://10.0.0.2:{port}/at"]),
        (["fd00::1", "10.0.0.1"], ["http://10.0.0.1:{port}/at"]),
        (["fd00::1", "fd00::2"], ["http://[fd00::1]:{port}/at", "http://[fd00::2]:{port}/at"]),
    ],
)
def test_a_name_leads_to_each_address_of_one_family_once(addresses, found, urls):
    addresses.extend(found)
    name = ServerName(f"{addresses.url}/at")
    asyncio.run(name.read())
    assert list(name.connections) == [url.format(port=addresses.port) for url in urls]
    before = dict(name.connections)
    addresses.append("10.0.0.3")
    asyncio.run(name.read())
    assert all(name.connections[url] is before[url] for url in before if url in name.connections)


@pytest.mark.parametrize(
    "url", ["http+dns://:8000", "http+dns://", "https+dns://name:0", "http+dns://name:port", "ftp+dns://name:1"]
)
def test_an_invalid_name_is_named(url):
    with pytest.raises(ServiceError, match=r"--server .* is not a valid URL"):
        SamplingClient(url)


def test_a_command_that_asks_one_server_says_so():
    done = command("client", "status", "job-1", "--server", "http+dns://servers:8000")
    assert done.returncode == 1
    assert "this command asks one server; give http://name:port" in done.stderr
