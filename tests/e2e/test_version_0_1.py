"""What version 0.1.0 wrote is read, resumed and finished: a sealed RUN, a job that ended, one whose server was killed.

`version-0.1/` holds them as that version left them, with the demo pair: `run` (5 problems, twice each, and one that
failed), and a bucket with two jobs. Of the second, `runs/second`, two parts of trajectories have no samples yet.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.servers.job_calls import ended, owners, read_by_others
from support.servers.real_server import DEMO, command
from support.servers.restarting import LEASE_SECONDS

from client import Run, read_samples, read_trajectories
from client.errors import RunError
from server.jobs.store import JobStore

WRITTEN = Path(__file__).parent / "version-0.1"
COMPLETED, KILLED = "job-1795611075630-a13f113c", "job-1795611142242-643b09de"
CUT_SHORT = 40
"""Problems of the job whose server was killed."""


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(WRITTEN / "run", tmp_path / "run")


@pytest.fixture
def jobs(tmp_path):
    return shutil.copytree(WRITTEN / "bucket", tmp_path / "bucket")


def totals(run):
    """complete.json without the time at which it was written."""
    body = json.loads((run / "complete.json").read_text())
    return {name: value for name, value in body.items() if name != "sealed_at"}


def test_a_run_is_read_as_it_was_sealed(run):
    trajectories, samples = list(read_trajectories(str(run))), list(read_samples(str(run)))
    said = totals(run)
    assert Counter(trajectory.sample_index for trajectory in trajectories) == {0: 5, 1: 5}
    assert sum(len(trajectory.token_ids) for trajectory in trajectories) == said["tokens"] == 233
    assert [sample.problem_id for sample in samples] == [trajectory.problem_id for trajectory in trajectories]
    assert sum(len(sample.contrast.steps) for sample in samples) == said["kept"] == 16
    assert set(Run(str(run)).failures()) == {("too-long", 0), ("too-long", 1)}


def test_its_samples_are_made_again_byte_for_byte(run):
    before = {file.name: file.read_bytes() for file in (run / "samples").iterdir()}
    shutil.rmtree(run / "samples")
    opened = Run(str(run))
    assert opened.mend(opened.manifest()) == len(before) == 1
    assert {file.name: file.read_bytes() for file in (run / "samples").iterdir()} == before


def test_building_it_again_with_its_own_settings_gives_the_same_run(run, tmp_path):
    said = command("client", "build", run, tmp_path / "again")
    assert said.returncode == 0, said.stderr
    before = totals(run)
    assert {name: value for name, value in totals(tmp_path / "again").items() if name in before} == before


def test_sampling_into_a_sealed_run_has_nothing_to_do(run):
    words = ("--max-tokens", 32, "--top-k", 20, "--n", 2, "--temperature", 0.7, "--seed", 3)
    words += ("--server", "http://127.0.0.1:9")  # which nobody asks
    said = command("client", "sample", WRITTEN / "problems.jsonl", run, *words)
    assert said.returncode == 0 and "nothing to do" in said.stdout, said.stderr
    said = command("client", "sample", WRITTEN / "problems.jsonl", run, *words, "--alpha", "0.3")
    assert said.returncode != 0 and "alpha: 0.2 against 0.3" in said.stderr


def test_it_is_reported_and_compared(run, tmp_path):
    said = command("client", "report", run, "-o", tmp_path / "report.html")
    assert said.returncode == 0, said.stderr
    assert '<dd>16</dd><dd class="of">7.2% of 223</dd>' in (tmp_path / "report.html").read_text()
    assert command("client", "build", run, tmp_path / "lower", "--beta", "0.01").returncode == 0
    said = command("client", "compare", run, tmp_path / "lower", "--json")
    assert said.returncode == 0, said.stderr
    first, lower = json.loads(said.stdout)["runs"]
    assert first["kept"] == 16 < lower["kept"]


def test_the_trainer_takes_it_for_its_own_expert_alone(run):
    from trainer.adapters.model_folder import ModelFolder
    from trainer.data.dataset import check_expert

    check_expert(Run(str(run)), ModelFolder(DEMO / "expert"))
    with pytest.raises(RunError, match=r"weights d9fcd98e21ab in run\.json"):
        check_expert(Run(str(run)), ModelFolder(DEMO / "amateur"))


def test_its_jobs_are_told_with_their_states(jobs):
    store = JobStore(str(jobs))
    done, cut = store.job(COMPLETED), store.job(KILLED)
    assert (done.status, done.request_counts.completed, done.run) == ("completed", 6, str(jobs / "runs" / "first"))
    assert (cut.status, cut.request_counts.total) == ("validating", CUT_SHORT)
    assert store.unfinished() == [KILLED]


def test_a_server_of_today_finishes_the_job_that_was_killed(service, service_bucket, tmp_path):
    """As it was left, but that its dead owner's lease is as short as the service's: 2 s instead of 30."""
    left, folder = WRITTEN / "bucket" / "jobs" / KILLED, service_bucket / "jobs" / KILLED
    run = Run(str(shutil.copytree(WRITTEN / "bucket" / "runs" / "second", service_bucket / "runs" / "second")))
    had = run.keys()
    assert 0 < len(had) < CUT_SHORT
    shutil.copytree(left, folder, ignore=shutil.ignore_patterns("job.json"))
    heartbeat = json.loads((folder / "beat-1").read_bytes())
    (folder / "beat-1").write_text(json.dumps({**heartbeat, "lease_seconds": LEASE_SECONDS}))
    shutil.copy(left / "job.json", folder)  # last, as a server writes it: now there is a job

    done = ended(service, KILLED)
    assert done["status"] == "completed", done
    assert done["request_counts"] == {"total": CUT_SHORT, "completed": CUT_SHORT, "failed": 0}
    assert owners(service_bucket, KILLED) == ["owner-1", "owner-2"]
    problems = [json.loads(line) for line in (left / "problems.jsonl").read_text().splitlines()]
    found = read_by_others(run, problems, tmp_path)
    assert f"{CUT_SHORT} problems once" in found and "0 rows written twice" in found  # nothing was done again
    assert len(list(run.samples())) == CUT_SHORT
