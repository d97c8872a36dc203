"""Training: the right gradient, the right number of steps, and what is left in the output folder."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.models.tiny_pair import VOCABULARY, load, randomised, save_adapter, save_model, write_run
from support.servers.real_server import ROOT
from support.training.launch import ONE_STEP, metrics
from support.training.launch import ranks as ranks_of
from support.training.one_step import one_step
from support.training.reading import read_training_set
from support.training.reference import per_sample_loss

from client.errors import ModelError
from client.models.fingerprints import model_fingerprint
from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import Limits
from trainer.data.packing import pack
from trainer.settings import Lora
from trainer.training.loop import ContrastTrainer
from trainer.training.lora import compute_loss_in_forward, with_lora


@pytest.fixture(scope="module")
def reference(run, expert):
    """Loss and gradient of the adapter that `one_step` makes, by one forward per kept step."""
    model = get_peft_model(load(expert), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    model = randomised(with_the_same_start(model, expert)).eval()
    loss = per_sample_loss(model, run.samples())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def with_the_same_start(model, expert):
    """A as the trainer draws it from seed 0."""
    transformers.set_seed(0)
    start = with_lora(load(expert), "x", Lora()).state_dict()
    model.load_state_dict({name: value for name, value in start.items() if "lora_A" in name}, strict=False)
    return model


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {}),
        (1, {"token_budget": 30}),
        (1, {"token_budget": 30, "gradient_checkpointing": True}),
        (1, {"chunk": 3}),
        (2, {"token_budget": 30}),
        (2, {"token_budget": 30, "gradient_checkpointing": True}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else f"{value} ranks",
)
def test_loss_and_gradient_equal_a_reference_with_one_forward_per_kept_step(
    tmp_path, monkeypatch, run, expert, reference, ranks, options
):
    """In one sequence, in several micro-batches, recomputed, in chunks of three steps, and on two ranks."""
    options = dict(options)
    if rows := options.pop("chunk", None):
        monkeypatch.setattr("trainer.training.loss.contrast_sums.__defaults__", (rows * VOCABULARY,))
    words = run, expert, tmp_path / "out", tmp_path / "gradients.safetensors"
    if ranks == 1:
        one_step(*words, **options)
    else:
        given = [f"{name}={json.dumps(value)}" for name, value in options.items()]
        said = ranks_of(ranks, *words, *given, function=ONE_STEP)
        assert said.returncode == 0, said.stderr[-3000:]
    loss, gradients = reference
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(loss, rel=1e-5)
    mine = load_file(tmp_path / "gradients.safetensors")
    assert mine.keys() == gradients.keys() and len(mine) == 8  # A and B of two projections in two layers
    for name, gradient in gradients.items():
        assert gradient.norm() > 1e-4
        assert (mine[name] - gradient).norm() / gradient.norm() <= 1e-5, name


def test_the_lora_is_the_published_one(expert):
    config = with_lora(load(expert), "some/expert", Lora()).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert config.target_modules == {"q_proj", "v_proj"} and config.base_model_name_or_path == "some/expert"


@pytest.mark.parametrize(
    ("options", "steps"),
    [(("--max-steps", 5), 5), (("--max-steps", 1), 1), ((), 2 * 2), (("--epochs", 0.5), 1), (("--batch-size", 6), 2)],
)
def test_the_number_of_optimizer_steps_is_what_was_asked_for(tmp_path, run, expert, trainer_cli, options, steps):
    batch = () if "--batch-size" in options else ("--batch-size", 4)  # 6 trajectories: 2 batches an epoch
    code, shown, _ = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", *batch, *options)
    assert code == 0 and f"{steps} optimizer steps over 6 trajectories" in shown
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)


def test_the_learning_rate_rises_over_ten_steps_from_above_zero_and_stays(tmp_path, run, expert, trainer_cli):
    trainer_cli(
        *("train", run, "--model", expert, "--output", tmp_path / "out"), "--max-steps", 12, "--learning-rate", 1e-3
    )
    rates = [line["learning_rate"] for line in metrics(tmp_path / "out")]
    assert rates == pytest.approx([1e-4 * min(step, 10) for step in range(1, 13)])


def test_training_lowers_the_loss_and_leaves_an_adapter_that_says_where_it_came_from(
    tmp_path, run, expert, trainer_cli
):
    out = tmp_path / "out"
    before = model_fingerprint(expert)
    code, shown, _ = trainer_cli(
        *("train", run, "--model", expert, "--output", out), "--max-steps", 40, "--learning-rate", 3e-3
    )
    losses = [line["loss"] for line in metrics(out)]
    assert code == 0 and losses[-1] < 0.7 * losses[0] and "is not complete" not in shown
    assert f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" in shown
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(expert) and config["r"] == 8
    provenance = json.loads((out / "lightreasoner.json").read_text())
    assert provenance["base_model_fingerprint"] == before == model_fingerprint(expert)
    assert provenance["run"] == str(run)
    batch = pack(read_training_set(run, ModelFolder(expert), Limits(VOCABULARY)).examples)
    adapted = PeftModel.from_pretrained(load(expert), out)
    compute_loss_in_forward(adapted)
    with torch.no_grad():
        reloaded = (adapted(**batch).loss / len(batch["kept"])).item()
    assert reloaded < 0.7 * losses[0]  # what was saved is what was trained


def test_a_seed_makes_training_repeatable(tmp_path, run, expert, trainer_cli):
    def weights(name, seed):
        out = tmp_path / name
        trainer_cli("train", run, "--model", expert, "--output", out, "--max-steps", 3, "--seed", seed)
        return load_file(out / "adapter_model.safetensors")

    first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_weights_are_loaded_in_the_type_that_was_asked_for_and_the_adapter_stays_in_float32(
    tmp_path, monkeypatch, trainer_cli
):
    """auto is the type that the model is stored in; without --dtype a CPU loads float32."""
    seen = []
    step = ContrastTrainer.training_step
    monkeypatch.setattr(
        ContrastTrainer,
        "training_step",
        lambda self, model, *args: seen.append(model.get_base_model().dtype) or step(self, model, *args),
    )
    stored = save_model(tmp_path / "bf16", dtype=torch.bfloat16)
    run = write_run(tmp_path / "run", stored)
    for index, options in enumerate(((), ("--dtype", "bfloat16"), ("--dtype", "float32"), ("--dtype", "auto"))):
        out = tmp_path / f"out{index}"
        code, _, err = trainer_cli("train", run, "--model", stored, "--output", out, "--max-steps", 1, *options)
        assert code == 0, err
        weights = [
            out / "adapter_model.safetensors",
            out / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors",
        ]
        assert {tensor.dtype for tensor in load_file(weights[0]).values()} == {torch.float32}
        assert {file.stat().st_mode for file in weights} == {(out / "lightreasoner.json").stat().st_mode}
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


def test_the_update_of_a_model_in_half_precision_is_computed_in_it_from_weights_in_float32(expert):
    half = randomised(with_lora(load(expert).to(torch.bfloat16), "some/model", Lora(dropout=0.0)))
    layer = half.get_base_model().model.layers[0].self_attn.q_proj
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    states = torch.randn(3, 64, dtype=torch.bfloat16)
    update = states @ first.bfloat16().T @ second.bfloat16().T
    found = layer(states)
    assert torch.equal(found, layer.base_layer(states) + update * 2)
    found.sum().backward()
    assert {first.dtype, second.dtype, first.grad.dtype, second.grad.dtype} == {torch.float32}


def test_a_run_that_is_not_complete_trains_and_says_what_to_do(tmp_path, expert, trainer_cli):
    write_run(tmp_path / "run", expert, sealed=False)
    code, shown, _ = trainer_cli(
        *("train", tmp_path / "run", "--model", expert, "--output", tmp_path / "out", "--max-steps", 1)
    )
    assert code == 0 and f"warning: {tmp_path / 'run'} is not complete: training on what it holds now. " in shown
    assert "repeat the command that makes it, then this one with a new --output; --follow trains while" in shown


def test_an_output_that_is_taken_is_refused_with_the_remedy(tmp_path, run, expert, trainer_cli):
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path)
    assert code == 1 and err == f"error: {tmp_path} is not empty: it holds an adapter; give another --output\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--batch-size", 0), ("--learning-rate", 0), ("--learning-rate", "nan"), ("--epochs", -1), ("--max-steps", 0)],
)
def test_a_value_that_makes_no_sense_is_refused_with_the_options_name(run, expert, trainer_cli, option, value):
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", "unused", option, value)
    assert code == 2 and option in err and "Traceback" not in err


def test_a_model_that_is_not_there_is_named(tmp_path, run, trainer_cli):
    code, _, err = trainer_cli("train", run, "--model", tmp_path / "none", "--output", tmp_path / "out")
    assert code == 1 and err.startswith("error: no model folder at")


def test_a_model_without_the_layers_that_are_trained_is_refused(expert):
    model = load(expert)
    for layer in model.model.layers:
        layer.self_attn.wq = layer.self_attn.__dict__["_modules"].pop("q_proj")
        layer.self_attn.wv = layer.self_attn.__dict__["_modules"].pop("v_proj")
    with pytest.raises(ModelError, match=r"some/model has no layer q_proj, v_proj; its .* are down_proj"):
        with_lora(model, "some/model", Lora())


def test_a_folder_that_holds_no_model_configuration_is_named(tmp_path, run, expert, trainer_cli):
    broken = shutil.copytree(expert, tmp_path / "broken")
    (broken / "config.json").unlink()
    code, _, err = trainer_cli("train", run, "--model", broken, "--output", tmp_path / "out")
    assert code == 1 and err.startswith(f"error: {broken}/config.json is missing: is this a model folder")


COMMANDS = """
import json, sys, trainer.__main__
for line in sys.stdin:
    sys.argv = ["lightreasoner-trainer", *json.loads(line)]
    try:
        trainer.__main__.main()
    except SystemExit as ended:
        heavy = {"torch", "transformers", "vllm", "sympy"} & set(sys.modules)
        print("exit code", ended.code, *heavy, file=sys.stderr)
