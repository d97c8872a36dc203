"""Trajectories that are held out: never trained on, measured on the way, and what is kept by them."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel
from peft.utils import save_and_load
from rich.console import Console
from safetensors.torch import load_file
from support.models.tiny_pair import trajectory, write_run
from support.training.reading import read_training_set
from transformers import AutoModelForCausalLM, TrainerState

from trainer.adapters.model_folder import ModelFolder
from trainer.cli.train import TrainingOptions
from trainer.data.dataset import Limits, TrainingSet
from trainer.settings import Keep
from trainer.training.held_out import HeldOutFigures, best_of
from trainer.training.loss import held_out_terms
from trainer.training.progress import Journal, draw_curve

MANY = 30
HOT = ("--batch-size", 6, "--learning-rate", 0.05, "--dropout", 0, "--token-budget", 60)


@pytest.fixture(scope="module")
def many(tmp_path_factory, expert):
    """A RUN of thirty problems in two parts."""
    run = write_run(tmp_path_factory.mktemp("many") / "run", expert, MANY - 10, sealed=False)
    run.write([trajectory(f"p{index}", index) for index in range(MANY - 10, MANY)], {}, run.manifest())
    run.seal(run.totals(run.manifest()))
    return run


def held_out_of(run, expert, share):
    training_set = read_training_set(run, ModelFolder(expert), Limits(ModelFolder(expert).vocab_size))
    return training_set, training_set.hold_out(share)


def rows_of(out):
    return [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]


def weights_of(out):
    return load_file(out / "adapter_model.safetensors")


def check_equal(one, other):
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_share_of_the_problems_is_held_out_whole_and_the_same_each_time(tmp_path, many, expert):
    training_set, held_out = held_out_of(many, expert, 0.2)
    again, same = held_out_of(many, expert, 0.2)
    every = training_set.examples + held_out
    assert len(held_out) == len(every) // 5 and len(every) <= MANY
    assert [example.input_ids.tolist() for example in same] == [example.input_ids.tolist() for example in held_out]
    assert len(again.examples) == len(training_set.examples) > 0
    more = held_out_of(many, expert, 0.4)[1]
    begins = {tuple(example.input_ids.tolist()) for example in more}
    assert {tuple(example.input_ids.tolist()) for example in held_out} < begins
    assert held_out_of(many, expert, 0.0)[1] == [] == held_out_of(many, expert, 1e-9)[1]
    few = write_run(tmp_path / "few", expert, 6)
    assert held_out_of(few, expert, 0.05)[1] == []


def test_samples_of_one_problem_are_never_on_both_sides(tmp_path, expert, trainer_cli):
    trajectories = [replace(trajectory("p", index), problem_id=f"p{index // 4}", sample_index=index % 4)
                    for index in range(40)]  # fmt: skip
    run = write_run(tmp_path / "run", expert, trajectories=trajectories)
    training_set = TrainingSet(run, Limits(ModelFolder(expert).vocab_size))
    training_set.read()
    whole = len(training_set.examples)
    assert training_set.hold_out(0.05) == [] and len(training_set.examples) == whole >= 20
    why = training_set.held_out_none(0.05)
    assert f"held out none: 0.05 of {whole} trajectories is {whole // 20}, problems are held out whole" in why
    code, said, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out", "--max-steps", 1)
    assert code == 0 and why in " ".join(said.split()), err
    remedy = TrainingSet(run, Limits(ModelFolder(expert).vocab_size))
    remedy.read()
    assert remedy.hold_out(float(re.search(r"--held-out (\S+) holds it out", why)[1]))
    held_out = training_set.hold_out(0.25)
    assert 0 < len(held_out) <= whole / 4 and len(held_out) + len(training_set.examples) == whole
    starts = [{tuple(example.input_ids[:3].tolist()) for example in side} for side in (training_set.examples, held_out)]
    kept = {f"p{index // 4}": tuple(t.prompt_token_ids[:3].tolist()) for index, t in enumerate(trajectories)}
    assert len(kept) == 10
    by_problem = {}
    for t in trajectories:
        by_problem.setdefault(t.problem_id, set()).add(tuple(np.concatenate([t.prompt_token_ids, t.token_ids])[:3]))
    sides = [{name for name, begins in by_problem.items() if begins & side} for side in starts]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("options", [("--token-budget", 1000), ("--no-packing",)])
def test_what_is_measured_is_a_plain_forward_of_the_model_and_of_its_base(tmp_path, many, expert, trainer_cli, options):
    out = tmp_path / "out"
    words = ("train", many, "--model", expert, "--output", out, "--held-out", 0.2, "--max-steps", 6, *HOT, *options)
    code, said, err = trainer_cli(*words)
    assert code == 0, err
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    base = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
    before, _ = measured(base, base, many, expert)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32), out)
    after, scores = measured(tuned, base, many, expert)
    for row, expected in ((rows[0], before), (rows[-1], after)):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=2e-4), name
        assert row["score"] == pytest.approx(row["distance"] + 1.5 * row["other_shift"])
    state = json.loads((out / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    kept = [logs["held_out_scores"] for logs in state["log_history"] if "held_out_scores" in logs]
    assert len(kept) == len(rows) and len(scores) > 2
    in_order = [scores[tuple(example.input_ids.tolist())] for example in held_out_of(many, expert, 0.2)[1]]
    assert kept[-1] == pytest.approx(in_order, abs=5e-4), "what each trajectory adds, in whatever passes they are"
    assert rows[0]["shift"] == rows[0]["other_shift"] == 0 < rows[-1]["other_shift"]
    about = json.loads((out / "lightreasoner.json").read_text())
    assert (
        about["held_out_trajectories"] == len(held_out_of(many, expert, 0.2)[1]) and about["recipe"]["held_out"] == 0.2
    )
    assert (
        "held-out loss" in said and many.bucket.get("training/held_out.jsonl") == (out / "held_out.jsonl").read_bytes()
    )


def measured(model, base, run, expert):
    """loss, agreement, distance, shift, other_shift, and each trajectory's share of the score: a loop a step."""
    held_out = {tuple(example.input_ids.tolist()) for example in held_out_of(run, expert, 0.2)[1]}
    found = {"loss": [], "agreement": [], "distance": [], "shift": [], "other_shift": []}
    model.eval()
    shares = {}
    for sample in run.samples():
        ids = np.concatenate([sample.prompt_token_ids, sample.token_ids])[:-1]
        if tuple(ids.tolist()) not in held_out:
            continue
        with torch.no_grad():
            mine, theirs = (torch.log_softmax(one(torch.tensor(ids)[None].long()).logits[0].double(), -1)
                            for one in (model, base))  # fmt: skip
        kept, before = sample.contrast, {name: sum(values) for name, values in found.items()}
        for step in range(1, len(sample.token_ids)):
            at = len(sample.prompt_token_ids) + step - 1
            shift = float((mine[at].exp() * (mine[at] - theirs[at])).sum())
            if step not in kept.steps:
                found["other_shift"].append(shift)
                continue
            place = kept.steps.tolist().index(step)
            label = slice(*kept.label_offsets[place : place + 2])
            weights, tokens = torch.tensor(kept.label_weights[label]).double(), kept.label_ids[label].astype(int)
            found["loss"].append(float((weights * (weights.log() - mine[at, tokens])).sum()))
            found["agreement"].append(int(mine[at].argmax()) == tokens[int(weights.argmax())])
            found["distance"].append(float((label_over(mine[at], tokens, weights) - mine[at].exp()).abs().sum()) / 2)
            found["shift"].append(shift)
        shares[tuple(ids.tolist())] = [sum(found[name]) - before[name] for name in ("distance", "other_shift")]
    weights = len(shares) / len(found["distance"]), 1.5 * len(shares) / len(found["other_shift"])
    scores = {ids: float(np.dot(weights, share)) for ids, share in shares.items()}
    return {name: float(np.mean(values)) for name, values in found.items()}, scores


