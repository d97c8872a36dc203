"""What a bucket in a local folder shows to those who read the folder itself."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
from real_server import ROOT

from client.bucket import Bucket, BucketError

PUTTING = """
import sys
from client.bucket import Bucket
bucket, data = Bucket(sys.argv[1]), bytes(2**28)
print("ready", flush=True)
getattr(bucket, sys.argv[2])("trajectories/part-1.parquet", data)
"""


def seen_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("how", ["put", "create"])
def test_a_put_that_is_killed_leaves_nothing_that_looks_like_a_part(tmp_path, how):
    parts = tmp_path / "trajectories"
    parts.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", PUTTING, tmp_path, how], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 30
    while not seen_in(parts):
        assert time.monotonic() < deadline
    writer.kill()
    writer.wait()
    left = seen_in(parts)
    assert left and all(name.startswith(".") for name in left)
    assert list(Bucket(str(tmp_path)).names("")) == []


def test_of_many_who_create_an_object_one_does_and_nothing_else_is_left(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: Bucket(str(tmp_path)).create("jobs/owner", b"%d" % number), range(64)))
    assert made.count(True) == 1
    assert (tmp_path / "jobs" / "owner").read_bytes() == b"%d" % made.index(True)
    assert seen_in(tmp_path / "jobs") == ["owner"]


def test_a_put_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    bucket = Bucket(str(tmp_path))
    bucket.put("a", b"before")

    def full(*_, **__):
        raise obstore.exceptions.GenericError("No space left on device (os error 28)")

    monkeypatch.setattr(obstore, "rename", full)
    with pytest.raises(BucketError, match="cannot write a in ") as found:
        bucket.put("a", b"after")
    assert found.value.may_pass
    assert bucket.get("a") == b"before" and seen_in(tmp_path) == ["a"]
