"""Whether a text means a certain number: in the gold's unit, in one that converts to it, or in several units together.

In: texts, and a `Gold` that is a number. Out: verdicts. A part of the text that is not understood makes it another
number.
"""

from __future__ import annotations

import re
from typing import Any

import sympy

from trainer.grading.gold import Gold, elements, unit_behind
from trainer.grading.mathematics import ROUNDING, Mathematics, close
from trainer.grading.normalize import (
    ANOTHER,
    BELOW,
    CHANGED,
    CJK,
    COUNTED_IN_CJK,
    MORE_THAN,
    MULTIPLIER,
    MULTIPLIERS,
    NUMBER_WORD,
    TEXT,
    plain_text,
)
from trainer.grading.units import ratio, unit_of

ABOUT = 0.01
"""How far the sides of an ≈ may differ, as a relative tolerance."""
NUMBER_BASE = re.compile(r"(?<=\d)_\s*\{?\s*(\d+)\s*\}?\s*$")
BASE_BEHIND = re.compile(r"_\s*\{?\s*(\d+)")
TOKEN = re.compile(
    rf"(?P<unit>{TEXT}|(?<=\d)\s*(?:''|[\"']|\^\s*\{{?\s*\\prime\b)|[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]+|\\?[%¢]|°|\^\s*\{{?\s*\\(?:circ|degree)\b"
    r"|\\(?:mu|Omega|AA|degree)(?![A-Za-z])|(?<!\\)[A-Za-z]{2,})|\\[A-Za-z]+|[{}]|(?P<letter>[A-Za-z])"
)
"""Where the unit of an answer may begin. A single letter may be algebra."""
DOZEN = re.compile(MULTIPLIER.pattern.replace("|".join(MULTIPLIERS), "dozen"), re.IGNORECASE)
"""A question may ask for dozens. Its gold answer then does not name them."""
LETTERED = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion", "bn": "billion", "m": "million"}
LETTERED_NUMBER = re.compile(rf"(?<=\d)((?:[\s~{{]|\\[,;! ]|{TEXT})*)(k|K|M|B|bn|m)(?![A-Za-z])")
"""18K."""
GLUED_LETTER = re.compile(r"(k|K|M|B|bn)(?![A-Za-z])")
"""A multiplier right behind a box. It is no unit."""
PERCENT = re.compile(rf"(?:[\s{{}}]|{TEXT})*(?:\\?%|per\s?cent\b)", re.IGNORECASE)
MONEY = re.compile(r"\\\$|[€£¥₹]|\\(?:pounds|euro)\b")
OPERATION = re.compile(r"(?<![A-Z^({,])(?<![\^{]\s)-\s*\\?\$?\d|[*/]\s*\\?\$?\d|[-+*]\s+(?![aI]\b)[A-Za-z]\b")
"""Arithmetic behind a unit."""
UNREAD = re.compile(
    r"[<>≤≥≠≈]|\\(?!(?:text\w*|math(?:rm|bf|sf|it)|operatorname|mbox|rm|q?quad|circ|degree|mu|Omega|r?a?angstrom|AA|cdot|times|"
    r"left|right|euro|pounds|cents?|checkmark|square|Box|blacksquare|displaystyle|[hv]space|per)(?![A-Za-z]))[A-Za-z]+"
)
"""Behind a number. A bound, or a command that belongs to no unit."""
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:(?:,\d\d)*,\d{3})+(?![\d,])")
"""Digits with separators of thousands, or of lakhs: 12,34,567."""
SECOND_NUMBER = re.compile(r"(?<=[\s~,{}+\u3040-\ud7a3])(?<!\^\{)(\d[\d,]*(?:\.\d+)?)(?!\s*\}?\s*\\times)")

