"""What cannot be packed trains one trajectory a pass, exactly; what can be packed in part is packed in part."""

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.models.tiny_pair import load, randomised, write_run
from support.models.unpacked import LONG_ROPE, UNPACKED, save_family
from support.training.launch import metrics
from support.training.one_step import one_step
from support.training.reference import per_sample_loss

from trainer.data.packing import Layout
from trainer.settings import Lora
from trainer.training.lora import with_lora
from trainer.training.packing_check import neighbours, position_switch

QUICK = "mamba", "falcon_h1", "opt"


def reference(folder, run, targets):
    """Loss and gradient of the adapter that `one_step` makes, by one forward pass for each kept step."""
    transformers.set_seed(0)
    start = with_lora(load(folder), "x", Lora(targets=tuple(targets), dropout=0.0)).state_dict()
    model = get_peft_model(load(folder), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    model.load_state_dict({name: value for name, value in start.items() if "lora_A" in name}, strict=False)
    loss = per_sample_loss(randomised(model).eval(), run.samples())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in UNPACKED]
)
def test_a_family_that_cannot_be_packed_has_the_gradient_of_one_pass_a_kept_step(tmp_path, capsys, kind):
    targets, own = UNPACKED[kind]
    folder = save_family(tmp_path / kind, kind, **own)
    run = write_run(tmp_path / "run", folder, 4)
    one_step(run, folder, tmp_path / "out", tmp_path / "gradients.safetensors", targets=tuple(targets.split(",")))
    said = " ".join(capsys.readouterr().out.split())
    assert f"one trajectory a pass: {folder}" in said and "a packed pass would hold about" in said
    loss, gradients = reference(folder, run, targets.split(","))
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(loss, rel=1e-5)
    mine = load_file(tmp_path / "gradients.safetensors")
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 1e-5
        assert (mine[name] - gradient).norm() / gradient.norm() <= 1e-4, name


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory):
    """A model whose position tables switch, and a RUN with trajectories on both sides of the switch."""
    folder = save_family(tmp_path_factory.mktemp("models") / "phi3", "phi3", **LONG_ROPE)
    return folder, write_run(tmp_path_factory.mktemp("runs") / "run", folder, 8)


def first_step(trainer_cli, model, out, *options):
    folder, run = model
    words = "train", run, "--model", folder, "--output", out, "--max-steps", 1, "--targets", "qkv_proj", "--dropout", 0
    code, shown, err = trainer_cli(*words, *options)
    assert code == 0, err
    step = metrics(out)[0]
    return {name: step[name] for name in ("loss", "grad_norm")}, " ".join(shown.split())


def test_no_pass_holds_trajectories_of_both_sides_of_a_position_switch(tmp_path, long_rope, trainer_cli):
    alone, said = first_step(trainer_cli, long_rope, tmp_path / "alone", "--no-packing")
    assert "one trajectory a pass: --no-packing asks for it" in said
    for budget in (40, 80, 512):
        step, said = first_step(trainer_cli, long_rope, tmp_path / f"{budget}", "--token-budget", budget)
        assert step == pytest.approx(alone, rel=1e-5) and "a pass" not in said


def test_a_switch_that_no_configuration_tells_of_is_seen_at_the_lengths_of_the_run(
    tmp_path, long_rope, trainer_cli, monkeypatch
):
    alone, _ = first_step(trainer_cli, long_rope, tmp_path / "alone", "--no-packing")
    monkeypatch.setattr("trainer.training.packing_check.position_switch", lambda config: None)
    monkeypatch.setattr("trainer.training.packing_check.TOKENS", (4, 5))  # lengths that switch nothing
    step, said = first_step(trainer_cli, long_rope, tmp_path / "out")
    assert step == pytest.approx(alone, rel=1e-5)
    assert f"one trajectory a pass: {long_rope[0]}: trajectories packed into one sequence disturb each other" in said


@pytest.mark.parametrize(
    ("lengths", "budget", "switch", "pairs"),
    [
        ([9, 3, 7, 20], 25, None, [(3, 20)]),
        ([9, 3, 7, 20], 12, None, [(3, 9)]),
        ([9, 3, 7, 20], 100, 8, [(9, 20), (3, 7)]),
        ([9, 3, 7, 20], 9, None, []),
        ([5], 100, None, []),
    ],
)
def test_the_lengths_that_are_tried_are_those_that_may_share_a_pass(lengths, budget, switch, pairs):
    assert neighbours(lengths, budget, Layout(switch=switch)) == pairs


def test_the_switch_of_other_models_is_none(expert):
    assert position_switch(load(expert).config) is None
