"""A model's folder is looked at once: what a 7B model's weights cost to read is paid once a command."""

import json
import shutil

import pytest
import torch
import transformers
from support.models.families import FAMILIES, save_family
from support.models.tiny_pair import save_adapter
from transformers import AutoModelForCausalLM

import trainer.adapters.model_folder
import trainer.evaluation.evaluate
from client.errors import ModelError
from trainer.adapters.model_folder import ModelFolder, load


class NoEngine:
    """Answers nothing, in no time."""

    def __init__(self, *about):
        pass

    def answers(self, prompts, examination, adapter, told):
        return ((place, ["5"]) for place in range(len(prompts)))

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
        about = {"base_model_fingerprint": ModelFolder(expert).fingerprint}
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


def test_a_soft_cap_of_attention_is_computed_as_the_model_was_trained(tmp_path):
    """transformers' usual attention, sdpa, leaves Gemma 2's out without a word; vLLM, which samples, does not."""
    save_family(tmp_path / "gemma", FAMILIES["Gemma 2"], "expert")
    model, ids = ModelFolder(tmp_path / "gemma"), torch.arange(6, 46)[None]
    with torch.inference_mode():
        loaded = load(model, torch.float32)(ids).logits
        capped, uncapped = (
            AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation=name)(ids).logits
            for name in ("eager", "sdpa")
        )
    assert torch.equal(loaded, capped) and (loaded - uncapped).abs().max() > 0.1
    with pytest.raises(ModelError, match=r"caps its attention .* --attention sdpa leaves out: use eager"):
        load(model, torch.float32, "sdpa")


@pytest.mark.parametrize("kind", ["llava", "qwen3_5", "mistral3"])
def test_layers_of_a_model_that_reads_pictures_have_the_names_that_vllm_gives_them(tmp_path, kind):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
    config = transformers.AutoConfig.for_model(kind)
    config.text_config.update({**small, "layer_types": ["full_attention"]})
    config.architectures = [f"{kind.title()}ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert "model.language_model.layers.0.self_attn.q_proj" in ModelFolder(tmp_path).names


def test_a_context_of_minus_one_is_no_limit(tmp_path):
    transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32).save_pretrained(tmp_path)
    assert ModelFolder(tmp_path).context is None


def test_a_model_that_is_no_language_model_is_refused_in_a_line(tmp_path):
    config = transformers.ViTConfig(architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not a causal language model: .* 'vit' with architectures \['ViTFor"):
        ModelFolder(tmp_path).check_trainable()


@pytest.mark.long
@pytest.mark.engine
def test_a_model_that_generates_no_text_is_named(tmp_path, expert, trainer_cli):
    judge, file = shutil.copytree(expert, tmp_path / "judge"), tmp_path / "rows.jsonl"
    about = json.loads((judge / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (judge / "config.json").write_text(json.dumps(about))
    file.write_text('{"question": "Ann has 1", "answer": "1"}\n')
    code, _, err = trainer_cli("evaluate", judge, "--benchmark", f"one={file}")
    assert code == 1 and "generates no text, says vLLM" in err and "Traceback" not in err