SUBSCRIPT = re.compile(r"(?<=[A-Za-z}])_\s*(?:\d|\{\s*\d+\s*\})")
"""The subscript of a substance behind a unit: mol H_2O."""
EXPONENT = re.compile(r"\^\s*\{?\s*-?\d+|(?<=[A-Za-z])[23](?!\d)")
"""The exponent of a unit."""
LETTER_ALONE = re.compile(
    rf"(?:[\s{{}}~]|\\[,;:! ]|{TEXT})*(?!a\s+[A-Za-z])(?:[\^_!]|[A-Za-z](?![A-Za-z])|\\(?!text|mathrm)[A-Za-z])"
)
"""Algebra behind a percent sign."""
NO_NAME = re.compile(rf"^(?:[\s{{}}()~$*.,;:!]|\\[,;:! ]|\\q?quad\b|{TEXT})*")
ONE_WORD = re.compile(rf"(?:\W|{TEXT})*(?!over\b)[A-Za-z]+\W+(?:and\W+)?", re.IGNORECASE)
"""Before the number of a second measure: 'feet, six inches', but not 'feet in one week'."""
OTHER_UNIT = re.compile(
    r"[%¢¥₹°'\"^_]|\\[%¢]|\\(?:circ|degree|prime)\b|(?i:per\s?cent|half|halves|nautical|stone|o'?\s?clock|yen|yuan|pesos?|rupees?|francs?|"
    r"furlong|fathom|league|bushel|barrel|carat)\b"
    r"|(?!(?:this|his|its|hers|theirs|yours|ours|as|is|was|has|does|gets|us|less|across|always|plus|thus|perhaps|besides|"
    r"towards|upwards|onwards|afterwards|sometimes|nowadays|units?|years|others)\b)[a-z]{2,}(?<![sui])s\b"
)
"""Behind a number with a unit asked for. These are other units, or counted things."""


def is_number(wanted: Any, value: str, gold: Gold, text: str, behind: str, maths: Mathematics) -> bool:
    """Whether a text means the number `wanted`, in its unit or in one that converts to it."""
    said, tail = cut(text)
    tail = SUBSCRIPT.sub("", tail)
    bases = [NUMBER_BASE.search(one) for one in (value, said)]
    if bases[0] and not bases[1]:
        bases[1] = BASE_BEHIND.match(behind)
    if bases[1] and (bases[0] is None or bases[0][1] != bases[1][1]):
        return False
    numbers = _sides(NUMBER_BASE.sub("", said), maths)
    if below := BELOW.match(tail or behind):
        numbers, tail = [-abs(number) for number in numbers], tail[below.end() :]
    if "=" in tail and len(sides := elements(text, "=")) > 1:  # 1 hour = 60 minutes
        return all(is_number(wanted, value, gold, side, behind, maths) for side in sides)
    if not numbers or UNREAD.search(tail) or OPERATION.search(tail):
        return False
    if CHANGED.search(words := plain_text(tail)) or MORE_THAN.match(words) or ANOTHER.search(words):
        return False
    if SECOND_NUMBER.search(tail):
        total = _added_up(numbers[-1], tail, gold.unit)
        return total is not None and _within(total, wanted, gold)
    if not understood(tail, gold.unit):
        return False
    if PERCENT.match(tail) and gold.unit != "%" and 0 < abs(float(wanted)) <= 1:
        numbers += [number / 100 for number in numbers]
    named = tail or unit_behind(behind)
    asked = not gold.unit.strip() and (not tail or DOZEN.match(tail))
    factors = [_factor(gold, named, own) for own in ((True, False) if asked else (True,))]
    return any(
        factor is not None and _within(number * factor, wanted, gold) for number in numbers for factor in factors
    )


def understood(tail: str, unit: str) -> bool:
    """Whether the text behind a number leaves it a number of the things that are asked for.

    It may hold no further numbers and no algebra behind a percent sign; in another language only counted things; and if
    a unit is asked for, neither another unit nor counted things.
    """
    percent = PERCENT.match(tail)
    if re.search(r"\d", EXPONENT.sub("", tail)) or (percent and LETTER_ALONE.match(tail, percent.end())):
        return False
    words = (word for word in NUMBER_WORD.finditer(tail) if ONE_WORD.fullmatch(tail[: word.start()]))
    if any(unit_of(tail[word.end() :]) is not None for word in words):
        return False
    named = NO_NAME.sub("", tail, count=1)
    if re.match(f"[{CJK}]", named) and not COUNTED_IN_CJK.fullmatch(named.rstrip(" .。}")):
        return False
    if unit_of(unit) is None and unit.strip(" \\") != "%":
        return True
    same = percent if unit_of(unit) is None else None
    return bool(not named or same or unit_of(tail) is not None or not OTHER_UNIT.match(named))


