"""The problems of a run: each id once, in order, with little memory beyond their texts.

In: problems, or texts by id. Out: `Problem` values, made on demand; subsets; the identity of the set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, KeysView

import orjson
from pydantic import BaseModel, ConfigDict

from client.errors import ProblemSetError, shorten
from client.protocol.requests import Problem

DIGEST_SHOWN = 12
"""Characters of a digest in a message: enough to find it in a run.json."""


class Frozen(BaseModel):
    """Base of the values in run.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProblemSetIdentity(Frozen):
    """How many problems a RUN has, and a SHA-256 over them (`ProblemSet.identity`)."""

    count: int
    digest: str

    def __str__(self) -> str:
        return f"{self.count:,} problem{'' if self.count == 1 else 's'}, digest {shorten(self.digest, DIGEST_SHOWN)}"


class ProblemSet:
    """Problems by id. A problem that is only a question is kept as its text."""

    def __init__(self, problems: dict[str, str | Problem]) -> None:
        self._problems = problems

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> ProblemSet:
        """Raises ProblemSetError if two problems have the same id."""
        found: dict[str, str | Problem] = {}
        for problem in problems:
            if problem.id in found:
                raise ProblemSetError(f"two problems have the id {problem.id!r}; ids must differ")
            plain = problem.token_ids is None and problem.question
            found[problem.id] = plain or problem
        return cls(found)

    @property
    def ids(self) -> KeysView[str]:
        return self._problems.keys()

    def __len__(self) -> int:
        return len(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        for problem_id, kept in self._problems.items():
            yield Problem(id=problem_id, question=kept) if isinstance(kept, str) else kept

    def question(self, problem_id: str) -> str | None:
        """The question of a problem, or its last message; None if its prompt was given as token ids."""
        kept = self._problems[problem_id]
        return kept if isinstance(kept, str) else kept.text

    def only(self, wanted: Callable[[str], bool]) -> ProblemSet:
        """The problems whose ids are `wanted`."""
        return ProblemSet({problem_id: kept for problem_id, kept in self._problems.items() if wanted(problem_id)})

    def identity(self) -> ProblemSetIdentity:
        """The identity of a problem set in run.json: its size, and a digest that does not depend on the order.

        The digest is SHA-256 over a JSON list of (id, question), sorted by id. The entry of a problem with token ids
        or messages has those too.
        """
        digest, before = hashlib.sha256(), b"["
        for problem_id in sorted(self._problems):
            kept = self._problems[problem_id]
            entry: tuple[object, ...] = (problem_id, kept)
            if isinstance(kept, Problem):
                entry = (problem_id, kept.question, kept.prompt_token_ids, kept.token_ids)
                if kept.messages:
                    entry += ([(message.role, message.content) for message in kept.messages],)
            digest.update(before + orjson.dumps(entry))
            before = b","
        digest.update(b"[]" if not self._problems else b"]")
        return ProblemSetIdentity(count=len(self._problems), digest=digest.hexdigest())
