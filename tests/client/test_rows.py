"""Rows of problem sets: files that are large, or grow when they are unpacked, buckets, Hugging Face data sets."""

import gzip
import json
import subprocess
import sys
from datetime import datetime
from decimal import Decimal

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.servers.real_server import ROOT

import client.problems.reader
import client.problems.rows
from client.errors import ProblemSetError, Stopped
from client.problems.reader import read_problem_set, read_problems
from client.storage.bucket import Bucket, BucketError

ROWS = [{"id": str(index), "question": f"What is {index}?", "answer": str(index)} for index in range(100)]


def jsonl(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(file, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.read_bytes()


def peak_megabytes(code):
    """The most memory that a process of its own held while it ran `code`, beyond what it held before."""
    script = f"""
import resource
from client.problems.reader import read_problem_set, read_problems
from client.errors import ProblemSetError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
{code}
print(peak() - before)
"""
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return int(said.stdout)


# Files that grow.


def test_a_parquet_file_is_unpacked_a_few_rows_at_a_time(tmp_path):
    """A few kilobytes that hold 3 GB: whoever wants two problems gets them for little."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 3_000_000]))
    table = pa.table({"id": [str(index) for index in range(1000)], "question": text})
    pq.write_table(table, tmp_path / "p.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "p.parquet").stat().st_size < 1_000_000
    peak = peak_megabytes(f"assert len(read_problems({str(tmp_path / 'p.parquet')!r}, 2)) == 2")
    assert peak < 400


def test_a_column_that_unpacks_to_more_than_is_borne_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(client.problems.rows, "MOST_COLUMN_BYTES", 1000)
    parquet(tmp_path / "p.parquet", [{"question": "x" * 2000}])
    with pytest.raises(ProblemSetError, match=r"p\.parquet: column 'question' of row group 0 .* smaller row groups"):
        read_problems(str(tmp_path / "p.parquet"))


def test_a_line_without_an_end_is_named_before_it_fills_the_memory(tmp_path):
    """Half a megabyte of gzip, 512 MB of one line."""
    with gzip.open(tmp_path / "p.jsonl.gz", "wb", 1) as file:
        file.write(b'{"question": "a"}\n')
        for _ in range(512):
            file.write(b"x" * 2**20)
    path = str(tmp_path / "p.jsonl.gz")
    code = f"""
try:
    read_problems({path!r})
    raise SystemExit("read")
except ProblemSetError as error:
    assert ".gz:2: longer than" in str(error), error
"""
    assert peak_megabytes(code) < 300


def test_more_questions_than_are_borne_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(client.problems.reader, "MOST_CHARACTERS", 500)
    (tmp_path / "p.jsonl").write_bytes(jsonl())
    with pytest.raises(ProblemSetError, match=r"p\.jsonl:\d+: more than 500 characters of questions; split the set"):
        read_problems(str(tmp_path / "p.jsonl"))


# Columns.


def test_columns_that_name_no_problem_are_not_read_and_stand_in_nobodys_way(tmp_path):
    times = pa.array([2**62] * 2, pa.timestamp("ns"))  # beyond what Python's datetime holds
    table = pa.table({
        "id": [1, 2], "question": pa.array(["a", "b"]).dictionary_encode(), "made": times, "raw": [b"\xff", b""],
        "cost": [Decimal("1.5"), None], "day": [datetime(2026, 1, 1)] * 2, "answer": ["x", "y"], "choices": [["p"], []],
        "nested": [{"a": 1}, {"a": 2}], "deep": [[{"when": datetime(2026, 1, 1)}], []],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "p.parquet")
    rows = read_problems(str(tmp_path / "p.parquet"))
    assert [row.question for row in rows] == ["a", "b"]
    assert rows[0].row == {"id": 1, "question": "a", "answer": "x", "choices": ["p"], "nested": {"a": 1}}
    assert list(read_problem_set(str(tmp_path / "p.parquet"))) == [row.problem for row in rows]


def test_of_a_large_column_that_is_not_asked_for_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(client.problems.rows, "MOST_COLUMN_BYTES", 1000)
    parquet(tmp_path / "p.parquet", [{"question": "q", "answer": "x" * 2000}])
    path = str(tmp_path / "p.parquet")
    assert len(read_problem_set(path)) == 1
    with pytest.raises(ProblemSetError, match="column 'answer'"):
        read_problems(path)


@pytest.mark.parametrize("read", [read_problems, read_problem_set])
def test_where_no_column_is_the_question_those_that_are_there_are_named(tmp_path, read):
    table = pa.table({"prompt": ["q"], "answer": ["a"], "id": [1], "input": [b"q"]})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ProblemSetError, match=r":1: no question; .* it has answer, id, input \(binary\), prompt\. --q"):
        read(str(tmp_path / "p.parquet"))
    pq.write_table(table.select(["prompt", "answer"]), tmp_path / "p.parquet")
    with pytest.raises(ProblemSetError, match=r":1: no question; expected one of .* it has answer, prompt\. --q"):
        read(str(tmp_path / "p.parquet"))


def test_columns_are_named_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(client.problems.rows, "MOST_COLUMN_BYTES", 1000)
    parquet(tmp_path / "p.parquet", [{"prompt": "q", "answer": "x" * 2000}])
    with pytest.raises(ProblemSetError, match="it has answer, prompt"):
        read_problem_set(str(tmp_path / "p.parquet"))


# Being stopped.


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
def test_reading_ends_at_the_next_row_once_it_is_to_stop(tmp_path, name):
    file = tmp_path / name
    if name.endswith("parquet"):
        parquet(file)
    else:
        file.write_bytes(gzip.compress(jsonl()) if name.endswith("gz") else jsonl())
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) > 10

    with pytest.raises(Stopped, match=name):
        read_problems(str(file), stopped=stopped)
    assert len(asked) == 11


# Buckets.


@pytest.fixture
def in_bucket(bucket):
    def put(name, data):
        Bucket(bucket).put(name, data)
        return f"{bucket}/{name}"

    return put


def test_a_bucket_holds_problem_sets_of_every_kind(in_bucket, tmp_path):
    for name, data in (
        ("p.jsonl", jsonl()),
        ("p.jsonl.gz", gzip.compress(jsonl())),
        ("p.parquet", parquet(tmp_path / "p.parquet")),
    ):
        assert [row.row for row in read_problems(in_bucket(name, data))] == ROWS
    with pytest.raises(ProblemSetError, match=r"no problem set at .*missing\.jsonl"):
        read_problems(in_bucket("there", b"").replace("there", "missing.jsonl"))


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_an_object_is_read_in_ranges_and_no_further_than_is_needed(s3, tmp_path, monkeypatch, name):
    """Of some 12 MB."""
    rows = [{"id": str(index), "question": f"{index} " * 100, "answer": "ab" * index} for index in range(5000)]
    if name.endswith("parquet"):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, tmp_path / name, compression="none", use_dictionary=False, row_group_size=500)
    else:
        (tmp_path / name).write_bytes(jsonl(rows))
    size = (tmp_path / name).stat().st_size
    Bucket(s3).put(name, (tmp_path / name).read_bytes())
    read, readinto = [], client.storage.bucket._Ranges.readinto

    def counted(self, buffer):
        read.append(readinto(self, buffer))
        return read[-1]

    monkeypatch.setattr(client.storage.bucket._Ranges, "readinto", counted)
    monkeypatch.setattr(client.storage.bucket, "RANGE_BYTES", 2**18)
    assert len(read_problems(f"{s3}/{name}", 3)) == 3
    assert 0 < sum(read) < size / 5


def test_a_store_that_fails_while_it_is_read_is_named(s3, tmp_path, monkeypatch):
    for name, data in (("p.jsonl", jsonl()), ("p.parquet", parquet(tmp_path / "p.parquet"))):
        Bucket(s3).put(name, data)
        with monkeypatch.context() as changed:
            file = Bucket(s3).open(name)
            changed.setattr(Bucket, "open", lambda *_, file=file: file)
            obstore.delete(Bucket(s3)._open(for_writing=True), name)
            with pytest.raises(BucketError, match=f"cannot read {name} in {s3}: "):
                read_problems(f"{s3}/{name}")


# Hugging Face data sets, from a local folder: no hub can be reached where this is tested.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of two splits, as `datasets` takes it from a folder as from the Hub."""
    pytest.importorskip("datasets", reason="datasets is not installed: pip install 'lightreasoner[hub]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    made = tmp_path / "set"
    made.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:7])):
        timed = [row | {"at": datetime(2026, 1, 1)} for row in rows]
        pq.write_table(pa.Table.from_pylist(timed), made / f"{split}-00000-of-00001.parquet")
    return made


