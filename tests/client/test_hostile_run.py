"""What a bad RUN may cost whoever reads it: a few kilobytes that would be gigabytes, a pipe where a file should be."""

import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs.reported import make_run, trajectories_of

import client.models.detokenize
import client.runs.parts
from client.errors import RunError
from client.models.detokenize import tokenizer_of
from client.report.page import report_page
from client.runs.run import Run
from client.storage.bucket import Bucket, BucketError

BILLION = 10**9


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", trajectories_of(4))


def spoilt(run, kind, **columns):
    """Replace columns of the RUN's first part."""
    (part, *_) = run.parts(kind)
    file = f"{run}/{kind}/{part}.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, file, compression="zstd")
    return Path(file).stat().st_size


def one_value(rows, count):
    """Lists that are as long together as `count`, all of one value, of which the last has the most."""
    values = pa.repeat(pa.scalar(7, pa.int32()), count)
    return pa.ListArray.from_arrays(pa.array([*range(rows), count], pa.int32()), values)


@pytest.mark.parametrize("kind", ["trajectories", "samples"])
def test_a_part_that_says_one_value_many_times_is_refused(run, kind, monkeypatch):
    monkeypatch.setattr(client.runs.parts, "MOST_PART_BYTES", 2**22)
    assert spoilt(run, kind, token_ids=one_value(4, 2**21)) < 20_000
    read = run.trajectories if kind == "trajectories" else run.samples
    with pytest.raises(RunError, match=r"parquet cannot be read \(4 rows of 8,[\d,]+ bytes, more than a part holds\)"):
        list(read())


def test_a_part_with_one_long_text_many_times_or_too_many_rows_is_refused(run, monkeypatch):
    monkeypatch.setattr(client.runs.parts, "MOST_PART_BYTES", 2**22)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 4, pa.int32()), pa.array(["x" * 2**21]))
    spoilt(run, "trajectories", question=text.cast(pa.string()))
    with pytest.raises(RunError, match=r"more than a part holds"):
        run.questions({("p0", 0)})
    monkeypatch.setattr(client.runs.parts, "MOST_PART_ROWS", 3)
    with pytest.raises(RunError, match=r"4 rows of "):
        run.keys()


@pytest.mark.parametrize("kind", ["trajectories", "samples"])
@pytest.mark.parametrize("index", [-1, 256, 2**31 - 1])
def test_a_sample_that_no_request_can_lead_to_is_refused(run, kind, index):
    rows = pq.read_table(f"{run}/{kind}/{run.parts(kind)[0]}.parquet").num_rows
    spoilt(run, kind, sample_index=pa.array([0] * (rows - 1) + [index], pa.int32()))
    with pytest.raises(RunError, match=f"its sample_index is {index}"):
        list(run.trajectories() if kind == "trajectories" else run.samples())
    if kind == "trajectories":
        with pytest.raises(RunError, match=f"its sample_index is {index}"):
            run.keys()


def test_parts_as_they_are_written_are_read(run):
    assert len(list(run.trajectories())) == len(list(run.samples())) == 4
    assert run.keys() == {(f"p{index}", 0) for index in range(4)}


@pytest.mark.parametrize("name", ["run.json", "complete.json", "tokenizer.json", "trajectories/part-0.parquet"])
def test_a_pipe_or_a_device_is_named_and_not_waited_for(run, name, tmp_path):
    place = tmp_path / "run" / name
    place.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(place)
        said: list[str] = []

        def read(said=said):
            for access in (Bucket(str(run)).get, Bucket(str(run)).open):
                try:
                    access(name)
                except BucketError as error:
                    said.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(20)
        assert len(said) == 2 and all("is a pipe or a device" in text for text in said)
        place.unlink()


def test_a_run_json_without_end_is_named(run):
    Bucket(str(run)).put("run.json", b"[" * (2**22 + 1))
    with pytest.raises(BucketError, match=r"cannot read run\.json in .*: it has 4,194,305 bytes, more than 4,194,304"):
        Run(str(run)).manifest()


def test_what_else_a_run_holds_has_a_bound_too(run, monkeypatch):
    bucket = Bucket(str(run))
    bucket.put("failures/part-0.jsonl", b"\n" * 9)
    assert not run.failures()
    monkeypatch.setattr(client.runs.parts, "MOST_PART_ROWS", 8)
    with pytest.raises(RunError, match=r"part-0\.jsonl is damaged \(9 lines, more than a part holds\)"):
        run.failures()
    monkeypatch.setattr(client.models.detokenize, "MOST_TOKENIZER_VALUES", 8)
    with pytest.raises(RunError, match=r"tokenizer\.json is not .* \(more than 8 values\)"):
        tokenizer_of(run.tokenizer(), f"{run}/tokenizer.json")
    with Path(f"{run}/tokenizer.json").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(BucketError, match=r"68,719,476,736 bytes, more than 67,108,864"):
        run.tokenizer()


def test_a_report_shows_the_beginning_of_a_question_that_has_no_end(tmp_path):
    questions = {f"p{index}": "Q" * 2**20 for index in range(4)}
    page = report_page(make_run(tmp_path / "run", trajectories_of(4), questions=questions))
    assert "Q" * 20_000 + "…" in page and "Q" * 20_001 not in page
