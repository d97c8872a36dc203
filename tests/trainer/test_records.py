"""Records of an evaluation: kept, taken up again, and refused where they are of another."""

import json
import resource

import pytest

from client.errors import LightReasonerError
from trainer.evaluation.records import Record, Records

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


def test_benchmarks_that_differ_are_named_and_not_shown_as_digests(tmp_path):
    Records(tmp_path / "r.jsonl", {**ABOUT, "benchmarks": {"math": "1f", "svamp": "2f"}}).close()
    with pytest.raises(LightReasonerError, match=r"benchmark svamp has changed .*--limit") as refused:
        Records.check(tmp_path / "r.jsonl", {**ABOUT, "benchmarks": {"math": "1f", "svamp": "3f"}})
    assert "math" not in str(refused.value) and "3f" not in str(refused.value)
    Records.check(tmp_path / "none.jsonl", ABOUT)
    assert not (tmp_path / "none.jsonl").exists()


def test_what_a_crash_of_the_machine_left_at_the_end_is_dropped(tmp_path):
    file = tmp_path / "r.jsonl"
    records = Records(file, ABOUT)
    records.add([record()])
    records.close()
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"model": "ba' + bytes(100))
    Records(file, ABOUT).close()
    assert file.read_bytes() == whole


def test_only_one_process_writes_a_file(tmp_path):
    first = Records(tmp_path / "r.jsonl", ABOUT)
    with pytest.raises(LightReasonerError, match="being written by another"):
        Records(tmp_path / "r.jsonl", ABOUT)
    first.add([record()])
    first.close()
    second = Records(tmp_path / "r.jsonl", ABOUT)
    assert len(second) == 1
    second.close()


def test_a_disk_that_is_full_costs_what_does_not_fit_and_nothing_else(tmp_path):
    file = tmp_path / "r.jsonl"
    records = Records(file, ABOUT)
    records.add([record()])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 40, before[1]))
    try:
        with pytest.raises(LightReasonerError, match=r"cannot be written: File too large.*resumes"):
            records.add([record(number=1)])
        records.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Records(file, ABOUT)
    assert len(again) == 1
    again.add([record(number=1)])
    again.close()
    assert len(Records.read(file)) == 2


def test_a_folder_is_no_file_of_records(tmp_path):
    for use in (Records, Records.check):
        with pytest.raises(LightReasonerError, match=r"cannot be .*Is a directory"):
            use(tmp_path, ABOUT)


FOREIGN = ["what is this?\n", '{"a": 1}\n', "[]\n", '{"evaluation": 3}\n', '{"question": "on one line"}', "x",
           json.dumps(vars(record())) + "\n"]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
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
