"""Problem sets: the field names that data sets use, and rows that cannot be problems."""

import gzip
import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client.errors import ProblemSetError
from client.problems.problem_set import ProblemSet
from client.problems.reader import read_problem_set, read_problems
from client.protocol.requests import Problem

SHUFFLED = ["11", "44", "37", "3", "20"]


def identity_of(path):
    return read_problem_set(path).identity()


def written(tmp_path, *rows, name="problems.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(file)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"question": "How many?"}, "How many?"),
        ({"problem": "Find x.", "solution": "…"}, "Find x."),
        ({"input": "Say."}, "Say."),
        ({"Body": "Seven apples. ", "Question": "How many?"}, "Seven apples. How many?"),
        ({"body": "Seven apples.", "question": "How many?"}, "Seven apples. How many?"),
    ],
)
def test_the_question_is_found_under_its_usual_names(tmp_path, row, question):
    (problem,) = read_problems(written(tmp_path, row))
    assert problem.question == question and problem.row == row


def test_ids_are_kept_or_made_from_the_question(tmp_path):
    path = written(
        tmp_path, {"id": 7, "question": "a"}, {"question": "b"}, {"question": "b"}, {"id": "x", "question": "b"}
    )
    ids = [problem.id for problem in read_problems(path)]
    assert ids[0] == "7" and len(ids[1]) == 16 and ids[2:] == ["x"]  # the same question without an id is read once


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"problems\.jsonl:2: not a JSON object"),
        ("[1]", r"problems\.jsonl:2: a JSON list, not an object"),
        ({"text": "q"}, r"problems\.jsonl:2: no question; .* it has text"),
        ({"question": "  "}, r"1 row \(.*problems\.jsonl:2\) without a question; remove"),
        ({"question": None}, r"1 row \(.*problems\.jsonl:2\) without a question; remove"),
        ({"Body": "", "Question": "q"}, r"1 row \(.*problems\.jsonl:2\) without a question; remove"),
        (
            {"question": "x" * 4_000_001},
            r"problems\.jsonl:2: 'question' has 4,000,001 characters.* shorten",
        ),
        ({"id": "x" * 513, "question": "q"}, r"problems\.jsonl:2: 'id' has 513 characters"),
        ({"question": 5}, r"problems\.jsonl:2: 'question' is 5"),
        ({"id": [1], "question": "q"}, r"problems\.jsonl:2: 'id' is \[1\]"),
        (
            {"Body": "x" * 2_000_000, "Question": "y" * 2_000_000},
            r"problems\.jsonl:2: 'Body' and 'Question' together have 4,000,001 characters.* shorten",
        ),
        ({"id": "first", "question": "q"}, r":2: id 'first' is already used .* at .*problems\.jsonl:1"),
    ],
)
def test_a_row_that_is_no_problem_is_named_by_file_and_line(tmp_path, row, said):
    with pytest.raises(ProblemSetError, match=said):
        read_problems(written(tmp_path, {"id": "first", "question": "p"}, row))


@pytest.mark.parametrize(
    "value", [["long"] * 100_000, {"long" * 100_000: 1}, [["x" * 50_000] * 9] * 9], ids=["list", "name", "nested"]
)
@pytest.mark.parametrize("field", ["question", "id"])
def test_a_value_that_is_no_text_is_named_and_not_told_whole(tmp_path, field, value):
    said = f"problems.jsonl:1: '{field}' is .*(…|\\.\\.\\.).*; it must be a string"
    with pytest.raises(ProblemSetError, match=said) as caught:
        read_problems(written(tmp_path, {"question": "q", field: value}))
    assert len(str(caught.value)) < len(str(tmp_path)) + 200


def test_a_value_that_is_nested_deeper_than_python_bears_is_named(tmp_path):
    row = f'{{"question": {"[" * 1000}{"]" * 1000}}}'
    with pytest.raises(ProblemSetError, match=r"problems\.jsonl:1: 'question' is \[\[.*it must be a string"):
        read_problems(written(tmp_path, row))


def test_names_of_fields_are_not_told_without_end(tmp_path):
    with pytest.raises(ProblemSetError, match=r"it has a, b, x+…\. --question-field") as caught:
        read_problems(written(tmp_path, {"a": 1, "b": 2, "x" * 100_000: 3}))
    assert len(str(caught.value)) < len(str(tmp_path)) + 500


def test_a_line_that_is_no_json_is_named_by_one_line_number_and_the_column(tmp_path):
    for line, column in (('{"question": "ab" x}', 19), ('{"question": "é日" x}', 19), ('{"question": "q"', 18)):
        with pytest.raises(ProblemSetError) as caught:
            read_problems(written(tmp_path, {"question": "q"}, line))
        said = str(caught.value).removeprefix(str(tmp_path))
        assert re.match(rf"/problems\.jsonl:2: not a JSON object \(unexpected [^0-9]*, column {column}\); ", said)


