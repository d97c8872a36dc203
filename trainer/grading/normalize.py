"""Spellings: the many ways to write one answer, and the words that say, change or deny it.

In: a model's text, in LaTeX, Markdown or words. Out: the answer's text in one spelling. This module knows neither gold
answers nor mathematics.
"""

from __future__ import annotations

import re
import unicodedata

ANSWER_CHARACTERS = 2_000
"""An answer longer than this is wrong."""
TEXT = r"\\(?:text|mathrm|textrm|textbf|mathbf|textit|operatorname|mbox|rm)\b"
SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013", "-"),
        "、": ",", "。": ".", "∞": r"\infty ", "±": r"\pm ", "·": r"\cdot ", "⋅": r"\cdot ",
        "∪": r"\cup ", "∈": r"\in ", "′": "'",
        "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    }
)  # fmt: skip


POWER_OF_CODE = r"(?<=(?<![A-Za-z])[A-Za-z\d)])\*\*(?=[\d(-])"
"""x**2. Elsewhere ** makes bold text."""


def _compatible(text: str) -> str:
    """The text with plain signs for Unicode's wide, raised and thin ones."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _repeating(digits: re.Match[str]) -> str:
    """0.1\\overline{6} is (16 - 1)/90."""
    first, period = digits[1] + digits[2], digits[3]
    under = (10 ** len(period) - 1) * 10 ** len(digits[2])
    return rf"\frac{{{int(first + period) - int(first or 0)}}}{{{under}}}"


TIDY = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:displaystyle|textstyle|limits|nolimits|left\.|right\.)(?![A-Za-z])", " "),
        (r"\\(?:color|textcolor|colorbox)\s*\{[^{}]*\}", ""),
        (r"\\(?:bf|it|em|sf|tt|large|Large|LARGE|huge|Huge|bfseries|boldmath)(?![A-Za-z])", ""),
        (r"\\mathbf\s*\{(\d(?:\s+\d)+)\}", lambda digits: "".join(digits[1].split())),  # OlympiadBench's
        (
            r"\\(?:boldsymbol|bm|pmb|mathbf|mathit|mathsf|mathnormal|ensuremath|underline|emph)\s*\{([^{}]*[^{}A-Za-z][^{}]*|[A-Za-z])\}",
            r"{\1}",
        ),
        (r"\\(?:mathrm|operatorname|text|rm)\s*\{\s*([ei])\s*\}", r"\1 "),
        (r"\\sqrt\s*(\[[^\[\]]*\])\s*(\w)", r"\\sqrt\1{\2}"),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (POWER_OF_CODE, "^"),
        (r"(?:√|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(pi|ln)(?![A-Za-z])", r"\\\1 "),
        (r"\*\*|`|\\[()\[\]]|(?<!\\)\$", " "),
        (rf"{TEXT}\s*\{{\s*Rs\.?\s*\}}|\b(?:US(?=\\?\$)|Rs\b\.?\s*(?=\d))|(?<=\d)/-(?=\W|$)", ""),  # Rs. 1,250/-
        (rf"{TEXT}\s*\{{\s*([-+]?(?:\\\$)?[\d.,]+|\\\$|[€£¥])\s*\}}", r"\1"),
        (r"(?<=\d)(?:\\[,; ]|~|\{,\}| )+(?=\d{3}(?!\d))", ","),  # thousands
        (r"(?<![\d.^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 2 1/2
        (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", _repeating),
        (r"(?<![\d.])(\d+)\.(?=\s|[^\d\w]|$)", r"\1"),  # 18. and 1./3
        (r"(?<![A-Za-z\\\d.])(-?\d+(?:\.\d+)?)\s*[eE]\s*([-+]?\d+)(?![\d.A-Za-z])", r"\1 \\times 10^{\2}"),
        (r"\b10\s*\^\s*(-\d+)", r"10^{\1}"),
        (r"(?<=\d)\s*[x*]\s*(?=\\?\$?\d)", r" \\times "),
        (r"\bnp\.(?=[a-z])", r"\\"),
        (r"^\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}\s*$", r"\1"),
        (r"\\varnothing\b", r"\\emptyset"),
        (r"(?<![\\A-Za-z\]}^_\d])\{\s*(-?[\d.,]+|[A-Za-z])\s*\}(?!\{)", r"\1"),
    )
]
"""Several spellings, and the one that replaces them. Without these rules 3.3e12 would hold Euler's number."""
NAMED = re.compile(
    r"^\s*(?!\\pi\b)(?!\\?(?:log|ln|lg|exp|sqrt|[dtc]?frac|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)(?![A-Za-z])[^=]*"
    r"(?:(?<![\\A-Za-z])[A-Za-z]|\\(?!circ|degree|pi|left|right)[a-z]))(?:\\?[A-Za-z]+|\\(?:angle|overline|triangle)\s*\{?[A-Z\s]+\}?|[A-Z](?:\s+[A-Z])+|\[[A-Z]+\]|\|[A-Z]+\||"
    rf"{TEXT}\s*\{{[^{{}}]*\}})\s*(?:_\s*(?:\{{[^{{}}]*\}}|\w))?\s*(?:\([^()=]*\))?\s*"
    r"(?:=|\\approx\b|≈|\\sim\b)"
)
"""A name before a value: x =, f(n) =. A known function of an unknown, as in log(x) = 2, makes an equation instead."""
NAMES = re.compile(r"\s*\(?\s*((?:[A-Za-z](?:_\{?\d\}?)?\s*,\s*)+[A-Za-z](?:_\{?\d\}?)?)\s*\)?\s*=\s*(?=\()")
NAMED_PART = re.compile(r"\s*([A-Za-z](?:_\{?\d\}?)?)\s*=\s*([^=]+)")
NAMED_BRACKETS = re.compile(r"\(?\b[A-Za-z](?:\s*,\s*[A-Za-z])*\)?\s*(?:=|\\in\b)\s*(?=[(\[\\])")
"""A name before brackets: x ∈, (a, b) =."""
# fmt: off
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
# fmt: on
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = rf"(?:{'|'.join((*ONES[::-1], *TENS))})"
NUMBER_WORD = re.compile(
    rf"(?<![A-Za-z]){_WORD}(?![A-Za-z])(?:(?:-|\s+(?:and\s+)?)(?:{_WORD}|{'|'.join(SCALES)})(?![A-Za-z]))*",
    re.IGNORECASE,
)
_IRREGULAR = {"five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth", "hundred": "hundredth"}
PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4} | {
    _IRREGULAR.get(word) or (word[:-1] + "ieth" if word.endswith("ty") else word + "th"): value
    for word, value in (
        *((word, value) for value, word in enumerate(ONES) if value > 3),
        *((word, 10 * value) for value, word in enumerate(TENS, 2)),
        *SCALES.items(),
    )
}
"""Words for fractions, and their denominators."""
# fmt: off
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
               "quadrillion": 10**15, "quintillion": 10**18, "lakh": 10**5, "crore": 10**7, "googol": 10**100}
