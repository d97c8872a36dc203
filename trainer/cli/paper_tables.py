"""The commands that make the paper's tables: ablation and efficiency.

Parses options and prints results; the work is done in `trainer.evaluation.paper_tables`, which loads torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from client.errors import LightReasonerError
from trainer.cli.options import named_files, quiet_transformers, wide_console
from trainer.settings import Examination

if TYPE_CHECKING:
    from trainer.evaluation.paper_tables import Row

table_commands = typer.Typer()
OWN = ("--model", "--output", "--seed", "--resume", "--objective", "--answers", "--follow")
"""Options of `train` that differ from row to row."""
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": False}

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A RUN of the expert and an amateur, complete.")]
Model = Annotated[str, typer.Option(help="The expert: a folder or a Hub id.")]
Out = Annotated[Path, typer.Option(help="A folder for adapters and tables; the same command goes on where it stopped.")]
Benchmarks = Annotated[list[str], typer.Option(metavar="NAME=FILE", callback=named_files, help="May be given again.")]
Seeds = Annotated[str, typer.Option(help="Of the trainings, by commas: intervals between seeds need several.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The first problems of each benchmark only.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="New tokens a problem.")]
SystemPrompt = Annotated[str, typer.Option(help="Of the evaluation; empty: no system message.")]


@table_commands.command("ablation", context_settings=EXTRA)
def ablation_command(
    context: typer.Context,
    run: RunArgument,
    model: Model,
    output: Out,
    benchmark: Benchmarks,
    seeds: Seeds = "0",
    limit: Limit = None,
    max_tokens: MaxTokens = Examination.max_tokens,
    system_prompt: SystemPrompt = Examination.system_prompt,
) -> None:
    """What each part of the method brings: full, without step selection, without contrast, without either.

    What stands after -- goes to every training: … -- --epochs 6
    """
    quiet_transformers()
    from trainer.evaluation.paper_tables import Plan, ablation

    examination = Examination(max_tokens, system_prompt, limit)
    plan = Plan(model, output, files_of(benchmark), seeds_of(seeds), examination, train_options(context.args))
    _show(ablation(run, plan, console := wide_console()), "ablation", output, console)


@table_commands.command("efficiency", context_settings=EXTRA)
def efficiency_command(
    context: typer.Context,
    run: RunArgument,
    solutions: Annotated[
        str, typer.Argument(metavar="SOLUTIONS", help="A RUN with several whole solutions a problem, for SFT.")
    ],
    answers: Annotated[str, typer.Option(metavar="FILE", help="The problem set of SOLUTIONS, with its answers.")],
    model: Model,
    output: Out,
    benchmark: Benchmarks,
    seeds: Seeds = "0",
    limit: Limit = None,
    max_tokens: MaxTokens = Examination.max_tokens,
    system_prompt: SystemPrompt = Examination.system_prompt,
) -> None:
    """What the contrast costs and brings against SFT: seconds, problems, tuned tokens, accuracy.

    What stands after -- goes to every training: … -- --epochs 6
    """
    quiet_transformers()
    from trainer.evaluation.paper_tables import Plan, efficiency

    examination = Examination(max_tokens, system_prompt, limit)
    plan = Plan(model, output, files_of(benchmark), seeds_of(seeds), examination, train_options(context.args))
    _show(efficiency(run, solutions, answers, plan, console := wide_console()), "efficiency", output, console)


def files_of(benchmark: list[str]) -> dict[str, str]:
    """NAME=FILE, as `named_files` has checked them, by name."""
    return dict(value.split("=", 1) for value in benchmark)


def seeds_of(text: str) -> list[int]:
    """Raises LightReasonerError where they are no whole numbers, or one comes twice."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise LightReasonerError(f"--seeds {text!r}: give whole numbers, by commas, as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise LightReasonerError(f"--seeds {text!r}: each once, from 0 on")
    return seeds


def train_options(words: list[str]) -> list[str]:
    """What stands after --, for `train`. Raises LightReasonerError for what the table sets itself."""
    for word in words:
        if word.partition("=")[0] in OWN:
            raise LightReasonerError(f"{word} cannot stand after --: the table sets {', '.join(OWN)} itself")
    return words


def _show(rows: list[Row], title: str, out: Path, console: Console) -> None:
    from trainer.evaluation.paper_tables import figures, markdown, table

    console.print(table(rows, title))
    (out / f"{title}.json").write_text(json.dumps(figures(rows), indent=2) + "\n")
    (out / f"{title}.md").write_text(markdown(rows, title))
    console.print(f"{out / title}.json and .md hold the same", soft_wrap=True)
