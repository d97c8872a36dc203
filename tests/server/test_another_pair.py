"""Replicas of another pair, while an application is deployed anew: the front never passes on what they answer.

A real replica and a front's pair, in one process; a stand-in for Ray's handle takes the next replica of a list.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'lightreasoner[ray]'")

from support.cluster.memory_pair import FOLDER, from_memory
from support.servers.real_server import DEMO

import server.cluster.remote
from client.protocol.requests import Problem, SamplingSettings
from server.cluster.application import Front
from server.cluster.remote import RemotePair
from server.cluster.replica import PairReplica
from server.engines.pair import Turn
from server.engines.prompts import TrajectoryError
from server.settings import ServerSettings

ASKED = Problem(id="1", question="?"), 0, SamplingSettings(max_tokens=8, top_k=4), Turn()


async def replica(expert: str, amateur: str) -> PairReplica:
    started = PairReplica.__new__(PairReplica)
    models = {"expert": {"model": str(DEMO / expert)}, "amateur": {"model": str(DEMO / amateur)}}
    await PairReplica.__init__(started, ServerSettings(**models), from_memory)  # type: ignore[misc]
    return started


def handle(*replicas: PairReplica) -> Any:
    """Calls go to one replica after the other, as often as it takes."""
    turns = itertools.cycle(replicas)
    return SimpleNamespace(
        trajectory=SimpleNamespace(remote=lambda *asked: asyncio.ensure_future(next(turns).trajectory(*asked)))
    )


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server.cluster.remote, "ASKED_AGAIN_SECONDS", 0.0)
    monkeypatch.setenv(FOLDER, str(tmp_path))


def test_what_another_pair_answers_is_asked_again_and_a_front_without_its_pair_starts_again() -> None:
    async def ask() -> None:
        before, after = await replica("expert", "amateur"), await replica("amateur", "expert")
        try:
            described = await before.describe()
            mixed = RemotePair(handle(after, before), described, 2)
            assert (await mixed.trajectory(*ASKED)).problem_id == "1" and mixed.failure() is None
            gone = RemotePair(handle(after), described, 1)
            front = Front.__new__(Front)
            front._failed, front._service = None, SimpleNamespace(pair=gone)
            front.check_health()
            with pytest.raises(TrajectoryError, match=r"^replicas serve another pair now"):
                await gone.trajectory(*ASKED)
            with pytest.raises(RuntimeError, match=r"^replicas serve another pair now"):
                front.check_health()
        finally:
            before.pair.shutdown()
            after.pair.shutdown()

    asyncio.run(ask())
