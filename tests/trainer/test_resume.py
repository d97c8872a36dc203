"""A training that is killed and resumed ends as one that was not; OUT may be a folder or in a bucket."""

import hashlib
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny_pair import save_model, trajectory, write_run
from support.processes.forked import run as run_forked
from support.training.launch import metrics, started

from client.storage.bucket import Bucket
from trainer.data.dataset import TrainingSet
from trainer.data.packing import Layout, Sharing
from trainer.training import lora, packing_check
from trainer.training.checkpoints import Output

STEPS, EVERY = 40, 5


@pytest.fixture(scope="module")
def words(run, expert):
    """A training with dropout, in batches that do not divide the epoch."""
    return ["train", run, "--model", expert, "--batch-size", 4, "--max-steps", STEPS, "--save-steps", EVERY,
            "--learning-rate", 1e-3, "--token-budget", 30]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, words):
    out = tmp_path_factory.mktemp("whole") / "out"
    process = started(*words, "--output", out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return out


def killed(words, out, after):
    """Start a training and kill -9 it once the checkpoint of step `after` is whole."""
    bucket, process = Bucket(str(out)), started(*words, "--output", out)
    deadline = time.monotonic() + 120
    while bucket.get(f"checkpoints/checkpoint-{after}/whole.json") is None:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert Bucket(str(out)).get("adapter_config.json") is None
    return bucket


def fetched(bucket, name, folder):
    (folder / name).write_bytes(bucket.get(name))
    return folder / name


def check_the_same(bucket, uninterrupted, tmp_path):
    mine = load_file(fetched(bucket, "adapter_model.safetensors", tmp_path))
    theirs = load_file(uninterrupted / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)
    fetched(bucket, "metrics.jsonl", tmp_path)
    lines, expected = metrics(tmp_path), metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [line["epoch"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


def test_killed_and_resumed_it_ends_with_the_weights_and_losses_of_an_uninterrupted_run(
    tmp_path, bucket, words, uninterrupted, trainer_cli
):
    left = killed(words, bucket, after=2 * EVERY)
    code, said, err = trainer_cli(*words, "--output", bucket, "--resume")
    assert code == 0 and "resuming after step" in said, err
    check_the_same(left, uninterrupted, tmp_path)
    names = {name.split("/")[1] for name in left.names("checkpoints")}
    assert names == {f"checkpoint-{number}" for number in (STEPS - EVERY, STEPS)}


@pytest.mark.parametrize("harm", ["cut", "unsealed", "file lost"])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, words, uninterrupted, trainer_cli, harm):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    for name in ("adapter_config.json", "lightreasoner.json"):
        (out / name).unlink()
    newest = out / "checkpoints" / f"checkpoint-{STEPS}"
    if harm == "cut":
        file = newest / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (newest / {"unsealed": "whole.json", "file lost": "scheduler.pt"}[harm]).unlink()
    code, said, err = trainer_cli(*words, "--output", out, "--resume")
    assert code == 0 and f"resuming after step {STEPS - EVERY}\n" in said, err
    check_the_same(Bucket(str(out)), uninterrupted, tmp_path)


def test_the_newest_whole_checkpoint_stays_until_the_next_is_whole(
    tmp_path, words, uninterrupted, trainer_cli, monkeypatch
):
    """Whatever the clock of the machine was that wrote the older ones."""
    out, end = shutil.copytree(uninterrupted, tmp_path / "out"), STEPS + 2 * EVERY
    for folder in (out / "checkpoints").iterdir():
        os.utime(folder, (time.time() + 3600,) * 2)
    longer = [*(end if word == STEPS else word for word in words), "--keep-checkpoints", 1]
    seal = Output.seal

    def crash(self, number, *rest):
        if number == end:
            raise SystemExit(9)
        seal(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "seal", crash)
        assert trainer_cli(*longer, "--output", out, "--resume")[0] == 9
    left = {folder.name for folder in (out / "checkpoints").iterdir()}
    assert left == {f"checkpoint-{end - EVERY}", f"checkpoint-{end}"}
    code, said, err = trainer_cli(*longer, "--output", out, "--resume")
    assert code == 0 and f"resuming after step {end - EVERY}\n" in said, err
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == [f"checkpoint-{end}"]


def test_what_was_done_is_not_done_again_and_can_be_made_longer(tmp_path, words, uninterrupted, trainer_cli):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    code, said, _ = trainer_cli(*words, "--output", out, "--resume")
    assert code == 0 and f"is complete: {STEPS} optimizer steps; nothing to do" in said
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    longer = [STEPS + 2 if word == STEPS else word for word in words]
    code, said, _ = trainer_cli(*longer, "--output", out, "--resume")
    assert code == 0 and f"resuming after step {STEPS}\n" in said
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 3))
    assert json.loads((out / "lightreasoner.json").read_text())["optimizer_steps"] == STEPS + 2


def test_other_settings_are_refused_with_their_names(tmp_path, words, uninterrupted, trainer_cli):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    (out / "lightreasoner.json").unlink()
    code, _, err = trainer_cli(*words, "--output", out, "--resume", "--rank", 4, "--seed", 3)
    assert code == 1 and "trained with other settings" in err and "\n  --seed: 0 against 3\n  --rank: " in err
    code, _, err = trainer_cli(*words, "--output", out)
    said = f"{out} is not empty: it holds a training; continue with --resume, or give another --output"
    assert code == 1 and said in err