# fmt: on
MULTIPLIER = re.compile(rf"(?:\s|~|\\[,;! ]|{TEXT}|\{{)*({'|'.join(MULTIPLIERS)})s?\b", re.IGNORECASE)
NEGATIVE = re.compile(rf"\s*(?:minus|negative)\s+(?=\\?\$?[\d.(]|\\[dt]?frac|\\sqrt|{_WORD}\b)", re.IGNORECASE)
"""A minus in words, at the start of an answer."""
_PART = r"(?:s\b|\b(?=\s+of\b|\W*$))"  # not in third graders
WORDS_OR_FRACTION = re.compile(rf"{NUMBER_WORD.pattern}(?:[\s-]+({'|'.join(PARTS)}){_PART})?", re.IGNORECASE)
FOREIGN_NOT = r"\b(?:nicht|kein\w*|pas|não|non|не)\b"
COMPARED = r"(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger|under|over|rather|older|younger)"
CJK = r"\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3"
ABROAD = re.compile(
    r"[\u0400-\u04ff]+|\b(?:es|est|ist|sind|sont|el|los|las|una|une|der|das|und|eine|della|hat|haben|Tiene|casi|plus\s+de|nicht|keine?n?|environ|presque|pas|douzaines?|è|é|são|uma|het|een|ella|elle|tiene|más|menos|moins|mehr|più)\b"
    r"|\b(?i:respuesta|réponse|antwort|risposta|resposta|antwoord)\b"
)
ENGLISH_WORD = re.compile(
    r"\b(?:the|this|that|is|are|was|were|be|has|have|had|and|or|of|to|at|for|on|with|from|by|per|each|she|they|it|so|thus|"
    r"hence|then|there|will|would|costs?|gets?|got|gives?|makes?|made|needs?|earn(?:s|ed)|spen[dt]s?|bought|sold|pa(?:id|ys)|"
    r"ate|eats|left|total|answer|equals)\b",
    re.IGNORECASE,
)
DENIED_ABROAD = re.compile(
    r"(?i:\b(?:no|ni|nunca|más|menos|mil(?:es|h[aã]o|lones?|lion\w*)?|millón|mayor|menor|mitad|doble|casi|aproximadamente|cerca|"
    r"alrededor|quizás?|ne|pas|plus|moins|environ|moitié|presque|peut-être|nicht|kein\w*|mehr|weniger|mindestens|höchstens|"
    r"größer|kleiner|als|hälfte|doppelte|etwa|ungefähr|fast|vielleicht|tausend|million\w*|milliarde\w*|non|più|meno|metà|"
    r"almeno|circa|quasi|mila|não|mais|metade|quase|niet|meer|minder|minstens|helft|ongeveer|не|нет|больше|меньше|более|"
    r"менее|около|почти|половин\w*|тысяч\w*|миллион\w*|incorrect[ao]|fals[ao]|fausse|falsch\w*|errad[ao]|sbagliat[ao]|неверн\w*|si|wenn|если|mille|demi\w*|medi[oa]|halb\w*|mezz\w*|mei[oa]|docenas?|douzaines?|dutzend|dozzin[ae]|dúzias?|"
    r"veces|fois|mal|volte|vezes)\b)"
)
"""In a sentence of another language. These words may change its number or deny it."""
_CJK_DENIED = (
    "[不没未非别勿莫无负第倒半倍比几错误]|(?:至|最)[多少]|[多少大小低高]于|超(?!市)|将近|接近|(?<![节纽大])约(?![翰会定])|大约|大概|也许|"
    "或许|可能|差不多|还差|多[了]?$|根号|[平立次]方|方根|之一|除|假[如设]|如果|要是|若|以为|认为|估计|猜|左右|以[上下]|"
    "より|以外|未満|違|ない|약|보다|이상|이하|아니"
)
CJK_AHEAD = re.compile(rf"(?!.*(?:{_CJK_DENIED}))(?:[{CJK}]|[A-Z][a-z]+|[\s，,、:：])*")
"""Words that may stand before an answer. None of them changes a number."""
_CJK_FORMULA = r"(?:[\d.,\s+*/×÷()\-]+[=＝]\s*)?"
_CJK_UNITS = (
    "平方[厘分千]?米|立方[厘分]?米|千[克米瓦卡]|毫[米升克]|厘米|公[里斤]|英[里尺寸镑]|小时|分钟|美[元分]|摄氏度|"
    "ドル|メートル|キロ(?:メートル|グラム)?|センチ(?:メートル)?|グラム|リットル|ページ|パーセント|"
    "[개원명분초일년살세도권마번점잔병장대쪽회]|마리|시간|달러|미터|킬로미터|킬로그램|그램|리터|센티미터|퍼센트|페이지|유로"
)
_CJK_ENDS = "了|钱|です|である|だ|となります|になります|となる|になる|입니다|이다|이에요|예요|[이가] ?됩니다"
COUNTED_IN_CJK = re.compile(
    rf"\s*(?:{_CJK_UNITS}|(?:(?![的半倍多余来以之又和或不错左右上下内外约打万亿千百几比折方幂根乘加减除未満超程乗違])"
    rf"[\u4e00-\u9fff]){{1,6}})?\s*(?:{_CJK_ENDS})?"
)
"""What may stand behind an answer: units and counted things. Nothing here changes the number."""
_NUMBER = (
    r"(?P<sign>负|マイナス|minus\s)?\s*(?P<number>\$[^$]*\$|[-+]?\\?\$?\d[\d,.]*(?:/\d+)?\s*\\?%?|"
    r"[零〇一二两三四五六七八九十百千万亿]+)"
)
CLOSINGS = (
    re.compile(
        rf"(?P<ahead>(?:[{CJK}]|[A-Z][a-z]+|[\s，,、:：])*?){_CJK_FORMULA}{_NUMBER}(?P<behind>{COUNTED_IN_CJK.pattern})"
    ),
    re.compile(
        r"(?:(?:por\s+(?:lo\s+)?tanto|entonces|así|donc|ainsi|also|daher|deshalb|somit|quindi|dunque|portanto|logo|dus|"
        r"поэтому|значит|следовательно|итак),?\s+)*(?:(?:la|el|le|die|das|il|a|o|de|het)\s+)?"
        r"(?:(?:richtige|endgültige|окончательный|правильный)\s+)?"
        r"(?:respuesta|resultado|réponse|résultat|antwort|lösung|ergebnis|risposta|risultato|resposta|antwoord|ответ|результат)"
        r"(?:\s+(?:finale?|correct[ae]|corretta|exact[ae]))?\s*(?:\b(?:es|est|ist|is|è|é|равен)\b|[:：=—])*\s*(?:de\s+)?"
        rf"{_NUMBER}(?P<behind>\s*(?:€|\\?\$|euros?|d[oó]l+ar(?:e?s|i)?|años|ans|jahre|anni|anos|horas|heures|stunden|лет|"
        r"minut[eo]s|minuten|[ck]?m|k?g)?)",
        re.IGNORECASE,
    ),
)
"""Sentences of other languages that say an answer. A sentence with anything else in it does not match."""
CJK_TAKEN_BACK = re.compile("不对|错|不是|更正|改正|应该是|其实|等一下|違|아니")
MORE_THAN = re.compile(rf"[^\w$]*{COMPARED}\s+than\b", re.IGNORECASE)
CHANGED = re.compile(
    rf"^\W*(?:(?:ten|hundred|thousand)[\s-]+)?(?:{'|'.join(PARTS.keys() - {'quarter'})}){_PART}"
    rf"|\b(?:or|and|less)\s+(?:an?\s+)?(?:another\s+)?(?:half|third|quarter|{COMPARED}|{NUMBER_WORD.pattern})\b"
    rf"|(?<!\\)\btimes\s+(?:as|more|less|fewer|the|that|what|his|her|its|their|\w+er|\\?pi|[b-zB-Z]|\d+|{NUMBER_WORD.pattern})\b"
    r"|^[^\w\\]*(?:over(?!\s+(?:the|a|an|this|that|all|\w+\s+\w*(?:second|minute|hour|day|week|month|year|night|trip)s?)\b)|choose|mod(?:ulo)?|(?:short|shy)\s+of)\b|\braised\s+to\b"
    r"|\bto\s+the\s+(?:(?:\w+\s+)?power\b|\w*(?:th|third)\W*$)"
    rf"|^[^\w\\]*(?:(?:square|cube)\s+)?roots?\s+(?:of\s+)?(?:\\?pi|[a-z]|{NUMBER_WORD.pattern})\b"
    rf"|\b(?:base[\s-]+(?:[a-z]|{NUMBER_WORD.pattern})|in\s+(?:binary|octal|hexadecimal)|with\s+probability)\b"
    r"|^\W*(?:sext|sept|oct|non|dec)illions?\b"
    r"|\b(?:divided|multiplied|increased|decreased|reduced)\s+by\b|\btoo\s+(?:many|much|few|little)\b|\bor\W*[A-Za-z]?\W*$"
    r"|\b(?:if|unless|cannot|impossible)\b|\b(?:plus|minus|squared|cubed|factorial|doubled|tripled|halved|at\s+(?:least|most)|so\s+far)\b"
    r"|\b(?:upper|lower)\s+(?:bound|limit)\b"
    r"|(?:\b(?:is|are|was|were)|[,;(])\s*(?:not|wrong|incorrect|false)\b|^\W*(?:not\b|(?:wrong|incorrect|false)\W*$)"
    r"|\b(?:more|less)\s*$|\?|\b(?:is|are|was|be)(?:\s+not|n't|\s+(?:wrong|incorrect|false|too))\b",
    re.IGNORECASE,
)
"""Behind a number. These words turn it into another number or a bound, or deny it. 'Quarters' may be coins."""
ANOTHER = re.compile(
    rf"[,;]\s+(?:and\s+)?(?!one\b){NUMBER_WORD.pattern}(?!\s+(?:of|{COMPARED})\b)|\bor\s+(?:none|nothing|all|any|every|no)\b"
    r"|^[^\w\\]*(?:or\b|and\s+(?:\\(?!text)|(?:all|none|no)\b|[b-hj-z](?![A-Za-z])))",
    re.IGNORECASE,
)
"""Behind a number. A second number follows."""
BELOW = re.compile(rf"(?i)(?:[^\w.,;]|circ|{TEXT}|degrees?|celsius|[CF]\b)*\bbelow(?:\W|{TEXT})*(?:zero\b|0(?![\d.]))")
"""'Below zero', right behind a number and its unit."""
SOFT_EDGES = re.compile(r"^[\s\"'*]*(?:(?:the|a|an)\s+)?[\"'*]*|[\s.,;:!?'\"*]+$", re.IGNORECASE)


