"""What the client's tests may ask for beside what every test may."""

import pytest

import client.servers.window


@pytest.fixture
def short_pauses(monkeypatch):
    """The pauses after a failure, all of them shorter."""
    monkeypatch.setattr(client.servers.window, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(client.servers.window, "LONGEST_PAUSE_SECONDS", 0.2)
