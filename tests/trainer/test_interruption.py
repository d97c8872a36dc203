"""What is told to stop says how to go on, a training with a checkpoint; two trainings never share an OUT."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from support.models.tiny_pair import manifest_for, trajectory, write_run
from support.processes.forked import PATH, fork
from support.servers.real_store import KEYS
from support.training.launch import ENVIRONMENT, metrics, ranks, started

from client.errors import ModelError
from client.runs.run import Run
from client.storage.bucket import Bucket
from trainer.interruption import Interrupted, ended_by_signals
from trainer.training.checkpoints import Output
from trainer.training.loop import ContrastTrainer

STEPS = 400
"""Far more than are done before a signal comes."""


def test_a_signal_that_falls_into_a_del_ends_the_work_too():
    """Python discards what is raised there."""

    class Told:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # so that the handler runs in here

    with pytest.raises(Interrupted, match="go on") as ended, ended_by_signals(lambda: "go on"):
        Told()
        for _ in range(50):
            time.sleep(0.1)
    assert ended.value.exit_code == 128 + signal.SIGTERM


@pytest.fixture
def run(tmp_path, expert):
    return write_run(tmp_path / "run", expert, trajectories=[trajectory(f"p{seed}", seed) for seed in range(8)])


@pytest.fixture
def words(tmp_path, run, expert):
    return ["train", run, "--model", expert, "--output", tmp_path / "out", "--max-steps", STEPS, "--batch-size", 2,
            "--save-steps", 1000]  # fmt: skip


def wait_for_steps(process, out, steps=3, seconds=120):
    deadline = time.monotonic() + seconds
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def checkpoint_of(out):
    (number,) = [int(folder.name.rpartition("-")[2]) for folder in (out / "checkpoints").iterdir()]
    assert (out / "checkpoints" / f"checkpoint-{number}" / "whole.json").is_file()
    return number


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_says_how_to_go_on_and_exits_as_shells_expect(
    tmp_path, words, trainer_cli, number, code
):
    out = tmp_path / "out"
    process = started(*words)
    wait_for_steps(process, out)
    process.send_signal(number)
    time.sleep(0.02)
    process.send_signal(number)  # the same one, which the terminal sends and who waits for the training passes on
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    done = checkpoint_of(out)
    assert 3 <= done < STEPS and len(metrics(out)) == done
    assert f"stopped after optimizer step {done} of {STEPS}: to continue, repeat the command with --resume" in said
    assert "Traceback" not in said and not (out / "adapter_config.json").exists()
    assert not (out / ".lock").exists()
    checkpoint, model = out / "checkpoints" / f"checkpoint-{done}", words[words.index("--model") + 1]
    failed, _, err = trainer_cli("merge", model, out, tmp_path / "merged")
    assert failed == 1 and f"repeat its command with --resume, or give a checkpoint, as {checkpoint}" in err
    merged, said, err = trainer_cli("merge", model, checkpoint, tmp_path / "merged")
    assert merged == 0 and "the adapter changes its layers' weights by" in said, err
    again = [*words]
    again[again.index("--max-steps") + 1] = done + 2
    code, said, err = trainer_cli(*again, "--resume")
    assert code == 0 and f"resuming after step {done}" in said, err
    assert [line["step"] for line in metrics(out)] == list(range(1, done + 3))


@pytest.mark.parametrize("place", ["check_training", "load", "finish"])
def test_so_does_a_signal_before_the_first_step_and_behind_the_last(tmp_path, words, trainer_cli, monkeypatch, place):
    def told(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    words[words.index("--max-steps") + 1] = 2
    with monkeypatch.context() as patch:
        patch.setattr(f"trainer.{'cli' if place == 'check_training' else 'training'}.train.{place}", told)
        code, _, err = trainer_cli(*words)
    assert code == 143 and err.splitlines()[-1] == "stopped: to continue, repeat the command with --resume"
    assert "Traceback" not in err and not (tmp_path / "out" / ".lock").exists()
    code, said, err = trainer_cli(*words, "--resume")
    assert code == 0 and "adapter in" in said, err


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_an_ablation_that_is_stopped_stops_its_training_which_the_same_command_goes_on_with(
    tmp_path, run, expert, trainer_cli, number
):
    benchmark, out = tmp_path / "digits.jsonl", tmp_path / "tables"
    benchmark.write_text('{"question": "How many ?", "answer": "1"}\n')
    adapter, light = out / "adapters" / "full-0", ("--batch-size", 2)
    command = ("ablation", run, "--model", expert, "--output", out, "--benchmark", f"digits={benchmark}", "--",
               "--max-steps", 20000, *light)  # fmt: skip
    process = fork("trainer", *command, environment=ENVIRONMENT, one_stream=True, session=True)
    wait_for_steps(process, adapter)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "full, seed 0: stopped; the same command resumes" in said and "Traceback" not in said
    done = checkpoint_of(adapter)
    assert not (adapter / ".lock").exists()
    words = ("train", run, "--model", expert, "--output", adapter, "--seed", 0, "--resume", "--max-steps", done + 1)
    code, said, err = trainer_cli(*words, *light)
    assert code == 0 and f"resuming after step {done}\n" in said, err


def test_a_second_signal_ends_an_evaluation_that_waits_for_a_store(tmp_path, expert):
    (tmp_path / "b.jsonl").write_text('{"question": "How many ?", "answer": "1"}\n')
    with socket.create_server(("127.0.0.1", 0)) as mute:  # a store that says nothing
        store = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{mute.getsockname()[1]}"}
        benchmark = f"b={tmp_path / 'b.jsonl'}"
        process = started("evaluate", expert, "--benchmark", benchmark, "--run", "s3://bucket/run", **store)
        mute.settimeout(60)
        mute.accept()
        process.terminate()
        time.sleep(0.7)
        assert process.poll() is None  # no handler in Python runs
        process.terminate()
        said, _ = process.communicate(timeout=25)
    assert process.returncode == 143 and "stopped; no output is kept" in said and "Traceback" not in said


def test_ranks_stop_together(tmp_path, words):
    """Only the second of two is told: both end after the same step."""
    said = ranks(2, *words, function="support.training.told:main")
    assert said.returncode == 143, said.stderr[-3000:]
    done = checkpoint_of(tmp_path / "out")
    assert done == len(metrics(tmp_path / "out")) < STEPS
    assert f"stopped after optimizer step {done} of {STEPS}" in said.stderr


def test_a_training_that_waits_for_parts_stops_at_once(tmp_path, expert):
    manifest = manifest_for(expert)
    manifest = manifest.model_copy(update={"problems": manifest.problems.model_copy(update={"count": 24})})
    run = Run(str(tmp_path / "run"))
    run.claim(manifest, (expert / "tokenizer.json").read_bytes())
    run.write([trajectory(f"p{name}", name) for name in range(6)], {}, manifest)
    out = tmp_path / "out"
    process = started("train", run, "--model", expert, "--output", out, "--follow", "--batch-size", 2)
    wait_for_steps(process, out)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "stopped after optimizer step 3 of" in said, said
    assert checkpoint_of(out) == 3


def test_a_second_training_in_one_folder_is_refused_and_a_dead_one_holds_nothing(tmp_path, words, trainer_cli):
    out = tmp_path / "out"
    process = started(*words, "--save-steps", 2)
    wait_for_steps(process, out)
    for more in ((), ("--resume",)):
        code, _, err = trainer_cli(*words, *more)
        assert code == 1 and f"a training writes to {out} (process {process.pid} on " in err, err
    process.kill()
    process.wait()
    again = [*words]
    again[again.index("--max-steps") + 1] = len(metrics(out)) + 1
    code, _, err = trainer_cli(*again, "--resume")
    assert code == 0, err


def test_in_a_bucket_the_later_training_owns_out_and_the_earlier_one_ends(s3, tmp_path):
    url = f"{s3}/owned-{time.time_ns()}"
    first, second = Output(url), Output(url)
    first.claim()
    first.check_owned()
    second.claim()  # what stands there of an owner is no adapter
    with pytest.raises(ModelError, match="another training began to write to"):
        first.check_owned()
    second.check_owned()
    first.close()
    second.close()
    assert set(Bucket(url).names("")) == {"owners/1", "owners/2"}


def test_out_of_memory_names_what_takes_less(tmp_path, run, expert, trainer_cli, monkeypatch):
    """No GPU is here to fill: the error is torch's own, raised in its place."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ContrastTrainer, "training_step", full)
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out")
    assert code == 1 and "error: out of memory in step 1: CUDA out of memory. Tried to allocate 20.00 GiB" in err
    assert "--token-budget" in err and "--gradient-checkpointing" in err


