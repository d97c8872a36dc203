"""A RUN in a bucket: what it holds, under which names, and how it is read and written.

    RUN/run.json                      what made it (`RunManifest`)
    RUN/tokenizer.json                the expert's
    RUN/trajectories/part-*.parquet   a row a trajectory; costly, written first
    RUN/samples/part-*.parquet        a row a trajectory: its kept steps and labels
    RUN/failures/part-*.jsonl         problems that failed, and why
    RUN/complete.json                 written last; its presence means sealed
    RUN/training, RUN/evaluation      what the trainer may have left; only reports read it

Promises: a part appears whole or not at all, names never collide, nothing is rewritten (but the seal, which is taken
off while what failed is asked again). Where two parts hold a key, readers take the first part by name. samples/part-X
is a pure function of trajectories/part-X, so a crash between the two costs nothing: `mend` makes what is missing.
"""

from __future__ import annotations

import io
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, BinaryIO, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from client.errors import RunError
from client.protocol.requests import Failure, Trajectory, parse_line
from client.runs.keys import Key, Keys
from client.runs.tables import (
    SAMPLE_SCHEMA,
    TRAJECTORY_SCHEMA,
    RunManifest,
    Sample,
    check_no_nulls,
    sample_of,
    sample_table,
    samples_in,
    trajectories_in,
    trajectory_table,
)
from client.runs.tally import RunTotals, Tally
from client.storage.bucket import Bucket

Row = TypeVar("Row", Trajectory, Sample)
Read = TypeVar("Read")
TOTALS = TypeAdapter(RunTotals)
COLUMN_RANGE_BYTES = 2**16
"""Of a part of which a few columns are wanted, at a time."""
REMOVE = "remove it, and complete.json where there is one, and sample again"
"""What helps against a part that is damaged: what it held is lacking then, and is done again."""
ENDINGS = {"trajectories": "parquet", "samples": "parquet", "failures": "jsonl"}