def digits_for_words(text: str) -> str:
    """The text with digits for number words: twenty-one becomes 21, two thirds a fraction."""

    def number(words: re.Match[str]) -> str:
        total, part = 0, 0
        whole = words[0][: words.start(1) - words.start()] if words[1] else words[0]
        for word in re.findall(r"[a-z]+", whole.lower()):
            if word in SCALES:
                part = max(part, 1) * SCALES[word]
                if word != "hundred":
                    total, part = total + part, 0
            elif word != "and":
                part += ONES.index(word) if word in ONES else 20 + 10 * TENS.index(word)
        return rf"\frac{{{total + part}}}{{{PARTS[words[1].lower()]}}}" if words[1] else str(total + part)

    return WORDS_OR_FRACTION.sub(number, text)


def is_english(sentence: str) -> bool:
    """Whether to read a sentence as English: at most half of its known words belong to another language,
    and it has at most four Chinese, Japanese or Korean characters for each English word.

    A sentence in Latin or Cyrillic letters also counts as English if none of its words is known to change a number.
    """
    english = len(ENGLISH_WORD.findall(sentence))
    if cjk := len(re.findall(f"[{CJK}]", sentence)):
        return cjk <= 4 * english
    return len(ABROAD.findall(sentence)) <= english or not DENIED_ABROAD.search(sentence)


