"""Says of each adapter what it was trained on, for the report of a RUN.

In: adapters, a RUN. Out: plain values for an evaluation's JSON. Checks and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from client.runs.manifest import EARLY
from client.runs.run import Run
from client.storage.bucket import Bucket
from trainer.adapters.adapter import PROVENANCE

MOST_BYTES = 2**24
"""Most bytes of an adapter's lightreasoner.json: it lists the parts of its RUN."""


def origins_of(adapters: Iterable[str], run: Run) -> dict[str, dict[str, Any]]:
    """The origin of each adapter, by its URL.

    `run`: the RUN that it was trained on; `of_this_run`: whether that is `run`; `training_id`, `objective`; `step`: the
    optimizer step, None for a checkpoint. All are None for an adapter that does not record them, as of another program.
    """
    identity, parts = json.loads(json.dumps(run.manifest().identity())), set(run.parts("samples"))
    return {url: _origin_in(_recorded(url), identity, parts) for url in adapters}


def _recorded(url: str) -> dict[str, Any]:
    """The content of lightreasoner.json; empty if it is missing or damaged."""
    try:
        about = json.loads(Bucket(url).get(PROVENANCE, MOST_BYTES) or b"{}")
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _origin_in(about: dict[str, Any], identity: dict[str, Any], parts: Collection[str]) -> dict[str, Any]:
    recipe, made = about.get("recipe"), about.get("run_identity")
    same = None
    if isinstance(made, dict):
        same = all(made.get(name, EARLY.get(name)) == value for name, value in identity.items())
        same = same and set(about.get("parts") or ()) <= set(parts)  # two RUNs may share their settings, never a part
    return {
        "run": about.get("run"),
        "of_this_run": same,
        "training_id": about.get("training_id"),
        "objective": recipe.get("objective") if isinstance(recipe, dict) else None,
        "step": about.get("adapter_step", about.get("optimizer_steps")),
    }