def test_resuming_before_the_first_checkpoint_begins_at_the_beginning(tmp_path, bucket, words, trainer_cli):
    code, said, err = trainer_cli(*words, "--output", bucket, "--resume", "--max-steps", 2)
    assert code == 0 and "resuming after" not in said, err
    assert Bucket(bucket).get("adapter_model.safetensors") is not None


def test_a_training_of_an_early_version_goes_on_as_it_was_begun(tmp_path, expert, trainer_cli, monkeypatch):
    """With the parts that it began with, though the RUN has grown since; in their order, and with its arithmetic.

    Dropout would differ if trajectories shared passes, as they did not.
    """
    rows = [trajectory(f"p{index}", index) for index in (3, 0, 5, 1, 4, 2)]
    run, out = write_run(tmp_path / "run", expert, sealed=False, trajectories=rows), tmp_path / "out"
    words = ("train", run, "--model", expert, "--output", out, "--resume", "--dtype", "bfloat16", "--max-steps", 4)
    words += "--batch-size", 2, "--save-steps", 3, "--learning-rate", 0.01, "--no-packing"
    with monkeypatch.context() as early:
        early.setattr(TrainingSet, "sort", lambda self: None)
        early.setattr(lora, "multiply_in_the_models_type", lambda adapted: None)
        early.setattr(packing_check, "layout_for", lambda *words: (Layout(Sharing.ALONE), "of an early version"))
        assert trainer_cli(*words)[0] == 0
    expected, figures = load_file(out / "adapter_model.safetensors"), metrics(out)
    (out / "lightreasoner.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    new = "sorted", "rounded", "padding"
    change_state(out, 3, lambda state: {name: state[name] for name in state if name not in new})
    run.write([trajectory("late", 99)], {}, run.manifest())
    code, said, err = trainer_cli(*words)
    assert code == 0 and "resuming after step 3" in said and "4 optimizer steps over 6 trajectories" in said, err
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in figures]
    found = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def change_state(out, number, change):
    """Change the state of a checkpoint, which stays whole."""
    file = out / "checkpoints" / f"checkpoint-{number}" / "lightreasoner.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    whole = file.with_name("whole.json")
    listed = json.loads(whole.read_text()) | {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    whole.write_text(json.dumps(listed))


@pytest.mark.parametrize("change", ["follow", "model"])
def test_what_makes_another_training_is_refused_on_resuming(
    tmp_path, run, expert, words, uninterrupted, trainer_cli, change
):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    (out / "lightreasoner.json").unlink()
    if change == "follow":
        code, _, err = trainer_cli(*words, "--output", out, "--resume", "--follow")
        assert code == 1 and "--follow: False against True" in err
    else:
        words = [save_model(tmp_path / "other", seed=9) if word == expert else word for word in words]
        code, _, err = trainer_cli(*words, "--output", out, "--resume", "--allow-mismatch")
        assert code == 1 and "model, weights: " in err


def test_what_stands_past_the_end_that_was_asked_for_is_refused_and_left(tmp_path, words, uninterrupted, trainer_cli):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    shorter = [EVERY if word == STEPS else word for word in words]
    code, _, err = trainer_cli(*shorter, "--output", out, "--resume")
    assert code == 1 and f"stands at optimizer step {STEPS}, and {EVERY} were asked for" in err
    assert json.loads((out / "lightreasoner.json").read_text())["optimizer_steps"] == STEPS


def test_an_adapter_that_is_made_longer_is_not_called_finished_until_it_is(tmp_path, words, uninterrupted):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    longer = [1000 if word == STEPS else word for word in words]
    process = started(*longer, "--output", out, "--resume")
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / f"checkpoint-{STEPS + EVERY}" / "whole.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (out / "lightreasoner.json").exists()


def test_a_lightreasoner_json_that_cannot_be_read_is_named(tmp_path, words, uninterrupted, trainer_cli):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    (out / "lightreasoner.json").write_text('{"recipe"')
    code, _, err = trainer_cli(*words, "--output", out, "--resume")
    assert code == 1 and "lightreasoner.json is damaged" in err and "Traceback" not in err
    code, _, err = trainer_cli(*words, "--output", tmp_path / ("x" * 300), "--resume")
    assert code == 1 and "lightreasoner.json cannot be read: File name too long" in err and "Traceback" not in err


def test_other_numbers_of_processes_are_told_of(tmp_path, words, uninterrupted, trainer_cli):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    (out / "lightreasoner.json").unlink()
    change_state(out, STEPS, lambda state: state | {"ranks": 3})
    code, said, err = trainer_cli(*words, "--output", out, "--resume")
    assert code == 0 and "3 processes trained before and 1 train now" in " ".join(said.split()), err


def test_a_bucket_that_holds_anything_is_taken(words, bucket, trainer_cli):
    Bucket(bucket).put("notes/README.md", b"mine")
    code, _, err = trainer_cli(*words, "--output", bucket)
    assert code == 1 and "is not empty" in err and Bucket(bucket).get("notes/README.md") == b"mine"


@pytest.mark.parametrize("blocks", [1, 16, 24])  # too small for a log, for the adapter, for the optimizer's state
def test_a_disk_that_is_full_ends_training_in_a_line_with_the_remedy(tmp_path, words, blocks):
    """A limit on the size of files, in KiB, stands for the disk."""
    said = run_forked("trainer", *words, "--output", tmp_path / "out", file_bytes=blocks * 1024)
    assert said.returncode == 1 and "Traceback" not in said.stderr, said.stderr
    assert "make room" in said.stderr and "--resume" in said.stderr