def closing(sentence: str) -> tuple[str, str] | None:
    """The number that a sentence of another language gives as its answer, and what it counts; or None."""
    if not (re.search(f"[{CJK}]", sentence) or ABROAD.search(sentence)):
        return None
    said = next(filter(None, (one.fullmatch(sentence) for one in CLOSINGS)), None)
    if said is None or ("ahead" in said.re.groupindex and not CJK_AHEAD.fullmatch(said["ahead"])):
        return None
    number = said["number"].rstrip(".,")
    number = str(_chinese(number)) if re.match("[\u3007\u4e00-\u9fff]", number) else number
    return ("-" if said["sign"] else "") + number, said["behind"]


def _chinese(words: str) -> int:
    """十八 is 18, 一百零五 is 105, 两万 is 20000."""
    total, part, digit = 0, 0, 0
    for sign in words:
        if sign in "十百千":
            part, digit = part + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[sign], 0
        elif sign in "万亿":
            total, part, digit = (total + part + digit) * {"万": 10**4, "亿": 10**8}[sign], 0, 0
        else:
            digit = 10 * digit + "零一二三四五六七八九".find({"两": "二", "〇": "零"}.get(sign, sign))
    return total + part + digit


def tidy(text: str) -> str:
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: f"^{{{_compatible(found[0])}}}", text)
    text = re.sub(r"[₀-₉]+", lambda found: f"_{{{_compatible(found[0])}}}", text)
    text = _compatible(text.translate(SIGNS)).translate(SIGNS)
    for pattern, plain in TIDY:
        text = pattern.sub(plain, text)
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
    """The text in lower case, with single spaces, without an article before it and a full stop behind it."""
    plain = SOFT_EDGES.sub("", " ".join(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split()))
    return plain.casefold().replace(r"\%", "%")


def letters_of(choice: str) -> str:
    """A choice without what may be spelled differently: spaces, brackets around it, a full stop."""
    plain = words_of(plain_text(choice)).replace(" ", "")
    return plain[1:-1] if plain.startswith("(") and plain.endswith(")") else plain
