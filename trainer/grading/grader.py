"""Decides whether an output gives the gold answer, with math-verify doing the mathematics and pint the units.

In: a `Gold` and what a model wrote. Out: a `Grade`: the answer that was found in it, and the verdict. An answer is read
whole: what is left over of it and not understood makes it wrong, and so does what takes longer than the time limit.
Runs in a main thread only: that limit is a signal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from math_verify.errors import TimeoutException

from trainer.grading.gold import BRACKETS, CLOCK, LETTERS, NUMBER, Gold, Kind, last_box
from trainer.grading.mathematics import Mathematics
from trainer.grading.normalize import (
    ANSWER_CHARACTERS,
    NAMED_BRACKETS,
    TEXT,
    elements,
    last_said,
    letters_of,
    lists,
    plain_text,
    squeezed,
    tidy,
    without_name,
    without_unit,
    words_of,
)
from trainer.grading.quantities import NUMBER_BASE, cut, is_number

LAST_CHARACTERS = 20_000
"""Of an output, in which its answer is looked for."""
EXTRACTED_CHARACTERS = 200
"""Of an answer that is found, as results keep it."""
DENIED = re.compile(r"\b(?:not|never|between|or|nor)\b|n't|\bthan\W{1,3}\d", re.IGNORECASE)
UNION = re.compile(rf"\\cup\b|\\bigcup\b|∪|{TEXT}\s*\{{\s*or\s*\}}|\bor\b")
RELATION = re.compile(r"[<>]|\\[lg](?:e|eq|t|eqslant)?\b|[≤≥]")
BECAUSE = re.compile(r"[\s,;]+(?:because|since|as)\b", re.IGNORECASE)
ORDINAL = re.compile(rf"(?<=\d)\s*\^?\s*\{{?\s*(?:{TEXT}\s*\{{?)?\s*(st|nd|rd|th)\b\s*\}}*")


@dataclass(frozen=True)
class Grade:
    """What was found in an output, and whether it is the gold answer."""

    extracted: str
    correct: bool


def grade(gold: Gold, output: str) -> Grade:
    """Judge an output by its final answer: its last box, or else what it says last."""
    output = output[-LAST_CHARACTERS:]
    box = last_box(output)
    answer = Answer(*box, boxed=True) if box else Answer(last_said(output), "", boxed=False)
    judge = {
        Kind.CHOICE: _choice,
        Kind.WORDS: _words,
        Kind.CLOCK: _clock,
        Kind.TUPLE: _tuples,
        Kind.INTERVAL: _same_intervals,
        Kind.MATH: _value,
    }[gold.kind]
    try:
        correct = len(answer.text) <= ANSWER_CHARACTERS and judge(gold, answer, Mathematics())
    except TimeoutException:
        correct = False
    return Grade(answer.text.strip()[:EXTRACTED_CHARACTERS], correct)


@dataclass(frozen=True)
class Answer:
    """What an output gives as its answer, and what follows the box that it stood in."""

    text: str
    behind: str
    boxed: bool


def _value(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    text, expected = (without_name(tidy(text)) for text in (answer.text, gold.text))
    value, tail = cut(expected)
    wanted = maths.number(NUMBER_BASE.sub("", value)) if not tail or tail.startswith(("%", r"\%")) else None
    if wanted is None:
        same = maths.same(expected, without_unit(text) if gold.unit else text)
        return same or maths.same(tidy(gold.text), tidy(answer.text))
    for given in (text,) if answer.boxed else (text, _from_number(text)):
        if is_number(wanted, value, gold, given, answer.behind, maths):
            return True
    return False


def _tuples(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Tuples by their parts, in order; several of them in any order. Without its brackets one tuple is a list."""
    if RELATION.search(answer.text):
        return _same_intervals(gold, answer, maths)
    wanted, given = lists(gold.text), lists(answer.text)
    if wanted is None:
        return squeezed(gold.text) == squeezed(answer.text)
    if given is None:
        return False
    if not given and len(wanted) == 1:
        given = [elements(BRACKETS.sub("", tidy(answer.text)))]
    for one in wanted:
        match = next((other for other in given if _same_parts(one, other, maths)), None)
        if match is None:
            return False
        given.remove(match)
    return not given


