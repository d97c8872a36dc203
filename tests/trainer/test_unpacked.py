"""What cannot be packed trains in padded rows, or one trajectory a pass, exactly; some is packed in part."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.models.tiny_pair import load, randomised, write_run
from support.models.unpacked import LONG_ROPE, UNPACKED, save_family
from support.training.launch import metrics, ranks
from support.training.one_step import one_step
from support.training.reading import read_training_set
from support.training.reference import per_sample_loss
from transformers.models.opt.modeling_opt import OPTDecoder

from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import Limits
from trainer.data.packing import Layout, Sharing, pack
from trainer.settings import Lora
from trainer.training.lora import with_lora
from trainer.training.packing_check import Choice, fullest, lengths_to_come, neighbours, position_switch

QUICK = "mamba", "opt"


def reference(folder, run, targets):
    """Loss and gradient of the adapter that `one_step` makes, by one forward pass for each kept step."""
    transformers.set_seed(0)
    start = with_lora(load(folder), "x", Lora(targets=tuple(targets), dropout=0.0)).state_dict()
    model = get_peft_model(load(folder), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    model.load_state_dict({name: value for name, value in start.items() if "lora_A" in name}, strict=False)
    loss = per_sample_loss(randomised(model).eval(), run.samples())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_gradient(tmp_path, kind):
    """One optimizer step over four trajectories, which one pass could hold, against one pass a kept step."""
    targets, own = UNPACKED[kind]
    folder = save_family(tmp_path / kind, kind, **own)
    run = write_run(tmp_path / "run", folder, 4)
    one_step(run, folder, tmp_path / "out", tmp_path / "gradients.safetensors", targets=tuple(targets.split(",")))
    loss, gradients = reference(folder, run, targets.split(","))
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(loss, rel=1e-5)
    mine = load_file(tmp_path / "gradients.safetensors")
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 1e-5
        assert (mine[name] - gradient).norm() / gradient.norm() <= 1e-4, name


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in UNPACKED]
)
def test_a_family_that_cannot_be_packed_has_the_gradient_of_one_pass_a_kept_step(tmp_path, capsys, kind):
    check_gradient(tmp_path, kind)
    said = " ".join(capsys.readouterr().out.split())
    assert f"one trajectory a row, padded: {tmp_path / kind}: trajectories packed into one sequence" in said


def test_rows_that_disturb_each_other_are_trained_one_a_pass(tmp_path, capsys, monkeypatch):
    forward = OPTDecoder.forward

    def with_the_mean_of_all_rows(self, **words):
        found = forward(self, **words)
        found.last_hidden_state = found.last_hidden_state + found.last_hidden_state.mean(dim=0)
        return found

    monkeypatch.setattr(OPTDecoder, "forward", with_the_mean_of_all_rows)
    check_gradient(tmp_path, "opt")
    said = " ".join(capsys.readouterr().out.split())
    assert f"one trajectory a pass: {tmp_path / 'opt'}: trajectories packed into one sequence disturb" in said
    assert f"; {tmp_path / 'opt'}: trajectories padded into rows disturb each other (of 24 and 40 tokens;" in said
    assert "a packed pass would hold about 27" in said


def test_adapted_layers_that_no_gradient_reaches_are_named(tmp_path, trainer_cli):
    """Falcon-Mamba reads the weights of its dt_proj without the layer."""
    folder = save_family(tmp_path / "falcon", "falcon_mamba", state_size=8)
    words = ["train", write_run(tmp_path / "run", folder, 4), "--model", folder, "--max-steps", 2, "--held-out", 0]
    code, out, err = trainer_cli(*words, "--targets", "in_proj,dt_proj", "--output", tmp_path / "out")
    said = " ".join((out + err).split())
    assert code == 0 and "2 adapted layers got no gradient and do nothing, such as backbone.layers.0" in said, said
    assert said.count("dt_proj: name others with --targets") == 1
    code, out, err = trainer_cli(*words, "--targets", "in_proj", "--output", tmp_path / "without")
    assert code == 0 and "no gradient" not in out + err


@pytest.mark.long
def test_two_ranks_have_the_losses_of_one_in_padded_rows(tmp_path):
    targets, own = UNPACKED["mamba"]
    folder = save_family(tmp_path / "mamba", "mamba", **own)
    words = ["train", write_run(tmp_path / "run", folder, 13), "--model", folder, "--targets", targets, "--dropout", 0]
    words += ["--batch-size", 6, "--max-steps", 5, "--learning-rate", 1e-3]
    found = {}
    for count, budget in ((1, 28), (1, 90), (2, 90)):
        out = tmp_path / f"{count}-{budget}"
        said = ranks(count, *words, "--token-budget", budget, "--output", out)
        assert said.returncode == 0 and "one trajectory a row" in said.stdout, said.stderr[-3000:]
        found[count, budget] = [line[name] for line in metrics(out) for name in ("loss", "grad_norm", "agreement")]
    for shared in (found[1, 90], found[2, 90]):
        assert shared == pytest.approx(found[1, 28], rel=1e-4)


def test_what_padding_costs_is_said():
    said = Choice(Layout(Sharing.PADDED), "why", "sdpa", []).said(100, [10, 10, 60], "cpu")
    assert said == [
        "one trajectory a row, padded: why. The adapter is the same; a pass holds about 2, and packed about 3"
    ]


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory):
    """A model whose position tables switch, and a RUN with trajectories on both sides of the switch."""
    folder = save_family(tmp_path_factory.mktemp("models") / "phi3", "phi3", **LONG_ROPE)
    return folder, write_run(tmp_path_factory.mktemp("runs") / "run", folder, 8)


@pytest.fixture(scope="module")
def alone(long_rope):
    """Loss and norm of the gradient of one optimizer step, by one pass a trajectory."""
    folder, run = long_rope
    transformers.set_seed(0)
    adapted = with_lora(load(folder), "x", Lora(targets=("qkv_proj",), dropout=0.0))
    examples = read_training_set(run, ModelFolder(folder), Limits(adapted.config.vocab_size)).examples
    loss = sum(adapted(**pack([example])).loss for example in examples) / sum(len(e.positions) for e in examples)
    loss.backward()
    gradients = [p.grad.norm() for p in adapted.parameters() if p.requires_grad]
    return {"loss": loss.item(), "grad_norm": torch.stack(gradients).norm().item()}


def first_step(trainer_cli, model, out, *options):
    folder, run = model
    words = "train", run, "--model", folder, "--output", out, "--max-steps", 1, "--targets", "qkv_proj", "--dropout", 0
    code, shown, err = trainer_cli(*words, *options)
    assert code == 0, err
    step = metrics(out)[0]
    return {name: step[name] for name in ("loss", "grad_norm")}, " ".join(shown.split())


@pytest.mark.parametrize(("words", "said"), [((), ""), (("--no-packing",), "row, padded: --no-packing asks for it")])
def test_no_pass_holds_trajectories_of_both_sides_of_a_position_switch(
    tmp_path, long_rope, alone, trainer_cli, words, said
):
    for budget in (80, 512):
        step, shown = first_step(trainer_cli, long_rope, tmp_path / f"{budget}", "--token-budget", budget, *words)
        assert step == pytest.approx(alone, rel=1e-5) and said in shown and ("one trajectory" in shown) == bool(said)


def test_a_switch_that_no_configuration_tells_of_is_seen_at_the_lengths_of_the_run(
    tmp_path, long_rope, alone, trainer_cli, monkeypatch
):
    monkeypatch.setattr("trainer.training.packing_check.position_switch", lambda config: None)
    monkeypatch.setattr("trainer.training.packing_check.TOKENS", (4, 5))  # lengths that switch nothing
    step, said = first_step(trainer_cli, long_rope, tmp_path / "out")
    assert step == pytest.approx(alone, rel=1e-5)
    assert f"one trajectory a pass: {long_rope[0]}: trajectories packed into one sequence disturb each other" in said
    assert f"; {long_rope[0]}: trajectories padded into rows disturb each other" in said


@pytest.mark.parametrize(
    ("lengths", "budget", "layout", "pairs"),
    [
        ([9, 3, 7, 20], 25, Layout(), [(3, 20)]),
        ([9, 3, 7, 20], 12, Layout(), [(3, 9)]),
        ([9, 3, 7, 20], 100, Layout(switch=8), [(9, 20), (3, 7)]),
        ([9, 3, 7, 20], 9, Layout(), []),
        ([5], 100, Layout(), []),
        ([9, 3, 7, 20], 25, Layout(Sharing.PADDED), [(3, 9)]),
        ([9, 3, 7, 20], 40, Layout(Sharing.PADDED), [(3, 20)]),
    ],
)
def test_the_lengths_that_are_tried_are_those_that_may_share_a_pass(lengths, budget, layout, pairs):
    assert neighbours(lengths, budget, layout) == pairs


@pytest.mark.parametrize(
    ("lengths", "budget", "layout", "passes"),
    [
        ([9, 3, 7, 20], 40, Layout(), [(3, 20, 9, 7)]),
        ([9, 3, 7, 20], 20, Layout(), [(3, 9, 7)]),
        ([9, 9, 3], 20, Layout(), [(9, 9), (3, 9)]),
        ([9, 9, 9, 9, 3], 30, Layout(), [(3, 9, 9, 9)]),
        ([9, 9, 9, 9, 3], 36, Layout(), [(9, 9, 9, 9), (3, 9, 9, 9)]),
        ([9] * 4, 27, Layout(), [(9, 9, 9)]),
        ([9, 3, 7, 20, 8], 30, Layout(switch=8), [(9, 20), (3, 8, 7)]),
        ([9, 3, 7, 20, 8], 30, Layout(Sharing.PADDED), []),
        ([9, 3, 7, 8], 40, Layout(Sharing.PADDED), [(7, 9, 8)]),
    ],
)
def test_the_fullest_pass_is_tried(lengths, budget, layout, passes):
    assert fullest(lengths, budget, layout) == passes


@pytest.mark.parametrize(
    ("longest", "budget", "passes"),
    [
        (30, 180, [(30,) * 6, (24, *(30,) * 5)]),
        (30, 190, [(10, *(30,) * 6)]),
        (96, 119, [(24, 95)]),
        (4096, 512, [(24, 488)]),
    ],
)
def test_passes_are_as_full_where_no_trajectory_is_known_yet(longest, budget, passes):
    assert fullest(lengths_to_come(longest, budget), budget, Layout()) == passes


def test_the_switch_of_other_models_is_none(expert):
    assert position_switch(load(expert).config) is None
