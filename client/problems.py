"""Reads problem sets: JSONL, gzipped JSONL or Parquet, a row a problem, with the field names that datasets use.

In: a path or an s3:// URL. Out: `ProblemRow` values in file order, every id once. A row that cannot be a problem is
named by file and line before anything else happens. Answers are carried along in `row`; sampling never sees them.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from client.bucket import Bucket, local_folder
from client.errors import ProblemSetError
from client.protocol import Problem
from client.samples import ProblemSetIdentity

QUESTION_FIELDS = ("question", "problem", "input")
SPLIT_QUESTION_FIELDS = (("Body", "Question"), ("body", "question"), ("Body", "question"), ("body", "Question"))
"""Data sets that keep the story and the question apart; they win over a bare `question`."""


@dataclass(frozen=True)
class ProblemRow:
    """One problem: its id, its question, the row it came from and where that is."""

    id: str
    question: str
    row: dict[str, Any]
    where: str

    @property
    def problem(self) -> Problem:
        """What is sent to a server: never the answer."""
        return Problem(id=self.id, question=self.question)


def read_problems(path: str, limit: int | None = None) -> list[ProblemRow]:
    """Read a problem set, the first `limit` problems of it if given.

    A row has a question (`question`, `problem`, `input`, or Body/body + Question/question) and optionally an
    `id`; without one, the id is a digest of the question. A question that comes twice is read once.

    Raises ProblemSetError naming the file, and the line where a row is at fault.
    """
    problems: dict[str, ProblemRow] = {}
    for where, row in _rows(path):
        question = _question(row, where)
        problem = ProblemRow(_id(row, question, where), question, row, where)
        earlier = problems.setdefault(problem.id, problem)
        if earlier.question != question:
            raise ProblemSetError(
                f"{where}: id {problem.id!r} is already used with another question at {earlier.where}; ids must differ"
            )
        if len(problems) == limit:
            break
    if not problems:
        raise ProblemSetError(f"{path} holds no problem; give a file with one JSON object a line")
    return list(problems.values())


def identity(problems: list[Problem]) -> ProblemSetIdentity:
    """What run.json keeps of a problem set: its size and a digest that does not depend on its order.

    SHA-256 over the (id, question) pairs sorted by id; the token ids that a problem brings stand beside its pair.
    """
    entries = []
    for problem in sorted(problems, key=lambda problem: problem.id):
        ids = (problem.prompt_token_ids, problem.token_ids)
        entries.append((problem.id, problem.question, *(ids if any(ids) else ())))
    return ProblemSetIdentity(count=len(entries), digest=hashlib.sha256(orjson.dumps(entries)).hexdigest())


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) for every row; `where` is file:line, or file:row in Parquet, from 1."""
    try:
        with _opened(path) as file:
            if path.endswith(".parquet"):
                for number, row in enumerate(pq.read_table(file).to_pylist(), 1):
                    yield f"{path}:{number}", row
                return
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield f"{path}:{number}", _object(text, f"{path}:{number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise ProblemSetError(f"{path} cannot be read: {error}") from error


def _opened(path: str) -> BinaryIO:
    if urlsplit(path).scheme in ("", "file"):
        file = local_folder(path)
        if file.is_file():
            return file.open("rb")
    else:
        folder, _, name = path.rpartition("/")
        if (data := Bucket(folder).get(name)) is not None:
            return io.BytesIO(data)
    raise ProblemSetError(f"no problem set at {path}: give a .jsonl, .jsonl.gz or .parquet file")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ProblemSetError(f"{where}: not a JSON object ({error}); a problem set has one object a line") from None
    if not isinstance(row, dict):
        raise ProblemSetError(
            f"{where}: a JSON {type(row).__name__}, not an object; a problem set has one object a line"
        )
    return row


def _question(row: dict[str, Any], where: str) -> str:
    for body, question in SPLIT_QUESTION_FIELDS:
        if row.get(body) is not None and row.get(question) is not None:
            parts = (_text(row, body, where), _text(row, question, where))
            return " ".join(part.strip() for part in parts)
    for field in QUESTION_FIELDS:
        if row.get(field) is not None:
            return _text(row, field, where)
    names = ", ".join(sorted(row)) or "none"
    raise ProblemSetError(
        f"{where}: no question; expected one of {', '.join(QUESTION_FIELDS)}, or Body and Question; it has {names}"
    )


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise ProblemSetError(f"{where}: {field!r} is {value!r}; it must be a text that is not empty")
    return value


def _id(row: dict[str, Any], question: str, where: str) -> str:
    value = row.get("id")
    if value is None:
        choices = row.get("choices")  # with others it is another problem
        text = f"{question}\n{choices}" if choices else question
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ProblemSetError(f"{where}: 'id' is {value!r}; it must be a text or a whole number")
    if len(str(value)) > 512:
        raise ProblemSetError(f"{where}: 'id' has {len(str(value))} characters; at most 512 are allowed")
    return str(value)
