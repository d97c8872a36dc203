"""Gold answers as data sets write them, and verdicts on outputs."""

import pytest

from client.errors import ProblemSetError
from client.problems import ProblemRow
from trainer.answers import gold_answer, is_correct


def row(**fields):
    return ProblemRow("p", "q", fields, "file.jsonl:3")


@pytest.mark.parametrize(
    ("fields", "gold"),
    [
        ({"answer": "He makes 9 * 2 = $<<9*2=18>>18.\n#### 18"}, "18"),  # GSM8K
        ({"answer": "#### 1,080"}, "1,080"),
        ({"Answer": 145.0}, "145.0"),  # SVAMP
        ({"answer": "9 (apples)"}, "9"),  # ASDiv
        ({"answer": "f(2)"}, "f(2)"),
        ({"final_answer": ["$\\frac{1}{2}$"]}, "$\\frac{1}{2}$"),  # OlympiadBench
        ({"answer": 0}, "0"),
        ({"answer": "2(x+y)"}, "2(x+y)"),
        ({"answer": "x^2(a+b)"}, "x^2(a+b)"),
        ({"answer": "5(a)"}, "5(a)"),
    ],
)
def test_a_gold_answer_is_found_and_equals_itself(fields, gold):
    assert gold_answer(row(**fields)) == gold
    assert is_correct(gold, rf"So it is \boxed{{{gold.strip('$')}}}.")


def test_multiple_choice_is_refused_as_long_as_it_is_not_graded():
    with pytest.raises(ProblemSetError, match=r"file\.jsonl:3: a question with choices"):
        gold_answer(row(answer=2, choices=["a", "b", "c"]))


@pytest.mark.parametrize("fields", [{}, {"answer": None}, {"answer": ""}, {"answer": "He thinks. ####"}])
def test_a_row_without_an_answer_is_named_by_file_and_row(fields):
    with pytest.raises(ProblemSetError, match=r"file\.jsonl:3: no answer"):
        gold_answer(row(**fields))


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("34", "12+5=17. 17*2=34. The answer is 34."),
        ("145.0", "The answer is 145."),
        ("1,080", r"\boxed{1080}"),
        ("0.5", r"That makes \boxed{\frac{1}{2}}."),
        ("$\\frac{1}{2}$", "The answer is 1/2."),
        ("18", r"She makes \boxed{\$18} a day."),
        ("6", "The answer is 5. No: the answer is 6."),
        ("4", r"\boxed{3}. No, \boxed{4}."),
        ("4", r"The answer is 3. No, \boxed{4}."),
        ("4", r"The answer is 4. \boxed{"),
        ("4", r"\boxed{4} and then \boxed{}"),
        ("-3", "The answer is \N{MINUS SIGN}3."),
        ("\N{MINUS SIGN}3", r"\boxed{-3}"),
    ],
)
def test_equal_answers_are_right_however_they_are_written_and_the_last_one_counts(gold, output):
    assert is_correct(gold, output)


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("34", "The answer is 35."),
        ("34", "The answer is -34."),
        ("34", "I do not know."),
        ("34", ""),
        ("34", r"\boxed{"),
        ("3", "The answer is \N{MINUS SIGN}3."),
        ("2(x+y)", r"\boxed{2}"),
        ("6", r"\boxed{5} is wrong. The answer is 6."),  # a box is the answer, whatever is said after it
        ("5", "The answer is 5. No: the answer is 6."),
        ("3", r"\boxed{3}. No, \boxed{4}."),
        ("0.33", r"\boxed{\frac{1}{3}}"),
        ("5", r"\boxed{x^{y^{z}}{{{"),
        ("5", "\\boxed{\x00\ud7ff∫∑}}}"),
    ],
)
def test_other_answers_and_rubbish_are_wrong(gold, output):
    assert not is_correct(gold, output)


def test_an_answer_that_cannot_be_computed_in_time_is_wrong():
    assert not is_correct("5", r"\boxed{9^{9^{9^9}}}")
