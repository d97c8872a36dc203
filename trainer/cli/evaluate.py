"""evaluate: a model, its adapters and benchmarks in; accuracy, examples and every output out.

Parses options, prints and writes results; `trainer.evaluation.evaluate`, which loads torch and vLLM, does the work.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from client.cli.options import template_variables
from client.cli.program import importing
from client.errors import LightReasonerError
from client.runs.run import Run
from trainer.adapters.origin import origins_of, prompt_notes
from trainer.cli.inputs import check_adapters, check_files, check_model
from trainer.cli.options import (
    BENCHMARKS,
    DECODING,
    RESULTS,
    Benchmarks,
    ChatTemplateFile,
    Dtype,
    MaxNewTokens,
    ProblemLimit,
    SystemPrompt,
    TemplateVariables,
    files_by_name,
    quiet_transformers,
    quiet_vllm,
    share,
    wide_console,
)
from trainer.cli.results import check_results, stopped, write_results
from trainer.interruption import ended_by_signals
from trainer.settings import Examination


def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model to evaluate: a folder or a Hugging Face Hub id.")
    ],
    benchmark: Benchmarks,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Also evaluate MODEL with this adapter, unmerged: a folder, file://… or s3://…. "
            "Repeat it for several adapters."
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="OUT",
            help="Also evaluate every checkpoint that a training left in OUT, as a curve of accuracy by step.",
        ),
    ] = None,
    dtype: Dtype = None,
    chat_template: ChatTemplateFile = None,
    limit: ProblemLimit = None,
    question_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=BENCHMARKS, help="Field of the question, in other benchmarks."),
    ] = None,
    choices_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=BENCHMARKS, help="Field of the choices, in other benchmarks."),
    ] = None,
    answer_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=BENCHMARKS,
            help="Field of the answer, in other benchmarks. Of choices: letter, number from 0, label or choice.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            rich_help_panel=RESULTS,
            help="Write the results to FILE.json, examples to FILE.md and every output to FILE.jsonl. "
            "If the command stops early, repeat it: it continues from FILE.jsonl.",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", rich_help_panel=RESULTS, help="Also write the results to RUN, for its report."),
    ] = None,
    max_tokens: MaxNewTokens = Examination.max_tokens,
    system_prompt: SystemPrompt = Examination.system_prompt,
    chat_template_kwargs: TemplateVariables = None,
    n: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            rich_help_panel=DECODING,
            help="Outputs per problem, for pass@k. More than 1 needs --temperature above 0.",
        ),
    ] = Examination.n,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, rich_help_panel=DECODING, help="Sampling temperature; 0 is greedy.")
    ] = Examination.temperature,
    top_p: Annotated[
        float,
        typer.Option(callback=share, rich_help_panel=DECODING, help="Nucleus sampling, with --temperature above 0."),
    ] = Examination.top_p,
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=DECODING, help="Seed for --temperature above 0.")
    ] = Examination.seed,
) -> None:
    """Measure the zero-shot accuracy of a model, without and with adapters.

    Decoding is greedy by default. math-verify compares the answers.
    """
    kept = output and output.with_suffix(".jsonl")
    with ended_by_signals(lambda: stopped(kept)):
        if output and kept:
            check_results(output, kept)
        if n > 1 and temperature == 0:
            raise LightReasonerError(
                "--n above 1 needs --temperature above 0: all greedy outputs of a problem are the same"
            )
        variables = template_variables(chat_template_kwargs)
        files = files_by_name(benchmark)
        if run:
            Run(run).manifest()
        base = check_model(model, chat_template)
        check_adapters(adapter or [], base)
        from trainer.evaluation.curve import checkpoints_of, curve_of, final_last, highest_of

        steps = checkpoints_of(checkpoints) if checkpoints else {}
        check_files(list(files.values()), question_field)
        quiet_vllm()
        with importing():
            quiet_transformers()
            from trainer.evaluation.evaluate import evaluate
            from trainer.evaluation.summary import figures, markdown, table

        settings = Examination(
            max_tokens,
            system_prompt,
            limit,
            n,
            temperature,
            top_p,
            seed,
            dtype,
            variables,
            question_field=question_field,
            choices_field=choices_field,
            answer_field=answer_field,
        )
        console = wide_console()
        adapters = [*final_last(steps, checkpoints or ""), *(name for name in adapter or [] if name not in steps)]
        source = Run(run) if run else None
        if system_prompt == Examination.system_prompt:  # a prompt that the user chose is meant
            for note in prompt_notes(adapters, system_prompt, source):
                console.print(note, soft_wrap=True)
        origins = origins_of(adapters, source) if source else {}
        found = evaluate(base, adapters, files, settings, console, kept)
        console.print(table(found))
        about: dict[str, Any] = {"model": model, "adapters": adapters, "settings": {**asdict(settings), "files": files}}
        if source:
            about["origins"] = {name: made | {"step": steps.get(name, made["step"])} for name, made in origins.items()}
        if steps:
            about["curve"] = curve_of(found, steps)
            for line in highest_of(about["curve"], steps):
                console.print(line, soft_wrap=True)
        text = json.dumps(figures(found) | about, indent=2) + "\n"
        if output and kept:
            write_results({output: text, output.with_suffix(".md"): markdown(found)}, kept)
        if source:
            source.write_evaluation(output.stem if output else "evaluation", text.encode())
