"""ablation and efficiency: RUNs and their expert in; adapters and the paper's tables out.

Parses options, prints and writes tables; `trainer.evaluation.paper_tables`, which loads torch, does the work.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from client.cli.options import template_variables
from client.cli.program import importing
from client.errors import LightReasonerError
from trainer.cli.inputs import refuse_stream
from trainer.cli.options import (
    Benchmarks,
    ChatTemplateFile,
    MaxNewTokens,
    ProblemLimit,
    SystemPrompt,
    TemplateVariables,
    files_by_name,
    quiet_transformers,
    wide_console,
)
from trainer.cli.results import stopped, write_results
from trainer.cli.train import is_trained
from trainer.interruption import ended_by_signals
from trainer.settings import OUTPUTS, Examination

if TYPE_CHECKING:
    from trainer.evaluation.paper_tables import Plan, Row

OWN = ("--model", "--output", "--chat-template", "--seed", "--resume", "--objective", "--answers", "--follow")
"""Options of `train` that a table sets itself."""
READ_AGAIN = "a table reads it for every training"
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": False}
"""Settings that let typer accept options after --."""

SampledRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A complete RUN of the expert and an amateur: a path, file://… or s3://….")
]


@dataclass(frozen=True)
class TableOptions:
    """The options of `ablation` and `efficiency`: the expert, where adapters and tables go, how to evaluate models."""

    model: Annotated[str, typer.Option(help="The expert that sampled RUN: a folder or a Hugging Face Hub id.")]
    output: Annotated[
        Path,
        typer.Option(
            help="A folder for adapters and tables. If the command stops early, repeat it: it continues there."
        ),
    ]
    benchmark: Benchmarks
    chat_template: ChatTemplateFile = None
    seeds: Annotated[
        str,
        typer.Option(help="Seeds for training, separated by commas. Several give a standard deviation between seeds."),
    ] = "0"
    limit: ProblemLimit = None
    max_tokens: MaxNewTokens = Examination.max_tokens
    system_prompt: SystemPrompt = Examination.system_prompt
    chat_template_kwargs: TemplateVariables = None

    def going_on(self) -> AbstractContextManager[None]:
        """A context for the work: a signal ends it at once, with a message about the outputs that are stored."""
        return ended_by_signals(lambda: stopped(self.output / OUTPUTS))

    def plan(self, context: typer.Context) -> Plan:
        """The settings of all rows. Raises LightReasonerError for invalid seeds, benchmarks or options after --."""
        variables = template_variables(self.chat_template_kwargs)
        for name, file in files_by_name(self.benchmark).items():
            refuse_stream(f"--benchmark {name}", file, READ_AGAIN)
        trained_with = ["--chat-template", str(self.chat_template)] if self.chat_template else []
        with importing():
            quiet_transformers()
            from trainer.adapters.model_folder import ModelFolder
            from trainer.evaluation.paper_tables import Plan

        return Plan(
            ModelFolder.find(self.model, self.chat_template),
            self.output,
            files_by_name(self.benchmark),
            seeds_of(self.seeds),
            Examination(self.max_tokens, self.system_prompt, self.limit, chat_template_kwargs=variables),
            [*train_options(context.args), *trained_with],
            is_trained,
        )


def ablation_command(
    context: typer.Context,
    run: SampledRun,
    options: TableOptions,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|LIST",
            help="Other rows: settings of build separated by commas, as labels=tilt gamma=0.5, select=top keep=0.05; "
            "or a file with one a line.",
            show_default="the four of the paper",
        ),
    ] = None,
) -> None:
    """Train and evaluate the method without some of its parts, to measure what each contributes.

    The rows: full, without step selection, without contrast, without either, and the expert untrained. --variants
    names others.

    Options after -- go to every training: … -- --epochs 6
    """
    with options.going_on():
        from trainer.evaluation.variants import variants_of

        chosen = variants_of(variants)
        plan = options.plan(context)
        from trainer.evaluation.paper_tables import ablation

        _show(ablation(run, plan, console := wide_console(), chosen), "ablation", plan, console)


def efficiency_command(
    context: typer.Context,
    run: SampledRun,
    solutions: Annotated[
        str,
        typer.Argument(metavar="SOLUTIONS", help="A RUN with several whole solutions of each problem, for SFT."),
    ],
    answers: Annotated[str, typer.Option(metavar="FILE", help="The problem set of SOLUTIONS, with answers.")],
    options: TableOptions,
) -> None:
    """Compare the method with SFT: sampling and training time, problems, tuned tokens, accuracy.

    Options after -- go to every training: … -- --epochs 6
    """
    refuse_stream("--answers", answers, READ_AGAIN)
    with options.going_on():
        plan = options.plan(context)
        from trainer.evaluation.paper_tables import efficiency

        _show(efficiency(run, solutions, answers, plan, console := wide_console()), "efficiency", plan, console)


def seeds_of(text: str) -> list[int]:
    """The values of --seeds. Raises LightReasonerError unless they are whole numbers, each once."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise LightReasonerError(f"--seeds {text!r}: give whole numbers separated by commas, as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise LightReasonerError(f"--seeds {text!r}: give each seed once, none below 0")
    return seeds


def train_options(words: list[str]) -> list[str]:
    """The options after --, for `train`. Raises LightReasonerError for options that the table sets itself."""
    for word in words:
        if word.partition("=")[0] in OWN:
            raise LightReasonerError(f"{word} cannot stand after --: the table sets {', '.join(OWN)} itself")
    return words


def _show(rows: list[Row], title: str, plan: Plan, console: Console) -> None:
    out = plan.out
    from trainer.evaluation.paper_tables import table_figures, table_markdown, terminal_table

    console.print(terminal_table(rows, title))
    figures = json.dumps(table_figures(rows), indent=2) + "\n"
    write_results({out / f"{title}.json": figures, out / f"{title}.md": table_markdown(rows, title)}, plan.records)
    console.print(f"{out / title}.json and .md hold the same table", soft_wrap=True)
