"""Arithmetic word problems of two and three steps, with worked solutions, made from a seed.

In: a split name and a seed. Out: `WordProblem` values, or a JSONL problem set.
Every question belongs to exactly one split, decided by a digest of its text, so nothing that the
pair was trained on is ever sampled, and nothing that was sampled or tuned on is ever tested.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["pretrain", "sample", "dev", "test"]

NAMES = {
    "Ann": "She", "Eva": "She", "Mia": "She", "Zoe": "She", "Lea": "She", "Ida": "She",
    "Tom": "He", "Ben": "He", "Max": "He", "Sam": "He", "Leo": "He", "Jan": "He",
}  # fmt: skip
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles", "nuts", "eggs")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} more", "picks up {n}")
LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "drops {n}")
GROWTHS = {2: "doubles them", 3: "triples them"}
LARGEST = 199
"""A gain never leads far above this (200 at most), so that numbers have at most three digits."""


@dataclass(frozen=True)
class WordProblem:
    """A question, its working (one equation a step) and its answer."""

    question: str
    equations: tuple[str, ...]
    answer: int

    def solution(self, steps_shown: int | None = None) -> str:
        """The worked solution, showing the first `steps_shown` equations (all by default)."""
        shown = self.equations[:steps_shown]
        return " ".join([*(f"{equation}." for equation in shown), f"The answer is {self.answer}."])


def make_problem(rng: random.Random) -> WordProblem:
    """Draw one problem; two and three steps are equally likely."""
    name, pronoun = rng.choice(list(NAMES.items()))
    thing = rng.choice(THINGS)
    amount = rng.randint(3, 60)
    sentences = [f"{name} has {amount} {thing}."]
    equations = []
    for _ in range(rng.choice((2, 3))):
        kinds = ["gain"] * 4
        kinds += ["loss"] * 4 if amount > 2 else []
        kinds += ["growth"] if amount <= LARGEST // 3 else []
        kind = rng.choice(kinds)
        if kind == "gain":
            n = rng.randint(2, min(60, LARGEST - amount)) if amount < LARGEST - 2 else 1
            result, equation, phrase = amount + n, f"{amount}+{n}", rng.choice(GAINS).format(n=n)
        elif kind == "loss":
            n = rng.randint(2, min(60, amount))
            result, equation, phrase = amount - n, f"{amount}-{n}", rng.choice(LOSSES).format(n=n)
        else:
            n = rng.choice(list(GROWTHS))
            result, equation, phrase = amount * n, f"{amount}*{n}", GROWTHS[n]
        sentences.append(f"{pronoun} {phrase}.")
        equations.append(f"{equation}={result}")
        amount = result
    sentences.append(f"How many {thing} does {name} have now?")
    return WordProblem(" ".join(sentences), tuple(equations), amount)


def split_of(question: str) -> Split:
    """The one split that a question belongs to: 94% pretrain, 2% each sample, dev and test."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return "pretrain" if bucket < 94 else "sample" if bucket < 96 else "dev" if bucket < 98 else "test"


def problems(split: Split, seed: int) -> Iterator[WordProblem]:
    """An endless stream of distinct problems of one split."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        problem = make_problem(rng)
        if split_of(problem.question) == split and (split == "pretrain" or problem.question not in seen):
            if split != "pretrain":
                seen.add(problem.question)
            yield problem


def rows(split: Split, count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` rows of a problem set: id, question, answer (which sampling never reads)."""
    for index, problem in zip(range(count), problems(split, seed), strict=False):
        yield {"id": f"{split}-{index:05d}", "question": problem.question, "answer": str(problem.answer)}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("sample", "dev", "test") or not sys.argv[2].isdigit():
        sys.exit("usage: python deploy/demo/word_problems.py sample|dev|test COUNT > problems.jsonl")
    for row in rows(sys.argv[1], int(sys.argv[2])):  # type: ignore[arg-type]
        print(json.dumps(row))


if __name__ == "__main__":
    main()