def test_an_infinite_shift_of_a_step_without_a_label_stays_out_of_those_with_one():
    """The base gives a token nothing at all at the second step, which has no label."""
    logits, base = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, -torch.inf]])
    ids, weights = torch.tensor([[0], [0]]), torch.tensor([[1.0], [0.0]])
    terms = held_out_terms(logits, base, ids, weights)
    assert torch.isfinite(terms[:, :6]).all() and terms[1, 6] == torch.inf and terms[0, 6] == 0 < terms[0, 5]


def label_over(like, tokens, weights):
    """A label's weights over the whole vocabulary."""
    return torch.zeros_like(like).index_add(0, torch.tensor(tokens), weights)


def test_the_best_measurement_is_the_last_that_is_as_good_as_the_lowest():
    """As good: within a standard error of the difference, and no measurement between is worse."""
    lowest, noise = np.array([0.5, 0.1, 0.3, 0.9]), np.array([0.02, -0.02, 0.03, -0.01])
    as_good, worse = lowest + noise, lowest + 0.1 + noise / 10
    assert (as_good - lowest).mean() > 0
    assert best_of([lowest + 1, lowest, as_good]) == 2
    assert best_of([lowest + 1, lowest, worse, as_good]) == 1
    assert best_of([lowest + 1, lowest, as_good, worse, as_good]) == 2
    assert best_of([as_good, worse, lowest]) == 2 and best_of([lowest]) == 0
    assert best_of([lowest, lowest + np.nan, lowest]) == 0, "figures that are no numbers are never the best"
    assert best_of([np.array([0.5]), np.array([0.50001])]) == 0, "one trajectory has no standard error"
    assert best_of([np.array([0.5]), np.array([0.5])]) == 1


