"""Decides whether an output gives the gold answer. math-verify does the mathematics, pint the units.

In: a `Gold` and an output. Out: a `Grade`: the answer found in the output, and the verdict. The grader reads an answer
whole: a part that it does not understand makes the answer wrong, and so does the time limit. Call it in the main thread
only, because the time limit is a signal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from math_verify.errors import TimeoutException

import trainer.grading.mathematics as limits
from trainer.grading.boxed import Answer
from trainer.grading.choices import choice_of
from trainer.grading.gold import BRACKETS, CLOCK, HUNDREDS, Gold, Kind, braced, elements, unit_behind
from trainer.grading.mathematics import Mathematics, limited
from trainer.grading.normalize import (
    ANSWER_CHARACTERS,
    NAMED_BRACKETS,
    NAMED_PART,
    NAMES,
    NEGATIVE,
    NUMBER_WORD,
    ONES,
    TEXT,
    digits_for_words,
    plain_text,
    tidy,
    without_name,
    without_unit,
    words_of,
)
from trainer.grading.quantities import (
    NUMBER_BASE,
    PERCENT,
    cut,
    is_bare,
    is_number,
    multiplier,
    spelled_out,
    understood,
)
from trainer.grading.said import answers
from trainer.grading.units import unit_of

EXTRACTED_CHARACTERS = 200
"""How many characters of a found answer results keep."""
OR = rf"{TEXT}\s*\{{\s*(?:or|and)\s*\}}|\b(?:or|and)\b"
OR_SETS = re.compile(rf"(?<=[)\]])\s*(?:{OR})\s*(?=[(\[])")
ALGEBRA = re.compile(r"(?:\\mu\b\s*)?[A-Za-z](?![A-Za-z])|\\Omega\b|[^,]*,")
"""Letters behind a gold number that are no unit, unless ~ separates them from the number, or \\, if it has plain
digits. \\text, \\mathrm and words of several letters are units.
"""
HELD_OFF = r"(?:.*~|.*\\[,;: ](?=\s*\\)|-?[\d.,]+\\[,;: ])\s*"
BRACKETED = re.compile(r"[()\[\]<>≤≥≠]|\\(?:[lgn]eq?q?|[lg]eqslant|[lg]t|in|cup|setminus)(?![A-Za-z])")
EQUATION = re.compile(r"(?=[^=]*(?<![\\A-Za-z])[A-Za-z](?![A-Za-z]))[^=]*[-+*/^|][^=]*=")
"""An equation. It is neither a name nor a derivation before a value."""
DEGREES = re.compile(
    rf"\s*(?:\^\s*\{{?\s*\\circ\b\s*\}}?|\\degree\b|°|(?:{TEXT}\s*\{{)?\s*degrees?\b\s*\}}?)(?!\W*(?:{TEXT})?\W*[CF]\b)"
)
PI = re.compile(r"\\pi\b|π")
SET_BUILDER = re.compile(
    r"^\\\{\s*(?:[a-z]\b\s*(?:\\in\b)?)?\s*(?:\\mathbb\s*\{?\s*R\s*\}?\s*)?(?::|\||\\mid(?![a-z])|\\colon(?![a-z]))\s*"
    r"(.*(?:[<>≤≥]|\\[lg](?:eq?|t)(?![a-z])).*)\\\}$"
)
"""\\{x : 1 < x < 2\\}."""
HOUR = rf"(?P<hour>\d{{1,2}}|{'|'.join(ONES[12:0:-1])})"
SPOKEN_TIME = re.compile(
    rf"\b(?P<part>half|(?:a\s+)?quarter)\s+(?P<way>past|after|to)\s+{HOUR}\b(?!\s*:)"
    rf"|(?<![\d:.]){HOUR.replace('hour', 'full')}(?:\s+o'?clock\b|(?=\s*[ap]\.?\s?m\b))",
    re.IGNORECASE,
)
OF_DAY = re.compile(
    r"[\s,]*(?:(?P<letter>[ap])\.?\s*m\b\.?|(?:in\s+the|at)\s+(?P<word>morning|afternoon|evening|noon|night)\b)",
    re.IGNORECASE,
)
BEFORE_TIME = re.compile(
    r"(?:^|[:=]|\b(?:at|is|was|be|by|to|time|exactly|answer|it's|gets?|have|has)\b)[\W_]*$", re.IGNORECASE
)
BEHIND_TIME = re.compile(
    r"(?:\W|\b(?:sharp|exactly|today|tomorrow|tonight|local\s+time|o'clock|on\s+the\s+(?:dot|same\s+day|next\s+day)"
    r"|(?:on\s+)?(?:mon|tues|wednes|thurs|fri|satur|sun)day)\b)*(?:\b(?:so|because|since|which|when|as)\b\D*)?",
    re.IGNORECASE,
)
"""Behind a time of day in a box. It leaves the time as it is."""
OTHER_TIME = re.compile(
    r"[\d+*/<>=?\\]|\b(?:after|before|past|until|till|to|plus|minus|later|earlier|or|between|hours?|minutes?|seconds?|not|never|"
    rf"wrong|incorrect|too|if)\b|n't\b|{NUMBER_WORD.pattern}",
    re.IGNORECASE,
)
"""Behind a time of day in a sentence. It may change the time or deny it."""
ORDINAL = re.compile(rf"(?<=\d)\s*\^?\s*\{{?\s*(?:{TEXT}\s*\{{?)?\s*(st|nd|rd|th)\b\s*\}}*")


@dataclass(frozen=True)
class Grade:
    """The answer found in an output, and whether it is the gold answer."""

    extracted: str
    correct: bool


def grade(gold: Gold, output: str) -> Grade:
    """Judge an output by its final answer: its last mark, or else what it says last."""
    found: list[Answer] = []
    try:
        correct = bool(
            limited(
                limits.TOTAL_SECONDS,
                lambda: _judge(gold, braced(output.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")), found),
            )
        )
    except TimeoutException:
        correct = False
    return Grade(found[-1].text.strip()[:EXTRACTED_CHARACTERS] if found else "", correct)


def _judge(gold: Gold, output: str, found: list[Answer]) -> bool:
    """Whether one reading of the output is right. `found` receives the first reading, and the right one behind it."""
    if gold.kind is Kind.CHOICE:
        letter, text = choice_of(gold.choices, output)
        found.append(Answer(text))
        return letter == gold.text
    maths = Mathematics()
    output = SPOKEN_TIME.sub(_time_in_digits, output) if gold.kind is Kind.CLOCK else output
    for answer in answers(output, _count(gold)):
        if not found:
            found.append(answer)
        if len(answer.text) <= ANSWER_CHARACTERS and not answer.part and _same(gold, answer, maths):
            if answer.rival and not _same(_nearly(gold, answer.rival), Answer(answer.rival), maths):
                continue
            found.append(answer)
            return True
    return False


def _same(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    gold, answer = _in_radians(gold, answer)
    match gold.kind:
        case Kind.WORDS:
            return _words(gold.text, answer.text)
        case Kind.CLOCK:
            return _clock(gold.text, answer)
        case Kind.TUPLE | Kind.INTERVAL:
            return _bracketed(gold, answer.text, maths)
    return _each(gold, answer, maths) if gold.each else _value(gold, answer, maths)


def _nearly(gold: Gold, rival: str) -> Gold:
    """The gold answer with a tolerance, if a decimal repeats the answer: 0.333 for a third."""
    if not (decimal := re.fullmatch(r"-?\d*\.(\d+)\s*(\\?%)?", rival.strip())):
        return gold
    room = 0.51 * 10 ** -len(decimal[1]) / (100 if decimal[2] and not gold.unit else 1)
    return replace(gold, absolute=max(gold.absolute, room))


def _in_radians(gold: Gold, answer: Answer) -> tuple[Gold, Answer]:
    """Both in radians, if one is in degrees and the other a multiple of π."""
    degrees = DEGREES.match(answer.behind)
    given = answer.text + degrees[0] if degrees else answer.text
    expected = gold.text + gold.unit if DEGREES.match(gold.unit) else gold.text
    if DEGREES.search(expected) and PI.search(given) and not DEGREES.search(given):
        return replace(gold, text=_radians(expected), unit=""), answer
    if DEGREES.search(given) and PI.search(expected) and not DEGREES.search(expected):
        return gold, replace(answer, text=_radians(given), behind="")
    return gold, answer


def _radians(degrees: str) -> str:
    return DEGREES.sub(r" \\cdot \\frac{\\pi}{180}", degrees)


def _count(gold: Gold) -> int:
    """The number of values in a gold answer."""
    return len(elements(BRACKETS.sub("", gold.text))) if gold.kind in (Kind.MATH, Kind.TUPLE) else 1


def _each(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Whether the answer has all numbers, each within its own tolerance, in any order."""
    left = [replace(answer, text=text) for text in elements(tidy(re.sub(OR, ",", answer.text)))]
    for text, room in zip(elements(gold.text), gold.each, strict=True):
        one = replace(gold, text=text, absolute=room, each=())
        match = next((other for other in left if _value(one, other, maths)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _value(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    text, expected = (without_name(tidy(text)) for text in (answer.text, gold.text))
    if ", " in expected and HUNDREDS.fullmatch(expected):
        text = ", ".join(elements(text))
    if ":" in expected:
        text = re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", text)
    if sign := NEGATIVE.match(plain := plain_text(text)):
        text = f"-{plain[sign.end() :]}"
    value, tail = cut(expected)
    percent = bool(PERCENT.match(tail))
    letters = ALGEBRA.match(tail)
    held = letters and re.fullmatch(rf"{HELD_OFF}{re.escape(tail)}", expected)
    if held and _formula(gold, answer, expected, text, maths):
        return True
    times, tail = multiplier(tail)
    if tail and not gold.unit and (held or not letters) and unit_of(tail) is not None:
        gold, tail = replace(gold, unit=tail), ""
    if percent and not gold.unit:
        gold = replace(gold, unit="%")
    if not answer.marked and not understood(unit_behind(answer.behind), gold.unit):
        return False
    wanted = maths.number(NUMBER_BASE.sub("", value)) if not tail.strip(" {}") or percent else None
    if wanted is None:
        return _formula(gold, answer, expected, without_unit(text) if gold.unit else text, maths)
    if not re.search(r"\d", text) and NUMBER_WORD.search(text):
        text = digits_for_words(plain_text(text)).strip()
    elif words_of(plain_text(text)) == "half":
        text = r"\frac{1}{2}"
    golds = [wanted * times, *([wanted / 100] if percent and not PERCENT.search(text) else [])]
    if times > 1 and not cut(text)[1] and is_bare(answer.behind):  # "How many million?"
        golds.append(wanted)
    told = spelled_out(text, answer.behind, gold.unit)
    return any(is_number(one, value, gold, told, answer.behind, maths) for one in golds)


def _formula(gold: Gold, answer: Answer, expected: str, text: str, maths: Mathematics) -> bool:
    sides = elements(text, "=")
    if len(sides) == 1 or len(elements(gold.text, "=")) > 1:
        return maths.same(expected, text) or maths.same(tidy(gold.text), tidy(answer.text))
    if len(elements(expected)) > 1 or r"\pm" in expected:  # x = 3 or x = 5
        parts = [without_name(part) for part in elements(re.sub(OR, ",", text))]
        return not any(map(EQUATION.match, parts)) and maths.same(expected, ", ".join(parts))
    return all(maths.same(expected, side) for side in sides)  # an equation is not its right side


def _bracketed(gold: Gold, answer: str, maths: Mathematics) -> bool:
    """Compare tuples in order; intervals, their unions, and relations that say the same. Braces hold sets."""
    readings = [in_order(answer), in_order(answer, always=False)] if gold.kind is Kind.TUPLE else [answer]
    return any(_same_brackets(gold, one, maths) for one in dict.fromkeys(readings))


def _same_brackets(gold: Gold, answer: str, maths: Mathematics) -> bool:
    wanted, given = (without_name(tidy(NAMED_BRACKETS.sub("", text))) for text in (gold.text, answer))
    given = SET_BUILDER.sub(r"\1", given)
    if len(elements(re.sub(f"{OR}|;", ",", given))) > 1 and not BRACKETED.search(given):
        if gold.kind is Kind.INTERVAL:
            return False
        given = f"({given})"
    if r"\cup" in wanted:
        given = OR_SETS.sub(r"\\cup ", given)
    return not re.fullmatch(r"\\\{[^()\[\]]*\\\}", given) and maths.same(wanted, given.rstrip(" ,"))


def in_order(text: str, always: bool = True) -> str:
    """Named coordinates in the order of their names, in brackets: y = 3, x = -2 and (y, x) = (3, -2) become (-2, 3).

    That is alphabetical order, if the names are neighbours in the alphabet; names like n and k keep their order. A
    question may ask for (n, m): without `always`, only x, y, z and numbered names are sorted.
    """
    plain = BRACKETS.sub("", text)
    if head := NAMES.match(plain):
        names = elements(head[1])
        return re.sub(r"\(([^()]*)\)", lambda one: _by_name(names, elements(one[1]), always), plain[head.end() :])
    parts = [NAMED_PART.fullmatch(part) for part in elements(re.sub(OR, ",", plain))]
    names = [part[1] for part in parts if part]
    if len(parts) < 2 or len(set(names)) < len(parts):
        return text
    return _by_name(names, [part[2] for part in parts if part], always)


def _by_name(names: list[str], values: list[str], always: bool) -> str:
    places = [(ord(name[0]), int(re.sub(r"\D", "", name) or 0)) for name in names]
    letter, number = min(places)
    following = {(letter + index, number) for index in range(len(names))}
    numbered = {(letter, number + index) for index in range(len(names))}
    ordered = set(places) == numbered or (set(places) == following and (always or letter >= ord("x")))
    if ordered and len(names) == len(values):
        values = [value for _, value in sorted(zip(places, values, strict=True))]
    return f"({', '.join(values)})"


def _words(gold: str, told: str) -> bool:
    """Compare word for word. An explanation may follow a yes or a no."""
    wanted, told = (words_of(ORDINAL.sub(r"\1", plain_text(text))) for text in (gold, told))
    others = {"yes": "no|not", "no": "yes"}.get(wanted)
    if not others:
        return told == wanted
    alone = rf"{wanted}\s*(?:[^\w\s]|$|(?<=\s)(?:s?he|it|they|we|i|you|there|that|because|since|indeed)\b)"
    return bool(re.match(rf"{alone}(?!.*\b(?:{others})\b)", told))


def _clock(gold: str, answer: Answer) -> bool:
    """Compare times of day. 'a.m.' and 'p.m.' may be missing, but not wrong. 15:30 is 3:30 p.m."""
    told, behind = plain_text(answer.text).replace("{:}", ":"), plain_text(answer.behind)
    if answer.marked:
        told += half[0] if (half := OF_DAY.match(behind)) else ""
    else:
        told = f"{answer.ahead} {told} {behind}"
    times, wanted = list(CLOCK.finditer(told)), CLOCK.fullmatch(gold)
    if len(times) != 1 or wanted is None:
        return False
    before, after = told[: times[0].start()], told[times[0].end() :]
    formula = re.search(r"[\d|+*/^<>\\]", before) and before.rstrip().endswith("=")
    if formula or (re.search(r"\w", before) if answer.marked else not BEFORE_TIME.search(before)):
        return False
    (hour, minutes, halves), (*expected, expected_halves) = _time(times[0], after), _time(wanted, "")
    known = BEHIND_TIME.fullmatch(rest := OF_DAY.sub("", after))
    if len(halves) > 1 or not (known or not (answer.marked or OTHER_TIME.search(rest))):
        return False
    late = int(times[0][1].split(":")[0]) > 12
    same_half = halves == expected_halves or not halves or (not expected_halves and not late)
    return [hour, minutes] == expected and same_half


def _time(clock: re.Match[str], after: str) -> tuple[int, str, set[str]]:
    """The hour from 1 to 12, the minutes, and the halves of the day that the text names: 'a', 'p'."""
    hour, minutes = clock[1].split(":")
    halves = {clock[2].lower()} if clock[2] else set()
    for word in OF_DAY.finditer(after):
        early = word["word"] in ("morning",) or (word["word"] == "night" and not 5 <= int(hour) < 12)
        halves.add(word["letter"].lower() if word["letter"] else "a" if early else "p")
    return (int(hour) - 12, minutes, halves | {"p"}) if int(hour) > 12 else (int(hour), minutes, halves)


def _time_in_digits(words: re.Match[str]) -> str:
    """half past three is 3:30, a quarter to 4 is 3:45, 3 o'clock is 3:00."""
    if words["full"]:
        return f"{digits_for_words(words['full'])}:00"
    hour, minutes = int(digits_for_words(words["hour"])), 30 if words["part"].lower() == "half" else 15
    if words["way"].lower() == "to":
        hour, minutes = (hour - 2) % 12 + 1, 60 - minutes
    return f"{hour}:{minutes:02d}"
