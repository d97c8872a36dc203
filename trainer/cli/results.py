"""Files of results: checked before the work starts, written when it ends; the outputs are counted if a signal stops it.

In: paths as a user gives them, texts. Out: files, or an error of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from client.errors import LightReasonerError


def check_results(output: Path, kept: Path) -> None:
    """Raises LightReasonerError if results cannot be written to `output`, or if files there have lost their `kept`.

    `kept`: the file of all outputs, which lies beside every file of results.
    """
    try:
        if output.suffix != ".json" or output.is_dir() or not output.absolute().parent.is_dir():
            raise LightReasonerError(
                f"--output {output} cannot be written: name a file that ends in .json, in an existing folder"
            )
        others = [] if kept.exists() else [file for file in (output, output.with_suffix(".md")) if file.exists()]
    except OSError as error:
        raise LightReasonerError(f"--output {output} cannot be written: {error.strerror}; name another") from None
    if others:
        raise LightReasonerError(
            f"{others[0]} exists, but {kept}, which it came from, does not; move {others[0]} or name another --output"
        )


def write_results(files: Mapping[Path, str], kept: Path) -> None:
    """Write texts to files. Raises LightReasonerError if a file cannot be written. `kept`: the file of all outputs."""
    for file, text in files.items():
        try:
            file.write_text(text)
        except OSError as error:
            raise LightReasonerError(
                f"{file} cannot be written: {error.strerror}; {kept} holds every output. Fix this and repeat "
                "the command: it does not ask the models again"
            ) from None


def stopped(kept: Path | None) -> str:
    """The message of an evaluation that a signal stopped. `kept`: the file of all outputs; None: there is no file."""
    from trainer.evaluation.records import Records

    if kept is None:
        return "stopped; no output is kept: with --output FILE.json, the same command would go on"
    count = len(Records.read(kept)) if kept.exists() else 0
    said = f"stopped: {count:,} outputs are in {kept}" if count else "stopped before the first output"
    return f"{said}; the same command resumes"
