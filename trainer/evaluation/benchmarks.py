"""Benchmarks: problem sets with answers, rendered for the model that is to be asked.

In: files, a tokenizer. Out: prompts and gold answers. Everything that can be wrong with them is found here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from client.errors import ModelError, ProblemSetError
from client.problems.reader import read_problems
from trainer.grading.gold import Gold, gold_answer, question_of
from trainer.settings import Examination


@dataclass(frozen=True)
class Question:
    """One problem, as it is put and as it is graded."""

    id: str
    text: str
    prompt: list[int]
    gold: Gold


@dataclass(frozen=True)
class Benchmark:
    """A named list of them."""

    name: str
    questions: list[Question]

    @property
    def digest(self) -> str:
        """SHA-256 over the questions, as text and as the chat template puts them, and the gold answers."""
        rows = [[question.text, question.prompt, asdict(question.gold)] for question in self.questions]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_benchmark(name: str, file: str, tokenizer: PreTrainedTokenizerBase, examination: Examination) -> Benchmark:
    """Read a benchmark and render its questions. Raises ProblemSetError naming a row that will not do."""
    questions = []
    for problem in read_problems(file, examination.limit):
        if problem.messages:
            raise ProblemSetError(
                f"{problem.where}: messages, where a benchmark needs a question; add it as 'question'"
            )
        text = question_of(problem)
        prompt = render(tokenizer, examination.system_prompt, text)
        questions.append(Question(problem.id, text, prompt, gold_answer(problem)))
    return Benchmark(name, questions)


def render(tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str) -> list[int]:
    """A question as the chat template puts it, straight to ids, so that no second BOS is added."""
    if not tokenizer.chat_template:
        raise ModelError(f"{tokenizer.name_or_path} has no chat template; add chat_template.jinja to the model folder")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": question}]
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except TemplateError as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} refuses the prompt: {error}. "
            "Where it knows no system role, give --system-prompt ''"
        ) from error
