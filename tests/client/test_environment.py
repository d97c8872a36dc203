"""Environment variables that are set for a while, and the folder of vLLM's sockets."""

import os

import pytest

from client.environment import SOCKETS, environment, sockets_in


def test_variables_are_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("LIGHTREASONER_KEPT", "before")
    monkeypatch.delenv("LIGHTREASONER_NEW", raising=False)
    with pytest.raises(ZeroDivisionError), environment({"LIGHTREASONER_KEPT": "now", "LIGHTREASONER_NEW": "now"}):
        assert os.environ["LIGHTREASONER_KEPT"] == os.environ["LIGHTREASONER_NEW"] == "now"
        _ = 1 / 0
    assert os.environ["LIGHTREASONER_KEPT"] == "before" and "LIGHTREASONER_NEW" not in os.environ


def test_sockets_have_a_folder_of_their_own_unless_another_is_named_or_their_paths_are_too_long(monkeypatch):
    monkeypatch.delenv(SOCKETS, raising=False)
    assert sockets_in("/tmp/lr-12345678") == {SOCKETS: "/tmp/lr-12345678"}
    assert sockets_in("/" + 69 * "x") and not sockets_in("/" + 70 * "x") and not sockets_in("/" + 35 * "ä")
    monkeypatch.setenv(SOCKETS, "/run/mine")
    assert not sockets_in("/tmp/lr-12345678")
