"""A pair whose engines are in replicas. The front's routes and jobs use it like a pair of their own.

In: problems. Out: trajectories, from the replica with the fewest requests, which Ray Serve chooses. Requests to a lost
replica are retried. Cancelling a call frees the replica's engines. Never returns results of another pair.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import ReplicaUnavailableError

from client.protocol.requests import Failure, ModelCard, Problem, SamplingSettings, Trajectory
from server.cluster.replica import PairDescription, pair_mark
from server.engines.pair import Pair, Turn
from server.engines.prompts import TrajectoryError
from server.logs import log
from server.settings import Role

REPLICAS_TRIED = 4
"""Most attempts at a trajectory whose replica is lost: the trajectory may be what ends replicas."""
ASKED_AGAIN_SECONDS = 1.0
SENT_APART_SECONDS = 0.001
"""Pause before each request. Ray chooses the replica with the fewest requests, but sends simultaneous ones to the same
replica."""
ANOTHER_PAIR = "replicas serve another pair now, which was deployed meanwhile; the front starts again"
REPLICA_COUNT_SECONDS = 2.0
"""How often running replicas are counted."""


class RemoteEngine:
    """One engine in all replicas together, as the front knows it."""

    def __init__(self, card: ModelCard, folder: Path) -> None:
        self.card, self.role, self.replicas = card, card.role, 1
        self.max_logprobs, self.max_model_len = card.max_logprobs, card.max_model_len
        self.facts = SimpleNamespace(vocab_size=card.vocab_size, folder=folder)

    @property
    def slots(self) -> int:
        """Requests that run at a time, in all running replicas."""
        return self.card.slots * self.replicas


class RemotePair(Pair):
    """All replicas of a pair as one pair."""

    def __init__(self, replicas: Any, described: PairDescription, most: int) -> None:
        """`replicas`: the handle of their deployment; `most`: their largest number."""
        self._replicas, self._most, self.accepted = replicas, most, described.accepted
        self._mark, self._replaced = pair_mark(described.cards), False
        self._sending = asyncio.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="lightreasoner-")
        folder = Path(self._folder.name)
        (folder / "tokenizer.json").write_bytes(described.tokenizer)
        self.expert: Any = RemoteEngine(described.cards.expert, folder)
        self.amateur: Any = RemoteEngine(described.cards.amateur, folder)
        self.facts: Any = SimpleNamespace(expert=self.expert.facts, amateur=self.amateur.facts)
        self.prompts: Any = SimpleNamespace(ends_as_early=described.ends_as_early)

    def dead(self) -> dict[Role, str]:
        """Always empty: Ray ends a replica whose engine died, and starts another one."""
        return {}

    def failure(self) -> str | None:
        """Why the front must restart: replicas serve another pair than the one that was described to it."""
        return ANOTHER_PAIR if self._replaced else None

    async def warm_up(self) -> None:
        """Do nothing: every replica warms up itself."""

    async def watch(self, seconds: float) -> None:
        """Count the running replicas, until cancelled."""
        application, deployment = serve.get_replica_context().app_name, self._replicas.deployment_name
        while True:
            with contextlib.suppress(RayError, KeyError):  # the controller may be restarting
                status = await asyncio.to_thread(serve.status)
                states: Any = status.applications[application].deployments[deployment].replica_states
                self.expert.replicas = self.amateur.replicas = max(1, states.get("RUNNING", 0))
            await asyncio.sleep(REPLICA_COUNT_SECONDS)

    def card(self, engine: Any) -> ModelCard:
        """The card of one engine for GET /v1/models, with the slots of the largest number of replicas.

        Otherwise a client would never send enough requests for Ray to start another replica.
        """
        return engine.card.model_copy(update={"slots": engine.card.slots * self._most})

    def shutdown(self) -> None:
        """Remove the local files. Ray ends the replicas."""
        self._folder.cleanup()

    async def _trajectory(
        self, problem: Problem, sample_index: int, sampling: SamplingSettings, turn: Turn
    ) -> Trajectory:
        async with turn.slot():
            others = 0  # replicas of another pair
            for _ in range(REPLICAS_TRIED):
                async with self._sending:
                    await asyncio.sleep(SENT_APART_SECONDS)
                call = self._replicas.trajectory.remote(problem, sample_index, sampling, turn.priority, self._mark)
                try:
                    answer = await call
                    if answer is not None:
                        break
                    others += 1
                except asyncio.CancelledError:
                    call.cancel()
                    raise
                except (RayError, ReplicaUnavailableError) as error:
                    if isinstance(error, RayTaskError):  # the replica answers, with an error
                        raise
                    lost = " ".join(str(error).split())
                    log.warning("a replica was lost, its problems are asked again: %.300s", lost)
                await asyncio.sleep(ASKED_AGAIN_SECONDS)
            else:
                if others == REPLICAS_TRIED:
                    self._replaced = True
                    raise TrajectoryError("engine_error", ANOTHER_PAIR)
                raise TrajectoryError(
                    "engine_error", f"{REPLICAS_TRIED} replicas in a row were lost at it; the last: {lost}"
                )
        if isinstance(answer, Failure):
            raise TrajectoryError(answer.type, answer.detail)
        return answer
