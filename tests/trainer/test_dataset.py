"""From a RUN to examples, and what is refused on the way."""

import dataclasses

import numpy as np
import pytest
from support.models.tiny_pair import VOCABULARY, WORDS, save_model, save_tokenizer, trajectory, write_run
from support.training.reading import read_training_set

from client.errors import RunError
from client.runs.run import Run
from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import Limits, check_ranges
from trainer.data.steps import Steps
from trainer.settings import Recipe, Running
from trainer.training.train import read

LIMITS = Limits(VOCABULARY)


@pytest.fixture
def examples(run, expert):
    return read_training_set(run, ModelFolder(expert), LIMITS).examples


def test_each_kept_step_is_predicted_from_the_prompt_and_the_tokens_before_it(run, examples):
    for sample, example in zip((s for s in run.samples() if len(s.contrast.steps)), examples, strict=True):
        whole = np.concatenate([sample.prompt_token_ids, sample.token_ids])
        for step, position in zip(sample.contrast.steps, example.positions, strict=True):
            assert whole[position + 1] == sample.token_ids[step]
            assert position + 1 == len(sample.prompt_token_ids) + step
        assert example.input_ids.tolist() == whole[: example.positions.max() + 1].tolist()


def test_a_trajectory_without_a_kept_step_is_left_out_and_counted(tmp_path, expert):
    bored = trajectory("bored", 50)
    bored = dataclasses.replace(bored, amateur_logprobs=bored.expert_logprobs)
    run = write_run(tmp_path / "run", expert, trajectories=[trajectory("keen", 51), bored])
    found = read_training_set(run, ModelFolder(expert), LIMITS)
    assert len(found.examples) == 1 and found.without_kept_steps == 1
    assert found.kept_steps == len(found.examples[0].positions) > 0


def test_ids_beyond_the_vocabulary_and_steps_beyond_the_trajectory_are_named(run):
    sample = next(iter(run.samples()))
    contrast = sample.contrast
    beyond = np.full_like(contrast.label_ids, VOCABULARY)
    wrong_label = dataclasses.replace(sample, contrast=dataclasses.replace(contrast, label_ids=beyond))
    wrong_token = dataclasses.replace(sample, token_ids=np.full_like(sample.token_ids, -7))
    late = np.full_like(contrast.steps, len(sample.token_ids))
    wrong_step = dataclasses.replace(sample, contrast=dataclasses.replace(contrast, steps=late))
    for wrong, message in (
        (wrong_label, f"'p0'.*token {VOCABULARY}"),
        (wrong_token, "'p0'.*token -7"),
        (wrong_step, f"'p0'.*keeps steps {late[0]}"),
    ):
        with pytest.raises(RunError, match=message):
            check_ranges(run, wrong, VOCABULARY)
    check_ranges(run, sample, VOCABULARY)


def test_step_0_is_learned_from_the_end_of_the_prompt(tmp_path, expert):
    run = write_run(tmp_path / "run", expert, first_step=0, beta=0.0)
    sample = next(iter(run.samples()))
    assert sample.contrast.steps[0] == 0
    first = read_training_set(run, ModelFolder(expert), LIMITS).examples[0]
    assert first.positions[0] == len(sample.prompt_token_ids) - 1


def test_a_run_that_cannot_teach_this_model_is_refused_by_name(tmp_path, expert, trainer_cli):
    """Each message names the RUN, what is wrong and what to do, and there is no traceback."""
    other = save_model(tmp_path / "other", seed=9)
    write_run(tmp_path / "foreign", other)
    write_run(tmp_path / "empty", expert, trajectories=[], sealed=False)
    write_run(tmp_path / "unkept", expert, beta=1e6)
    for name, words in {
        "missing": ("no RUN at", "lightreasoner-client sample"),
        "empty": ("is empty", "lightreasoner-client sample"),
        "unkept": ("none of the 6 trajectories", "--beta 1e+06: give a lower one", "build"),
        "foreign": ("weights", Run(str(tmp_path / "foreign")).manifest().expert.model_fingerprint[:12], str(other)),
    }.items():
        code, _, err = trainer_cli("train", tmp_path / name, "--model", expert, "--output", tmp_path / "out")
        assert code == 1 and err.startswith("error: ") and str(tmp_path / name) in err and "Traceback" not in err
        assert all(word in err for word in words), err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["tokenizer", "chat template"])
