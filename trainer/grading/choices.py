"""Which choice an output names: the last letter that it gives as its answer, or the text of a choice, word for word.

In: the choices and an output. Out: a letter, and the text that names it. This module knows no gold answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.grading.gold import LETTERS, boxes
from trainer.grading.normalize import FOREIGN_NOT, TEXT, letters_of, plain_text, words_of
from trainer.grading.said import answers

LETTER_CHARACTERS = 4_000
"""How many characters at the end of an output are searched for the letter."""
LETTER = r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|(?<![A-Za-z\\])([A-Za-z])(?![A-Za-z'’]|-\w|\s*[=+^<>/]))"
OPTION = r"(?:the\s+)?(?:correct\s+|right\s+)?(?:option|choice|letter|statement|answer)?s?\s*:?\s*"
RIGHT = (
    r"(?:is|are|was|must\s+be|would\s+be|seems)\s+(?:therefore\s+|thus\s+|clearly\s+|indeed\s+|definitely\s+)?"
    r"(?:the\s+)?(?:only\s+|most\s+|best\s+)?(?:correct|right|true|accurate|answer)\b"
)
ANSWER_WORD = (
    r"\b(?:answers?|respuesta|réponse|antwort|risposta|resposta|ответ|resultado|résultat|ergebnis|risultato|"
    r"результат)\b"
)
YET = rf"(?:(?!\bnot\b|n't|\bno\s+es\b|{FOREIGN_NOT})[^.\n])"
SAID = (
    rf"{ANSWER_WORD}{YET}{{0,60}}?(?:\b(?:is|be|est?|ist|é|è)\b|[:=])\s*{OPTION}{LETTER}",
    rf"{ANSWER_WORD}{YET}{{0,60}}?\bis\b{YET}{{0,200}}?(?=\([A-Z]\)\s*(?:\.|\n|$)){LETTER}",
    r"\b(?:choose|chose|select|pick|go\s+with|(?:option|choice|one|it|this|that)(?:'s|\s+is|\s+should\s+be)"
    rf"|(?:is|matches|corresponds\s+to)(?=\s+(?:option|choice|answer|letter)\b))\s+{OPTION}{LETTER}",
    rf"{LETTER}\s+it\s+is\b",
    rf"(?:答案|选项|故选|选择?)\s*[是为选选：:]*\s*{LETTER}",
)
LISTED = rf"(?m:^)\W*?{LETTER}\s*[).:-]*\s*(?:correct|right|true|yes)\W*?(?m:$)"
"""A line for each choice, of which one is marked as correct."""
SAID_RIGHT = (
    LISTED,
    rf"{LETTER}(?:(?!\bnot\b|n't|(?<![A-Za-z])[A-Z](?![A-Za-z]))[^.;\n]){{0,80}}?\b{RIGHT}",
    rf"\b(?:option|choice)\s+{LETTER}\s*[:.-]\s*(?:correct|right|true|yes)\b",
)
CONCLUDED = (
    r"\b(?:(?:so|thus|hence|therefore|consequently|finally|then)\b[\s,:]*(?:(?:we|it|this|that|I)\s+(?:\w+\s+){1,2})?"
    rf"|(?:gets?|got|gives?|obtain|finds?|found|yields?|leaves?|leaving|have)\s+){OPTION}{LETTER}[.)\s]*$"
)
MEANT = [re.compile(pattern, re.IGNORECASE) for pattern in (*SAID, *SAID_RIGHT, CONCLUDED)]
SUPPOSED = re.compile(
    r"\b(?:if|whether|suppos\w+|assum\w+|neither|nor|none|unless|doubt\w*|claims)\b"
    r"|(?:\b(?:not|never|cannot|no\s+one|nobody|wrong|incorrect|false|unlikely|impossible|mistake|deny|an\s+error|far\s+from|anything\s+but)\b|n't\b).*\bthat\b"
    r"|(?:\b(?:not|never|cannot|exclud\w+|reject\w*|eliminat\w+|rul\w+\s+out)\b|n't\b)\s*(?:\w+\s+){0,2}\W*$"
    r"|\b(?:could|might|may|can)\s+(?:\w+\s+)?be\s+(?:\w+\s+)?\W*$|\b(?:than|of|unlike|except|besides)\s+(?:\w+\s+)?\W*$"
    r"|(?<!\bI\s)(?<!\bwe\s)\b(?:thinks?|thought|believes?|believed|claimed|argues?|guess\w*)\b"
    r"|\b(?:s?he|they|you|many|some|most|others?|people|students?|teachers?|friends?|everyone|someone|one)\s+(?:\w+\s+)?(?:says?|said)\b"
    rf"|{ANSWER_WORD}\W+(?:(?:that|which|is|are|was|were|clearly|obviously)\W+)*"
    r"(?:wrong|incorrect\w*|false|worst|unlikely|fals[ao]|fausse|falsch\w*|errad[ao]|sbagliat[ao]|неверн\w*)\b",
    re.IGNORECASE,
)
"""In the clause before a letter. The output supposes or denies the letter, or says that others believe it."""
OTHER_ONES = re.compile(
    r"\b(?:wrong|worst|other|second[\s-]+best|runner-up|tempting|least\s+[\w-]+|rejected|eliminated|excluded|discarded|previous)\s+"
    r"(?:(?!(?:the|an?|my|our)\b)\w+\s+)?(?:answers?|options?|choices?|one|letter)\b|\b(?:incorrect|false)\s+answers?\b"
    r"|\b(?:falsche|fausse|mauvaise|sbagliata|неверный|неправильный)\s+\w+",
    re.IGNORECASE,
)
"""What an output does not call its answer. A question may ask for the incorrect option or the false statement."""
DENIED_IN_CJK = re.compile(
    "[不没未非别勿莫]|错|误|除|可能|也许|或许|(?<!我)(?<!我们)认为|以为|以外|之外|有人|[他她]们?说"
)
"""In the clause before a letter. The output denies or doubts it."""
SUPPOSED_IN_CJK = re.compile("假[如设]|如果|要是|^若")
"""In the sentence before a letter, behind its last 'therefore'. The output supposes it."""
CLAUSE_END = re.compile(r"[.;:,\n]|\b(?:so|but|thus|hence|therefore|then|because|since)\b", re.IGNORECASE)
TAKEN_BACK = re.compile(
    r"[^.\n?]*?(?:\?|\b(?:which|that|this|it|they)(?:'s|'re|\s+(?:is|are|was|were|would\s+be))\s+(?:\w+ly\s+|also\s+|all\s+)?"
    r"(?:wrong|incorrect|false|not\s+(?:correct|right|true|the\s+answer))\b)"
    r"|(?:(?!\b(?:because|since|as)\b)[^.\n?])*?\b(?:which|that|this|it)\s+(?:isn't|wasn't|can't|cannot|contradict\w*)\b"
    r"|(?:(?!\bbecause\b|\bsince\b)[^.\n])*?\bif\b[^.\n]*?\bwere\b"
    r"|[^.\n?]*\.+\s*(?:no\s*[,.:!]|(?:no\s+wait|I\s+mean|wait|hmm|hold\s+on|actually|oops|scratch\s+that|never\s*mind(?=\s*[,.:;!]))\b|(?:correction|sorry)\s*[,.:!]"
    r"|(?:(?:but|however),?\s+)?(?:that|this|it|they)(?:'s|'re|\s+(?:is|are))\s+(?:all\s+)?(?:wrong|incorrect|false|not)\b"
    r"|(?:(?:but|however),?\s+)?(?:that|this|it)\s+(?:isn't|wasn't|can't\s+be|cannot\s+be)\s+(?:right|correct|true)\b)",
    re.IGNORECASE,
)
"""Behind a letter. The output questions it or takes it back."""
LAST_LINE = re.compile(
    rf"(?:(?:so|thus|hence|therefore|(?:final\s+)?answer|option|choice)\b[\s,:]*)*{LETTER}", re.IGNORECASE
)
REASON = re.compile(r"[\s,;]+(?:because|since|as|which)\b|\s*[.;:]\s|\s*[,()。，]|[.)\]}!]*$", re.IGNORECASE)


def choice_of(choices: Sequence[str], output: str) -> tuple[str, str]:
    """The letter of the choice that an output names, and the text that names it; '' as the letter if it names none or
    several.

    A box that names a choice counts. A boxed formula of the working does not.
    """
    found = list(answers(output, 1))
    marked = next((answer for answer in found if answer.marked), None)
    letter, alone = named(choices, marked.text) if marked else ("", False)
    if marked and re.fullmatch(r"(?:[\W_]*\b[A-Z]\b)+[\W_]*(?:and|or)?[\W_]*(?:\b[A-Z]\b[\W_]*)*", marked.text):
        return letter, marked.text
    if not alone and (said := said_letter(choices, marked.behind if marked and letter else output)):
        return said, said
    if marked:
        return letter, marked.text
    named_by = [(*named(choices, answer.text), answer.text) for answer in found]  # a letter would have been said
    return next(
        ((one, text) for one, alone, text in named_by if one and not alone), ("", found[0].text if found else "")
    )


def named(choices: Sequence[str], text: str) -> tuple[str, bool]:
    """The letter of the choice that a text names, and whether the text gives it as a letter.

    A text names a choice by a letter alone, a letter before the text of its choice, or the text of a choice, word for
    word.
    """
    plain = re.sub(r"^(?:option|choice|answer)\b[\s:]*", "", plain_text(text).strip(), flags=re.IGNORECASE)
    letters = LETTERS[: len(choices)]
    spelled = [letters_of(choice) for choice in choices]
    begins = re.fullmatch(rf"\(?([{letters}])\b[).:,]*(.*)", plain, re.DOTALL)
    if (begins := begins or re.fullmatch(r"\(?([a-z])\)?[.:)]?()", plain)) and begins[1].upper() in letters:
        if "?" in begins[2] and letters_of(begins[2]) == "":
            return "", True
        letter, rest = begins[1].upper(), letters_of(begins[2])
        if not rest or rest == spelled[letters.index(letter)]:
            return letter, True
    same = [letter for letter, choice in zip(letters, spelled, strict=True) if choice == letters_of(plain)]
    return (same[0], False) if len(same) == 1 else ("", False)


def said_letter(choices: Sequence[str], output: str) -> str:
    """The last letter that a text gives as its answer; '' if it gives none. Boxes are left out."""
    for start, _, end in reversed(boxes(output)):
        output = output[:start] + " " + output[end + 1 :]
    text = re.sub(rf"{TEXT}\s*\{{([^{{}}]*)\}}", r"\1", output[-LETTER_CHARACTERS:])
    text = re.sub(r"[*_`$\"]|\\[()\[\]]", "", text).strip()
    spoken = [match for pattern in MEANT for match in pattern.finditer(text)]
    if len(listed := [match for match in spoken if match.re.pattern == LISTED]) > 1:
        spoken = [match for match in spoken if match not in listed]
    if match := LAST_LINE.match(text, text.rfind("\n") + 1):
        spoken.append(match)
    for match in sorted(spoken, key=lambda match: match.end(match.lastindex or 0), reverse=True):
        letter = match[match.lastindex or 0]
        rest = text[match.end() :].split("\n")[0]
        own = _is_choice(choices, letter, rest) or _labels(choices, match[1], rest)
        if match.re is LAST_LINE and re.match(r"[).]*[.:]?\s+\w", rest) and not own:
            continue
        if _supposed(text, match, _repeated(choices, letter, rest)):
            continue
        several = re.search(r"(?:\b(?:and|or)|[,/&])\s*[(\[]?$", text[: match.start(match.lastindex or 0)])
        if several and match.re.pattern != CONCLUDED:
            return ""  # one of several
        right = match.re.pattern in SAID_RIGHT or _ends(choices, letter, rest) or _labels(choices, match[1], rest)
        if right and letter.upper() in LETTERS[: len(choices)]:
            return letter.upper()
    return ""


def _supposed(text: str, match: re.Match[str], repeated: int) -> bool:
    """Whether the output supposes a letter, asks about it, denies it, or takes it back.

    `repeated`: how many characters behind the match repeat the letter's choice.
    """
    at = match.start(match.lastindex or 0)
    before = re.sub(r",[^,.\n]*,(?=\s*that\b)", "", text[:at])
    clause = CLAUSE_END.split(re.sub(r":\W*$", " ", before))[-1]
    in_cjk = re.search("(?:答案|选项|故选|选择?)", match[0])
    sentence = re.split(r"[。\n]", text[: match.start()])[-1]
    concluded = re.split("所以|因此|综上|故", sentence)[-1]
    if in_cjk and (DENIED_IN_CJK.search(re.split("[，,；]", sentence)[-1]) or SUPPOSED_IN_CJK.search(concluded)):
        return True
    return bool(
        OTHER_ONES.search(clause)
        or SUPPOSED.search(clause)
        or TAKEN_BACK.match(text, match.end() + repeated if repeated else match.end(match.lastindex or 0))
    )


def _repeated(choices: Sequence[str], letter: str, rest: str) -> int:
    """How many characters behind a letter repeat its own choice: ': it can't be determined'. 0 if it is not there."""
    if not _is_choice(choices, letter, rest):
        return 0
    choice = words_of(choices[LETTERS.find(letter.upper())])
    at = rest.casefold().find(choice)
    return at + len(choice) if at >= 0 else 0


def _ends(choices: Sequence[str], letter: str, rest: str) -> bool:
    """Whether the text behind a letter leaves it the answer: no text, a reason, or the text of its own choice."""
    if re.match(r"\s*(?:[,/&]|and\b|or\b)\s*\(?[A-Z]\b", rest):
        return False
    said = REASON.match(rest) and not (letter == "a" and re.match(r"\s+\(", rest))
    return bool(said) or _is_choice(choices, letter, rest)


def _labels(choices: Sequence[str], bracketed: str | None, rest: str) -> bool:
    """Whether a letter labels the whole text of a choice, even of another one: 'b. 4'. Then the letter counts."""
    label = "" if bracketed else r"\s*[).:\]]"
    marked = re.match(rf"{label}\s*(?=\S)", rest)
    return marked is not None and letters_of(rest[marked.end() :]) in map(letters_of, choices)


def _is_choice(choices: Sequence[str], letter: str, rest: str) -> bool:
    index = LETTERS.find(letter.upper())
    own = letters_of(choices[index]) if 0 <= index < len(choices) else ""
    return bool(own) and letters_of(rest.lstrip(" ).:,]-")).startswith(own)
