"""Decides whether an output gives the gold answer, with math-verify doing the mathematics.

In: a `Gold` and what a model wrote. Out: a `Grade`: the answer that was found in it, and the verdict. What cannot be
read, or takes math-verify more than its time limit, is wrong. Runs in a main thread only: that limit is a signal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from trainer.answers import BRACKETS, CLOCK, LETTERS, NUMBER, Gold, Kind, last_box, unit_behind
from trainer.units import ratio, unit_of

SECONDS = 3
"""For one comparison by math-verify, and as much for reading each side."""
ROUNDING = 1e-9
"""Of floating point, in parts of a number."""
EXTRACTED_CHARACTERS = 200
"""Of an answer that is found, as results keep it."""
MINUS = "\N{MINUS SIGN}"
SCIENTIFIC = re.compile(r"(?<![A-Za-z\\\d.])(-?\d+(?:\.\d+)?)\s*[eE]\s*([-+]?\d+)(?![\d.A-Za-z])")
LEADING_NUMBER = re.compile(
    r"(?:[^\d\\.]|\\(?:\$|approx|sim|,|;| ))*(?:\d[\d,]*\.?\d*|\.\d+)?(?:\\[dt]?frac\{[^{}]*\}\{[^{}]*\})?"
    r"(?:\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*-?\d+\s*\}?)?"
)
SAID = re.compile(
    r"(?:final\s+answer|answer|choice|option)\s*(?:is|was|:|=)*\s*:?\s*(.+?)(?:\.\s|\.?$|\n)", re.IGNORECASE
)
TUPLE = re.compile(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
NAMED = re.compile(r"\(?\b[A-Za-z](?:\s*,\s*[A-Za-z])*\)?\s*(?:=|\\in\b)\s*(?=[(\[])")
"""x ∈ or (a, b) = before brackets."""
SOFT_EDGES = re.compile(r"^(?:the|a|an)\s+|[\s.,;:!?'\"*]+$", re.IGNORECASE)


@dataclass(frozen=True)
class Grade:
    """What was found in an output, and whether it is the gold answer."""

    extracted: str
    correct: bool


def grade(gold: Gold, output: str) -> Grade:
    """Judge an output by its final answer: its last box, or else what it says last."""
    output = output.replace(MINUS, "-")
    judge = {
        Kind.CHOICE: _choice,
        Kind.WORDS: _words,
        Kind.CLOCK: _clock,
        Kind.TUPLE: _tuples,
        Kind.INTERVAL: _interval,
        Kind.MATH: _value,
    }[gold.kind]
    found, correct = judge(gold, output)
    return Grade(found.strip()[:EXTRACTED_CHARACTERS], correct)


def _value(gold: Gold, output: str) -> tuple[str, bool]:
    box = last_box(output)
    answer, behind = (box[0], unit_behind(box[1])) if box else (output, "")
    if gold.unit == "%":  # both are percentages, whether they say so or not
        answer = re.sub(r"\\?%", "", answer)
    expected, given = _parsed(_scientific(gold.text), boxed=True), _parsed(_scientific(answer), boxed=bool(box))
    found = answer if box else (str(given[-1]) if given else "")
    factor = _factor(gold, answer + " " + behind if box else "")
    if factor is None:
        return found, False
    if factor == 1.0 and not gold.relative and not gold.absolute:
        return found, verify(expected, given, timeout_seconds=SECONDS)
    wanted, said = _number(expected), _number(given)
    if wanted is None or said is None:
        return found, factor == 1.0 and verify(expected, given, timeout_seconds=SECONDS)
    room = max(gold.absolute, gold.relative * abs(wanted)) + ROUNDING * abs(wanted)
    return found, abs(said * factor - wanted) <= room


def _tuples(gold: Gold, output: str) -> tuple[str, bool]:
    """Tuples by their parts, in order; several of them in any order. Without its brackets one tuple is a list."""
    box = last_box(output)
    found = box[0] if box else _said(output)
    wanted, given = _lists(gold.text), _lists(found)
    if not given and len(wanted) == 1:
        given = [_parts(BRACKETS.sub("", found))]
    for one in wanted:
        match = next((other for other in given if _same_parts(one, other)), None)
        if match is None:
            return found, False
        given.remove(match)
    return found, not given


def _interval(gold: Gold, output: str) -> tuple[str, bool]:
    """An interval or a union of some: brackets must be there, and open or closed as the gold's."""
    box = last_box(output)
    found = box[0] if box else _said(output)
    wanted, given = (NAMED.sub("", BRACKETS.sub("", text).strip()) for text in (gold.text, found))
    if re.search(r"[(\[]", wanted) and not re.search(r"[(\[<>]|\\[lg]eq?\b", given):
        return found, False
    same = wanted.replace(" ", "").rstrip(".") == given.replace(" ", "").rstrip(".")
    return found, same or verify(_parsed(wanted, True), _parsed(given, True), timeout_seconds=SECONDS)


