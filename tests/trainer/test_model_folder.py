"""A model's folder is looked at once: what a 7B model's weights cost to read is paid once a command."""

import json

import pytest
from support.models.tiny_pair import save_adapter

import trainer.adapters.model_folder
import trainer.evaluation.evaluate


class NoEngine:
    """Answers nothing, in no time."""

    def __init__(self, *about):
        pass

    def answers(self, prompts, examination, adapter):
        return [["5"] for _ in prompts]

    def close(self):
        pass


@pytest.fixture
def looks(monkeypatch):
    """What was read of a model's folder, in order: 'fingerprint' and 'configuration'."""
    seen = []
    room = trainer.adapters.model_folder
    fingerprint = room.model_fingerprint
    configured = room.ModelFolder.configuration.func

    def read_configuration(self):
        seen.append("configuration")
        return configured(self)

    monkeypatch.setattr(room, "model_fingerprint", lambda path: seen.append("fingerprint") or fingerprint(path))
    monkeypatch.setattr(room.ModelFolder.configuration, "func", read_configuration)
    return seen


def test_evaluate_looks_at_the_model_once_however_many_adapters(tmp_path, expert, looks, monkeypatch, trainer_cli):
    monkeypatch.setattr(trainer.evaluation.evaluate, "AnswerEngine", NoEngine)
    (tmp_path / "digits.jsonl").write_text('{"question": "Ann has 2", "answer": "5"}\n')
    adapters = [save_adapter(tmp_path / name, expert, seed=seed) for seed, name in enumerate(("one", "two"))]
    for adapter in adapters:
        about = {"base_model_fingerprint": trainer.adapters.model_folder.ModelFolder(expert).fingerprint}
        (adapter / "lightreasoner.json").write_text(json.dumps(about))
    looks.clear()
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    code, _, err = trainer_cli(
        "evaluate", expert, *words, "--benchmark", f"digits={tmp_path / 'digits.jsonl'}", "--dtype", "auto"
    )
    assert code == 0, err
    assert sorted(looks) == ["configuration", "fingerprint"]


def test_train_looks_at_the_model_once(tmp_path, run, expert, looks, trainer_cli):
    words = "--max-steps", 1, "--dtype", "auto", "--allow-mismatch"
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", *words)
    assert code == 0, err
    assert sorted(looks) == ["configuration", "fingerprint"]
