"""Another RUN from the same trajectories: other alpha, beta, first step, selection or labels, without a model.

In: a RUN and settings. Out: a whole RUN, which everything that reads RUNs takes. It holds the trajectories too, part
by part under the same names: only then can it be reported, compared, built upon and mended when the first one is
gone, and samples/part-X still comes from trajectories/part-X alone. One part is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from client.errors import RunError
from client.protocol.requests import ContrastSettings
from client.runs.manifest import RunManifest
from client.runs.run import Run, RunTotals
from client.runs.tally import Tally

Track = Callable[[Sequence[str]], Any]
"""Takes the parts and gives them back one by one, showing how far it is."""


@dataclass(frozen=True)
class Built:
    """What `build` leaves: the new RUN's totals, and whether it is sealed, as it is when the first one was."""

    totals: RunTotals
    sealed: bool


def build_run(source: Run, target: Run, settings: ContrastSettings, track: Track = iter) -> Built:
    """Make `target` from the trajectories of `source` under other settings.

    Interrupted, the same call does what is missing. A `source` that is still being sampled gives what it holds, and
    the same call again what it holds by then.

    Raises RunError where `source` has no trajectories, or `target` was made with other settings or from another RUN.
    """
    manifest = source.manifest()
    complete = source.completion() is not None  # asked before the parts are listed: none comes after it
    parts = trajectory_parts(source, manifest)
    if settings.select != "random":  # nothing is drawn, so a seed must not tell two RUNs apart
        settings = settings.model_copy(update={"select_seed": 0})
    made = manifest.model_copy(update={**settings.model_dump(), "built_from": str(source)})
    target.claim(made, source.tokenizer())
    if strangers := set(target.parts("trajectories")) - set(parts):
        raise RunError(f"{target} holds trajectories that {source} does not ({min(strangers)}); name a new RUN")
    if (completion := target.completion()) is not None:
        if more := set(parts) - set(target.parts("trajectories")):
            raise RunError(f"{target} is complete, but {source} has {len(more)} newer parts; name a new RUN")
        return Built(completion.totals, sealed=True)
    done = set(target.parts("samples"))
    tally = Tally(made)  # of every part, for what an earlier attempt wrote counts too
    for part in track(parts):
        trajectories, samples = target.adopt(part, source, made, write=part not in done)
        for trajectory, sample in zip(trajectories, samples, strict=True):
            tally.add(trajectory, sample.contrast)
    target.copy_failures(source)
    totals = tally.totals(set(target.failures()))
    if complete:
        target.seal(totals)
    return Built(totals, complete)


def trajectory_parts(run: Run, manifest: RunManifest) -> list[str]:
    """The parts of a RUN's trajectories. Raises RunError where it has none."""
    parts = run.parts("trajectories")
    if not parts and manifest.imported_from:
        raise RunError(
            f"{run} was imported from {manifest.imported_from} and holds samples only: without both models' "
            "log-probabilities nothing can be selected, counted or shown; sample its problems with a server"
        )
    if not parts:
        raise RunError(f"{run} holds no trajectory yet; sample into it with 'lightreasoner-client sample'")
    return parts
