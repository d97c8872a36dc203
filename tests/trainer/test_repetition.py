"""Outputs that repeat themselves without end: how much of them is searched, and what they say."""

import pytest

from trainer.grading import mathematics, said
from trainer.grading.gold import Gold, Kind
from trainer.grading.grader import grade

SEARCHING = ("_masked", "runs", "split_sentences", "_last_before_formulas")
LOOPS = [
    ("So the answer is 18. ", True),
    ("She has 18 = 18. ", True),
    ("It is 18, so ", False),
    ("The answer: ", False),
    ("is 18 or ", False),
    ("she is in ", False),
    ("A is ", False),
]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """No verdict is one of the clock's."""
    monkeypatch.setattr(mathematics, "SECONDS", 600)
    monkeypatch.setattr(mathematics, "TOTAL_SECONDS", 600)


@pytest.fixture
def searched(monkeypatch):
    """Call it with an output: how many characters are searched for sentences and formulas, and how often it is read."""
    work = []

    def counting(function):
        def counted(*given):
            work.append(sum(len(one) for one in given if isinstance(one, str)))
            return function(*given)

        return counted

    for name in SEARCHING:
        monkeypatch.setattr(said, name, counting(getattr(said, name)))

    def count(output):
        work.clear()
        readings = len(list(said.answers(output, 1)))
        return sum(work), readings

    return count


@pytest.mark.parametrize(("loop", "right"), LOOPS)
def test_twice_as_long_a_loop_is_twice_the_work(loop, right, searched):
    short, _ = searched(loop * 200)
    long, readings = searched(loop * 400)
    assert long < 2.2 * short and readings < 20
    assert grade(Gold("18"), loop * 400).correct == right


@pytest.mark.parametrize(
    ("loop", "right"), [("So the answer is D. ", True), ("The answer is D and ", False), ("A is ", False)]
)
def test_a_loop_names_the_letter_that_it_says_last(loop, right):
    gold = Gold("D", Kind.CHOICE, choices=("red", "green", "blue", "black"))
    assert grade(gold, loop * 900).correct == right
