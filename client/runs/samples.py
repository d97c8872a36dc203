"""A trajectory's contrast samples: a pure function of the trajectory and the RUN's settings. No I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

from client.contrast import DEFAULT_GAMMA, Contrast, contrast
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


def sample_of(trajectory: Trajectory, manifest: RunManifest) -> Sample:
    """The samples of a trajectory with a RUN's settings. The same inputs always give the same samples.

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
        ),
    )
