"""The shard of a task in an array: an Indexed Job of Kubernetes, or an array job of Slurm.

In: environment variables. Out: a shard, and where it comes from. Never decides how many tasks there are.
"""

from __future__ import annotations

from collections.abc import Mapping

from client.errors import LightReasonerError, shown
from client.sampling.shards import Shard

INDEX, COMPLETIONS = "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"
"""Kubernetes sets the first, from 0. It does not set the number of tasks: the manifest sets the second."""
TASK, TASKS = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
FIRST_TASK, LAST_TASK, TASK_STEP = "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"
"""Slurm sets all of them."""


def shard_of_task(variables: Mapping[str, str]) -> tuple[Shard, str] | None:
    """This task's shard, and the variables that name it; None outside of an array.

    Raises LightReasonerError if the variables do not identify the shard.
    """
    if variables.get(INDEX):
        task, name, tasks_name, first, step = _whole_number(variables, INDEX), INDEX, COMPLETIONS, 0, 1
        remedy = "set it to the Job's completions"
    elif variables.get(TASK):
        task, name, tasks_name = _whole_number(variables, TASK), TASK, TASKS
        first, step = _whole_number(variables, FIRST_TASK, 0), max(1, _whole_number(variables, TASK_STEP, 1))
        remedy = "submit an array, as --array=1-8"
    else:
        return None
    if not variables.get(tasks_name):
        raise LightReasonerError(f"{name} is {task}, and {tasks_name} is not set: {remedy}, or give --shard I/N")
    count = _whole_number(variables, tasks_name)
    last = _whole_number(variables, LAST_TASK, first + (count - 1) * step) if name == TASK else count - 1
    place, beside = divmod(task - first, step)
    if beside or not 0 <= place < count or (last - first) // step + 1 != count:
        raise LightReasonerError(
            f"{name} {task} is no place in an array of {count} tasks from {first} to {last}: submit an array without"
            " gaps, as --array=1-8, or give --shard I/N"
        )
    return Shard(place + 1, count), f"{name} {task}, {tasks_name} {count}"


def _whole_number(variables: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = variables.get(name) or ("" if otherwise is None else str(otherwise))
    if not text.isdecimal():
        raise LightReasonerError(f"{name} must be a whole number, not {shown(text)}; correct it, or give --shard I/N")
    return int(text)
