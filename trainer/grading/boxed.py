"""What an output has in its boxes: the last one with its neighbours, its sign, and whether it is a part of a formula.

In: an output, and where its boxes stand. Out: an `Answer`. Knows no mathematics and judges nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.grading.normalize import TEXT, squeezed

NEXT_STEP = re.compile(
    r"[.!?]\s|\b(?:no|not|wait|actually|corrected|instead|rather|but|so|thus|hence|therefore|then|gives?|answer|which)\b",
    re.IGNORECASE,
)
"""Between two boxes: the second one follows from the first, or corrects it."""
SEPARATOR = re.compile(r"[,;&]|\b(?:and|or)\b", re.IGNORECASE)
MARKUP = re.compile(rf"\\[()\[\],;! ]|\\q?quad\b|[$~*\s]|{TEXT}|[{{}}]|\\(?:begin|end)\{{\w+\*?\}}")
BESIDE = 80
"""Characters beside a box, in which the rest of its formula is looked for."""
OPENED = re.compile(r"(?<!\\)\\[(\[]|\\begin\{[a-z]+\*?\}")
CLOSED = re.compile(r"(?<!\\)\\[)\]]|\\end\{")
FORMULA_BEGIN = re.compile(r"(?:(?<!\\)\$|\\[(\[])+(\s*)$")
WANTS_MORE = re.compile(r"[-+*/=]\s*$")
FORMULA_END = re.compile(r"(?<!\\)\$|\\[)\]]|\\\\|\n")
SPACES = r"(?:\\[,;:! ]|\\q?quad\b|\\(?:displaystyle|left|bigl?|Bigl?)\b|[~\s])*"
OPERATOR_BEFORE = r"(?:[-+/^]|(?<!\*)\*(?!\*)|\\(?:cdot|times|div|pm|mp)\b)"
SIGN_BEFORE = re.compile(
    rf"(?:^|[=:<>≈({{\[,;&]|\\(?:Rightarrow|rightarrow|implies|to|iff|therefore|approx|[lgn]eq?)\b){SPACES}"
    rf"(-|\\pm\b){SPACES}(?:\\\$)?$"
)
"""In a formula, right before its box."""
LEADS_UP = re.compile(
    rf"(?:\\[dtc]?frac(?:\s*\{{[^{{}}]*\}})?|\\sqrt(?:\[[^\]]*\])?|\\[dt]?binom|[\^_])\s*\{{{SPACES}$"
    rf"|\\(?:sqrt|log|ln|sin|cos|tan|cot|sec|csc|exp)(?:[_^]\{{?\w+\}}?)?{SPACES}\(?$"
    rf"|[\w)\]}}!%'|]{SPACES}{OPERATOR_BEFORE}{SPACES}(?:\\?\$)?{SPACES}[(\[]?{SPACES}$"
    r"|(?:\d|\\(?:pi|theta)|(?<!^\(\w)(?<!^\(\w\w)\)|(?<![A-Za-z\\])[A-Za-z])$"
    r"|(?:[\^_]|frac\s*\{[^{}]*\}|sqrt)\s*\{[^{}]*\}$"
)
"""The same: the box holds a part of the formula."""
LEADS_UP_IN_WORDS = re.compile(rf"\d(?:\\?%)?(?:(?P<space>\s*){OPERATOR_BEFORE}(?P=space)|\s+-)(?:\\?\$)?$")
MINUS = re.compile(r"(?:^|[\s=:(]|\*\*)-(?:\\\$)?$")
TOUCHES = re.compile(r"(?:\d|(?<![A-Za-z\\])[A-Za-z])$")
NUMBERED = re.compile(
    r"(?:\b(?:step|part|question|problem|case|example|option|answer|number|no)\b[\s.#]*[\d.]+"
    r"|^[\s#>*(]*(?:[-+]\s+)?[\s*]*(?:[A-Za-z]+[\s.#]*[\d.]+[.:)*]*|\d[.:)*]*\s))\s*-\s*$",
    re.IGNORECASE,
)
HEADED = re.compile(r"\b(?:answer|result|solution|conclusion)\b[\s*_}]*-\s*$", re.IGNORECASE)
"""A dash behind a heading."""
COMES_NEXT = re.compile(
    r"(?:^|=|\b(?:is|are|was|be|equals?|to|gets?|got|gives?|have|has|obtains?|finds?|makes?|yields?)\b)\W*$",
    re.IGNORECASE,
)
"""Before a line that begins with a minus: it is no bullet."""
GOES_ON = re.compile(
    r"[^\S\n]*(?:(?:[-+/]|\*(?!\*)|\\(?:cdot|times|div)\b)\s*\\?\$?\d|\^\s*\{?\s*(?!(?:o|th|st|nd|rd)(?![A-Za-z\d]))[-\dA-Za-z]"
    r"|\\(?:sqrt|pi|[dt]?frac)(?![A-Za-z]))"
)
"""Right behind a box: the same."""
GOES_ON_IN_FORMULA = re.compile(
    rf"{SPACES}(?:[-+/*]|\\(?:cdot|times|div|pm)\b){SPACES}(?:[A-Za-z(]|\\(?!text|mathrm|quad|\w*box)[A-Za-z])"
    r"|[abefijnp-rt-z](?![A-Za-z])|\([^()]*[-+][^()]*\)"
)
ENGLISH = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}(?![A-Za-z}])")
"""In what two dollar signs enclose: they are money."""
PROSE = re.compile(rf"{ENGLISH.pattern}|(?<![\\A-Za-z{{])(?:so|is|to|of|at|he|we|it|by|or|on|if)(?![A-Za-z}}])")
WORDLESS = re.compile(r"\\\w+\s*\{[^{}]*\}|\\\w+")


@dataclass(frozen=True)
class Answer:
    """What an output gives as its answer, and what follows the box that it stood in."""

    text: str
    behind: str = ""
    part: bool = False  # what stands beside its box makes a formula of which it is a part
    marked: bool = True  # by a box or another mark: then it is all there is


def last_boxes(output: str, found: list[tuple[int, int, int]]) -> Answer:
    """The last box; with those before it that are its neighbours, or stand in one list with it."""
    start, begin, end = found[-1]
    behind, held = output[end + 1 :], [output[begin:end].strip()]
    for before in reversed(found[:-1]):
        between = output[before[2] + 1 : start]
        if before[2] >= start:
            continue  # it holds the other
        plain = MARKUP.sub(" ", between).strip()
        if plain and (len(plain) > 70 or not SEPARATOR.search(plain) or NEXT_STEP.search(plain)):
            break
        text = output[before[1] : before[2]].strip()
        if squeezed(text) not in map(squeezed, held):
            held.insert(0, text)
        start = before[0]
    sign, part = _beside(output[:start], held[0], behind)
    return Answer(sign + ", ".join(held), behind, part)


def _beside(before: str, held: str, behind: str) -> tuple[str, bool]:
    """The sign right before a box, and whether what stands beside it makes a formula of which it is a part."""
    before = before.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    begin = _formula_begin(before, behind)
    formula = re.split(r"\\\\|&|\n", before[begin:])[-1] if begin >= 0 else ""
    inside = begin >= 0 and not _prose(formula)
    rest = FORMULA_END.split(behind[:BESIDE], maxsplit=1)[0] if inside else behind
    goes_on = bool(GOES_ON.match(rest) or (inside and not _prose(rest) and GOES_ON_IN_FORMULA.match(rest)))
    again = rf"(?<![\d.,]){re.escape(held)}"
    if inside and formula.strip():
        if sign := SIGN_BEFORE.search(formula := formula[-BESIDE:]):
            return sign[1], goes_on
        alone = HEADED.search(formula) or re.search(rf"{again}$", formula)
        return "", bool(LEADS_UP.search(formula) and not alone) or goes_on
    if inside and (before[begin:].strip() or "\n" in before[begin:]):
        return "", goes_on
    bare = before[:-BESIDE] + FORMULA_BEGIN.sub(r"\1", before[-BESIDE:])
    above, _, line = bare.rpartition("\n")
    line = line if len(line) <= BESIDE else f"…{line[-BESIDE:]}"
    if NUMBERED.search(line) or HEADED.search(line) or re.search(rf"{again}(?:\s+-\s*)?$", line):
        return "", goes_on
    if LEADS_UP_IN_WORDS.search(line) or (bare == before and TOUCHES.search(line)):
        return "", True
    bullet = re.fullmatch(r"\s*-(?:\\\$)?", line) and not COMES_NEXT.search(above[-BESIDE:])
    return "-" if MINUS.search(line) and not bullet else "", goes_on


def _formula_begin(before: str, behind: str) -> int:
    """Where the formula begins in which a box stands, or -1. A single dollar is closed on its line, or is money."""
    begin = before.rfind("\n\n") + 1
    opened = list(OPENED.finditer(before, begin))
    if opened and not CLOSED.search(before, opened[-1].end()):
        return opened[-1].end()
    displays = list(re.finditer(r"(?<!\\)\$\$", before[begin:]))
    if len(displays) % 2 and "$$" in behind:
        return begin + displays[-1].end()
    line, begin = before[before.rfind("\n") + 1 :], -1
    for dollar in re.finditer(r"(?<!\\)\$", line):
        closes = begin >= 0 and not WANTS_MORE.search(held := line[begin : dollar.start()]) and not _prose(held)
        money = line[: dollar.start()][-1:].isdigit() and line[dollar.end() :].strip()
        begin = -1 if closes or money else dollar.end()
    closed = re.match(r"[^\n]*?(?<!\\)\$", behind)
    return len(before) - len(line) + begin if begin >= 0 and closed else -1


def _prose(text: str) -> bool:
    return bool(PROSE.search(WORDLESS.sub(" ", text)))
