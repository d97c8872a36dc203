"""What an output says in its boxes: the last box, its neighbours, its sign, and what takes an answer back.

In: an output, and where its boxes stand. Out: an `Answer`. This module does no mathematics and judges nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.grading.normalize import COMPARED, NAMED, NUMBER_WORD, TEXT, squeezed

NEXT_STEP = re.compile(
    r"[.!?]\s|\b(?:no|not|wait|actually|corrected|instead|rather|but|so|thus|hence|therefore|then|gives?|answer|which)\b",
    re.IGNORECASE,
)
"""Between two boxes. The second box follows from the first or corrects it."""
SEPARATOR = re.compile(r"[,;&]|\b(?:and|or)\b", re.IGNORECASE)
MARKUP = re.compile(rf"\\[()\[\],;! ]|\\q?quad\b|[$~*\s]|{TEXT}|[{{}}]|\\(?:begin|end)\{{\w+\*?\}}")
NAME = r"(?<![A-Za-z\\}])[A-Za-z](?:_\{?\w\}?)?"
NAMED_BOX = re.compile(rf"({NAME})\s*=\s*(?:\\?\$)?\s*$")
"""A name right before a box, as in x = \\boxed{3}."""
GOES_ON_AS_A_NUMBER = re.compile(
    r"[\s$]*(?:(?:\\times|\\cdot|[×·x*])(?![A-Za-z])\s*10\s*\^\s*(?:\{[^{}]*\}|[-+]?\d+)|(?<!\s)[eE][-+]?\d+(?!\w))"
)
"""A power of ten right behind a box, as in \\boxed{3.3} \\times 10^{12}."""
OPENS = r"\s*(?:\\?\$|\\\()?\s*"
RIVAL_BEHIND = re.compile(
    rf"(?:[\s$]|\\[)\]])*(?P<joint>,(?!\d)|(?:,\s*|\\text\s*\{{\s*)?\b(?:or|and)\b\s*\}}?){OPENS}(?:(?P<name>{NAME})\s*=\s*)?"
    r"(?P<value>(?:[-+]\s*)?(?:\\\$)?(?:\.?\d|\\(?:[dt]?frac|sqrt|pi|infty)(?![A-Za-z]))(?:[^\s$;(,.]|[.,]\d)*)"
    r"(?P<unit>(?:[^\n$;(,.]|[.,]\d){0,60})(?P<rest>[^\n]{0,80})"
)
"""Behind a box. The output gives another value for the answer: \\boxed{5} or 6."""
RIVAL_BEFORE = re.compile(
    rf"(?:(?P<name>(?<!\d){NAME})\s*=\s*|(?:^|(?<!=)[\s$(]))(?P<value>[-+]?(?:\d[\d.]*|\\[dt]?frac\{{\d+\}}\{{\d+\}}))(?:[\s$]|\\[)\]])*"
    rf"(?P<joint>(?:,\s*|\\text\s*\{{\s*)?\bor\b\s*\}}?){OPENS}(?:{NAME}\s*=\s*)?$"
)
"""The same, before a box: 6 or \\boxed{5}."""
LET_GO = re.compile(
    r"\b(?:reject\w*|discard\w*|extraneous|spurious|invalid|impossible|not\s+(?:valid|possible|positive|allowed)|since|but)\b",
    re.IGNORECASE,
)
"""Behind two values. The output rejects one of them."""
CORRECTED = re.compile(
    r"\b(?:(?:correct|final|actual|right|true)\s+answer|actually,?\s+(?:it|the\s+answer|that))(?:\s+(?:is|should\s+be)|'s)\s*:?\s*"
    r"[$*\\(]*(?P<value>-?\d[\d,]*(?:\.\d+)?)(?=[$*\\).!]*\s*(?:\n|$))",
    re.IGNORECASE,
)
"""Behind a box. The output then gives another final answer."""
BESIDE = 80
"""How many characters on each side of a box are searched for the rest of its formula."""
OPENED = re.compile(r"(?<!\\)\\[(\[]|\\begin\{[a-z]+\*?\}")
CLOSED = re.compile(r"(?<!\\)\\[)\]]|\\end\{")
FORMULA_BEGIN = re.compile(r"(?:(?<!\\)\$|\\[(\[])+(\s*)$")
WANTS_MORE = re.compile(r"[-+*/=]\s*$")
FORMULA_END = re.compile(r"(?<!\\)\$|\\[)\]]|\\\\|\n")
SPACES = r"(?:\\[,;:! ]|\\q?quad\b|\\(?:displaystyle|left|bigl?|Bigl?)\b|[~\s])*"
OPERATOR_BEFORE = r"(?:[-+/^×·÷]|(?<!\*)\*(?!\*)|\\(?:cdot|times|div|pm|mp)(?![A-Za-z]))"
RELATION = r"(?:(?<![=-])[<>]=?|!=|[≤≥≠]|\\(?:[lgn]eq?q?|[lg]eqslant|[lg]t|ll|gg)(?![A-Za-z]))"
BOUNDED = re.compile(rf"{RELATION}{SPACES}-?(?:\\?\$)?{SPACES}$")
"""Right before a box, in a formula. The box holds a bound, as in x > \\boxed{18}."""
CONNECTS = (
    r"(?:[Ll]ong)?(?:[Ll]eft)?[Rr]ightarrow|[hx]\w*arrow|Rrightarrow|leadsto|longmapsto|[cl]?dots\w?|en(?:space|skip)|"
    r"(?:thin|med|thick|negthin)space|(?:normal|foot|script)size|small|tiny|centering|par|smallskip|medskip|bigskip|iff|implies|to|mapsto|therefore|because|approx|equiv|sim\w*|cong|doteq|triangleq|"
    r"colon|in|text\w*|math[a-z]+|mbox|rm|bf|it|boldsymbol|underline|color|displaystyle|large|Large|LARGE|huge|Huge|left|"
    r"right|[bB]igg?|q?quad|[hv]space|newline|hline|hfill|item|bullet|star|ast|noindent"
)
FOLLOWS = (
    rf"{CONNECTS}|operatorname|circ|degree|mu|Omega|AA|r?a?angstrom|[lgn]eq?q?|[lg]eqslant|[lg]t|[pb]?mod|end|tag|notag|"
    r"nonumber|label|qed|square|Box|blacksquare|checkmark|boxed|fbox|euro|pounds|cents?|cdot|times|div|pm|"
    r"d?dagger|\w+suit|lozenge|diamond\w*|Diamond|triangle\w*|surd|smiley"
)
"""LaTeX commands that may stand beside a box. With any other command the box is one part of a formula."""
ARGUMENT = re.compile(
    r"(?:(?<![A-Za-z\\])[A-Za-z]|\b(?:max|min|gcd|lcm|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|abs|floor|ceil)\s?)\("
    r"(?:[^()\s]|,\s)*$|\b(?:sin|cos|tan|log|ln|sqrt|mod|modulo)\s$|(?<![\d.])0\.$|=\s*\d+[.,]$"
)
"""Right before a box, in words. The box holds the argument of a function, or the last digits of a number."""
FUNCTION_OF = (
    r"(?:(?:square|cube|root|multiple|power|factor|divisor|reciprocal|inverse|logarithm|log|(?:co)?(?:sine|tangent)|(?:co)?secant|"
    r"factorial)s?\s+of|(?:third|quarter)\s+of"
    rf"|(?:thirds|quarters|fifths?|tenths?)\s+of(?=\W*(?:$|\d|{NUMBER_WORD.pattern})))"
)
"""Before a number. The sentence speaks of a function of the number, not of the number. 'By the tenth of June' does
not."""
RIGHT_BEFORE = r"(?:\s|\$|\*|\\[(\[])*$"
CHANGED_BEFORE = re.compile(
    rf"(?:\b(?:not|never|neither|nor|cannot|anything\s+but|far\s+from)|n't)(?:\s+(?:be|equal(?:\s+to)?|is|exactly|just))?{RIGHT_BEFORE}"
    rf"|\b(?:half|twice|double|triple|thrice)(?:\s+of)?{RIGHT_BEFORE}"
    rf"|\b(?:{COMPARED}\s+than|times|modulo|{FUNCTION_OF}){RIGHT_BEFORE}",
    re.IGNORECASE,
)
"""Right before a box, in words. The answer is not what the box holds. 'At least' is missing here on purpose:
solutions say it of a minimum."""
ENDS_CLAUSE = r"(?!\s+(?!because|since|as\b|so\b|and\b|but\b)[\w$\\])"
"""The clause ends here. 'Not possible to do better' and 'impossible with 17' do not deny the answer before them."""
NO_LONGER = (
    r"(?:(?:obviously|clearly|just|simply)\s+)?(?:wrong|incorrect|false|impossible|invalid|extraneous|spurious|a\s+mistake|an\s+error|"
    r"not\s+(?:correct|right|possible|true|valid)|(?:not\s+(?:the|an?)(?:\s+(?:right|correct|valid|final|possible))?|an?\s+wrong|"
    r"the\s+wrong)\s+(?:answer|solution|value|one)|ruled\s+out|rejected|discarded|excluded|"
    rf"never\s+(?:correct|right|possible|true|valid))\b{ENDS_CLAUSE}"
)
FAILS = (
    r"(?:fails?\b(?!\s+to)|(?:(?:do|does|did|will|could)\s+not|(?:do|does|did|can|wo|could)n't|cannot|can't)\s+"
    r"(?:work|match|fit|satisfy|be\s+(?:right|correct|the\s+answer))\b|never\s+(?:works|fits)\b"
    rf"|(?:isn't|wasn't)\s+(?:correct|right|possible|true|valid)\b{ENDS_CLAUSE}|(?:will\s+not|won't)\s+do\b{ENDS_CLAUSE})"
)
OF_ALL = (
    r"(?:\s+(?:at\s+all|either|here|(?:the|all|this|our)\s+(?:\w+\s+)?(?:check|test|condition|constraint|equation|requirement|problem|"
    r"question|option|choice|answer)s?))?(?=\W*$|\s*[,.:;!\N{EM DASH}]|\s+(?:because|since|as|so|and|but)\b)"
)
"""Nothing follows that limits the denial. 'It does not work with 17' does not deny the answer 18."""
THIS = (
    r"that|this|it|they|"
    r"(?:the|my|our)\s+(?:(?:final|above|given|stated|whole|entire|new)\s+)?(?:answer|result)"
    r"|this\s+(?:answer|result)"
)
NOT_RIGHT = r"(?!\W*(?:wait\W+)?(?:that|this|it)(?:'s|\s+is)\s+(?:right|correct|fine))"
"""Behind a 'no'. 'No, that is right' does not follow."""
ITSELF = r"(?:(?:which|that|this|it|but\s+(?:that|this|it))\s*)?"
TAKEN_AWAY = re.compile(
    rf"^[ \t$*_)\]}}\\]*(?:\?(?!\W*(?:yes|yeah|correct|right|indeed)\b)"
    rf"|[^\w\n]*{ITSELF}(?:'s|is|was|seems|looks|must\s+be)\s+(?:\w+ly\s+|also\s+|just\s+)?{NO_LONGER}"
    rf"|[^\w\n]*(?:which\s+)?{FAILS}|[^\w\n]*{ITSELF}{FAILS}{OF_ALL}"
    rf"|[^\w\n]*(?:no(?:pe)?\s*[,.:;!\N{{EM DASH}}]{NOT_RIGHT}"
    r"|oops\b|sorry\b|correction\b|scratch\s+that|never\s*mind)"
    rf"|\W*(?:no\W+)?(?:wait|hmm|hold\s+on|actually|oops|sorry)\b[^\n]{{0,120}}?\b(?:(?:{THIS})(?:'s|\s+(?:is|was))\s+{NO_LONGER}"
    rf"|(?:that|this|it)\s+{FAILS}{OF_ALL}"
    r"|(?:made|there\s+(?:is|was))\s+(?:a\s+(?:\w+\s+)?mistake|an\s+(?:\w+\s+)?error)(?!\?)|forgot\b"
    r"|should\s+(?:be|have\s+been)\W*\d))",
    re.IGNORECASE,
)
"""Behind a box, on its line. The output questions the answer or takes it back."""
RETRACTED = re.compile(
    rf"\b(?:{THIS})(?:(?:'s|'re|\s+(?:is|are|was|seems|looks|would\s+be))\s+(?:\w+ly\s+|just\s+)?(?:{NO_LONGER}|not\s+(?:what|it)\b)|\s+{FAILS}{OF_ALL})"
    r"|\b(?:I|we)\s+(?:have\s+|just\s+)?made\s+(?:a\s+(?:\w+\s+)?mistake|an\s+(?:\w+\s+)?error)\b"
    r"|^\W*(?:oops\b|correction\s*:|sorry\s*[,.:!]|(?:scratch\s+that|never\s*mind)\s*(?:[,.:;!]|-|$))"
    rf"|^\W*(?:oh\s+)?no(?:pe)?\s*[,.:!]{NOT_RIGHT}",
    re.IGNORECASE,
)
"""In one of the two sentences behind an answer. The output takes this answer back, and not some other thing."""
CORRECTS = re.compile(
    r"\b(?:wait|hmm|hold\s+on|actually|in\s+fact|in\s+reality|but|however|so|thus|hence|therefore|let\s+me\s+re\w+)\b",
    re.IGNORECASE,
)
ANOTHER_IS = re.compile(
    r"(?:\b(?:(?:it|that|this|answer)(?:'s|\s+(?:is|was|must\s+be|should\s+(?:be|have\s+been)))\s+(?:(?:only|just|actually)\s+)?"
    r"|(?:wait|hmm|hold\s+on|actually)[\s,.:]+(?:no[\s,.:]+)?)|^\W*let\s+me\s+re[^=]*=\s*)[$\\]*(?=\d)|\bso\s+[$\\]*(?=\d[\d,.]*\W*$)"
    r"|\b(?:s?he|they)\s+(?:actually\s+)?(?:has|have)\s+[$\\]*(?=\d[\d,.]*\W*$)",
    re.IGNORECASE,
)
"""In such a sentence, right before a number. The number replaces the answer."""
INSTEAD = re.compile(
    r"\W*(?:(?:no|nope|oh|well|wait|hmm|hold\s+on|actually|oops|sorry|correction|rather|instead|better|make\s+(?:that|it)|I\s+mean|in\s+fact|"
    r"in\s+reality|(?:let\s+me|I)\s+(?:correct|fix)\s+(?:that|this|it|myself))\b[\s,.:;\N{EM DASH}\N{EN DASH}-]+)+"
    r"[$\\]*(?P<value>-?\d[\d,]*(?:\.\d+)?(?:\\?%)?)(?=\W*(?:$|\n))",
    re.IGNORECASE,
)
"""A whole sentence that replaces the answer: 'No, 19.'"""
DOUBTS = re.compile(r"^\W*(?:(?:wait|hmm|hold\s+on)\b|let\s+me\s+re\w+\W*$)", re.IGNORECASE)
NUMBER_SAID = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
SIGN_BEFORE = re.compile(
    rf"(?:^|[=:<>≈({{\[,;&]|\\(?:Rightarrow|rightarrow|implies|to|iff|therefore|approx|[lgn]eq?)\b){SPACES}"
    rf"(-|\\pm\b){SPACES}(?:\\\$)?$"
)
"""A sign right before a box, in a formula."""
LEADS_UP = re.compile(
    rf"(?:\\[dtc]?frac(?:\s*\{{[^{{}}]*\}})?|\\sqrt(?:\[[^\]]*\])?|\\[dt]?binom|[\^_])\s*\{{{SPACES}$"
    rf"|\\(?:sqrt|log|ln|sin|cos|tan|cot|sec|csc|exp)(?:[_^]\{{?\w+\}}?)?{SPACES}\(?$"
    rf"|[\w)\]}}!%'|]{SPACES}{OPERATOR_BEFORE}{SPACES}(?:\\?\$)?{SPACES}[(\[]?{SPACES}$"
    r"|(?:\d|\d[.,]|\d\s*:|(?<!^\(\w)(?<!^\(\w\w)\)|(?<![A-Za-z\\])[A-Za-z])$"
    r"|(?:[\^_]|frac\s*\{[^{}]*\}|sqrt)\s*\{[^{}]*\}$"
)
"""Right before a box, in a formula. The box holds one part of the formula."""
LEADS_UP_IN_WORDS = re.compile(rf"\d(?:\\?%)?(?:(?P<space>\s*){OPERATOR_BEFORE}(?P=space)|\s+-)(?:\\?\$)?$")
MINUS = re.compile(r"(?:^|[\s=:(]|\*\*)-(?:\\\$)?$")
TOUCHES = re.compile(r"(?:\d|(?<![A-Za-z\\])[A-Za-z])$")
NUMBERED = re.compile(
    r"(?:\b(?:step|part|question|problem|case|example|option|answer|number|no)\b[\s.#]*[\d.]+"
    r"|^[\s#>*(]*(?:[-+]\s+)?[\s*]*(?:[A-Za-z]+[\s.#]*[\d.]+[.:)*]*|\d[.:)*]*\s))\s*-\s*$",
    re.IGNORECASE,
)
HEADED = re.compile(r"\b(?:answer|result|solution|conclusion)\b[\s*_}]*-\s*$", re.IGNORECASE)
"""A heading with a dash before a box. The dash is no minus."""
COMES_NEXT = re.compile(
    r"(?:^|=|\b(?:is|are|was|be|equals?|to|gets?|got|gives?|have|has|obtains?|finds?|makes?|yields?)\b)\W*$",
    re.IGNORECASE,
)
"""Before a line that begins with a minus. The minus is no bullet."""
GOES_ON = re.compile(
    r"[^\S\n]*(?:(?:[-+/×·÷]|\*(?!\*)|\\(?:cdot|times|div)(?![A-Za-z]))\s*\\?\$?\d"
    r"|\^\s*\{?\s*(?:(?!(?:o|th|st|nd|rd)(?![A-Za-z\d]))[-\dA-Za-z]|\\(?!circ|degree|text|mathrm|prime|rm|mbox)[A-Za-z])"
    r"|[½⅓⅔¼¾]|[ ~]\d+\s*/\s*\d|x\s*\d)|[.,:]\d"
)
"""Right behind a box. The formula goes on, so the box holds one part of it."""
GOES_ON_IN_FORMULA = re.compile(
    rf"{SPACES}(?:[-+/*]|\\(?:cdot|times|div|pm)(?![A-Za-z])){SPACES}(?:[A-Za-z(]|\\(?!text|mathrm|quad|\w*box)[A-Za-z])"
    rf"|[abefijnp-rt-z](?![A-Za-z])|\([^()]*[-+][^()]*\)|{SPACES}!(?!=)|{SPACES}{RELATION}{SPACES}[A-Za-z](?![A-Za-z])"
)
ENGLISH = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}(?![A-Za-z}])")
"""English words. Between two dollar signs they show that the signs mean money."""
PROSE = re.compile(rf"{ENGLISH.pattern}|(?<![\\A-Za-z{{])(?:so|is|to|of|at|he|we|it|by|or|on|if)(?![A-Za-z}}])")
WORDLESS = re.compile(r"\\\w+\s*\{[^{}]*\}|\\\w+")


@dataclass(frozen=True)
class Answer:
    """What an output gives as its answer, and the text around it."""

    text: str
    behind: str = ""
    part: bool = False  # its box holds one part of a formula, or the output denies it: no answer
    marked: bool = True  # by a box or another mark: then it is all there is
    rival: str = ""  # another value that the output gives for the answer: both must be right
    ahead: str = ""  # without a mark: the text before the answer in its clause


def last_boxes(output: str, found: list[tuple[int, int, int]]) -> Answer:
    """The last box, joined with the boxes before it that are its neighbours or stand in one list with it."""
    held = [found[-1]]
    for box in reversed(found[:-1]):
        if box[2] >= held[0][0]:
            continue  # it holds the other
        plain = MARKUP.sub(" ", output[box[2] + 1 : held[0][0]]).strip()
        if plain and (len(plain) > 70 or not SEPARATOR.search(plain) or NEXT_STEP.search(plain)):
            break
        held.insert(0, box)
    text, before, behind = in_one_text(output, held), output[: held[0][0]], output[found[-1][2] + 1 :]
    if more := GOES_ON_AS_A_NUMBER.match(behind):
        text, behind = text + more[0].replace("$", ""), behind[more.end() :]
    sign, part = _beside(before, output[held[0][1] : held[0][2]].strip(), behind)
    said = re.split(r"[.!?\n]\s", before[-BESIDE:])[-1]
    part = part or bool(CHANGED_BEFORE.search(said) or TAKEN_AWAY.search(behind[: 3 * BESIDE]))
    return Answer(sign + text, behind, part, rival=_rival(before, behind))


def in_one_text(output: str, found: list[tuple[int, int, int]]) -> str:
    """The contents of several boxes, without duplicates, separated by commas.

    Boxes with different names keep them: x=3, y=5.
    """
    texts = {squeezed(text): (start, text) for start, begin, end in found if (text := output[begin:end].strip())}
    names = [NAMED_BOX.search(output[:start][-BESIDE:]) for start, _ in texts.values()]
    different = len(texts) > 1 and all(names) and len({name[1] for name in names if name}) == len(texts)
    held = [text for _, text in texts.values()]
    return (
        ", ".join(f"{name[1]}={text}" for name, text in zip(names, held, strict=True) if name)
        if different
        else ", ".join(held)
    )


def taken_back(claim: str, behind: list[str]) -> bool:
    """Whether the sentences behind a claim deny it or put another number in its place."""
    said, doubted = set(NUMBER_SAID.findall(claim)), False
    for sentence in behind:
        if RETRACTED.search(sentence):
            return True
        another = said and not said & set(NUMBER_SAID.findall(sentence))
        if another and (
            INSTEAD.match(sentence) or ((doubted or CORRECTS.search(sentence)) and ANOTHER_IS.search(sentence))
        ):
            return True
        doubted = bool(DOUBTS.search(sentence))
    return False


def _rival(before: str, behind: str) -> str:
    """Another value for the same thing beside a box, as in \\boxed{7} or 3; '' if there is none."""
    begin = _formula_begin(before, behind)
    one_formula = begin >= 0 and not _prose(before[begin:])
    named = NAMED_BOX.search(before[-BESIDE:])
    own = named and named[1]
    other = RIVAL_BEFORE.search(before[-BESIDE:])
    if other and other["name"] == own and not LET_GO.search(behind[: 2 * BESIDE]):
        return other["value"]
    other = RIVAL_BEHIND.match(behind)
    if other is None or LET_GO.search(other["unit"] + other["rest"]):
        other = None
    elif other["joint"] == ",":
        other = other if one_formula and "$" not in other[0][: other.start("value")].lstrip("$") else None
    elif "and" in other["joint"] and ("=" in other["unit"] + other["value"] or re.search(r"\w", other["unit"])):
        other = None
    if other and (other["name"] == own or "or" in other["joint"]):
        return (other["value"] + re.sub(r"\\text\s*\{\s*(?:or|and)\b.*|\bradians?\b", "", other["unit"])).rstrip(" *!:")
    corrected = CORRECTED.search(behind) or INSTEAD.match(behind)
    return corrected["value"].rstrip(",") if corrected else ""


def _beside(before: str, held: str, behind: str) -> tuple[str, bool]:
    """The sign right before a box, and whether the text beside the box makes it one part of a formula."""
    before = before.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    begin = _formula_begin(before, behind)
    formula = re.split(r"\\\\|&|\n", before[begin:])[-1] if begin >= 0 else ""
    inside = begin >= 0 and not _prose(formula)
    rest = FORMULA_END.split(behind[:BESIDE], maxsplit=1)[0] if inside else behind
    goes_on = _goes_on(rest, held, inside)
    again = rf"(?<![\d.,]){re.escape(held)}"
    if inside and formula.strip():
        formula = formula[-BESIDE:]
        if _encloses(formula) or BOUNDED.search(formula):
            return "", True
        if sign := SIGN_BEFORE.search(formula):
            return sign[1], goes_on
        alone = HEADED.search(formula) or re.search(rf"{again}[.,]?$", formula)
        return "", bool(LEADS_UP.search(formula) and not alone) or goes_on
    if inside and (before[begin:].strip() or "\n" in before[begin:]):
        return "", goes_on
    bare = before[:-BESIDE] + FORMULA_BEGIN.sub(r"\1", before[-BESIDE:])
    above, _, line = bare.rpartition("\n")
    line = line if len(line) <= BESIDE else f"…{line[-BESIDE:]}"
    if NUMBERED.search(line) or HEADED.search(line) or re.search(rf"{again}(?:[.,]|\s+-\s*)?$", line):
        return "", goes_on
    if LEADS_UP_IN_WORDS.search(line) or (bare == before and TOUCHES.search(line)):
        return "", True
    if ARGUMENT.search(line) or BOUNDED.search(re.sub(r"(?i)^\W*(?:final\s+)?answer\s*>|^[>\s]+|<[^<>]*>", "", line)):
        return "", True
    bullet = re.fullmatch(r"\s*-(?:\\\$)?", line) and not COMES_NEXT.search(above[-BESIDE:])
    return "-" if MINUS.search(line) and not bullet else "", goes_on


def _goes_on(rest: str, held: str, inside: bool) -> bool:
    """Whether the formula goes on behind its box. `inside`: the box stands between the signs of a formula."""
    if GOES_ON.match(rest) or (inside and not _prose(rest) and GOES_ON_IN_FORMULA.match(rest)):
        return True
    if (command := re.match(rf"(?:{SPACES if inside else ''}|[^\S\n]*)\\([A-Za-z]+)", rest)) and not re.fullmatch(
        FOLLOWS, command[1]
    ):
        return True
    other = re.match(r"[^\S\n]*=([^=\n$]*)", rest)
    if other is None or re.search(r"(?<!\\)[A-Za-z]", held):
        return False
    side = re.sub(r"(?<=\d)\s*x\s*(?=\d)", " ", WORDLESS.sub(" ", re.split(r"[.,;]\s|[.,;]?$", other[1])[0]))
    unknown = re.search(r"(?<![A-Za-z])(?<!\d\s)(?<!\d~)[A-Za-z](?![A-Za-z])", side)
    return bool(unknown and not _prose(side) and not NAMED.fullmatch(f"{side}="))  # 18 = 2x


def _encloses(formula: str) -> bool:
    """Whether an open bracket before a box makes its content an argument, one of several, or an absolute value."""
    formula = re.sub(r"\\([{}])", lambda brace: "(" if brace[1] == "{" else ")", formula)
    command = re.search(rf"\\([A-Za-z]+)\*?{SPACES}\(?{SPACES}$", formula)
    if (command and not re.fullmatch(CONNECTS, command[1])) or re.search(rf"\|{SPACES}$", formula):
        return True
    opened: list[int] = []
    for at, sign in enumerate(formula):
        if sign in "([":
            opened.append(at)
        elif sign in ")]" and opened:
            opened.pop()
    if not opened:
        return False
    outer = re.sub(rf"(?:\\(?:left|[bB]igg?l?)|{TEXT}\s*\{{[^{{}}]*\}})\s*$", "", formula[: opened[-1]]).rstrip()
    return "," in formula[opened[-1] :] or bool(re.search(r"(?:(?<![A-Za-z\\])[A-Za-z]|[\d}])$", outer))


def _formula_begin(before: str, behind: str) -> int:
    """Where the formula around a box begins; -1 if there is none.

    A single dollar sign that its line does not close is money.
    """
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
