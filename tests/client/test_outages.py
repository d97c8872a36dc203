"""A store that is out at any moment of a run, and one that refuses for good: nothing that was sampled is lost."""

import asyncio
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.runs.made_run import make_manifest, make_trajectory
from support.runs.sampled import PROBLEMS
from support.servers.contract_server import ContractServer

import client.sampling.writer
from client.cli.options import SamplingOptions
from client.cli.sample import read_patiently
from client.problems.problem_set import ProblemSet
from client.protocol.requests import ContrastSettings, SamplingSettings
from client.runs.run import Run
from client.sampling.sampler import sample_problems
from client.sampling.spool import Spool
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


def test_a_problem_set_in_a_store_that_is_out_is_waited_for_as_long(monkeypatch, capsys):
    monkeypatch.setattr(client.sampling.writer, "STORE_PAUSE_SECONDS", 0.01)
    left = [3]

    def out(self, *_):
        left[0] -= 1
        if left[0] >= 0:
            raise BucketError("cannot read: out", may_pass=True)
        return io.BytesIO(b'{"question": "?"}')

    monkeypatch.setattr(Bucket, "open", out)
    assert len(read_patiently("http://store/set.jsonl", SamplingOptions(), 20.0)) == 1
    assert capsys.readouterr().err == "cannot read: out; trying again\n"
    left[0] = 1000
    with pytest.raises(BucketError, match="cannot read: out"):
        read_patiently("http://store/set.jsonl", SamplingOptions(), 0.05)


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


def test_what_waits_after_refusals_is_written_in_parts_that_can_be_read(server, tmp_path, monkeypatch):
    """Refused parts come back: written as one, they might be more than a reader takes."""
    run, base, sizes = tmp_path / "run", tmp_path / "state", []
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 8)
    put, write = Bucket.put, Run.write

    def forbidden(self, name, data):
        if self.url == str(run) and name.startswith("trajectories/"):
            raise BucketError("cannot write: 403")
        put(self, name, data)

    def noted(self, trajectories, *arguments, **options):
        sizes.append(len(trajectories))
        return write(self, trajectories, *arguments, **options)

    with monkeypatch.context() as changed:
        changed.setattr(Bucket, "put", forbidden)
        changed.setattr(Run, "write", noted)
        with pytest.raises(BucketError, match="are kept in"):
            sample(server, run, spool_base=base)
    assert max(sizes) == 8 and sum(sizes) >= 24
    assert sample(server, run, spool_base=base)[0].totals.trajectories == 40


def spools(tmp_path, count):
    manifest, run = make_manifest(beta=0.5), Run(str(tmp_path / "run"))
    run.claim(manifest, b"{}")
    return run, [Spool(tmp_path / "state", Run(str(run)), manifest) for _ in range(count)]


def kept_line(spool, name):
    spool.keep([[make_trajectory(name, 1, 20)]], {name: None}, [])


def test_two_that_take_up_one_spool_at_a_time_both_go_on(tmp_path):
    run, found = spools(tmp_path, 4)
    for index in range(6):
        kept_line(found[0], str(index))
    barrier = threading.Barrier(4)

    def take_up(spool):
        barrier.wait()
        return spool.take_up()

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(take_up, found)) == [0, 0, 0, 6]
    assert len(run.keys()) == 6 and not list((tmp_path / "state").iterdir())


def test_what_is_kept_while_another_takes_up_stays_kept(tmp_path, monkeypatch):
    run, (first, second) = spools(tmp_path, 2)
    kept_line(first, "old")
    adopt, later = Run.adopt, []

    def slow(self, *arguments, **options):
        later.append(threading.Thread(target=kept_line, args=(second, "new")))
        later[0].start()
        time.sleep(0.2)
        return adopt(self, *arguments, **options)

    with monkeypatch.context() as changed:
        changed.setattr(Run, "adopt", slow)
        assert first.take_up() == 1
    later[0].join()
    assert {problem for problem, _ in iter(run.keys())} == {"old"}
    assert second.take_up() == 1 and {problem for problem, _ in iter(run.keys())} == {"old", "new"}
