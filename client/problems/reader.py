"""Reads problem sets: which field is the question, what the id is, which rows are invalid.

In: a path, an s3:// or an hf:// URL. Out: a `ProblemSet` for sampling, or `ProblemRow` values, which also have the rest
of the row, such as answers. Each id comes once, in the order of the set or shuffled by a seed. An invalid row is an
error that names file and line.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from client.errors import ProblemSetError, shorten, shown
from client.problems.problem_set import ProblemSet
from client.problems.rows import column_names, rows
from client.protocol.requests import MAX_CHARACTERS, Problem

QUESTION_FIELDS = ("question", "problem", "input")
SPLIT_QUESTION_FIELDS = (("Body", "Question"), ("body", "question"), ("Body", "question"), ("body", "Question"))
"""Fields of data sets that keep the story and the question apart. They come before a `question` field."""
MOST_ID_CHARACTERS = 512
MOST_CHARACTERS = 500_000_000
"""Most characters of all questions together, which are held in memory."""
MOST_ROWS_NAMED = 5
"""Most rows that a message names."""
MOST_NAME_CHARACTERS = 300
"""Most characters of a message's list of field names."""


@dataclass(frozen=True)
class ProblemRow:
    """One problem: id, question, the row, and where the row is. `.problem` is the value for a server."""

    id: str
    question: str
    row: dict[str, Any]
    where: str

    @property
    def problem(self) -> Problem:
        """The problem to send to a server, without the answer."""
        return Problem(id=self.id, question=self.question)


