"""What an adapter's folder says of itself, and that others can load it."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.models.tiny_pair import load, save_adapter, save_model, write_run

from client.protocol.requests import BOX_SYSTEM_PROMPT, ContrastSettings
from client.report.page import report_page
from client.runs.build import build_run
from client.runs.run import Run
from trainer.adapters.model_folder import ModelFolder
from trainer.adapters.origin import origins_of, prompt_notes
from trainer.settings import Lora
from trainer.training.lora import with_lora


def test_it_carries_the_runs_identity_the_settings_and_versions_and_a_card_that_the_hub_reads(
    tmp_path, run, expert, trainer_cli
):
    out = tmp_path / "out"
    options = "--rank", 4, "--alpha", 12, "--targets", "q_proj,down_proj", "--use-rslora", "--use-dora"
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", out, "--max-steps", 2, *options)
    assert code == 0, err
    said = json.loads((out / "lightreasoner.json").read_text())
    assert said["run_identity"] == json.loads(json.dumps(run.manifest().identity()))
    assert said["recipe"]["lora"]["targets"] == ["q_proj", "down_proj"] and said["recipe"]["learning_rate"] == 5e-5
    assert said["versions"]["torch"] == torch.__version__ and said["mismatches"] == [] and said["ranks"] == 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (4, 12, True, True)
    assert set(config["target_modules"]) == {"q_proj", "down_proj"}
    assert any("lora_magnitude_vector" in name for name in load_file(out / "adapter_model.safetensors"))
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert "base_model" not in metadata and metadata["library_name"] == "peft"
    assert text.startswith(f"\n# LightReasoner adapter for {expert.name}\n")
    assert {"lora", "lightreasoner"} <= set(metadata["tags"])
    assert "rank 4" in text and run.manifest().expert.model_fingerprint in text and "not the RUN's expert" not in text


def test_its_folder_holds_safetensors_and_no_pickle(tmp_path, run, expert, trainer_cli):
    trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", "--max-steps", 1)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "lightreasoner.json",
        "loss.png", "metrics.jsonl",
    }  # fmt: skip


def test_every_linear_layer_can_be_adapted_and_the_head_with_it(tmp_path, run, expert, trainer_cli):
    for index, targets in enumerate(("all-linear", "q_proj,lm_head")):
        out = tmp_path / f"out{index}"
        words = "train", run, "--model", expert, "--output", out, "--max-steps", 12, "--learning-rate", 1e-3
        code, _, err = trainer_cli(*words, "--targets", targets)
        assert code == 0, err
        weights = load_file(out / "adapter_model.safetensors")
        trained = {name.split(".lora_")[0].rpartition(".")[2] for name in weights if weights[name].any()}
        every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert trained == (every if index == 0 else {"q_proj", "lm_head"})
        assert all(weights[name].any() for name in weights if "lora_B" in name)


def test_the_gradient_of_an_adapted_head_is_that_of_the_whole_logits(expert, examples_of_run):
    """The head's own adapter learns through the chunks that backward computes again."""
    from trainer.data.packing import pack

    torch.manual_seed(0)
    model = with_lora(load(expert), "x", Lora(dropout=0.0, targets=("lm_head",)))
    torch.nn.init.normal_(dict(model.named_parameters())["base_model.model.lm_head.lora_B.default.weight"], std=0.3)
    batch = pack(examples_of_run)
    model(**batch).loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    base = model.get_base_model()
    logits = (
        type(base)
        .forward(base, input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        .logits[0, batch["kept"]]
    )
    weights = batch["label_weights"]
    log_model = logits.log_softmax(-1).gather(-1, batch["label_ids"])
    (torch.xlogy(weights, weights) - weights * log_model).sum().backward()
    assert len(mine) == 2
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (mine[name] - parameter.grad).norm() / parameter.grad.norm() <= 1e-5, name


@pytest.fixture
def examples_of_run(run, expert):
    from support.training.reading import read_training_set

    from trainer.data.dataset import Limits

    return read_training_set(run, ModelFolder(expert), Limits(load(expert).config.vocab_size)).examples


def test_a_foreign_run_can_be_allowed_and_the_adapter_says_so(tmp_path, expert, trainer_cli):
    other = save_model(tmp_path / "other", seed=9)
    run = write_run(tmp_path / "run", other)
    words = "train", run, "--model", expert, "--output", tmp_path / "out", "--max-steps", 1
    code, _, err = trainer_cli(*words)
    assert code == 1 and "weights" in err
    code, _, err = trainer_cli(*words, "--allow-mismatch")
    assert code == 0, err
    said = json.loads((tmp_path / "out" / "lightreasoner.json").read_text())["mismatches"]
    assert len(said) == 1 and said[0].startswith("weights ") and said[0] in (tmp_path / "out" / "README.md").read_text()


def test_the_run_gets_losses_and_picture_and_its_report_shows_them(tmp_path, expert, trainer_cli):
    run = write_run(tmp_path / "run", expert)
    trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", "--max-steps", 3)
    left = Run(str(run)).bucket
    assert left.get("training/metrics.jsonl") == (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert left.get("training/loss.png").startswith(b"\x89PNG")
    assert "Training loss from" in report_page(run)
    left.put("training/held_out.jsonl", b"what an earlier training measured")
    trainer_cli("train", run, "--model", expert, "--output", tmp_path / "other", "--max-steps", 1, "--held-out", 0)
    assert left.get("training/held_out.jsonl") is None


def test_an_adapter_tells_the_run_and_the_training_that_it_is_of(tmp_path, expert, trainer_cli):
    """Also where the RUN has moved. A RUN with the same settings is another RUN, and so is one built from it."""
    run, twin = (write_run(tmp_path / name, expert) for name in ("run", "twin"))
    first, second = tmp_path / "first", tmp_path / "second"
    words = "train", run, "--model", expert, "--save-steps", 1
    for out in (first, second):
        assert trainer_cli(*words, "--output", out, "--max-steps", 2)[0] == 0
    shown = json.loads(Run(str(run)).bucket.get("training/training.json"))
    assert shown.pop("training_id") == json.loads((second / "lightreasoner.json").read_text())["training_id"]
    figures = {"optimizer_steps": 2, "adapter_step": 2, "objective": "contrast"}
    assert shown == {"adapter": str(second), **figures}
    assert trainer_cli(*words, "--output", first, "--max-steps", 3, "--resume")[0] == 0
    moved, built = (Run(str(tmp_path / name)) for name in ("moved", "built"))
    shutil.copytree(str(run), str(moved))
    build_run(run, built, ContrastSettings(**run.manifest().changed(beta=0.3)))
    foreign = save_adapter(tmp_path / "foreign", expert)
    checkpoint = first / "checkpoints" / "checkpoint-3"
    found = origins_of(map(str, (first, second, checkpoint, foreign)), moved)
    one, other, at_its_end, elsewhere = found.values()
    assert one == {
        "run": str(run), "of_this_run": True, "training_id": one["training_id"], "objective": "contrast", "step": 3,
    }  # fmt: skip
    assert at_its_end == one | {"step": None} and other["of_this_run"] and other["step"] == 2
    assert one["training_id"] != other["training_id"] and set(elsewhere.values()) == {None}
    shown = json.loads(run.bucket.get("training/training.json"))
    assert (shown["training_id"], shown["optimizer_steps"]) == (one["training_id"], 3)
    for another in (twin, built):
        assert origins_of([str(first)], another)[str(first)] == one | {"of_this_run": False}
    (first / "lightreasoner.json").write_text("{")
    assert set(origins_of([str(first)], run)[str(first)].values()) == {None}


def test_evaluate_names_the_system_prompt_that_an_adapter_was_trained_with(tmp_path, expert, trainer_cli):
    def sampled_with(prompt):
        run = write_run(tmp_path / f"run-{prompt}", expert)
        named = run.manifest().model_copy(update={"system_prompt": prompt})
        run.bucket.put("run.json", named.model_dump_json().encode())
        return Run(str(run))

    run, out = sampled_with("Think of " + 20 * "eggs, "), tmp_path / "out"
    assert trainer_cli("train", run, "--model", expert, "--output", out, "--max-steps", 1, "--held-out", 0)[0] == 0
    (rows := tmp_path / "rows.jsonl").write_text('{"question": "2 + 2?"}\n')  # no answer: evaluate ends before it asks
    words = ("evaluate", expert, "--benchmark", f"sums={rows}")
    code, said, err = trainer_cli(*words, "--adapter", out)
    assert code == 1 and "no answer" in err
    short = '"Think of eggs, eggs, eggs, eggs, eggs, e…"'
    assert said.startswith(
        f'note: {out} was trained with the system prompt {short} and is asked with "Please reason step by step, and '
        f'put your…"; a model that knows no other prompt needs --system-prompt {short}\n'
    )
    assert "warning" not in trainer_cli(*words, "--adapter", out, "--system-prompt", "Guess.")[1], "the user's choice"

    foreign, known = str(save_adapter(tmp_path / "foreign", expert)), sampled_with(BOX_SYSTEM_PROMPT)
    assert prompt_notes([foreign], BOX_SYSTEM_PROMPT, None) == []
    assert prompt_notes([foreign], BOX_SYSTEM_PROMPT, known) == []
    assert 'needs --system-prompt ""' in prompt_notes([foreign], BOX_SYSTEM_PROMPT, sampled_with(None))[0]
    two = [str(out), str(out / "checkpoints" / "checkpoint-1"), foreign]
    assert len(prompt_notes(two, BOX_SYSTEM_PROMPT, known)) == 1, "one line for one prompt"
    for early in ("{}", "{", '{"run_identity": {}}', "[]"):
        (out / "lightreasoner.json").write_text(early)
        assert prompt_notes([str(out)], BOX_SYSTEM_PROMPT, None) == []


def test_transformers_and_vllm_load_it_and_agree(tmp_path, run, expert, trainer_cli):
    """In float32, by a vLLM engine on the CPU; vLLM says log-probabilities, so those are compared."""
    from trainer.evaluation.answer_engine import AnswerEngine
    from trainer.settings import Precision

    vllm = pytest.importorskip("vllm")
    folder = tmp_path / "adapter"
    words = "train", run, "--model", expert, "--output", folder, "--max-steps", 12, "--learning-rate", 3e-2
    assert trainer_cli(*words)[0] == 0
    ids = list(range(6, 26))
    with torch.no_grad():
        plain = load(expert)(torch.tensor([ids])).logits[0].log_softmax(-1)
        exact = PeftModel.from_pretrained(load(expert), folder)(torch.tensor([ids])).logits[0].log_softmax(-1)
    engine = AnswerEngine(ModelFolder(expert), [folder], Precision.FLOAT32, 64)
    try:
        from vllm.lora.request import LoRARequest

        asked = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=20)
        lora = LoRARequest("adapter", 1, str(folder))
        said = engine.llm.generate([{"prompt_token_ids": ids}], asked, lora_request=lora)[0].outputs[0].logprobs[0]
    finally:
        engine.close()
    assert len(said) >= 20
    for token, theirs in said.items():
        assert theirs.logprob == pytest.approx(exact[-1, token].item(), abs=1e-4)
    assert (exact[-1] - plain[-1]).abs().max() > 0.1
