"""What each model answered to each problem, a JSON line each: kept as it comes, so that an evaluation resumes.

In: outputs with their grades. Out: a file whose first line says what was evaluated, and the records in it. A line
that a crash cut is dropped; a file of another evaluation is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from client.errors import LightReasonerError

Key = tuple[str, str, int, int]
"""Model, benchmark, the problem's place in it, sample."""


@dataclass(frozen=True)
class Record:
    """One output and what was made of it."""

    model: str  # `BASE`, or the adapter's path
    benchmark: str
    number: int  # of the problem in its benchmark, from 0
    problem_id: str
    sample_index: int
    prompt: str  # the question as it was put, without the chat template
    output: str
    extracted: str
    gold: str
    correct: bool

    @property
    def key(self) -> Key:
        return self.model, self.benchmark, self.number, self.sample_index


class Records:
    """The records of one evaluation, in memory, and in a file where there is one."""

    def __init__(self, file: Path | None, about: dict[str, Any]) -> None:
        """Take up what `file` holds of the same evaluation; `about` says what it is of.

        Raises LightReasonerError naming what differs.
        """
        self._found: dict[Key, Record] = {}
        self._stream: TextIO | None = None
        if file is None:
            return
        whole = b""
        if file.is_file():
            data = file.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._read(file, whole, json.loads(json.dumps(about)))
        self._stream = file.open("r+" if file.is_file() else "w", encoding="utf-8")
        self._stream.truncate(len(whole))
        self._stream.seek(len(whole))
        if not whole:
            self._write({"evaluation": about})

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def add(self, records: Iterable[Record]) -> None:
        """Keep records; when this returns, they are in the file."""
        for record in records:
            self._found[record.key] = record
            self._write(asdict(record))
        if self._stream:
            self._stream.flush()

    def of(self, model: str, benchmark: str) -> list[list[Record]]:
        """The samples of each problem, in the benchmark's order."""
        problems: dict[int, dict[int, Record]] = {}
        for key, record in self._found.items():
            if key[:2] == (model, benchmark):
                problems.setdefault(record.number, {})[record.sample_index] = record
        return [[samples[index] for index in sorted(samples)] for _, samples in sorted(problems.items())]

    def close(self) -> None:
        if self._stream:
            self._stream.close()

    def _read(self, file: Path, whole: bytes, about: dict[str, Any]) -> None:
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            made = lines[0]["evaluation"] if lines else about
            found = [Record(**line) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise LightReasonerError(f"{file} holds no evaluation ({error!r}); move it away, or name another") from None
        if different := [name for name in {**made, **about} if made.get(name) != about.get(name)]:
            listed = "; ".join(f"{name} {made.get(name)!r} there, {about.get(name)!r} now" for name in different)
            raise LightReasonerError(f"{file} is of another evaluation: {listed}. Move it away, or name another")
        self._found = {record.key: record for record in found}

    def _write(self, value: dict[str, Any]) -> None:
        if self._stream:
            self._stream.write(json.dumps(value) + "\n")
