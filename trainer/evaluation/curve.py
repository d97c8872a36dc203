"""The checkpoints of one training as a curve: accuracy by optimizer step, with counts of problems fixed and broken.

In: OUT of a training; comparisons whose models include its checkpoints. Out: the adapters' steps, figures as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from client.errors import ModelError
from client.storage.bucket import Bucket
from trainer.adapters.adapter import CONFIG, PROVENANCE, WHOLE_FILE
from trainer.evaluation.scores import Comparison


def checkpoints_of(out: str) -> dict[str, int]:
    """The adapters that a training left, by step: URL -> optimizer step. The URL of the final adapter is OUT.

    Raises ModelError if there are none, or if `out` is a checkpoint or another adapter.
    """
    bucket, url = Bucket(out), out.rstrip("/")
    found: dict[int, str] = {}
    for name in bucket.names("checkpoints"):
        folder, _, file = name.rpartition("/")
        number = folder.rpartition("checkpoint-")[2]
        if file == WHOLE_FILE and number.isdecimal():
            found[int(number)] = f"{url}/{folder}"
    made = bucket.get(PROVENANCE) if bucket.get(CONFIG) else None
    if made:
        found[_adapter_step(made, url)] = url
    if not found:
        raise ModelError(
            f"{out} holds no checkpoint and no adapter of a training; 'lightreasoner-trainer train' makes one"
        )
    return {found[step]: step for step in sorted(found)}


def final_last(steps: Mapping[str, int], out: str) -> list[str]:
    """The adapters of `checkpoints_of(out)` by step, the final one last: its figures stand for the training."""
    return sorted(steps, key=lambda adapter: (adapter == out.rstrip("/"), steps[adapter]))


def _adapter_step(made: bytes, url: str) -> int:
    """The optimizer step of a final adapter, from its lightreasoner.json."""
    try:
        about = json.loads(made)
        step = about.get("adapter_step", about.get("optimizer_steps"))
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{url}/{PROVENANCE} is damaged ({error}); move it away to take the checkpoints alone"
        ) from None
    if isinstance(step, int):
        return step
    out = url.rpartition("/checkpoints/")[0] or "the --output of its training"
    raise ModelError(
        f"{url} is one checkpoint of a training, not all of it: give --checkpoints {out}, or --adapter {url} to "
        "evaluate this one alone"
    )


def highest_of(curve: Mapping[str, Sequence[Mapping[str, Any]]], steps: Mapping[str, int]) -> list[str]:
    """A line for each benchmark of a curve: the highest accuracy, the last one, and which adapter to take.

    Args:
        curve: as `curve_of` returns it.
        steps: adapter -> optimizer step.
    """
    lines = []
    for name, points in curve.items():
        best, last = max(points, key=lambda point: point["accuracy"]), points[-1]
        at_the_last = f"; at the last, {last['step']}, it is {last['accuracy']:.1%}" if best is not last else ""
        if best["step"]:
            take = next(adapter for adapter, step in steps.items() if step == best["step"])
            lines.append(f"{name}: accuracy is highest at step {best['step']}, {best['accuracy']:.1%}{at_the_last}")
            lines[-1] += f". Take {take}" if at_the_last else ""
        else:
            lines.append(
                f"{name}: no checkpoint is more accurate than the model as it is, {best['accuracy']:.1%}{at_the_last}. "
                "Train with a lower --learning-rate or fewer steps, or look at the RUN's labels with "
                "'lightreasoner-client report'"
            )
    return lines


def curve_of(comparisons: Sequence[Comparison], steps: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """For each benchmark, the figures of each step, by step. The model without an adapter is step 0."""
    curve = {}
    for comparison in comparisons:
        base, *others = comparison.results
        by_step = sorted((result for result in others if result.model in steps), key=lambda one: steps[one.model])
        points = [(0, base), *((steps[result.model], result) for result in by_step)]
        curve[comparison.benchmark] = [{"step": step, **result.to_json()} for step, result in points]
    return curve
