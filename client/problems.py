"""Problem sets as problems: which field is the question, what the id is, which rows cannot be asked.

In: a path, an s3:// or an hf:// URL. Out: `ProblemRow` values, every id once, in the set's order or shuffled by a seed.
A row that cannot be a problem is named by file and line before anything else happens. Answers are carried along in
`row` for those who want them; sampling never sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from client.errors import ProblemSetError
from client.protocol import MAX_CHARACTERS, Problem
from client.rows import rows
from client.samples import ProblemSetIdentity

QUESTION_FIELDS = ("question", "problem", "input")
SPLIT_QUESTION_FIELDS = (("Body", "Question"), ("body", "question"), ("Body", "question"), ("body", "Question"))
"""Data sets that keep the story and the question apart; they win over a bare `question`."""
MOST_ID_CHARACTERS = 512
MOST_CHARACTERS = 500_000_000
"""Of all questions together: they are held in memory."""
NAMED = 5
"""Rows that a message names, of those it is about."""


@dataclass(frozen=True)
class ProblemRow:
    """One problem: its id, its question, the row it came from and where that is; `.problem` is what a server takes."""

    id: str
    question: str
    row: dict[str, Any]
    where: str

    @property
    def problem(self) -> Problem:
        """What is sent to a server: never the answer."""
        return Problem(id=self.id, question=self.question)


def read_problems(
    path: str,
    limit: int | None = None,
    *,
    question_field: str | None = None,
    shuffle: int | None = None,
    whole_rows: bool = True,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[ProblemRow]:
    """Read a problem set, the first `limit` problems of it if given.

    A row has a question (`question_field`; else `question`, `problem`, `input`, or Body/body + Question/question) and
    optionally an `id`; without one, the id is a digest of the question. A problem that comes again, with the same id
    and question, is read once; `tell` hears which rows those are.

    `shuffle`: a seed; the order then depends on it and on the ids alone, and `limit` draws from the whole set.
    `whole_rows`: without, each `row` is empty and Parquet columns that name no problem are not read at all.
    `stopped` is asked again and again, and ends it.

    Raises ProblemSetError naming the file, and the rows at fault; Stopped.
    """
    problems: dict[str, ProblemRow] = {}
    again, empty, characters = _Rows(), _Rows(), 0
    for where, row in rows(path, None if whole_rows else _fields(question_field), stopped):
        question = _question(row, where, question_field)
        if not question.strip():
            empty.add(where)
            continue
        problem = ProblemRow(_id(row, question, where), question, row if whole_rows else {}, where)
        earlier = problems.setdefault(problem.id, problem)
        if earlier.question != question:
            raise ProblemSetError(
                f"{where}: id {problem.id!r} is already used with another question at {earlier.where}; ids must differ"
            )
        if earlier is not problem:
            again.add(f"{where} as {earlier.where}")
            continue
        if (characters := characters + len(question)) > MOST_CHARACTERS:
            raise ProblemSetError(f"{where}: more than {MOST_CHARACTERS:,} characters of questions; split the set")
        if shuffle is None and len(problems) == limit:
            break
    if empty.count:
        raise ProblemSetError(f"{path}: {empty} without a question; remove what cannot be asked")
    if not problems:
        raise ProblemSetError(f"{path} holds no problem; give a file with one JSON object a line")
    if again.count:
        tell(f"{path}: {again} that repeat an earlier problem; it is asked once")
    found = list(problems.values())
    return found if shuffle is None else sorted(found, key=lambda problem: _lot(shuffle, problem.id))[:limit]


def identity(problems: list[Problem]) -> ProblemSetIdentity:
    """What run.json keeps of a problem set: its size and a digest that does not depend on its order.

    SHA-256 over the (id, question) pairs sorted by id; the token ids that a problem brings stand beside its pair.
    """
    entries = []
    for problem in sorted(problems, key=lambda problem: problem.id):
        ids = (problem.prompt_token_ids, problem.token_ids)
        entries.append((problem.id, problem.question, *(ids if any(ids) else ())))
    return ProblemSetIdentity(count=len(entries), digest=hashlib.sha256(orjson.dumps(entries)).hexdigest())


@dataclass
class _Rows:
    """Rows that a message is about: their number, and where the first of them stand."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(where)

    def __str__(self) -> str:
        more = ", …" if self.count > NAMED else ""
        return f"{self.count:,} row{'s' if self.count > 1 else ''} ({', '.join(self.first)}{more})"


def _fields(question_field: str | None) -> list[str]:
    """What a row may name its problem by."""
    if question_field:
        return ["id", question_field]
    return list(dict.fromkeys(("id", *QUESTION_FIELDS, *(name for pair in SPLIT_QUESTION_FIELDS for name in pair))))


def _question(row: dict[str, Any], where: str, given: str | None) -> str:
    """The question; blank where the row has a field for it and nothing in it."""
    for body, question in () if given else SPLIT_QUESTION_FIELDS:
        if row.get(body) is not None and row.get(question) is not None:
            parts = [_text(row, name, where).strip() for name in (body, question)]
            return " ".join(parts) if all(parts) else ""
    fields = (given,) if given else QUESTION_FIELDS
    for name in fields:
        if row.get(name) is not None:
            return _text(row, name, where)
    if any(name in row for name in fields):
        return ""
    expected = repr(given) if given else f"one of {', '.join(QUESTION_FIELDS)}, or Body and Question"
    names = ", ".join(sorted(row)) or "no field that could be it"
    raise ProblemSetError(f"{where}: no question; expected {expected}; it has {names}. --question-field names another")


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ProblemSetError(f"{where}: {name!r} is {value!r}; it must be a text")
    if len(value) > MAX_CHARACTERS:
        raise ProblemSetError(
            f"{where}: {name!r} has {len(value):,} characters, more than the {MAX_CHARACTERS:,} that a question may "
            "have; shorten it or remove the row"
        )
    return value


def _id(row: dict[str, Any], question: str, where: str) -> str:
    value = row.get("id")
    if value is None:
        return hashlib.sha256(question.encode()).hexdigest()[:16]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ProblemSetError(f"{where}: 'id' is {value!r}; it must be a text or a whole number")
    if len(str(value)) > MOST_ID_CHARACTERS:
        raise ProblemSetError(
            f"{where}: 'id' has {len(str(value))} characters; at most {MOST_ID_CHARACTERS} are allowed"
        )
    return str(value)


def _lot(seed: int, problem_id: str) -> bytes:
    """Where a shuffle puts a problem: the same in every client, whatever its Python and the order of the set."""
    return hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
