"""Which shard a task of an array has: by the variables that Kubernetes and Slurm set."""

import pytest

from client.errors import LightReasonerError
from server.cli.tasks import shard_of_task


def slurm(task, count, first=0, last=None, step=1):
    last = first + (count - 1) * step if last is None else last
    names = {"ID": task, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "8"}, "1/8"),
        ({"JOB_COMPLETION_INDEX": "7", "JOB_COMPLETIONS": "8"}, "8/8"),
        (slurm(0, 8), "1/8"),
        (slurm(1, 8, first=1), "1/8"),
        (slurm(8, 8, first=1), "8/8"),
        (slurm(6, 4, step=2), "4/4"),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
    ],
)
def test_a_task_has_the_shard_of_its_place(variables, shard):
    found, said = shard_of_task(variables)
    assert str(found) == shard
    assert all(name in said for name in variables if name.endswith(("INDEX", "COMPLETIONS", "ID", "COUNT")))


def test_outside_of_an_array_there_is_no_shard():
    assert shard_of_task({"SLURM_JOB_ID": "7", "JOB_COMPLETIONS": "8", "JOB_COMPLETION_INDEX": ""}) is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETIONS is not set: set it to the Job's completions, or give --shard"),
        ({"JOB_COMPLETION_INDEX": "8", "JOB_COMPLETIONS": "8"}, "JOB_COMPLETION_INDEX 8 is no place in an array of 8"),
        ({"JOB_COMPLETION_INDEX": "x", "JOB_COMPLETIONS": "8"}, "JOB_COMPLETION_INDEX must be a whole number, not 'x'"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        (slurm(4, 3, first=1, step=2), "is no place in an array of 3 tasks from 1 to 5"),
        (slurm(3, 2, first=3, last=5), "without gaps"),  # --array=3,5: the first of them too
        (slurm(5, 2, first=3, last=5), "without gaps"),
    ],
)
def test_variables_that_name_no_shard_are_an_error_with_the_remedy(variables, said):
    with pytest.raises(LightReasonerError, match=said):
        shard_of_task(variables)
