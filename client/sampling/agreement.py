"""The manifest of a new RUN, and the check that a complete RUN has the settings that were asked for.

In: problems, the pair, settings. Out: the value of run.json, or a RunError that names every difference.
"""

from __future__ import annotations

import time
from importlib.metadata import version

from client.errors import RunError, ServiceError
from client.problems.problem_set import ProblemSet
from client.protocol.requests import NO_VARIABLES, TOP_NEEDS_ALL, ContrastSettings, PairCards, SamplingSettings
from client.runs.manifest import RunManifest
from client.runs.run import Run


def manifest_of(
    problems: ProblemSet,
    pair: PairCards,
    versions: dict[str, str],
    sampling: SamplingSettings,
    contrast: ContrastSettings,
    today: str,
) -> RunManifest:
    """run.json of a new RUN. `versions`: those of the source; `today`: the date for a chat template that writes one.

    Raises RunError for select top.
    """
    if contrast.select == "top":
        raise RunError(TOP_NEEDS_ALL)
    expert, amateur = pair
    ends = None if expert.end_token_ids is None else sorted({*expert.end_token_ids, *sampling.stop_token_ids})
    strange = amateur.own_prompt_with
    switched = any(value in strange.get(name, ()) for name, value in sampling.chat_template_kwargs.items())
    amateur_prompt = sampling.amateur_prompt or ("own" if switched else amateur.amateur_prompt)
    writes_date = expert.writes_date or (amateur_prompt == "own" and amateur.writes_date)
    return RunManifest(
        format=1,
        created_at=int(time.time()),
        expert=expert,
        amateur=amateur,
        system_prompt=sampling.system_prompt,
        chat_template_kwargs=sampling.chat_template_kwargs,
        decoding=sampling.decoding,
        top_k=sampling.top_k,
        end_token_ids=ends,
        amateur_prompt=amateur_prompt,
        date=(sampling.date or today) if writes_date else None,
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
            "amateur_prompt": sampling.amateur_prompt or made.amateur_prompt,
            "date": sampling.date if made.date and sampling.date else made.date,
            **contrast.model_dump(),
            "problems": problems.identity(),
        }
    )
    if different := made.differences(asked):
        listed = "\n  ".join(("name a new RUN. The RUN's against yours:", *different))
        raise RunError(f"{run} is complete and was made with other settings; {listed}")


def check_asked(manifest: RunManifest) -> None:
    """Raises ServiceError for a setting that the server would reject: run.json must not record it."""
    expert, amateur = manifest.expert, manifest.amateur
    most = min(expert.max_logprobs, amateur.max_logprobs, expert.vocab_size)
    if manifest.top_k > most:
        raise ServiceError(f"--top-k: {manifest.top_k} is more than the server's pair allows, {most}")
    for index in (index for index in manifest.decoding.stop_token_ids if index >= expert.vocab_size):
        raise ServiceError(f"--stop-token-ids: {index} is beyond the expert's vocabulary of {expert.vocab_size}")
    if manifest.amateur_prompt == "own" and amateur.chat_template_digest is None:
        raise ServiceError("--amateur-prompt own: the amateur has no chat template of its own; add one, or give same")
    for name in sorted(manifest.chat_template_kwargs.keys() & NO_VARIABLES):
        raise ServiceError(f"--chat-template-kwargs: {name} is no variable of a chat template; leave it out")
