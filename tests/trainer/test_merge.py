"""Merging: the same function in one folder."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models.families import FAMILIES, save_family
from support.models.tiny_pair import load, randomised, save_adapter, save_model, trajectory, write_run
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

from client.errors import ModelError
from client.models.fingerprints import chat_template_digest, model_config, model_fingerprint, tokenizer_fingerprint
from client.storage.bucket import Bucket


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, expert):
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", expert)


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"trainable_token_indices": [7, 8]}])
def test_merged_and_unmerged_agree_in_float32(tmp_path, expert, variant, trainer_cli):
    adapter = save_adapter(tmp_path / "adapter", expert, **variant)
    code, shown, err = trainer_cli("merge", expert, adapter, tmp_path / "out")
    assert code == 0 and str(tmp_path / "out") in shown, err
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        base = load(expert)(ids).logits
        unmerged = PeftModel.from_pretrained(load(expert), adapter)(ids).logits
        merged = load(tmp_path / "out")(ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-4)
    assert (merged - base).abs().max() > 0.1


def test_the_sum_is_rounded_once_to_the_type_in_which_the_base_is_stored(tmp_path, trainer_cli):
    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    assert trainer_cli("merge", base, adapter, tmp_path / "out")[0] == 0
    merged, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    delta = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == stored.keys() and {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for name, weight in stored.items():
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if lora.format("A") in delta:
            weight = (weight.float() + 2.0 * delta[lora.format("B")] @ delta[lora.format("A")]).bfloat16()
        assert torch.equal(merged[name], weight), name


def lora_update(base, adapter):
    """Over all layers that the adapter is on: weights, what it adds in float32, and their merged sums as named."""
    stored, delta = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    names = [name for name in stored if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in delta]
    assert len(names) == 4
    for name in names:
        lora = f"base_model.model.{name.removesuffix('weight')}lora_{{}}.weight"
        yield name, stored[name].double(), 2.0 * (delta[lora.format("B")] @ delta[lora.format("A")]).double()


def norm(parts):
    return torch.cat([part.flatten() for part in parts]).norm().item()


@pytest.mark.parametrize(("size", "warned"), [(0.0003, True), (0.3, False)])
def test_it_says_how_much_of_the_update_survives_rounding_and_warns_where_much_is_lost(
    tmp_path, trainer_cli, size, warned
):
    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, size=size)
    code, shown, err = trainer_cli("merge", base, adapter, tmp_path / "out")
    assert code == 0, err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    weights, whole, saved = [], [], []
    for name, weight, added in lora_update(base, adapter):
        weights, whole, saved = [*weights, weight], [*whole, added], [*saved, merged[name].double() - weight]
    surviving = norm(saved) / norm(whole)
    error = norm([a - b for a, b in zip(saved, whole, strict=True)]) / norm(whole)
    assert f"by {norm(whole) / norm(weights):.2%} of their norm; saved in bfloat16, {surviving:.1%} of that" in shown
    assert f"an error of {error:.1%}" in shown and (error > 0.1) == warned
    assert (f"changes what was trained by {error:.0%}: merge with --dtype float32" in err) == warned
    if warned:
        assert 0.2 < surviving < 0.9  # a gentle update: neither whole nor gone


def test_saved_in_float32_the_whole_update_survives(tmp_path, trainer_cli):
    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.0003)
    code, shown, err = trainer_cli("merge", base, adapter, tmp_path / "out", "--dtype", "float32")
    assert code == 0 and "warning" not in err and "saved in float32, 100.0% of that survives" in shown
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    for name, weight, added in lora_update(base, adapter):
        torch.testing.assert_close(merged[name].double(), weight + added, rtol=1e-6, atol=1e-9)


def test_an_adapter_that_was_not_trained_merges_into_the_same_model(tmp_path, expert, trainer_cli):
    adapter = save_adapter(tmp_path / "adapter", expert, size=0.0)
    code, shown, err = trainer_cli("merge", expert, adapter, tmp_path / "out")
    assert code == 0 and "0.00% of their norm" in shown
    assert f"warning: {adapter} changes nothing: all of its updates are zero; was it trained?" in err
    assert model_fingerprint(tmp_path / "out") == model_fingerprint(expert)


def test_the_merged_folder_is_a_whole_model_with_the_same_tokenizer_and_template(
    tmp_path, expert, adapter, trainer_cli
):
    out = tmp_path / "out"
    trainer_cli("merge", expert, adapter, out)
    assert tokenizer_fingerprint(out) == tokenizer_fingerprint(expert)
    assert chat_template_digest(out) == chat_template_digest(expert) is not None
    assert model_fingerprint(out) != model_fingerprint(expert)
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "config.json").stat().st_mode}
    assert AutoTokenizer.from_pretrained(out)("Ann has 2 apples").input_ids


def test_the_merged_folder_of_a_model_that_reads_pictures_has_its_processors_files(tmp_path, trainer_cli):
    base = save_family(tmp_path / "base", FAMILIES["Gemma 3, multimodal"], "amateur")
    others = ("video_preprocessor_config.json", "audio_tokenizer_config.json", "additional_chat_templates/tools.jinja")
    (base / "additional_chat_templates").mkdir()
    for name in others:
        (base / name).write_text("{}")
    adapter, out = save_adapter(tmp_path / "adapter", base), tmp_path / "out"
    code, _, err = trainer_cli("merge", base, adapter, out)
    assert code == 0, err
    assert AutoImageProcessor.from_pretrained(out).to_dict() == AutoImageProcessor.from_pretrained(base).to_dict()
    for name in ("processor_config.json", *others):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_made_for_other_weights_is_refused(tmp_path, expert, adapter, trainer_cli):
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    other = save_model(tmp_path / "other", seed=9)
    (foreign / "lightreasoner.json").write_text(json.dumps({"base_model_fingerprint": model_fingerprint(other)}))
    code, _, err = trainer_cli("merge", expert, foreign, tmp_path / "out")
    assert code == 1 and "was made for other weights" in err and model_fingerprint(other)[:12] in err
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_stopped_or_killed_leaves_nothing_that_passes_for_a_model(
    tmp_path, expert, adapter, trainer_cli, monkeypatch
):
    out, killed = tmp_path / "out", tmp_path / "killed"

    def stopped(source, _target, **_):
        if source.parent != out / "unfinished":
            return  # shutil.copy's own
        with pytest.raises(ModelError):
            model_fingerprint(out)
        with pytest.raises(ModelError):
            model_config(out)
        shutil.copytree(out, killed)  # what kill -9 would leave
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.adapters.merge.shutil.copymode", stopped)  # the last that is done before it is whole
        code, _, err = trainer_cli("merge", expert, adapter, out)
    assert code == 143 and "Traceback" not in err
    assert err.splitlines()[-1] == f"stopped; {out} holds no merged model: empty it, and repeat the command"
    assert trainer_cli("merge", expert, adapter, out)[0] == 0 and model_config(out) == model_config(expert)
    code, _, err = trainer_cli("merge", expert, adapter, killed)
    assert (
        code == 1 and f"{killed} is not empty: it holds what a killed merge left; empty it, or give another OUT" in err
    )


def test_what_is_missing_or_in_the_way_is_named(tmp_path, expert, adapter, trainer_cli):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    code, _, err = trainer_cli("merge", expert, adapter, tmp_path / "full")
    assert code == 1 and "full is not empty: it holds other files; empty it, or give another OUT" in err
    code, _, err = trainer_cli("merge", expert, tmp_path / "none", tmp_path / "out")
    assert code == 1 and f"no adapter at {tmp_path / 'none'}" in err
    smaller = shutil.copytree(expert, tmp_path / "smaller")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 4}
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = trainer_cli("merge", smaller, broken, tmp_path / "out")
    assert code == 1 and "does not fit" in err and "Traceback" not in err
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, most[1]))  # stands for a disk that is full
    try:
        code, _, err = trainer_cli("merge", expert, adapter, tmp_path / "disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert code == 1 and f"{tmp_path / 'disk'} cannot be written (" in err and "make room" in err, err
    assert not any((tmp_path / "disk").iterdir())


def test_an_odd_generation_config_is_copied_as_it_is(tmp_path, expert, adapter, trainer_cli):
    base = tmp_path / "base"
    shutil.copytree(expert, base)
    odd = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9}'
    (base / "generation_config.json").write_text(odd)
    code, _, err = trainer_cli("merge", base, adapter, tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "generation_config.json").read_text() == odd


@pytest.mark.parametrize(
    ("name", "content"),
    [("adapter_config.json", "[]"), ("lightreasoner.json", "{}"), ("adapter_model.safetensors", "short")],
)
def test_a_damaged_adapter_is_named(tmp_path, expert, adapter, trainer_cli, name, content):
    damaged = tmp_path / "adapter"
    shutil.copytree(adapter, damaged)
    (damaged / name).write_text(content)
    code, _, err = trainer_cli("merge", expert, damaged, tmp_path / "out")
    assert code == 1 and str(damaged) in err and "Traceback" not in err


def test_an_adapter_in_a_bucket_merges_as_one_in_a_folder(tmp_path, s3, expert, adapter, trainer_cli):
    bucket = Bucket(f"{s3}/an-adapter")
    for file in adapter.iterdir():
        bucket.put(file.name, file.read_bytes())
    assert trainer_cli("merge", expert, adapter, tmp_path / "here")[0] == 0
    code, _, err = trainer_cli("merge", expert, bucket, tmp_path / "there")
    assert code == 0, err
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    bucket.remove("adapter_model.safetensors")
    bucket.put("adapter_model.bin", b"weights")
    code, _, err = trainer_cli("merge", expert, bucket, tmp_path / "nowhere")
    assert code == 1 and "but adapter_model.bin: load the adapter with PEFT" in " ".join(err.split()), err
    code, _, err = trainer_cli("merge", expert, f"{s3}/nothing", tmp_path / "nowhere")
    assert code == 1 and f"no adapter at {s3}/nothing" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("targets", "rows"),
    [
        (["lm_head"], None), (["embed_tokens"], None), (["q_proj", "embed_tokens", "lm_head"], None),
        (["q_proj"], None), (["q_proj"], [7, 8]),
    ],
)  # fmt: skip
def test_what_is_added_to_a_tied_head_is_not_added_to_the_embedding(tmp_path, expert, trainer_cli, targets, rows):
    base = shutil.copytree(expert, tmp_path / "base")
    config = load(expert).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter, settings = tmp_path / "adapter", LoraConfig(target_modules=targets, trainable_token_indices=rows)
    randomised(get_peft_model(load(base), settings), 0.3).save_pretrained(adapter)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert any(targets[-1] in name for name in file.keys())  # noqa: SIM118
    code, _, err = trainer_cli("merge", base, adapter, tmp_path / "out", "--dtype", "float32")
    assert code == 0, err
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(load(base), adapter)(ids).logits
        merged = load(tmp_path / "out")(ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-4)
    assert load(tmp_path / "out").config.tie_word_embeddings == (targets == ["q_proj"])


def test_a_folder_among_the_tokenizers_files_is_passed_over(tmp_path, expert, adapter, trainer_cli):
    base = shutil.copytree(expert, tmp_path / "base")
    (base / "tokenizer_old").mkdir()
    assert trainer_cli("merge", base, adapter, tmp_path / "out")[0] == 0


def without_a_tensor(expert, folder):
    shutil.copytree(expert, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_a_tensor_more(expert, folder):
    shutil.copytree(expert, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.extra.weight"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (without_a_tensor, "it lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
        (with_a_tensor_more, "it has 1 tensors unknown to its architecture, such as model.layers.1.mlp.extra.weight"),
    ],
)
def test_a_model_with_other_tensors_than_its_configuration_has_is_refused(tmp_path, expert, trainer_cli, harm, words):
    """transformers would fill a missing tensor with random numbers."""
    base = harm(expert, tmp_path / "base")
    run = write_run(tmp_path / "run", base, trajectories=[trajectory("p", 0)])
    code, _, err = trainer_cli("train", run, "--model", base, "--output", tmp_path / "adapter")
    assert code == 1 and words in " ".join(err.split()), err
    assert harm is not without_a_tensor or not (tmp_path / "adapter").exists()
    adapter = save_adapter(tmp_path / "made", expert)
    code, _, err = trainer_cli("merge", base, adapter, tmp_path / "out")
    assert code == 1 and words in " ".join(err.split()), err


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq", "fp8", "bitsandbytes"])
def test_a_quantised_model_is_refused_before_anything_is_written(tmp_path, expert, adapter, trainer_cli, method):
    base = shutil.copytree(expert, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    run = write_run(tmp_path / "run", base, trajectories=[trajectory("p", 0)])
    for words in (
        ("train", run, "--model", base, "--output", tmp_path / "out"),
        ("merge", base, adapter, tmp_path / "out"),
    ):
        code, _, err = trainer_cli(*words)
        assert code == 1 and f"is quantised ({method})" in err and "--allow-mismatch" in err, err
        assert err.count("\n") == 1 and not (tmp_path / "out").exists()
