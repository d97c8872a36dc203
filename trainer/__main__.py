"""The trainer's command line: train, merge, evaluate; ablation and efficiency are in `trainer.cli.paper_tables`.

Parses options and prints results; the work is done in the modules of the same names, which load torch, so they
are imported only when a command runs. A user's mistake is one line on stderr and exit code 1.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from client.errors import LightReasonerError, missing_extra
from trainer.cli.options import named_files, quiet_transformers, wide_console
from trainer.cli.paper_tables import table_commands
from trainer.settings import ALL_LINEAR, PRESETS, Examination, Lora, Objective, Precision, Preset, Recipe, Running

ADAPTER, MACHINE, PROGRESS = "The adapter", "The machine", "Checkpoints and the RUN"
"""Groups of options in --help."""

app = typer.Typer(
    help="Fine-tune an expert on the contrast samples of a RUN, and measure what it gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(table_commands)


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


def names(listed: str) -> tuple[str, ...]:
    """What an option lists by commas."""
    return tuple(filter(None, map(str.strip, listed.split(","))))


def _some(value: str) -> str:
    if not names(value):
        raise typer.BadParameter(f"{value!r} names nothing")
    return value


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1")
    return value


Dtype = Annotated[
    Precision | None,
    typer.Option(
        help="How weights are loaded; auto: as they are stored.", show_default="bfloat16 on a GPU, float32 on a CPU"
    ),
]


@app.command("train")
def train_command(
    run: Annotated[str, typer.Argument(help="The RUN: a local path, file://… or s3://bucket/prefix.")],
    model: Annotated[str, typer.Option(help="The expert that sampled the RUN: a folder or a Hub id.")],
    output: Annotated[str, typer.Option(help="Where the adapter goes: a path, file://… or s3://…, not yet there.")],
    objective: Annotated[
        Objective, typer.Option(help="contrast, or sft: the baseline, on the RUN's right solutions as they are.")
    ] = Objective.CONTRAST,
    answers: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of sft: the problem set that was sampled, with its answers.")
    ] = None,
    preset: Annotated[
        Preset,
        typer.Option(help="paper: the published recipe, 1,000 steps of 16 kept steps drawn from the whole RUN."),
    ] = Preset.DEFAULT,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the RUN.", callback=_positive, show_default="2")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Exactly this many optimizer steps; overrides --epochs.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Trajectories an optimizer step; of paper, kept steps.", show_default="16"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(callback=_positive, help="AdamW's.", show_default=f"{Recipe.learning_rate:g}")
    ] = None,
    dtype: Dtype = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the adapter's start, order and dropout.")
    ] = Recipe.seed,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's r.", rich_help_panel=ADAPTER)] = Lora.rank,
    alpha: Annotated[
        int, typer.Option(min=1, help="The update is scaled by alpha / r.", rich_help_panel=ADAPTER)
    ] = Lora.alpha,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, rich_help_panel=ADAPTER)] = Lora.dropout,
    targets: Annotated[
        str, typer.Option(help=f"Layers, by commas, or {ALL_LINEAR}.", callback=_some, rich_help_panel=ADAPTER)
    ] = ",".join(Lora.targets),
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Scale by alpha / √r (rsLoRA).", rich_help_panel=ADAPTER)
    ] = False,
    use_dora: Annotated[
        bool, typer.Option("--use-dora", help="Learn the magnitudes apart (DoRA).", rich_help_panel=ADAPTER)
    ] = False,
    token_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in one forward pass; a longer trajectory is refused.",
            show_default="8192 on a GPU, 512 on a CPU, more for a trajectory that is longer",
            rich_help_panel=MACHINE,
        ),
    ] = Running.token_budget,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=MACHINE)
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(
            help="sdpa, flash_attention_2, flex_attention, …",
            show_default="transformers' choice",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    report_to: Annotated[
        str,
        typer.Option(help="Loggers that transformers knows, by commas: tensorboard, wandb, …", rich_help_panel=MACHINE),
    ] = "",
    save_steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps between checkpoints; two are kept.", rich_help_panel=PROGRESS)
    ] = Running.save_steps,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in OUTPUT.", rich_help_panel=PROGRESS)
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Train while the RUN is being written.", rich_help_panel=PROGRESS)
    ] = False,
    follow_timeout: Annotated[
        float,
        typer.Option(
            callback=_positive,
            help="Seconds without a new part after which --follow gives up.",
            rich_help_panel=PROGRESS,
        ),
    ] = Running.follow_timeout,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            help="Train a model that is not the RUN's expert; the adapter says so.",
            rich_help_panel=PROGRESS,
        ),
    ] = False,
) -> None:
    """Train a LoRA adapter on the contrast samples of a RUN, or on its right solutions.

    On many GPUs: torchrun --nproc-per-node N -m trainer train …; the batch is the same, shared out.
    """
    given = {"batch_size": batch_size, "epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if epochs is not None:
        changed.setdefault("max_steps", None)
    lora = Lora(rank, alpha, dropout, names(targets), use_rslora, use_dora)
    recipe = replace(
        PRESETS[preset], **changed, dtype=dtype, seed=seed, lora=lora, objective=objective, answers=answers
    )
    loggers = tuple(name for name in names(report_to) if name != "none")
    running = Running(
        token_budget, gradient_checkpointing, attention, save_steps, loggers, resume, follow, follow_timeout,
        allow_mismatch,
    )  # fmt: skip
    quiet_transformers()
    from trainer.training.train import train

    report = train(run, model, output, recipe, running, wide_console())
    if report is None:  # a rank that is not the first
        return
    if report.already_done:
        print(f"{output} is complete: {report.optimizer_steps} optimizer steps; nothing was left to do")
        return
    print(
        f"{report.optimizer_steps} optimizer steps over {report.trajectories} trajectories "
        f"with {report.kept_steps} kept steps in {report.seconds:.1f} s\n"
        f"loss {report.first_loss:.4f} at the first step, {report.last_loss:.4f} at the last\n"
        f"adapter in {output}"
    )


@app.command("merge")
def merge_command(
    model: Annotated[str, typer.Argument(help="The model that the adapter was trained on.")],
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or s3://….")],
    out: Annotated[str, typer.Argument(help="The merged model's folder, not yet there.")],
    dtype: Annotated[
        Precision, typer.Option(help="How the merged weights are saved; auto: as the model is stored.")
    ] = Precision.AUTO,
) -> None:
    """Fold an adapter into its model: added in float32, then rounded once.

    Says how much of what the adapter adds is left after rounding: small updates are lost in bfloat16. Evaluate and
    serve the adapter unmerged, or save float32.
    """
    quiet_transformers()
    from trainer.adapters.merge import merge

    update = merge(model, adapter, out, dtype)
    saved = str(update.dtype).removeprefix("torch.")
    print(
        f"the adapter changes its layers' weights by {update.relative:.2%} of their norm; saved in {saved}, "
        f"{update.surviving:.1%} of that survives, with an error of {update.error:.1%}\n"
        f"merged model in {out}"
    )
    if update.is_damaged:
        print(
            f"warning: rounding to {saved} changes what was trained by {update.error:.0%}: "
            "merge with --dtype float32, or use the adapter unmerged, as evaluate does",
            file=sys.stderr,
        )


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A model: a folder or a Hub id.")],
    benchmark: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", callback=named_files, help="Problems with answers; may be given again."),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Also with this adapter, a folder or s3://…, unmerged; may be given again."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first problems of each benchmark only.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            help="Write the results as JSON, and beside it FILE.md with examples and FILE.jsonl with every output,"
            " where the same command goes on if it is stopped.",
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Put the results into this RUN too, for its report.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens a problem.")] = Examination.max_tokens,
    system_prompt: Annotated[str, typer.Option(help="Empty: no system message.")] = Examination.system_prompt,
    n: Annotated[int, typer.Option(min=1, max=256, help="Outputs a problem, for pass@k.")] = Examination.n,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = Examination.temperature,
    top_p: Annotated[float, typer.Option(callback=_share)] = Examination.top_p,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled outputs.")] = Examination.seed,
    dtype: Dtype = None,
) -> None:
    """Zero-shot accuracy, greedy unless told otherwise; answers are compared with math-verify."""
    if output and (output.suffix != ".json" or output.is_dir() or not output.absolute().parent.is_dir()):
        raise LightReasonerError(
            f"--output {output} cannot be written: name a file that ends in .json, in a folder that is there"
        )
    kept = output and output.with_suffix(".jsonl")
    if output and kept and not kept.exists():
        for file in (output, output.with_suffix(".md")):
            if file.exists():
                raise LightReasonerError(f"{file} is there, and no {kept} that it came from; move it, or name another")
    if n > 1 and temperature == 0:
        raise LightReasonerError(
            "--n above 1 needs --temperature above 0: greedy outputs of a problem are all the same"
        )
    quiet_transformers()
    from client.runs.run import Run
    from trainer.evaluation.evaluate import evaluate
    from trainer.evaluation.summary import figures, markdown, table

    if run:
        Run(run).manifest()
    files = dict(value.split("=", 1) for value in benchmark)
    settings = Examination(max_tokens, system_prompt, limit, n, temperature, top_p, seed, dtype)
    console, adapters = wide_console(), adapter or []
    found = evaluate(model, adapters, files, settings, console, kept)
    console.print(table(found))
    about = {"model": model, "adapters": adapters, "settings": {**asdict(settings), "files": files}}
    text = json.dumps(figures(found) | about, indent=2) + "\n"
    if output:
        output.write_text(text)
        output.with_suffix(".md").write_text(markdown(found))
    if run:
        Run(run).write_evaluation(output.stem if output else "evaluation", text.encode())


def main() -> None:
    """The console script."""
    try:
        app()
    except (LightReasonerError, ModuleNotFoundError) as error:
        extra = "server" if getattr(error, "name", None) == "vllm" else "trainer"
        said = missing_extra(error, extra) if isinstance(error, ModuleNotFoundError) else error
        print(f"error: {said}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
