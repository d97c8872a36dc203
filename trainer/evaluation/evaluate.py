"""Zero-shot accuracy of a model, and of the same model with adapters, through one vLLM engine.

In: a model, its adapters, benchmarks with answers. Out: one record per output, written as they come, and comparisons.
All errors of the input are found before the engine starts.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from client.cli.progress import PLAIN_SECONDS, UPDATE_SECONDS
from client.errors import LightReasonerError
from trainer.adapters.adapter import CONFIG, WEIGHTS, adapter_folder, check_base, read_config
from trainer.adapters.matching import check_matches, has_effect
from trainer.adapters.model_folder import ModelFolder
from trainer.evaluation.answer_engine import AnswerEngine
from trainer.evaluation.benchmarks import Benchmark, read_benchmark
from trainer.evaluation.records import Record, Records
from trainer.evaluation.scores import Comparison, comparison_of
from trainer.grading.grader import grade
from trainer.settings import Examination

BASE_MODEL = "base"
"""The name of the model without an adapter, in records and results."""
LATER = "chat_template_kwargs", "date"
"""Settings that early versions did not record. An empty one is left out of an evaluation's identity."""


def evaluate(
    model: ModelFolder,
    adapters: Sequence[str],
    benchmarks: Mapping[str, str],
    examination: Examination,
    console: Console,
    file: Path | None = None,
) -> list[Comparison]:
    """Score a model on benchmarks (name -> file), without an adapter and with each, in one engine.

    `file`: the file of records; the same call resumes from it. Raises ModelError, ProblemSetError or another
    LightReasonerError for invalid input.
    """
    if len(set(adapters)) < len(adapters):
        raise LightReasonerError("--adapter: the same adapter is given twice")
    tuned = {name: adapter_folder(name) for name in adapters}
    for adapter in tuned.values():
        read_config(adapter)
        check_base(adapter, model)
        check_matches(adapter, model)
        if not has_effect(adapter):
            console.print(
                f"warning: {adapter} changes nothing: all of its updates are zero; was it trained?",
                style="yellow",
                soft_wrap=True,
            )
    model.check_whole()
    read, about = benchmarks_of(model, benchmarks, examination, file, lambda text: console.print(text, soft_wrap=True))
    records = Records(file, about | {"adapters": {name: _digest(at) for name, at in tuned.items()}})
    try:
        _ask_all(model, tuned, read, examination, records, console)
    finally:
        records.close()
    names = [BASE_MODEL, *tuned]
    return [
        comparison_of(benchmark.name, [(name, records.of(name, benchmark.name)) for name in names])
        for benchmark in read
    ]


def check(model: ModelFolder, benchmarks: Mapping[str, str], examination: Examination, file: Path) -> None:
    """Raises the errors of `evaluate` that do not depend on adapters: of the benchmarks and the file of records."""
    _, about = benchmarks_of(model, benchmarks, examination, file)
    Records.check(file, about | {"adapters": {}})


