"""The SFT baseline: which solutions are trained on, and that the loss on them is plain cross-entropy."""

import ast
import contextlib
import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models.tiny_pair import IDS, VOCABULARY, load, saying, write_run
from support.processes.forked import ROOT

from client.errors import ProblemSetError
from client.protocol.requests import BOX_SYSTEM_PROMPT, Trajectory
from client.runs.run import Run
from trainer.data.dataset import Limits
from trainer.data.packing import pack
from trainer.data.solutions import SolutionSet, read_answers
from trainer.training.loss import contrast_sums

SAID = {"right": "7", "wrong": "5", "cut": "7", "other": "7"}


@pytest.fixture
def solved(tmp_path, expert):
    """Right, wrong, unfinished, a second sample that is right, one of a problem without an answer."""
    rows = [
        saying("right", "7"), saying("wrong", "5"), saying("cut", "7", finish_reason="length"),
        saying("wrong", "7", index=1), saying("other", "7"),
    ]  # fmt: skip
    answers = tmp_path / "answers.jsonl"
    named = [{"id": name, "question": f"{name}?", "answer": "#### 7"} for name in ("right", "wrong", "cut")]
    answers.write_text("".join(json.dumps(row) + "\n" for row in named))
    return write_run(tmp_path / "run", expert, trajectories=rows), answers, rows


def solutions(run, answers, ends=(), **limits):
    found = SolutionSet(run, Limits(VOCABULARY, **limits), read_answers(str(answers)), ends)
    for part in run.parts("trajectories"):
        found.add(part)
    return found


def test_what_an_early_version_sampled_behind_the_end_of_turn_is_no_part_of_a_solution(tmp_path, solved, expert):
    _, answers, rows = solved
    right, wrong = rows[:2]
    on = {name: np.concatenate([getattr(right, name), getattr(wrong, name)]) for name in Trajectory.ARRAYS[1:]}
    run = write_run(tmp_path / "went-on", expert, trajectories=[replace(right, finish_reason="length", **on)])
    assert run.manifest().end_token_ids is None and len(solutions(run, answers).examples) == 0
    (example,) = solutions(run, answers, ends=[IDS["<|end|>"]]).examples
    assert example.label_ids.tolist() == right.token_ids.tolist()


def test_right_and_finished_solutions_are_kept_whole(solved):
    run, answers, rows = solved
    found = solutions(run, answers)
    kept = [rows[0], rows[3]]
    assert len(found.examples) == 2
    for example, row in zip(found.examples, kept, strict=True):
        assert example.input_ids.tolist() == [*row.prompt_token_ids, *row.token_ids[:-1]]
        assert example.label_ids.tolist() == row.token_ids.tolist()
        assert example.positions.tolist() == list(
            range(len(row.prompt_token_ids) - 1, len(row.prompt_token_ids) + len(row.token_ids) - 1)
        )
    assert (found.without_kept_steps, found.unanswered) == (2, 1)
    tokens = sum(len(row.token_ids) for row in kept)
    assert str(found) == (
        f"2 right solutions of {tokens} tokens; 2 wrong or unfinished are left out, and 1 whose problem has no answer"
        rf"; the prompts of {run} ask for no \boxed{{}}, where an answer is read most safely; the system prompt of"
        " sample --solutions does"
    )
    tokenizer = json.loads(run.tokenizer())  # in which the prompt says it, though run.json names no system prompt
    vocabulary = tokenizer["model"]["vocab"]
    word = next(word for word, index in vocabulary.items() if index == rows[0].prompt_token_ids[0])
    vocabulary["\\boxed{}"] = vocabulary.pop(word)
    run.bucket.put("tokenizer.json", json.dumps(tokenizer).encode())
    assert str(solutions(Run(str(run)), answers)).endswith("no answer")


def test_a_system_prompt_that_asks_for_a_box_counts_where_the_vocabulary_lacks_its_words(solved):
    run, answers, _ = solved
    asked = run.manifest().model_copy(update={"system_prompt": BOX_SYSTEM_PROMPT})
    run.bucket.put("run.json", asked.model_dump_json().encode())
    assert "boxed" not in str(solutions(Run(str(run)), answers))


