"""Builds another RUN from the same trajectories: other alpha, beta, first step, selection or labels, without a model.

In: a RUN and settings. Out: a complete RUN. It holds a copy of the trajectories, part by part under the same names, so
that it can be reported, compared, built from and mended when the first RUN is gone. samples/part-X still depends on
trajectories/part-X alone. One part is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from client.contrast import Floats, eligible, kl_lower_bound, ordered
from client.errors import RunError
from client.protocol.requests import ContrastSettings
from client.runs.keys import Key
from client.runs.manifest import RunManifest, TopCut
from client.runs.run import Run, RunTotals
from client.runs.tally import Divergences, Tally

Track = Callable[[Sequence[str]], Any]
"""Iterates over the parts, and may show the progress."""


@dataclass(frozen=True)
class Built:
    """The result of `build_run`: the new RUN's totals, and whether it is sealed. It is if the source RUN is."""

    totals: RunTotals
    sealed: bool
    tally: Tally | None = field(default=None, compare=False)  # None: it was complete already


def build_run(source: Run, target: Run, settings: ContrastSettings, track: Track = iter) -> Built:
    """Make `target` from the trajectories of `source` with other settings.

    The same call resumes. If `source` is still being sampled, `target` gets what it holds now; the same call later
    adds the rest.

    Raises RunError if `source` has no trajectories; if `target` has other settings, another source, or other files than
    a RUN's; with select top, if `source` is not complete.
    """
    manifest = source.manifest()
    complete = source.completion() is not None  # before the parts are listed: a sealed RUN gets no new ones
    parts = trajectory_parts(source, manifest)
    if settings.select != "random":  # no seed is used, so it must not make two RUNs differ
        settings = settings.model_copy(update={"select_seed": 0})
    made = manifest.model_copy(update={**settings.model_dump(), "built_from": str(source), "top_cut": None})
    if settings.select == "top":
        if not complete:
            raise RunError(f"{source} is not complete yet, and --select top chooses from the whole RUN: build it later")
        made = made.model_copy(update={"top_cut": top_cut(source, made)})
    target.check_place()
    target.claim(made, source.tokenizer())
    if strangers := set(target.parts("trajectories")) - set(parts):
        raise RunError(f"{target} holds trajectories that {source} does not ({min(strangers)}); name a new RUN")
    if (completion := target.completion()) is not None:
        if more := set(parts) - set(target.parts("trajectories")):
            raise RunError(f"{target} is complete, but {source} has {len(more)} newer parts; name a new RUN")
        return Built(completion.totals, sealed=True)
    done = set(target.parts("samples"))
    tally = Tally(made)  # over every part, those of earlier attempts too
    remote = source if source.bucket.remote else target
    for groups in remote.each(track(parts), lambda part: target.adopt(part, source, made, write=part not in done)):
        for group in groups:
            tally.add(group)
    target.copy_failures(source)
    totals = tally.totals(set(target.failures()))
    if complete:
        target.seal(totals, tally)
    return Built(totals, complete, tally)


def top_cut(run: Run, settings: RunManifest) -> TopCut:
    """The last step that select top keeps: of all eligible steps the share `settings.keep`, largest bound first.

    Steps with equal bounds are kept in the order of problem id, sample and step. Reads the RUN twice: once to count
    bounds, once to sort the few that share a counter with the cut.

    Raises RunError if no step is eligible.
    """
    assert settings.keep is not None
    counted = Divergences()
    for _, _, bounds in _eligible_bounds(run, settings):
        counted.add(bounds)
    if not counted.count:
        raise RunError(f"{run} has no step whose plausible set is complete: increase --alpha, or --keep-incomplete")
    rank = max(round(settings.keep * counted.count), 1)
    least, above = counted.place(rank)
    near = []
    for key, steps, bounds in _eligible_bounds(run, settings):
        for index in np.flatnonzero(counted.alike(bounds, least)):
            near.append((-float(bounds[index]), *key, int(steps[index])))
    bound, problem_id, sample_index, step = sorted(near)[rank - above - 1]
    return TopCut(kl_lower_bound=-bound, problem_id=problem_id, sample_index=sample_index, step=step)


def _eligible_bounds(run: Run, settings: RunManifest) -> Iterator[tuple[Key, npt.NDArray[np.intp], Floats]]:
    """Each trajectory's key, its eligible steps and their bounds."""
    for trajectory in run.trajectories():
        logprobs = trajectory.expert_logprobs, trajectory.amateur_logprobs
        steps = np.flatnonzero(
            eligible(
                *logprobs,
                alpha=settings.alpha,
                first_step=settings.first_step,
                vocab_size=settings.expert.vocab_size,
                keep_incomplete=settings.keep_incomplete,
            )
        )
        yield (trajectory.problem_id, trajectory.sample_index), steps, ordered(kl_lower_bound(*logprobs)[steps])


def trajectory_parts(run: Run, manifest: RunManifest) -> list[str]:
    """The parts of a RUN's trajectories. Raises RunError if it has none."""
    parts = run.parts("trajectories")
    if not parts and manifest.imported_from:
        raise RunError(
            f"{run} was imported from {manifest.imported_from} and holds samples only, without the log-probabilities "
            "of the two models. To build, report or compare, sample its problems with a server"
        )
    if not parts:
        raise RunError(f"{run} holds no trajectory yet; sample into it with 'lightreasoner-client sample'")
    return parts
