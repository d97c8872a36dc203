"""A server's window and pauses, and which server is next, without a server."""

import pytest
from support.servers.contract_server import ContractServer

import client.servers.window
from client.errors import Busy, Unreachable
from client.protocol.requests import PairCards
from client.servers.connection import Connection
from client.servers.window import ServerWindow, roomiest

pytestmark = pytest.mark.usefixtures("short_pauses")

WINDOW = 2 * 128
"""Trajectories at one of these servers at a time: their cards have no slots, as earlier versions' have none."""


def pair():
    return PairCards(*ContractServer(port=1).pair)


def test_the_window_halves_once_a_moment_and_grows_back_by_one_a_window():
    server = ServerWindow(Connection("http://127.0.0.1:1"), pair())
    assert server.window == WINDOW
    first = [server.request_failed(Busy("full"), 0) for _ in range(5)]
    assert first == [True, False, False, False, False] and server.window == WINDOW / 2
    assert server.room == 0 and roomiest([server]) is None  # it is paused
    server.trouble = None
    for _ in range(WINDOW // 16 // 2):
        server.request_went_well(16)
    assert WINDOW / 2 + 15 < server.window <= WINDOW / 2 + 16
    for _ in range(10):
        server.request_failed(Busy("full"), server.epoch)
    assert server.window == 16
    for _ in range(1000):
        server.request_went_well(16)
    assert server.window == WINDOW


def test_pauses_grow_to_a_limit_and_are_jittered_down_to_their_half(monkeypatch):
    monkeypatch.setattr(client.servers.window, "FIRST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(client.servers.window, "LONGEST_PAUSE_SECONDS", 30.0)
    pauses = []
    for _ in range(50):
        server = ServerWindow(Connection("http://127.0.0.1:1"), pair())
        for attempt in range(12):
            server.request_failed(Unreachable("gone"), server.epoch)
            pauses.append((min(0.5 * 2**attempt, 30.0), server._pause))
    assert all(longest / 2 <= pause <= longest for longest, pause in pauses)
    last = [pause for longest, pause in pauses if longest == 30.0]
    assert min(last) < 18 < 27 < max(last)
    server.line_came()
    server.request_failed(Unreachable("gone"), server.epoch)
    assert server._pause <= 0.5


def test_the_server_with_the_most_room_is_next():
    servers = [ServerWindow(Connection(f"http://127.0.0.1:{port}"), pair()) for port in (1, 2, 3)]
    servers[0].in_flight, servers[1].in_flight, servers[2].in_flight = 5, 3, 9
    assert roomiest(servers) is servers[1]
    servers[1].request_failed(Unreachable("gone"), 0)
    assert roomiest(servers) is servers[0]
