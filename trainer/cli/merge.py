"""merge: a model and its adapter in, a model that needs no adapter out.

Parses options and prints what rounding left of the adapter; `trainer.adapters.merge` does the work.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from client.cli.program import importing
from trainer.adapters.adapter import free_folder
from trainer.cli.inputs import check_adapters, check_model
from trainer.cli.options import quiet_transformers
from trainer.interruption import ended_by_signals
from trainer.settings import Precision


def merge_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model ADAPTER was trained on: a folder or a Hugging Face Hub id."),
    ],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, file://… or s3://….")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where to write the merged model: a new local folder.")],
    dtype: Annotated[
        Precision, typer.Option(help="Type of the merged weights on disk; auto keeps the type of MODEL.")
    ] = Precision.AUTO,
) -> None:
    """Merge an adapter into its model: add the two in float32, then round once.

    Prints how much of the adapter is left after rounding: bfloat16 loses small updates. If it
    loses too much, use the adapter unmerged, or give --dtype float32.
    """
    with ended_by_signals(lambda: f"stopped; {out} holds no merged model: empty it, and repeat the command"):
        check_adapters([adapter], check_model(model))
        free_folder(out)
        with importing():
            quiet_transformers()
            from trainer.adapters.merge import merge

        update = merge(model, adapter, out, dtype)
    saved = str(update.dtype).removeprefix("torch.")
    print(
        f"the adapter changes its layers' weights by {update.relative:.2%} of their norm; saved in {saved}, "
        f"{update.surviving:.1%} of that survives, with an error of {update.error:.1%}\n"
        f"merged model in {out}"
    )
    if not update.relative:
        print(f"warning: {adapter} changes nothing: all of its updates are zero; was it trained?", file=sys.stderr)
    if update.is_damaged:
        print(
            f"warning: rounding to {saved} changes what was trained by {update.error:.0%}: "
            "merge with --dtype float32, or use the adapter unmerged, as evaluate does",
            file=sys.stderr,
        )
