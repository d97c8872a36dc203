"""RUNs for tests of the report: texts that look like markup, a plain computation of divergences, an evaluation."""

import numpy as np

from client.contrast import kl_lower_bound
from client.runs.run import Run
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<!--<script>", '"><img src=x onerror=alert(3)>',
    "</script/x>", "<!--<script/x>", "<b>bold</b>", "&lt;b&gt;", "{{ 7*7 }}", "]]>", "\u2028", "</style>",
]  # fmt: skip


SCORE = {"n": 200, "correct": 150, "accuracy": 0.75, "interval": [0.68, 0.81]}
TWO = SCORE | {"before": SCORE, "paired": {"fixed": 9, "broken": 2, "p": 0.0123}}


def trajectories_of(count):
    return [make_trajectory(f"p{index}", seed=index, tokens=10 + index) for index in range(count)]


def make_run(folder, trajectories, tokenizer=None, questions=None, **changes):
    run = Run(str(folder))
    run.claim(make_manifest(**changes), tokenizer or tokenizer_json())
    for begin in range(0, len(trajectories), 4):
        run.write(trajectories[begin : begin + 4], questions or {}, run.manifest())
    return run


def plain_bounds(trajectories, first=1, alpha=0.2):
    logprobs = [(t.expert_logprobs[first:], t.amateur_logprobs[first:]) for t in trajectories]
    bounds = np.concatenate([kl_lower_bound(*pair) for pair in logprobs])
    last = np.concatenate([pair[0][:, -1] - pair[0].max(axis=1) for pair in logprobs])
    return bounds, last < np.log(alpha)


def with_equal_steps(trajectories, count):
    """The same trajectories, but at the first `count` counted steps of each the amateur equals the expert."""
    for trajectory in trajectories:
        trajectory.amateur_logprobs[1 : count + 1] = trajectory.expert_logprobs[1 : count + 1]
    return trajectories
