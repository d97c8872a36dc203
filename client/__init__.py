"""The client: sends problems to a server, finds the steps where expert and amateur disagree, fills a RUN.

It owns the HTTP contract (`client.protocol`), the files of a RUN (`client.runs`) and the mathematics of the contrast
(`client.contrast`). server and trainer import it; it imports neither, and needs neither torch nor vLLM.

    import asyncio
    from client import Problem, SamplingClient, read_samples

    async def ask():
        async with SamplingClient(["http://gpu-1:8000", "http://gpu-2:8000"]) as client:
            async for line in client.trajectories([Problem(id="1", question="What is 7 times 8?")]):
                print(line)  # a Trajectory, or a Failure with its reason

    asyncio.run(ask())
    for sample in read_samples("s3://bucket/runs/first"):
        print(sample.problem_id, sample.contrast.steps, sample.contrast.kl_lower_bound)

The names below are the public API. Other names may change. A name is imported at its first use, so that `import client`
is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.contrast import Contrast
    from client.errors import LightReasonerError
    from client.problems.reader import ProblemRow, read_problems
    from client.protocol.requests import Decoding, Failure, Problem, SamplingSettings, Trajectory
    from client.runs.run import Run, read_samples, read_trajectories
    from client.runs.samples import Sample
    from client.servers.client import SamplingClient

__all__ = [
    "Contrast",
    "Decoding",
    "Failure",
    "LightReasonerError",
    "Problem",
    "ProblemRow",
    "Run",
    "Sample",
    "SamplingClient",
    "SamplingSettings",
    "Trajectory",
    "read_problems",
    "read_samples",
    "read_trajectories",
]

_HOMES = {
    "client.contrast": ["Contrast"],
    "client.errors": ["LightReasonerError"],
    "client.problems.reader": ["ProblemRow", "read_problems"],
    "client.protocol.requests": ["Decoding", "Failure", "Problem", "SamplingSettings", "Trajectory"],
    "client.runs.run": ["Run", "read_samples", "read_trajectories"],
    "client.runs.samples": ["Sample"],
    "client.servers.client": ["SamplingClient"],
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'client' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