"""
"""Each line of words as a command, in one process; then what heavy it has loaded."""


def test_help_and_errors_of_what_was_named_need_neither_torch_nor_vllm(tmp_path, run, expert):
    other, empty, bare, file = (
        save_model(tmp_path / "other", seed=9),
        tmp_path / "empty",
        tmp_path / "bare",
        tmp_path / "f",
    )
    shutil.copytree(expert, bare)
    (bare / "config.json").unlink()
    empty.mkdir()
    file.write_text("{}")
    (nothing := tmp_path / "nothing.jinja").write_text("")
    (dangling := tmp_path / "dangling").symlink_to(tmp_path / "gone")
    long = tmp_path / ("x" * 300)
    (taken := tmp_path / "taken").mkdir()
    adapter = save_adapter(tmp_path / "adapter", expert)
    (taken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    high, unsealed = (write_run(tmp_path / name, expert, beta=9, sealed=name == "high") for name in ("high", "open"))
    none_kept = f"none of the 6 trajectories in {high} has a kept step at --beta 9: give a lower one"
    out = tmp_path / "out"
    train, evaluate = ("train", run, "--output", out, "--model"), ("evaluate", expert, "--benchmark")
    onto = ("train", run, "--model", expert, "--output")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1].content }}")
    expected = {
        ("--help",): "evaluate",
        (*train, tmp_path / "none"): "no model folder at",
        (*train, empty): "config.json is missing",
        (*train, bare): "config.json is missing",
        (*train, other): "was not sampled from the model at",
        (*train, expert, "--chat-template", template): "if the server had a --chat-template FILE, give the same",
        ("train", empty, "--output", out, "--model", expert): "no RUN at",
        ("train", run, "--model", expert, "--output", taken): "taken is not empty",
        ("train", high, "--output", out, "--model", expert): f"{none_kept} ('lightreasoner-client build {high} NEW_RUN",
        ("train", unsealed, "--output", out, "--model", expert): "none of the 6 trajectories in",
        (*onto, run): f"{run} is not empty: it holds a RUN; give another --output",
        (*onto, run, "--resume"): f"{run} holds a RUN, not a training to resume; give another --output",
        (*onto, expert): f"{expert} is not empty: it holds a model; give another --output",
        (*onto, adapter, "--resume"): f"{adapter} holds an adapter, not a training to resume",
        (*onto, tmp_path): f"{tmp_path} is not empty: it holds other files; give another --output",
        ("train", run, "--model", expert, "--output", file / "out"): f"{file} is not a folder",
        ("train", run, "--model", expert, "--output", dangling): f"{dangling} is not a folder",
        ("train", run, "--model", expert, "--output", long): f"cannot create the folder {long}: File name too long",
        (*train, long): f"cannot use {long}: File name too long",
        (*train, expert, "--chat-template", nothing): "in run.json, none in the model",
        (*train, expert, "--objective", "sft"): "--objective sft and --answers FILE belong together",
        (*train, expert, "--objective", "sft", "--answers", "none.jsonl"): "no problem set at none.jsonl",
        (*train, expert, "--keep", "best", "--held-out", 0): "--keep best needs --held-out above 0",
        ("merge", empty, taken, out): "config.json is missing",
        ("merge", expert, empty, out): "no adapter at",
        ("merge", expert, taken, out): "has no adapter_model.safetensors",
        ("merge", expert, long, out): f"no adapter at {long}: adapter_config.json cannot be read: File name too long",
        ("merge", expert, adapter, dangling): f"{dangling} is not a folder",
        ("merge", expert, adapter, long / "out"): f"cannot create the folder {long}/out: File name too long",
        (*evaluate, "a=none.jsonl"): "no problem set at none.jsonl",
        (*evaluate, f"a={file}", "--adapter", empty): "no adapter at",
        (*evaluate, f"a={file}", "--run", empty): "no RUN at",
        (*evaluate, f"a={file}", "--output", f"{long}.json"): f"--output {long}.json cannot be written: File name too",
        ("ablation", run, "--model", expert, "--output", out, "--benchmark", "a=-"): "--benchmark a -: a pipe can be",
        ("evaluate", bare, "--benchmark", f"a={file}"): "config.json is missing",
    }
    words = "".join(json.dumps([*map(str, line)]) + "\n" for line in expected)
    done = subprocess.run([sys.executable, "-c", COMMANDS], input=words, capture_output=True, text=True, check=True)
    said = done.stderr.split("exit code ")
    assert all(command in done.stdout for command in ("train", "merge", "evaluate"))
    assert [one.partition("\n")[0] for one in said[1:]] == ["0", *["1"] * (len(expected) - 1)]
    for (line, message), told in list(zip(expected.items(), ["", *said[1:]], strict=False))[1:]:
        assert message in " ".join(told.split()), (line, told)
    assert not out.exists()


def test_a_loss_that_is_no_number_ends_training_without_an_adapter(tmp_path, run, expert, trainer_cli):
    words = "--learning-rate", 1e30, "--max-steps", 5, "--output", tmp_path / "out"
    code, _, err = trainer_cli("train", run, "--model", expert, *words)
    assert code == 1 and "error: the loss became nan at step" in err and "lower --learning-rate" in err
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_models_own_folder_is_no_place_for_an_adapter(run, expert, trainer_cli):
    before = sorted(file.name for file in expert.iterdir())
    code, _, err = trainer_cli("train", run, "--model", expert, "--max-steps", 1, "--output", expert)
    assert code == 1 and "is not empty" in err and sorted(file.name for file in expert.iterdir()) == before


def test_a_logger_that_is_unknown_or_not_installed_is_named_before_anything_is_written(
    tmp_path, run, expert, trainer_cli
):
    words = "train", run, "--model", expert, "--output", tmp_path / "out", "--report-to"
    for logger, reason in (("nothing", "nothing is not supported"), ("swanlab", "pip install swanlab")):
        code, _, err = trainer_cli(*words, logger)
        assert code == 1 and reason in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_attention_that_cannot_be_trained_here_is_refused_before_the_first_step(tmp_path, run, expert, trainer_cli):
    """torch's flex attention has no backward pass on a CPU."""
    if torch.cuda.is_available():
        pytest.skip("it has one on a GPU")
    code, _, err = trainer_cli(
        "train", run, "--model", expert, "--output", tmp_path / "out", "--attention", "flex_attention"
    )
    assert code == 1 and "FlexAttention does not support backward on CPU" in err
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_an_update_that_leaves_no_numbers_ends_training_without_an_adapter(tmp_path, run, expert, trainer_cli):
    """The last one, too, after which no loss is computed."""
    words = "--learning-rate", 1e39, "--max-steps", 1, "--output", tmp_path / "out"
    code, _, err = trainer_cli("train", run, "--model", expert, *words)
    assert code == 1 and "weights became NaN or infinite at step 1" in err and "lower --learning-rate" in err
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert not list((tmp_path / "out" / "checkpoints").glob("*/whole.json"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_proj,foo", "has no layer foo; its linear layers are down_proj, gate_proj"),
        ("all-linear,q_proj", "has no layer all-linear; .* or give all-linear alone"),
        (" , ", "is empty"),
    ],
)
def test_targets_that_are_no_layers_are_refused(tmp_path, run, expert, trainer_cli, targets, said):
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", "--targets", targets)
    assert code and re.search(said, " ".join(err.replace("│", "").split()))


