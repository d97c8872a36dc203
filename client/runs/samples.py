"""A trajectory's contrast samples: a pure function of the trajectory and the RUN's settings. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import orjson

from client.contrast import DEFAULT_GAMMA, Contrast, StepFigures, contrast, step_figures
from client.protocol.requests import Trajectory
from client.runs.manifest import RunManifest


@dataclass(frozen=True)
class Sample:
    """A trajectory with its contrast samples, for training. Step t is predicted at position P + t - 1."""

    problem_id: str
    sample_index: int
    prompt_token_ids: npt.NDArray[np.int32]  # [P]
    token_ids: npt.NDArray[np.int32]  # [T]
    contrast: Contrast


STEPS_AT_ONCE = 1024
"""Steps of which figures are computed at once: numpy's calls cost little then, and the arrays stay in the cache."""


def figures_of(trajectory: Trajectory, manifest: RunManifest) -> StepFigures:
    """What a trajectory's steps are with a RUN's settings, for `sample_of` and a tally."""
    return next(figures_of_each([trajectory], manifest))


def figures_of_each(trajectories: Sequence[Trajectory], manifest: RunManifest) -> Iterator[StepFigures]:
    """`figures_of` each trajectory, several computed together. All have the same top k, or come one by one."""
    begin = 0
    while begin < len(trajectories):
        end, steps = begin, 0
        while (
            end < len(trajectories)
            and steps < STEPS_AT_ONCE
            and _width(trajectories, end) == _width(trajectories, begin)
        ):
            steps += len(trajectories[end].token_ids)
            end += 1
        some = trajectories[begin:end]
        expert = np.concatenate([one.expert_logprobs for one in some])
        amateur = np.concatenate([one.amateur_logprobs for one in some])
        figures = step_figures(expert, amateur, manifest.alpha, manifest.expert.vocab_size)
        ends = np.cumsum([0, *(len(one.token_ids) for one in some)])
        yield from (figures[a:b] for a, b in pairwise(ends))
        begin = end


def _width(trajectories: Sequence[Trajectory], index: int) -> int:
    return trajectories[index].top_ids.shape[1]


def sample_of(trajectory: Trajectory, manifest: RunManifest, figures: StepFigures | None = None) -> Sample:
    """The samples of a trajectory with a RUN's settings. The same inputs always give the same samples.

    `figures`: those of `figures_of`, if they are there already.

    The seed of a random selection depends on (select_seed, problem_id, sample_index) only, not on parts or order.
    """
    cut = manifest.top_cut
    drawn_by = orjson.dumps([manifest.select_seed, trajectory.problem_id, trajectory.sample_index])
    return Sample(
        problem_id=trajectory.problem_id,
        sample_index=trajectory.sample_index,
        prompt_token_ids=trajectory.prompt_token_ids,
        token_ids=trajectory.token_ids,
        contrast=contrast(
            trajectory.top_ids,
            trajectory.expert_logprobs,
            trajectory.amateur_logprobs,
            alpha=manifest.alpha,
            beta=manifest.beta,
            first_step=manifest.first_step,
            vocab_size=manifest.expert.vocab_size,
            keep_incomplete=manifest.keep_incomplete,
            select=manifest.select,
            labels=manifest.labels,
            gamma=DEFAULT_GAMMA if manifest.gamma is None else manifest.gamma,
            max_shift=manifest.max_shift,
            cut=cut.for_trajectory(trajectory.problem_id, trajectory.sample_index) if cut else None,
            token_ids=trajectory.token_ids,
            seed=int.from_bytes(hashlib.sha256(drawn_by).digest()[:16], "little"),
            figures=figures,
        ),
    )
