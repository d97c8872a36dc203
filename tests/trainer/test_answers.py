"""Gold answers as data sets write them, and questions as they are put."""

import pytest

from client.errors import ProblemSetError
from client.problems.reader import ProblemRow
from trainer.grading.gold import Gold, Kind, gold_answer, last_box, question_of, with_fields


def row(**fields):
    return ProblemRow("p", "q", fields, "file.jsonl:3")


def minerva(solution):
    return {"problem": "p", "type": "Introduction to Astronomy", "solution": solution}


@pytest.mark.parametrize(
    ("fields", "gold"),
    [
        ({"answer": "He makes 9 * 2 = $<<9*2=18>>18.\n#### 18"}, Gold("18")),  # GSM8K
        ({"answer": "#### 1,080"}, Gold("1,080")),
        ({"Answer": 145.0}, Gold("145.0")),  # SVAMP
        ({"answer": "9 (apples)"}, Gold("9", unit="apples")),  # ASDiv
        ({"answer": "3:30 p.m."}, Gold("3:30 p.m.", Kind.CLOCK)),
        ({"answer": "Mrs. Hilt"}, Gold("Mrs. Hilt", Kind.WORDS)),
        ({"answer": "f(2)"}, Gold("f(2)")),
        ({"answer": 0}, Gold("0")),
        ({"answer": "2(x+y)"}, Gold("2(x+y)")),
        ({"answer": "x^2(a+b)"}, Gold("x^2(a+b)")),
        ({"answer": "5(a)"}, Gold("5(a)")),
        (
            {
                "problem": "p",
                "level": "Level 5",
                "type": "Algebra",
                "solution": r"So \boxed{1}, no, \boxed{\frac{1}{2}}.",
            },
            Gold(r"\frac{1}{2}"),
        ),  # MATH
        ({"problem": "p", "level": "Level 5", "solution": r"It is $\boxed{(1, 2)}$."}, Gold("(1, 2)", Kind.TUPLE)),
        ({"problem": "p", "level": "Level 5", "solution": r"It is $\boxed{[1, 2)}$."}, Gold("[1, 2)", Kind.INTERVAL)),
        (minerva(r"\[ s=\boxed{1.6} \mathrm{~cm} \]"), Gold("1.6", unit=r"\mathrm{~cm} ", relative=0.01)),
        (minerva(r"$\boxed{3.3e12}$ m/s."), Gold("3.3e12", unit="m/s", relative=0.01)),
        (minerva(r"$\boxed{-10}$."), Gold("-10")),
        ({"answer_type": "Numerical", "final_answer": [r"$\frac{1}{2}$"]}, Gold(r"$\frac{1}{2}$")),  # OlympiadBench
        (
            {"answer_type": "Numerical", "final_answer": ["4.2"], "unit": "%", "error": "1e-1"},
            Gold("4.2", unit="%", absolute=0.1),
        ),
        ({"answer_type": "Tuple", "final_answer": ["(6,5)"]}, Gold("(6,5)", Kind.TUPLE)),
        ({"choices": ["a", "b"], "answer": 1}, Gold("B", Kind.CHOICE, choices=("a", "b"))),  # MMLU
        ({"choices": ["a", "b"], "answer": "A"}, Gold("A", Kind.CHOICE, choices=("a", "b"))),
    ],
)
def test_a_gold_answer_is_found(fields, gold):
    assert gold_answer(row(**fields)) == gold


@pytest.mark.parametrize(
    "fields",
    [{}, {"answer": None}, {"answer": ""}, {"answer": "He thinks. ####"}, {"answer": True}, minerva("It is 3.")],
)
def test_a_row_without_an_answer_is_named_by_file_and_row(fields):
    with pytest.raises(ProblemSetError, match=r"file\.jsonl:3: no answer") as refused:
        gold_answer(row(**fields))
    assert ("give evaluate --answer-field NAME" in str(refused.value)) == (
        not any(fields.values()) and "" not in fields.values()
    )


def test_a_solution_without_a_box_names_the_option_that_reads_it_as_it_is():
    with pytest.raises(ProblemSetError) as refused:
        gold_answer(plain := row(solution="25"))
    assert str(refused.value) == (
        r"file.jsonl:3: no answer: 'solution' is read for a \boxed{}, as MATH has it, and '25' has none; if that is"
        " the answer, rename the field to answer, or give evaluate --answer-field solution"
    )
    assert gold_answer(with_fields(plain, None, "solution")) == Gold("25")


@pytest.mark.parametrize(
    ("choices", "answer"),
    [(["a", "b"], 2), (["a", "b"], -1), (["a", "b"], "C"), (["a"], 0), ("ab", 0), (["a", "b"], True)],
)
def test_choices_that_do_not_hold_the_answer_are_named_by_file_and_row(choices, answer):
    with pytest.raises(ProblemSetError, match=r"file\.jsonl:3: a question with choices"):
        gold_answer(row(choices=choices, answer=answer))


def test_a_question_is_asked_with_its_choices():
    asked = question_of(ProblemRow("p", "Which?", {"choices": ["one", "two"], "answer": 0}, "f:1"))
    assert asked == "Which?\n(A) one\n(B) two\nAnswer with the letter of the right choice."
    assert question_of(ProblemRow("p", "Which?", {"answer": 0}, "f:1")) == "Which?"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{3} cm", ("3", " cm")),
        (r"\boxed{1}\boxed{2}", ("2", "")),
        (r"\boxed{\frac{1}{2}}.", (r"\frac{1}{2}", ".")),
        (r"\boxed{4} and \boxed{}", ("4", r" and \boxed{}")),
        (r"\boxed{4} and \boxed{5", ("4", r" and \boxed{5")),
        (r"\fbox{4}", None),
        ("4", None),
    ],
)
def test_the_last_box_that_is_closed_counts(text, box):
    assert last_box(text) == box
