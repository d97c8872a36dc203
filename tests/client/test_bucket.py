"""What a bucket in a local folder shows to those who read the folder itself."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from support.servers.real_server import ROOT

from client.storage.bucket import Bucket, BucketError

PUTTING = """
import sys
from client.storage.bucket import Bucket
bucket, data = Bucket(sys.argv[1]), bytes(2**28)
print("ready", flush=True)
getattr(bucket, sys.argv[2])("trajectories/part-1.parquet", data)
"""
KILLED_BEFORE_ITS_NAME = """
import os, signal, sys
import obstore
from client.storage.bucket import Bucket
obstore.rename = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
getattr(Bucket(sys.argv[1]), sys.argv[2])("trajectories/part-1.parquet", b"whole")
"""


def seen_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("how", ["put", "create"])
def test_a_put_that_is_killed_leaves_nothing_that_looks_like_a_part(tmp_path, how):
    parts = tmp_path / "trajectories"
    parts.mkdir()
    for _ in range(10):  # a put may be over before it is seen
        with subprocess.Popen(
            [sys.executable, "-c", PUTTING, tmp_path, how], cwd=ROOT, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout.readline() == b"ready\n"
            while not (left := seen_in(parts)) and writer.poll() is None:
                time.sleep(0.001)
            writer.kill()
        if seen_in(parts) != ["part-1.parquet"] or (parts / "part-1.parquet").stat().st_size < 2**28:
            break
        (parts / "part-1.parquet").unlink()
    left = seen_in(parts)
    assert left and all(name.startswith(".") for name in left)
    assert list(Bucket(str(tmp_path)).names("")) == []
    for name in left:
        (parts / name).unlink()


@pytest.mark.parametrize("how", ["put", "create"])
def test_what_was_written_but_not_yet_named_is_no_part(tmp_path, how):
    done = subprocess.run([sys.executable, "-c", KILLED_BEFORE_ITS_NAME, tmp_path, how], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    (left,) = seen_in(tmp_path / "trajectories")
    assert left.startswith(".")
    assert list(Bucket(str(tmp_path)).names("")) == []


def test_hidden_objects_of_others_are_objects(tmp_path):
    bucket = Bucket(str(tmp_path))
    bucket.put("evaluation/.base.json", b"{}")
    assert list(bucket.names("evaluation")) == ["evaluation/.base.json"]


def test_of_many_who_create_an_object_one_does_and_nothing_else_is_left(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: Bucket(str(tmp_path)).create("jobs/owner", b"%d" % number), range(64)))
    assert made.count(True) == 1
    assert (tmp_path / "jobs" / "owner").read_bytes() == b"%d" % made.index(True)
    assert seen_in(tmp_path / "jobs") == ["owner"]


@pytest.mark.parametrize("how", ["put", "create"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, how):
    bucket = Bucket(str(tmp_path))
    bucket.put("a", b"before")

    def full(_store, hidden, *_, **__):
        raise obstore.exceptions.GenericError(f"cannot copy {tmp_path}/{hidden}#1: No space left (os error 28)")

    monkeypatch.setattr(obstore, "rename", full)
    with pytest.raises(BucketError) as found:
        getattr(bucket, how)("a", b"after")
    assert found.value.may_pass
    assert str(found.value) == f"cannot write a in {tmp_path}: cannot copy {tmp_path}/a: No space left (os error 28)"
    assert bucket.get("a") == b"before" and seen_in(tmp_path) == ["a"]


def test_a_folder_that_may_not_be_written_is_named_with_the_object_and_what_to_look_at(tmp_path, monkeypatch):
    """The refusal is made up: those who run tests are often root, whom no folder refuses."""

    def refused(_store, hidden, *_, **__):
        raise obstore.exceptions.PermissionDeniedError(f"{tmp_path}/{hidden}#1: Permission denied (os error 13)")

    monkeypatch.setattr(obstore, "put", refused)
    with pytest.raises(BucketError) as found:
        Bucket(str(tmp_path)).put(r"a\1", b"data")
    assert not found.value.may_pass
    assert str(found.value) == (
        rf"cannot write a\1 in {tmp_path}: {tmp_path}/a\1: Permission denied (os error 13)"
        "; check who may read and write that folder"
    )


def test_an_odd_name_or_a_link_in_a_circle_hides_no_other_file(tmp_path):
    bucket = Bucket(str(tmp_path))
    bucket.put("jobs/x/job.json", b"{}")
    for name in (b"a\xff", b"a\nb", b"\x1b[31m"):
        Path(os.fsdecode(bytes(tmp_path) + b"/jobs/x/" + name)).touch()
        Path(os.fsdecode(bytes(tmp_path) + b"/jobs/" + name)).mkdir()
    (tmp_path / "jobs/circle").symlink_to("circle")
    (tmp_path / "jobs/nothing").symlink_to("nowhere")
    (tmp_path / "jobs/x/up").symlink_to("..")
    os.mkfifo(tmp_path / "jobs/pipe")
    (tmp_path / "jobs/other").symlink_to("x")
    assert (
        bucket.folders("jobs") == ["other", "x"] and bucket.folders("none") == bucket.folders("jobs/x/job.json") == []
    )
    assert {"jobs/x/job.json", "jobs/other/job.json"} <= set(bucket.names("jobs"))
    assert set(bucket.names("jobs/x")) >= {"jobs/x/job.json"} and not list(bucket.names("jobs/none"))
