"""The checkpoints of one training as a curve: accuracy by optimizer step, with what each fixed and broke.

In: OUT of a training; comparisons that have its checkpoints among their models. Out: names by step, figures as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from client.errors import ModelError
from client.storage.bucket import Bucket
from trainer.adapters.adapter import CONFIG, PROVENANCE
from trainer.evaluation.scores import Comparison


def checkpoints_of(out: str) -> dict[str, int]:
    """The adapters that a training left, oldest first: URL -> optimizer step; the final one is OUT itself.

    Raises ModelError where there is none.
    """
    bucket, url = Bucket(out), out.rstrip("/")
    found: dict[int, str] = {}
    for name in bucket.names("checkpoints"):
        folder, _, file = name.rpartition("/")
        number = folder.rpartition("checkpoint-")[2]
        if file == "whole.json" and number.isdecimal():
            found[int(number)] = f"{url}/{folder}"
    made = bucket.get(PROVENANCE) if bucket.get(CONFIG) else None
    if made:
        about = json.loads(made)
        found.setdefault(about.get("adapter_step", about["optimizer_steps"]), url)
    if not found:
        raise ModelError(
            f"{out} holds no checkpoint and no adapter of a training; 'lightreasoner-trainer train' makes one"
        )
    return {found[step]: step for step in sorted(found)}


def curve_of(comparisons: Sequence[Comparison], steps: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """By benchmark, a point a step; the model as it is stands at step 0."""
    return {
        comparison.benchmark: [
            {"step": 0 if index == 0 else steps[result.model], **result.to_json()}
            for index, result in enumerate(comparison.results)
            if index == 0 or result.model in steps
        ]
        for comparison in comparisons
    }
