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

        Adapters may be more or others than before; one of the same path must be the same.
        Raises LightReasonerError naming what differs.
        """
        self._found: dict[Key, Record] = {}
        self._about: dict[str, Any] = {}
        self._stream: TextIO | None = None
        if file is None:
            return
        whole = b""
        if file.is_file():
            data = file.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._read(file, whole)
            self._check(file, json.loads(json.dumps(about)))
        self._stream = file.open("r+" if file.is_file() else "w", encoding="utf-8")
        self._stream.truncate(len(whole))
        self._stream.seek(len(whole))
        if set(about["adapters"]) - set(self._about.get("adapters", {})) or not whole:
            self._write({"evaluation": about})

    @classmethod
    def read(cls, file: Path) -> Records:
        """What a file holds, not to be added to."""
        found = cls(None, {})
        found._read(file, file.read_bytes())
        return found

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

    def _read(self, file: Path, whole: bytes) -> None:
        try:
            for line in map(json.loads, whole.splitlines()):
                if made := line.get("evaluation"):
                    self._about = {**made, "adapters": self._about.get("adapters", {}) | made["adapters"]}
                else:
                    record = Record(**line)
                    self._found[record.key] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LightReasonerError(f"{file} holds no evaluation ({error!r}); move it away, or name another") from None

    def _check(self, file: Path, about: dict[str, Any]) -> None:
        """Raises LightReasonerError naming what differs between what the file is of and `about`."""
        if not self._about:
            return
        made = {name: value for name, value in self._about.items() if name != "adapters"}
        pairs = {name: (made.get(name), about.get(name)) for name in {**made, **about} if name != "adapters"}
        for path in self._about["adapters"].keys() & about["adapters"].keys():
            pairs[f"adapter {path}"] = (self._about["adapters"][path], about["adapters"][path])
        if different := [f"{name} {was!r} there, {now!r} now" for name, (was, now) in pairs.items() if was != now]:
            raise LightReasonerError(
                f"{file} is of another evaluation: {'; '.join(different)}. Move it away, or name another"
            )

    def _write(self, value: dict[str, Any]) -> None:
        if self._stream:
            self._stream.write(json.dumps(value) + "\n")
