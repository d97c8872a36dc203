"""Zero-shot accuracy of a model, and of the same model with adapters, through one vLLM engine.

In: a model, its adapters, benchmarks with answers. Out: one record per output, written as they come, and comparisons.
All errors of the input are found before the engine starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
"""Settings that records of early versions lack, and that say nothing where they are empty."""
AT_ONCE = 512
"""Outputs between two writes of records: a killed evaluation repeats at most these."""


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
    """The benchmarks, read, and what the evaluation of a model on them is of.

    A chat template that writes the date writes the day on which the records in `file` were begun.
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
    missing = [
        (name, benchmark, number)
        for name in models
        for benchmark in benchmarks
        for number in range(len(benchmark.questions))
        if any((name, benchmark.name, number, index) not in records for index in range(examination.n))
    ]
    context = context_for(model, benchmarks, examination.max_tokens, console)
    if len(records):
        console.print(f"{len(records):,} outputs are there already", soft_wrap=True)
    if not missing:
        return
    engine = AnswerEngine(model, list(adapters.values()), examination.dtype, context)
    try:
        with _progress(console, len(missing) * examination.n) as advance:
            while missing:
                name, benchmark = missing[0][:2]
                most = max(1, AT_ONCE // examination.n)
                these = [number for *about, number in missing[:most] if about == [name, benchmark]]
                missing = missing[len(these) :]
                questions = [benchmark.questions[number] for number in these]
                outputs = engine.answers([question.prompt for question in questions], examination, models[name])
                for number, question, texts in zip(these, questions, outputs, strict=True):
                    grades = [grade(question.gold, text) for text in texts]
                    records.add(
                        Record(name, benchmark.name, number, question.id, index, question.text, text, found.extracted,
                               question.gold.text, found.correct)
                        for index, (text, found) in enumerate(zip(texts, grades, strict=True))
                    )  # fmt: skip
                advance(f"{benchmark.name}, {name}", len(these) * examination.n)
    finally:
        engine.close()


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar; without a terminal, a line for each benchmark and model. Yields the function that advances it."""
    said = ""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def advance(what: str, count: int) -> None:
            nonlocal said
            if what != said and not console.is_terminal:
                console.print(f"{what} …", soft_wrap=True)
            said = what
            bar.update(task, description=what, advance=count)

        yield advance


def context_for(model: ModelFolder, benchmarks: Sequence[Benchmark], max_tokens: int, console: Console) -> int:
    """The context for the engine: enough for the longest prompt, but at most the model's context.

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