def _same_parts(one: Sequence[str], other: Sequence[str], maths: Mathematics) -> bool:
    return len(one) == len(other) and all(maths.same(*pair) for pair in zip(one, other, strict=True))


def _same_intervals(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Intervals, unions of some, or relations that say the same: what is open or closed is so in both."""
    wanted, given = (
        NAMED_BRACKETS.sub("", BRACKETS.sub("", tidy(text))).strip().rstrip(".") for text in (gold.text, answer.text)
    )
    if squeezed(wanted) == squeezed(given):
        return True
    sets = []
    for text in (wanted, given):
        pieces = [piece.strip() for piece in UNION.split(text)]
        points = [maths.points(piece) if _is_set(piece) else None for piece in pieces]
        if any(one is None for one in points):
            return False
        sets.append(points)
    return maths.same_sets(*sets) or maths.same(wanted, given)


def _is_set(text: str) -> bool:
    return bool(re.fullmatch(r"[(\[].*[)\]]|\\\{.*\\\}|\\emptyset|\\mathbb\{?R\}?", text) or RELATION.search(text))


def _choice(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """A letter, alone or before its own choice; or a choice itself, word for word."""
    del maths
    plain = re.sub(r"^(?:option|choice)\s+", "", plain_text(answer.text).strip(), flags=re.IGNORECASE)
    letters = LETTERS[: len(gold.choices)]
    spelled = [letters_of(choice) for choice in gold.choices]
    if named := re.fullmatch(rf"\(?([{letters}])\b[).:,]*(.*)", plain, re.DOTALL) or re.fullmatch(
        r"\(?([a-z])\)?\.?()", plain
    ):
        letter, rest = named[1].upper(), letters_of(BECAUSE.split(named[2])[0])
        if not rest or (letter in letters and rest == spelled[letters.index(letter)]):
            return letter == gold.text
    same = [letter for letter, choice in zip(letters, spelled, strict=True) if choice == letters_of(plain)]
    return same == [gold.text]


def _words(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Word for word; a yes or a no may be explained."""
    del maths
    wanted, told = (words_of(ORDINAL.sub(r"\1", plain_text(text))) for text in (gold.text, answer.text))
    if wanted in ("yes", "no"):
        return re.findall(r"\b(?:yes|no|not)\b", told)[:2] == [wanted] and bool(re.match(r"(?:yes|no)\b", told))
    return told == wanted


def _clock(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """A time of day; 'a.m.' and 'p.m.' may be left out, but not be wrong; 15:30 is 3:30 p.m."""
    del maths
    found = plain_text(answer.text).replace("{:}", ":").strip()
    told, wanted = CLOCK.fullmatch(found) or CLOCK.fullmatch(found.rstrip(".")), CLOCK.fullmatch(gold.text)
    if not answer.boxed and len(times := list(CLOCK.finditer(found))) == 1:
        told = times[0]
    if told is None or wanted is None:
        return False
    hour, minutes, half = _time(told)
    expected_hour, expected_minutes, expected_half = _time(wanted)
    halves = {one for one in (half, expected_half) if one}
    late = int(told[1].split(":")[0]) > 12
    return (hour, minutes) == (expected_hour, expected_minutes) and len(halves) < 2 and not (late and not expected_half)


def _time(clock: re.Match[str]) -> tuple[int, str, str]:
    hour, minutes = clock[1].split(":")
    half = (clock[2] or "").lower()
    return (int(hour) - 12, minutes, "p") if int(hour) > 12 else (int(hour), minutes, half)


def _from_number(text: str) -> str:
    """A sentence from its last number on, where it says that this is it."""
    numbers = [match.start() for match in NUMBER.finditer(text)]
    return text[numbers[-1] :] if numbers and not DENIED.search(text) else ""
