"""Decides whether an output gives the gold answer, with math-verify doing the mathematics.

In: rows of benchmarks, outputs of models. Out: gold answers, verdicts. Runs in a main thread only: math-verify's
time limits are signals.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

from client.errors import ProblemSetError
from client.problems import ProblemRow

ANSWER_FIELDS = ("answer", "Answer", "final_answer")
GSM8K_MARK = "####"
"""What follows it in GSM8K's worked answers is the answer."""
TRAILING_UNIT = re.compile(r"(?<=\d)\s*\([^()\d]*\)$")
"""ASDiv writes '9 (apples)'."""


def gold_answer(problem: ProblemRow) -> str:
    """The answer that a row gives. Raises ProblemSetError naming file and row where it gives none."""
    value = next((problem.row[field] for field in ANSWER_FIELDS if problem.row.get(field) is not None), None)
    if isinstance(value, list):  # OlympiadBench
        value = ", ".join(map(str, value))
    text = "" if value is None or isinstance(value, bool) else str(value)
    text = TRAILING_UNIT.sub("", text.rpartition(GSM8K_MARK)[2].strip())
    if not text or not parsed_gold(text):
        raise ProblemSetError(
            f"{problem.where}: no answer that math-verify can read in {', '.join(ANSWER_FIELDS)} ({value!r}); "
            "evaluation needs one in every row"
        )
    return text


def parsed_gold(gold: str) -> list[Any]:
    """A gold answer as math-verify's values; a box keeps it whole, LaTeX or not."""
    return parse(rf"\boxed{{{gold.strip('$')}}}")


def is_correct(gold: str, output: str) -> bool:
    """Whether the final answer of an output, the last one that it gives, equals the gold answer.

    What cannot be read, or takes math-verify more than its time limit (5 s), is wrong.
    """
    last_box = output.rfind(r"\boxed")  # math-verify would take neighbouring boxes for one set
    return verify(parsed_gold(gold), parse(output[max(last_box, 0) :]))
