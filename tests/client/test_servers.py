"""Several servers: they must agree, share the work by their room, and may come and go. Real HTTP, from memory."""

import asyncio
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.responses import Response
from support.runs.sampled import PROBLEMS, keys, more, once, sampled
from support.servers.contract_server import ContractServer, refusal
from support.servers.proxy import Proxy

import client.servers.dispatch
import client.servers.window
from client.errors import ServiceError, Unreachable
from client.protocol.requests import Failure, PairCards, SamplingSettings, Trajectory
from client.servers.client import SamplingClient
from client.servers.connection import Connection
from client.servers.transport import CTransport
from client.servers.window import ServerWindow

pytestmark = pytest.mark.usefixtures("short_pauses")

WINDOW = 2 * 128
"""Trajectories at one of these servers at a time: their cards have no slots, as earlier versions' have none."""


@pytest.fixture
def servers():
    """Two with the same pair."""
    with ContractServer().running() as one, ContractServer().running() as other:
        yield one, other


def urls(servers):
    return [server.url for server in servers]


def asked(server):
    return sum(map(len, server.asked))


def test_problems_are_shared_and_each_is_answered_once(servers):
    problems = more(1000)
    assert keys(sampled(urls(servers), problems)) == once(problems)
    assert asked(servers[0]) + asked(servers[1]) == 1000 and min(map(asked, servers)) > 200


@pytest.mark.parametrize(
    "field", ["model_fingerprint", "tokenizer_fingerprint", "chat_template_digest", "vocab_size", "dtype"]
)
def test_servers_of_different_pairs_are_refused_before_any_work(field):
    changed = 49 if field == "vocab_size" else "changed"
    with ContractServer().running() as one, ContractServer(**{field: changed}).running() as other:
        with pytest.raises(ServiceError) as error:
            sampled([one.url, other.url])
        assert f"{one.url} and {other.url} differ" in str(error.value)
        assert f"expert.{field}: " in str(error.value) and f"against {changed!r}" in str(error.value)
        assert not one.asked and not other.asked


def test_a_server_that_is_not_there_is_waited_for_and_then_named_before_any_work(servers):
    with pytest.raises(
        ServiceError,
        match=r"127.0.0.1:9 is still not ready after 0.3 s: cannot reach http://127.0.0.1:9 .* omit its --server",
    ):
        sampled([servers[0].url, "http://127.0.0.1:9"], patience=0.3)
    assert not servers[0].asked


def test_who_waits_for_a_server_is_told_how_long():
    async def wait():
        async with SamplingClient("http://127.0.0.1:9", patience=0.3) as client:
            await client.wait_until_ready(told.append)

    told: list[str] = []
    with pytest.raises(ServiceError):
        asyncio.run(wait())
    assert told and told[0].endswith("(for at most 0.3 s)")
    assert not any("at most" in line for line in told[1:])  # by then it is less


def test_a_server_that_comes_after_the_client_is_waited_for(servers):
    late, told = ContractServer(), []

    def sample():
        return sampled([servers[0].url, late.url], tell=told.append)

    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit(sample)
        while not told:
            time.sleep(0.01)
        with late.running():
            assert keys(lines.result()) == once(PROBLEMS) and late.requests
    assert f"{late.url}: cannot reach {late.url} " in told[0]


def test_a_certificate_that_expires_meanwhile_may_be_renewed(servers, monkeypatch):
    """The error is made up, for no certificate expires within a test."""
    sends, posts = CTransport.handle_async_request, []

    async def expired_once(transport, request):
        posts.append(request.method == "POST")
        if sum(posts) == 2 and posts[-1]:
            raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired")
        return await sends(transport, request)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CTransport, "handle_async_request", expired_once)
    told, problems = [], more(1000)
    assert keys(sampled(servers[0].url, problems, tell=told.append)) == once(problems)
    assert sum(posts) > 2 and not told  # one request was sent again


def test_a_server_that_speaks_plain_http_is_not_waited_for_with_tls(servers):
    url = servers[0].url.replace("http", "https")
    with pytest.raises(ServiceError, match=f"^{url} speaks plain HTTP; give {servers[0].url}$"):
        sampled(url)


def test_a_call_of_the_library_says_what_it_waits_for(caplog):
    with pytest.raises(ServiceError):
        asyncio.run(SamplingClient("http://127.0.0.1:9", patience=0.1).models())
    assert "cannot reach http://127.0.0.1:9 " in caplog.text


