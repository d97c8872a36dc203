"""From a RUN to packed batches, and what is refused on the way."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_pair import VOCABULARY, WORDS, load, save_model, save_tokenizer, trajectory, write_run

from client.errors import RunError
from client.run import Run
from trainer.dataset import check_ranges, pack, read_training_set
from trainer.train import batch_loss


@pytest.fixture
def examples(run, expert):
    return read_training_set(run, expert, VOCABULARY).examples


def logits_of(model, examples):
    batch = pack(examples)
    with torch.no_grad():
        output = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=batch["kept"],
        )
    return output.logits[0].split([len(example.positions) for example in examples])


def test_each_kept_step_is_predicted_from_the_prompt_and_the_tokens_before_it(run, examples):
    for sample, example in zip((s for s in run.samples() if len(s.contrast.steps)), examples, strict=True):
        whole = np.concatenate([sample.prompt_token_ids, sample.token_ids])
        for step, position in zip(sample.contrast.steps, example.positions, strict=True):
            assert whole[position + 1] == sample.token_ids[step]
            assert position + 1 == len(sample.prompt_token_ids) + step
        assert example.input_ids.tolist() == whole[: example.positions.max() + 1].tolist()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_attention_crosses_from_one_packed_trajectory_to_another(expert, examples, mode):
    model = getattr(load(expert), mode)()
    alone = [logits_of(model, [example])[0] for example in examples]
    for packed, single in zip(logits_of(model, examples), alone, strict=True):
        torch.testing.assert_close(packed, single, rtol=0, atol=2e-5)
    changed = dataclasses.replace(examples[0], input_ids=(examples[0].input_ids + 1) % VOCABULARY)
    after = logits_of(model, [changed, *examples[1:]])
    assert (after[0] - alone[0]).abs().max() > 0.1
    for packed, single in zip(after[1:], alone[1:], strict=True):
        torch.testing.assert_close(packed, single, rtol=0, atol=2e-5)


def test_permuting_or_separating_the_trajectories_changes_the_loss_by_rounding_only(expert, examples):
    model = load(expert)
    with torch.no_grad():
        together = batch_loss(model, pack(examples))
        permuted = batch_loss(model, pack(examples[::-1]))
        apart = [batch_loss(model, pack([example])) * len(example.positions) for example in examples]
    torch.testing.assert_close(permuted, together, rtol=1e-6, atol=0)
    kept = sum(len(example.positions) for example in examples)
    torch.testing.assert_close(sum(apart) / kept, together, rtol=1e-6, atol=0)


def test_a_trajectory_without_a_kept_step_is_left_out_and_counted(tmp_path, expert):
    bored = trajectory("bored", 50)
    bored = dataclasses.replace(bored, amateur_logprobs=bored.expert_logprobs)
    run = write_run(tmp_path / "run", expert, trajectories=[trajectory("keen", 51), bored])
    found = read_training_set(run, expert, VOCABULARY)
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
    first = read_training_set(run, expert, VOCABULARY).examples[0]
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
        "unkept": ("none of the 6 trajectories", "beta 1e+06", "lower --beta"),
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
