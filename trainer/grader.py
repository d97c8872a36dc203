"""Decides whether an output gives the gold answer, with math-verify doing the mathematics and pint the units.

In: a `Gold` and what a model wrote. Out: a `Grade`: the answer that was found in it, and the verdict. An answer is read
whole: what is left over of it and not understood makes it wrong, and so does what takes longer than the time limit.
Runs in a main thread only: that limit is a signal.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from trainer.answers import BRACKETS, CLOCK, LETTERS, NUMBER, Gold, Kind, last_box, unit_behind
from trainer.units import ratio, unit_of

SECONDS = 3
"""For one comparison by math-verify, and as much for reading each side."""
TOTAL_SECONDS = 10
"""For all of an answer: no comparison begins later."""
LAST_CHARACTERS = 20_000
"""Of an output, in which its answer is looked for."""
ANSWER_CHARACTERS = 2_000
"""Of an answer; a longer one is none."""
EXTRACTED_CHARACTERS = 200
"""Of an answer that is found, as results keep it."""
ROUNDING = 1e-12
"""Of floating point, in parts of a number."""
ABOUT = 0.01
"""How far the sides of an ≈ may be apart, in parts of a number."""
WHOLE = [LatexExtractionConfig(boxed_match_priority=0)]
"""math-verify's other readings take a number out of what they do not understand."""

