"""Exclusive create where a store lacks it: one that ignores If-None-Match, folders without hard links; odd URLs."""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import obstore
import pytest
from obstore.exceptions import GenericError
from support.runs.made_run import make_manifest, tokenizer_json

import client.storage.bucket
import client.storage.claims
from client.runs.run import Run
from client.storage.bucket import Bucket, BucketError
from client.storage.claims import claim_name


@pytest.fixture
def old_store(monkeypatch):
    """An S3 store that ignores If-None-Match, as older MinIO and Ceph do; the requests that it got."""
    objects, asked = {}, []

    class Store(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, body=b""):
            asked.append((self.command, self.path))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("etag", '"1"')
            self.send_header("last-modified", "Tue, 15 Nov 1994 08:12:31 GMT")
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self):
            objects[self.path] = self.rfile.read(int(self.headers["content-length"]))
            self.answer(200)

        def do_GET(self):
            self.answer(*((200, objects[self.path]) if self.path in objects else (404,)))

        def do_POST(self):
            """Deletes, as S3 has it, several at once."""
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            names = re.findall("<Key>([^<]*)</Key>", body)
            for name in names:
                objects.pop(f"/old/{name}")
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "REGION": "us-east-1",
        "ENDPOINT_URL": url,
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(client.storage.bucket, "PROBED", set())
    yield url, objects, asked
    server.shutdown()


def test_a_store_that_ignores_if_none_match_is_noticed_before_the_first_claim(old_store):
    url, objects, _ = old_store
    with pytest.raises(
        BucketError, match=rf"the store of s3://old/run \({url}/?\) ignores If-None-Match.* MinIO and Ceph"
    ):
        Run("s3://old/run").claim(make_manifest(), tokenizer_json())
    assert objects == {}


def test_a_store_is_probed_once_for_all_claims_and_never_for_reading(s3, monkeypatch):
    monkeypatch.setattr(client.storage.bucket, "PROBED", set())
    probed, check = [], client.storage.bucket.check_exclusive
    monkeypatch.setattr(client.storage.bucket, "check_exclusive", lambda store: probed.append(check(store)))
    name = os.urandom(4).hex()
    assert Bucket(f"{s3}/{name}").get("a") is None and not probed
    assert [Bucket(f"{s3}/{name}/{folder}").create("a", b"") for folder in "xxy"] == [True, False, True]
    assert len(probed) == 1 and sorted(Bucket(f"{s3}/{name}").names("")) == ["x/a", "y/a"]


# Folders without hard links.


@pytest.fixture(params=[1, 38, 95])
def without_links(request, monkeypatch):
    """What obstore says on a file system without hard links; those at hand all have them."""
    rename = obstore.rename

    def refused(store, source, target, *, overwrite=True):
        if not overwrite:
            raise GenericError(f"Unable to copy file from {source} to {target}: Nope (os error {request.param})")
        rename(store, source, target, overwrite=overwrite)

    monkeypatch.setattr(obstore, "rename", refused)


def test_in_a_folder_without_hard_links_one_of_many_creates(tmp_path, without_links):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: Bucket(str(tmp_path)).create("jobs/owner", b"%d" % number), range(64)))
    assert made.count(True) == 1
    assert (tmp_path / "jobs" / "owner").read_bytes() == b"%d" % made.index(True)
    assert list(Bucket(str(tmp_path)).names("")) == ["jobs/owner"]
    assert Bucket(str(tmp_path)).create("jobs/owner-2", b"")
    for left in (tmp_path / "jobs").glob(".*"):
        left.unlink()  # as the README allows
    assert not Bucket(str(tmp_path)).create("jobs/owner", b"")


def test_a_run_in_a_folder_without_hard_links_is_sealed_opened_and_sealed_again(tmp_path, without_links):
    bucket = Bucket(str(tmp_path))
    for body in (b"1", b"2"):
        assert bucket.create("complete.json", body) and not bucket.create("complete.json", b"3")
        assert bucket.get("complete.json") == body
        bucket.remove("complete.json")


def test_a_claim_of_a_process_that_died_is_taken_over(tmp_path, without_links, monkeypatch):
    claim = tmp_path / claim_name("run.json")
    claim.touch()
    monkeypatch.setattr(client.storage.claims, "CLAIM_SECONDS", 0.2)
    began = time.monotonic()
    assert Bucket(str(tmp_path)).create("run.json", b"{}") and time.monotonic() - began > 0.1
    assert not Bucket(str(tmp_path)).create("run.json", b"{}")


def test_what_a_dead_process_claimed_goes_to_one_alone(tmp_path, without_links, monkeypatch):
    monkeypatch.setattr(client.storage.claims, "CLAIM_SECONDS", 0.5)
    replace = Path.replace

    def slow(path, target):
        time.sleep(0.05)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", slow)
    claim = tmp_path / claim_name("owner")
    claim.touch()
    os.utime(claim, (0, 0))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: Bucket(str(tmp_path)).create("owner", b"%d" % number), range(8)))
    assert made.count(True) == 1 and (tmp_path / "owner").read_bytes() == b"%d" % made.index(True)


# URLs.


@pytest.mark.parametrize(
    "url",
    ["s3://b/run?1", "s3://b/run#1", "s3://b/a%20b", "s3://b/a//b", "s3://b/a/../b", "s3://b/./a", " s3://b/a",
     "s3://b/a ", "s3://b/a\n", "s3://b/a\\b", "s3://b:1/a", "s3://u:p@b/a", "gs://b:2/a", "s3:///a"],
)  # fmt: skip
def test_a_url_of_which_a_part_would_be_cut_or_decoded_is_refused(url):
    with pytest.raises(BucketError, match="two names are two places"):
        Bucket(url)


def test_urls_that_mean_what_they_say_are_kept_apart(s3):
    names = ["a b", "é日", "a:b", "a+b", "a*b", "a=b", "a.b", "A B"]
    for name in names:
        Bucket(f"{s3}/apart/{name}").put("x", name.encode())
    assert [Bucket(f"{s3}/apart/{name}").get("x").decode() for name in names] == names
