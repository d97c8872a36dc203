"""How answers are written: the many spellings of one thing, and where an output says it.

In: what a model wrote, in LaTeX, Markdown or words. Out: its answer's text, plainer. Knows neither gold answers nor
mathematics.
"""

from __future__ import annotations

import re

from trainer.grading.gold import BRACKETS

ANSWER_CHARACTERS = 2_000
"""Of an answer; a longer one is none."""
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
SAID = [
    re.compile(rf"\b(?:{word})\b[^.\n]{{0,80}}?(?:\bis\b|\bwas\b|:|=)[ \t:*]*", re.IGNORECASE)
    for word in ("answer", "option|choice")
]
SENTENCE = re.compile(r"\.(?=\s|$)")
TUPLE = re.compile(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
BETWEEN_TUPLES = re.compile(rf"(?:[\s,;.]|\\[{{}},; ]|{TEXT}|[{{}}]|\band\b)*")
SOFT_EDGES = re.compile(r"^(?:the|a|an)\s+|^[\s\"'*]+|[\s.,;:!?'\"*]+$", re.IGNORECASE)


def last_said(output: str) -> str:
    """Without a box: what follows the last 'answer is', or else the last line."""
    said = list(SAID[0].finditer(output)) or list(SAID[1].finditer(output))
    if said and (
        found := SENTENCE.split(output[said[-1].end() :].split("\n", 1)[0][:ANSWER_CHARACTERS], maxsplit=1)[0].strip()
    ):
        return found
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-ANSWER_CHARACTERS:] if lines else ""


def tidy(text: str) -> str:
    for pattern, plain in TIDY:
        text = re.sub(pattern, plain, text)
    return text.strip().rstrip(".").strip()


def without_name(text: str) -> str:
    return re.sub(r"^\s*(?:\\approx\b|≈|\\sim\b)", "", NAMED.sub("", text, count=1)).strip()


def without_unit(text: str) -> str:
    return re.sub(rf"(?:{TEXT}\s*\{{[^{{}}]*\}}\s*(?:\^\s*\{{?-?\d\}}?)?|\\[,; ]|[~\s/])+$", "", text)


def squeezed(text: str) -> str:
    return re.sub(r"\\[,;! ]|[\s$]", "", text).rstrip(".")


def plain_text(latex: str) -> str:
    plain = re.sub(r"\*\*|\\[()\[\]!]|(?<!\\)\$", "", re.sub(r"\\[,; ]|~", " ", latex))
    return re.sub(rf"{TEXT}\s*\{{([^{{}}]*)\}}", r" \1", plain)


def words_of(text: str) -> str:
    """Small letters, single spaces, no article before, no full stop behind."""
    plain = " ".join(text.split())
    for _ in range(2):
        plain = SOFT_EDGES.sub("", SOFT_EDGES.sub("", plain))
    return plain.casefold().replace(r"\%", "%")


def letters_of(choice: str) -> str:
    """A choice without what may be written otherwise: spaces, brackets around it, a full stop."""
    plain = words_of(plain_text(choice)).replace(" ", "")
    return plain[1:-1] if plain.startswith("(") and plain.endswith(")") else plain


def lists(text: str) -> list[list[str]] | None:
    """The bracketed lists of a text, each as its parts; None where other things stand between them."""
    plain = NAMED_BRACKETS.sub("", BRACKETS.sub("", tidy(text)))
    found = [elements(match) for match in TUPLE.findall(plain) if len(elements(match)) > 1]
    if found and not BETWEEN_TUPLES.fullmatch(TUPLE.sub(",", plain)):
        return None
    return found


def elements(text: str) -> list[str]:
    """Cut at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]