def read_problems(
    path: str,
    limit: int | None = None,
    *,
    question_field: str | None = None,
    shuffle: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[ProblemRow]:
    """Read a problem set, with the rows of the problems. `limit`: only the first problems.

    A row has a question (`question_field`; without it `question`, `problem`, `input`, or Body/body + Question/question)
    and may have an `id`; without one, the id is a digest of the question. A problem that occurs twice, with the same id
    and question, is read once; `tell` is called with the repeated rows.

    `shuffle`: a seed. The order then depends on the seed and the ids only, and `limit` draws from the whole set.
    `stopped` is called before each row; if it returns True, reading ends.

    Raises ProblemSetError, naming the file and the invalid rows; Stopped.
    """
    read = _distinct(path, None if shuffle is not None else limit, question_field, None, stopped, tell)
    found = {problem.id: problem for problem in read}
    return [found[problem_id] for problem_id in (found if shuffle is None else _in_order(found, shuffle, limit))]


def read_problem_set(
    path: str,
    limit: int | None = None,
    *,
    question_field: str | None = None,
    shuffle: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
) -> ProblemSet:
    """The same problems as `read_problems`, without their rows. Only the columns of ids and questions are read."""
    fields = _fields(question_field)
    read = _distinct(path, None if shuffle is not None else limit, question_field, fields, stopped, tell)
    found: dict[str, str | Problem] = {problem.id: problem.question for problem in read}
    if shuffle is not None:
        found = {problem_id: found[problem_id] for problem_id in _in_order(found, shuffle, limit)}
    return ProblemSet(found)


def _distinct(
    path: str,
    limit: int | None,
    question_field: str | None,
    fields: list[str] | None,
    stopped: Callable[[], bool],
    tell: Callable[[str], None],
) -> Iterator[ProblemRow]:
    """The first `limit` problems, each once. `fields`: the only fields to read of each row."""
    questions: dict[str, str] = {}
    numbers = array("Q")  # of their rows
    again, empty, characters = _Rows(), _Rows(), 0

    def place(problem_id: str) -> str:
        return f"{path}:{numbers[list(questions).index(problem_id)]}"

    for number, row in rows(path, fields, stopped):
        where = f"{path}:{number}"
        question = _question(row, where, question_field)
        if question is None:
            raise _no_question(path, where, row, question_field)
        if not question.strip():
            empty.add(where)
            continue
        problem_id = _id(row, question, where)
        if problem_id in questions:
            if questions[problem_id] != question:
                raise ProblemSetError(
                    f"{where}: id {problem_id!r} is already used with another question at {place(problem_id)}; "
                    "ids must differ"
                )
            again.add(f"{where} as {place(problem_id)}" if again.count < MOST_ROWS_NAMED else where)
            continue
        questions[problem_id] = question
        numbers.append(number)
        if (characters := characters + len(question)) > MOST_CHARACTERS:
            raise ProblemSetError(f"{where}: more than {MOST_CHARACTERS:,} characters of questions; split the set")
        yield ProblemRow(problem_id, question, row, where)
        if len(questions) == limit:
            break
    if empty.count:
        raise ProblemSetError(f"{path}: {empty} without a question; remove them")
    if not questions:
        raise ProblemSetError(f"{path} holds no problem; give a file with one JSON object a line")
    if again.count:
        tell(f"{path}: {again} that repeat an earlier problem; each problem is sampled once")


def _in_order(ids: Iterable[str], shuffle: int, limit: int | None) -> list[str]:
    return sorted(ids, key=lambda problem_id: _place_in_shuffle(shuffle, problem_id))[:limit]


@dataclass
class _Rows:
    """Rows for a message: how many, and where the first ones are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < MOST_ROWS_NAMED:
            self.first.append(where)

    def __str__(self) -> str:
        more = ", …" if self.count > MOST_ROWS_NAMED else ""
        return f"{self.count:,} row{'s' if self.count > 1 else ''} ({', '.join(self.first)}{more})"


def _fields(question_field: str | None) -> list[str]:
    """The fields that can hold an id or a question."""
    if question_field:
        return ["id", question_field]
    return list(dict.fromkeys(("id", *QUESTION_FIELDS, *(name for pair in SPLIT_QUESTION_FIELDS for name in pair))))


def _question(row: dict[str, Any], where: str, given: str | None) -> str | None:
    """The question of a row; "" if its question field is empty, None if it has no question field."""
    for body, question in () if given else SPLIT_QUESTION_FIELDS:
        if row.get(body) is not None and row.get(question) is not None:
            parts = [_text_of(row, name, where).strip() for name in (body, question)]
            return _bounded(" ".join(parts), f"{body!r} and {question!r} together have", where) if all(parts) else ""
    fields = (given,) if given else QUESTION_FIELDS
    for name in fields:
        if row.get(name) is not None:
            return _bounded(_text_of(row, name, where), f"{name!r} has", where)
    return "" if any(name in row for name in fields) else None


def _no_question(path: str, where: str, row: dict[str, Any], given: str | None) -> ProblemSetError:
    expected = repr(given) if given else f"one of {', '.join(QUESTION_FIELDS)}, or Body and Question"
    names = shorten(", ".join(sorted(column_names(path) or row)), MOST_NAME_CHARACTERS) or "no field"
    return ProblemSetError(f"{where}: no question; expected {expected}; it has {names}. --question-field names another")


def _text_of(row: dict[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ProblemSetError(f"{where}: {name!r} is {shown(value)}; it must be a string")
    return value


def _bounded(question: str, what_has: str, where: str) -> str:
    if len(question) > MAX_CHARACTERS:
        raise ProblemSetError(
            f"{where}: {what_has} {len(question):,} characters, more than the {MAX_CHARACTERS:,} that a question may "
            "have; shorten it or remove the row"
        )
    return question


def _id(row: dict[str, Any], question: str, where: str) -> str:
    value = row.get("id")
    if value is None:
        return hashlib.sha256(question.encode()).hexdigest()[:16]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ProblemSetError(f"{where}: 'id' is {shown(value)}; it must be a string or an integer")
    if len(str(value)) > MOST_ID_CHARACTERS:
        raise ProblemSetError(
            f"{where}: 'id' has {len(str(value))} characters; at most {MOST_ID_CHARACTERS} are allowed"
        )
    return str(value)


def _place_in_shuffle(seed: int, problem_id: str) -> bytes:
    """The sort key of a problem in a shuffled set. It is the same in every client, for any order of the set."""
    return hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
