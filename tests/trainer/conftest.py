"""One tiny expert and one RUN of it for the whole directory, and the command line as a user meets it."""

import sys

import pytest
from support.models.tiny_pair import save_model, write_run
from support.processes import forked

from trainer.__main__ import main
from trainer.evaluation import paper_tables


@pytest.fixture(scope="session")
def expert(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "expert")


@pytest.fixture(scope="session")
def run(tmp_path_factory, expert):
    return write_run(tmp_path_factory.mktemp("runs") / "run", expert)


@pytest.fixture
def trainer_cli(monkeypatch, capsys):
    """Run `lightreasoner-trainer`: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lightreasoner-trainer", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def forked_trainings(monkeypatch):
    """The trainings that `ablation` and `efficiency` start are forks."""

    def run(words, _name):
        done = forked.run("trainer", "train", *words)
        return done.returncode, done.stderr

    monkeypatch.setattr(paper_tables, "run_training", run)