def benchmarks_of(
    model: ModelFolder,
    benchmarks: Mapping[str, str],
    examination: Examination,
    file: Path | None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[list[Benchmark], dict[str, Any]]:
    """Read the benchmarks. Returns them, and the identity of the model's evaluation on them, without adapters.

    A chat template that writes the date gets the day on which the records in `file` began, or today.
    """
    if model.template.writes_date:
        begun = Records.date_of(file) if file else None
        examination = replace(examination, date=begun or date.today().isoformat())
    read = [read_benchmark(name, path, model, examination, tell) for name, path in benchmarks.items()]
    asked = {name: value for name, value in asdict(examination).items() if name != "limit"}
    about = {
        "base": model.fingerprint,
        "benchmarks": {benchmark.name: benchmark.digest for benchmark in read},
        **{name: value for name, value in asked.items() if value or name not in LATER},
        "dtype": str(model.dtype_for(examination.dtype)).removeprefix("torch."),
        "end_token_ids": model.end_token_ids,
    }
    return read, about


def _digest(adapter: Path) -> str:
    """SHA-256 over an adapter's settings and weights."""
    return hashlib.sha256((adapter / CONFIG).read_bytes() + (adapter / WEIGHTS).read_bytes()).hexdigest()


def _ask_all(
    model: ModelFolder,
    adapters: Mapping[str, Path],
    benchmarks: Sequence[Benchmark],
    examination: Examination,
    records: Records,
    console: Console,
) -> None:
    """Generate, grade and record every output that has no record yet."""
    models = {BASE_MODEL: None, **adapters}

    def has_outputs(name: str, benchmark: Benchmark, number: int) -> bool:
        return all((name, benchmark.name, number, index) in records for index in range(examination.n))

    missing = {
        (name, benchmark.name): [at for at in range(len(benchmark.questions)) if not has_outputs(name, benchmark, at)]
        for name in models
        for benchmark in benchmarks
    }
    context = context_for(model, benchmarks, examination.max_tokens, console)
    progress = AskingProgress()
    for benchmark in benchmarks:
        total = len(models) * len(benchmark.questions)
        there = total - sum(len(missing[name, benchmark.name]) for name in models)
        progress.expect(total * examination.n, there * examination.n)
        if there:
            console.print(
                f"resuming: {there * examination.n:,} of {total * examination.n:,} outputs of {benchmark.name} are "
                "there",
                soft_wrap=True,
            )
    if not any(missing.values()):
        return
    with progress:
        engine = AnswerEngine(model, list(adapters.values()), examination.dtype, context)
        try:
            for name, benchmark in ((name, benchmark) for name in models for benchmark in benchmarks):
                progress.begin(benchmark.name, name)
                numbers = missing[name, benchmark.name]
                prompts = [benchmark.questions[number].prompt for number in numbers]
                for place, texts in engine.answers(prompts, examination, models[name], progress.tokens):
                    number, question = numbers[place], benchmark.questions[numbers[place]]
                    grades = [grade(question.gold, text) for text in texts]
                    records.add(
                        Record(name, benchmark.name, number, question.id, index, question.text, text, found.extracted,
                               question.gold.text, found.correct)
                        for index, (text, found) in enumerate(zip(texts, grades, strict=True))
                    )  # fmt: skip
                    progress.outputs(len(texts))
        finally:
            engine.close()


class AskingProgress:
    """Shows the progress of an evaluation on stderr: a live line on a terminal, else a line from time to time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[rates]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("starting vLLM", total=0, rates="")
        self._what = ""
        self._total = self._there = self._done = self._tokens = 0  # three counts of outputs; new tokens of this run
        self._began = self._shown = 0.0

    def expect(self, total: int, there: int) -> None:
        """Add to the number of outputs: `total` outputs, of which `there` are recorded already."""
        self._total, self._there, self._done = self._total + total, self._there + there, self._done + there

    def __enter__(self) -> AskingProgress:
        self._bar.update(self._task, total=self._total, completed=self._done)
        self._bar.start()
        if not self._console.is_terminal:
            self._say(f"starting vLLM for {self._total - self._there:,} outputs")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, benchmark: str, model: str) -> None:
        """Show the benchmark and the model that are evaluated now."""
        self._what = f"{benchmark}, {model.rstrip('/').rpartition('/')[2]}"
        if not self._began:
            self._began = self._shown = time.monotonic()
        self._bar.update(self._task, description=self._what)

    def tokens(self, count: int) -> None:
        """Count new tokens, and update the display if that is due."""
        self._tokens += count
        now = time.monotonic()
        if now - self._shown < (UPDATE_SECONDS if self._console.is_terminal else PLAIN_SECONDS):
            return
        self._shown, seconds = now, now - self._began
        done = self._done - self._there
        rates = f"{done / seconds:,.1f} outputs/s, {self._tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._done, rates=rates)
        if not self._console.is_terminal:
            left = f"{timedelta(seconds=round(seconds / done * (self._total - self._done)))} left, " if done else ""
            self._say(f"{self._what}: {self._done:,} of {self._total:,} outputs, {left}{rates}")

    def outputs(self, count: int) -> None:
        """Count complete outputs."""
        self._done += count

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def context_for(model: ModelFolder, benchmarks: Sequence[Benchmark], max_tokens: int, console: Console) -> int:
    """The engine's context in tokens: enough for the longest prompt and its output, at most the model's context.

    Prints a warning for prompts that do not fit; they count as wrong.
    """
    longest = max(len(question.prompt) for benchmark in benchmarks for question in benchmark.questions)
    context = min(model.context or sys.maxsize, longest + max_tokens)
    for benchmark in benchmarks:
        if too_long := sum(len(question.prompt) >= context for question in benchmark.questions):
            console.print(
                f"warning: {benchmark.name}: {too_long} prompts fill the context of {context} tokens; counted as wrong",
                style="yellow",
                soft_wrap=True,
            )
    return context