class Run:
    """One RUN, by the URL of its prefix. Opening it touches nothing.

    `owner`: the number of a job's owner, which the parts that it writes carry in their names.
    """

    def __init__(self, url: str, owner: int | None = None) -> None:
        self.bucket = Bucket(url)
        self._owner = owner

    def __str__(self) -> str:
        return str(self.bucket)

    def manifest(self) -> RunManifest:
        """run.json. Raises RunError, naming the RUN, where it is missing or not ours."""
        data = self.bucket.get("run.json")
        if data is None:
            raise RunError(f"no RUN at {self}: it has no run.json; 'lightreasoner-client sample' makes one")
        try:
            return RunManifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            raise RunError(
                f"{self}/run.json is not a run.json that this version reads: {where}: {first['msg']}"
            ) from None

    def claim(self, manifest: RunManifest, tokenizer: bytes) -> None:
        """Make this RUN, or join it. Raises RunError naming every setting in which it differs."""
        made = self.bucket.create("run.json", manifest.model_dump_json(indent=2).encode())
        if not made and (different := self.manifest().differences(manifest)):
            listed = "\n  ".join(("use the same or name a new RUN. The RUN's against yours:", *different))
            raise RunError(f"{self} was made with other settings; {listed}")
        self.bucket.create("tokenizer.json", tokenizer)

    def completion(self) -> dict[str, Any] | None:
        """complete.json, or None while the RUN is not sealed."""
        data = self.bucket.get("complete.json")
        if data is None:
            return None
        try:
            TOTALS.validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            reason = ": ".join((*map(str, first["loc"]), first["msg"]))
            raise RunError(f"{self}/complete.json is damaged ({reason}); remove it and sample again") from None
        return orjson.loads(data)

    def seal(self, totals: RunTotals) -> bool:
        """Write complete.json; whether this call was the one that wrote it. The first writer's stands."""
        body = {"sealed_at": int(time.time()), **asdict(totals)}
        return self.bucket.create("complete.json", orjson.dumps(body, option=orjson.OPT_INDENT_2))

    def reopen(self) -> None:
        """Take the seal off, for trajectories that failed are to be asked for again."""
        self.bucket.remove("complete.json")

    def parts(self, kind: str) -> list[str]:
        """Names, sorted, of the parts under trajectories, samples or failures, without folder and ending."""
        parts = (re.fullmatch(rf"{kind}/(part-[^/]+)\.{ENDINGS[kind]}", name) for name in self.bucket.names(kind))
        return [part[1] for part in parts if part]  # others may keep what they like beside them

    def write(
        self, trajectories: Sequence[Trajectory], questions: dict[str, str | None], manifest: RunManifest
    ) -> list[Sample]:
        """Write one part of trajectories, then its samples, and return those; `questions` by problem_id."""
        part = self._new_part()
        self._put_table("trajectories", part, trajectory_table(trajectories, questions))
        return self._write_samples(part, trajectories, manifest)

    def adopt(self, part: str, other: Run, manifest: RunManifest, write: bool) -> tuple[list[Trajectory], list[Sample]]:
        """A part of another RUN's trajectories with its samples made anew; written, byte for byte, where asked to."""
        data = other._part("trajectories", part)
        trajectories = other._values(trajectories_in, "trajectories", part, data, TRAJECTORY_SCHEMA)
        samples = [sample_of(trajectory, manifest) for trajectory in trajectories]
        if write:
            self.bucket.put(f"trajectories/{part}.parquet", data)
            self.write_samples(part, samples)
        return trajectories, samples

    def copy_failures(self, other: Run) -> None:
        """Take over what failed in another RUN."""
        for part in other.parts("failures"):
            name = f"failures/{part}.jsonl"
            self.bucket.create(name, other.bucket.get(name) or b"")

    def tokenizer(self) -> bytes:
        """The expert's tokenizer.json. Raises RunError where it is missing."""
        data = self.bucket.get("tokenizer.json")
        if data is None:
            raise RunError(f"{self} has no tokenizer.json; copy the expert's there")
        return data

    def write_samples(self, part: str, samples: Sequence[Sample]) -> None:
        """Write one part of samples; those of a part of trajectories only after it."""
        self._put_table("samples", part, sample_table(samples))

    def write_failures(self, failures: Sequence[Failure]) -> None:
        """Write one part of failures, each a line as the server sent it."""
        self.bucket.put(f"failures/{self._new_part()}.jsonl", b"".join(failure.to_line() for failure in failures))

    def write_evaluation(self, name: str, body: bytes) -> None:
        """Keep what an evaluation found, for the report; one of the same name gives way."""
        self.bucket.put(f"evaluation/{name}.json", body)

    def mend(self, manifest: RunManifest) -> int:
        """Make the samples parts that a crash left out; returns how many."""
        missing = sorted(set(self.parts("trajectories")) - set(self.parts("samples")))
        for part in missing:
            self._write_samples(part, self.trajectories_of(part), manifest)
        return len(missing)

    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory once."""
        return _first_of_each_key(chain.from_iterable(map(self.trajectories_of, self.parts("trajectories"))))

    def samples(self) -> Iterator[Sample]:
        """Every trajectory's samples once; one with no kept step is among them."""
        return _first_of_each_key(chain.from_iterable(map(self.samples_of, self.parts("samples"))))

    def samples_of(self, part: str) -> list[Sample]:
        """One part's samples; a key that another part holds may be among them."""
        return self._values(samples_in, "samples", part, self._part("samples", part), SAMPLE_SCHEMA)

    def keys(self) -> Keys:
        """The keys of all trajectories; reads two columns of each part."""
        names = "problem_id", "sample_index"
        return Keys(key for part in self.parts("trajectories") for key in self._columns(part, names))

    def questions(self, keys: set[Key]) -> dict[Key, str]:
        """The questions of some trajectories; those sampled from token ids have none. Reads three columns."""
        names = "problem_id", "sample_index", "question"
        rows = (row for part in self.parts("trajectories") for row in self._columns(part, names))
        found: dict[Key, str] = {}
        for problem_id, sample_index, question in rows:
            if (problem_id, sample_index) in keys and question is not None:
                found.setdefault((problem_id, sample_index), question)
        return found

    def failures(self) -> dict[Key, Failure]:
        """What failed, by key; a key that was had after all may be among them."""
        found = chain.from_iterable(map(self._failures_of, self.parts("failures")))
        return {(failure.problem_id, failure.sample_index): failure for failure in found}

    def tally(self, manifest: RunManifest, expected: Iterable[str] = ()) -> Tally:
        """Count the whole RUN in one pass over its trajectories; `expected` as `Tally` takes it."""
        tally = Tally(manifest, expected)
        for part in self.parts("trajectories"):
            for trajectory in self.trajectories_of(part):
                tally.add(trajectory)
        return tally

    def totals(self, manifest: RunManifest) -> RunTotals:
        """What complete.json would say now."""
        return self.tally(manifest).totals(self.failures())

    def _new_part(self) -> str:
        """A name that sorts by time and never collides.

        By time before all else: what an owner of a job writes after it was taken for dead comes after what was
        there, as far as clocks agree.
        """
        owner = "" if self._owner is None else f"{self._owner}-"
        return f"part-{time.time_ns() // 1_000_000:013d}-{owner}{secrets.token_hex(4)}"

    def _write_samples(self, part: str, trajectories: Sequence[Trajectory], manifest: RunManifest) -> list[Sample]:
        samples = [sample_of(trajectory, manifest) for trajectory in trajectories]
        self.write_samples(part, samples)
        return samples

    def trajectories_of(self, part: str) -> list[Trajectory]:
        """A part's trajectories. Raises RunError naming the part where it cannot be read."""
        data = self._part("trajectories", part)
        return self._values(trajectories_in, "trajectories", part, data, TRAJECTORY_SCHEMA)

    def _failures_of(self, part: str) -> list[Failure]:
        name = f"failures/{part}.jsonl"
        try:
            lines = [parse_line(line) for line in (self.bucket.get(name) or b"").splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self}/{name} is damaged ({error}); {REMOVE}") from error
        return [line for line in lines if isinstance(line, Failure)]

    def _put_table(self, kind: str, part: str, table: pa.Table) -> None:
        floats = [f"{field.name}.list.element" for field in table.schema if field.type == pa.list_(pa.float32())]
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, use_byte_stream_split=floats)  # type: ignore[arg-type]
        self.bucket.put(f"{kind}/{part}.parquet", sink.getvalue().to_pybytes())

    def _columns(self, part: str, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Some columns of a part of trajectories, the key first, row by row; of the rest nothing is read."""
        schema = pa.schema([TRAJECTORY_SCHEMA.field(name) for name in names])
        file = self.bucket.open(f"trajectories/{part}.parquet", COLUMN_RANGE_BYTES) or io.BytesIO()

        def rows(table: pa.Table) -> list[tuple[Any, ...]]:
            found = list(zip(*table.to_pydict().values(), strict=True))
            if odd := next((row for row in found if row[1] < 0), None):
                raise ValueError(f"problem {odd[0]!r}: its sample_index is {odd[1]}")
            return found

        with file:
            return self._values(rows, "trajectories", part, file, schema)

    def _part(self, kind: str, part: str) -> bytes:
        return self.bucket.get(f"{kind}/{part}.parquet") or b""

    def _values(
        self, read: Callable[[pa.Table], Read], kind: str, part: str, data: bytes | BinaryIO, schema: pa.Schema
    ) -> Read:
        """What `read` makes of a part. Raises RunError naming the part where that cannot be."""
        try:
            source = pa.BufferReader(data) if isinstance(data, bytes) else data
            table = pq.read_table(source, columns=schema.names, pre_buffer=False).select(schema.names).cast(schema)
            check_no_nulls(table)
            return read(table)
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise RunError(f"{self}/{kind}/{part}.parquet cannot be read ({error}); {REMOVE}") from error


def read_samples(url: str) -> Iterator[Sample]:
    """Every trajectory's samples once, a part in memory at a time; `url` as commands take a RUN.

    Raises RunError where there is no RUN at once, and where a part is damaged when it is reached.
    """
    return _there(url).samples()


def read_trajectories(url: str) -> Iterator[Trajectory]:
    """Every trajectory once, as `read_samples` reads samples."""
    return _there(url).trajectories()


def _there(url: str) -> Run:
    run = Run(url)
    run.manifest()
    return run


def _first_of_each_key(rows: Iterator[Row]) -> Iterator[Row]:
    seen = Keys()
    for row in rows:
        if seen.add((row.problem_id, row.sample_index)):
            yield row
