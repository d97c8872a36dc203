"""Checks the paths and URLs that a user gives, before torch is imported: a wrong path is an error within a second.

In: models, adapters, problem sets and outputs as typed. Out: nothing, or the same error that the work would raise.
Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from client.errors import ProblemSetError
from client.models.fingerprints import model_config
from client.problems.files import PIPES, STANDARD_INPUT
from client.problems.reader import read_problems
from client.runs.run import Run
from client.storage.bucket import local_folder
from trainer.adapters.adapter import adapter_folder, check_base, is_local, read_config
from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import check_expert, check_kept
from trainer.settings import Objective, Recipe, Running
from trainer.training.checkpoints import Output


def check_model(model: str, chat_template: Path | None = None) -> ModelFolder:
    """The folder of a model. Raises ModelError if its configuration, its weights or the given template is missing."""
    base = ModelFolder.find(model, chat_template)
    model_config(base.path)
    _ = base.fingerprint, chat_template and base.template_digest  # raise if a file is missing; the values are cached
    return base


def check_adapters(adapters: Sequence[str], base: ModelFolder) -> None:
    """Raises ModelError if a local adapter is incomplete, or was trained on another model."""
    for folder in (adapter_folder(adapter) for adapter in adapters if is_local(adapter)):
        read_config(folder)
        check_base(folder, base)


def check_training(run: Run, base: ModelFolder, output: str, recipe: Recipe, running: Running) -> None:
    """Raises RunError or ModelError if `run` is no RUN, is of another model or has no kept step, or if OUT is taken."""
    if running.allow_mismatch:
        run.manifest()
    else:
        check_expert(run, base)
    if recipe.objective == Objective.CONTRAST and not running.follow:
        check_kept(run)
    if os.environ.get("RANK", "0") == "0":  # another rank may already see files of the first rank there
        with Output(output) as out:
            out.check_resumable() if running.resume else out.check_free()


def check_files(files: Sequence[str], question_field: str | None = None) -> None:
    """Raises ProblemSetError if a problem set is missing, empty or unreadable. Does not read streams."""
    for file in files:
        if not is_stream(file):
            read_problems(file, 1, question_field=question_field)


def check_answers(file: str) -> None:
    """Raises ProblemSetError if the answers of a training are missing, or cannot be read by all its processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        refuse_stream("--answers", file, "every process of a training reads it")
    check_files([file])


def is_stream(file: str) -> bool:
    """Whether a problem set comes through a pipe, which gives it only once: standard input, or a shell's <(…)."""
    return file == STANDARD_INPUT or (is_local(file) and str(local_folder(file)).startswith(PIPES))


def refuse_stream(option: str, file: str, readers: str) -> None:
    """Raises ProblemSetError if a problem set comes through a pipe. `readers`: why it is read more than once."""
    if is_stream(file):
        raise ProblemSetError(f"{option} {file}: a pipe can be read once, and {readers}; save it to a file")
