"""Odd adapters that people bring: merged exactly, or refused with the reason and what mends it."""

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models.tiny_pair import load, randomised, save_adapter

from client.errors import ModelError
from trainer.adapters.adapter import read_config
from trainer.adapters.merge import check_unshared


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, expert):
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", expert)


def renamed(adapter, folder, change):
    """A copy of an adapter whose weights have other names."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({change(name): tensor for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
         "4 of its 4 layers are not in the model, such as 'language_model.model.layers.0.self_attn.q_proj'"),
        (lambda name: name.replace("layers.1.", "layers.7."), "2 of its 4 layers are not in the model"),
        (lambda name: name.replace("lora_B", "lora_C") if "layers.0.self_attn.q" in name else name, "is damaged"),
        (lambda name: name.removeprefix("base_model.model."), "does not begin with 'base_model.model.'"),
    ],
)  # fmt: skip
def test_an_adapter_whose_weights_find_no_layer_is_refused(tmp_path, expert, adapter, trainer_cli, change, words):
    odd = renamed(adapter, tmp_path / "odd", change)
    code, _, err = trainer_cli("merge", expert, odd, tmp_path / "out")
    assert code == 1 and words in " ".join(err.split()), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of its model (layer_replication: [[0, 2], [1, 2]])"),
        ({"alora_invocation_tokens": [5, 6]}, "acts only behind certain tokens (alora_invocation_tokens: [5, 6])"),
        ({"lora_bias": True}, "adds a bias (lora_bias) to 4 layers that have none in"),
    ],
)
def test_what_neither_peft_can_merge_nor_vllm_serve_is_refused(tmp_path, expert, trainer_cli, settings, words):
    odd = save_adapter(tmp_path / "odd", expert, **settings)
    code, _, err = trainer_cli("merge", expert, odd, tmp_path / "out")
    (setting,) = settings
    assert code == 1 and words in " ".join(err.split()) and f"train an adapter without {setting}" in err, err
    assert not (tmp_path / "out").exists()


def with_settings(**changed):
    def change(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return change


def as_pickle(adapter):
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()


def nested(adapter):
    (adapter / "adapter_config.json").write_text("[" * 100_000)


def linked(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("nowhere")


def in_parts(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_settings(peft_type="IA3"), "is no LoRA adapter: its adapter_config.json has the peft_type 'IA3'"),
        (
            with_settings(peft_type=None),
            "the peft_type None: PEFT needs it to read the adapter; if it is a LoRA adapter,",
        ),
        (with_settings(peft_type="lora"), "the peft_type 'lora': PEFT needs it to read the adapter; if it is a LoRA"),
        (with_settings(r="8"), "adapter_config.json is damaged: r is '8', not a whole number; correct it there"),
        (with_settings(use_rslora="no"), "use_rslora is 'no', not true or false; correct it there"),
        (with_settings(alpha_pattern=None), "alpha_pattern is None, not an object; remove the line"),
        (with_settings(lora_alpha="x"), "lora_alpha is 'x', not a number"),
        (with_settings(rank_pattern=[4]), "rank_pattern is [4], not an object"),
        (as_pickle, "but adapter_model.bin: load the adapter with PEFT (PeftModel.from_pretrained), and save it again"),
        (nested, "adapter_config.json is not valid JSON"),
        (linked, "adapter_model.safetensors is a link that leads nowhere; copy or download the adapter again"),
        (in_parts, "but adapter_model-00001-of-00002.safetensors: PEFT reads no parts; put their tensors into one"),
    ],
)
def test_an_adapter_of_another_kind_or_form_is_refused_with_what_mends_it(
    tmp_path, expert, adapter, trainer_cli, change, words
):
    odd, out, file = shutil.copytree(adapter, tmp_path / "odd"), tmp_path / "out", tmp_path / "rows.jsonl"
    file.write_text('{"question": "Ann has 1", "answer": "1"}\n')
    change(odd)
    for said in (("merge", expert, odd, out), ("evaluate", expert, "--adapter", odd, "--benchmark", f"one={file}")):
        code, _, err = trainer_cli(*said)
        assert code == 1 and words in " ".join(err.split()) and err.count("\n") == 1, err
        assert not out.exists()


def test_evaluate_names_an_adapter_that_was_not_trained(tmp_path, expert, trainer_cli, monkeypatch):
    file, adapter = tmp_path / "rows.jsonl", save_adapter(tmp_path / "adapter", expert, size=0.0)
    file.write_text('{"question": "Ann has 1", "answer": "1"}\n')

    def stop(_):
        raise ModelError("before an engine starts")

    monkeypatch.setattr("trainer.adapters.model_folder.ModelFolder.check_whole", stop)
    code, shown, err = trainer_cli("evaluate", expert, "--adapter", adapter, "--benchmark", f"one={file}")
    assert code == 1 and "before an engine starts" in err
    assert f"warning: {adapter} changes nothing: all of its updates are zero" in shown


def test_an_adalora_adapter_merges_and_is_not_evaluated_unmerged(tmp_path, expert, trainer_cli):
    adapter, file = tmp_path / "adapter", tmp_path / "rows.jsonl"
    file.write_text('{"question": "Ann has 1", "answer": "1"}\n')
    settings = AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10)
    randomised(get_peft_model(load(expert), settings), 0.3).save_pretrained(adapter)
    assert read_config(adapter)["rank_pattern"] is None
    code, _, err = trainer_cli("merge", expert, adapter, tmp_path / "out")
    assert code == 0, err
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(load(expert), adapter)(ids).logits
        torch.testing.assert_close(load(tmp_path / "out")(ids).logits, unmerged, rtol=0, atol=1e-4)
    code, _, err = trainer_cli("evaluate", expert, "--adapter", adapter, "--benchmark", f"one={file}")
    assert code == 1 and "its peft_type is ADALORA; merge it" in " ".join(err.split()), err


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {}, "rank_pattern": {"q_proj": "4"}}, {"target_modules": "*q_proj"},
        {"rank_pattern": {"*.q_proj": 8}}, {"lora_alpha": 10**400},
    ],
)  # fmt: skip
def test_settings_that_peft_cannot_use_are_told_and_leave_no_folder(tmp_path, expert, adapter, trainer_cli, settings):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    with_settings(**settings)(odd)
    code, _, err = trainer_cli("merge", expert, odd, tmp_path / "out")
    assert code == 1 and f"{odd} does not fit {expert}, or is damaged: " in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [["q_proj"], r"model\.layers\.1\.self_attn\.q_proj"])
def test_an_adapter_on_weights_that_layers_share_is_refused(expert, targets):
    """As in Zamba, whose layers share a transformer: their updates would all be added to one weight."""
    model = load(expert)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    check_unshared(get_peft_model(load(expert), LoraConfig(target_modules=targets)), "some/adapter")
    with pytest.raises(ModelError, match=r"some/adapter cannot be merged: model\.layers\.\d\.self_attn\.q_proj shares"):
        check_unshared(get_peft_model(model, LoraConfig(target_modules=targets)), "some/adapter")