def test_memory_that_this_machine_does_not_have_is_told_so_too(tmp_path, run, expert, trainer_cli, monkeypatch):
    def full(*_):
        torch.empty(2**46)

    monkeypatch.setattr(ContrastTrainer, "training_step", full)
    code, _, err = trainer_cli("train", run, "--model", expert, "--output", tmp_path / "out")
    assert code == 1 and "error: out of memory in step 1: " in err and "Traceback" not in err


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("session", [False, True])
def test_the_public_command_is_stopped_as_it_imports_as_vllm_starts_and_as_it_asks(tmp_path, expert, session):
    """`session`: the signal comes to every process of the command, as from a terminal."""
    rows = [{"question": f"Ann has {a} + {b} apples How many ?", "answer": str(a)} for a in range(10) for b in range(9)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "trainer", "evaluate", expert, "--benchmark",
             f"b={tmp_path / 'b.jsonl'}", "-o", tmp_path / "r.json", "--system-prompt", "The answer is"]  # fmt: skip
    records, counts = tmp_path / "r.jsonl", [0]

    def stopped_when(reached, number):
        with (tmp_path / "said").open("w+") as said:
            process = subprocess.Popen([*map(str, words)], stdout=said, stderr=said, env=os.environ | PATH,
                                       start_new_session=True)  # fmt: skip
            deadline = time.monotonic() + 200
            while not reached((tmp_path / "said").read_text()) and time.monotonic() < deadline:
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.01)
            (os.killpg if session else os.kill)(process.pid, number)
            assert process.wait(60) == 128 + number
        told = " ".join((tmp_path / "said").read_text().split())
        assert "Traceback" not in told
        counts.append(len(records.read_text().splitlines()) - 1 if records.exists() else 0)
        said = f"stopped: {counts[-1]} outputs are in {records}" if counts[-1] else "stopped before the first output"
        assert f"{said}; the same command resumes" in told
        assert counts[-1] >= counts[-2]

    began = time.monotonic()
    stopped_when(lambda _: time.monotonic() > began + 2, signal.SIGTERM)
    stopped_when(lambda said: "starting vLLM for 90 outputs" in said, signal.SIGINT)
    stopped_when(lambda _: records.read_text().count("\n") > 3, signal.SIGTERM)
    assert 3 <= counts[-1] < 90
    said = subprocess.run([*map(str, words)], env=os.environ | PATH, capture_output=True, text=True, timeout=200)
    assert said.returncode == 0 and f"resuming: {counts[-1]} of 90 outputs of b are there" in said.stdout, said.stderr
    keys = [tuple(json.loads(line).get(name) for name in ("model", "number")) for line in records.open()][1:]
    assert len(keys) == len(set(keys)) == 90