def _sides(text: str, maths: Mathematics) -> list[Any]:
    """The numbers that a text means: of a = b the last if all sides are equal, of a ≈ b each side; [] for other
    texts."""
    nearly = re.split(r"\\approx\b|≈", THOUSANDS.sub(lambda found: found[0].replace(",", ""), text))
    found = []
    for side in nearly:
        parts = elements(side, "=")
        numbers = [maths.number(part) for part in parts]
        if len(parts) > 2 and numbers[-1] is not None:  # a derivation: m + n = 3 + 4 = 7
            numbers = [number for number in numbers if number is not None]
            if len(numbers) == 1 and re.search(
                r"[\d^+*/-]", re.sub(r"[A-Za-z]\([^=]*\)", "", parts[0])
            ):  # x^2 = y = 18
                return []
        if None in numbers or not all(close(number, numbers[-1], ROUNDING) for number in numbers):
            return []
        found.append(numbers[-1])
    return found if all(close(number, found[-1], ABOUT) for number in found) else []


def _within(number: Any, wanted: Any, gold: Gold) -> bool:
    if room := max(gold.absolute, gold.relative * abs(float(wanted))):
        return abs(float(number) - float(wanted)) <= room + ROUNDING * abs(float(wanted))
    return close(number, wanted, ROUNDING)


def _factor(gold: Gold, tail: str, multiplies: bool) -> Any:
    """The factor that converts an answer to the gold's unit; None if the answer measures something else.

    The factor is 1 if either side names no unit, because the question names it. A 'dozen' in the answer multiplies; one
    behind its box may repeat the question.
    """
    times, tail = multiplier(tail)
    expected, unit = multiplier(gold.unit)
    times = sympy.Rational(times, expected) if multiplies and times > 1 else sympy.Integer(1)
    mine, theirs = unit_of(unit), unit_of(tail)
    if theirs is not None and mine is None and unit.strip(" ."):
        return None  # hours are no apples
    if mine is None or theirs is None or mine == theirs:
        return times
    factor = ratio(theirs, mine)
    return None if factor is None else times * factor


def _added_up(first: Any, tail: str, unit: str) -> Any:
    """Several measures as one number: 3 hours 30 minutes in the gold's unit; None for any other text."""
    expected = unit_of(unit or "dollars")
    names, numbers = SECOND_NUMBER.split(tail)[::2], SECOND_NUMBER.findall(tail)
    units = [unit_of(name) for name in names]
    factors = [ratio(one, expected) if one is not None and expected is not None else None for one in units]
    if None in factors:
        return None
    parts = [float(first), *(float(number.replace(",", "")) for number in numbers)]
    return sum(part * factor for part, factor in zip(parts, factors, strict=True) if factor is not None)


def multiplier(tail: str) -> tuple[int, str]:
    """The multiplier at the start of a text, as in 'thousand apples', and the rest of the text."""
    times = 1
    while word := MULTIPLIER.match(tail):
        times, tail = times * MULTIPLIERS[word[1].lower()], tail[word.end() :]
    return times, tail


def is_bare(behind: str) -> bool:
    """Whether the text behind a box names no unit and multiplies nothing."""
    return multiplier(behind)[0] == 1 and unit_of(unit_behind(behind)) is None


def spelled_out(text: str, behind: str, expected: str) -> str:
    """18K as 18 thousand. Apart from its digits, as in 300 K, the letter is a unit. A slanted k is a variable."""
    measured = unit_of(expected) not in (None, unit_of("dollars"))
    if (glued := GLUED_LETTER.match(behind)) and not measured:
        return f"{text} {LETTERED[glued[1]]}"
    if not (letter := LETTERED_NUMBER.search(text)):
        return text
    if not MONEY.search(text):
        slanted = letter[2] not in "KM" and "\\" not in letter[1] and not expected.strip()
        unit = letter[2] == "m" or (letter[2] in "KM" and re.search(r"[\s~,;]", letter[1]))
        if measured or slanted or unit:
            return text
    return f"{text[: letter.start()]} {LETTERED[letter[2]]} {text[letter.end() :]}"


def cut(text: str) -> tuple[str, str]:
    """The number in a text, and the unit, words or percent sign behind it.

    A currency sign counts as a unit behind it.
    """
    money = MONEY.search(text)
    text = MONEY.sub(" ", text).strip()
    value, tail, depth = text, "", 0
    for token in TOKEN.finditer(text):
        at = token.start()
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        unit = token["letter"] and re.search(r"\d", text[:at]) and unit_of(text[at:]) is not None
        if depth == 0 and (token["unit"] or unit):
            value, tail = text[:at].rstrip(" ~\\,;/("), text[at:]
            break
    if not money:
        return value, tail
    at = times.end() if (times := MULTIPLIER.match(tail)) else 0
    return value, f"{tail[:at]} {money[0]} {tail[at:]}"
