"""Verdicts on outputs: what equals a gold answer, what only comes near, and rubbish."""

import gc
import json
import random
import signal
import string
import time
from collections import Counter
from pathlib import Path

import pytest
from support.servers.real_server import SHARED_DATA

import trainer.grading.mathematics
from client.problems.reader import ProblemRow, read_problems
from trainer.grading.gold import Gold, gold_answer
from trainer.grading.grader import grade
from trainer.grading.mathematics import SECONDS, TOTAL_SECONDS

NEAR_MISSES, EQUAL = (
    [json.loads(line) for line in (Path(__file__).parent / f"{name}.jsonl").read_text().splitlines()]
    for name in ("near_misses", "equal_answers")
)
BENCHMARKS = ("gsm8k", "math", "svamp", "asdiv", "minerva_math", "olympiadbench", "mmlu_stem")
INTEGRAL = r"\int_0^1 e^{-x^3}\sin(x^x) dx"
HARD_SET = r"x^9-x^7+3x^5-\sqrt{x}<x^{\frac{1}{3}}-17"
SUBTLE = ("unit", "sign", "order", "rounding")


def gold_of(fields):
    return gold_answer(ProblemRow("p", "q", fields, "file.jsonl:3"))


def olympiad(answer, kind="Numerical", **fields):
    return {"answer_type": kind, "final_answer": [answer], **fields}


def solution(text, **fields):
    return {"problem": "p", "solution": text, **fields}


CHOICES = {"choices": ["5 m", "-5 m", "5 km"], "answer": 2}


@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: f"{miss['benchmark']}-{miss['output'][:30]}")
def test_what_only_comes_near_is_wrong(miss):
    assert not grade(gold_of(miss["row"]), miss["output"]).correct, miss["reason"]


def test_the_near_misses_are_many_and_subtle():
    assert all(miss["reason"] and miss["differs"] for miss in NEAR_MISSES)
    every = Counter(miss["benchmark"] for miss in NEAR_MISSES)
    subtle = Counter(miss["benchmark"] for miss in NEAR_MISSES if miss["differs"] in SUBTLE)
    assert set(every) == set(BENCHMARKS) and min(every.values()) >= 20 and min(subtle.values()) >= 5


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"answer": "34"}, "12+5=17. 17*2=34. The answer is 34."),
        ({"Answer": 145.0}, "The answer is 145."),
        ({"answer": "1,080"}, r"\boxed{1080}"),
        ({"answer": "0.5"}, r"That makes \boxed{\frac{1}{2}}."),
        ({"answer": "18"}, r"She makes \boxed{\$18} a day."),
        ({"answer": "18"}, r"\boxed{18 \text{ dollars}}"),
        ({"answer": "18"}, r"\boxed{18\%}"),
        ({"answer": "6"}, "The answer is 5. No: the answer is 6."),
        ({"answer": "4"}, r"\boxed{3}. No, \boxed{4}."),
        ({"answer": "4"}, r"The answer is 3. No, \boxed{4}."),
        ({"answer": "4"}, r"The answer is 4. \boxed{"),
        ({"answer": "4"}, r"\boxed{4} and then \boxed{}"),
        ({"answer": "-3"}, "The answer is \N{MINUS SIGN}3."),
        ({"answer": "\N{MINUS SIGN}3"}, r"\boxed{-3}"),
        ({"answer": "9 (inches)"}, r"\boxed{9}"),
        ({"answer": "9 (inches)"}, r"\boxed{9 \text{ inches}}"),
        ({"answer": "9 (apples)"}, r"\boxed{9} red apples"),
        ({"answer": "60 (minutes)"}, r"\boxed{1 \text{ hour}}"),
        ({"answer": "2 (feet)"}, r"\boxed{24} inches."),
        ({"answer": "3 (dollars)"}, r"\boxed{300 \text{ cents}}"),
        ({"answer": "Mrs. Hilt"}, r"\boxed{\text{Mrs. Hilt}}"),
        ({"answer": "Purple"}, "The answer is purple."),
        ({"answer": "6th"}, r"\boxed{6th}"),
        ({"answer": "3:30 p.m."}, r"\boxed{3:30 \text{ PM}}"),
        ({"answer": "3:30 p.m."}, r"\boxed{3:30}"),
        ({"answer": "9:24"}, r"\boxed{9:24}"),
        ({"answer": "2:3"}, r"\boxed{2:3}"),
        (solution(r"\boxed{\frac{1}{2}}", level="1"), r"\boxed{0.5}"),
        (solution(r"\boxed{(3,-2)}", level="1"), r"\boxed{\left( 3, -2 \right)}"),
        (solution(r"\boxed{(3,\frac{\pi}{2})}", level="1"), r"\boxed{(3, 0.5\pi)}"),
        (solution(r"\boxed{[1,2)}", level="1"), r"\boxed{x \in [1, 2)}"),
        (solution(r"\boxed{x^2-2x+1}", level="1"), r"\boxed{(x-1)^2}"),
        (solution(r"\boxed{1,3,5}", level="1"), r"\boxed{5, 3, 1}"),
        (solution(r"$\boxed{1.6} \mathrm{~cm}$"), r"\boxed{1.6 \mathrm{~cm}}"),
        (solution(r"$\boxed{1.6} \mathrm{~cm}$"), r"\boxed{1.61}"),
        (solution(r"$\boxed{1.6} \mathrm{~cm}$"), r"\boxed{0.016 \text{ m}}"),
        (solution(r"$\boxed{1.6} \mathrm{~cm}$"), r"\boxed{16} $\mathrm{~mm}$"),
        (solution(r"$\boxed{3.3e12}$"), r"\boxed{3.3 \times 10^{12}}"),
        (solution(r"$\boxed{3.3e12}$"), r"\boxed{3.32e12}"),
        (solution(r"$\boxed{3.3e12}$"), r"\boxed{3300000000000}"),
        (solution(r"$\boxed{\frac{e^{-2 t}}{15}}$"), r"\boxed{\frac{1}{15} e^{-2t}}"),
        (olympiad("$(2,4)$", "Tuple"), r"\boxed{(2, 4)}"),
        (olympiad("$(2,4)$", "Tuple"), r"\boxed{(a, b) = (2, 4)}"),
        (olympiad("$(2,4)$", "Tuple"), r"\boxed{2, 4}"),
        (olympiad("$(1,1), (3,2)$", "Tuple"), r"\boxed{(3,2), (1,1)}"),
        (olympiad(r"$[\frac{1}{2}, 8]$", "Interval"), r"\boxed{[0.5, 8]}"),
        (olympiad(r"$(-\sqrt{11},-2)\cup (\sqrt{11},9)$", "Interval"), r"\boxed{(-\sqrt{11}, -2) \cup (\sqrt{11}, 9)}"),
        (olympiad("-2,-1,1,2"), r"\boxed{2, 1, -1, -2}"),
        (olympiad("-1,1"), r"\boxed{\pm 1}"),
        (olympiad(r"$\frac{600}{7}$", unit="km/h"), r"\boxed{\frac{600}{7} \text{ km/h}}"),
        (olympiad("4.2", unit="%", error="1e-1"), r"\boxed{4.3\%}"),
        (olympiad("$f(n) = 2 n+1007$", "Expression"), r"\boxed{2n+1007}"),
        (CHOICES, r"\boxed{C}"),
        (CHOICES, r"\boxed{\text{C}}"),
        (CHOICES, r"\boxed{(C) 5 km}"),
        (CHOICES, r"\boxed{\textbf{c}}"),
        (CHOICES, r"\boxed{5 \text{ km}}"),
        (CHOICES, "So the answer is (C)."),
        (CHOICES, "C"),
    ],
)
def test_equal_answers_are_right_however_they_are_written_and_the_last_one_counts(fields, output):
    assert grade(gold_of(fields), output).correct


