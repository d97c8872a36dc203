"""Says of each adapter what it was trained on, for the report of a RUN, and which prompt it was taught.

In: adapters, a RUN. Out: plain values for an evaluation's JSON; notes. Refuses and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from client.errors import shorten
from client.runs.manifest import EARLY
from client.runs.run import Run
from client.storage.bucket import Bucket, BucketError
from trainer.adapters.adapter import PROVENANCE

MOST_BYTES = 2**24
"""Most bytes of an adapter's lightreasoner.json: it lists the parts of its RUN."""
TAUGHT_CHARACTERS = 40
"""Most characters of a system prompt in a note."""


def origins_of(adapters: Iterable[str], run: Run) -> dict[str, dict[str, Any]]:
    """The origin of each adapter, by its URL.

    `run`: the RUN that it was trained on; `of_this_run`: whether that is `run`; `training_id`, `objective`; `step`: the
    optimizer step, None for a checkpoint. All are None for an adapter that does not record them, as of another program.
    """
    identity, parts = json.loads(json.dumps(run.manifest().identity())), set(run.parts("samples"))
    return {url: _origin_in(_recorded(url), identity, parts) for url in adapters}


def prompt_notes(adapters: Iterable[str], asked: str, run: Run | None) -> list[str]:
    """A line for each system prompt other than `asked` that adapters were trained with. "", None: no system prompt.

    `run`: the RUN of adapters that do not record their prompt.
    """
    taught: dict[str, str] = {}
    for url in adapters:
        try:
            made = _recorded(url).get("run_identity")
        except BucketError:  # the evaluation names what cannot be read
            continue
        if not isinstance(made, dict) or "system_prompt" not in made:
            made = {"system_prompt": run.manifest().system_prompt if run else asked}
        if (prompt := str(made["system_prompt"] or "")) != asked:
            taught.setdefault(prompt, url)
    return [
        f"note: {url} was trained with the system prompt {_in_quotes(prompt)} and is asked with {_in_quotes(asked)};"
        f" a model that knows no other prompt needs --system-prompt {_in_quotes(prompt)}"
        for prompt, url in taught.items()
    ]


def _in_quotes(prompt: str) -> str:
    return f'"{shorten(prompt, TAUGHT_CHARACTERS)}"'


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
