"""Benchmarks: problem sets with answers, rendered for the model that is evaluated.

In: files, a model. Out: prompts and gold answers. All errors of the files are found here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from client.errors import ProblemSetError
from client.problems.reader import read_problems
from trainer.adapters.model_folder import ModelFolder
from trainer.grading.gold import Gold, check_shape, gold_answer, question_of, with_fields
from trainer.settings import Examination


@dataclass(frozen=True)
class Question:
    """One problem: its prompt, and the gold answer that outputs are compared with."""

    id: str
    text: str
    prompt: list[int]
    gold: Gold


@dataclass(frozen=True)
class Benchmark:
    """A named list of questions."""

    name: str
    questions: list[Question]

    @property
    def digest(self) -> str:
        """SHA-256 over the questions, their prompts and the gold answers."""
        rows = [[question.text, question.prompt, asdict(question.gold)] for question in self.questions]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_benchmark(
    name: str,
    file: str,
    model: ModelFolder,
    examination: Examination,
    tell: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Read a benchmark and render its questions. `tell` gets a message about rows that repeat others.

    Raises ProblemSetError, naming the row, if a row is invalid, or is of no known benchmark and no field is named.
    """
    choices, answer = examination.choices_field, examination.answer_field
    questions = []
    rows = read_problems(
        file,
        examination.limit,
        question_field=examination.question_field,
        asked_too=lambda row: str(row.get(choices or "choices", "")),
        tell=tell,
    )
    for problem in rows:
        if problem.messages:
            raise ProblemSetError(
                f"{problem.where}: messages, where a benchmark needs a question; add it as 'question'"
            )
        if choices or answer:
            problem = with_fields(problem, choices, answer)
        elif not examination.question_field:
            check_shape(problem)
        text = question_of(problem)
        prompt = render(model, text, examination)
        questions.append(Question(problem.id, text, prompt, gold_answer(problem)))
    return Benchmark(name, questions)


def render(model: ModelFolder, question: str, examination: Examination) -> list[int]:
    """The token ids of a question in the chat template, tokenized without a second BOS. Raises ModelError."""
    variables, date = examination.chat_template_kwargs, examination.date
    text = model.template.render(examination.system_prompt, question, variables, date)
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
