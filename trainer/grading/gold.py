"""The gold answer of a benchmark's row, and the question as the model sees it.

In: rows of problem sets, as the published files have them. Out: `Gold` values. `trainer.grading.grader` judges outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from client.errors import ProblemSetError, shorten, shown
from client.problems.reader import MOST_NAME_CHARACTERS, ProblemRow
from trainer.grading.normalize import TEXT
from trainer.grading.units import unit_of

ANSWER_FIELDS = ("answer", "Answer", "final_answer", "solution")
GSM8K_MARK = "####"
"""The mark before the answer in GSM8K's worked answers."""
BEHIND = re.compile(r"(?<=\d)\s+\(([A-Za-z][A-Za-z .,'/-]*)\)$")
"""ASDiv's unit, as in '9 (apples)'. Without the space the brackets may be algebra."""
CLOCK = re.compile(r"(\d{1,2}:\d\d)\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE)
ROUNDED = re.compile(r"-?\d*\.\d+|-?\d+(\.\d+)?\s*(e|\\times\s*10\^)\s*\{?[-+]?\d+\}?")
BRACKETS = re.compile(r"\\(?:left|right|big|Big|bigl|bigr)(?=[\[\](){}.|])|\\[,;! ]|\$")
"""LaTeX's commands around brackets, and its spaces between their elements."""
HUNDREDS = re.compile(r"[1-9]\d\d(?:, ?[1-9]\d\d)+")
"""A list of three-digit numbers, as MATH writes 125,150. A single number, as 12,500 or 125,000, rarely looks like
this."""
UNBRACED = re.compile(r"\\boxed\s*(?<=[d\s])(-?\d[\d.,]*\d|\d|(?<=\s)[A-Za-z])(?![\w{])")
BRACE = re.compile(r"\\f?boxed\s*\{|[{}]")
RELATIVE_TOLERANCE = 0.01
"""For Minerva Math's rounded numbers. Its problems use measured constants and ask for no number of digits."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORD = re.compile(rf"{TEXT}\s*\{{\s*([A-Za-z]{{2}}[A-Za-z ]*)\}}")
MINERVA_FIELDS = {"problem", "solution", "type", "idx", "id"}
READ_FIELDS = {"question", "problem", "input", "body", "choices", "solution", "answer", "final_answer", "error", "unit"}
"""Fields with texts of questions and answers, in lower case."""
# fmt: off
ABOUT_FIELDS = {
    "level", "difficulty", "type", "answer_type", "subject", "subfield", "category", "domain", "topic", "field", "tag",
    "tags", "source", "url", "link", "year", "date", "split", "dataset", "task", "language", "lang", "license",
    "equation", "equations", "formula", "solution_type", "solutions", "cot", "explanation", "rationale", "steps",
    "contest", "competition", "name", "author", "id", "idx", "index", "unique_id", "uuid", "qid", "problem_id",
    "question_id", "generated_solution",
}
# fmt: on
"""Fields with texts about a problem, in lower case. They change neither question nor answer."""


class Kind(StrEnum):
    """How an answer is compared."""

    MATH = "math"  # by value, with math-verify
    TUPLE = "tuple"  # lists in brackets: order within one counts, and among several does not
    INTERVAL = "interval"  # brackets count
    CLOCK = "clock"  # 3:30 p.m.
    WORDS = "words"  # a name, yes or no
    CHOICE = "choice"  # a letter


@dataclass(frozen=True)
class Gold:
    """A gold answer."""

    text: str
    kind: Kind = Kind.MATH
    unit: str = ""  # what stands behind the number: a measure, or things that are counted
    relative: float = 0.0  # how far a number may be away, in parts of the gold number
    absolute: float = 0.0  # the same, as a number
    each: tuple[float, ...] = ()  # the same, for each of several numbers
    choices: tuple[str, ...] = ()


def gold_answer(problem: ProblemRow) -> Gold:
    """The gold answer of a row. Raises ProblemSetError naming file and row if the row has none."""
    row = problem.row
    if "choices" in row:
        return _gold_choice(problem)
    field = next((field for field in ANSWER_FIELDS if row.get(field) is not None), None)
    value = "" if field is None or isinstance(row[field], bool) else row[field]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)  # OlympiadBench has lists
    if field == "solution":  # MATH and Minerva Math
        gold = _boxed(text, relative=row.keys() <= MINERVA_FIELDS)
    elif "answer_type" in row:
        try:
            gold = _olympiad(text, row)
        except ValueError:
            raise ProblemSetError(
                f"{problem.where}: 'error' is {shown(row['error'])}; it must be a number, or several between commas"
            ) from None
    else:
        gold = _plain_gold(text)
    if not gold.text:
        raise ProblemSetError(f"{problem.where}: {_why_no_answer(row, field, text)}")
    return gold


def _why_no_answer(row: Mapping[str, Any], field: str | None, text: str) -> str:
    """Why a row gives no answer, and what to do. `field`: the field of the answer, None if there is none."""
    remedy = "rename the field to answer, or give evaluate --answer-field"
    if field is None:
        seen, known = shorten(", ".join(row), MOST_NAME_CHARACTERS) or "nothing", ", ".join(ANSWER_FIELDS)
        return f"no answer: it has {seen}, and none of {known}; {remedy} NAME"
    if field == "solution" and text.strip():
        found = f"'solution' is read for a \\boxed{{}}, as MATH has it, and {text[-80:]!r} has none"
        return f"no answer: {found}; if that is the answer, {remedy} solution"
    return f"no answer in {field!r} ({text[-80:]!r}), and every row needs one"


def check_shape(problem: ProblemRow) -> None:
    """Raises ProblemSetError if a row has text fields of no known benchmark: a part of the question may be in them."""
    others = [
        name
        for name, value in problem.row.items()
        if isinstance(value, str | list | dict) and value and name.lower() not in READ_FIELDS | ABOUT_FIELDS
    ]
    choices = problem.row.get("choices")
    if others or not isinstance(choices, list | None):
        seen = shorten(", ".join(problem.row), MOST_NAME_CHARACTERS)
        raise ProblemSetError(
            f"{problem.where}: not a row of a known benchmark: {', '.join(map(shown, others or ['choices']))} may be "
            f"part of the question or the answer; it has {seen}. Name for evaluate what is read: --question-field, "
            "--choices-field, --answer-field"
        )


def with_fields(problem: ProblemRow, choices_field: str | None, answer_field: str | None) -> ProblemRow:
    """A row in a benchmark's shape, made from the fields that the user named. Raises ProblemSetError if a field is
    missing.

    Choices are a list, or texts with labels. The answer is a letter, a number from 0, a label, or the text of a choice.
    """
    row = problem.row
    for name in (choices_field, answer_field):
        if name and row.get(name) is None:
            raise ProblemSetError(
                f"{problem.where}: no {name!r}; it has {shorten(', '.join(row), MOST_NAME_CHARACTERS)}"
            )
    answer = row[answer_field] if answer_field else row.get("answer")
    if not choices_field:
        return replace(problem, row={"answer": answer})
    choices = row[choices_field]
    labels: list[Any] = []
    if isinstance(choices, dict):
        choices, labels = choices.get("text", list(choices.values())), choices.get("label", list(choices))
    if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
        marks = [rf"\(?{letter}\s*[).:]\s*" for letter in LETTERS]
        lettered = [re.match(mark, choice) for mark, choice in zip(marks, choices, strict=False)]
        if all(lettered):
            choices = [choice[match.end() :] for match, choice in zip(lettered, choices, strict=True) if match]
        if answer in labels:
            answer = labels.index(answer)
        elif choices.count(answer) == 1 and not (isinstance(answer, str) and answer in LETTERS):
            answer = choices.index(answer)
    return replace(problem, row={"choices": choices, "answer": answer})


def question_of(problem: ProblemRow) -> str:
    """The question as the model sees it, with its choices if it has any."""
    choices = problem.row.get("choices")
    if not choices:
        return problem.question
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{problem.question}\n{listed}\nAnswer with the letter of the right choice."


def boxes(text: str) -> list[tuple[int, int, int]]:
    """The closed, non-empty \\boxed{…} of a text: the start of each, and start and end of its content.

    Offsets are characters.
    """
    opened: list[tuple[int, int, bool]] = []
    found = []
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.start(), brace.end(), len(brace[0]) > 1))
        elif opened:
            start, begin, boxed = opened.pop()
            if boxed and text[begin : brace.start()].strip():
                found.append((start, begin, brace.start()))
    return sorted(found)


def braced(text: str) -> str:
    """The text with braces for \\boxed 5, which MATH's solutions use too."""
    return UNBRACED.sub(r"\\boxed{\1}", text)


def last_box(text: str) -> tuple[str, str] | None:
    """The content of the last box and the text behind it; None if there is no box."""
    found = boxes(text := braced(text))
    return (text[found[-1][1] : found[-1][2]].strip(), text[found[-1][2] + 1 :]) if found else None


def unit_behind(text: str) -> str:
    """The text behind a box that may be a unit: up to the end of the formula or of the sentence."""
    end = r"\\[\])]|\\end\b|\n|[.,;:)]\s|[.,;]?\s*$|\$\s+\w+\s+\w+"
    return re.split(end, text[:200].lstrip("$ "), maxsplit=1)[0][:60]


def elements(text: str, between: str = ",") -> list[str]:
    """The parts of a text between commas, or between another sign, outside of brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        if sign == between and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _plain_gold(text: str) -> Gold:
    """The gold answer of GSM8K, SVAMP, ASDiv, and rows of their kind."""
    box = last_box(text)
    text = box[0] if box else text.rpartition(GSM8K_MARK)[2].strip()
    unit = BEHIND.search(text)
    text = BEHIND.sub("", text)
    if CLOCK.fullmatch(text):
        return Gold(text, Kind.CLOCK)
    if unit is None and re.search(r"[A-Za-z]{2}", text) and "\\" not in text and not re.search(r"[=^]", text):
        return Gold(text, Kind.WORDS)
    return Gold(text, _kind(text), unit=unit[1] if unit else "")


def _boxed(text: str, relative: bool) -> Gold:
    box = last_box(text)
    if box is None:
        return Gold("")
    held, unit = box[0], unit_behind(box[1])
    if HUNDREDS.fullmatch(held):
        held = ", ".join(elements(held))
    if word := WORD.fullmatch(held):
        return Gold(word[1], Kind.WORDS)
    room = RELATIVE_TOLERANCE if relative and ROUNDED.fullmatch(held.replace(" ", "")) else 0.0
    return Gold(held, _kind(held), unit="" if unit_of(unit) is None else unit, relative=room)


def _olympiad(text: str, row: dict[str, Any]) -> Gold:
    if HUNDREDS.fullmatch(plain := text.strip("$ ")) and row.get("is_multiple_answer") is not False:
        text = ", ".join(elements(plain))
    kind = {"Tuple": Kind.TUPLE, "Interval": Kind.INTERVAL}.get(row["answer_type"]) or _kind(text)
    errors = [float(error) for error in str(row.get("error") or 0.0).split(",")]
    several = len(elements(text)) if kind is Kind.MATH else 1
    if several > 1 and any(errors):
        return Gold(text, kind, unit=row.get("unit") or "", each=tuple([*errors, *errors[-1:] * several][:several]))
    return Gold(text, kind, unit=row.get("unit") or "", absolute=errors[0])


def _gold_choice(problem: ProblemRow) -> Gold:
    choices, answer = problem.row["choices"], problem.row.get("answer")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    several = isinstance(choices, list) and 1 < len(choices) <= len(LETTERS)
    if not several or type(answer) is not int or not 0 <= answer < len(choices):
        raise ProblemSetError(
            f"{problem.where}: a question with choices needs 2 to {len(LETTERS)} of them, and as its answer the right"
            f" one's letter or number from 0 ({answer!r} of {len(choices) if isinstance(choices, list) else choices!r})"
        )
    return Gold(LETTERS[answer], Kind.CHOICE, choices=tuple(map(str, choices)))


def _kind(text: str) -> Kind:
    """The kind of an answer, by the brackets around all of it. An open interval is compared as a tuple."""
    plain = BRACKETS.sub("", text).strip()
    if re.fullmatch(r"\([^()]*,[^()]*\)(\s*,\s*\([^()]*,[^()]*\))*", plain):
        return Kind.TUPLE
    interval = r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]"
    return Kind.INTERVAL if re.fullmatch(rf"{interval}(\s*\\cup\s*{interval})*", plain) else Kind.MATH
