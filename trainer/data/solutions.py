"""The training set of the SFT baseline: the whole solutions of a RUN that give the correct answer.

In: a RUN's trajectories, gold answers by problem. Out: `Example` values. The label of every step is the trajectory's
own token, so that the contrast loss becomes cross-entropy. Source: the baseline of LightReasoner, arXiv 2510.07962,
which samples several solutions per problem and keeps the correct ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from client.errors import ProblemSetError, RunError
from client.models.detokenize import tokenizer_of
from client.problems.reader import read_problems
from client.protocol.requests import Trajectory
from client.runs.build import trajectory_parts
from client.runs.run import Run
from trainer.data.dataset import Example, Limits, TrainingSet, check_length
from trainer.grading.gold import Gold, check_shape, gold_answer
from trainer.grading.grader import grade

BOX = r"\boxed"
"""A prompt that holds this asks for the answer in a box."""


class SolutionSet(TrainingSet):
    """The correct solutions of a RUN, part after part."""

    def __init__(self, run: Run, limits: Limits, golds: Mapping[str, Gold], ends: Collection[int] = ()) -> None:
        """`ends`: the ids at which a solution ends. Tokens after the first of them are left out."""
        super().__init__(run, limits)
        self._ends = np.array(sorted(ends), np.int32)
        self._golds = golds
        self._tokenizer: Any = tokenizer_of(run.tokenizer(), f"{run}/tokenizer.json")
        self.unanswered = 0  # solutions of problems without a gold answer
        # Whether the first prompt asks for a box; None before one is read. A small vocabulary may lack the words.
        self.asks_for_boxes = True if BOX in (run.manifest().system_prompt or "") else None

    def add(self, part: str) -> None:
        """Read a part and grade its trajectories. Raises RunError, naming the damaged part or a too long trajectory."""
        for trajectory in self.run.trajectories_of(part):
            key = trajectory.problem_id, trajectory.sample_index
            if key in self._keys:
                continue
            self._keys.add(key)
            if self.asks_for_boxes is None:  # the chat template or the question may ask, too
                self.asks_for_boxes = BOX in self._tokenizer.decode(trajectory.prompt_token_ids.tolist())
            trajectory = self._ended(trajectory)
            gold = self._golds.get(trajectory.problem_id)
            if gold is None:
                self.unanswered += 1
            elif trajectory.finish_reason == "stop" and grade(gold, self._text(trajectory)).correct:
                example = solution_example(trajectory)
                check_length(self.run, trajectory, len(example.input_ids), self.limits)
                self.take(example, key)
            else:
                self.without_kept_steps += 1
        self.parts.append(part)

    def all_parts(self) -> list[str]:
        """The parts that hold trajectories: samples do not hold whole solutions."""
        return list(trajectory_parts(self.run, self.run.manifest()))

    def __str__(self) -> str:
        left_out = f"{self.without_kept_steps:,} wrong or unfinished are left out"
        if self.unanswered:
            left_out += f", and {self.unanswered:,} whose problem has no answer"
        if self.asks_for_boxes is False:
            left_out += f"; the prompts of {self.run} ask for no {BOX}{{}}, where an answer is read most safely; the"
            left_out += " system prompt of sample --solutions does"
        return f"{len(self.examples):,} right solutions of {self.kept_steps:,} tokens; {left_out}"

    def check_not_empty(self) -> None:
        """Raises RunError if no solution is correct, or if no problem has a gold answer."""
        if self.examples:
            return
        if self.unanswered and not self.without_kept_steps:
            raise RunError(
                f"--answers answers none of the problems in {self.run}: problems are matched by id, or without one by "
                "question; give the problem set that was sampled"
            )
        raise RunError(
            f"none of the {self.without_kept_steps:,} solutions in {self.run} is right; sample them with --solutions, "
            r"which asks for whole ones with the answer in \boxed{}, or sample more"
        )

    def _ended(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory up to its first end token."""
        ends = np.flatnonzero(np.isin(trajectory.token_ids[:-1], self._ends))
        if not len(ends):
            return trajectory
        return replace(trajectory, token_ids=trajectory.token_ids[: ends[0] + 1], finish_reason="stop")

    def _text(self, trajectory: Trajectory) -> str:
        return self._tokenizer.decode(trajectory.token_ids.tolist())


def solution_example(trajectory: Trajectory) -> Example:
    """The example with every token of a trajectory as a label. Step t is predicted at position P + t - 1."""
    prompt, tokens = trajectory.prompt_token_ids, trajectory.token_ids
    return Example(
        input_ids=np.concatenate([prompt, tokens])[:-1].astype(np.int64),
        positions=len(prompt) - 1 + np.arange(len(tokens), dtype=np.int64),
        label_ids=tokens,
        label_weights=np.ones(len(tokens), np.float32),
        label_offsets=np.arange(len(tokens) + 1),
    )


def read_answers(file: str) -> dict[str, Gold]:
    """The gold answers of a problem set, by id. Raises ProblemSetError, naming the row, if one has no answer."""
    golds = {}
    for problem in read_problems(file):
        check_shape(problem)
        gold = gold_answer(problem)
        if gold.choices:
            raise ProblemSetError(
                f"{problem.where}: a question with choices; --answers needs questions without choices"
            )
        golds[problem.id] = gold
    return golds
