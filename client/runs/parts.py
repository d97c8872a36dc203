"""The parts of a RUN: their names, and how each is written and read as one Parquet or JSONL object.

In: trajectories, samples or failures. Out: one object of the bucket, or the values that it holds. A part appears
whole or not at all, and is never rewritten. `client.runs.run` decides which parts a RUN has.
"""

from __future__ import annotations

import io
import re
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from client.errors import RunError, reason_of, shorten
from client.protocol.requests import Failure, Trajectory, parse_line
from client.runs.samples import Sample
from client.runs.tables import (
    SAMPLE_SCHEMA,
    TRAJECTORY_SCHEMA,
    check_kinds,
    check_no_nulls,
    check_sample_indices,
    sample_table,
    samples_in,
    trajectories_in,
    trajectory_table,
)
from client.storage.bucket import MOST_SAID_CHARACTERS, Bucket

PartKind = Literal["trajectories", "samples", "failures"]
Read = TypeVar("Read")
MOST_PART_BYTES, MOST_PART_ROWS = 2**28, 2**16
"""Most decompressed bytes, and most rows, of a part. The writer closes a part at 32 MiB; it may exceed that by one
trajectory, of 200 MB at most."""
COLUMN_RANGE_BYTES = 2**16
"""Bytes to read at a time from a part if only a few columns are needed."""
MOVE_OUT = "move it out of the RUN, and complete.json where there is one, and sample again"
"""The remedy for a damaged part: without it, its trajectories are missing and are sampled again."""
ENDINGS: dict[PartKind, str] = {"trajectories": "parquet", "samples": "parquet", "failures": "jsonl"}