def test_a_model_with_the_same_weights_but_another_tokenizer_or_template_is_refused(tmp_path, run, what, trainer_cli):
    model = save_model(tmp_path / "model")
    if what == "tokenizer":
        save_tokenizer(model, words=WORDS[::-1])
    else:
        save_tokenizer(model, template="{{ messages[0]['content'] }}")
    code, _, err = trainer_cli("train", run, "--model", model, "--output", tmp_path / "out")
    assert code == 1 and f": {what} " in err and "weights" not in err
    assert ("tokenizer" in err) == (what == "tokenizer")


def test_a_trajectory_that_is_too_long_for_a_micro_batch_or_for_the_model_is_named_and_not_cut(
    tmp_path, run, expert, trainer_cli
):
    longest = max(len(example.input_ids) for example in read_training_set(run, ModelFolder(expert), LIMITS).examples)
    words = "train", run, "--model", expert, "--max-steps", 1, "--output"
    code, _, err = trainer_cli(*words, tmp_path / "short", "--token-budget", longest - 1)
    assert code == 1 and f"trajectory 'p0', sample 0 has {longest} tokens" in err and "--token-budget" in err
    assert f"give at least {longest}" in err and not (tmp_path / "short").exists()
    assert trainer_cli(*words, tmp_path / "long", "--token-budget", longest)[0] == 0
    with pytest.raises(RunError, match=f"has {longest} tokens; the model's context is {longest - 1}"):
        read_training_set(run, ModelFolder(expert), Limits(VOCABULARY, context=longest - 1))


def test_a_damaged_part_is_named(tmp_path, expert, trainer_cli):
    run = write_run(tmp_path / "run", expert)
    part = tmp_path / "run" / "samples" / f"{run.parts('samples')[0]}.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out")
    assert (
        code == 1
        and part.name in err
        and "move it out of the RUN, and complete.json" in err
        and not (tmp_path / "out").exists()
    )


def test_a_key_that_two_parts_hold_is_read_once(tmp_path, expert):
    run = write_run(tmp_path / "run", expert, sealed=False)
    run.write([trajectory("p0", 77), trajectory("new", 78)], {}, run.manifest())
    found = read_training_set(run, ModelFolder(expert), LIMITS)
    assert len(found.examples) == 7 and found.kept_steps == sum(len(s.contrast.steps) for s in run.samples())


def test_a_seed_means_the_same_steps_however_the_answers_came(tmp_path, expert):
    """Two RUNs with the same trajectories, in other parts and another order."""
    many = [trajectory(f"p{index}", 60 + index) for index in range(12)]
    recipe, found = Recipe(batch_size=4, seed=3), []
    for name, order in (("one", many), ("other", [*many[7:], *many[:7]])):
        run = write_run(tmp_path / name, expert, trajectories=order[:5], sealed=False)
        run.write(order[5:], {}, run.manifest())
        training_set = read(run, ModelFolder(expert), recipe, Running(token_budget=512))
        held_out = training_set.hold_out(0.25)
        steps = [step["micro_batches"][0]["input_ids"].tolist() for step in Steps(training_set, recipe, 512)]
        found.append((steps, [example.input_ids.tolist() for example in held_out]))
    assert found[0] == found[1] and len(found[0][1]) == 3 and len(found[0][0]) > 1


def test_one_kept_step_alone_has_its_own_prefix_and_label(examples):
    example = examples[0]
    alone = [example.only(index) for index in range(len(example.positions))]
    assert [len(one.input_ids) for one in alone] == (example.positions + 1).tolist()
    assert np.concatenate([one.label_ids for one in alone]).tolist() == example.label_ids.tolist()
    assert np.concatenate([one.label_weights for one in alone]).tolist() == example.label_weights.tolist()
    assert [one.label_offsets.tolist() for one in alone] == [[0, n] for n in np.diff(example.label_offsets)]


def test_large_numbers_have_separators(run, expert):
    training_set = read_training_set(run, ModelFolder(expert), Limits(VOCABULARY))
    training_set.ends, training_set.without_kept_steps = [15_066], 1_234
    assert str(training_set).endswith(" trajectories with 15,066 kept steps; 1,234 without any are left out")