def _choice(gold: Gold, output: str) -> tuple[str, bool]:
    """A letter, alone or before its choice; or a choice itself, word for word."""
    box = last_box(output)
    found = box[0] if box else _said(output)
    plain = _plain_text(found).strip()
    letters = LETTERS[: len(gold.choices)]
    named = re.match(rf"\(?([{letters}])(?:[).:,]|\s*$)", plain) or re.fullmatch(r"\(?([a-z])\)?\.?", plain)
    if named:
        return found, named[1].upper() == gold.text
    same = [
        letter for letter, choice in zip(letters, gold.choices, strict=True) if _words_of(choice) == _words_of(plain)
    ]
    return found, same == [gold.text]


def _words(gold: Gold, output: str) -> tuple[str, bool]:
    box = last_box(output)
    found = box[0] if box else _said(output)
    return found, _words_of(_plain_text(found)) == _words_of(gold.text)


def _clock(gold: Gold, output: str) -> tuple[str, bool]:
    """A time of day; 'a.m.' and 'p.m.' may be left out, but not be wrong."""
    box = last_box(output)
    found = _plain_text(box[0] if box else _said(output)).strip()
    said, wanted = CLOCK.fullmatch(found) or CLOCK.fullmatch(found.rstrip(".")), CLOCK.fullmatch(gold.text)
    if said is None or wanted is None:
        return found, False
    halves = {half.lower() for half in (said[2], wanted[2]) if half}
    return found, said[1].lstrip("0") == wanted[1].lstrip("0") and len(halves) < 2


def _parsed(text: str, boxed: bool) -> list[Any]:
    """A text as math-verify's values; a box keeps it whole, LaTeX or not."""
    return parse(rf"\boxed{{{text.strip('$')}}}" if boxed else text, parsing_timeout=SECONDS)


def _number(values: list[Any]) -> float | None:
    """The number that a parsed answer is, or None where it is none, or is not computed within the time limit."""
    value: Any = values[0] if values else None
    value = getattr(value, "rhs", value)  # x = 5
    try:
        return timeout(SECONDS)(lambda: float(value.doit()) if value.is_number else None)()
    except (AttributeError, TypeError, ValueError, ArithmeticError, TimeoutException):
        return None


def _scientific(text: str) -> str:
    """3.3e12 as LaTeX has it; math-verify would take the e for Euler's number."""
    return SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def _factor(gold: Gold, answer: str) -> float | None:
    """What an answer is to be multiplied with to be in the gold's unit; None where it measures another thing.

    1 where either names no measure: then it is in the unit that the question asks for.
    """
    number = NUMBER.search(answer)
    mine, theirs = unit_of(gold.unit), unit_of(_behind_number(answer)) if number else None
    if mine is None or theirs is None or mine == theirs:
        return 1.0
    return ratio(theirs, mine)


def _behind_number(answer: str) -> str:
    """What stands behind the number that an answer begins with: a fraction or a power of ten may belong to it."""
    plain = _scientific(answer)
    number = LEADING_NUMBER.match(plain)
    return plain[number.end() :] if number else ""


def _said(output: str) -> str:
    """Without a box: what follows the last 'answer is', or else the last line."""
    said = SAID.findall(output)
    lines = [line for line in output.splitlines() if line.strip()]
    return (said[-1] if said else lines[-1] if lines else "").strip().rstrip(".")


def _plain_text(latex: str) -> str:
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}", r" \1", latex).replace("$", "")


def _words_of(text: str) -> str:
    """Small letters, single spaces, no article before, no full stop behind."""
    return SOFT_EDGES.sub("", SOFT_EDGES.sub("", " ".join(text.split()))).casefold().replace(r"\%", "%")


def _lists(text: str) -> list[list[str]]:
    """The outermost bracketed lists of a text, each as its parts."""
    return [_parts(match) for match in TUPLE.findall(NAMED.sub("", BRACKETS.sub("", text))) if len(_parts(match)) > 1]


def _parts(text: str) -> list[str]:
    """Cut at the commas that stand in no bracket; those in numbers stay only where three digits follow a lone one."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _same_parts(one: list[str], other: list[str]) -> bool:
    return len(one) == len(other) and all(
        mine == theirs or verify(_parsed(mine, True), _parsed(theirs, True), timeout_seconds=SECONDS)
        for mine, theirs in zip(one, other, strict=True)
    )