@pytest.mark.parametrize("equal", EQUAL, ids=lambda equal: equal["output"][:40])
def test_so_are_these(equal):
    assert grade(gold_of(equal["row"]), equal["output"]).correct


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("34", "I do not know."),
        ("34", ""),
        ("34", r"\boxed{"),
        ("3", "The answer is \N{MINUS SIGN}3."),
        ("2(x+y)", r"\boxed{2}"),
        ("6", r"\boxed{5} is wrong. The answer is 6."),  # a box is the answer, whatever is said after it
        ("0.33", r"\boxed{\frac{1}{3}}"),
        ("5", r"\boxed{x^{y^{z}}{{{"),
        ("5", "\\boxed{\x00\ud7ff∫∑}}}"),
    ],
)
def test_other_answers_and_rubbish_are_wrong(gold, output):
    assert not grade(Gold(gold), output).correct


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (r"So \boxed{5 \text{ km}}.", r"5 \text{ km}"),
        ("It is 7. The answer is 8.", "8"),
        ("", ""),
        (rf"\boxed{{{'9' * 999}}}", "9" * 200),
    ],
)
def test_what_was_found_is_told(output, found):
    assert grade(Gold("5"), output).extracted == found


@pytest.mark.parametrize(
    ("fields", "power"),
    [
        ({"answer": "5"}, r"9^{9^{9^9}}"),
        ({"answer": "5 (feet)"}, r"(9^{9^{9}})! \text{ inches}"),
        (solution(r"$\boxed{1.6} \mathrm{~cm}$"), r"\sum_{n=1}^{10^{12}} \frac{1}{n}"),
        (olympiad("$(2,4)$", "Tuple"), r"(2, 9^{9^{9^9}})"),
    ],
)
def test_an_answer_that_cannot_be_computed_in_time_is_wrong(fields, power):
    began = time.monotonic()
    assert not grade(gold_of(fields), rf"\boxed{{{power}}}").correct
    assert time.monotonic() - began < 4 * SECONDS


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"answer": "Yes"}, "The answer" + "\n" * 20_000),
        ({"answer": "5"}, "The answer" + " " * 20_000 + "is"),
        ({"answer": "5"}, r"\boxed{" * 20_000),
        ({"answer": "5"}, "{" * 30_000 + "}" * 30_000),
        ({"answer": "5 (feet)"}, r"\boxed{5" + " " * 19_900 + "yards}"),
        ({"answer": "5 (feet)"}, r"\boxed{5}" + " " * 20_000),
        ({"answer": "5 (feet)"}, r"\boxed{" + "5 " * 900 + "}"),
        (olympiad("$(2,4)$", "Tuple"), r"\boxed{" + "(9^{9^{9^9}},4)," * 20 + "(2,4)}"),
        (olympiad("$(2,4), (3,5)$", "Tuple"), r"\boxed{" + f"({INTEGRAL}, 4)," * 20 + "(2,4)}"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_no_output_takes_longer_than_the_limit_for_all_of_it(fields, output):
    began = time.monotonic()
    assert not grade(gold_of(fields), output).correct
    assert time.monotonic() - began < TOTAL_SECONDS + 3 * SECONDS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_strikes_where_python_drops_exceptions_strikes_again(monkeypatch):
    monkeypatch.setattr(trainer.grading.mathematics, "SECONDS", 1)
    over = time.monotonic() + 3

    def collecting(phase, info):
        while over - 2.5 < time.monotonic() < over:
            pass

    gc.callbacks.append(collecting)
    try:
        assert not grade(gold_of(olympiad("$(2,4)$", "Tuple")), rf"\boxed{{({INTEGRAL}, 4)}}").correct
    finally:
        gc.callbacks.remove(collecting)
    assert over < time.monotonic() < over + 3 * SECONDS


def test_the_limit_gives_another_timer_back():
    """As pytest-timeout's, whose handler is there again too."""
    told = []
    before = signal.signal(signal.SIGALRM, lambda *_: told.append("late"))
    others = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        began = time.monotonic()
        assert grade(Gold("5"), r"\boxed{5.0}").correct
        assert told or 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.5
        while not told and time.monotonic() < began + 5:
            time.sleep(0.01)
        assert told == ["late"]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


def test_a_set_that_cannot_be_computed_in_time_is_wrong(monkeypatch):
    monkeypatch.setattr(trainer.grading.mathematics, "SECONDS", 1)
    began = time.monotonic()
    assert not grade(gold_of(olympiad("$(0, 1)$", "Interval")), rf"\boxed{{{HARD_SET}}}").correct
    assert time.monotonic() - began < 4 * SECONDS


def test_when_the_time_for_all_of_it_is_over_an_answer_is_wrong(monkeypatch):
    assert grade(Gold("5"), r"\boxed{5.0}").correct
    monkeypatch.setattr(trainer.grading.mathematics, "TOTAL_SECONDS", -1)
    assert not grade(Gold("5"), r"\boxed{5.0}").correct


GOLDS = (
    {"answer": "18"},
    {"answer": "9 (inches)"},
    {"answer": "3:30 p.m."},
    {"answer": "Mrs. Hilt"},
    solution(r"$\boxed{3.3e12}$ m/s."),
    solution(r"\boxed{x^2-2x+1}", level="1"),
    olympiad("$(1,1), (3,2)$", "Tuple"),
    olympiad(r"$[\frac{1}{2}, 8]$", "Interval"),
    CHOICES,
)
LATEX = (
    r"\frac{",
    r"\sqrt{",
    r"\boxed{",
    r"\text{",
    "^{",
    r"\infty",
    r"\cup",
    r"\pm",
    r"\%",
    "10^{99}",
    "e9",
    "½",
    "π",
    "😀",
)
PIECES = (*string.printable, *LATEX)


def test_random_strings_neither_crash_nor_hang():
    rng, slowest = random.Random(7), 0.0
    for index in range(300):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 60)))
        output = (text, rf"\boxed{{{text}}}", f"The answer is {text}")[index % 3]
        began = time.monotonic()
        verdict = grade(gold_of(GOLDS[index % len(GOLDS)]), output)
        slowest = max(slowest, time.monotonic() - began)
        assert verdict.correct in (True, False) and len(verdict.extracted) <= 200
    assert slowest < 4 * SECONDS


PUBLISHED = ("gsm8k_test", "svamp", "asdiv", "minerva_math", "mmlu_stem", "olympiadbench")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the benchmarks' files are not at {SHARED_DATA}")
@pytest.mark.parametrize("count", [30, pytest.param(None, marks=pytest.mark.long)], ids=["some", "all"])
@pytest.mark.parametrize("file", PUBLISHED)
def test_gold_answers_of_the_published_files_are_read_and_equal_themselves_and_nothing_else(file, count):
    golds = [gold_answer(row) for row in read_problems(str(SHARED_DATA / f"{file}.jsonl"))]
    for gold in random.Random(7).sample(golds, count) if count else golds:
        assert grade(gold, rf"Hence it is $\boxed{{{gold.text.strip('$')}}}$.").correct, gold
        assert not grade(gold, r"Hence it is \boxed{-7919.5}.").correct, gold