def test_a_hugging_face_data_set_is_read_by_its_name_and_split(folder):
    rows = read_problems(f"hf://{folder}", 5)
    assert [row.question for row in rows] == [row["question"] for row in ROWS[:5]]
    assert rows[0].row == ROWS[0] | {"at": datetime(2026, 1, 1)} and rows[4].where == f"hf://{folder}:5"
    assert len(read_problem_set(f"hf://{folder}?split=test")) == 7
    assert len(read_problems(f"hf://{folder}?config=default&split=train", shuffle=1)) == 100


@pytest.mark.parametrize("read", [read_problems, read_problem_set])
def test_a_data_set_without_a_question_is_told_its_columns(folder, read):
    with pytest.raises(ProblemSetError, match=r":1: no question; expected 'prompt'; it has answer, at, id, question\."):
        read(f"hf://{folder}", question_field="prompt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://{}?split=dev", r"split=dev cannot be read through datasets: .*dev"),
        ("hf://{}?splitt=dev", r"expected hf://NAME\?config=…&split=….* it has splitt"),
        ("hf://", r"it lacks a data set's name"),
        ("hf:///nowhere/at/all", r"hf:///nowhere/at/all cannot be read through datasets"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named(folder, name, said):
    with pytest.raises(ProblemSetError, match=said):
        read_problems(name.format(folder))


def test_without_datasets_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    remedy = r"pip install 'lightreasoner\[hub\]' \(in a checkout: pip install '\.\[hub\]'\)"
    with pytest.raises(ProblemSetError, match=f"hf://any/set needs datasets: {remedy}"):
        read_problems("hf://any/set")
