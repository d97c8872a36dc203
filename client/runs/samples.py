"""Makes contrast samples from trajectories: a pure function of the trajectories and the RUN's settings. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

from client.contrast import DEFAULT_GAMMA, Contrast, Floats, StepFigures, contrast_together, divided, step_figures
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
"""Steps that are computed together: enough that numpy's calls cost little, and few enough for the CPU's cache."""


@dataclass(frozen=True)
class SampledGroup:
    """A few trajectories with the same k, the figures of their steps, and their samples, computed together.

    Arrays of steps hold those of all trajectories, one trajectory after the other.
    """

    trajectories: Sequence[Trajectory]
    begins: npt.NDArray[np.int64]  # [m + 1], the first step of each trajectory, and the end
    top_ids: npt.NDArray[np.int32]  # [steps, k]
    expert_logprobs: Floats  # [steps, k], as the next
    amateur_logprobs: Floats
    figures: StepFigures
    kept: Contrast  # its `steps` count through all trajectories
    incomplete: npt.NDArray[np.integer]  # [m], as in `Contrast`

    @property
    def samples(self) -> list[Sample]:
        """The sample of each trajectory."""
        each = divided(self.kept, self.begins, self.incomplete)
        return [
            Sample(one.problem_id, one.sample_index, one.prompt_token_ids, one.token_ids, kept)
            for one, kept in zip(self.trajectories, each, strict=True)
        ]


def sampled_groups(trajectories: Iterable[Trajectory], manifest: RunManifest) -> Iterator[SampledGroup]:
    """Yield groups of trajectories, in order, with their samples by a RUN's settings.

    The same trajectory always has the same samples, whatever group it is in. The seed of a random selection depends on
    (select_seed, problem_id, sample_index) only.
    """
    some: list[Trajectory] = []
    steps = 0
    for trajectory in trajectories:
        if some and (steps >= STEPS_AT_ONCE or trajectory.top_ids.shape[1] != some[0].top_ids.shape[1]):
            yield sampled_group(some, manifest)
            some, steps = [], 0
        some.append(trajectory)
        steps += len(trajectory.token_ids)
    if some:
        yield sampled_group(some, manifest)


def sampled_group(some: Sequence[Trajectory], manifest: RunManifest) -> SampledGroup:
    """Make a group of trajectories with the same k."""
    begins = np.cumsum([0, *(len(one.token_ids) for one in some)])
    top_ids, expert, amateur = (
        np.concatenate([getattr(one, name) for one in some]) if len(some) > 1 else getattr(some[0], name)
        for name in ("top_ids", "expert_logprobs", "amateur_logprobs")
    )
    figures = step_figures(expert, amateur, manifest.alpha, manifest.expert.vocab_size)
    cut = manifest.top_cut
    kept, incomplete = contrast_together(
        begins,
        top_ids,
        expert,
        amateur,
        alpha=manifest.alpha,
        beta=manifest.beta,
        first_step=manifest.first_step,
        vocab_size=manifest.expert.vocab_size,
        keep_incomplete=manifest.keep_incomplete,
        select=manifest.select,
        labels=manifest.labels,
        gamma=DEFAULT_GAMMA if manifest.gamma is None else manifest.gamma,
        max_shift=manifest.max_shift,
        cuts=[cut.for_trajectory(one.problem_id, one.sample_index) for one in some] if cut else (),
        token_ids=np.concatenate([one.token_ids for one in some]) if manifest.labels == "onehot" else None,
        seeds=[_seed(one, manifest) for one in some] if manifest.select == "random" else (),
        figures=figures,
    )
    return SampledGroup(some, begins, top_ids, expert, amateur, figures, kept, incomplete)


def sample_of(trajectory: Trajectory, manifest: RunManifest) -> Sample:
    """The samples of one trajectory, as `sampled_groups` makes them."""
    return sampled_group([trajectory], manifest).samples[0]


def _seed(trajectory: Trajectory, manifest: RunManifest) -> int:
    drawn_by = orjson.dumps([manifest.select_seed, trajectory.problem_id, trajectory.sample_index])
    return int.from_bytes(hashlib.sha256(drawn_by).digest()[:16], "little")