def test_measuring_changes_no_weight(tmp_path, many, expert, trainer_cli):
    """The adapter is that of a RUN that never had the held-out problems, dropout and all."""
    held_out = {tuple(example.input_ids.tolist()) for example in held_out_of(many, expert, 0.2)[1]}
    others = [t for t in many.trajectories()
              if tuple(np.concatenate([t.prompt_token_ids, t.token_ids])[:-1].tolist()) not in held_out]  # fmt: skip
    less = write_run(tmp_path / "less", expert, trajectories=others)
    words = ("--model", expert, "--max-steps", 5, "--batch-size", 6, "--learning-rate", 0.01, "--token-budget", 60)
    assert trainer_cli("train", many, "--output", tmp_path / "a", "--held-out", 0.2, *words)[0] == 0
    assert trainer_cli("train", less, "--output", tmp_path / "b", "--held-out", 0, *words)[0] == 0
    check_equal(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "held_out.jsonl").exists()


def test_the_best_adapter_is_kept_and_a_training_that_goes_past_it_warns(tmp_path, expert, trainer_cli):
    """The held-out trajectories are like those that are trained on, or there would be nothing to learn for them."""
    alike = [replace(trajectory("p", index % 3), problem_id=f"p{index}") for index in range(MANY)]
    many = write_run(tmp_path / "run", expert, trajectories=alike)
    words = ("train", many, "--model", expert, "--held-out", 0.2, *HOT, "--learning-rate", 0.01)
    code, said, _ = trainer_cli(*words, "--output", tmp_path / "last", "--max-steps", 7)
    rows = rows_of(tmp_path / "last")
    (best,) = (row["step"] for row in rows if row["best"])
    assert code == 0 and 0 < best < 6
    said = " ".join(said.split())
    assert f"warning: training went past its best: the held-out score was best at step {best}" in said
    assert f"Train again with --max-steps {best}, or with --keep best" in said
    on_the_way = re.search(
        rf"step (\d): the held-out score has been worse than at step {best} twice: training may be past", said
    )
    assert on_the_way and int(on_the_way[1]) >= best + 2
    on_the_way = on_the_way[0]
    assert said.count(on_the_way) == 1 == said.count("training may be past")
    assert said.index(on_the_way) < said.index("step 7/7")
    told = (tmp_path / "last" / "README.md").read_text()
    assert f"**Training went past its best, step {best}:**" in told and f"`--max-steps {best}`, or with" in told
    assert (
        f"If `checkpoints/checkpoint-{best}` is here" in told
        and "measured every 1 steps" in told
        and "`evaluate`" in told
    )
    assert not list((tmp_path / "last" / "checkpoints").glob("*/README.md"))
    code, said, _ = trainer_cli(*words, "--output", tmp_path / "best", "--max-steps", 7, "--keep", "best")
    assert f"{many} shows this training now, and no longer the one before" in " ".join(said.split())
    assert code == 0 and f"the adapter of step {best} is kept" in " ".join(said.split())
    assert f"adapter of step {best} in {tmp_path / 'best'}" in said
    told = (tmp_path / "best" / "README.md").read_text()
    assert (
        f"| adapter | of step {best}, the best of 7 by the held-out trajectories |" in told and "past its" not in told
    )
    assert trainer_cli(*words, "--output", tmp_path / "short", "--max-steps", best)[0] == 0
    check_equal(tmp_path / "best", tmp_path / "short")
    about = json.loads((tmp_path / "best" / "lightreasoner.json").read_text())
    assert (about["best_step"], about["adapter_step"], about["optimizer_steps"]) == (best, best, 7)

    early = tmp_path / "early"  # stopped past the best, and made longer: the best comes from the checkpoint
    assert trainer_cli(*words, "--output", early, "--max-steps", best + 1, "--keep", "best")[0] == 0
    (early / "held_out.jsonl").unlink()  # as after a machine that is lost, of an OUT in a bucket
    resumed = (*words, "--output", early, "--max-steps", 7, "--keep", "best", "--resume", "--token-budget", 200)
    assert trainer_cli(*resumed)[0] == 0, "other passes than before"
    check_equal(tmp_path / "best", early)
    assert [row["step"] for row in rows_of(early)] == [row["step"] for row in rows]


