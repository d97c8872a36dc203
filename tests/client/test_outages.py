"""A store that is out at any moment of a run, and one that refuses for good: nothing that was sampled is lost."""

import asyncio
import time

import pytest
from support.runs.sampled import PROBLEMS
from support.servers.contract_server import ContractServer

import client.sampling.writer
from client.problems.problem_set import ProblemSet
from client.protocol.requests import ContrastSettings, SamplingSettings
from client.runs.run import Run
from client.sampling.sampler import sample_problems
from client.servers.client import SamplingClient
from client.storage.bucket import Bucket, BucketError

ASKED = ProblemSet.of(PROBLEMS[:40])


class Heard:
    """What a run says."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def update(self, counts):
        pass


def sample(server, run, patience=20.0, **options):
    heard = Heard()

    async def go():
        async with SamplingClient(server.url) as connection:
            return await sample_problems(
                ASKED, Run(str(run)), connection, sampling=SamplingSettings(), contrast=ContrastSettings(),
                progress=heard, patience=patience, **options,
            )  # fmt: skip

    return asyncio.run(go()), heard.said


@pytest.fixture
def server():
    with ContractServer().running() as server:
        yield server


@pytest.mark.parametrize("name", ["run.json", "complete.json", "tokenizer.json", "trajectories", "samples"])
@pytest.mark.parametrize("method", ["get", "create", "put", "names"])
def test_a_store_that_is_out_for_a_while_is_waited_for_at_every_step(server, tmp_path, monkeypatch, method, name):
    monkeypatch.setattr(client.sampling.writer, "STORE_PAUSE_SECONDS", 0.01)
    real, left = getattr(Bucket, method), [3]

    def out(self, at, *arguments, **options):
        if at.startswith(name) and left[0]:
            left[0] -= 1
            raise BucketError(f"cannot {method} {at}: out", may_pass=True)
        return real(self, at, *arguments, **options)

    monkeypatch.setattr(Bucket, method, out)
    sampled, said = sample(server, tmp_path / "run")
    assert sampled.totals.trajectories == 40
    if not left[0]:  # not every method is called with every name
        assert [text.endswith("trying again") for text in said] == [True, False] and "written again" in said[1]
    else:
        assert left == [3]


def test_a_store_that_stays_out_ends_the_run_after_its_patience(server, tmp_path, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "STORE_PAUSE_SECONDS", 0.05)

    def out(*_):
        raise BucketError("out for good", may_pass=True)

    monkeypatch.setattr(Bucket, "get", out)
    with pytest.raises(BucketError, match="out for good"):
        sample(server, tmp_path / "run", patience=0.3)


def test_what_a_store_refuses_for_good_is_kept_here_and_taken_up_by_the_same_call(server, tmp_path, monkeypatch):
    run, base = tmp_path / "run", tmp_path / "state"
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 8)
    put, parts = Bucket.put, []

    def forbidden(self, name, data):
        if self.url == str(run) and name.startswith("trajectories/"):
            parts.append(name)
            if len(parts) > 2:
                raise BucketError("cannot write: 403")
        put(self, name, data)

    with monkeypatch.context() as changed:
        changed.setattr(Bucket, "put", forbidden)
        with pytest.raises(BucketError, match=rf"403\. \d+ trajectories could not be written and are kept in {base}"):
            sample(server, run, spool_base=base)
    there = len(Run(str(run)).keys())
    (spool,) = base.iterdir()
    kept = len(Run(str(spool)).keys())
    assert there == 16 and 0 < kept <= 24
    server.asked.clear()
    sampled, said = sample(server, run, spool_base=base)
    assert sampled.totals.trajectories == 40 and sum(map(len, server.asked)) == 24 - kept
    assert f"{run} has {kept} trajectories more, which {spool} had kept for it" in said
    assert not list(base.iterdir())
    assert sum(len(Run(str(run)).samples_of(part)) for part in Run(str(run)).parts("samples")) == 40


def test_lines_that_still_waited_when_a_part_was_refused_are_kept_too(server, tmp_path, monkeypatch):
    run, base, sent = tmp_path / "run", tmp_path / "state", []
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 8)
    monkeypatch.setattr(client.sampling.writer, "PARTS_AT_A_TIME", 1)
    put = Bucket.put

    async def note():
        sent.append(1)

    server.after_lines = note

    def forbidden(self, name, data):
        if self.url != str(run):
            return put(self, name, data)
        for _ in range(200):  # until the client has all lines: eight refused here, some more in the writer
            time.sleep(0.1 if len(sent) < 3 else 0.005)
        raise BucketError("cannot write: 403")

    with monkeypatch.context() as changed:
        changed.setattr(Bucket, "put", forbidden)
        with pytest.raises(BucketError, match=rf"40 trajectories could not be written and are kept in {base}"):
            sample(server, run, spool_base=base)
    server.asked.clear()
    assert sample(server, run, spool_base=base)[0].totals.trajectories == 40 and not server.asked


def test_another_run_and_other_settings_take_nothing_up(server, tmp_path, monkeypatch):
    base = tmp_path / "state"

    def forbidden(self, name, data):
        raise BucketError("cannot write: 403")

    put = Bucket.put
    with monkeypatch.context() as changed:
        refused = str(tmp_path / "a")
        changed.setattr(Bucket, "put", lambda self, *given: (forbidden if self.url == refused else put)(self, *given))
        with pytest.raises(BucketError, match="are kept in"):
            sample(server, tmp_path / "a", spool_base=base)
        with pytest.raises(BucketError, match="40 trajectories could not be written and are lost"):
            sample(server, tmp_path / "a")
    sample(server, tmp_path / "b", spool_base=base)
    assert len(list(base.iterdir())) == 1 and len(Run(str(tmp_path / "b")).parts("trajectories")) == 1
