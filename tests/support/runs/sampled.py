"""Shared by tests that ask servers: problems, a client that gathers every line, and counts by key."""

import asyncio
from collections import Counter

from client.protocol.requests import Problem
from client.servers.client import SamplingClient

PROBLEMS = [Problem(id=f"p{index}", question=f"What is {index}?") for index in range(100)]


def sampled(url, problems=PROBLEMS, settings=None, patience=60.0, on_line=None, tell=lambda _: None):
    """Every line that a client yields. `on_line` is called after each one, with all lines so far."""

    async def gather():
        lines = []
        async with SamplingClient(url, patience=patience, tell=tell) as connection:
            async for line in connection.trajectories(problems, settings):
                lines.append(line)
                if on_line:
                    on_line(lines)
        return lines

    return asyncio.run(gather())


def keys(lines):
    return Counter((line.problem_id, line.sample_index) for line in lines)


def once(problems, n=1):
    return Counter((problem.id, index) for problem in problems for index in range(n))


def more(count):
    return [Problem(id=f"more-{index}", question="And?") for index in range(count)]
