"""A pair for replicas of a local Ray cluster: it answers from memory, and records in a folder what each replica does.

In: the folder in STAND_IN_FOLDER, a variable that a cluster's processes inherit. Out, in that folder: `PID.asked` and
`PID.cancelled`, with a byte for each trajectory of the process PID. An engine that finds a file `die` there removes it
and is dead. While a file `hold` is there, no trajectory ends before it has taken as many seconds as the file says.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from server.engines.pair import Pair
from server.engines.preflight import inspect_pair
from server.settings import ServerSettings
from support.servers.stand_in_engines import StandIn, StandInPair

FOLDER = "STAND_IN_FOLDER"


class CountedEngine(StandIn):
    """An engine that counts its requests, and dies when it finds `die`."""

    async def run(self, prompt_token_ids: list[int], params: Any, priority: int) -> Any:
        if self.role == "amateur":
            return await super().run(prompt_token_ids, params, priority)
        folder = Path(os.environ[FOLDER])
        try:
            (folder / "die").unlink()
            self.llm.errored, self.llm.dead_error = True, EngineDeadError()
        except FileNotFoundError:
            pass
        if self.llm.errored:
            raise EngineDeadError
        count(folder / f"{os.getpid()}.asked")
        try:
            began = time.monotonic()
            while time.monotonic() - began < held_for(folder / "hold"):  # noqa: ASYNC110 -- another process removes it
                await asyncio.sleep(0.05)
            return await super().run(prompt_token_ids, params, priority)
        except asyncio.CancelledError:
            count(folder / f"{os.getpid()}.cancelled")
            raise


def held_for(file: Path) -> float:
    """The seconds in a file; infinity if it is empty, 0 if it is missing."""
    try:
        return float(file.read_text() or "inf")
    except FileNotFoundError:
        return 0.0


def count(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b".")


def from_memory(settings: ServerSettings) -> Pair:
    facts = inspect_pair(Path(settings.expert["model"]), Path(settings.amateur["model"]))
    engines = CountedEngine("expert", facts.expert), CountedEngine("amateur", facts.amateur)
    return StandInPair(*engines, facts, native=False)
