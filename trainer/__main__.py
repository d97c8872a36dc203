"""The trainer's command line: train, merge, evaluate.

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
from rich.console import Console

from client.errors import LightReasonerError, missing_extra
from trainer.settings import ALL_LINEAR, PRESETS, Examination, Lora, Precision, Preset, Recipe, Running

ADAPTER, MACHINE, PROGRESS = "The adapter", "The machine", "Checkpoints and the RUN"
"""Groups of options in --help."""

app = typer.Typer(
    help="Fine-tune an expert on the contrast samples of a RUN, and measure what it gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


def _benchmarks(values: list[str]) -> list[str]:
    names = [value.partition("=")[0] for value in values]
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"{value!r} is not NAME=FILE")
        if names.count(name) > 1:
            raise typer.BadParameter(f"the name {name!r} is given twice")
    return values


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
        str, typer.Option(help=f"Layers, by commas, or {ALL_LINEAR}.", rich_help_panel=ADAPTER)
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
    """Train a LoRA adapter on the contrast samples of a RUN.

    On many GPUs: torchrun --nproc-per-node N -m trainer train …; the batch is the same, shared out.
    """
    given = {"batch_size": batch_size, "epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if epochs is not None:
        changed.setdefault("max_steps", None)
    lora = Lora(rank, alpha, dropout, tuple(filter(None, targets.split(","))), use_rslora, use_dora)
    recipe = replace(PRESETS[preset], **changed, dtype=dtype, seed=seed, lora=lora)
    running = Running(
        token_budget, gradient_checkpointing, attention, save_steps, tuple(filter(None, report_to.split(","))),
        resume, follow, follow_timeout, allow_mismatch,
    )  # fmt: skip
    _quiet_transformers()
    from trainer.train import train

    report = train(run, model, output, recipe, running, _console())
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
        Precision, typer.Option(help="The type in which it is saved; auto: the model's own.")
    ] = Precision.AUTO,
) -> None:
    """Fold an adapter into its model: added in float32, rounded once, with what the rounding took."""
    _quiet_transformers()
    from trainer.merge import merge

    merged = merge(model, adapter, out, dtype)
    name = str(merged.dtype).removeprefix("torch.")
    print(f"merged model in {merged.folder}, in {name}: rounding took {merged.lost:.1%} of the update's norm")
    if merged.too_much_lost:
        print(
            "warning: that is much of what was learned; merge with --dtype float32, or use the adapter unmerged, as "
            "evaluate and vLLM do",
            file=sys.stderr,
        )


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A model: a folder or a Hub id.")],
    benchmark: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", callback=_benchmarks, help="Problems with answers; may be given again."),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="A folder or s3://…: evaluate before and after, unmerged.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first problems of each benchmark only.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results as JSON.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens a problem.")] = Examination.max_tokens,
    system_prompt: Annotated[str, typer.Option(help="Empty: no system message.")] = Examination.system_prompt,
    dtype: Dtype = None,
) -> None:
    """Greedy zero-shot pass@1, answers compared with math-verify."""
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise LightReasonerError(f"--output {output} cannot be written: name a file in a folder that is there")
    _quiet_transformers()
    from trainer.evaluate import evaluate
    from trainer.scores import table

    files = dict(value.split("=", 1) for value in benchmark)
    settings = Examination(max_tokens, system_prompt, limit, dtype)
    console = _console()
    results = evaluate(model, adapter, files, settings, console)
    console.print(table(results))
    if output:
        body = {
            "benchmarks": {result.name: result.to_json() for result in results},
            "model": model,
            "adapter": adapter,
            "settings": {**asdict(settings), "files": files},
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def _console() -> Console:
    """Standard output, wide enough for the table where it is no terminal."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


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