@pytest.mark.parametrize(
    ("encoding", "question"),
    [("latin-1", "Combien coûte un café?"), ("utf-16-le", "Combien coûte un café?")]
    + [(encoding, "How many?") for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")],
)
def test_a_file_that_is_not_utf_8_is_told_so(tmp_path, encoding, question):
    (tmp_path / "p.jsonl").write_bytes(f'{{"question": "{question}"}}\n'.encode(encoding))
    with pytest.raises(ProblemSetError, match=r"p\.jsonl:1: (not in UTF-8|holds NUL bytes).*; the file must be"):
        read_problems(str(tmp_path / "p.jsonl"))


def test_every_empty_row_is_counted_and_the_first_are_named(tmp_path):
    rows = [{"question": ""}] * 6
    with pytest.raises(ProblemSetError, match=r"6 rows \((\S+jsonl:\d, ){5}…\) without a question"):
        read_problems(written(tmp_path, {"question": "a"}, *rows))


def test_problems_that_come_again_are_named_and_read_once(tmp_path):
    said = []
    rows = [{"question": "a"}, {"question": "b"}, {"question": "a"}, {"id": 1, "question": "a"}]
    path = written(tmp_path, *rows)
    assert [problem.where[-1] for problem in read_problems(path, tell=said.append)] == ["1", "2", "4"]
    assert len(said) == 1 and f"1 row ({path}:3 as {path}:1) that repeat" in said[0]


def test_a_question_field_may_be_named_and_then_no_other_is_looked_at(tmp_path):
    wrong = {"question": "wrong", "Body": "wrong", "Question": "too"}
    path = written(tmp_path, wrong | {"prompt": "the right one"}, {"prompt": "another"})
    assert [row.question for row in read_problems(path, question_field="prompt")] == ["the right one", "another"]
    with pytest.raises(ProblemSetError, match=r":2: no question; expected 'question'; it has prompt"):
        read_problems(path, question_field="question")


def test_a_shuffled_set_depends_on_the_seed_and_not_on_the_files_order(tmp_path):
    rows = [{"id": index, "question": f"What is {index}?"} for index in range(50)]
    path = written(tmp_path, *rows)
    forward = [row.id for row in read_problems(path, shuffle=1)]
    assert forward == [row.id for row in read_problems(written(tmp_path, *rows[::-1], name="b.jsonl"), shuffle=1)]
    assert sorted(forward, key=int) == [str(index) for index in range(50)] != forward
    assert forward != [row.id for row in read_problems(path, shuffle=2)]
    drawn = [row.id for row in read_problems(path, 10, shuffle=1)]
    assert drawn == forward[:10] and max(map(int, drawn)) > 10
    # what a seed gives must never change: clients of other versions fill the same RUN
    assert forward[:5] == SHUFFLED


def test_limit_takes_the_first_and_looks_no_further(tmp_path):
    path = written(tmp_path, {"question": "a"}, {"question": "b"}, "not json")
    assert [problem.question for problem in read_problems(path, limit=2)] == ["a", "b"]


def test_gzip_and_parquet_hold_the_same_problems(tmp_path):
    rows = [{"id": "1", "question": "a"}, {"id": "2", "question": "b"}]
    plain = identity_of(written(tmp_path, *rows))
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.jsonl.gz", "p.parquet"):
        assert identity_of(str(tmp_path / name)) == plain
        assert identity_of((tmp_path / name).as_uri()) == plain


def test_identity_depends_on_content_and_not_on_order(tmp_path):
    a, b = {"id": "1", "question": "a"}, {"id": "2", "question": "b"}
    forward = identity_of(written(tmp_path, a, b))
    assert forward == identity_of(written(tmp_path, b, a)) and forward.count == 2
    assert forward.digest != identity_of(written(tmp_path, a, {**b, "question": "c"})).digest


def test_identity_of_plain_questions_stays_what_it_was_and_token_ids_enter_it():
    """RUNs that exist must still be joined; and two problems that differ in their ids alone are two problems."""
    asked = Problem(id="1", question="a")
    assert ProblemSet.of([asked]).identity().digest == hashlib.sha256(b'[["1","a"]]').hexdigest()
    others = [
        Problem(id="1", question="a", token_ids=[5]),
        Problem(id="1", prompt_token_ids=[5]),
        Problem(id="1", prompt_token_ids=[5], token_ids=[6]),
    ]
    assert len({ProblemSet.of([problem]).identity().digest for problem in (asked, *others)}) == 4


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ProblemSetError, match="holds no problem"):
        read_problems(str(tmp_path / "empty.jsonl"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    for name in ("missing.jsonl", "broken.jsonl.gz", "broken.parquet"):
        with pytest.raises(ProblemSetError, match=name):
            read_problems(str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a"}\n')
    assert [problem.question for problem in read_problems(str(tmp_path / "bom.jsonl"))] == ["a"]


def test_every_benchmark_file_is_read(shared_data):
    files = [file for file in sorted(shared_data.glob("*.jsonl")) if file.name != "grader_cases.jsonl"]
    counts = {file.name: len(read_problems(str(file))) for file in files}
    assert len(counts) == 7 and counts["gsm8k_train.jsonl"] == 7473 and counts["gsm8k_test.jsonl"] == 1319