class Parts:
    """The parts of one RUN. `owner`: the number of a job's owner, for the names of new parts."""

    def __init__(self, bucket: Bucket, owner: int | None = None) -> None:
        self._bucket, self._owner = bucket, owner

    def names(self, kind: PartKind) -> list[str]:
        """The names of the parts of a kind, sorted, without folder and ending."""
        parts = (re.fullmatch(rf"{kind}/(part-[^/]+)\.{ENDINGS[kind]}", name) for name in self._bucket.names(kind))
        return [part[1] for part in parts if part]  # other objects in the folder are ignored

    def new_name(self) -> str:
        """A name that sorts by time and never collides.

        Time comes first: parts that a job's owner writes after it lost the lease then sort after the parts that were
        there before, as far as clocks agree.
        """
        owner = "" if self._owner is None else f"{self._owner}-"
        return f"part-{time.time_ns() // 1_000_000:013d}-{owner}{secrets.token_hex(4)}"

    def write_trajectories(
        self, part: str, trajectories: Sequence[Trajectory], questions: dict[str, str | None]
    ) -> None:
        """Write a part of trajectories; `questions` by problem_id."""
        self._bucket.put(_object_name("trajectories", part), _parquet(trajectory_table(trajectories, questions)))

    def write_samples(self, part: str, samples: Sequence[Sample]) -> None:
        """Write a part of samples, after the part of trajectories that they belong to."""
        self._bucket.put(_object_name("samples", part), _parquet(sample_table(samples)))

    def write_failures(self, part: str, failures: Sequence[Failure]) -> None:
        """Write a part of failures, each a line as the server sent it."""
        self._bucket.put(_object_name("failures", part), b"".join(failure.to_line() for failure in failures))

    def copy(self, kind: PartKind, part: str, data: bytes) -> None:
        """Write a part that was read from another RUN, byte for byte."""
        self._bucket.put(_object_name(kind, part), data)

    def data(self, kind: PartKind, part: str) -> bytes:
        """The bytes of a part. Empty if the part does not exist."""
        return self._bucket.get(_object_name(kind, part), MOST_PART_BYTES) or b""

    def trajectories(self, part: str, data: bytes | None = None) -> list[Trajectory]:
        """A part's trajectories. `data`: its bytes, if they were read already.

        Raises RunError, naming the part, if it cannot be read. So do `samples`, `failures` and `columns`.
        """
        data = self.data("trajectories", part) if data is None else data
        return self._values(trajectories_in, "trajectories", part, data, TRAJECTORY_SCHEMA)

    def samples(self, part: str, data: bytes | None = None, vocab_size: int | None = None) -> list[Sample]:
        """A part's samples."""
        data = self.data("samples", part) if data is None else data
        return self._values(partial(samples_in, vocab_size=vocab_size), "samples", part, data, SAMPLE_SCHEMA)

    def failures(self, part: str) -> list[Failure]:
        """A part's failures."""
        data = self.data("failures", part)
        try:
            if (count := data.count(b"\n")) > MOST_PART_ROWS:
                raise ValueError(f"{count:,} lines, more than a part holds")
            lines = [parse_line(line) for line in data.split(b"\n")]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._bucket}/{_object_name('failures', part)} is damaged ({_reason(error)}); {MOVE_OUT}"
            ) from error
        return [line for line in lines if isinstance(line, Failure)]

    def columns(self, part: str, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Some columns of a part of trajectories, row by row; the key comes first. Other columns are not read."""
        schema = pa.schema([TRAJECTORY_SCHEMA.field(name) for name in names])
        file = self._bucket.open_end(_object_name("trajectories", part), COLUMN_RANGE_BYTES) or io.BytesIO()

        def rows(table: pa.Table) -> list[tuple[Any, ...]]:
            return list(zip(*table.to_pydict().values(), strict=True))

        with file:
            return self._values(rows, "trajectories", part, file, schema)

    def _values(
        self, read: Callable[[pa.Table], Read], kind: PartKind, part: str, data: bytes | BinaryIO, schema: pa.Schema
    ) -> Read:
        """The result of `read` on a part. Raises RunError, naming the part, if it cannot be read."""
        try:
            source = pa.BufferReader(data) if isinstance(data, bytes) else data
            table = _table_in(source, schema).select(schema.names)
            check_kinds(table, schema)
            table = table.cast(schema)
            check_no_nulls(table)
            check_sample_indices(table)
            return read(table)
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise RunError(
                f"{self._bucket}/{_object_name(kind, part)} cannot be read ({_reason(error)}); {MOVE_OUT}"
            ) from error


def _table_in(source: pa.BufferReader | BinaryIO, schema: pa.Schema) -> pa.Table:
    """Columns of a part, strings as dictionaries. Raises ValueError if they are larger than a part may be.

    A few kilobytes of Parquet may repeat one value a billion times.
    """
    metadata = pq.ParquetFile(source, pre_buffer=False).metadata
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    read = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in schema.names]
    size = sum(max(chunk.num_values * 4, chunk.total_uncompressed_size) for chunk in read)
    if metadata.num_rows > MOST_PART_ROWS or size > MOST_PART_BYTES:
        raise ValueError(f"{metadata.num_rows:,} rows of {size:,} bytes, more than a part holds")
    there = set(metadata.schema.to_arrow_schema().names)
    texts = [field.name for field in schema if pa.types.is_string(field.type) and field.name in there]
    file = pq.ParquetFile(source, metadata=metadata, read_dictionary=texts, pre_buffer=False)
    # Arrow's threads would release Python objects. A thread that does so while the interpreter ends aborts the process:
    # "terminate called without an active exception".
    table = file.read(columns=schema.names, use_threads=False)
    for column in (column for column in table.columns if pa.types.is_dictionary(column.type)):
        for chunk in column.chunks:
            size += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    if size > MOST_PART_BYTES:
        raise ValueError(f"{size:,} bytes, more than a part holds")
    return table


def _reason(error: Exception) -> str:
    return shorten(reason_of(error), MOST_SAID_CHARACTERS)


def _object_name(kind: PartKind, part: str) -> str:
    return f"{kind}/{part}.{ENDINGS[kind]}"


def _parquet(table: pa.Table) -> bytes:
    floats = [f"{field.name}.list.element" for field in table.schema if field.type == pa.list_(pa.float32())]
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, use_byte_stream_split=floats)  # type: ignore[arg-type]
    return sink.getvalue().to_pybytes()
