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
from datetime import date, time, timedelta
from decimal import Decimal
from math import isfinite
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from client.errors import ProblemSetError, fault_words, shorten, shown
from client.problems.problem_set import ProblemSet
from client.problems.rows import Columns, JsonRow, SetRow, rows
from client.protocol.requests import MAX_CHARACTERS, MAX_MESSAGES, Message, Problem

QUESTION_FIELDS = ("question", "problem", "input")
CONVERSATION_FIELD = "prompt"
"""Field in which data sets for training keep a prompt's messages. A string there is not read: it may be no question."""
ID_FIELD = "id"
SPLIT_QUESTION_FIELDS = (("Body", "Question"), ("body", "question"), ("Body", "question"), ("body", "Question"))
"""Fields of data sets that keep the story and the question apart. They come before a `question` field."""
MOST_ID_CHARACTERS = 512
MOST_EXACT_NUMBER = 2**53
"""A float must be below this to be an id: a larger one is not exact, and two ids could become one."""
MOST_CHARACTERS = 500_000_000
"""Most characters of all questions together, which are held in memory."""
WHAT_IT_HOLDS = (
    'expected JSON lines as {"question": "What is 2 + 3?"}, a JSON array of such objects, CSV with a column question '
    "in its first line, or Parquet"
)
MOST_ROWS_A_FILE = 2**40
MOST_ROWS_NAMED = 5
"""Most rows that a message names."""
MOST_NAME_CHARACTERS = 300
"""Most characters of a message's list of field names."""


@dataclass(frozen=True)
class ProblemRow:
    """One problem: id, question, the row, and where the row is. `.problem` is the value for a server.

    `messages`: a conversation; `question` is then its last message.
    """

    id: str
    question: str
    row: JsonRow
    where: str
    messages: tuple[Message, ...] = ()

    @property
    def problem(self) -> Problem:
        """The problem to send to a server, without the answer."""
        if self.messages:
            return Problem(id=self.id, messages=list(self.messages))
        return Problem(id=self.id, question=self.question)