def test_the_same_server_named_twice_counts_once(servers):
    assert keys(sampled([servers[0].url, f"{servers[0].url}/"])) == once(PROBLEMS)
    assert sum(request.url.path == "/ready" for request in servers[0].requests) == 1


def test_the_cards_are_those_of_the_least_server():
    with ContractServer().running() as one, ContractServer(max_model_len=64, max_logprobs=16).running() as other:

        async def models():
            async with SamplingClient([one.url, other.url]) as connection:
                return await connection.models()

        expert, amateur = asyncio.run(models())
        assert {(card.max_model_len, card.max_logprobs) for card in (expert, amateur)} == {(64, 16)}


def test_a_server_that_hangs_gets_no_more_than_its_window(servers):
    """And what it holds stays with it while the other does the rest."""
    free = threading.Event()

    async def hang():
        await asyncio.to_thread(free.wait, 60)

    servers[0].before_line = hang
    problems = more(2000)

    def release(lines):
        if len(lines) == 2000 - WINDOW:
            free.set()

    assert keys(sampled(urls(servers), problems, on_line=release)) == once(problems)
    assert asked(servers[0]) == WINDOW


@pytest.mark.parametrize(("expert", "amateur"), [(1, 9), (20, 8), (24, 20), (300, 256)])
@pytest.mark.parametrize("n", [1, 3])
def test_a_servers_window_is_twice_its_smaller_engines_slots(expert, amateur, n):
    """In trajectories, and no request has more than 16. The server answers nothing until no more requests come."""
    free, seen, window = threading.Event(), [0], 2 * min(expert, amateur)

    async def hang():
        await asyncio.to_thread(free.wait, 60)

    def release():
        while seen[-1] == 0 or asked(server) != seen[-1]:
            seen.append(asked(server))
            time.sleep(0.3)
        free.set()

    with ContractServer().running() as server:
        server.pair = [
            card.model_copy(update={"slots": slots}) for card, slots in zip(server.pair, (expert, amateur), strict=True)
        ]
        server.before_line = hang
        threading.Thread(target=release, daemon=True).start()
        problems = more(window // n + 50)
        settings = SamplingSettings(n=n, temperature=1.0 if n > 1 else 0.0)
        assert keys(sampled(server.url, problems, settings)) == once(problems, n)
    assert seen[-1] == max(1, window // n)
    assert max(map(len, server.asked)) <= max(1, min(16, window // 2) // n)


def test_a_server_that_is_back_with_fewer_slots_has_a_smaller_window(servers):
    server = ServerWindow(Connection(servers[0].url), PairCards(*servers[0].pair))
    server.request_failed(Unreachable("gone"), 0)
    servers[0].pair = [card.model_copy(update={"slots": 4}) for card in servers[0].pair]
    asyncio.run(server.recover())
    assert (server.window, server.problems(1)) == (8, 4)


def test_what_a_server_does_not_get_done_is_put_to_one_that_has_nothing_to_do(servers, monkeypatch):
    """It lives, and sends no line, for ever."""
    monkeypatch.setattr(client.servers.dispatch, "OVERDUE_SECONDS", 0.5)
    monkeypatch.setattr(client.servers.dispatch, "OUTAGE_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(client.servers.window, "SILENT_SECONDS", 0.3)
    told = []

    async def hang():
        await asyncio.Event().wait()

    servers[0].before_line = hang
    problems = more(1000)
    assert keys(sampled(urls(servers), problems, patience=20, tell=told.append)) == once(problems)
    silent = re.escape(servers[0].url) + r" has not answered for \d+ s \(it took the requests, and sends nothing\)\. "
    assert [bool(re.match(silent, text)) for text in told if servers[0].url in text] == [True]
    held = [name for batch in servers[0].asked for name in batch]
    again = [name for batch in servers[1].asked for name in batch]
    assert len(held) == WINDOW and Counter(again) == Counter(problem.id for problem in problems)


def test_a_slow_server_is_helped_and_each_trajectory_is_had_once(servers, monkeypatch):
    monkeypatch.setattr(client.servers.dispatch, "OVERDUE_SECONDS", 0.3)

    async def slowly():
        await asyncio.sleep(0.3)

    servers[0].before_line = slowly
    problems = more(600)
    assert keys(sampled(urls(servers), problems)) == once(problems)
    both = {name for batch in servers[0].asked for name in batch} & {name for b in servers[1].asked for name in b}
    assert both and max(Counter(name for batch in servers[1].asked for name in batch).values()) == 1


def test_two_that_answer_the_same_at_once_are_heard_once(servers, monkeypatch):
    """Both wait until the reader has taken a line."""
    for name in ("OVERDUE_SECONDS", "OVERDUE_FACTOR"):
        monkeypatch.setattr(client.servers.dispatch, name, 0.0)
    monkeypatch.setattr(client.servers.dispatch, "LINES_WAITING", 1)
    problems = more(300)
    assert keys(sampled(urls(servers), problems)) == once(problems)
    assert asked(servers[0]) + asked(servers[1]) > 300


def test_lines_that_wait_are_bounded_by_what_they_hold_and_not_by_what_was_asked(servers, monkeypatch):
    settings = SamplingSettings(max_tokens=100_000)
    line = sampled(servers[0].url, PROBLEMS[:1], settings)[0]
    monkeypatch.setattr(client.servers.dispatch, "BYTES_WAITING", 5 * line.nbytes)
    most = []

    class Watched(asyncio.Queue):
        def put_nowait(self, item):
            super().put_nowait(item)
            most.append(sum(isinstance(one, Trajectory) for one in self._queue))

    monkeypatch.setattr(asyncio, "Queue", Watched)
    problems = more(100)
    found = sampled(servers[0].url, problems, settings, on_line=lambda lines: time.sleep(0.2 * (len(lines) == 1)))
    assert keys(found) == once(problems) and max(most) == 5


def test_what_another_server_works_on_is_not_asked_a_third_time_when_its_first_is_lost(servers, monkeypatch):
    monkeypatch.setattr(client.servers.dispatch, "OVERDUE_SECONDS", 0.3)
    lost = threading.Event()

    async def hang():
        await asyncio.Event().wait()

    async def wait_for_the_loss():
        if len(servers[1].asked) > 1:  # it has been asked for what the other holds
            await asyncio.to_thread(lost.wait, 60)
            await asyncio.sleep(0.3)

    servers[0].before_line, servers[1].before_line = hang, wait_for_the_loss
    problems = more(17)
    with Proxy(servers[0].port).running() as proxy:

        def lose():
            while len(servers[1].asked) < 2:
                time.sleep(0.05)
            proxy.refusing = True
            proxy.cut()
            lost.set()

        threading.Thread(target=lose, daemon=True).start()
        assert keys(sampled([proxy.url, servers[1].url], problems)) == once(problems)
    names = [name for server in servers for batch in server.asked for name in batch]
    assert max(Counter(names).values()) == 2 and len(servers[1].asked) == 2


@pytest.mark.parametrize("count", [96, 800])  # fewer than both have room for, and more
def test_a_request_is_not_overdue_while_others_take_as_long(servers, monkeypatch, count):
    monkeypatch.setattr(client.servers.dispatch, "OVERDUE_SECONDS", 0.05)
    monkeypatch.setattr(client.servers.dispatch, "OVERDUE_LOOK_SECONDS", 0.02)

    async def evenly():
        await asyncio.sleep(0.02)

    for server in servers:
        server.before_line = evenly
    problems = more(count)
    assert keys(sampled(urls(servers), problems)) == once(problems)
    assert asked(servers[0]) + asked(servers[1]) == count


async def wait_a_moment():
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("spoilt", ["404", "html", "nonsense"])
def test_a_server_that_cannot_be_helped_is_left_out_while_there_is_another(servers, spoilt):
    (first, second), told = servers, []

    def spoil(lines):
        if len(lines) >= 100:  # the other one is slow until the first is asked again
            second.before_line = None if told else wait_a_moment
        if len(lines) == 100:
            if spoilt == "404":
                first.refuse = lambda request: refusal(404, "what?")
            elif spoilt == "html":
                first.refuse = lambda request: Response("<html>hello</html>")
            else:
                first.line = lambda problem, index: b"nonsense\n"

    problems = more(1000)
    assert keys(sampled(urls(servers), problems, on_line=spoil, tell=told.append)) == once(problems)
    assert [said for said in told if "is dropped" in said] == [told[-1]] and first.url in told[-1]


def test_when_all_are_left_out_it_is_said_why(servers):
    for server in servers:
        server.refuse = lambda request: refusal(404, "what?") if request.method == "POST" else None
    with pytest.raises(ServiceError, match=r"rejected the request: what\?"):
        sampled(urls(servers))


def test_a_server_without_room_is_given_less_and_the_other_does_the_work(servers):
    servers[0].refuse = lambda request: refusal(429, "full", retry_after="1000") if request.method == "POST" else None
    problems = more(800)
    assert keys(sampled(urls(servers), problems)) == once(problems)
    assert asked(servers[0]) == 0
    assert sum(request.method == "POST" for request in servers[0].requests) <= WINDOW / 16  # and never after those


def test_a_server_that_dies_is_told_of_once_costs_only_what_it_held_and_rejoins(servers, monkeypatch):
    monkeypatch.setattr(client.servers.window, "OUTAGE_SECONDS", 0.1)
    monkeypatch.setattr(client.servers.dispatch, "OUTAGE_LOOK_SECONDS", 0.02)
    with Proxy(servers[0].port).running() as proxy:
        told, state = [], {"after": 0}

        def die_and_return(lines):
            if len(lines) == 300:
                proxy.refusing = True
                proxy.cut()
            if len(lines) == 2000:
                state["asked"] = asked(servers[0])
                proxy.refusing = False

        async def gently():  # so that the other is not done before this one is back
            await asyncio.sleep(0.001)

        servers[1].before_line = gently
        problems = more(6000)
        lines = sampled([proxy.url, servers[1].url], problems, on_line=die_and_return, tell=told.append)
    assert keys(lines) == once(problems)
    said = re.escape(proxy.url) + r" has not answered for \d+ s \(cannot reach " + re.escape(proxy.url) + r" \("
    assert re.match(said, told[0])
    assert told[0].endswith("The client retries; it gives up when no server has answered for 60 s (patience)")
    assert told[1:] == [f"{proxy.url} is back"]
    assert asked(servers[0]) > state["asked"]
    assert asked(servers[0]) + asked(servers[1]) - 6000 <= WINDOW  # only what it held was asked twice


def test_a_draining_server_hands_its_problems_to_the_other(servers):
    def stopping(problem, index):
        return Failure(problem["id"], index, "server_stopping", "the server is stopping").to_line()

    def drain(request):
        return refusal(503, "stopping", retry_after="5") if servers[0].line is stopping else None

    def stop(lines):
        if len(lines) == 100:
            servers[0].line = stopping

    servers[0].refuse = drain
    problems = more(1000)
    lines = sampled(urls(servers), problems, on_line=stop)
    assert keys(lines) == once(problems) and all(isinstance(line, Trajectory) for line in lines)


@pytest.mark.parametrize("alone", [True, False])
def test_a_server_that_comes_back_with_another_pair_is_never_asked_again(servers, alone):
    (first, second), told = servers, []

    def change(lines):
        if len(lines) >= 50:  # the other one is slow until the first is asked again
            second.before_line = None if any("another pair" in text for text in told) else wait_a_moment
        if len(lines) == 50:
            first.pair = [card.model_copy(update={"model_fingerprint": "another"}) for card in first.pair]
            first.refuse = refuse_once
            seen.append(len(first.asked))

    def refuse_once(request):
        return refusal(503, "starting") if request.method == "POST" else None

    seen = []
    problems = more(1000)
    if alone:
        with pytest.raises(ServiceError, match=r"came back with another pair: expert.model_fingerprint: 'e' against"):
            sampled(first.url, problems, on_line=change)
    else:
        assert keys(sampled(urls(servers), problems, on_line=change, tell=told.append)) == once(problems)
        assert told[-1].startswith(f"{first.url} came back with another pair") and "is dropped" in told[-1]


def test_each_servers_state_can_be_read_while_it_works(servers):
    async def gather():
        async with SamplingClient(urls(servers)) as connection:
            states = []
            async for _ in connection.trajectories(more(400)):
                states.append(connection.status())
            return states, connection.status()

    states, after = asyncio.run(gather())
    assert all(len(state) == 2 for state in states) and after == []
    last = Counter()
    for url, text in zip(urls(servers), states[-1], strict=True):
        assert text.startswith(f"{url} ") and "requests in flight" in text
        last["answered"] += int(text.split(", ")[1].split(" ")[0])
    assert last["answered"] >= 399
