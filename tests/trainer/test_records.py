"""Records of an evaluation: kept, taken up again, and refused where they are of another."""

import json

import pytest

from client.errors import LightReasonerError
from trainer.records import Record, Records

ABOUT = {"base": "b", "adapters": {"one": "1"}, "max_tokens": 8}


def record(model="base", number=0, sample=0):
    return Record(model, "demo", number, f"p{number}", sample, "q?", "It is é.\n7", "7", "7", True)


def test_records_come_back_in_order_whatever_order_they_came_in(tmp_path):
    records = Records(tmp_path / "r.jsonl", ABOUT)
    records.add([record(number=1), record(number=0, sample=1), record(number=0), record("one")])
    records.close()
    again = Records(tmp_path / "r.jsonl", ABOUT)
    assert again.of("base", "demo") == [[record(), record(sample=1)], [record(number=1)]]
    assert len(again) == 4 and ("one", "demo", 0, 0) in again and ("one", "demo", 1, 0) not in again
    again.close()
    assert Records.read(tmp_path / "r.jsonl").of("one", "demo") == [[record("one")]]


def test_a_line_that_was_cut_is_dropped_and_what_comes_then_is_whole(tmp_path):
    file = tmp_path / "r.jsonl"
    records = Records(file, ABOUT)
    records.add([record(number=0), record(number=1)])
    records.close()
    for cut in (1, 5, 100):
        file.write_bytes(file.read_bytes()[:-cut])
        again = Records(file, ABOUT)
        assert len(again) == 1
        again.add([record(number=1)])
        again.close()
        assert all(json.loads(line) for line in file.read_text().splitlines()) and len(Records.read(file)) == 2
    file.write_text('{"evaluation": {"ba')  # not even the first line was whole
    Records(file, ABOUT).close()
    assert json.loads(file.read_text())["evaluation"] == ABOUT


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({**ABOUT, "max_tokens": 9}, "max_tokens 8 there, 9 now"),
        ({**ABOUT, "base": "c"}, "base 'b' there"),
        ({**ABOUT, "adapters": {"one": "2"}}, "adapter one '1' there, '2' now"),
        ({**ABOUT, "new": True}, "new None there, True now"),
    ],
)
def test_records_of_another_evaluation_are_refused_naming_the_difference(tmp_path, about, named):
    Records(tmp_path / "r.jsonl", ABOUT).close()
    before = (tmp_path / "r.jsonl").read_bytes()
    with pytest.raises(LightReasonerError, match=named):
        Records(tmp_path / "r.jsonl", about)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_adapters_may_be_added_and_left_out(tmp_path):
    file = tmp_path / "r.jsonl"
    for adapters in ({"one": "1"}, {"two": "2"}, {"one": "1", "two": "2"}, {}):
        Records(file, {**ABOUT, "adapters": adapters}).close()
    with pytest.raises(LightReasonerError, match="adapter two"):
        Records(file, {**ABOUT, "adapters": {"two": "3"}})
    assert file.read_text().count("evaluation") == 2


@pytest.mark.parametrize("text", ["what is this?\n", '{"a": 1}\n', "[]\n", '{"evaluation": 3}\n'])
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path, text):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(LightReasonerError, match="holds no evaluation"):
        Records(tmp_path / "r.jsonl", ABOUT)
    assert (tmp_path / "r.jsonl").read_text() == text


def test_without_a_file_they_are_kept_in_memory():
    records = Records(None, ABOUT)
    records.add([record()])
    assert records.of("base", "demo") == [[record()]]
    records.close()
