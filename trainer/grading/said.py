"""Where an output says its answer: behind a mark, in its boxes, or at its end.

In: an output. Out: the texts that may be its answer, best first. This module does no mathematics and judges nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from trainer.grading.boxed import (
    ENGLISH,
    FAILS,
    FUNCTION_OF,
    MARKUP,
    NO_LONGER,
    RETRACTED,
    WORDLESS,
    Answer,
    in_one_text,
    last_boxes,
    taken_back,
)
from trainer.grading.gold import boxes
from trainer.grading.normalize import (
    ANOTHER,
    CHANGED,
    CJK,
    CJK_AHEAD,
    CJK_TAKEN_BACK,
    COMPARED,
    MORE_THAN,
    MULTIPLIER,
    NAMED,
    NUMBER_WORD,
    POWER_OF_CODE,
    TEXT,
    closing,
    digits_for_words,
    is_english,
    plain_text,
    squeezed,
)

LAST_CHARACTERS = 20_000
"""How many characters at the end of an output are searched for its answer."""
MOST_READINGS = 8
"""Most readings of a sentence without a number. Each begins behind another verb or 'in'."""
ANSWER_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)|<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
STEP = re.compile(
    r"\W*(?:\d+[.):]\s+[A-Za-z]|(?:step|part)\b|(?:case|problem|question|example)\s+\d+\b)", re.IGNORECASE
)
"""The text of a heading, not of an answer. Markdown's fourth-level headings begin with GSM8K's mark."""
REJECTED = re.compile(
    r"\b(?:extraneous|spurious|reject\w*|discard\w*|exclud\w*|eliminat\w*|rul\w+\s+out|fail\w*|invalid|impossible|wrong|"
    r"incorrect|not?|only|neither|cannot|mistake\w*|errors?|redo|retry|try|attempt|revis\w+|recalculat\w+|reconsider|"
    r"correct(?:ed|ion|ing)|the\s+(?:correct|actual|real|right|true|final)|actually|instead|rather|wait|hmm|oops|sorry|"
    r"forgot|should\s+(?:be|have))\b|n't\b",
    re.IGNORECASE,
)
"""Between several boxes. Some of them hold no answers."""
WORDS_FIRST = re.compile(rf"{TEXT}\s*\{{[^{{}}\d]*[a-z]{{3}}[^{{}}\d]*\}}[^=]*\d")
"""A box that holds a sentence."""
THOUGHT = re.compile(r".*</think>(?=.*\S)", re.DOTALL)

DISPLAY = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!(?<!\\)\\\[).)+?)\\\]"
    r"|\\begin\{(?:align|aligned|equation|gather|gathered|multline|eqnarray|split)\*?\}"
    r"((?:(?!\\begin\{(?:align|equation|gather|multline|eqnarray)\*?\}).)+?)\\end\{\w+\*?\}",
    re.DOTALL,
)
"""A displayed formula. A second opening sign before the closing one ends the match, so that a repetition costs
linear time."""
INLINE = re.compile(r"\\\(((?:(?!\\\().)+?)\\\)|(?<![\\$])\$(?!\$)((?:\\.|[^$\\])+?)\$(?!\d)", re.DOTALL)
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bRs)(?<!\bsq)(?<![ap]\.m)[.!?](?=[\s*\"')]|$)|[。！？]|\n"
)
PART = r"\b(?:first|second|third|next|last|previous|other|parts?|step|sub\w*|case|half|above|wrong|not)\b|n't\b"
ANSWER = re.compile(
    rf"\banswers?\b(?:(?!{PART})[^.\n$]){{0,60}}?"
    r"(?:\b(?:is|are|was|be|equals)\b(?:\s*[:：])?|[:：=]|$)(?:\s*(?:therefore|thus|simply|exactly|just|given by)\b)?"
    r"|(?:答案|结果)\s*(?:应该|就)?(?:是|为|為|等于|[:：=])+",
    re.IGNORECASE | re.MULTILINE,
)
COPULA = re.compile(
    r"\b(?:is|are|was|were|be|equals?|equal to|gets?|got|gives?|obtains?|have|has|had|finds?|found|becomes?|makes?|"
    r"conclude(?: that)?|yields?|remains?)\b|:(?!\d)",
    re.IGNORECASE,
)
LEAD = re.compile(r"^\W*(?:(?:so|thus|hence|therefore|then|finally|it|that|the)\b[\s,:]*)+", re.IGNORECASE)
ASIDE = re.compile(
    r",?\s+(?:because|since|as (?:desired|required|claimed))\b.*$|,?\s+which\b[^\d\\$]*$|\.?\s*I hope\b.*$|"
    r",\s*where\b.*$|,?\s+(?:attained\s+|reached\s+)?(?:when|at|for)\s+\\?\$?[A-Za-z](?:_\{?\w\}?)?\s*=\s*[^\s$=]+\$?$|"
    r"\s*\((?:which|where|when|since|because|attained|achieved|obtained)\b.*\)\s*$|"
    r",?\s+(?:not|rather than|instead of)\s+\D{0,3}\d\S*$",
    re.DOTALL,
)
CLAUSE = re.compile(
    r"\b(?:so|thus|hence|therefore|consequently|then|which\s+(?:means|gives|is|yields|makes|equals)(?:\s+that)?)\b|(?<=.),(?=\s+(?!and\b|or\b|but\b)[A-Za-z]{2})|;",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"\b(?:no|not|never|between|nor|neither|cannot|half|twice|double|triple|third of|quarter of|wrong|"
    r"incorrect|false|anything\s+but|far\s+from|"
    rf"{FUNCTION_OF}|except|exceeds?|close to|off by|(?:at )?(?:least|most)|up to|minimum of|maximum of|above|below|"
    rf"instead of|almost|nearly|(?:other|{COMPARED}) than)\b|n't\b",
    re.IGNORECASE,
)
"""Before a number. The number is a bound or no answer."""
PART_OF = re.compile(r"(?:third|quarter|fifth|tenth)s?\s+of\s+(?:the\s+)?$", re.IGNORECASE)
"""Right before the first number of a computation: two thirds of 27 apples = 18 apples."""
DENIED_IN_WORDS = DENIED.pattern.replace("half", r"half(?!\W*$)")
"""The same for a whole clause, which may end with 'one half'."""
SIGN = re.compile(r"(?:^\W*|\b(?:of|to|at|about)\s+|\b(?=negative))((?:minus|negative)\s+)$", re.IGNORECASE)
BOUND = re.compile(
    r"\b(?:over|under|beyond|minus|negative|from|after|before|past|but|modulo|mod|times|log|lg|ln|sin|cos|tan|exp|"
    r"(?:shy|short|excess)\s+of)\s*\(?$",
    re.IGNORECASE,
)
"""Right before a number, where its sign stands. 'Over' may also begin a derivation: over 4 weeks it is 4 * 50 = 200."""
UNKNOWN_LETTER = re.compile(r"(?<![A-Za-z'’.])(?:[b-zB-HJ-Z]|[aA](?=\s*$))(?![A-Za-z'’.])")
ANY_LETTER = re.compile(r"[A-Za-z](?:_(?:\{[^{}]*\}|\w))?")
FORMULA_OF = re.compile(r"[-+*/^|!]|\d\s*[A-Za-z]|\\(?:[dt]?frac|sqrt|cdot|times|log|ln|sin|cos|tan)(?![A-Za-z])")
COMPUTED = re.compile(
    r"\b(?:plus|minus|times|squared|cubed|twice|thrice|double|triple|half|(?:square|cube|root|reciprocal|negative)\s+of)\b",
    re.IGNORECASE,
)
BOUNDED_BEFORE = re.compile(
    r"\bat\s+(?:least|most)\b[^\d$]*$|^\W*(?:(?:so|thus|hence|then)\W+)?(?:half|twice|double|triple|thrice)\b[^\d$]*$",
    re.IGNORECASE,
)
"""Before the verb: 'at least she has', 'half of them are'."""
DENIED_BEHIND = re.compile(
    rf"^\W*(?:{FAILS}|(?:is|was|looks|seems)\s+(?:\w+ly\s+)?(?:{NO_LONGER}|never\b))", re.IGNORECASE
)
"""Right behind a number. The output denies it."""
NOT_BUT = re.compile(r"(?:n't|\s+not)\s+[$\\]*\d[\d,.]*\$?,?\s+but\s+(?:rather\s+)?(?=[$\\]*\d)", re.IGNORECASE)
"""'Not 20 but', before the number that counts."""
REJECTS = re.compile(
    r"\b(?:reject|discard|exclud|rul)(?:e|es|ed|s|ing)?\b(?!.*\b(?:is|are|so|gives?|leav\w+)\b)[^,;]*$", re.IGNORECASE
)
"""Before a number. The output rejects it."""
BUT_NOT_COMMA = re.compile(r"\b(?:but|so|however|actually)\b", re.IGNORECASE)
BUT = re.compile(rf"{BUT_NOT_COMMA.pattern}|,", re.IGNORECASE)
DISBELIEVED = re.compile(
    r"\b(?:I|we|one|you|s?he|they|some|many|people|others|students)\s+(?:\w+\s+)?(?:thought|guessed|assumed|expected|believed|"
    r"(?:might|may|could|would)\s+(?:\w+\s+)?(?:think|say|guess|expect|assume|believe))\b|"
    r"(?:\bnot|n't)\s+(?:true|think|believe|claim|say|sure|certain|convinced|the\s+case)\b|\bdoubt\b",
    re.IGNORECASE,
)
HEDGED = re.compile(
    r"\b(?:could|might|can|possibly|perhaps|maybe|believed|thought|supposed|said|claims?|guess|hardly)\b"
    rf"|\bmay\s+(?:\w+\s+)?be\b|{DISBELIEVED.pattern}",
    re.IGNORECASE,
)
"""Before a word or a number word. The output does not assert it."""
HEDGED_VERB = re.compile(r"\b(?:could|might|may)\s+(?:\w+\s+)?be$", re.IGNORECASE)
YES_OR_NO = re.compile(r"(?:\W|so\b|therefore\b)*(yes|no)\b", re.IGNORECASE)
"""An answer that may be explained."""
UNTRUE = re.compile(
    rf"(?:\bnot|n't|\bnever|\bcannot|\bno longer)\s+(?:\w+\s+)?$|{DISBELIEVED.pattern}|"
    r"\b(?:wrong|incorrect|false)\b|^if\b(?!.*,)",
    re.IGNORECASE,
)
"""Before the verb. The sentence does not assert its number. 'Difference between' is allowed: it is a number."""
ADDED = re.compile(
    rf"\s+(?:(?:after|in|for|out of|of|that|on|from|with|during|if|when)\b.*\d|{COMPARED}\s+than\b).*$", re.DOTALL
)
"""What may follow the result of a computation."""
PLEASANTRY = re.compile(
    r"\b(?:let me know|feel free|hope (?:this|that|it) helps|happy to help|any (?:other |more |further )?questions)\b|"
    r"^\W*\\?(?:blacksquare|square|Box|qed)\W*$|^\W*[∎□■]\W*$|^\d+[.):]$",
    re.IGNORECASE,
)
DOUBT = re.compile(
    DENIED_IN_WORDS
    + r"|\b(?:but|however|unsure|unclear|guess|wait|mistake|hmm|oops|know|next|now|let's|let us|needs?)\b|\?",
    re.IGNORECASE,
)
"""In a sentence without a number. The sentences before it are not the answer yet."""
SORRY = re.compile(r"^\W*sorry\b", re.IGNORECASE)
"""An apology without a number. It takes nothing back: 'Sorry, that took long.'"""
FULL_STOP = re.compile(r"[.!?。！？…:$]\W*$")
CUT_OFF = re.compile(
    r"\b(?:the|an?|of|to|at|by|from|with|for|in|on|per|and|or|but|so|that|which|who|because|since|if|as|than|is|are|was|were|"
    r"be|has|have|had|his|her|their|its|my|our)\s*$",
    re.IGNORECASE,
)
"""The last words of an unfinished sentence."""
MATHY = re.compile(r"^(?:ln|sqrt|pi)(?![a-z])|[\d\\=<>≤≥≠≈^√π∞±×÷½]|^[-+*/–—−]$")
OPERATOR = re.compile(r"^[-+*/=<>≤≥≠≈^±×÷(]|[-+*/=<>≤≥≠≈^±×÷(]$")
NAME_OF_VALUE = re.compile(
    rf"^(?!.*{NUMBER_WORD.pattern}).*(?:[A-Za-z]{{3}}|\b[A-Za-z]\([a-z]\))\s*$", re.DOTALL | re.IGNORECASE
)
"""The name before an equals sign: a total, f(x)."""
LETTERS_ALONE = re.compile(r"(?<![A-Za-z\\])(?!x\s*\\?\$?\d|(?:a|I)\s+\\?[$\w])[A-Za-z](?![A-Za-z])")
PIECE = re.compile(rf"\$[^$]*\$\S*|[{CJK}]+|[^\s{CJK}]+")


def answers(output: str, count: int) -> Iterator[Answer]:
    """The texts that may be the answer of an output, best first. `count`: the number of values in the gold answer."""
    output = THOUGHT.sub("", output[-LAST_CHARACTERS:], count=1)
    found, mark = boxes(output), _mark(output)
    if found and (mark is None or mark.start() < found[-1][0]):
        yield (last := last_boxes(output, found))
        if WORDS_FIRST.match(last.text):
            yield from _from_sentence(plain_text(last.text), whole=False)
        every = list({squeezed(output[begin:end]): (start, begin, end) for start, begin, end in found}.values())
        rest = re.split(r"[.;\n]", output[found[-1][2] + 1 :], maxsplit=1)[0]
        told = MARKUP.sub(" ", f"{output[found[0][2] + 1 : found[-1][0]]} {rest}")
        if len(every) == count > 1 and not REJECTED.search(told):
            yield Answer(in_one_text(output, every), output[found[-1][2] + 1 :])
    elif mark is not None:
        text = (mark[1] or mark[2] or "").strip()
        yield Answer(text.strip("* "))
        yield from _unmarked(text, quoted=False)
    else:
        yield from _unmarked(output)


def _mark(output: str) -> re.Match[str] | None:
    """The last mark that is no heading of Markdown."""
    last, end = None, len(output.rstrip())
    for mark in ANSWER_MARK.finditer(output):
        text = (mark[1] or mark[2] or "").strip()
        heading = mark[1] is not None and (
            STEP.match(text)
            or re.search(r":\W*$", text)
            or (mark.end() < end and not re.match(r"[-+$\\\d(\[{.*]", text))
        )
        if text and not heading:
            last = mark
    return last


def _unmarked(output: str, quoted: bool = True) -> Iterator[Answer]:
    """Answers without a mark: behind the last 'answer is', or else in the last sentence or display, from its verb
    on."""
    text = plain_sentences(output, quoted)
    if anchored := _behind_answer_is(text):
        yield from _from_sentence(anchored, whole=True)
        return
    sentences = [one for one in split_sentences(text) if re.search(r"[\w$∞]", one) and not PLEASANTRY.search(one)]
    for sentence in reversed(sentences[-4:]):
        if CUT_OFF.search(sentence):
            return
        yield from _from_sentence(sentence, whole=False)
        if DOUBT.search(sentence) or RETRACTED.search(SORRY.sub("", sentence)):
            return
        if runs(sentence) or NUMBER_WORD.search(sentence):
            return
        if not FULL_STOP.search(sentence) and sentence is sentences[-1]:
            return


def _behind_answer_is(text: str) -> str:
    """The sentence behind the last 'answer is'; '' if there is none, or the output does not believe it or takes it
    back."""
    for said in reversed(list(ANSWER.finditer(text))):
        begin = max(text.rfind(end, 0, said.start()) for end in ".!?\n") + 1
        before = text[begin : said.start()].rpartition("。")[2]
        if DISBELIEVED.search(BUT.split(before)[-1]) or (
            re.match(f"[{CJK}]", said[0]) and not CJK_AHEAD.fullmatch(before)
        ):
            return ""
        rest = text[said.end() :].lstrip(" \n\t*:：")
        if sentences := split_sentences(rest):
            back = taken_back(sentences[0], sentences[1:3]) or CJK_TAKEN_BACK.search(rest, len(sentences[0]))
            return "" if back else sentences[0]
    return ""


def _from_sentence(sentence: str, whole: bool) -> Iterator[Answer]:
    sentence = re.sub(r"^\W*step\s+\d+\s*[:.]\s*(?=.*=)", "", sentence, flags=re.IGNORECASE)
    sentence = re.sub(r"\$\\(?:blacksquare|square|Box)\$$", "", sentence.strip()).strip()
    if sentence.endswith(("?", "？")) or STEP.match(sentence):
        return
    sentence = NOT_BUT.sub(" ", re.sub(r"^=>?\s*", "", sentence.rstrip(".!。 ")))
    if understood := closing(sentence):
        yield Answer(*understood, marked=False)
        return
    if not is_english(_masked(sentence)):
        return
    if runs(short := ASIDE.sub("", sentence).strip()) or not runs(sentence):
        sentence = short
    begins = [0, *(joint.end() for joint in CLAUSE.finditer(_masked(sentence)))]
    clause = sentence[_last_before_formulas(begins, sentence) or 0 :].strip(" ,;")
    if whole and not DENIED.match(clause):
        yield Answer(clause, marked=False)
    verbs = list(COPULA.finditer(_masked(clause)))
    end = _last_before_formulas([verb.end() for verb in verbs], clause)
    verb = next((verb for verb in verbs if verb.end() == end), None)
    before, text = (clause[: verb.start()], clause[verb.end() :].strip()) if verb else ("", clause)
    where = runs(text)
    if not where:
        yield from _in_words(clause, verbs)
        return
    sums = [run for run in where if "=" in text[slice(*run)]]
    start = sign.start(1) if (sign := SIGN.search(text[: where[0][0]])) else where[0][0]
    if not sums and (BOUNDED_BEFORE.search(before) or _is_equation(before)):
        return
    if verb and HEDGED_VERB.search(clause[: verb.end()]):
        return
    if (
        UNTRUE.search(BUT_NOT_COMMA.split(before)[-1])
        or DISBELIEVED.search(text[:start])
        or DENIED.search(PART_OF.sub("", text[:start]) if sums else text[:start])
        or (not sums and BOUND.search(text[:start]))
    ):
        return
    if REJECTS.search(f"{before} {text[: where[0][0]]}") or DENIED_BEHIND.match(text[where[-1][1] :].lstrip("$ ")):
        return
    behind = text[len(text[: (sums[-1] if sums else where[0])[1]].rstrip(",;")) :]
    last = text[sums[-1][0] if sums else 0 :]
    if NAME_OF_VALUE.search(name := text[: where[0][0]]) and not CHANGED.search(name):
        start += len(text[start:]) - len(text[start:].lstrip("= "))
    ahead, text = f"{clause[: verb.end()] if verb else ''} {text[:start]}", text[start:]
    if CHANGED.search(behind) or (not sums and "$" not in text and MORE_THAN.match(behind)):
        return
    yield Answer(_last_side(text), marked=False, ahead=ahead)
    if sums:
        yield Answer(ADDED.sub("", _last_side(last)), marked=False)
    first = where[0][1] - start
    first = times.end() if (times := MULTIPLIER.match(text, first)) else first
    if len(where) == 1 and not ANOTHER.search(behind):
        yield Answer(text[:first].lstrip(",;:").rstrip(".,;:"), text[first:], marked=False, ahead=ahead)
    elif re.match(r",?\s*(?:for (?:all|any|every|each)|where)\b", text[first:]):
        yield Answer(text[:first].rstrip(".,;:"), marked=False)


def _last_before_formulas(begins: list[int], text: str) -> int | None:
    """The last of these offsets with a formula or a number behind it."""
    last = max((end for _, end in runs(text)), default=0)
    return next((begin for begin in reversed(begins) if begin < last and runs(text[begin:])), None)


def _is_equation(before: str) -> bool:
    """Whether the text before a verb is a formula with one unknown, as x + 2 or 'the square of x', and not a name."""
    subject = re.sub(
        r"(?:\b(?:is|are|was|be|must|also|then|now|so|therefore|thus|hence)\b|\s)+$", "", LEAD.sub("", before)
    )
    formula = runs(subject)
    alone = len(formula) == 1 and not re.search(r"\w", subject[: formula[0][0]] + subject[formula[0][1] :])
    plain = re.sub(r"_\{[^{}]*\}|_\w|\^\s*\{?\\(?:circ|prime)\}?|\$", "", subject)
    unknown = UNKNOWN_LETTER.search(re.sub(rf"{TEXT}\s*\{{[^{{}}]*\}}|\\[A-Za-z]+", " ", plain))
    letters = ANY_LETTER.findall(re.sub(r"\\[A-Za-z]+", " ", subject)) if alone else UNKNOWN_LETTER.findall(plain)
    if len(set(letters)) > 1:  # m + n is what a question asks for
        return False
    formula_of_it = alone and FORMULA_OF.search(plain) and not NAMED.fullmatch(f"{plain}=")
    return bool(unknown and (formula_of_it or COMPUTED.search(subject)))


def _in_words(clause: str, verbs: list[re.Match[str]]) -> Iterator[Answer]:
    """Answers of a sentence without a formula: 'it is purple', 'she has seven'."""
    told = clause[verbs[0].end() :] if verbs else clause
    denies = re.search(DENIED_IN_WORDS, clause, re.IGNORECASE)
    denied = denies and not ((explained := YES_OR_NO.match(clause)) and explained[1].lower() == "no")
    changed = CHANGED.search(NUMBER_WORD.sub("one", told)) and not re.fullmatch(
        r"\W*(?:a\s+)?half", told, re.IGNORECASE
    )
    if denied or (changed and not YES_OR_NO.match(clause)) or re.search(r"\bif\b", clause):
        return
    yield Answer(LEAD.sub("", clause), marked=False)
    for verb in reversed([*verbs, *re.finditer(r"\b(?:on|in)\b", clause)][-MOST_READINGS:]):
        if HEDGED.search(clause[: verb.end()]):
            break
        yield Answer(clause[verb.end() :].strip(" :"), marked=False)
    word = NUMBER_WORD.search(clause)
    if word and not denies and not BOUND.search(before := clause[: word.start()]) and not HEDGED.search(before):
        yield Answer(digits_for_words(clause[word.start() :]), marked=False)


def _last_side(text: str) -> str:
    """The result of a computation with words, as '40 minutes + 100 minutes = 140 minutes'."""
    left, equals, _ = _masked(text).rpartition("=")
    words = (ENGLISH.search(left) or "%" in left) and not LETTERS_ALONE.search(left)
    return text[len(left + equals) :].strip() if words else text


def _masked(text: str) -> str:
    """The text with its formulas blanked out, in the same length."""
    return INLINE.sub(lambda math: "\0" * len(math[0]), text)


def plain_sentences(output: str, quoted: bool = True) -> str:
    """The text with formulas between single dollars, displays on lines of their own, by their last row, and money
    as \\$."""
    output = re.sub(POWER_OF_CODE, "^", re.sub(r"[ \t\u00a0]+", " ", output))
    text = re.sub(r"\*\*|__|`", "", output)
    if quoted:
        text = re.sub(r"^[ \t]*(?:>|#+[ \t]|[-*•][ \t])+", "", text, flags=re.MULTILINE)

    def display(math: re.Match[str]) -> str:
        row = _last_row(next(filter(None, math.groups())))
        return f"\n{row}\n" if "\\" not in row and ENGLISH.search(row) else f"\n${row}$\n"

    text = DISPLAY.sub(display, text)

    def inline(math: re.Match[str]) -> str:
        if not (held := (math[1] or math[2] or "").strip()):
            return "\\$"
        words = ENGLISH.search(WORDLESS.sub(" ", held))
        if math[2] and (words or held[-1] in "-+*/="):
            return "\\" + math[0][:-1] + "\\$"
        return f"${' '.join(held.split())}$"

    return re.sub(rf"{INLINE.pattern}|(?<!\\)\$(?=\s?\d)", inline, text, flags=re.DOTALL)


def _last_row(display: str) -> str:
    rows = re.split(r"\\\\(?:\[[^\]]*\])?", display) if "\\begin" not in display or "aligned" in display else [display]
    row = next((row for row in reversed(rows) if re.sub(r"[\s{}&]|\\(?:begin|end)\{\w+\*?\}", "", row)), "")
    row = re.sub(r"\\(?:begin|end)\{(?:align|aligned|split|gathered)\*?\}|\\(?:no)?tag\{[^{}]*\}|\\nonumber", "", row)
    plain = row if "\\begin" in row else row.replace("&", " ")
    return re.sub(r"^\s*(?:=|\\(?:implies|Rightarrow|therefore|iff)\b)", "", " ".join(plain.split())).strip(" .,;")


def split_sentences(text: str) -> list[str]:
    ends = [0, *(end.end() for end in SENTENCE_END.finditer(_masked(text))), len(text)]
    return [one for begin, end in pairwise(ends) if (one := text[begin:end].strip())]


def runs(text: str) -> list[tuple[int, int]]:
    """Where formulas and numbers stand in a text: pieces that are not words, and letters beside operators."""
    tokens = list(PIECE.finditer(text))

    def mathy(index: int) -> bool:
        token = tokens[index][0]
        beside = [tokens[at][0] for at in (index - 1, index + 1) if 0 <= at < len(tokens)]
        return bool(
            MATHY.search(token)
            or token.startswith("$")
            or (re.fullmatch(r"[^\W\d_][.,]*", token) and any(OPERATOR.search(one) for one in beside))
        )

    found: list[tuple[int, int]] = []
    for index, token in enumerate(tokens):
        if mathy(index):
            joined = found and found[-1][1] == tokens[index - 1].end()
            found.append((found.pop()[0] if joined else token.start(), token.end()))
    return found