def test_the_loss_on_them_is_cross_entropy(solved, expert):
    run, answers, rows = solved
    model, batch = load(expert), pack(solutions(run, answers).examples)
    with torch.no_grad():
        states = model.get_decoder()(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False
        ).last_hidden_state[0, batch["kept"]]
        sums = contrast_sums(states, model.lm_head, batch["label_ids"], batch["label_weights"], VOCABULARY)
        expected = 0.0
        for row in (rows[0], rows[3]):
            ids = torch.tensor([[*row.prompt_token_ids.tolist(), *row.token_ids.tolist()]])
            labels = ids.clone()
            labels[0, : len(row.prompt_token_ids)] = -100
            expected += float(model(input_ids=ids, labels=labels).loss) * len(row.token_ids)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)


def test_a_run_is_trained_on_from_the_command_line(tmp_path, solved, expert, trainer_cli):
    """With answers that come through a pipe, as of a shell's <(zcat FILE): it gives them once."""
    run, file, _ = solved
    with piped(file.read_bytes()) as answers:
        words = ("train", run, "--model", expert, "--objective", "sft", "--max-steps", 2, "--batch-size", 2)
        code, out, err = trainer_cli(*words, "--answers", answers, "--output", tmp_path / "adapter")
    assert code == 0, err
    assert "2 right solutions of" in out and "2 optimizer steps" in out
    recipe = json.loads((tmp_path / "adapter" / "lightreasoner.json").read_text())["recipe"]
    assert (recipe["objective"], recipe["answers"]) == ("sft", answers)


@contextlib.contextmanager
def piped(data):
    """The path of a pipe that holds these bytes."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    yield f"/dev/fd/{reader}"
    os.close(reader)


def test_what_cannot_be_trained_on_is_said(tmp_path, solved, expert, trainer_cli, monkeypatch):
    run, answers, _ = solved
    nobody, wrong = tmp_path / "nobody.jsonl", tmp_path / "wrong.jsonl"
    nobody.write_text('{"id": "nobody", "question": "q", "answer": "7"}\n')
    wrong.write_text('{"id": "right", "question": "q", "answer": "8"}\n')
    choices = tmp_path / "choices.jsonl"
    choices.write_text('{"id": "right", "question": "q", "choices": ["a", "b"], "answer": 0}\n')
    empty = write_run(tmp_path / "empty", expert, trajectories=[])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(nobody.read_bytes())))
    for words, message in (
        ((run, "--objective", "sft"), "--answers FILE belong together"),
        ((run, "--answers", answers), "--answers FILE belong together"),
        ((run, "--objective", "sft", "--answers", answers, "--preset", "paper"), "--preset paper"),
        ((run, "--objective", "sft", "--answers", "-"), "answers none of the problems"),
        ((run, "--objective", "sft", "--answers", wrong), "none of the 1 solutions"),
        ((run, "--objective", "sft", "--answers", choices), "choices.jsonl:1: a question with choices"),
        ((run, "--objective", "sft", "--answers", answers, "--token-budget", 5), "--token-budget is 5"),
        ((empty, "--objective", "sft", "--answers", answers), "holds no trajectory yet"),
    ):
        code, _, err = trainer_cli("train", *words, "--model", expert, "--output", tmp_path / "out")
        assert code == 1 and message in err, (words, err)
        assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "--objective", "sft", "--answers", "-", "--output", tmp_path / "out"
    code, _, err = trainer_cli("train", run, "--model", expert, *words)
    assert code == 1 and "--answers -: a pipe can be read once, and every process" in err


def test_a_solution_that_comes_twice_is_read_once(solved):
    run, answers, rows = solved
    run.write(rows[:1], {}, run.manifest())
    assert len(solutions(Run(str(run)), answers).examples) == 2


def test_only_sft_loads_the_grader():
    """By what modules import at their top: sympy and pint are slow."""
    todo, found = ["trainer.training.train"], set()
    while todo:
        found.add(module := todo.pop())
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        todo += [name for name in names if name.startswith("trainer.") and name not in found]
    assert "trainer.data.dataset" in found and not any(name.startswith("trainer.grading") for name in found)


def test_answers_of_another_shape_are_refused(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"question": "q", "options": ["1", "2"], "answer": "B"}) + "\n")
    with pytest.raises(ProblemSetError, match=r"answers\.jsonl:1: not a row of a known benchmark: 'options'"):
        read_answers(str(answers))
