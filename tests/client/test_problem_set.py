"""Sets of problems and of keys: what they hold, in which order, and that they are small."""

import tracemalloc

import pytest

from client.errors import ProblemSetError
from client.problems.problem_set import ProblemSet
from client.problems.reader import read_problem_set
from client.protocol.requests import Problem
from client.runs.keys import Keys
from client.sampling.shards import keys_of

ASKED = [
    Problem(id="b", question="B?"),
    Problem(id="a", prompt_token_ids=[1, 2]),
    Problem(id="c", question="C?", token_ids=[3]),
]


def test_problems_come_back_whole_and_in_order():
    problems = ProblemSet.of(ASKED)
    assert list(problems) == ASKED and len(problems) == 3 and list(problems.ids) == ["b", "a", "c"]
    assert [problems.question(name) for name in "abc"] == [None, "B?", "C?"]
    assert list(problems.only({"c", "b"}.__contains__)) == [ASKED[0], ASKED[2]]
    assert list(keys_of(problems, 2)) == [("b", 0), ("b", 1), ("a", 0), ("a", 1), ("c", 0), ("c", 1)]
    with pytest.raises(ProblemSetError, match="'b'"):
        ProblemSet.of([*ASKED, ASKED[0]])


def test_keys_are_a_set_of_problems_and_sample_indices():
    keys = Keys([("a", 0), ("b", 255), ("a", 3), ("a", 0)])
    assert keys == {("a", 0), ("a", 3), ("b", 255)} and len(keys) == 3 and keys.problems == 2
    assert not keys.add(("a", 3)) and keys.add(("a", 1)) and len(keys) == 4
    assert ("a", 1) in keys and ("a", 2) not in keys and ("c", 0) not in keys and "a" not in keys
    expected = Keys([("b", 1)], expected=["a", "b"])
    assert expected == {("b", 1)} and expected.problems == len(expected) == 1 and ("a", 0) not in expected
    assert keys - {("a", 0), ("a", 1)} == {("a", 3), ("b", 255)}


def test_a_problem_that_is_read_costs_little_more_than_its_texts(tmp_path):
    """Many are held for as long as a run takes: 230 bytes for these and 60 for a key, where objects take 800."""
    count = 20_000
    (tmp_path / "p.jsonl").write_text("".join(f'{{"question": "What is {index}?"}}\n' for index in range(count)))
    tracemalloc.start()
    problems = read_problem_set(str(tmp_path / "p.jsonl"))
    held = tracemalloc.get_traced_memory()[0]
    keys = Keys(keys_of(problems, 1))
    both = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(keys) == count and held < 300 * count and both - held < 80 * count
