"""Training on a RUN while it is written: by a slow writer, one that stalls, and one that is killed and comes back."""

import threading
import time

import pytest
from support.models.tiny_pair import manifest_for, trajectory, write_run
from support.models.unpacked import save_family
from support.training.launch import metrics, ranks, started

import trainer.data.follow
from client.runs.run import Run
from trainer.training.loop import ContrastTrainer

COUNT = 24


@pytest.fixture
def run(tmp_path, expert):
    """A RUN of 24 problems that nobody has sampled yet."""
    folder = tmp_path / "run"
    manifest = manifest_for(expert)
    manifest = manifest.model_copy(update={"problems": manifest.problems.model_copy(update={"count": COUNT})})
    run = Run(str(folder))
    run.claim(manifest, (expert / "tokenizer.json").read_bytes())
    return run


def write(run, names, part_of=4, pause=0.3, seal=True, wait_for=None):
    """Parts of a few trajectories, with pauses between; the last one not before `wait_for` is set."""
    manifest, names = run.manifest(), list(names)
    for begin in range(0, len(names), part_of):
        if wait_for and begin + part_of >= len(names):
            assert wait_for.wait(120)
        run.write([trajectory(f"p{name}", name) for name in names[begin : begin + part_of]], {}, manifest)
        time.sleep(pause)
    if seal:
        run.seal(run.totals(manifest))


@pytest.fixture
def words(tmp_path, run, expert):
    return ["train", run, "--model", expert, "--output", tmp_path / "out", "--follow", "--batch-size", 5,
            "--learning-rate", 1e-3]  # fmt: skip


def written(run, **options):
    writer = threading.Thread(target=write, args=(run, range(COUNT)), kwargs=options)
    writer.start()
    return writer


def kept_steps(run):
    return sum(len(sample.contrast.steps) for sample in run.samples())


def test_it_starts_before_the_run_is_whole_takes_every_trajectory_once_and_ends_when_it_is_sealed(
    tmp_path, run, words, trainer_cli, monkeypatch
):
    monkeypatch.setattr(trainer.data.follow, "PART_POLL_SECONDS", 0.05)
    began = threading.Event()
    step = ContrastTrainer.training_step
    monkeypatch.setattr(ContrastTrainer, "training_step", lambda self, *words: began.set() or step(self, *words))
    writer = written(run, pause=0.1, wait_for=began)
    code, said, err = trainer_cli(*words, "--epochs", 1)
    writer.join()
    assert code == 0 and f"5 optimizer steps over {COUNT} trajectories with {kept_steps(run)} kept" in said, err
    assert "not complete" not in said
    lines = metrics(tmp_path / "out")
    assert sum(line["kept_steps"] for line in lines) == kept_steps(run) and lines[-1]["epoch"] == 1


def test_a_second_epoch_is_of_the_whole_run(tmp_path, run, words, trainer_cli, monkeypatch):
    monkeypatch.setattr(trainer.data.follow, "PART_POLL_SECONDS", 0.05)
    writer = written(run, pause=0.05)
    code, _, err = trainer_cli(*words, "--epochs", 2)
    writer.join()
    assert code == 0, err
    lines = metrics(tmp_path / "out")
    assert len(lines) == 10 and sum(line["kept_steps"] for line in lines) == 2 * kept_steps(run)


def test_a_writer_that_stalls_is_reported_the_wait_ends_and_resuming_takes_the_rest(
    tmp_path, run, words, trainer_cli, monkeypatch
):
    """The writer dies, and comes back writing some of what it had written again, and by a clock that is behind."""
    monkeypatch.setattr(trainer.data.follow, "PART_POLL_SECONDS", 0.05)
    monkeypatch.setattr(trainer.data.follow, "REPORT_SECONDS", 0.3)
    write(run, range(12), pause=0, seal=False)
    code, said, err = trainer_cli(*words, "--epochs", 1, "--follow-timeout", 1)
    assert code == 1 and f"{run} is not complete and has had no new part for 1 s" in err and "--resume" in err
    assert f"waiting for {run}: no new part for" in said and not (tmp_path / "out" / "adapter_config.json").exists()
    done = len(metrics(tmp_path / "out"))
    assert done == 2  # 12 trajectories are two batches of 5; the two that are left wait for company
    write(run, range(8, COUNT), pause=0)
    for kind in ("trajectories", "samples"):
        late = tmp_path / "run" / kind / f"{run.parts(kind)[-1]}.parquet"
        late.rename(late.with_name("part-0000000000000-behind.parquet"))
    code, said, err = trainer_cli(*words, "--epochs", 1, "--resume")
    assert code == 0 and "resuming after step 2" in said, err
    lines = metrics(tmp_path / "out")
    assert len(lines) == 5 and sum(line["kept_steps"] for line in lines) == kept_steps(run)


def test_ranks_follow_one_list(tmp_path, run, words):
    writer = written(run, pause=1.0)
    said = ranks(2, *words, "--epochs", 1)
    writer.join()
    assert said.returncode == 0, said.stderr[-3000:]
    lines = metrics(tmp_path / "out")
    assert len(lines) == 5 and sum(line["kept_steps"] for line in lines) == kept_steps(run)


def test_a_training_that_is_killed_while_it_follows_goes_on_with_what_it_had_not_read(tmp_path, run, words):
    write(run, range(12), pause=0, seal=False)
    process = started(*words, "--epochs", 1, "--save-steps", 1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "checkpoints" / "checkpoint-2" / "whole.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    write(run, range(12, COUNT), pause=0)
    process = started(*words, "--epochs", 1, "--resume")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming after step 2" in said, said
    lines = metrics(tmp_path / "out")
    assert len(lines) == 5 and sum(line["kept_steps"] for line in lines) == kept_steps(run)


def test_a_run_that_is_sealed_without_a_kept_step_is_refused(tmp_path, expert, words, trainer_cli):
    write_run(tmp_path / "bored", expert, beta=1e6)
    words[1] = tmp_path / "bored"
    code, _, err = trainer_cli(*words)
    assert code == 1 and "none of the 6 trajectories" in err


def test_a_full_pass_is_tried_before_any_trajectory_is_there(tmp_path, trainer_cli):
    """GPT-Neo's mask takes no more tokens than its context has: a full pass would fail in the first step."""
    shape = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    model = save_family(tmp_path / "model", "gpt_neo", **shape)
    words = "train", write_run(tmp_path / "run", model, 12), "--model", model, "--output", tmp_path / "out"
    code, said, err = trainer_cli(
        *words, "--follow", "--batch-size", 12, "--epochs", 1, "--targets", "q_proj,v_proj", "--token-budget", 119
    )
    assert code == 0 and "one trajectory a row, padded" in said, err


def test_drawing_from_the_whole_run_does_not_go_with_following_it(words, trainer_cli):
    code, _, err = trainer_cli(*words, "--preset", "paper")
    assert code == 1 and "--follow" in err and "--preset paper" in err