def test_lists_may_have_spaces_and_no_logger_is_called_none(tmp_path, run, expert, trainer_cli):
    words = "--targets", "q_proj, v_proj", "--report-to", "none", "--max-steps", 1, "--output", tmp_path / "out"
    assert trainer_cli("train", run, "--model", expert, *words)[0] == 0
    assert json.loads((tmp_path / "out" / "lightreasoner.json").read_text())["recipe"]["dtype"] == "float32"


def test_attention_that_is_unknown_is_blamed_on_the_option(tmp_path, run, expert, trainer_cli):
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", "--attention", "nope")
    assert code == 1 and "with --attention nope" in err


def test_weights_that_are_damaged_are_named(tmp_path, run, expert, trainer_cli):
    broken = shutil.copytree(expert, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    words = "--output", tmp_path / "out", "--allow-mismatch"
    code, _, err = trainer_cli("train", run, "--model", broken, *words)
    assert code == 1 and str(broken) in err and "Traceback" not in err


@pytest.mark.parametrize(("dropout", "said"), [(0.0, False), (0.05, True)])
def test_dropout_of_the_models_own_is_off_without_dropout_and_said_otherwise(
    tmp_path, run, expert, trainer_cli, monkeypatch, dropout, said
):
    model = shutil.copytree(expert, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.4}
    (model / "config.json").write_text(json.dumps(config))
    rates = []
    step = ContrastTrainer.training_step

    def looked_at(self, adapted, *words):
        rates.extend(module.attention_dropout for module in adapted.modules() if hasattr(module, "attention_dropout"))
        return step(self, adapted, *words)

    monkeypatch.setattr(ContrastTrainer, "training_step", looked_at)
    words = ("--model", model, "--output", tmp_path / "out", "--max-steps", 1, "--dropout", dropout)
    code, shown, err = trainer_cli("train", run, *words)
    assert code == 0, err
    assert ("the model has dropout of its own (0.4), which is on" in " ".join(shown.split())) == said
    assert set(rates) == ({0.4} if said else {0.0})


LOAD_OPENMP = """
import ctypes, sys, trainer.__main__
openmp, sys.argv = sys.argv[1], ["lightreasoner-trainer", "--version"]
try:
    trainer.__main__.main()
except SystemExit:
    ctypes.CDLL(openmp)
"""


@pytest.mark.parametrize(("given", "spins"), [({}, 0), ({"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000)])
def test_threads_give_way_to_other_processes_unless_told_not_to(given, spins):
    """Torch's OpenMP says what it makes of what it has read: how often a thread that waits looks before it sleeps."""
    (openmp,) = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    read_before_main = ("OMP_WAIT_POLICY", "LD_PRELOAD")  # OpenMP, where it is preloaded
    environment = {name: value for name, value in os.environ.items() if name not in read_before_main}
    said = subprocess.run(
        [sys.executable, "-c", LOAD_OPENMP, openmp], cwd=ROOT, capture_output=True, text=True,
        env={**environment, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in said.stderr