def read_problems(
    path: str,
    limit: int | None = None,
    *,
    question_field: str | None = None,
    id_field: str | None = None,
    shuffle: int | None = None,
    asked_too: Callable[[JsonRow], str] = lambda _: "",
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[ProblemRow]:
    """Read a problem set, with the rows of the problems. `limit`: only the first problems.

    A row has a question (`question_field`; without it `question`, `problem`, `input`, or Body/body + Question/question)
    or messages (`question_field`; without it `prompt`). Its id is in `id_field`, which every row must then have;
    without it in `id`; without one, the id is a digest of the question. A dotted name is that of a nested field. A
    problem that occurs twice, with the same id and question, is read once; `tell` is called with the repeated rows.
    `asked_too`: returns further text of a row that is asked, such as choices; a question with other choices is another
    problem.

    `shuffle`: a seed. The order then depends on the seed and the ids only, and `limit` draws from the whole set.
    `stopped` is called before each row; if it returns True, reading ends.

    Raises ProblemSetError, naming the file and the invalid rows; Stopped.
    """
    names = _Names(question_field, id_field)
    read = _distinct(path, None if shuffle is not None else limit, names, False, stopped, tell, asked_too)
    found = {problem.id: problem for problem in read}
    return [found[problem_id] for problem_id in (found if shuffle is None else _in_order(found, shuffle, limit))]


def read_problem_set(
    path: str,
    limit: int | None = None,
    *,
    question_field: str | None = None,
    id_field: str | None = None,
    shuffle: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
) -> ProblemSet:
    """The same problems as `read_problems`, without their rows. Only the columns of ids and questions are read."""
    names = _Names(question_field, id_field)
    read = _distinct(path, None if shuffle is not None else limit, names, True, stopped, tell)
    found: dict[str, str | Problem] = {row.id: row.problem if row.messages else row.question for row in read}
    if shuffle is not None:
        found = {problem_id: found[problem_id] for problem_id in _in_order(found, shuffle, limit)}
    return ProblemSet(found)


@dataclass(frozen=True)
class _Names:
    """The fields that a user named, if any."""

    question: str | None
    id: str | None

    @property
    def columns(self) -> list[str]:
        """The fields that can hold an id or a question."""
        split = (name for pair in SPLIT_QUESTION_FIELDS for name in pair)
        questions = [self.question] if self.question else [*QUESTION_FIELDS, *split, CONVERSATION_FIELD]
        return list(dict.fromkeys((self.id or ID_FIELD, *questions)))


def _distinct(
    path: str,
    limit: int | None,
    names: _Names,
    only: bool,
    stopped: Callable[[], bool],
    tell: Callable[[str], None],
    asked_too: Callable[[JsonRow], str] = lambda _: "",
) -> Iterator[ProblemRow]:
    """The first `limit` problems, each once. `only`: of each row, read only the fields of ids and questions."""
    questions: dict[str, str | tuple[Message, ...]] = {}
    files: list[str] = []
    places = array("Q")  # file number and row number of each problem, in one number
    again, empty, characters = _Rows(), _Rows(), 0

    def place(problem_id: str) -> str:
        file, number = divmod(places[list(questions).index(problem_id)], MOST_ROWS_A_FILE)
        return f"{files[file]}:{number}"

    for row in rows(path, Columns(names.columns, names.id or ID_FIELD, only), stopped):
        if not files or files[-1] != row.file:
            files.append(row.file)
        where = f"{row.file}:{row.number}"
        asked = _asked(row, where, names.question)
        question = asked if isinstance(asked, str) else asked[-1].content
        if not asked or (isinstance(asked, str) and not asked.strip()):
            empty.add(where)
            continue
        whole = asked + asked_too(row.fields) if isinstance(asked, str) else asked
        problem_id = _id(row, whole, where, names.id)
        if problem_id in questions:
            if questions[problem_id] != whole:
                raise ProblemSetError(
                    f"{where}: id {problem_id!r} is already used with another question at {place(problem_id)}; "
                    "ids must differ"
                )
            again.add(f"{where} as {place(problem_id)}" if again.count < MOST_ROWS_NAMED else where)
            continue
        questions[problem_id] = whole
        places.append((len(files) - 1) * MOST_ROWS_A_FILE + row.number)
        characters += len(asked) if isinstance(asked, str) else sum(len(message.content) for message in asked)
        if characters > MOST_CHARACTERS:
            raise ProblemSetError(f"{where}: more than {MOST_CHARACTERS:,} characters of questions; split the set")
        yield ProblemRow(problem_id, question, row.fields, where, () if isinstance(asked, str) else asked)
        if len(questions) == limit:
            break
    if empty.count:
        raise ProblemSetError(f"{path}: {empty} without a question; remove them")
    if not questions:
        raise ProblemSetError(f"{path} holds no problem; {WHAT_IT_HOLDS}")
    if again.count:
        tell(f"{path}: {again} that repeat an earlier problem; each problem is asked once")


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


def _asked(row: SetRow, where: str, given: str | None) -> str | tuple[Message, ...]:
    """The question or the messages of a row; "" if its question field is empty."""
    fields = row.fields
    for body, question in () if given else SPLIT_QUESTION_FIELDS:
        if fields.get(body) is not None and fields.get(question) is not None:
            parts = [_text_of(fields, name, where).strip() for name in (body, question)]
            return _bounded(" ".join(parts), f"{body!r} and {question!r} together have", where) if all(parts) else ""
    names = (given,) if given else QUESTION_FIELDS
    for name in names:
        if (value := _at(fields, name)) is not None:
            if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
                return _messages(value, name, where)
            return _bounded(_text_of({name: value}, name, where), f"{name!r} has", where)
    if not given and isinstance(prompt := fields.get(CONVERSATION_FIELD), list) and prompt:
        return _messages(prompt, CONVERSATION_FIELD, where)
    if any(_at(fields, name, "") is None for name in names):
        return ""
    expected = (
        repr(given) if given else f"one of {', '.join(QUESTION_FIELDS)}, Body and Question, or prompt of messages"
    )
    had = shorten(", ".join(sorted(row.columns or fields)), MOST_NAME_CHARACTERS) or "no field"
    raise ProblemSetError(f"{where}: no question; expected {expected}; it has {had}. --question-field names another")


def _messages(value: list[Any], name: str, where: str) -> tuple[Message, ...]:
    """Read a conversation. Null fields are left out: in a table's column, each message has the fields of all others."""
    if len(value) > MAX_MESSAGES:
        raise ProblemSetError(f"{where}: {name!r} has {len(value):,} messages; at most {MAX_MESSAGES:,} are allowed")
    for number, message in enumerate(value, 1):
        said = {key: text for key, text in message.items() if text is not None} if isinstance(message, dict) else {}
        if others := sorted(said.keys() - Message.model_fields.keys()):
            raise ProblemSetError(
                f"{where}: message {number} of {name!r} has {shown(others[0])}; only role and content are sent, "
                "remove the others"
            )
        if said.keys() != Message.model_fields.keys() or not all(isinstance(text, str) for text in said.values()):
            raise ProblemSetError(
                f"{where}: message {number} of {name!r} is {shown(message)}; it must have a role and a content, both "
                "strings"
            )
    _bounded("".join(message["content"] for message in value), f"the messages of {name!r} have", where)
    try:
        return tuple(Message(role=message["role"], content=message["content"]) for message in value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ProblemSetError(f"{where}: a {first['loc'][0]} of {name!r}: {fault_words(first)}") from None


def _at(fields: JsonRow, name: str, missing: Any = None) -> Any:
    """The value of a field. A dotted name is that of a nested field, unless a field has the dots in its own name."""
    if name in fields or "." not in name:
        return fields.get(name, missing)
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return missing
        value = value[part]
    return value


def _text_of(row: dict[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ProblemSetError(f"{where}: {name!r} is {shown(value)}; it must be a string or a list of messages")
    return value


def _bounded(question: str, what_has: str, where: str) -> str:
    if len(question) > MAX_CHARACTERS:
        raise ProblemSetError(
            f"{where}: {what_has} {len(question):,} characters, more than the {MAX_CHARACTERS:,} that a question may "
            "have; shorten it or remove the row"
        )
    return question


def _id(row: SetRow, asked: str | tuple[Message, ...], where: str, given: str | None) -> str:
    """The text of the row's id; without one, a digest of what is asked."""
    name = given or ID_FIELD
    value = _at(row.fields, name)
    if value is None and given:
        had = shorten(", ".join(sorted(row.columns or row.fields)), MOST_NAME_CHARACTERS)
        raise ProblemSetError(f"{where}: no id; expected {given!r}; it has {had}. --id-field names another")
    if value is None:
        said = asked if isinstance(asked, str) else repr([(message.role, message.content) for message in asked])
        return hashlib.sha256(said.encode()).hexdigest()[:16]
    if not (text := _scalar_text(value)):
        loses_digits = isinstance(value, float) and isfinite(value)
        large = "a number this large loses digits: write it as a string"
        rule = large if loses_digits else "it must be a string or a number"
        raise ProblemSetError(f"{where}: {name!r} is {shown(value)}; {rule}")
    if len(text) > MOST_ID_CHARACTERS:
        raise ProblemSetError(f"{where}: {name!r} has {len(text)} characters; at most {MOST_ID_CHARACTERS} are allowed")
    return text


def _scalar_text(value: object) -> str:
    """A value as an id; empty if it cannot be one, or if its text is not certain."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if abs(value) < MOST_EXACT_NUMBER else ""
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return value.hex()
        return text if text.isprintable() else value.hex()
    return str(value) if isinstance(value, str | int | Decimal | UUID | date | time | timedelta) else ""


def _place_in_shuffle(seed: int, problem_id: str) -> bytes:
    """The sort key of a problem in a shuffled set. It is the same in every client, for any order of the set."""
    return hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
