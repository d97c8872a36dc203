"""Benchmark files: every row is asked whole, once, and by the rules of its own benchmark; or it is refused."""

import json

import pytest
from support.servers.real_server import SHARED_DATA

from client.errors import ProblemSetError
from trainer.adapters.model_folder import ModelFolder
from trainer.evaluation.benchmarks import read_benchmark
from trainer.grading.gold import Gold, Kind
from trainer.settings import Examination


@pytest.fixture(scope="module")
def model(expert):
    return ModelFolder.find(str(expert))


@pytest.fixture
def read(tmp_path, model):
    def reading(*rows, tell=lambda _: None, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_benchmark("it", str(file), model, Examination(**settings), tell).questions

    return reading


def choices(*texts, answer=0, question="Which?"):
    return {"question": question, "choices": list(texts), "answer": answer}


def test_one_question_with_other_choices_is_another_problem(read):
    told = []
    found = read(choices("1", "2"), choices("3", "4"), choices("1", "2"), tell=told.append)
    assert [question.gold.choices for question in found] == [("1", "2"), ("3", "4")]
    assert len({question.id for question in found}) == 2
    assert len(told) == 1 and "rows.jsonl:3 as " in told[0]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the benchmarks' files are not at {SHARED_DATA}")
def test_of_mmlu_stem_only_rows_that_repeat_another_are_left_out(model):
    file, told = SHARED_DATA / "mmlu_stem.jsonl", []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    different = {(row["question"], tuple(row["choices"])) for row in rows}
    found = read_benchmark("mmlu", str(file), model, Examination(), told.append).questions
    assert len(found) == len({question.id for question in found}) == len(different)
    assert told and f"{len(rows) - len(different)} rows" in told[0]


OTHERS = [
    {"question": "q", "options": ["1", "2"], "answer": "B"},
    {"question": "q", "A": "1", "B": "2", "answer": "B"},
    {"question": "q", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": "q", "passage": "It was cold.", "answer": "5"},
    {"problem": "p", "solution": r"\boxed{5}", "distractors": ["6"]},
]


@pytest.mark.parametrize("row", OTHERS, ids=str)
def test_a_row_of_another_shape_is_refused_with_the_fields_seen(read, row):
    with pytest.raises(ProblemSetError, match=r"rows\.jsonl:1: not a row of a known benchmark") as refused:
        read(row)
    assert all(name in str(refused.value) for name in (*row, "--question-field", "--choices-field", "--answer-field"))


@pytest.mark.parametrize(
    ("row", "names", "gold"),
    [
        (OTHERS[0], {"choices_field": "options"}, Gold("B", Kind.CHOICE, choices=("1", "2"))),
        (OTHERS[2], {"choices_field": "choices", "answer_field": "answerKey"},
         Gold("B", Kind.CHOICE, choices=("1", "2"))),
        (
            {"text": "q", "o": ["A)21", "B)22"], "correct": "B"},
            {"question_field": "text", "choices_field": "o", "answer_field": "correct"},
            Gold("B", Kind.CHOICE, choices=("21", "22")),
        ),
        ({"question": "q", "o": ["x", "y"], "right": "y"}, {"choices_field": "o", "answer_field": "right"},
         Gold("B", Kind.CHOICE, choices=("x", "y"))),
        (OTHERS[3], {"answer_field": "answer"}, Gold("5")),
        ({"text": "q", "answer": "#### 5"}, {"question_field": "text"}, Gold("5")),
        ({"question": "q", "target": r"It is \boxed{\frac{1}{2}}."}, {"answer_field": "target"}, Gold(r"\frac{1}{2}")),
    ],
)  # fmt: skip
def test_named_fields_are_read(read, row, names, gold):
    (question,) = read(row, **names)
    assert question.gold == gold
    assert all(f"({letter}) {choice}" in question.text for letter, choice in zip("AB", gold.choices, strict=False))


def test_a_named_field_that_is_not_there_is_named(read):
    with pytest.raises(ProblemSetError, match=r"rows\.jsonl:1: no 'options'; it has question, answer"):
        read({"question": "q", "answer": "5"}, choices_field="options")


def test_minervas_tolerance_is_for_its_own_rows(read):
    minerva = {"problem": "p", "type": "Astronomy", "solution": r"\boxed{1.6}", "idx": 3}
    assert read(minerva)[0].gold.relative == 0.01
    assert read(minerva | {"source": "elsewhere"})[0].gold.relative == 0
