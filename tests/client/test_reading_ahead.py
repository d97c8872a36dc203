"""Parts of a remote RUN are read side by side, in few requests each; errors and early ends leave nothing behind."""

import subprocess
import sys
import threading
import time

import obstore
import pytest
from support.runs.reported import make_run, trajectories_of
from support.servers.real_server import ROOT

import client.runs.parts
from client.errors import RunError
from client.protocol.requests import ContrastSettings
from client.runs.build import build_run
from client.runs.run import Run
from client.storage.ahead import read_ahead
from client.storage.bucket import Bucket

READS = ("get", "get_range", "open_reader", "list", "list_with_delimiter", "head")


@pytest.fixture
def asked(monkeypatch):
    """The store's reads, each with how many were on their way at the time."""
    seen, now, lock = [], [0], threading.Lock()

    def slow(name, real):
        def read(*arguments, **options):
            with lock:
                now[0] += 1
                seen.append((name, now[0]))
            time.sleep(0.02)
            try:
                return real(*arguments, **options)
            finally:
                with lock:
                    now[0] -= 1

        return read

    for name in READS:
        monkeypatch.setattr(obstore, name, slow(name, getattr(obstore, name)))
    return seen


@pytest.fixture
def run(s3, tmp_path):
    """Twelve parts in a bucket."""
    return make_run(f"{s3}/{tmp_path.name}", trajectories_of(48))


@pytest.mark.parametrize("end", [2**16, 100])
def test_keys_take_a_request_or_two_a_part_and_parts_are_asked_side_by_side(run, asked, monkeypatch, end):
    monkeypatch.setattr(client.runs.parts, "COLUMN_RANGE_BYTES", end)
    assert len(run.keys()) == 48
    if end == 2**16:
        assert len(asked) == 12 + 1
    assert max(at_a_time for _, at_a_time in asked) > 4
    assert run.questions({("p0", 0)}) == {}


@pytest.mark.parametrize("read", [Run.trajectories, Run.samples, lambda run: run.tally(run.manifest()).keys])
def test_whole_parts_are_on_their_way_while_one_is_used(run, asked, read):
    assert len(list(read(run))) == 48
    assert 12 <= len(asked) <= 12 + 2 and 1 < max(at_a_time for _, at_a_time in asked) <= 5


def test_a_run_is_built_part_by_part_side_by_side(run, asked, tmp_path):
    built = build_run(run, Run(f"{run}-built"), ContrastSettings(beta=0.1, select="kl"))
    assert built.totals.trajectories == 48 and max(at_a_time for _, at_a_time in asked) > 1
    assert list(Run(f"{run}-built").parts("samples")) == run.parts("trajectories")


def test_what_is_read_ahead_comes_in_order_and_ends_with_its_reader(run):
    def read(number):
        time.sleep(0.01 * (number % 3))
        if number == 7:
            raise ValueError("seven")
        return number

    found = read_ahead(range(100), read, 4)
    assert [next(found) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(found)
    before = threading.active_count()
    samples = run.samples()
    next(samples)
    samples.close()
    assert threading.active_count() <= before + 1


def test_a_damaged_part_among_many_is_named(run):
    Bucket(str(run)).put(f"trajectories/{run.parts('trajectories')[5]}.parquet", b"PAR1 no more PAR1")
    for read in (run.keys, lambda: list(run.trajectories())):
        with pytest.raises(RunError, match=run.parts("trajectories")[5]):
            read()


READ_ALL = """
import os, sys
from client.runs.run import Run
run = Run(sys.argv[1])
run.bucket.get("run.json")  # starts the store's threads
def threads():  # but for the store's, which start when they like
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("tokio" not in name for name in names)
before = threads()
assert len(list(run.trajectories())) == len(list(run.samples())) == len(run.keys()) == 12
print(threads() - before)
"""


def test_reading_starts_no_thread_of_arrow_that_could_outlive_the_interpreter(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(12))
    assert subprocess.check_output([sys.executable, "-c", READ_ALL, str(run)], cwd=ROOT, text=True).strip() == "0"