TEXT = r"\\(?:text|mathrm|textrm|textbf|mathbf|textit|operatorname|mbox|rm)\b"
TIDY = (
    (r"[\u2212\u2012\u2013]", "-"),
    (r"\*\*|\\[()\[\]]|(?<!\\)\$", " "),
    (rf"{TEXT}\s*\{{\s*(\\?\$)\s*\}}", r"\\$"),
    (rf"{TEXT}\s*\{{\s*([-+]?(?:\\?\$)?[\d.,]+)\s*\}}", r"\1"),
    (r"\\!", ""),
    (r"(?<=\d)(?:\\[,; ]|~|\{,\}| )+(?=\d{3}(?!\d))", ","),  # thousands
    (r"(?<![\d.^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 2 1/2
    (r"(?<![\d.])(\d+)\.(?=\s|[^\d\w]|$)", r"\1"),  # 18. and 1./3
    (r"(?<![A-Za-z\\\d.])(-?\d+(?:\.\d+)?)\s*[eE]\s*([-+]?\d+)(?![\d.A-Za-z])", r"\1 \\times 10^{\2}"),
    (r"\bnp\.(?=[a-z])", r"\\"),
    (r"\\varnothing\b", r"\\emptyset"),
)
"""What is written in several ways, in one; 3.3e12 would hold Euler's number."""
NAMED = re.compile(
    rf"^\s*(?:\\?[A-Za-z]+|{TEXT}\s*\{{[^{{}}]*\}})\s*(?:_\s*(?:\{{[^{{}}]*\}}|\w))?\s*(?:\([^()=]*\))?\s*"
    r"(?:=|\\approx\b|≈|\\sim\b)"
)
"""x = or f(n) = before a value."""
NAMED_BRACKETS = re.compile(r"\(?\b[A-Za-z](?:\s*,\s*[A-Za-z])*\)?\s*(?:=|\\in\b)\s*(?=[(\[\\])")
"""x ∈ or (a, b) = before brackets."""
TOKEN = re.compile(rf"{TEXT}|\\?%|\\?¢|°|\^\s*\{{?\s*\\(?:circ|degree)\b|\\[A-Za-z]+|[{{}}]|[A-Za-z]+")
UNIT_COMMANDS = (r"\mu", r"\Omega", r"\AA", r"\degree")
SAID = [
    re.compile(rf"\b(?:{word})\b[^.\n]{{0,80}}?(?:\bis\b|\bwas\b|:|=)[ \t:*]*", re.IGNORECASE)
    for word in ("answer", "option|choice")
]
DENIED = re.compile(r"\b(?:not|never|between|or|nor)\b|n't|\bthan\W{1,3}\d", re.IGNORECASE)
SENTENCE = re.compile(r"\.(?=\s|$)")
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
MULTIPLIER = re.compile(rf"(?:\s|~|\\[,;! ]|{TEXT}|\{{)*({'|'.join(MULTIPLIERS)})s?\b", re.IGNORECASE)
SECOND_NUMBER = re.compile(r"(?<=[\s~,{])\d[\d,]*(?:\.\d+)?(?!\s*\}?\s*\\times)")
BASE = re.compile(r"(?<=\d)_\s*\{?\s*(\d+)\s*\}?\s*$")
TUPLE = re.compile(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
BETWEEN_TUPLES = re.compile(rf"(?:[\s,;.]|\\[{{}},; ]|{TEXT}|[{{}}]|\band\b)*")
UNION = re.compile(rf"\\cup\b|\\bigcup\b|∪|{TEXT}\s*\{{\s*or\s*\}}|\bor\b")
RELATION = re.compile(r"[<>]|\\[lg](?:e|eq|t|eqslant)?\b|[≤≥]")
SOFT_EDGES = re.compile(r"^(?:the|a|an)\s+|^[\s\"'*]+|[\s.,;:!?'\"*]+$", re.IGNORECASE)
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
    answer = Answer(*box, boxed=True) if box else Answer(_said(output), "", boxed=False)
    judge = {
        Kind.CHOICE: _choice,
        Kind.WORDS: _words,
        Kind.CLOCK: _clock,
        Kind.TUPLE: _tuples,
        Kind.INTERVAL: _interval,
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


class Mathematics:
    """math-verify and sympy, each call within a time limit, and all of them within one. Raise TimeoutException."""

    def __init__(self) -> None:
        self._until = time.monotonic() + TOTAL_SECONDS

    def value(self, text: str) -> Any:
        """What a whole LaTeX text is, as sympy has it; None where it is nothing that can be read."""
        self._check()
        found = parse(
            rf"\boxed{{{text}}}", extraction_config=WHOLE, fallback_mode="no_fallback", parsing_timeout=SECONDS
        )
        return found[0] if found else None

    def number(self, text: str) -> Any:
        """The real number that a text is: exact where it is rational, else a float; None where it is none."""
        return self._number(self.value(text)) if text.strip() else None

    def same(self, one: str, other: str) -> bool:
        """Whether two texts are the same, or the same in mathematics."""
        if _squeezed(one) == _squeezed(other):
            return True
        mine, theirs = self.value(one), self.value(other)
        if mine is None or theirs is None:
            return False
        numbers = self._number(mine), self._number(theirs)
        if None not in numbers:
            return close(*numbers, ROUNDING)
        if isinstance(mine, sympy.Eq) and isinstance(theirs, sympy.Eq):
            return self._same_equation(mine, theirs)
        self._check()
        return verify([mine], [theirs], timeout_seconds=SECONDS)

    def points(self, text: str) -> Any:
        """The set of real numbers that a text describes, as brackets or as relations; None where it is none."""
        return self._limited(lambda: _points(self.value(text)))

    def _number(self, value: Any) -> Any:
        def computed() -> Any:
            exact = value.doit()
            if not (exact.is_number and exact.is_real):
                return None
            return exact if exact.is_Rational and not exact.is_Float else float(exact)

        return self._limited(computed)

    def _same_equation(self, one: sympy.Eq, other: sympy.Eq) -> bool:
        def computed() -> bool:
            mine, theirs = (_frozen(side.lhs) - _frozen(side.rhs) for side in (one, other))
            share = sympy.simplify(mine / theirs)
            return bool(share.is_number and share.is_finite and share != 0)

        return bool(self._limited(computed))

    def _limited(self, work: Any) -> Any:
        self._check()
        try:
            return timeout(SECONDS)(work)()
        except (AttributeError, TypeError, ValueError, ArithmeticError, NotImplementedError, RecursionError):
            return None

    def _check(self) -> None:
        if time.monotonic() > self._until:
            raise TimeoutException("an answer that takes too long")


def _frozen(value: Any) -> Any:
    """Derivatives as symbols, for sympy takes the functions in them for constants."""
    return value.subs({found: sympy.Symbol(str(found)) for found in value.atoms(sympy.Derivative)})


def close(one: Any, other: Any, part: float) -> bool:
    """Whether numbers are the same: rational ones exactly, others within `part` of either."""
    exact = isinstance(one, sympy.Rational) and isinstance(other, sympy.Rational)
    return bool(one == other) if exact else math.isclose(float(one), float(other), rel_tol=part)


def _value(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    text, expected = (_without_name(_tidy(text)) for text in (answer.text, gold.text))
    value, tail = _cut(expected)
    wanted = maths.number(BASE.sub("", value)) if not tail or tail.startswith(("%", r"\%")) else None
    if wanted is None:
        same = maths.same(expected, _without_unit(text) if gold.unit else text)
        return same or maths.same(_tidy(gold.text), _tidy(answer.text))
    for given in (text,) if answer.boxed else (text, _from_number(text)):
        if _is_number(wanted, value, gold, given, answer.behind, maths):
            return True
    return False


def _is_number(wanted: Any, value: str, gold: Gold, text: str, behind: str, maths: Mathematics) -> bool:
    """Whether a text is the number that is wanted, in its unit or in one that can be turned into it."""
    said, tail = _cut(text)
    bases = [BASE.search(one) for one in (value, said)]
    if bases[1] and (bases[0] is None or bases[0][1] != bases[1][1]):
        return False
    numbers = _sides(BASE.sub("", said), maths)
    if not numbers:
        return False
    if tail and (second := SECOND_NUMBER.search(tail)):
        total = _added_up(numbers[-1], tail, second.start(), gold.unit, maths)
        return total is not None and _within(total, wanted, gold)
    if tail.lstrip("\\").startswith("%") and gold.unit != "%" and 0 < abs(float(wanted)) <= 1:
        numbers += [number / 100 for number in numbers]
    factor = _factor(gold, tail or unit_behind(behind))
    return any(factor is not None and _within(number * factor, wanted, gold) for number in numbers)


def _sides(text: str, maths: Mathematics) -> list[Any]:
    """The number that a text is: of a = b the last, if all are the same, and of a ≈ b each; none of anything else."""
    nearly = re.split(r"\\approx\b|≈", text)
    found = []
    for side in nearly if nearly[0].strip() else nearly[1:]:
        numbers = [maths.number(part) for part in side.split("=")]
        if None in numbers or not all(close(number, numbers[-1], ROUNDING) for number in numbers):
            return []
        found.append(numbers[-1])
    return found if all(close(number, found[-1], ABOUT) for number in found) else []


def _within(number: Any, wanted: Any, gold: Gold) -> bool:
    if room := max(gold.absolute, gold.relative * abs(float(wanted))):
        return abs(float(number) - float(wanted)) <= room + ROUNDING * abs(float(wanted))
    return close(number, wanted, ROUNDING)


def _factor(gold: Gold, tail: str) -> Any:
    """What an answer is to be multiplied with to be in the gold's unit; None where it measures another thing.

    1 where either names no measure: then it is in the unit that the question asks for.
    """
    times, tail = _multiplier(tail)
    expected, unit = _multiplier(gold.unit)
    times = sympy.Rational(times, expected)
    mine, theirs = unit_of(unit), unit_of(tail)
    if theirs is not None and mine is None and unit.strip() and unit.strip(" \\%.") != "":
        return None  # hours are no apples
    if mine is None or theirs is None or mine == theirs:
        return times
    factor = ratio(theirs, mine)
    return None if factor is None else times * factor


def _added_up(first: Any, tail: str, at: int, unit: str, maths: Mathematics) -> Any:
    """3 hours 30 minutes in the gold's unit; None where that is not what stands there."""
    total, expected = 0.0, unit_of(unit)
    rest = f"{first} {tail}"
    number, behind = first, tail[:at]
    while expected is not None:
        measure = unit_of(behind)
        factor = None if measure is None else ratio(measure, expected)
        if factor is None:
            return None
        total += float(number) * factor
        if at >= len(tail):
            return total
        rest = tail[at:]
        digits = NUMBER.match(rest)
        if digits is None:
            return None
        number = float(digits[0].replace(",", ""))
        second = SECOND_NUMBER.search(rest, digits.end())
        behind = rest[digits.end() : second.start() if second else len(rest)]
        tail, at = rest, second.start() if second else len(rest)
    return None


def _multiplier(tail: str) -> tuple[int, str]:
    """18 thousand: the number that a tail begins with, and what is left."""
    times = 1
    while word := MULTIPLIER.match(tail):
        times, tail = times * MULTIPLIERS[word[1].lower()], tail[word.end() :]
    return times, tail


def _tuples(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Tuples by their parts, in order; several of them in any order. Without its brackets one tuple is a list."""
    if RELATION.search(answer.text):
        return _interval(gold, answer, maths)
    wanted, given = _lists(gold.text), _lists(answer.text)
    if wanted is None:
        return _squeezed(gold.text) == _squeezed(answer.text)
    if given is None:
        return False
    if not given and len(wanted) == 1:
        given = [_parts(BRACKETS.sub("", _tidy(answer.text)))]
    for one in wanted:
        match = next((other for other in given if _same_parts(one, other, maths)), None)
        if match is None:
            return False
        given.remove(match)
    return not given


def _interval(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Intervals, unions of some, or relations that say the same: what is open or closed is so in both."""
    wanted, given = (
        NAMED_BRACKETS.sub("", BRACKETS.sub("", _tidy(text))).strip().rstrip(".") for text in (gold.text, answer.text)
    )
    if _squeezed(wanted) == _squeezed(given):
        return True
    sets = []
    for text in (wanted, given):
        parts = [part.strip() for part in UNION.split(text)]
        points = [maths.points(part) if _is_set(part) else None for part in parts]
        if any(one is None for one in points):
            return False
        sets.append(sympy.Union(*points))
    return bool(sets[0] == sets[1]) or maths.same(wanted, given)


def _is_set(text: str) -> bool:
    return bool(re.fullmatch(r"[(\[].*[)\]]|\\\{.*\\\}|\\emptyset|\\mathbb\{?R\}?", text) or RELATION.search(text))


def _points(value: Any) -> Any:
    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, tuple | sympy.Tuple) and len(value) == 2:  # an open interval is written as a pair is
        return sympy.Interval.open(*value)
    return value.as_set()


def _choice(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """A letter, alone or before its own choice; or a choice itself, word for word."""
    del maths
    plain = re.sub(r"^(?:option|choice)\s+", "", _plain_text(answer.text).strip(), flags=re.IGNORECASE)
    letters = LETTERS[: len(gold.choices)]
    spelled = [_letters_of(choice) for choice in gold.choices]
    if named := re.fullmatch(rf"\(?([{letters}])\b[).:,]*(.*)", plain, re.DOTALL) or re.fullmatch(
        r"\(?([a-z])\)?\.?()", plain
    ):
        letter, rest = named[1].upper(), _letters_of(BECAUSE.split(named[2])[0])
        if not rest or (letter in letters and rest == spelled[letters.index(letter)]):
            return letter == gold.text
    same = [letter for letter, choice in zip(letters, spelled, strict=True) if choice == _letters_of(plain)]
    return same == [gold.text]


def _words(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """Word for word; a yes or a no may be explained."""
    del maths
    wanted, said = (_words_of(ORDINAL.sub(r"\1", _plain_text(text))) for text in (gold.text, answer.text))
    if wanted in ("yes", "no"):
        return re.findall(r"\b(?:yes|no|not)\b", said)[:2] == [wanted] and bool(re.match(r"(?:yes|no)\b", said))
    return said == wanted


def _clock(gold: Gold, answer: Answer, maths: Mathematics) -> bool:
    """A time of day; 'a.m.' and 'p.m.' may be left out, but not be wrong; 15:30 is 3:30 p.m."""
    del maths
    found = _plain_text(answer.text).replace("{:}", ":").strip()
    said, wanted = CLOCK.fullmatch(found) or CLOCK.fullmatch(found.rstrip(".")), CLOCK.fullmatch(gold.text)
    if not answer.boxed and len(times := list(CLOCK.finditer(found))) == 1:
        said = times[0]
    if said is None or wanted is None:
        return False
    hour, minutes, half = _time(said)
    expected_hour, expected_minutes, expected_half = _time(wanted)
    halves = {one for one in (half, expected_half) if one}
    late = int(said[1].split(":")[0]) > 12
    return (hour, minutes) == (expected_hour, expected_minutes) and len(halves) < 2 and not (late and not expected_half)


def _time(clock: re.Match[str]) -> tuple[int, str, str]:
    hour, minutes = clock[1].split(":")
    half = (clock[2] or "").lower()
    return (int(hour) - 12, minutes, "p") if int(hour) > 12 else (int(hour), minutes, half)


def _said(output: str) -> str:
    """Without a box: what follows the last 'answer is', or else the last line."""
    said = list(SAID[0].finditer(output)) or list(SAID[1].finditer(output))
    if said and (
        found := SENTENCE.split(output[said[-1].end() :].split("\n", 1)[0][:ANSWER_CHARACTERS], maxsplit=1)[0].strip()
    ):
        return found
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-ANSWER_CHARACTERS:] if lines else ""


def _tidy(text: str) -> str:
    for pattern, plain in TIDY:
        text = re.sub(pattern, plain, text)
    return text.strip().rstrip(".").strip()


def _without_name(text: str) -> str:
    return re.sub(r"^\s*(?:\\approx\b|≈|\\sim\b)", "", NAMED.sub("", text, count=1)).strip()


def _from_number(text: str) -> str:
    """A sentence from its last number on, where it says that this is it."""
    numbers = [match.start() for match in NUMBER.finditer(text)]
    return text[numbers[-1] :] if numbers and not DENIED.search(text) else ""


def _cut(text: str) -> tuple[str, str]:
    """A number's text, and the unit, words or percent sign behind it."""
    text = re.sub(r"^\s*\\\$\s*", "", text) + (r" \$" if re.match(r"\s*\\\$", text) else "")
    depth = 0
    for token in TOKEN.finditer(text):
        sign, begin = token[0], token.start()
        if sign in "{}":
            depth += 1 if sign == "{" else -1
        elif depth == 0 and (
            not re.match(r"\\[A-Za-z]", sign)
            or re.match(TEXT, sign)
            or sign in UNIT_COMMANDS
        ):  # fmt: skip
            if re.fullmatch(r"[A-Za-z]", sign) and unit_of(text[begin:]) is None:
                continue
            return text[:begin].rstrip(" ~\\,;"), text[begin:]
    dollar = text.find(r"\$")
    return (text[:dollar].strip(), text[dollar:]) if dollar > 0 else (text, "")


def _without_unit(text: str) -> str:
    return re.sub(rf"(?:{TEXT}\s*\{{[^{{}}]*\}}\s*(?:\^\s*\{{?-?\d\}}?)?|\\[,; ]|[~\s/])+$", "", text)


def _squeezed(text: str) -> str:
    return re.sub(r"\\[,;! ]|[\s$]", "", text).rstrip(".")


def _plain_text(latex: str) -> str:
    plain = re.sub(r"\*\*|\\[()\[\]!]|(?<!\\)\$", "", re.sub(r"\\[,; ]|~", " ", latex))
    return re.sub(rf"{TEXT}\s*\{{([^{{}}]*)\}}", r" \1", plain)


def _words_of(text: str) -> str:
    """Small letters, single spaces, no article before, no full stop behind."""
    plain = " ".join(text.split())
    for _ in range(2):
        plain = SOFT_EDGES.sub("", SOFT_EDGES.sub("", plain))
    return plain.casefold().replace(r"\%", "%")


def _letters_of(choice: str) -> str:
    """A choice without what may be written otherwise: spaces, brackets around it, a full stop."""
    plain = _words_of(_plain_text(choice)).replace(" ", "")
    return plain[1:-1] if plain.startswith("(") and plain.endswith(")") else plain


def _lists(text: str) -> list[list[str]] | None:
    """The bracketed lists of a text, each as its parts; None where other things stand between them."""
    plain = NAMED_BRACKETS.sub("", BRACKETS.sub("", _tidy(text)))
    found = [_parts(match) for match in TUPLE.findall(plain) if len(_parts(match)) > 1]
    if found and not BETWEEN_TUPLES.fullmatch(TUPLE.sub(",", plain)):
        return None
    return found


def _parts(text: str) -> list[str]:
    """Cut at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _same_parts(one: Sequence[str], other: Sequence[str], maths: Mathematics) -> bool:
    return len(one) == len(other) and all(maths.same(*pair) for pair in zip(one, other, strict=True))
