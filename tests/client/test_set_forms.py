"""Files of problem sets: forms and compressions told by first bytes; folders, globs, standard input; ids; chats."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import tempfile
import uuid
import zipfile
import zlib
from datetime import date, datetime
from decimal import Decimal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import client.problems.rows
from client.errors import LightReasonerError, ProblemSetError
from client.problems.problem_set import ProblemSet
from client.problems.reader import read_problem_set, read_problems
from client.protocol.requests import MAX_CHARACTERS, Problem
from client.storage.bucket import Bucket

ROWS = [{"id": "1", "question": 'One, or "1"?'}, {"id": "2", "question": "Two\nlines;\tand é日"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
TABLE = 'id,question\n1,"One, or ""1""?"\n\n2,"Two\nlines;\tand é日"\n'.encode()


def asked(path, **options):
    return [(row.id, row.question) for row in read_problems(str(path), **options)]


EXPECTED = [(row["id"], row["question"]) for row in ROWS]


def parquet_bytes(table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def packed(kind, data=LINES):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def xz_of_a_large_dictionary():
    return lzma.compress(LINES, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}])


FORMS = {
    "lines": LINES,
    "crlf": LINES.replace(b"\n", b"\r\n"),
    "array": json.dumps(ROWS).encode(),
    "indented": b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "csv": TABLE,
    "excel's csv": b"\xef\xbb\xbf" + re.sub(rb"(id|1|2),(?=[q\"])", rb"\1;", TABLE),
    "tsv": 'id\tquestion\n1\t"One, or ""1""?"\n2\t"Two\nlines;\tand é日"\n'.encode(),
    "parquet": parquet_bytes(pa.Table.from_pylist(ROWS)),
    "gzip": gzip.compress(LINES),
    "bzip2": bz2.compress(LINES[:50]) + bz2.compress(LINES[50:]),
    "xz": lzma.compress(LINES[:50]) + lzma.compress(LINES[50:]) + b"\0" * 4,
    "zstd": packed("zstd"),
    "lz4": packed("lz4"),
    "csv in zstd": packed("zstd", TABLE),
    "array in gzip": gzip.compress(json.dumps(ROWS).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", ["p", "p.jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_first_bytes_tell_a_files_form_whatever_its_name(tmp_path, form, name):
    (tmp_path / name).write_bytes(FORMS[form])
    assert asked(tmp_path / name) == EXPECTED
    assert list(read_problem_set(str(tmp_path / name))) == [Problem(**row) for row in ROWS]


@pytest.mark.parametrize("form", FORMS)
def test_standard_input_and_a_pipe_take_every_form(form, monkeypatch):
    for path in ("-", "/dev/fd/{}"):
        read, write = os.pipe()
        os.write(write, FORMS[form])
        os.close(write)
        if path == "-":
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=os.fdopen(read, "rb")))
        assert asked(path.format(read)) == EXPECTED
    os.close(read)


def test_parquet_from_a_pipe_without_a_folder_for_temporary_files_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/tmp"])
    read, write = os.pipe()
    os.write(write, FORMS["parquet"])
    os.close(write)
    with pytest.raises(LightReasonerError, match="; set TMPDIR to a folder"):
        asked(f"/dev/fd/{read}")
    os.close(read)


def test_a_large_array_is_read_row_by_row(tmp_path):
    rows = [{"question": f"{index}?" + "é" * 997 * (index % 97)} for index in range(300)]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    assert [row.question for row in read_problems(str(tmp_path / "p.json"))] == [row["question"] for row in rows]
    (tmp_path / "p.json").write_text(json.dumps(rows)[:-1] + ", {")
    assert len(read_problems(str(tmp_path / "p.json"), 2)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", r":1: a JSON int, not an object; .* or an array of objects"),
        (b'[{"question": "a"}, [', r":2: not a JSON object \(.*\); the file is a JSON array"),
        (b'[{"question": "a"}] [{"question": "b"}]', "goes on after its JSON array"),
        (b'[{"question": "\\ud800"}]', r":1: not a JSON object"),
        (b"[" + b'{"a":' * 100_000, r":1: (nested too deeply|not a JSON object)"),
        (b"id,question\n1,a,b\n", r":2: 3 cells, where the first line names 2 columns; quote"),
        (b'id,question\n1,"a"b\n', r":2: not CSV \("),
        (b'id,question\n1,a\n2,"b\n\n\n', r":3: not CSV \("),
        (b"id,question,id\n1,a,2\n", r":1: two columns have the name 'id'"),
        (b"id,question\n1,caf\xe9\n", r":2: not in UTF-8; the file must be"),
        (b"id,question\n1,caf\xe9 \x07\x1a\n", r":2: not in UTF-8; the file must be"),
        (b"id,answer\n1,a\n", r":2: no question; .* it has answer, id\. --q"),
        ('{"question": "a"}'.encode("utf-16"), r":1: not in UTF-8 but in UTF-16; .*: iconv -f UTF-16 -t UTF-8"),
        (b"PK\x03\x04\x14\0", "is a ZIP archive or an Excel workbook; unpack it"),
        (gzip.compress(b"\0" * 257 + b"ustar\0"), "is a tar archive; unpack it"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (b"SQLite format 3\0", "is a SQLite database; export"),
        (zlib.compress(LINES), "is compressed as zlib; unpack it, or compress it as gzip"),
        (lzma.compress(LINES, format=lzma.FORMAT_ALONE), "is compressed as LZMA; unpack it"),
        (b"\xff\x06\0\0sNaPpY\1", "is compressed by Snappy; unpack it"),
        (b"\x1f\x9d\x90\xe9", r"is compressed by compress \(\.Z\); unpack it"),
        (b"LZIP\1\x0c\xe9", "is compressed by lzip"),
        (pa.compress(LINES * 9, "brotli", asbytes=True), "is binary, of a form that is not known .*JSON lines"),
        (b"GGUF\3\0\0\0", "is a GGUF model; give the file of problems"),
        (b"\x10\0\0\0\0\0\0\0{}", "is a safetensors model"),
        (b"\x89PNG\r\n\x1a\n", "is a picture"),
        (b"\0" * 8 + b"DUCK", "is a DuckDB database; export"),
        (b"\x80\x04\x95", "is a Python pickle"),
        (b"<!DOCTYPE html><title>404", "is a web page or XML; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS .* git lfs pull"),
        (gzip.compress(parquet_bytes(pa.Table.from_pylist(ROWS))), "is Parquet, compressed as a whole; unpack it"),
        (gzip.compress(gzip.compress(gzip.compress(LINES))), "compressed 3 times"),
        (packed("zstd")[:-9], "cannot be read|not a JSON object"),
        (lzma.compress(LINES)[:-20], "cannot be read"),
        (xz_of_a_large_dictionary(), "cannot be read: .*[Mm]emory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",  # gzip writes the time into some
)  # fmt: skip
def test_what_is_not_read_is_told_its_form_and_the_remedy(tmp_path, content, said):
    (tmp_path / "problems").write_bytes(content)
    with pytest.raises(ProblemSetError, match=f"problems.*{said}"):
        read_problems(str(tmp_path / "problems"))


@pytest.mark.parametrize("head", ["PARENT_ID,question", "ORCID,question", "ARROW1,question", "FEA1,question"])
@pytest.mark.parametrize("above", ["", "\n", "\n \r\n"])
def test_a_table_may_begin_with_the_letters_of_another_form_or_with_empty_lines(tmp_path, head, above):
    (tmp_path / "problems.csv").write_text(f"{above}{head}\n1,What is 2 + 3?\n")
    assert [row.question for row in read_problems(str(tmp_path / "problems.csv"))] == ["What is 2 + 3?"]
    (tmp_path / "problems.csv").write_text(f"{above}{head}\n1,a\n1,2,3\n")
    with pytest.raises(ProblemSetError, match=rf"problems.csv:{above.count(chr(10)) + 3}: 3 cells"):
        read_problems(str(tmp_path / "problems.csv"))


def test_a_file_that_is_named_parquet_and_is_none_and_other_tables_are_told(tmp_path):
    (tmp_path / "p.parquet").write_bytes(LINES)
    with pytest.raises(ProblemSetError, match="is no Parquet file: it begins with"):
        read_problems(str(tmp_path / "p.parquet"))
    pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(tmp_path / "p.feather"))
    with pytest.raises(ProblemSetError, match="is an Arrow or Feather file; save it as Parquet"):
        read_problems(str(tmp_path / "p.feather"))
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("p.jsonl", LINES)
    with pytest.raises(ProblemSetError, match="is a ZIP archive"):
        read_problems(str(tmp_path / "p.zip"))


# Several files.


@pytest.fixture
def shards(bucket):
    """The URL of a folder of shards, and of other things."""
    for name, data in {
        "set/b-00001.jsonl": b'{"id": "3", "question": "b"}\n',
        "set/a-00000.parquet": FORMS["parquet"],
        "set/README.md": b"# Cards",
        "set/_SUCCESS": b"",
        "set/deep/er/c.csv": b"id,question\n4,c\n",
    }.items():
        Bucket(bucket).put(name, data)
    return f"{bucket}/set"


def test_a_folder_and_a_glob_are_read_file_by_file_in_order(shards):
    whole = [*EXPECTED, ("3", "b")]
    for path in (shards, f"{shards}/", f"{shards}/*-0000[0-9].*", f"{shards}/?-*"):
        assert asked(path) == whole
    assert asked(f"{shards}/**/*.csv") == asked(f"{shards}/deep/*/[!b].csv") == [("4", "c")]
    assert read_problems(shards)[2].where == f"{shards}/b-00001.jsonl:1"
    assert read_problem_set(f"{shards}/*-*").identity() == read_problem_set(shards).identity()


def test_a_repeated_problem_is_named_by_both_its_files(shards):
    Bucket(shards).put("c.jsonl", b'{"id": "1", "question": "x"}\n')
    with pytest.raises(ProblemSetError, match=r"c\.jsonl:1: id '1' is already used .* at .*a-00000\.parquet:1"):
        read_problems(shards)


def test_where_there_is_nothing_to_read_what_is_there_is_named(shards):
    with pytest.raises(ProblemSetError, match=r"no problem set at .*nothing: give a \.jsonl, \.json, "):
        read_problems(f"{shards}/*nothing")
    Bucket(shards).put("saved/data-00000-of-00001.arrow", b"x")
    Bucket(shards).put("saved/notes.txt", b"x")
    with pytest.raises(ProblemSetError, match=r"holds no file of problems, but data-0.*; datasets\.load_from_disk"):
        read_problems(f"{shards}/saved")


# Ids.


def test_any_scalar_is_an_id_by_its_text(tmp_path):
    name = uuid.UUID("24c8b81d-3d61-4780-ae15-73d042f7c346")
    columns = {
        "uuid": (pa.array([name.bytes], pa.uuid()), str(name)),
        "decimal": (pa.array([Decimal("1.50")]), "1.50"),
        "date": (pa.array([date(2026, 1, 2)]), "2026-01-02"),
        "time": (pa.array([datetime(2026, 1, 2, 3)]), "2026-01-02 03:00:00"),
        "late": (pa.array([2**62], pa.timestamp("ns")), "2116-02-20 23:53:38.427387904"),
        "text": (pa.array([b"p-1"]), "p-1"),
        "bytes": (pa.array([b"\xff\0"]), "ff00"),
        "float": (pa.array([1.0]), "1.0"),
        "bool": (pa.array([True]), "true"),
        "category": (pa.array(["c"]).dictionary_encode(), "c"),
    }
    for column, text in columns.values():
        pq.write_table(pa.table({"id": column, "question": ["q"]}), tmp_path / "p.parquet")
        for read in (read_problems, read_problem_set):
            assert [row.id for row in read(str(tmp_path / "p.parquet"))] == [text]
    (tmp_path / "p.jsonl").write_text('{"id": 1.0, "question": "a"}\n{"id": false, "question": "b"}')
    assert [row.id for row in read_problems(str(tmp_path / "p.jsonl"))] == ["1.0", "false"]


@pytest.mark.parametrize("value", [2**64, 1e300])
def test_an_id_that_is_too_large_for_an_exact_number_is_refused_with_the_remedy(tmp_path, value):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": value, "question": "a"}))
    with pytest.raises(ProblemSetError, match=r"p\.jsonl:1: 'id' is .*; a number this large loses digits: write"):
        read_problems(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("value", [[1], {"a": 1}, ""])
def test_anything_else_as_an_id_is_refused_by_name(tmp_path, value):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": value, "question": "a"}))
    with pytest.raises(ProblemSetError, match=r"p\.jsonl:1: 'id' is .*; it must be a string or a number"):
        read_problems(str(tmp_path / "p.jsonl"))
    if isinstance(value, list):
        maps = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))
        for column in (pa.array([value]), maps):
            pq.write_table(pa.table({"id": column, "question": ["q"]}), tmp_path / "p.parquet")
            with pytest.raises(ProblemSetError, match="'id' is "):
                read_problem_set(str(tmp_path / "p.parquet"))


def test_an_id_field_may_be_named_and_nested_and_then_every_row_has_it(tmp_path):
    rows = [{"extra_info": {"index": index, "made": datetime(2026, 1, 1)}, "a.b": f"x{index}", "question": "q",
             "nested": {"text": f"{index}?"}} for index in range(3)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row, default=str) for row in rows))
    for file in (tmp_path / "p.parquet", tmp_path / "p.jsonl"):
        for read in (read_problems, read_problem_set):
            path = str(file)
            assert [row.id for row in read(path, id_field="extra_info.index")] == ["0", "1", "2"]
            assert [row.id for row in read(path, id_field="a.b")] == ["x0", "x1", "x2"]
            assert [row.question for row in read(path, question_field="nested.text")] == ["0?", "1?", "2?"]
            for missing in ("extra_info.uid", "uid", "question.x"):
                with pytest.raises(ProblemSetError, match=rf":1: no id; expected '{missing}'; it has a\.b, extra_info"):
                    read(path, id_field=missing)


def test_what_lies_beside_times_and_in_maps_of_a_nested_column_is_read_as_of_json(tmp_path):
    """By its dotted name, for a question or an id, and of the whole row, where an evaluation looks for answers."""
    extra = {"uid": "a", "when": datetime(2026, 1, 1), "deep": {"answer": 4, "when": datetime(2026, 1, 1)}}
    kind = pa.struct([("uid", pa.string()), ("when", pa.timestamp("us")),
                      ("deep", pa.struct([("answer", pa.int64()), ("when", pa.timestamp("us"))]))])  # fmt: skip
    columns = {
        "extra": pa.array([extra], kind),
        "said": pa.array([[("text", "How many?"), ("no", "1")]], pa.map_(pa.string(), pa.string())),
    }
    pq.write_table(pa.table(columns), path := str(tmp_path / "p.parquet"))
    for read in (read_problems, read_problem_set):
        (row,) = read(path, id_field="extra.uid", question_field="said.text")
        assert (row.id, row.question) == ("a", "How many?")
    (row,) = read_problems(path, question_field="said.text")
    assert row.row == {"extra": {"uid": "a", "deep": {"answer": 4}}, "said": {"text": "How many?", "no": "1"}}


def test_a_csv_without_a_line_of_names_is_told_so(tmp_path):
    file = tmp_path / "p.csv"
    for head, first in (
        ("What is 2 + 2?,4", r"'What is 2 \+ 2\?', '4'"),
        ("4,4", "'4', '4'"),
        ("Frage,Zahl", "'Frage', 'Zahl'"),
    ):
        file.write_text(f"{head}\nWhat is 3 + 3?,6\n")
        with pytest.raises(
            ProblemSetError, match=rf"p\.csv:1: no column is called question or .* here it is {first}: put"
        ):
            read_problem_set(str(file))
    assert len(read_problem_set(str(file), question_field="Frage")) == 1


# Conversations.


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_messages_are_the_prompt_as_they_are(tmp_path, ending):
    """As verl and TRL have them."""
    other = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So"}]
    rows = [
        {"prompt": CHAT, "data_source": "gsm8k", "extra_info": {"index": 7}},
        {"prompt": other, "extra_info": {"index": 8}},
    ]
    path = tmp_path / f"p.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    problems = list(read_problem_set(str(path), id_field="extra_info.index"))
    assert problems == [Problem(id="7", messages=CHAT), Problem(id="8", messages=other)]
    read = read_problems(str(path))
    assert [row.problem.messages for row in read] == [problem.messages for problem in problems]
    assert read[0].question == "How many?" and len({row.id for row in read}) == 2
    assert ProblemSet.of(problems).question("7") == "How many?"


def test_a_conversations_id_and_the_sets_identity_depend_on_all_that_is_asked(tmp_path):
    chats = [CHAT, CHAT[1:], [CHAT[0] | {"content": "Be long."}, CHAT[1]], [CHAT[0] | {"role": "user"}, CHAT[1]]]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    assert len({row.id for row in read_problems(str(tmp_path / "p.jsonl"), question_field="messages")}) == 4
    sets = [ProblemSet.of([Problem(id="1", messages=chat)]) for chat in chats]
    assert len({problems.identity().digest for problems in sets}) == 4


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([], "no question; .*prompt of messages"),
        ([{"role": "user"}], "message 1 of 'prompt' is .*; it must have a role and a content"),
        ([*CHAT, {"role": "user", "content": [{"type": "image"}]}], "message 3 of 'prompt' is .* both strings"),
        ([CHAT[1] | {"tool_calls": [1]}], "message 1 of 'prompt' has 'tool_calls'; only role and content"),
        ([{"role": "r" * 65, "content": ""}], "a role of 'prompt': .*64"),
        ([{"role": "user", "content": "x" * (MAX_CHARACTERS + 1)}], "the messages of 'prompt' have 4,000,001"),
        ([CHAT[1]] * 1025, "'prompt' has 1,025 messages"),
    ],
)
def test_messages_that_cannot_be_sent_are_named(tmp_path, chat, said):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": chat}))
    with pytest.raises(ProblemSetError, match=rf"p\.jsonl:1: {said}"):
        read_problems(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("first", ['{"question": "q"}', "question\nq", ""])
def test_empty_lines_without_end_are_refused(tmp_path, first, monkeypatch):
    monkeypatch.setattr(client.problems.rows, "MOST_EMPTY_LINES", 3)
    file = tmp_path / "p"
    file.write_text(f"{first}\n\n\n{first.rpartition(chr(10))[2]}\n")
    if first:
        assert len(read_problems(str(file))) == 1
    file.write_text(f"{first}\n" + "\n" * 5)
    with pytest.raises(ProblemSetError, match=r"p:\d: more than 3 empty lines; remove them"):
        read_problems(str(file))