def test_a_model_has_hardly_moved_if_no_term_of_its_score_changed_by_a_twentieth():
    def at(distance, other_shift):
        return HeldOutFigures(72, 0.2, 0.7, distance, 0.0, other_shift)

    first = at(0.26, 0.0)
    assert all(at(*now).is_close_to(first) for now in ((0.26, 0.0), (0.2475, 0.0), (0.2725, 0.008)))
    assert not at(0.2465, 0.0).is_close_to(first), "it has learned"
    assert not at(0.2735, 0.0).is_close_to(first), "it has learned the opposite"
    assert not at(0.26, 0.009).is_close_to(first), "it has unlearnt, by 0.0135 of the score"
    assert not at(float("nan"), 0.0).is_close_to(first)


@pytest.mark.parametrize("length", ["--epochs", "--max-steps"])
def test_a_training_that_hardly_moved_the_model_warns_and_says_what_to_do(tmp_path, many, expert, trainer_cli, length):
    words = ("train", many, "--model", expert, "--held-out", 0.2, *HOT, length, 1)
    code, said, _ = trainer_cli(*words, "--output", tmp_path / "cold", "--learning-rate", 1e-6)
    rows = rows_of(tmp_path / "cold")
    first, last = (f"{row['distance']:.4f}" for row in (rows[0], rows[-1]))
    steps, told = rows[-1]["step"], (tmp_path / "cold" / "README.md").read_text()
    assert code == 0 and (
        f"warning: the model has hardly moved in {steps} optimizer steps: the held-out distance from the labels was "
        f"{first} before training and is {last} now. Continue with --resume and more {length}, or train again with a "
        "higher --learning-rate than 1e-06" in " ".join(said.split())
    )
    assert f"hardly moved in {steps} optimizer steps:**" in told and f"more `{length}`, or train again" in told
    assert f"was {first} before training and is {last} now" in told
    assert json.loads((tmp_path / "cold" / "lightreasoner.json").read_text())["held_out"]["moved_little"] is True
    code, said, _ = trainer_cli(*words, "--output", tmp_path / "hot")
    assert code == 0 and "hardly moved" not in said + (tmp_path / "hot" / "README.md").read_text()


def test_the_picture_names_the_score_as_it_is_computed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    figures = [HeldOutFigures(0, 0.0, 0.0, 1.0, 0.0, 0.0), HeldOutFigures(1, 0.0, 0.0, 0.0, 0.0, 1.0)]
    draw_curve([0.3], figures, 0, tmp_path / "loss.png")
    (line,) = (line for line in drawn[0].axes[0].lines if line.get_label().startswith("score: "))
    weight = re.fullmatch(r"score: distance \+ ([\d.]+) shift at other steps", line.get_label())[1]
    assert list(line.get_ydata()) == [1.0, float(weight)]


def test_progress_shows_no_loss_before_there_is_one(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    journal, state = Journal(tmp_path / "metrics.jsonl", console), TrainerState(max_steps=4, global_step=1)
    journal.on_train_begin(None, state, None)
    journal.close()
    assert "0/4" in (shown := console.file.getvalue()) and "nan" not in shown and "loss" not in shown


def test_the_hub_is_never_asked_about_the_base_of_an_adapter(tmp_path, many, expert, trainer_cli, monkeypatch):
    """The trained model is a folder here; its adapter records the name that a model of the Hub has."""
    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *words: asked.append(words))
    monkeypatch.setattr(ModelFolder, "name", property(lambda _: "Qwen/Qwen2.5-Math-1.5B"))
    words = ("train", many, "--model", expert, "--output", tmp_path / "out", "--held-out", 0.2, "--keep", "best")
    assert trainer_cli(*words, *HOT, "--max-steps", 2, "--save-steps", 1)[0] == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-Math-1.5B" and asked == []


def test_what_cannot_be_held_out_is_refused(tmp_path, many, run, expert, trainer_cli):
    words = ("train", many, "--model", expert, "--output", tmp_path / "out")
    for more, said in (
        (("--keep", "best", "--held-out", 0), "--keep best needs --held-out above 0"),
        (("--held-out", 0.1, "--follow"), "--held-out needs a whole RUN of contrast samples"),
        (("--keep", "best", "--preset", "paper"), "--keep best needs --held-out above 0"),
        (("--keep", "best", "--held-out", 0.001), "has too few trajectories to hold out 0.001 of"),
    ):
        code, _, err = trainer_cli(*words, *more)
        assert code == 1 and said in " ".join(err.split()), err
    assert trainer_cli(*words, "--held-out", 1)[0] == 2


def test_with_fsdp_which_cannot_measure_them_none_are_held_out_unless_asked_for(monkeypatch):
    assert TrainingOptions().recipe().held_out == 0.05
    for yes in ("true", "True", "1"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", yes)
        assert TrainingOptions().recipe().held_out == 0
    assert TrainingOptions(held_out=0.1).recipe().held_out == 0.1
    assert TrainingOptions(keep=Keep.BEST).recipe().held_out == 0.05  # which is refused, with the reason
