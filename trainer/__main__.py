"""The trainer's command line: train, merge, evaluate.

Parses options and prints results; the work is done in the modules of the same names, which load torch, so they
are imported only when a command runs. A user's mistake is one line on stderr and exit code 1.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client.errors import LightReasonerError, missing_extra
from trainer.settings import Examination, Precision, Recipe

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


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1")
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
    output: Annotated[str, typer.Option(help="The adapter's folder, not yet there.")],
    epochs: Annotated[float, typer.Option(help="Passes over the RUN.", callback=_positive)] = Recipe.epochs,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Exactly this many optimizer steps; overrides --epochs.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(callback=_positive, help="AdamW's.")] = Recipe.learning_rate,
    batch_size: Annotated[int, typer.Option(min=1, help="Trajectories an optimizer step.")] = Recipe.batch_size,
    dtype: Dtype = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the adapter's start, order and dropout.")
    ] = Recipe.seed,
) -> None:
    """Train a LoRA adapter on the contrast samples of a RUN."""
    _quiet_transformers()
    from trainer.train import train

    recipe = Recipe(epochs, max_steps, learning_rate, batch_size, dtype, seed)
    report = train(run, model, output, recipe, _console())
    print(
        f"{report.optimizer_steps} optimizer steps over {report.trajectories} trajectories "
        f"with {report.kept_steps} kept steps in {report.seconds:.1f} s\n"
        f"loss {report.first_loss:.4f} at the first step, {report.last_loss:.4f} at the last\n"
        f"adapter in {output}"
    )


@app.command("merge")
def merge_command(
    model: Annotated[str, typer.Argument(help="The model that the adapter was trained on.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder.")],
    out: Annotated[str, typer.Argument(help="The merged model's folder, not yet there.")],
    dtype: Annotated[
        Precision, typer.Option(help="How the merged weights are saved; auto: as the model is stored.")
    ] = Precision.AUTO,
) -> None:
    """Fold an adapter into its model: added in float32, then rounded once.

    Says how much of what the adapter adds is left after rounding: small updates are lost in bfloat16. Evaluate and
    serve the adapter unmerged, or save float32.
    """
    _quiet_transformers()
    from trainer.merge import merge

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
        typer.Option(metavar="NAME=FILE", callback=_benchmarks, help="Problems with answers; may be given again."),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Also with this adapter of the model, unmerged; may be given again."),
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
    if n > 1 and temperature == 0:
        raise LightReasonerError(
            "--n above 1 needs --temperature above 0: greedy outputs of a problem are all the same"
        )
    _quiet_transformers()
    from client.run import Run
    from trainer.evaluate import evaluate
    from trainer.summary import figures, markdown, table

    if run:
        Run(run).manifest()
    files = dict(value.split("=", 1) for value in benchmark)
    settings = Examination(max_tokens, system_prompt, limit, n, temperature, top_p, seed, dtype)
    console, adapters = _console(), adapter or []
    found = evaluate(model, adapters, files, settings, console, output and output.with_suffix(".jsonl"))
    console.print(table(found))
    about = {"model": model, "adapters": adapters, "settings": {**asdict(settings), "files": files}}
    text = json.dumps(figures(found) | about, indent=2) + "\n"
    if output:
        output.write_text(text)
        output.with_suffix(".md").write_text(markdown(found))
    if run:
        Run(run).write_evaluation(output.stem if output else "evaluation", text.encode())


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
