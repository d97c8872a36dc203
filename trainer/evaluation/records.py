"""The outputs of an evaluation, one JSON line each, written as they come, so that an evaluation can be resumed.

In: outputs with their grades. Out: a file, whose first line says what was evaluated, and its records. A line that a
crash cut short is dropped. A file of another evaluation, or of one that is still running, is an error.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from client.errors import LightReasonerError
from client.storage.locks import lock

RecordKey = tuple[str, str, int, int]
"""Model, benchmark, the problem's number in it, sample."""
HEADER = b'{"evaluation": '
"""The beginning of every file of records."""


@dataclass(frozen=True)
class Record:
    """One output and its grade."""

    model: str  # `BASE_MODEL`, or the adapter's path
    benchmark: str
    number: int  # the problem's place in the benchmark, from 0
    problem_id: str
    sample_index: int
    prompt: str  # the question, without the chat template
    output: str
    extracted: str
    gold: str
    correct: bool

    @property
    def key(self) -> RecordKey:
        return self.model, self.benchmark, self.number, self.sample_index


class Records:
    """The records of one evaluation, in memory, and in a file if one is given."""

    def __init__(self, file: Path | None, about: dict[str, Any]) -> None:
        """Read the records of `file`, which must be of the same evaluation. `about`: the identity of the evaluation.

        Adapters may be added or left out, but an adapter at the same path must have the same content.
        Raises LightReasonerError, naming the differences, or if the file cannot be used.
        """
        self._found: dict[RecordKey, Record] = {}
        self._about: dict[str, Any] = {}
        self._stream: BinaryIO | None = None
        if file is None:
            return
        self._stream = _opened(file)
        try:
            whole = self._read(file, self._stream.read())
            self._check(file, about)
        except LightReasonerError:
            self._stream.close()
            raise
        self._stream.truncate(whole)
        self._stream.seek(whole)
        if set(about["adapters"]) - set(self._about.get("adapters", {})) or not whole:
            self._write({"evaluation": about})

    @classmethod
    def check(cls, file: Path, about: dict[str, Any]) -> None:
        """Raises LightReasonerError if the constructor would. Writes nothing."""
        if file.exists():
            cls.read(file)._check(file, about)

    @classmethod
    def read(cls, file: Path) -> Records:
        """The records of a file, for reading only. Raises LightReasonerError if the file cannot be read."""
        found = cls(None, {})
        try:
            found._read(file, file.read_bytes())
        except OSError as error:
            raise LightReasonerError(f"{file} cannot be read: {error.strerror}") from error
        return found

    @classmethod
    def date_of(cls, file: Path) -> str | None:
        """The day that is written in the prompts of the file's evaluation; None if there is none, or no file."""
        return cls.read(file)._about.get("date") if file.exists() else None

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._found

    def add(self, records: Iterable[Record]) -> None:
        """Add records, and write them to the file. Raises LightReasonerError if they cannot be written."""
        for record in records:
            self._found[record.key] = record
            self._write(asdict(record))

    def of(self, model: str, benchmark: str) -> list[list[Record]]:
        """The samples of each problem, in the benchmark's order."""
        problems: dict[int, dict[int, Record]] = {}
        for key, record in self._found.items():
            if key[:2] == (model, benchmark):
                problems.setdefault(record.number, {})[record.sample_index] = record
        return [[samples[index] for index in sorted(samples)] for _, samples in sorted(problems.items())]

    def close(self) -> None:
        if self._stream:
            with contextlib.suppress(OSError):  # `add` has already reported it
                self._stream.close()

    def _read(self, file: Path, data: bytes) -> int:
        """Read the complete lines of a file; returns their size in bytes."""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            if data[: len(HEADER)] != HEADER[: len(data)]:
                raise ValueError("its first line is another")
            for line in map(json.loads, whole.splitlines()):
                if made := line.get("evaluation"):
                    self._about = {**made, "adapters": self._about.get("adapters", {}) | made["adapters"]}
                else:
                    record = Record(**line)
                    self._found[record.key] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LightReasonerError(f"{file} holds no evaluation ({error!r}); move it away, or name another") from None
        return len(whole)

    def _check(self, file: Path, about: dict[str, Any]) -> None:
        """Raises LightReasonerError, naming the differences, if the file is not of the evaluation `about`."""
        if not self._about:
            return
        there, now = _flat(self._about), _flat(json.loads(json.dumps(about)))
        for adapter in _adapters(there) ^ _adapters(now):  # adapters may be added or left out
            there.pop(adapter, None)
            now.pop(adapter, None)
        names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
        if not names:
            return
        different = [
            f"{name} has changed (its problems, their prompts or answers, or --limit)"
            if name.startswith("benchmark ")
            else f"{name} {there.get(name)!r} there, {now.get(name)!r} now"
            for name in names
        ]
        raise LightReasonerError(
            f"{file} is of another evaluation: {'; '.join(different)}. Move it away, or name another"
        )

    def _write(self, value: dict[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(value).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise LightReasonerError(
                f"{self._stream.name} cannot be written: {error.strerror}. It keeps what was written; fix the cause, "
                "and the same command resumes"
            ) from error


def _opened(file: Path) -> BinaryIO:
    """Open or create the file, and lock it against other processes. Raises LightReasonerError if that fails."""
    try:
        stream = lock(file)
    except OSError as error:
        raise LightReasonerError(f"{file} cannot be written: {error.strerror}") from error
    if stream is None:
        raise LightReasonerError(f"{file} is being written by another evaluation; wait for its end, or name another")
    return stream


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    """The identity of an evaluation as a flat dictionary: each benchmark and each adapter has a key."""
    found = {name: value for name, value in about.items() if name not in ("adapters", "benchmarks")}
    for kind in ("adapter", "benchmark"):
        found |= {f"{kind} {name}": value for name, value in about.get(f"{kind}s", {}).items()}
    return found


def _adapters(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("adapter ")}
