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
TRAILING_UNIT = re.compile(r"(?<=\d)\s+\([A-Za-z][A-Za-z .,'/-]*\)$")
"""ASDiv writes '9 (apples)'. Without the space it may be algebra."""
MINUS = "\N{MINUS SIGN}"


def gold_answer(problem: ProblemRow) -> str:
    """The answer that a row gives. Raises ProblemSetError naming file and row where it gives none."""
    if "choices" in problem.row:
        raise ProblemSetError(f"{problem.where}: a question with choices; multiple choice is not graded yet")
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
    """Whether the final answer of an output equals the gold answer: its last box, or else what it says last.

    What cannot be read, or takes math-verify more than its time limit (5 s), is wrong.
    """
    output = output.replace(MINUS, "-")
    final = _last_box(output) or output  # math-verify would take neighbouring boxes for one set
    return verify(parsed_gold(gold.replace(MINUS, "-")), parse(final))


def _last_box(output: str) -> str:
    """The last box that is closed and not empty; '' where there is none."""
    for box in reversed([match.start() for match in re.finditer(r"\\boxed\s*\{", output)]):
        depth, begin = 0, output.index("{", box)
        for index in range(begin, len(output)):
            depth += {"{": 1, "}": -1}.get(output[index], 0)
            if depth == 0:
                if output[begin + 1 : index].strip():
                    return output[box : index + 1]
                break
    return ""
