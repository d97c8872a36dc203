"""The manifest of a new RUN, and the check that a complete RUN has the settings that were asked for.

In: problems, the pair, settings. Out: the value of run.json, or a RunError that names every difference.
"""

from __future__ import annotations

import time
from importlib.metadata import version

from client.errors import RunError, ServiceError
from client.problems.problem_set import ProblemSet
from client.protocol.requests import TOP_NEEDS_ALL, ContrastSettings, PairCards, SamplingSettings
from client.runs.manifest import RunManifest
from client.runs.run import Run


def manifest_of(
    problems: ProblemSet,
    pair: PairCards,
    versions: dict[str, str],
    sampling: SamplingSettings,
    contrast: ContrastSettings,
) -> RunManifest:
    """run.json of a new RUN. `versions`: what the source reports. Raises RunError for select top."""
    if contrast.select == "top":
        raise RunError(TOP_NEEDS_ALL)
    expert, amateur = pair
    return RunManifest(
        format=1,
        created_at=int(time.time()),
        expert=expert,
        amateur=amateur,
        system_prompt=sampling.system_prompt,
        chat_template_kwargs=sampling.chat_template_kwargs,
        decoding=sampling.decoding,
        top_k=sampling.top_k,
        **contrast.model_dump(),
        problems=problems.identity(),
        versions={"client": version("lightreasoner"), **versions},
    )


def check_sealed(run: Run, problems: ProblemSet, sampling: SamplingSettings, contrast: ContrastSettings) -> None:
    """Raises RunError if a complete RUN was made from other problems or with other settings."""
    made = run.manifest()
    asked = made.model_copy(
        update={
            "system_prompt": sampling.system_prompt,
            "chat_template_kwargs": sampling.chat_template_kwargs,
            "decoding": sampling.decoding,
            "top_k": sampling.top_k,
            **contrast.model_dump(),
            "problems": problems.identity(),
        }
    )
    if different := made.differences(asked):
        listed = "\n  ".join(("name a new RUN. The RUN's against yours:", *different))
        raise RunError(f"{run} is complete and was made with other settings; {listed}")


def check_top_k(manifest: RunManifest) -> None:
    """Raises ServiceError for a top k that the server would reject: run.json must not record it."""
    most = min(manifest.expert.max_logprobs, manifest.amateur.max_logprobs, manifest.expert.vocab_size)
    if manifest.top_k > most:
        raise ServiceError(f"--top-k: {manifest.top_k} is more than the server's pair allows, {most}")
